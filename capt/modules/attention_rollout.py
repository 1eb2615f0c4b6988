"""Attention rollout as a chain of vectors, with and without gradients of a concept's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.base import TokenBlock
from capt.backbones.pooling import Pooling
from capt.errors import CaptError

Fusion = Literal["mean", "max", "min"]


def attention_rollout(
    pooling: Pooling, images: Tensor, *, fusion: Fusion = "mean", discard: float = 0.0, concept: Tensor | None = None,
    stream: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """How much of each patch arrives in the pooled row along all paths of attention, [B, N].

    Per block the attention of fused heads and the residual in equal parts, rows normalised; of the product of all
    blocks only the pooling row is computed, from the last block to the first. Rows sum to 1 with the prefix, which is
    left out.

    Args:
        fusion: of the heads.
        discard: this part of each fused row, its smallest weights, is dropped first.
        concept: [d]; then weights are multiplied by the gradients of the cosine with it, and only positive ones count.
        stream: the images' :meth:`~capt.backbones.base.TokenTower.stream`, if it is known: saves the pass where there
            is no concept.

    Raises:
        CaptError: a tower without blocks.

    Source: arXiv 2005.00928; gradient weighting after arXiv 2103.15679; the vector chain is ours.
    """
    tower = pooling.tower
    if not tower.blocks:
        raise CaptError("rollout: a convolutional tower has no attention between its tokens")
    if fusion not in ("mean", "max", "min"):
        raise CaptError(f"fusion: mean, max or min, found {fusion!r}")
    if not 0 <= discard < 1:
        raise CaptError(f"discard: a part of 1, found {discard}")

    def fused(weights: Tensor) -> Tensor:
        return _fused(weights, fusion, discard)

    if concept is None:  # maps of the heads are fused one block at a time
        stream = stream or list(tower.stream(images))
        maps = [fused(attention_map(block, x)) for block, x in zip(tower.blocks, stream, strict=False)]
        row = None if pooling.kind == "class token" else pooling.weights(stream[-1])
    else:
        weighted, row = _weighted_maps(pooling, images, concept)
        maps = [fused(weights) for weights in weighted]
    chain = _first(maps[-1]) if row is None else fused(row[:, :, None])[:, 0]
    chain = chain / chain.sum(-1, keepdim=True).clamp_min(1e-30)
    offset = maps[-1].shape[-1] - chain.shape[-1]  # tokens in front that the pooling does not see
    chain = F.pad(chain, (offset, 0))
    for mixing in reversed(maps):
        step = 0.5 * ((chain[:, None] @ mixing)[:, 0] + chain)
        chain = step / step.sum(-1, keepdim=True) if concept is not None else step
    return chain[:, -pooling.n_patches :]


def rollout_matrix(maps: list[Tensor], fusion: Fusion = "mean") -> Tensor:
    """The whole product [B, L, L] of attention maps [B, H, L, L], first block first: for checks, L^3 a block."""
    product = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand(len(maps[0]), -1, -1)
    for weights in maps:
        product = 0.5 * (_fused(weights, fusion, 0.0) + torch.eye(weights.shape[-1]).to(product)) @ product
    return product


def attention_map(block: TokenBlock, x: Tensor) -> Tensor:
    """Attention weights [B, H, L, L] of a block for tokens [B, L, D]."""
    parts = block.attention()
    y = parts.before(x)
    scores = torch.einsum("bihc,bjhc->bhij", parts.queries(y), parts.keys(y)) * parts.scale
    return scores.softmax(-1)


def _weighted_maps(pooling: Pooling, images: Tensor, concept: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Weights of every block, and the row of a pooling layer, multiplied by their gradients for a concept."""
    with torch.enable_grad():
        x, maps = pooling.tower.embed(images), []
        for block in pooling.tower.blocks:
            parts = block.attention()
            weights = _leaf(attention_map(block, x))
            mixed = torch.einsum("bhij,bjhc->bihc", weights, parts.values(parts.before(x)))
            x = block.feed_forward(x + parts.merge(mixed))
            maps.append(weights)
        rows = [] if pooling.kind == "class token" else [_leaf(pooling.weights(x))]
        features = pooling.pool(rows[0], x) if rows else pooling.tower.project(x)
        score = F.cosine_similarity(features, concept[None].to(features), dim=-1).sum()
        wanted = [*maps, *rows]
        gradients = torch.autograd.grad(score, wanted)
    weighted = [(w * g).clamp_min(0).detach() for w, g in zip(wanted, gradients, strict=True)]
    return weighted[: len(maps)], weighted[-1] if rows else None


def _leaf(weights: Tensor) -> Tensor:
    """Weights whose gradient can be asked for, also where the frozen model needs none."""
    return weights if weights.requires_grad else weights.requires_grad_()


def _first(mixing: Tensor) -> Tensor:
    """The unit vector of token 0, [B, L]."""
    chain = torch.zeros_like(mixing[:, 0])
    chain[:, 0] = 1.0
    return chain


def _fused(weights: Tensor, fusion: Fusion, discard: float) -> Tensor:
    """Heads of [B, H, R, L] fused to [B, R, L], smallest weights dropped, rows normalised."""
    fused = weights.mean(1) if fusion == "mean" else weights.amax(1) if fusion == "max" else weights.amin(1)
    if discard:
        dropped = fused.topk(int(discard * fused.shape[-1]), dim=-1, largest=False).indices
        fused = fused.scatter(-1, dropped, 0.0)
    return fused / fused.sum(-1, keepdim=True).clamp_min(1e-30)
