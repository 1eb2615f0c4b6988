"""Learned prompts in frozen towers: visual prompts between patch tokens, context in front of class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from capt.backbones.base import FeedForward, TokenBlock, TokenTower
from capt.backbones.digest import strong_digest
from capt.errors import CaptError

if TYPE_CHECKING:
    from capt.backbones import Backbone

FIRST_WORDS = "a photo of a"
DEVIATION = 0.02  # of fresh prompts

# Estimated beside what is kept for gradients: passing tensors of a block's size, what an allocator holds for each byte
# in use, and copies of all features.
_PASSING = 6
_HEAP = 2
_COPIES = 6


def _checked(what: str, n_ctx: int, depth: int) -> None:
    if n_ctx < 1 or depth < 1:
        raise CaptError(f"{what}: n_ctx and depth must be at least 1, found n_ctx={n_ctx}, depth={depth}")


# ---- images ----------------------------------------------------------------------------------------------


class _PromptedBlock(TokenBlock):
    """A block whose input has its prompts replaced by its own."""

    def __init__(self, block: TokenBlock, tower: PromptedTower, depth: int) -> None:
        self.block, self.tower, self.depth = block, tower, depth

    def attend(self, x: Tensor) -> Tensor:
        """``y + MHSA(LN1 y)`` with y = x but for the prompts, [B, L, D]."""
        return self.block.attend(self.tower.prompted(self.tower.stripped(x), self.depth))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        return self.block.feed_forward(x)

    def feed_forward_weights(self) -> FeedForward | None:
        """Those of the wrapped block."""
        return self.block.feed_forward_weights()


class PromptedTower(TokenTower):
    """A frozen image tower with learned tokens: one set enters block 0, a fresh set replaces it at each block after.

    The prompts stand right behind the tower's own prefix. Positions are added before, so that equals the published
    place behind the patches, and the patch grid stays in one piece: everything that works on a tower works on this
    one, with ``n_prefix`` larger by ``n_ctx``.

    Attributes:
        inner: the wrapped tower.
        prompts: parameter, float32 [depth, n_ctx, D]; cast to the type of the tokens where it is used. Whoever makes
            the tower has to register it, as a tower is no module.

    Source: deep visual prompts as in independent vision-language prompting (MaPLe, arXiv 2210.03117).
    """

    def __init__(
        self, inner: TokenTower, n_ctx: int = 4, depth: int = 9, *, device: torch.device | str | None = None
    ) -> None:
        """Wrap ``inner`` with prompts drawn from N(0, 0.02).

        Args:
            n_ctx: learned tokens a set.
            depth: sets; more than the tower has blocks mean one for every block.

        Raises:
            CaptError: ``n_ctx`` or ``depth`` below 1, or a tower without blocks.
        """
        _checked("visual prompts", n_ctx, depth)
        if not inner.blocks:
            raise CaptError(
                f"visual prompts: {type(inner).__name__} has no transformer blocks to attend to learned tokens; take "
                "an image tower that has (--model embedded-vit), or learn text prompts only (visual_depth=0)"
            )
        depth = min(depth, len(inner.blocks))
        self.inner = inner
        self.prompts = nn.Parameter(DEVIATION * torch.randn(depth, n_ctx, inner.width, device=device))
        self.image_hw, self.grid, self.width, self.dim = inner.image_hw, inner.grid, inner.width, inner.dim
        self.activation = inner.activation
        self.n_prefix = inner.n_prefix + n_ctx
        self.blocks = [
            _PromptedBlock(block, self, index) if 1 <= index < depth else block
            for index, block in enumerate(inner.blocks)
        ]

    def prompted(self, tokens: Tensor, depth: int = 0) -> Tensor:
        """Tokens [B, P + H*W, D] of the inner tower with the prompts of one depth, [B, P + n_ctx + H*W, D]."""
        own = self.prompts[depth].to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, : self.inner.n_prefix], own, tokens[:, self.inner.n_prefix :]], dim=1)

    def stripped(self, tokens: Tensor) -> Tensor:
        """Tokens [B, P + n_ctx + H*W, D] without the prompts, [B, P + H*W, D]."""
        return torch.cat([tokens[:, : self.inner.n_prefix], tokens[:, self.n_prefix :]], dim=1)

    def begin(self, inner_tokens: Tensor) -> Tensor:
        """Tokens that enter block 0, of ``inner.embed(images)``: all before is frozen and may be cached."""
        return self.prompted(inner_tokens)

    def _embed(self, images: Tensor) -> Tensor:
        return self.begin(self.inner._embed(images))

    def project(self, tokens: Tensor) -> Tensor:
        """Pooling and projection without the prompts: [B, n_prefix + H*W, D] to [B, d]."""
        return self.inner.project(self.stripped(tokens))


# ---- texts -----------------------------------------------------------------------------------------------


def in_chunks(encode: Callable[..., Tensor], n: int, chunk: int, *learned: Tensor | None) -> Tensor:
    """Unit-norm features float32 [n, d] of n texts, encoded ``chunk`` at a time.

    With gradients no more than one chunk's activations exist at a time: each chunk is computed again on the way back,
    which ``backward()`` can do and ``torch.autograd.grad`` cannot.

    Args:
        encode: (slice of the texts, *learned) -> un-normalised features [n', d].
        learned: every tensor that needs a gradient.
    """
    again = torch.is_grad_enabled() and n > chunk  # what computing again needs at once is a single chunk's activations
    features = []
    for first in range(0, n, chunk):
        rows = slice(first, first + chunk)
        # Re-entrant, because that way leaves no graph behind: thousands of small nodes between the freed activations
        # would keep the C library from using that memory for the next chunk.
        features.append(
            checkpoint(encode, rows, *learned, use_reentrant=True, preserve_rng_state=False)
            if again
            else encode(rows, *learned)
        )
    return F.normalize(torch.cat(features).float(), dim=-1)


class TextPrompts(nn.Module):
    """Learned context in front of any class names: ``[SOS] [context] [class name . EOS]``.

    Holds the context alone, so what was learned on some classes serves any others. Tokenizers without a start token
    get the context first.

    Attributes:
        context: parameter, float32 [n_ctx, W]; enters block 0.
        deep: parameter, float32 [depth - 1, n_ctx, W], which takes the context's place at blocks 1, 2, ...; None at
            depth 1.
        chunk: classes encoded together.

    Source: CoOp (arXiv 2109.01134); deep context as in independent vision-language prompting (MaPLe, arXiv
    2210.03117). Chunks that are computed again for their gradients: ours.
    """

    def __init__(self, backbone: Backbone, n_ctx: int = 4, depth: int = 1, *, chunk: int = 64) -> None:
        """Fresh prompts: the words "a photo of a" where they are ``n_ctx`` tokens, else (and deeper) N(0, 0.02).

        Args:
            backbone: whose text tower they are for.
            n_ctx: learned tokens.
            depth: sets; more than the tower has blocks mean one for every block.

        Raises:
            CaptError: an argument below 1, or depth above 1 in a text tower that does not support it.
        """
        super().__init__()
        _checked("text prompts", n_ctx, depth)
        if chunk < 1:
            raise CaptError(f"text prompts: chunk must be at least 1, found {chunk}")
        tower, device = backbone.text_tower, backbone.device
        if depth > 1 and not tower.blocks:
            raise CaptError(
                f"text prompts: depth {depth} needs the blocks of open_clip's own text transformer or of transformers' "
                f"CLIP, but this text tower is {type(tower).__name__}; use depth 1"
            )
        self.chunk = chunk
        self.start = first_token(backbone)
        self.context = nn.Parameter(self._first_words(backbone, n_ctx))
        depth = min(depth, max(len(tower.blocks), 1))
        deep = DEVIATION * torch.randn(depth - 1, n_ctx, tower.width, device=device)
        self.deep = nn.Parameter(deep) if depth > 1 else None
        self._last: tuple[object, Tensor, list[int]] | None = None

    def _first_words(self, backbone: Backbone, n_ctx: int) -> Tensor:
        words = backbone.embed_prompts(FIRST_WORDS)
        if int(words.eot_index) - self.start == n_ctx:
            return words.embeddings[0, self.start : self.start + n_ctx].detach().float().clone()
        return DEVIATION * torch.randn(n_ctx, backbone.text_tower.width, device=backbone.device)

    def forward(self, backbone: Backbone, class_names: Sequence[str]) -> Tensor:
        """Unit-norm features [C, d] of class names.

        With gradients where the prompts take some: then no more than one chunk's activations exist at a time, as each
        chunk is computed again on the way back, which ``backward()`` can do and ``torch.autograd.grad`` cannot.
        Without, every name is encoded once for the prompts as they are.

        Raises:
            CaptError: context and class name do not fit into a text.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self._encoded(backbone, list(class_names))

        def encode(names: list[str]) -> dict[str, Tensor]:
            # Tensors made in inference mode could not take part in training later on.
            with torch.inference_mode(False), torch.no_grad():
                return dict(zip(names, self._encoded(backbone, names), strict=True))

        return backbone.remembered(class_names, encode, self.digest())

    def digest(self) -> str:
        """Hexadecimal digest of the prompts."""
        return strong_digest(self.named_parameters(), self.start)

    def _encoded(self, backbone: Backbone, names: list[str]) -> Tensor:
        if not names:
            return torch.empty(0, backbone.dim, device=backbone.device)
        tokens, ends = self._tokens(backbone, names)

        def encode(rows: slice, context: Tensor, deep: Tensor | None) -> Tensor:
            return self._pass(context, deep, backbone, tokens[rows], ends[rows])

        return in_chunks(encode, len(names), self.chunk, self.context, self.deep)

    def _pass(
        self, context: Tensor, deep: Tensor | None, backbone: Backbone, tokens: Tensor, ends: list[int]
    ) -> Tensor:
        """Un-normalised features [n, d] of ids [n, L] without context, whose ends with context are ``ends``."""
        tower, n_ctx = backbone.text_tower, len(context)
        length = max(ends) + 1 if tower.causal else tokens.shape[1]
        words = tower.embed(tokens[:, : length - n_ctx])
        context = context.to(words.dtype).expand(len(words), -1, -1)
        embeddings = torch.cat([words[:, : self.start], context, words[:, self.start :]], dim=1)
        with nullcontext() if deep is None else tower.deep_prompts(deep, self.start):
            return tower.encode_embedded(embeddings, torch.tensor(ends, device=words.device))

    def _tokens(self, backbone: Backbone, names: list[str]) -> tuple[Tensor, list[int]]:
        """Ids int64 [C, context_length] of "name.", and where each text ends once the context is in."""
        key = (backbone.tokenizer, *names)
        if self._last is None or self._last[0] != key:  # a step of training asks for the same names as the one before
            tokens = backbone.tokenize([f"{name}." for name in names])
            ends = backbone.text_tower.eot_index(tokens).tolist()
            longest = max(range(len(names)), key=ends.__getitem__)
            backbone.check_prompt_fits(ends[longest] + 1, len(self.context), names[longest])
            self._last = key, tokens.to(backbone.device), [end + len(self.context) for end in ends]
        return self._last[1], self._last[2]

    def memory(self, backbone: Backbone, class_names: Sequence[str]) -> int:
        """:func:`text_memory` of these classes, bytes."""
        _, ends = self._tokens(backbone, list(class_names))
        return text_memory(backbone, len(ends), self.chunk, len(self.context), max(ends) + 1 - len(self.context))

    def extra_repr(self) -> str:
        """Sizes."""
        depth = 1 if self.deep is None else len(self.deep) + 1
        return f"n_ctx={len(self.context)}, depth={depth}, chunk={self.chunk}"


def first_token(backbone: Backbone) -> int:
    """Position of a text's first word: 1 with a start token, else 0."""
    tokens = backbone.tokenize(["a", "photo"])
    return int(tokens[0, 0] == tokens[1, 0])


def text_memory(backbone: Backbone, n_classes: int, chunk: int = 64, n_ctx: int = 4, length: int | None = None) -> int:
    """Bytes that texts of ``n_classes`` take at their peak while prompts are trained: an upper estimate.

    One text is run to see what it leaves behind for its gradients; a chunk leaves ``chunk`` times that, and only
    features and ids grow with the number of classes.

    Args:
        n_ctx: learned tokens.
        length: tokens of the longest class name as a text, start and end included; default: as many as fit. Towers
            that are not causal always take the whole context length.
    """
    tower = backbone.text_tower
    length = min(length + n_ctx, backbone.context_length) if length and tower.causal else backbone.context_length
    own = {tensor.untyped_storage().data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = torch.zeros(1, length, tower.width, device=backbone.device, dtype=backbone.dtype)
        features = tower.encode_embedded(embeddings.requires_grad_(), torch.tensor([length - 1]))
    passing = _PASSING * max(kept.values())
    a_class = _COPIES * features.shape[1] * 4 + backbone.context_length * 8
    return _HEAP * min(chunk, n_classes) * (sum(kept.values()) + passing) + n_classes * a_class
