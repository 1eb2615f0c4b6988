"""CPRFL: category prompts refined with the image, for long-tailed multi-label classification."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.model import MultiLabelModel, spoken
from capt.modules.class_rows import ClassRows
from capt.modules.prompt_initialiser import PromptInitialiser
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction

if TYPE_CHECKING:
    from capt.backbones import Backbone

TEMPLATE = "a photo of a {}."
#: Epochs of ten in which the interaction, and in which the prompt network does not learn (``alternate``).
_FROZEN = {"interaction": range(0, 5), "prompt_initialiser": range(5, 9)}


class CPRFL(MultiLabelModel):
    """Text embeddings of class names become category prompts, which look at the patches and score what they saw.

    ``P = prompt_initialiser(T)``, ``P' = interaction(projection(patches), P)``, logit of class c ``<p'_c, p_c>``; with
    ``text_prior`` ``n_c / (n_c + shrinkage) <p'_c, p_c>`` plus the logit of a linear classifier started from the texts.

    Attributes:
        text: T, un-normalised text embeddings of ``a photo of a {class}.``, float32 [C, d_t]; what the frozen tower
            gives, stored with the model.
        prior: that classifier; None without.
        trust: n_c / (n_c + shrinkage), float32 [C]; ones before training has seen the data, or without prior.
        tuned: a copy of the backbone whose towers learn, if one does; None otherwise.

    Source: CPRFL, arXiv 2408.08125. Towers stay in evaluation mode, so statistics of batch normalisation are kept;
    frozen towers by default, prior and shrinkage: ours.
    """

    kind = "cprfl"
    config_type = CPRFLConfig
    config: CPRFLConfig
    text: Tensor
    trust: Tensor

    def __init__(self, backbone: Backbone, classes: Sequence[str], config: CPRFLConfig | None = None) -> None:
        super().__init__(backbone, classes, config)
        chosen = self.config
        tokens = backbone.tokenize([TEMPLATE.replace("{}", name) for name in spoken(self.classes)]).to(backbone.device)
        with torch.no_grad():
            text = torch.cat([backbone.encode_trimmed(part) for part in tokens.split(256)]).float()
        self.register_buffer("text", text)
        self.register_buffer("tokens", tokens, persistent=False)
        self.tuned = self._tuned_copy() if chosen.train_text or chosen.train_image else None
        self._learns = set(self.trainable())  # of the towers; kept when training has ended
        self.prompt_initialiser = PromptInitialiser(
            text.shape[1], chosen.dim, hidden_ratio=chosen.hidden_ratio, linear=chosen.linear_prompts,
            dropout=chosen.prompt_dropout,
        )  # fmt: skip
        self.projection = nn.Linear(backbone.token_dim, chosen.dim)
        self.interaction = VisualSemanticInteraction(
            chosen.dim, depth=chosen.depth, n_heads=chosen.n_heads, head_dim=chosen.head_dim,
            hidden=chosen.feed_forward, residual=chosen.residual, dropout=chosen.interaction_dropout,
        )  # fmt: skip
        self.register_buffer("trust", torch.ones(len(self.classes)))
        self.prior: ClassRows | None = None
        if chosen.text_prior:
            texts = backbone.class_text_features(spoken(self.classes))
            self.prior = ClassRows(texts, float(backbone.logit_scale))
            for parameter in self.interaction.layers[-1].get_submodule("w_out").parameters():
                nn.init.zeros_(parameter)

    def _tuned_copy(self) -> Backbone:
        """A copy of the backbone, in which that learns which patches (``train_image``) or texts depend on."""
        tuned = copy.deepcopy(self.backbone)
        outputs: list[Tensor] = []
        parameters = list(tuned.model.requires_grad_().parameters())
        with torch.enable_grad():
            if self.config.train_text:
                outputs.append(tuned.encode_trimmed(self.get_buffer("tokens")[:1]).sum())
            if self.config.train_image:
                tokens = self._tokens(tuned, torch.zeros(1, 3, *tuned.image_hw))
                outputs.append(tuned.tower.project(tokens).sum() if self.config.text_prior else tokens.sum())
            used = torch.autograd.grad(outputs, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, used, strict=True):
            parameter.requires_grad_(gradient is not None)
        return tuned

    # ---- images --------------------------------------------------------------------------------------

    @property
    def input_kind(self) -> Hashable:
        """Frozen tokens, or pictures where the image tower learns."""
        return ("images" if self.config.train_image else "tokens", self.config.normalize)

    def inputs(self, images: Tensor) -> Tensor:
        """Tokens [B, L, D] of the frozen tower, or the images themselves where it learns."""
        if not self.config.normalize:
            like = self.backbone.train_transform
            mean, std = (images.new_tensor(values)[:, None, None] for values in (like.mean, like.std))
            images = images * std + mean
        if self.config.train_image:
            return images
        with torch.no_grad():
            return self._tokens(self.backbone, images)

    def _tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        return backbone.tower.run(images.to(device=backbone.device, dtype=backbone.dtype))

    # ---- scores --------------------------------------------------------------------------------------

    def category_prompts(self) -> Tensor:
        """P, [C, dim]."""
        text = self.text
        if self.tuned is not None and self.config.train_text:
            text = self.tuned.encode_trimmed(self.get_buffer("tokens")).float()
        prompts: Tensor = self.prompt_initialiser(text)
        return prompts

    def features(self, inputs: Tensor, prompts: Tensor) -> Tensor:
        """Category-specific features P', [B, C, dim], of :meth:`inputs` and :meth:`category_prompts`."""
        features: Tensor = self.interaction(self._patches(self._seen(inputs)), prompts)
        return features

    def _seen(self, inputs: Tensor) -> Tensor:
        """Tokens [B, L, D] of whichever tower looks."""
        if self.tuned is None or not self.config.train_image:
            return inputs
        return self._tokens(self.tuned, inputs)

    def _patches(self, tokens: Tensor) -> Tensor:
        patches: Tensor = self.projection(self.backbone.tower.patches(tokens).to(self.projection.weight.dtype))
        return patches

    def _image_feature(self, tokens: Tensor) -> Tensor:
        """Unit-norm feature [B, d] of a tower's tokens."""
        tower = (self.backbone if self.tuned is None else self.tuned).tower
        return F.normalize(tower.project(tokens).float(), dim=-1)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits float32 [B, C]: ``<p'_c, p_c>``, weighed and with the prior where there is one."""
        tokens = self._seen(inputs)
        scores = self._refined(self._patches(tokens), self.category_prompts()).float()
        if self.prior is None:
            return scores
        prior: Tensor = self.prior(self._image_feature(tokens))
        return prior + self.trust * scores

    def _refined(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """``<p'_c, p_c>`` [B, C] with gradients along the chosen paths."""
        if self.config.paths == "both":
            scores: Tensor = self.interaction.scores(patches, prompts)
            return scores
        features: Tensor = self.interaction(patches, prompts)
        if self.config.paths == "encoder":
            prompts = prompts.detach()
        else:
            features = features.detach()
        return (features.float() * prompts.float()).sum(-1)

    # ---- training ------------------------------------------------------------------------------------

    def trained_by_rate(self) -> Mapping[float, list[nn.Parameter]]:
        """Towers and prior with their own factors on the learning rate."""
        rates: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trainable().items():
            part = name.split(".")[0]
            rate = {"tuned": self.config.backbone_lr_mult, "prior": self.config.prior_lr_mult}.get(part, 1.0)
            rates.setdefault(rate, []).append(parameter)
        return rates

    def prepare(self, inputs: Iterable[Tensor], counts: Tensor) -> None:
        """Set the prior's biases by the mean training feature, and the trust in refined scores."""
        if self.prior is not None:
            with torch.no_grad():
                features = [self._image_feature(self._seen(batch)) for batch in inputs]
            self.prior.centre(torch.cat(features).mean(0))
            self.trust.copy_(counts / (counts + self.config.shrinkage).clamp_min(1))

    def start_epoch(self, epoch: int) -> None:
        """Freeze what the schedule of ``alternate`` leaves as it is."""
        if self.config.refinement == "alternate":
            for name, epochs in _FROZEN.items():
                self.get_submodule(name).requires_grad_(epoch % 10 not in epochs)

    def state(self) -> dict[str, Tensor]:
        """What was learned, by name; of the tuned towers only what learns."""
        found = super().state()
        return {name: value for name, value in found.items() if not name.startswith("tuned.") or name in self._learns}
