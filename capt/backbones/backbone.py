"""One frozen image-text model behind one interface."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.backbones.base import PromptEmbeddings, TextTower, TokenTower, check_images
from capt.backbones.digest import StateDigest
from capt.backbones.text_cache import TextCache
from capt.backbones.tokenizer import PromptTokenizer
from capt.backbones.transforms import describe_transform, train_transform_like
from capt.errors import CaptError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEXT_BATCH = 256


class Backbone(nn.Module):
    """A frozen CLIP-family model: images and texts into one space of width d.

    Made by :func:`capt.backbones.wrap` and :func:`capt.backbones.load`. The wrapped model is ``self.model``;
    its parameters need no gradient and it stays in evaluation mode whatever mode a surrounding module is put in.

    Attributes:
        name: what the model is called in records.
        dim: d, width of the joint space.
        token_dim: D, width of the image tokens.
        image_hw: (height, width) of its images; ``image_size`` is the shorter side.
        context_length: tokens in a text.
        tower: image side, see :class:`TokenTower`.
        text_tower: text side, see :class:`TextTower`.
        templates: prompt templates with ``{}``, used by :meth:`class_text_features`.
        preprocess: evaluation transform, PIL image to float32 [3, height, width].
        train_transform: training transform with the same normalisation.
        text_cache: features of strings encoded before.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: TokenTower,
        text_tower: TextTower,
        *,
        name: str,
        tokenizer: Callable[..., Any] | None,
        preprocess: Callable[[Image], Tensor],
        truncate: str = "error",
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.tower = tower
        self.text_tower = text_tower
        self.name = name
        self.dim = tower.dim
        self.token_dim = tower.width
        self.image_hw = tower.image_hw
        self.image_size = min(tower.image_hw)
        self.templates = list(templates)
        self.preprocess = preprocess
        self.train_transform = train_transform_like(preprocess, tower.image_hw)
        self.tokenizer = None if tokenizer is None else PromptTokenizer(tokenizer, text_tower, truncate)
        self.context_length = self.tokenizer.context_length if self.tokenizer else text_tower.context_length
        self.text_cache = TextCache()
        self._tokenizer_probe = self.tokenizer.probe() if self.tokenizer else None
        self._tower_record: dict[str, Any] = {}
        self._text_state = StateDigest(model, leaving_out=("visual", "vision_model"))
        self._full_state = StateDigest(model)
        self.eval()

    # --- what the wrapped model offers ---------------------------------------------------------------

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of this module; the wrapped model stays in evaluation mode, being frozen."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosines (already exponentiated), float32 scalar tensor."""
        scale: Tensor = self.model.logit_scale
        return scale.detach().float().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor:
        """What SigLIP-like models add to the logits, float32 scalar tensor; 0 for the others."""
        bias = getattr(self.model, "logit_bias", None)
        return torch.zeros((), device=self.device) if bias is None else bias.detach().float().reshape(())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._a_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the image tower's weights."""
        return self._a_weight().dtype

    def _a_weight(self) -> Tensor:
        return next(self.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`image_features`."""
        return self.image_features(images)

    def image_features(self, images: Tensor) -> Tensor:
        """Images float [B, 3, height, width] to un-normalised features [B, d].

        The very path of ``tower.project(tower.run(images))``, so results are equal bit for bit.

        Raises:
            DataError: wrong shape, type or resolution.
        """
        check_images(images, self.image_hw)
        return self.tower.project(self.tower.run(images.to(device=self.device, dtype=self.dtype)))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, height, width] to features [B, d], as open_clip's method of that name."""
        features = self.image_features(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids int64 [N, context_length] to features [N, d], as open_clip's method of that name."""
        features = self.text_tower.encode(tokens.to(self.device))
        return F.normalize(features, dim=-1) if normalize else features

    # --- text ----------------------------------------------------------------------------------------

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts to token ids int64 [N, context_length].

        Raises:
            CaptError: a text does not fit (unless made with ``truncate="warn"``), or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise CaptError("tokenizer: this backbone was wrapped without one; use wrap(model, tokenizer).")
        return self.tokenizer(texts)

    def check_prompt_fits(self, n_tokens: int, n_ctx: int, text: str = "") -> None:
        """Refuse learned context that would push the text's end out of the model's context.

        Args:
            n_tokens: tokens of the text, start and end included (``text_tower.eot_index(tokens) + 1``).
            n_ctx: learned tokens put before it.
            text: named in the message.

        Raises:
            CaptError: ``n_tokens + n_ctx`` exceeds the context length.
        """
        if n_tokens + n_ctx > self.context_length:
            raise CaptError(
                f"n_ctx: {n_ctx} learned tokens and {n_tokens} tokens of {text or 'the text'!r} make "
                f"{n_tokens + n_ctx}, but the text tower takes {self.context_length}: the class name or the end token "
                f"would be cut off. Use at most {max(0, self.context_length - n_tokens)} learned tokens."
            )

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to token embeddings [N, L, W], without positions."""
        return self.text_tower.embed(tokens.to(self.device))

    def embed_prompts(self, texts: str | Sequence[str]) -> PromptEmbeddings:
        """Texts as :class:`PromptEmbeddings`, the starting point of learned prompts."""
        tokens = self.tokenize(texts).to(self.device)
        return PromptEmbeddings(self.text_tower.embed(tokens), self.text_tower.eot_index(tokens))

    def encode_embedded(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Token embeddings [N, L, W] and end positions int64 [N] to un-normalised features [N, d].

        Gradients flow to the embeddings.
        """
        return self.text_tower.encode_embedded(embeddings, eot_index)

    def text_features(self, texts: str | Sequence[str] | Tensor | PromptEmbeddings) -> Tensor:
        """Texts to unit-norm features [N, d].

        Args:
            texts: strings (encoded without gradient, and only once as long as the text tower stays the same),
                token ids int64 [N, L], or :class:`PromptEmbeddings` (with gradient).
        """
        if isinstance(texts, PromptEmbeddings):
            pairs = zip(texts.embeddings.split(TEXT_BATCH), texts.eot_index.split(TEXT_BATCH), strict=True)
            return self._joined([self.encode_embedded(*chunk) for chunk in pairs])
        if isinstance(texts, Tensor):
            return self._joined([self.encode_text(chunk) for chunk in texts.split(TEXT_BATCH)])
        return self.remembered([texts] if isinstance(texts, str) else list(texts), self._encoded)

    def class_text_features(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Unit-norm features [C, d]: mean over the templates, normalised again.

        Args:
            class_names: put in place of ``{}``.
            templates: ``self.templates`` by default.
        """
        templates = self.templates if templates is None else list(templates)
        if not templates:
            raise CaptError("templates: at least one is needed, such as 'a photo of a {}.'.")
        for template in templates:
            if "{}" not in template:
                raise CaptError(f"templates: {template!r} has no '{{}}' for the class name.")
        texts = [template.replace("{}", name) for name in class_names for template in templates]
        features = self.text_features(texts).reshape(len(class_names), len(templates), self.dim)
        return F.normalize(features.mean(dim=1), dim=-1)

    def _joined(self, features: list[Tensor]) -> Tensor:
        if not features:
            return torch.empty(0, self.dim, device=self.device)
        return F.normalize(torch.cat(features).float(), dim=-1)

    def remembered(
        self, texts: Sequence[str], encode: Callable[[list[str]], dict[str, Tensor]], prompts: str = ""
    ) -> Tensor:
        """Features [N, d] that ``encode`` gives by text, each computed once for one state of the text tower.

        Args:
            texts: brought to Unicode normal form C first.
            encode: distinct texts -> feature [d] by text, without gradient.
            prompts: digest of whatever else the features depend on, such as learned context.
        """
        texts = [unicodedata.normalize("NFC", text) if isinstance(text, str) else text for text in texts]
        wanted = list(dict.fromkeys(texts))
        if self._text_state.hooked():  # a hook can do anything, so nothing may be remembered
            known = encode(wanted)
        else:
            state = f"{self._text_state(self._tokenizer_probe)}-{self.device.type}{prompts and '-'}{prompts}"
            known = self.text_cache.get(state, wanted)
            fresh = encode([text for text in wanted if text not in known])
            self.text_cache.put(state, fresh)
            known |= fresh
        if not texts:
            return torch.empty(0, self.dim, device=self.device)
        return torch.stack([known[text] for text in texts]).to(self.device)

    def _encoded(self, texts: list[str]) -> dict[str, Tensor]:
        if not texts:
            return {}
        tokens = self.tokenize(texts).to(self.device)
        # Tensors made in inference mode could not take part in training later on.
        with torch.inference_mode(False), torch.no_grad():
            chunks = [self.encode_trimmed(chunk) for chunk in tokens.split(TEXT_BATCH)]
        return dict(zip(texts, self._joined(chunks), strict=True))

    def encode_trimmed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to un-normalised features [N, d], without the padding that no text of them needs.

        Exact where attention is causal; elsewhere all is encoded.
        """
        if not self.text_tower.causal:
            return self.text_tower.encode(tokens)
        end = self.text_tower.eot_index(tokens)
        tokens = tokens[:, : int(end.max()) + 1]
        return self.text_tower.encode_embedded(self.text_tower.embed(tokens), end)

    # --- records -------------------------------------------------------------------------------------

    def with_tower(self, tower: TokenTower, record: dict[str, Any]) -> Backbone:
        """The same model seen through another image tower over its weights: nothing is copied.

        Args:
            tower: same sizes as ``self.tower``.
            record: JSON-able, what makes it another one; becomes part of :meth:`fingerprint`.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.tower = tower
        other._tower_record = self._tower_record | record
        other._full_state = StateDigest(self.model)
        return other

    def frozen_check(self) -> None:
        """Raise :class:`CaptError` if any parameter of the wrapped model requires a gradient."""
        loose = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if loose:
            raise CaptError(
                f"backbone: {len(loose)} parameters require gradients although it must stay frozen, the first is "
                f"'{loose[0]}'. Call backbone.requires_grad_(False)."
            )

    def fingerprint(self) -> str:
        """Hexadecimal digest of weights, sizes, activations, tokenizer and preprocessing.

        Equal on every device; computed again only when something changed.
        """
        return self._full_state([self._record(), self._tokenizer_probe])

    def _record(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "token_dim": self.token_dim,
            "image_hw": list(self.image_hw),
            "grid": list(self.tower.grid),
            "context_length": self.context_length,
            "activations": [self.tower.activation, self.text_tower.activation],
            "preprocess": {k: v for k, v in describe_transform(self.preprocess).items() if k != "pillow"},
            **self._tower_record,
        }

    def extra_repr(self) -> str:
        """Name and sizes."""
        return f"{self.name}, dim={self.dim}, image={self.image_hw}, tokens={self.tower.grid} x {self.token_dim}"
