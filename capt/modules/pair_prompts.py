"""Prompts of confusion pairs: encoded pair texts, and class texts where a pair has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.data.names import class_key
from capt.data.pair_texts import PairTexts, length_findings, refuse, validate_pair_texts
from capt.errors import CaptError
from capt.ops import bank_topk

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.bank import ConfusionBank

#: Up to this many classes the row of a pair is read from a [C, C] table (64 MiB at most), above it is searched for.
DENSE_CLASSES = 4096

Prompts = tuple[Tensor, Tensor, Tensor, Tensor]


class PairPrompts(nn.Module):
    """Pair texts as tables of unit-norm rows, found by class ids.

    The texts are encoded once, by the plain frozen text tower. Buffers, not stored with a model:

    - ``commonality`` float [P, s, d]: one block of rows for each unordered pair that has texts, in order of its ids;
    - ``difference`` float [2 P, s', d]: block 2 j is the view of the lower class id of pair j, 2 j + 1 of the higher.

    s is the largest number of texts of a pair. A pair with fewer repeats them in turn, so every pair has the same
    weight in the attention, and the texts of one pair differ by at most one repetition.

    Source: CAPT, semantic commonality and difference prompts; layout and fallback: ours.
    """

    commonality: Tensor
    difference: Tensor
    _pairs: Tensor

    def __init__(self, texts: PairTexts, backbone: Backbone, class_names: Sequence[str] | None = None) -> None:
        """Encode the texts of the pairs among ``class_names``.

        Args:
            texts: pair texts; no pair at all is fine.
            backbone: whose text tower encodes them; texts it knows already come from its cache.
            class_names: the C candidate classes in the order of their ids; default: ``texts.classes``.

        Raises:
            DataError: the texts have a mistake, or one does not fit into the text tower's context.
        """
        super().__init__()
        refuse(validate_pair_texts(texts, texts.classes), f"pair texts of {texts.dataset}")
        self.texts, self.split = texts, texts.split
        self.class_names = texts.classes if class_names is None else tuple(class_names)
        n_classes = len(self.class_names)
        blocks = _blocks(texts, self.class_names)
        sentences = list(dict.fromkeys(sentence for views in blocks.values() for view in views for sentence in view))
        try:
            features = backbone.text_features(sentences)
        except CaptError:
            refuse(length_findings(texts, backbone.tokenize), f"pair texts of {texts.dataset}")
            raise
        row = {sentence: index for index, sentence in enumerate(sentences)}

        def table(lists: list[tuple[str, ...]]) -> Tensor:
            most = max(map(len, lists), default=1)
            rows = [[row[texts[n % len(texts)]] for n in range(most)] for texts in lists]
            return features[torch.tensor(rows, dtype=torch.long, device=features.device).view(-1, most)]

        ordered = sorted(blocks)
        self.register_buffer("commonality", table([blocks[ids][0] for ids in ordered]), persistent=False)
        self.register_buffer(
            "difference", table([view for ids in ordered for view in blocks[ids][1:]]), persistent=False
        )
        #: Every pair of the classes has texts.
        self.complete = n_classes > 1 and len(ordered) == n_classes * (n_classes - 1) // 2
        ids = torch.tensor(ordered, dtype=torch.long).view(-1, 2)
        if n_classes <= DENSE_CLASSES:
            found = torch.full((n_classes, n_classes), -1, dtype=torch.int32)
            found[ids[:, 0], ids[:, 1]] = found[ids[:, 1], ids[:, 0]] = torch.arange(len(ids), dtype=torch.int32)
        else:
            found = ids[:, 0] * n_classes + ids[:, 1]
        self.register_buffer("_pairs", found.to(features.device), persistent=False)

    def __len__(self) -> int:
        """P, the number of pairs that have texts."""
        return len(self.commonality)

    def lookup(self, pseudo: Tensor, confusing: Tensor) -> tuple[Tensor, Tensor]:
        """Where the blocks of the pairs (p, i) are.

        Args:
            pseudo: int64 [B], classes p.
            confusing: int64 [B, k], classes i.

        Returns:
            int64 [B, k] into ``commonality``, the same for (i, p), and int64 [B, k] into ``difference``, from the view
            of p; -1 in both where the pair has no texts. Nothing waits for the device.
        """
        own = pseudo.unsqueeze(1)
        if self._pairs.ndim == 2:
            pair = self._pairs[own, confusing].long()
        elif len(self._pairs):
            keys = torch.minimum(own, confusing) * len(self.class_names) + torch.maximum(own, confusing)
            position = torch.searchsorted(self._pairs, keys).clamp_max(len(self._pairs) - 1)
            pair = torch.where(self._pairs[position] == keys, position, -1)
        else:
            pair = torch.full_like(confusing, -1)
        return pair, torch.where(pair < 0, -1, 2 * pair + (own > confusing))

    def gather(self, pseudo: Tensor, confusing: Tensor, text_features: Tensor) -> Prompts:
        """Tables and indices for :func:`capt.ops.prompt_attention`.

        Where every pair has texts the tables are handed over as they are. Otherwise the B k blocks that are asked for
        are collected, those of pairs without texts made of the class texts: the size of the tables does not matter.
        No shape depends on the values.

        Args:
            pseudo: int64 [B], classes p.
            confusing: int64 [B, k], their confusing classes.
            text_features: float [C, d], unit norm.

        Returns:
            commonality [n, s, d], difference [m, s', d], and int64 [B, k] into each.

        Raises:
            CaptError: ``text_features`` are not those of ``class_names``.
        """
        if text_features.shape[0] != len(self.class_names):
            raise CaptError(
                f"PairPrompts: made for {len(self.class_names)} classes, found {text_features.shape[0]} rows of "
                "text_features; make one with the class_names of these rows"
            )
        of_commonality, of_difference = self.lookup(pseudo, confusing)
        if self.complete:
            return self.commonality, self.difference, of_commonality, of_difference
        commonality, difference, index, _ = class_prompts(pseudo, confusing, text_features)
        if len(self):
            commonality = _filled(self.commonality, of_commonality, commonality)
            difference = _filled(self.difference, of_difference, difference)
        return commonality, difference, index, index

    def extra_repr(self) -> str:
        return f"{len(self)} pairs of {len(self.class_names)} {self.split} classes"


def class_prompts(pseudo: Tensor, confusing: Tensor, text_features: Tensor) -> Prompts:
    """Prompts of pairs without texts: ``normalize(T_p + T_i)`` and ``normalize(T_p - T_i)``, one row each.

    Arguments and results as of :meth:`PairPrompts.gather`, with n = m = B k. Source: ours.
    """
    own, other = text_features[pseudo].unsqueeze(1), text_features[confusing]
    index = torch.arange(confusing.numel(), device=confusing.device).view(confusing.shape)
    commonality, difference = F.normalize(own + other, dim=-1), F.normalize(own - other, dim=-1)
    return commonality.flatten(0, 1).unsqueeze(1), difference.flatten(0, 1).unsqueeze(1), index, index


def selectable_pairs(text_features: Tensor, bank: ConfusionBank | None = None, neighbours: int = 8) -> Tensor:
    """Pairs worth texts: those the bank has mistakes of, and each class with the classes of the most similar texts.

    Args:
        text_features: float [C, d], unit norm.
        bank: mistakes on these C classes.
        neighbours: classes for each class; equal similarities go to the lower id.

    Returns:
        int64 [P, 2] on the CPU, lower id first, ascending, each pair once.

    Raises:
        CaptError: the bank has another number of classes.
    """
    n_classes = len(text_features)
    ids = torch.arange(n_classes, device=text_features.device)
    pairs = torch.zeros(0, 2, dtype=torch.long)
    if neighbours > 0 and n_classes > 1:
        k = min(neighbours, n_classes - 1)
        _, near = bank_topk(text_features, text_features, k=k, row_ids=ids, exclude=ids)
        pairs = torch.stack([ids.unsqueeze(1).expand_as(near), near], -1).flatten(0, 1).cpu()
        pairs = pairs[pairs[:, 1] >= 0]
    if bank is not None:
        if bank.n_classes != n_classes:
            raise CaptError(f"selectable_pairs: the bank has {bank.n_classes} classes, text_features {n_classes}")
        pairs = torch.cat([pairs, torch.stack(bank.cells()[:2], 1)])
    distinct: Tensor = torch.unique(pairs.sort(1).values, dim=0)
    return distinct


def _blocks(texts: PairTexts, class_names: Sequence[str]) -> dict[tuple[int, int], tuple[tuple[str, ...], ...]]:
    """Commonality, view of the lower id and view of the higher id, by (lower id, higher id)."""
    ids: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):  # a name may belong to two classes
        ids.setdefault(class_key(name), []).append(index)
    blocks: dict[tuple[int, int], tuple[tuple[str, ...], ...]] = {}
    for (a, b), text in texts.pairs.items():
        for first in ids.get(class_key(a), ()):
            for second in ids.get(class_key(b), ()):
                views = text.difference_ab, text.difference_ba
                blocks[min(first, second), max(first, second)] = (
                    text.commonality, *(views if first < second else views[::-1])
                )  # fmt: skip
    return blocks


def _filled(table: Tensor, index: Tensor, instead: Tensor) -> Tensor:
    """Blocks ``index`` [B, k] of ``table`` as [B k, s, d]; ``instead`` [B k, 1, d] in every row where it is -1."""
    index = index.flatten()
    blocks = table.index_select(0, index.clamp_min(0))
    return torch.where((index >= 0)[:, None, None], blocks, instead.to(table.dtype))
