"""What CAPT knows of a list of candidate classes: statistics of known pairs, and the controls of pair prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.bank import ConfusionBank, ConfusionStatistics
from capt.errors import CaptError
from capt.methods.capt_config import CAPTConfig
from capt.modules import PairPrompts


def restricted_statistics(
    known: ConfusionStatistics, known_names: Sequence[str], names: Sequence[str]
) -> ConfusionStatistics | None:
    """Statistics of the classes ``known_names``, for the candidates ``names``; None if they share no class."""
    position = {name: index for index, name in enumerate(names)}
    if not position.keys() & set(known_names):
        return None
    device = known.offsets.device
    moved = torch.tensor([position.get(name, -1) for name in known_names], device=device)
    keys = moved[torch.repeat_interleave(torch.arange(len(known_names), device=device), known.offsets.diff())]
    others = moved[known.classes]
    kept = (keys >= 0) & (others >= 0)
    return ConfusionStatistics.from_pairs(keys[kept], others[kept], known.counts[kept], len(names))


def expert_prompts(text: Tensor, bank: ConfusionBank | None, pair_prompts: PairPrompts | None) -> tuple[Tensor, Tensor]:
    """Commonality and difference prompts [n, d] that the semantic experts start from: all the pairs' written ones.

    Without them, those of the class texts [C, d] of the confused pairs; where nothing is confused yet, of every class
    with its nearest neighbour.
    """
    if pair_prompts is not None and len(pair_prompts.commonality):
        return pair_prompts.commonality.flatten(0, 1), pair_prompts.difference.flatten(0, 1)
    if bank is not None and len(bank):
        first, second = (index.to(text.device) for index in bank.cells()[:2])
    elif len(text) > 1:
        first = torch.arange(len(text), device=text.device)
        second = (text @ text.T).fill_diagonal_(-2).argmax(1)
    else:
        first = second = torch.zeros(0, dtype=torch.long, device=text.device)
    return F.normalize(text[first] + text[second], dim=-1), F.normalize(text[first] - text[second], dim=-1)


def usable_prompts(prompts: PairPrompts | None, names: tuple[str, ...], config: CAPTConfig) -> PairPrompts | None:
    """Pair prompts of the classes ``names`` as the configuration wants them: as they are, none, or shuffled.

    Raises:
        CaptError: they were made for other classes.
    """
    if prompts is None or config.pair_texts == "derived":
        return None
    if tuple(prompts.class_names) != names:
        raise CaptError(
            f"CAPT: the pair prompts were made for {len(prompts.class_names)} other classes; make them for these "
            f"{len(names)}"
        )
    return _shuffled(prompts, config.control_seed) if config.pair_texts == "random" else prompts


def prompt_texts(text: Tensor, config: CAPTConfig) -> Tensor:
    """Class texts [C, d] that stand in where a pair has no prompts; as a control, random directions instead."""
    if config.pair_texts != "random":
        return text
    drawn = torch.randn(text.shape, generator=torch.Generator().manual_seed(config.control_seed))
    return F.normalize(drawn, dim=-1).to(text)


def _shuffled(prompts: PairPrompts, seed: int) -> PairPrompts:
    """Pair prompts that give each pair the texts of another, as a control; both kinds move together."""
    other = copy.deepcopy(prompts)
    order = torch.randperm(len(prompts.commonality), generator=torch.Generator().manual_seed(seed))
    order = order.to(prompts.commonality.device)
    other.commonality = prompts.commonality[order]
    # Block 2 j and 2 j + 1 of the differences belong to block j of the commonalities.
    other.difference = prompts.difference.unflatten(0, (-1, 2))[order].flatten(0, 1)
    return other
