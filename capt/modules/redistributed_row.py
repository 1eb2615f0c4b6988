"""The pooling row of a tower under several re-weightings at once, as rows or straight as mixed values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.pooling import Pooling
from capt.errors import CaptError
from capt.modules.key_groups import Grouping, KeyGroups
from capt.modules.redistribution import Redistribution
from capt.ops import attention_readout


class _Reads(NamedTuple):
    """Group means [M, B, H, G, dh] and log masses [M, B, H, G]; variant 0 is the unchanged row."""

    means: Tensor
    log_mass: Tensor


def mixed_values(pooling: Pooling, inputs: Tensor, rules: Sequence[Redistribution], grouping: Grouping) -> Tensor:
    """Values mixed by the pooling row under each of M rules, float32 (float64) [M, B, H, dh].

    Keys and values are read once for all rules (once more for each temperature), and no row is written.

    Args:
        inputs: what enters the pooling, [B, L', D] (``pooling.inputs``).
        grouping: groups of the patches that the rules speak of.

    Raises:
        CaptError: no rule, a prior of another grid, or groups that a rule does not find.
    """
    _check(rules)
    if pooling.attention is None:
        values = pooling.values(inputs)
        groups = grouping.of(pooling.grid, values.shape[1], inputs)
        n_images = 1 if groups.labels.ndim == 1 else len(values)
        rows = redistributed_rows(values.new_zeros(n_images, 1, values.shape[1]), rules, groups, pooling.grid)
        return torch.einsum("mbhl,blhc->mbhc", rows, values)
    query, keys, values = pooling.heads(inputs)
    groups = grouping.of(pooling.grid, keys.shape[1], inputs)
    reads, variant = _read(pooling, query, keys, values, groups, rules)
    before = reads.log_mass[0].softmax(-1)
    mixed = [_mixed(rule, reads, at, before, values, groups) for rule, at in zip(rules, variant, strict=True)]
    return torch.stack(mixed)


def redistributed_rows(
    scores: Tensor, rules: Sequence[Redistribution], groups: KeyGroups, grid: tuple[int, int]
) -> Tensor:
    """Attention weights [M, B, H, L] of the pooling row under each of M rules; every row sums to 1.

    Args:
        scores: scaled scores before the softmax, [B, H, L] (``pooling.scores``).
        grid: (H, W) of the patches, the last of the keys.
    """
    _check(rules)
    member = F.one_hot(groups.labels, len(groups.names)).bool().movedim(-1, -2)  # [G, L] or [B, G, L]
    member = member if member.ndim == 2 else member[:, None]
    of_group = groups.labels if groups.labels.ndim == 1 else groups.labels[:, None]
    of_group = of_group.expand(scores.shape)

    def masses(changed: Tensor) -> Tensor:
        return changed[..., None, :].masked_fill(~member, -torch.inf).logsumexp(-1)

    before = masses(scores).softmax(-1)
    rows = []
    for rule in rules:
        changed = _changed(rule, scores, grid)
        log_mass = masses(changed)
        shares = rule.shares(before, log_mass.softmax(-1), groups)
        within = (changed - log_mass.gather(-1, of_group)).exp().nan_to_num(0.0)
        row = within * _patches_only(1 - rule.mixture[0], shares).gather(-1, of_group)
        if rule.mixture[0]:
            row = row + _spread(rule, shares, groups)[..., None] * _even(rule, groups, scores.dtype)
        chosen = rule.chosen_heads(before, groups)
        rows.append(row if chosen is None else torch.where(chosen[..., None], row, scores.softmax(-1)))
    return torch.stack(rows)


def attention_prior(pooling: Pooling, inputs: Tensor) -> Tensor:
    """Mean weight of each patch over images, patches alone, float [H, N]: the prior of ``PriorCancellation``."""
    weights = pooling.weights(inputs)[..., -pooling.n_patches :]
    return (weights / weights.sum(-1, keepdim=True)).mean(0)


def _check(rules: Sequence[Redistribution]) -> None:
    if not rules:
        raise CaptError("redistribution: at least one rule is needed")


def _changed(rule: Redistribution, scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores [..., L], those of the patches scaled and biased."""
    n = grid[0] * grid[1]
    patches = scores[..., -n:] * rule.temperature
    bias = rule.bias(grid)
    patches = patches if bias is None else patches + bias.to(scores)
    return torch.cat([scores[..., :-n], patches], dim=-1)


def _read(
    pooling: Pooling, query: Tensor, keys: Tensor, values: Tensor, groups: KeyGroups, rules: Sequence[Redistribution]
) -> tuple[_Reads, list[int]]:
    """Reads of all rules, and the variant of each: 0 where scores are unchanged."""
    means: list[Tensor] = []
    masses: list[Tensor] = []
    variant = [0] * len(rules)
    for temperature in dict.fromkeys([1.0, *(rule.temperature for rule in rules)]):
        biases: list[Tensor | None] = [None] if temperature == 1.0 else []
        for index, rule in enumerate(rules):
            bias = rule.bias(pooling.grid) if rule.temperature == temperature else None
            if rule.temperature == temperature and (bias is not None or temperature != 1.0):
                variant[index] = sum(len(m) for m in means) + len(biases)
                biases.append(bias)
        read = attention_readout(
            query, keys, values, groups=groups.labels, n_groups=len(groups.names),
            bias=_stacked(biases, pooling.n_patches, keys), scale=temperature * pooling.scale,
        )  # fmt: skip
        mean, mass = read
        if temperature != 1.0:  # the prefix keeps its own scores
            mean = torch.cat([means[0][:1, ..., :1, :].expand(len(mean), -1, -1, -1, -1), mean[..., 1:, :]], dim=-2)
            mass = torch.cat([masses[0][:1, ..., :1].expand(len(mass), -1, -1, -1), mass[..., 1:]], dim=-1)
        means.append(mean)
        masses.append(mass)
    return _Reads(torch.cat(means), torch.cat(masses)), variant


def _stacked(biases: list[Tensor | None], n_patches: int, keys: Tensor) -> Tensor | None:
    """Biases [M, H or 1, L] of patch biases [H or 1, N]; None where there is no bias at all."""
    if all(bias is None for bias in biases):
        return None if len(biases) == 1 else keys.new_zeros(len(biases), 1, keys.shape[1])
    n_heads = max(len(bias) for bias in biases if bias is not None)
    stack = keys.new_zeros(len(biases), n_heads, keys.shape[1])
    for row, bias in zip(stack, biases, strict=True):
        if bias is not None:
            row[:, -n_patches:] = bias.to(row)
    return stack


def _mixed(rule: Redistribution, reads: _Reads, at: int, before: Tensor, values: Tensor, groups: KeyGroups) -> Tensor:
    """Mixed values [B, H, dh] of one rule, whose scores are those of variant ``at``."""
    shares = rule.shares(before, reads.log_mass[at].softmax(-1), groups)
    mixed = _sum(_patches_only(1 - rule.mixture[0], shares), reads.means[at])
    if rule.mixture[0]:
        even = _even(rule, groups, shares.dtype).squeeze(-2)  # [L] or [B, L]
        mean = torch.einsum("bl,blhc->bhc", even.expand(len(values), -1), values.to(even.dtype))
        mixed = mixed + _spread(rule, shares, groups)[..., None] * mean
    chosen = rule.chosen_heads(before, groups)
    return mixed if chosen is None else torch.where(chosen[..., None], mixed, _sum(before, reads.means[0]))


def _sum(shares: Tensor, means: Tensor) -> Tensor:
    return (shares[..., None, :] @ means).squeeze(-2)


def _patches_only(factor: float, shares: Tensor) -> Tensor:
    """Shares [..., G], those of patch groups times ``factor``."""
    return torch.cat([shares[..., :1], shares[..., 1:] * factor], dim=-1)


def _spread(rule: Redistribution, shares: Tensor, groups: KeyGroups) -> Tensor:
    """Weight that a mixture spreads evenly, [..., H]."""
    return rule.mixture[0] * shares[..., 1:].sum(-1)


def _even(rule: Redistribution, groups: KeyGroups, dtype: torch.dtype) -> Tensor:
    """Even weights over the patches of a mixture's receivers, [1, L] or [B, 1, L]."""
    taking = groups.starting_with(*rule.mixture[1])[groups.labels]
    if not bool(taking.any(-1).all()):
        raise CaptError(f"mixture: no patch for the receivers {rule.mixture[1]}; the groups are {groups.names}")
    even = taking.to(dtype)
    return (even / even.sum(-1, keepdim=True)).unsqueeze(-2)
