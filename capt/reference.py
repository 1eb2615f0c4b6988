"""What every op means, in plain PyTorch: the CPU fallback, the test oracle and the benchmark baseline.

Each function accepts any floating dtype up to float64 and any device. 16-bit inputs are computed in float32 and
rounded once at the end. Arguments are assumed to be checked by ``capt.ops``. Selections (``bank_topk``,
``confusion_pairs``) carry no gradient; everything else is differentiable by autograd. ``pair_frontier`` is in
``capt.reference_frontier``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

#: Upper bound, in elements, of the temporaries of one chunk (64 MiB in float32).
CHUNK_ELEMENTS = 1 << 24


def own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without autocast: like the kernels it chooses its precision itself."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        place = next(value.device.type for value in args if isinstance(value, Tensor))
        if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place):
            with torch.autocast(place, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@own_precision
def grid_adapter(tokens: Tensor, weight: Tensor, alpha: Tensor | float, grid: tuple[int, int], n_prefix: int) -> Tensor:
    """Patch tokens ``x + alpha * depthwise_conv3x3(x)``; prefix and suffix tokens unchanged.

    tokens [B, L, D], weight [D, 3, 3], alpha scalar or [B]; source: CAPT paper, Eq. 10.
    """
    height, width = grid
    batch, _, dim = tokens.shape
    stop = n_prefix + height * width
    accumulate = accumulate_dtype(tokens.dtype)
    patches = tokens[:, n_prefix:stop].to(accumulate)
    image = patches.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
    mixed = F.conv2d(image, weight.to(accumulate)[:, None], padding=1, groups=dim)
    mixed = mixed.permute(0, 2, 3, 1).reshape(batch, height * width, dim)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(accumulate).reshape(-1, 1, 1)
    adapted = (patches + alpha * mixed).to(tokens.dtype)
    return torch.cat([tokens[:, :n_prefix], adapted, tokens[:, stop:]], dim=1)


def ordered_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys whose descending order is (score descending, row ascending); scores fp32, rows below 2**32."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into +0.0, so the two tie
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered << 32) | (0xFFFFFFFF - rows)


@own_precision
def bank_topk(
    queries: Tensor,
    rows: Tensor,
    k: int,
    ranges: Tensor | None = None,
    row_ids: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact top-k inner products; see ``capt.ops.bank_topk``. Memory bounded by ``CHUNK_ELEMENTS``."""
    queries, rows = queries.detach(), rows.detach()
    if ranges is None:
        return _topk_whole(queries, rows, k, row_ids, exclude)
    return _topk_ranges(queries, rows, k, ranges, row_ids, exclude)


def _topk_whole(
    queries: Tensor, rows: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    n_query, n_rows = queries.shape[0], rows.shape[0]
    accumulate = accumulate_dtype(queries.dtype)
    queries = queries.to(accumulate)
    step = max(1, CHUNK_ELEMENTS // max(1, n_query, rows.shape[1]))
    best_score = queries.new_full((n_query, k), float("-inf"), dtype=torch.float32)
    best_index = queries.new_full((n_query, k), -1, dtype=torch.int64)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        score = (queries @ rows[start:stop].to(accumulate).T).float() + 0.0  # -0.0 becomes +0.0
        hidden = score.isnan()
        if exclude is not None and row_ids is not None:
            hidden |= (row_ids[None, start:stop] == exclude[:, None]) & (exclude[:, None] >= 0)
        score = score.masked_fill(hidden, float("-inf"))
        index = torch.arange(start, stop, device=rows.device)
        keys = ordered_keys(score, index)
        chosen = keys.topk(min(k, stop - start), dim=1).indices
        # Earlier chunks hold lower rows, and the stable sort keeps them first among equal scores.
        score = torch.cat([best_score, score.gather(1, chosen)], dim=1)
        found = torch.cat([best_index, index[chosen]], dim=1)
        score, order = score.sort(dim=1, descending=True, stable=True)
        best_score, best_index = score[:, :k], found.gather(1, order)[:, :k]
    return best_score, best_index.masked_fill(best_score == float("-inf"), -1)


def _topk_ranges(
    queries: Tensor, rows: Tensor, k: int, ranges: Tensor, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    n_query, n_pairs, n_ranges, _ = ranges.shape
    n_segments = n_query * n_pairs
    out_score = queries.new_full((n_segments * k,), float("-inf"), dtype=torch.float32)
    out_index = queries.new_full((n_segments * k,), -1, dtype=torch.int64)
    flat = ranges.reshape(n_segments, n_ranges, 2)
    lengths = (flat[..., 1] - flat[..., 0]).clamp_min(0)
    ends = lengths.sum(1).cumsum(0)
    budget = max(1, CHUNK_ELEMENTS // max(1, queries.shape[1]))
    first = 0
    while first < n_segments:
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, done + budget, right=True)))
        segment, row = _expand_ranges(flat[first:last], lengths[first:last], first)
        query = segment // n_pairs
        if exclude is not None and row_ids is not None:
            keep = (row_ids[row] != exclude[query]) | (exclude[query] < 0)
            segment, row, query = segment[keep], row[keep], query[keep]
        score = _paired_dots(queries, rows, query, row, budget)
        keep = ~score.isnan() & (score != float("-inf"))
        segment, row, score = segment[keep], row[keep], score[keep]
        order = ordered_keys(score, row).sort(descending=True).indices
        order = order[segment[order].sort(stable=True).indices]
        segment, row, score = segment[order], row[order], score[order]
        # Ranges of one segment may overlap: the copies of a row are neighbours now.
        new = torch.ones_like(segment, dtype=torch.bool)
        new[1:] = (segment[1:] != segment[:-1]) | (row[1:] != row[:-1])
        segment, row, score = segment[new], row[new], score[new]
        rank = torch.arange(len(segment), device=segment.device) - torch.searchsorted(segment, segment)
        keep = rank < k
        slot = segment[keep] * k + rank[keep]
        out_score[slot], out_index[slot] = score[keep], row[keep]
        first = last
    shape = (n_query, n_pairs, k)
    return out_score.reshape(shape), out_index.reshape(shape)


def _expand_ranges(ranges: Tensor, lengths: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Every (segment, row) named by ranges [n, S, 2] whose lengths are [n, S]; segments count from ``first``."""
    flat = lengths.reshape(-1)
    total = flat.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    inside = torch.arange(len(owner), device=flat.device) - (total - flat)[owner]
    return owner // ranges.shape[1] + first, ranges[..., 0].reshape(-1)[owner] + inside


def _paired_dots(queries: Tensor, rows: Tensor, query: Tensor, row: Tensor, step: int) -> Tensor:
    """fp32 inner products queries[query[t]] . rows[row[t]], ``step`` pairs at a time."""
    accumulate = accumulate_dtype(queries.dtype)
    parts = [
        (queries[query[t : t + step]].to(accumulate) * rows[row[t : t + step]].to(accumulate)).sum(-1).float() + 0.0
        for t in range(0, len(query), step)
    ]
    return torch.cat(parts) if parts else queries.new_empty(0, dtype=torch.float32)


@own_precision
def confusion_pairs(
    logits: Tensor,
    k: int,
    offsets: Tensor | None = None,
    classes: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo label and the k classes with the highest confusion score; see ``capt.ops.confusion_pairs``."""
    logits = logits.detach().to(accumulate_dtype(logits.dtype))
    n_classes = logits.shape[1]
    pseudo = _first_argmax(logits)
    score = logits.softmax(dim=1)
    if offsets is not None and classes is not None and counts is not None and classes.numel():
        start, length = offsets[pseudo], offsets[pseudo + 1] - offsets[pseudo]
        image = torch.repeat_interleave(torch.arange(len(pseudo), device=logits.device), length)
        first = length.cumsum(0) - length
        entry = torch.arange(len(image), device=logits.device) - first[image] + start[image]
        count = counts[entry].to(score.dtype)
        total = torch.zeros_like(score[:, 0]).index_add(0, image, count)
        boost = torch.ones_like(score)
        boost[image, classes[entry]] += count / total[image].clamp_min(torch.finfo(score.dtype).tiny)
        score = score * boost
    score = score.scatter(1, pseudo[:, None], float("-inf"))
    kept = min(k, n_classes - 1)
    score, index = score.sort(dim=1, descending=True, stable=True)
    return pseudo, index[:, :kept].contiguous(), score[:, :kept].float().contiguous()


def _first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value of each row, the lowest one among equals."""
    top = values.amax(dim=1, keepdim=True)
    index = torch.arange(values.shape[1], device=values.device)
    return torch.where(values == top, index, values.shape[1] - 1).amin(dim=1)


@own_precision
def prompt_attention(
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per image over the prompt rows of its k pairs, both kinds; see ``capt.ops.prompt_attention``."""
    return (
        _gathered_attention(query, commonality, commonality_index, log_prior, scale),
        _gathered_attention(query, difference, difference_index, log_prior, scale),
    )


def _gathered_attention(query: Tensor, table: Tensor, index: Tensor, log_prior: Tensor | None, scale: float) -> Tensor:
    accumulate = accumulate_dtype(query.dtype)
    if table.shape[0] == 0:
        return torch.zeros_like(query)
    absent = (index < 0)[..., None]
    # Zeros in place of absent rows: a weight of 0 does not undo a NaN.
    rows = table[index.clamp_min(0)].to(accumulate).masked_fill(absent[..., None], 0.0)  # [B, k, s, d]
    score = torch.einsum("bd,bksd->bks", query.to(accumulate), rows) * scale
    if log_prior is not None:
        score = score + log_prior.to(accumulate)[..., None]
    score = score.masked_fill(absent, float("-inf")).flatten(1)
    weight = _masked_softmax(score)
    return torch.einsum("br,brd->bd", weight, rows.flatten(1, 2)).to(query.dtype)


def _masked_softmax(score: Tensor) -> Tensor:
    """Softmax over the last axis; a row that is -inf throughout becomes zeros (and its gradient zero, not NaN)."""
    if score.shape[-1] == 0:
        return score
    alive = score > float("-inf")
    any_alive = alive.any(-1, keepdim=True)
    return score.masked_fill(~any_alive, 0.0).softmax(-1) * any_alive


@own_precision
def prompt_attention_shared(
    commonality_query: Tensor, difference_query: Tensor, keys: Tensor, values: Tensor, n_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stacked class prompts attend to the tokens of each image; see ``capt.ops.prompt_attention_shared``."""
    out_com, lse_com = _shared_attention(commonality_query, keys, values, n_heads, scale)
    out_diff, lse_diff = _shared_attention(difference_query, keys, values, n_heads, scale)
    return out_com, out_diff, lse_com, lse_diff


def _shared_attention(query: Tensor, keys: Tensor, values: Tensor, n_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, _, dim = keys.shape
    accumulate = accumulate_dtype(keys.dtype)
    q = query.to(accumulate).expand(batch, -1, -1).unflatten(-1, (n_heads, dim // n_heads))
    k = keys.to(accumulate).unflatten(-1, (n_heads, dim // n_heads))
    v = values.to(accumulate).unflatten(-1, (n_heads, dim // n_heads))
    score = torch.einsum("brhc,blhc->bhrl", q, k) * scale
    lse = score.logsumexp(-1)
    out = torch.einsum("bhrl,blhc->brhc", (score - lse[..., None]).exp(), v)
    return out.flatten(-2).to(keys.dtype), lse


@own_precision
def expert_gating(
    x: Tensor,
    gate: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    top_k: int,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Router, experts, weighted sum; see ``capt.ops.expert_gating``."""
    weights, probs, load = expert_router(x, gate, top_k)
    return expert_mix(x, weights, w_in, b_in, w_out, b_out, dropout, seed), weights, probs, load


@own_precision
def expert_router(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [N, E], probs [N, E], load [E]): softmax of ``gate x``, the top_k largest of it renormalised, and the
    share of rows with a positive weight."""
    accumulate = accumulate_dtype(x.dtype)
    probs = (x.to(accumulate) @ gate.to(accumulate).T).softmax(-1)
    order = probs.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs * torch.zeros_like(probs).scatter(1, order, 1.0)
    weights = weights / weights.sum(-1, keepdim=True)
    load = (weights.detach() > 0).to(weights.dtype).mean(0) if len(x) else torch.zeros_like(probs.sum(0)).detach()
    return weights, probs, load


@own_precision
def expert_mix(
    x: Tensor, weights: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, dropout: float, seed: int
) -> Tensor:
    """``y = sum_e w_e (W_out dropout(QuickGELU(W_in x + b_in)) + b_out)``; an expert with weight 0 counts as absent.

    Every expert runs on every token, which needs no routing; absent ones give and receive exactly 0.
    """
    accumulate = accumulate_dtype(x.dtype)
    weights = weights.to(accumulate)
    hidden = torch.einsum("nd,ehd->neh", x.to(accumulate), w_in.to(accumulate)) + b_in.to(accumulate)
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    if dropout > 0.0:
        n_tokens, n_experts, n_columns = hidden.shape
        keep = dropout_mask(seed, n_tokens, n_experts, n_columns, dropout, x.device)
        hidden = torch.where(keep, hidden * (1.0 / (1.0 - dropout)), 0.0)
    expert = torch.einsum("neh,edh->ned", hidden, w_out.to(accumulate)) + b_out.to(accumulate)
    expert = expert.masked_fill((weights == 0)[..., None], 0.0)
    return torch.einsum("ne,ned->nd", weights, expert).to(x.dtype)


def dropout_mask(
    seed: int, n_tokens: int, n_experts: int, hidden: int, dropout: float, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [N, E, H]: the hidden units that survive, a function of seed, token, expert and column alone.

    All words have 32 bits. With mix = ``_mix32``, s = mix(seed mod 2^32), t = mix(s ^ (seed >> 32)),
    a = mix(mix(t ^ n) ^ e) and b = mix(mix(s ^ n) + e), unit h of expert e survives for token n if
    ``mix(mix(a ^ h) ^ b) >= floor(dropout * 2^32)``.
    """

    def count(size: int, *shape: int) -> Tensor:
        return torch.arange(size, device=device).reshape(shape)

    token, expert, column = count(n_tokens, -1, 1, 1), count(n_experts, 1, -1, 1), count(hidden, 1, 1, -1)
    low = _mix32(torch.tensor(seed & 0xFFFFFFFF, device=device))
    high = _mix32(low ^ (seed >> 32 & 0xFFFFFFFF))
    first = _mix32(_mix32(high ^ token) ^ expert)
    second = _mix32(_mix32(low ^ token) + expert & 0xFFFFFFFF)
    return _mix32(_mix32(first ^ column) ^ second) >= int(dropout * 2.0**32)


def _mix32(word: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every input bit over the output; int64 in and out."""
    word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


@own_precision
def asymmetric_loss(
    logits: Tensor, targets: Tensor, gamma_pos: float, gamma_neg: float, margin: float, eps: float, reduction: str
) -> Tensor:
    """Asymmetric multi-label loss with constant focal weights; see ``capt.ops.asymmetric_loss``."""
    positive = targets.to(torch.bool)
    x = logits.to(accumulate_dtype(logits.dtype))
    p, q = x.detach().sigmoid(), (-x.detach()).sigmoid()
    focus = torch.where(positive, q**gamma_pos, (p - margin).clamp_min(0) ** gamma_neg)
    log_q = ((-x).sigmoid() + margin).clamp(max=1.0).log() if margin > 0 else F.logsigmoid(-x)
    loss = -focus * torch.where(positive, F.logsigmoid(x), log_q).clamp_min(math.log(eps) if eps > 0 else -math.inf)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


@own_precision
def attention_readout(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Group-wise attention of one query under several key biases; see ``capt.ops.attention_readout``."""
    accumulate = accumulate_dtype(keys.dtype)
    query = query.to(accumulate).expand(keys.shape[0], -1, -1)
    score = (torch.einsum("bhc,blhc->bhl", query, keys.to(accumulate)) * scale)[None]
    if bias is not None:
        score = score + bias.to(accumulate)[:, None]
    member = F.one_hot(groups.expand(keys.shape[0], -1), n_groups).movedim(-1, 1).to(torch.bool)  # [B, G, L]
    split = score[:, :, :, None].masked_fill(~member[None, :, None], float("-inf"))  # [M, B, H, G, L]
    empty = (split == float("-inf")).all(-1)
    split = split.masked_fill(empty[..., None], 0.0)
    weight = split.softmax(-1).masked_fill(empty[..., None], 0.0)
    mean = torch.einsum("mbhgl,blhc->mbhgc", weight, values.to(accumulate))
    return mean, split.logsumexp(-1).masked_fill(empty, float("-inf"))
