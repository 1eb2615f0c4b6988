"""What every wrapped image and text tower offers, whatever library it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from capt.backbones.attention import AttentionParts, Map, unsupported
from capt.backbones.pooling import Pooling
from capt.errors import CaptError, DataError

BlockHook = Callable[[int, Tensor], Tensor]
"""``hook(block_index, attended) -> tokens``: called between attention and feed-forward, [B, L, D] both ways."""


class TokenGrid(NamedTuple):
    """Patch tokens at one depth of an image tower.

    Attributes:
        name: where they come from, such as ``"block6"`` or ``"layer3"``.
        tokens: [B, H*W, D'], row-major over the grid, no prefix tokens.
        grid: (H, W).
    """

    name: str
    tokens: Tensor
    grid: tuple[int, int]


class FeedForward(NamedTuple):
    """Weights of the feed-forward part of one block: ``w_out @ act(w_in @ x + b_in) + b_out``."""

    w_in: Tensor  # [H, D]
    b_in: Tensor  # [H]
    w_out: Tensor  # [D, H]
    b_out: Tensor  # [D]
    activation: str


class BlockParts(NamedTuple):
    """Modules of one block whose output an adapter may change; None where there is no such single module.

    Attributes:
        norm: the normalisation in front of the attention, whose output is all that the attention sees.
        hidden: the first linear layer of the feed-forward part.
        sequence_first: ``norm`` works on [L, B, D].
    """

    norm: nn.Module | None
    hidden: nn.Module | None
    sequence_first: bool = False


class PromptEmbeddings(NamedTuple):
    """Texts as token embeddings, for prompts that are learned or mixed.

    Attributes:
        embeddings: float [N, L, W], token embeddings without positions.
        eot_index: int64 [N], position of each text's end token.
    """

    embeddings: Tensor
    eot_index: Tensor


class TokenBlock(ABC):
    """One transformer block, cut between attention and feed-forward.

    Both halves take and return [B, L, D] and include the residual connection and layer scale.
    """

    @abstractmethod
    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``."""

    @abstractmethod
    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``."""

    def feed_forward_weights(self) -> FeedForward | None:
        """The two linear layers, or None when the MLP is not linear, activation, linear."""
        return None

    def inner(self) -> BlockParts | None:
        """Where an adapter can stand inside the two halves; None: only between them."""
        return None

    def attention(self) -> AttentionParts:
        """The attention taken apart: ``attend(x) = x + parts.attend(parts.before(x))`` up to rounding.

        Raises:
            CaptError: it is not plain softmax attention.
        """
        raise unsupported(f"its blocks have an attention of unknown kind ({type(self).__name__})")


class WrappedBlock(TokenBlock):
    """A block that attends in another way and is the wrapped one in everything else; ``block``: the wrapped one."""

    def __init__(self, block: TokenBlock) -> None:
        self.block = block

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        return self.block.feed_forward(x)

    def feed_forward_weights(self) -> FeedForward | None:
        """Those of the wrapped block."""
        return self.block.feed_forward_weights()

    def inner(self) -> BlockParts | None:
        """That of the wrapped block."""
        return self.block.inner()

    def attention(self) -> AttentionParts:
        """That of the wrapped block, without what is changed."""
        return self.block.attention()


class TokenTower(ABC):
    """An image tower seen as: embed, blocks, project.

    ``project(run(images))`` equals the wrapped model's un-normalised ``encode_image(images)``. Towers
    hold references into the wrapped model and own no parameters.

    Attributes:
        image_hw: (height, width) of the images it takes.
        grid: (H, W) of the patch tokens.
        n_prefix: tokens before the grid (class and register tokens).
        width: D.
        dim: d, width of the projected feature.
        blocks: transformer blocks; empty for convolutional towers, whose tokens are the final feature map.
        activation: name of the activation in its feed-forward parts.
        pools_first: the feature is that of the first token alone.
    """

    image_hw: tuple[int, int]
    grid: tuple[int, int]
    n_prefix: int
    width: int
    dim: int
    blocks: Sequence[TokenBlock] = ()
    activation: str = ""
    pools_first: bool = False

    @abstractmethod
    def _embed(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Tokens after all blocks [B, n_prefix+H*W, D] to un-normalised features [B, d]."""

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Every token through final norm and projection as if it alone were pooled: [B, L, D] to [B, L, d]."""
        # As many copies as the tower has prefix tokens, and one patch: whichever of them is pooled, it is this token.
        copies = 1 if self.pools_first else self.n_prefix + 1
        alone = tokens.flatten(0, 1)[:, None].expand(-1, copies, -1)
        projected: Tensor = self.project(alone).unflatten(0, tokens.shape[:2])
        return projected

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to the tokens that enter block 0, [B, n_prefix+H*W, D].

        Raises:
            DataError: the images are not what the tower was built for.
        """
        check_images(images, self.image_hw)
        return self._embed(images)

    def advance(
        self, tokens: Tensor, *, start: int = 0, stop: int | None = None, block_hook: BlockHook | None = None
    ) -> Tensor:
        """Push tokens [B, L, D] through blocks ``start`` to ``stop`` (exclusive; all by default).

        With ``start`` the tokens entering a late block can be computed once and kept.
        """
        stop = len(self.blocks) if stop is None else stop
        for index in range(start, stop):
            tokens = self.blocks[index].attend(tokens)
            if block_hook is not None:
                tokens = block_hook(index, tokens)
            tokens = self.blocks[index].feed_forward(tokens)
        return tokens

    def run(self, images: Tensor, block_hook: BlockHook | None = None) -> Tensor:
        """Images [B, 3, height, width] to tokens after all blocks, [B, n_prefix+H*W, D].

        ``block_hook`` is never called for a tower without blocks: change the result of :meth:`run` instead.
        """
        return self.advance(self.embed(images), block_hook=block_hook)

    def stream(self, images: Tensor) -> Iterator[Tensor]:
        """Tokens [B, L, D] that enter each block, and those behind the last: one more than there are blocks.

        Made one by one. A list of them serves all analyses of the same images that take a ``stream``.
        """
        tokens = self.embed(images)
        yield tokens
        for index in range(len(self.blocks)):
            tokens = self.advance(tokens, start=index, stop=index + 1)
            yield tokens

    def stages(self, images: Tensor, depths: Sequence[int] | None = None) -> list[TokenGrid]:
        """Patch tokens at several depths.

        Args:
            images: [B, 3, height, width].
            depths: numbers of blocks passed, ascending; by default the quarters of the tower.
        """
        n = len(self.blocks)
        depths = sorted({max(1, n * i // 4) for i in range(1, 5)}) if depths is None else depths
        tokens, passed, found = self.embed(images), 0, []
        for depth in depths:
            tokens, passed = self.advance(tokens, start=passed, stop=depth), depth
            found.append(TokenGrid(f"block{depth}", self.patches(tokens), self.grid))
        return found

    def pooling(self) -> Pooling:
        """The last aggregation, taken apart; ``project(run(images))`` up to rounding.

        Raises:
            CaptError: it is neither a class token's or a query's plain softmax attention nor an average.
        """
        raise unsupported(f"this image tower ({type(self).__name__}) has a pooling of unknown kind")

    def class_token_pooling(self, norm: nn.Module | None, projection: Map) -> Pooling:
        """The pooling of a tower whose feature is its first token's: the row of the last block's attention."""
        last = self.blocks[-1]
        parts = last.attention()
        return Pooling(
            "class token", self, len(self.blocks) - 1, parts.before, parts,
            residual=True, feed_forward=last.feed_forward, norm=norm, projection=projection,
        )  # fmt: skip

    def patches(self, tokens: Tensor) -> Tensor:
        """The H*W patch tokens out of [B, L, D]."""
        return tokens[:, self.n_prefix : self.n_prefix + self.grid[0] * self.grid[1]]

    def feed_forward_weights(self, index: int = -1) -> FeedForward | None:
        """Feed-forward weights of block ``index``; None without blocks or for an unusual MLP."""
        return self.blocks[index].feed_forward_weights() if self.blocks else None


class TextTower(ABC):
    """A text tower that takes token ids or token embeddings.

    Attributes:
        context_length: tokens in a text, start and end included.
        vocab_size: rows of the embedding table.
        width: W.
        causal: later tokens cannot influence the pooled one, so padding may be cut off.
        fixed_length: texts are always padded to ``context_length``; otherwise that is an upper limit.
        activation: name of the activation in its feed-forward parts.
        blocks: its transformer blocks, in order; empty where deep prompts are not supported.
        batch_first: the blocks take [N, L, W], otherwise [L, N, W].
    """

    context_length: int
    vocab_size: int
    width: int
    causal: bool
    fixed_length: bool = True
    activation: str = ""
    blocks: Sequence[nn.Module] = ()
    batch_first: bool = True

    @abstractmethod
    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, context_length] to un-normalised features [N, d]."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to token embeddings [N, L, W], without positions."""

    @abstractmethod
    def encode_embedded(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Token embeddings [N, L, W] and end positions int64 [N] to un-normalised features [N, d]."""

    @abstractmethod
    def eot_index(self, tokens: Tensor) -> Tensor:
        """Position of the end token, int64 [N]."""

    @contextmanager
    def deep_prompts(self, prompts: Tensor, start: int) -> Iterator[None]:
        """Within it, the inputs of blocks 1, 2, ... have ``prompts`` [n, n_ctx, W] at positions ``start`` onwards.

        Whatever the block before made there is replaced, text by text alike. A pass that is computed again, as by
        activation checkpointing, has to run within it again.

        Raises:
            CaptError: this tower has no blocks to put them in, or fewer than n + 1.
        """
        if len(prompts) > max(len(self.blocks) - 1, 0):
            raise CaptError(
                f"deep prompts: {len(prompts) + 1} depths asked for, but this text tower ({type(self).__name__}) has "
                f"{len(self.blocks)} blocks that take them; use at most that text depth, and 1 where there are none."
            )
        end, along = start + prompts.shape[1], 1 if self.batch_first else 0

        def replacing(prompt: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = args[0]
                own = prompt.to(x.dtype).unsqueeze(1 - along).expand(x.narrow(along, start, end - start).shape)
                after = x.narrow(along, end, x.shape[along] - end)
                return (torch.cat([x.narrow(along, 0, start), own, after], dim=along), *args[1:])

            return hook

        handles = [
            block.register_forward_pre_hook(replacing(prompt))
            for block, prompt in zip(self.blocks[1:], prompts, strict=False)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_length(self, length: int) -> None:
        """Raise :class:`CaptError` unless embedded prompts of this length can be encoded."""
        flexible = self.causal or not self.fixed_length
        if length > self.context_length or (length < self.context_length and not flexible):
            allowed = "at most" if flexible else "exactly"
            raise CaptError(
                f"embeddings: {length} positions, but this text tower takes {allowed} {self.context_length}. "
                "Cut or pad the prompts to that length."
            )


def check_images(images: Tensor, image_hw: tuple[int, int]) -> None:
    """Raise :class:`DataError` unless ``images`` is float [B, 3, *image_hw]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"images: expected [batch, 3, height, width], found {list(images.shape)}. "
            "Apply `backbone.preprocess` to each picture and stack the results."
        )
    if not images.is_floating_point():
        raise DataError(f"images: expected floating point, found {images.dtype}. Apply `backbone.preprocess`.")
    if tuple(images.shape[2:]) != image_hw:
        raise DataError(
            f"images: {images.shape[2]} x {images.shape[3]} pixels, but this image tower was built for "
            f"{image_hw[0]} x {image_hw[1]}. Apply `backbone.preprocess`, or build the model for your size "
            "(open_clip: force_image_size=...)."
        )


_ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def activation_name(module: nn.Module) -> str:
    """``"quick_gelu"``, ``"gelu"``, ``"gelu_tanh"``, or the class name in lower case."""
    name = type(module).__name__
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(name, name.lower())


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """An int or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def embedding_replaced(table: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """Let an embedding table return ``embeddings`` whatever ids it is asked for.

    For models that take ids only: positions, masks and pooling then run in the model's own code.
    """
    handle = table.register_forward_hook(lambda *_: embeddings)
    try:
        yield
    finally:
        handle.remove()


def last_position(mask: Tensor) -> Tensor:
    """Index of the last True in each row of a bool [N, L]; 0 for a row without."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * positions).argmax(dim=-1)
