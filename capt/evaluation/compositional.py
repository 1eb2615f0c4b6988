"""Evaluation of compositional zero-shot learning from the best seen and the best unseen pairs of each image.

Scores arrive in chunks of pairs; what is kept per image does not depend on how many pairs there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capt.errors import CaptError, DataError
from capt.evaluation.pair_space import PairSpace
from capt.evaluation.seen_unseen_curve import SeenUnseenCurve
from capt.ops import PairFrontier, pair_frontier
from capt.ops._checks import check_count, check_tensor


class PairCounts(NamedTuple):
    """The pairs that occur as labels int64 [M, 2], ascending; int64 [M] images of each, and how many are right."""

    pairs: Tensor
    images: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class BestPairs:
    """The k best seen and the k best unseen pairs of each image: all that the evaluation needs.

    Attributes:
        space: what pair positions refer to.
        seen, unseen: score [N, k], best first (-inf: fewer candidates), and pair int64 [N, k] (-1).
        labels: int64 [N, 2] (state, object). A label that is no candidate of the space (pruned away) is never right.
    """

    space: PairSpace
    seen: PairFrontier
    unseen: PairFrontier
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def position(self) -> Tensor:
        """int64 [N], position of the label in the space, -1 if it is no candidate."""
        return self.space.position(self.labels)

    @cached_property
    def label_seen(self) -> Tensor:
        """bool [N], whether the label is a seen pair. Seen pairs are candidates of every world."""
        return (self.position >= 0) & self.space.seen[self.position]

    def curve(self, top: int = 1) -> SeenUnseenCurve:
        """Exact seen-unseen curve; an image counts as right if its label is among the ``top`` best pairs."""
        return SeenUnseenCurve.exact(*self._images(top))

    def grid_curve(self, top: int = 1) -> SeenUnseenCurve:
        """The published curve of 20 to 40 biases, see :meth:`SeenUnseenCurve.grid`."""
        return SeenUnseenCurve.grid(*self._images(top))

    def predictions(self, bias: float | None = None) -> Tensor:
        """Predicted pair of each image, int64 [N]; -1 where there is no candidate.

        Under a bias a tie of seen and unseen goes to the unseen pair, as on the curve, so that the curve's own biases
        can be given. Without (None) scores are compared as they are, and ties go to the earlier pair.
        """
        seen, unseen = self.seen.score[:, 0].double(), self.unseen.score[:, 0].double()
        first, second = self.seen.pair[:, 0], self.unseen.pair[:, 0]
        unbiased = (seen > unseen) | ((seen == unseen) & (first < second))
        as_seen = unbiased if bias is None else seen - unseen > bias
        # An image without candidates of one kind can only be one of the other.
        return torch.where((second < 0) | (as_seen & (first >= 0)), first, second)

    def accuracy(self, bias: float | None = None) -> dict[str, float]:
        """Share of the images whose predicted ``pair``, ``state`` and ``object`` is the label's."""
        predicted = self.predictions(bias)
        same = (self.space.pairs[predicted] == self.labels) & (predicted >= 0)[:, None]
        found = {"pair": same.all(1), "state": same[:, 0], "object": same[:, 1]}
        return {name: int(right.sum()) / len(self) for name, right in found.items()}

    def counts(self, bias: float | None = None) -> PairCounts:
        """Images and hits of every labelled pair, such as for a state x object grid of accuracies."""
        pairs, where, images = self.labels.unique(dim=0, return_inverse=True, return_counts=True)
        right = where[(self.predictions(bias) == self.position) & (self.position >= 0)]
        return PairCounts(pairs, images, right.bincount(minlength=len(pairs)))

    def infeasible_at_zero(self, full: PairSpace, threshold: float) -> BestPairs:
        """What the published masking finds: unseen pairs of ``full`` below the threshold score exactly 0.

        They are no candidates here. Theirs is the best unseen score wherever no surviving pair scores above 0; among
        equal scores the earlier pair of ``full`` wins. Positions of the result refer to ``full``.
        """
        kept = self._within(full)
        size = kept.unseen.pair.shape[1]
        first = (~full.feasible(threshold)).nonzero().flatten()[:size].expand(len(self), -1)
        score = torch.cat([kept.unseen.score, torch.zeros_like(first, dtype=kept.unseen.score.dtype)], 1)
        return replace(kept, unseen=_best(score, torch.cat([kept.unseen.pair, first], 1), size))

    def pruning_is_exact(self, full: PairSpace, threshold: float) -> bool:
        """Whether dropping the infeasible pairs gives what scoring them 0 gives, for every image and bias.

        It does where the best surviving unseen score is above 0.
        """
        return torch.equal(self.infeasible_at_zero(full, threshold).unseen.pair, self._within(full).unseen.pair)

    def record(self) -> dict[str, Any]:
        """All metrics as JSON takes them; rates are fractions in [0, 1]."""
        curve = self.curve()
        return {
            "images_seen": curve.n_seen,
            "images_unseen": curve.n_unseen,
            **curve.record(),
            "grid": self.grid_curve().record(),
            "accuracy": self.accuracy(),
            "accuracy_at_best_bias": self.accuracy(curve.best_bias),
        }

    def _within(self, full: PairSpace) -> BestPairs:
        """The same pairs as positions in a space that contains this one."""
        place = full.position(self.space.pairs)

        def moved(kind: PairFrontier) -> PairFrontier:
            return PairFrontier(kind.score, torch.where(kind.pair < 0, -1, place[kind.pair]))

        return BestPairs(full, moved(self.seen), moved(self.unseen), self.labels)

    def _images(self, top: int) -> tuple[Any, Any, Any]:
        kept = self.seen.pair.shape[1]
        if check_count("BestPairs", "top", top) > kept:
            raise CaptError(f"BestPairs: top {top} was asked for, but only {kept} pairs of a kind were kept per image")
        is_seen = self.label_seen[:, None]
        hit = torch.where(is_seen, self.seen.pair, self.unseen.pair)[:, :top] == self.position[:, None]
        hit &= self.position[:, None] >= 0
        rank = hit.int().argmax(1, keepdim=True)
        # At rank r of its own kind, the label is among the best exactly unless top - r pairs of the other kind beat it.
        seen = self.seen.score.gather(1, torch.where(is_seen, rank, top - 1 - rank)).double()
        unseen = self.unseen.score.gather(1, torch.where(is_seen, top - 1 - rank, rank)).double()
        return (seen - unseen)[:, 0].numpy(), hit.any(1).numpy(), self.label_seen.numpy()


class ThresholdSearch(NamedTuple):
    """The first feasibility threshold with the highest AUC, its index, and float64 [T] thresholds and AUCs."""

    threshold: float
    best: int
    thresholds: Tensor
    auc: Tensor


class FrontierMeter:
    """Accumulates the best pairs of images over batches of images and chunks of pairs.

    Args:
        space: the candidates.
        thresholds: ascending feasibility thresholds [T]; the evaluation at all of them then takes one pass.
        top: pairs of each kind that are kept per image, for top-k accuracy.

    Kept are [images, 2, top] scores and pairs ([images, 1 + T, top] with thresholds), on the CPU.
    """

    def __init__(self, space: PairSpace, *, thresholds: Any = None, top: int = 1) -> None:
        self.space = space
        self.top = check_count("FrontierMeter", "top", top)
        self.thresholds = None if thresholds is None else _ascending(thresholds)
        if self.thresholds is None:
            self._group = (~space.seen).long()
        elif space.feasibility is None:
            raise CaptError("FrontierMeter: thresholds need the feasibility of the pairs, but the space has none")
        else:
            survived = torch.searchsorted(self.thresholds, space.feasibility.double(), right=True)
            self._group = torch.where(space.seen, 0, torch.where(survived > 0, survived, -1))
        self._n_groups = 2 if self.thresholds is None else 1 + len(self.thresholds)
        self._pairs = space.pairs
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(labels) for _, _, labels in self._batches)

    def add(
        self,
        chunks: Iterable[tuple[int, Tensor]],
        labels: Tensor,
        *,
        state: Tensor | None = None,
        object: Tensor | None = None,
    ) -> None:
        """Fold the scores of one batch of images.

        Args:
            chunks: (start, scores [B, k]) of the pairs start .. start+k-1 of the space; together all pairs, each once,
                in any order. NaN and -inf never win.
            labels: int64 [B, 2] (state, object).
            state, object: factors [B, n_states] and [B, n_objects] whose product is added to the score of each pair,
                see :func:`capt.evaluation.primitive_factors`; both or neither.

        Raises:
            CaptError: shapes or types are wrong, pairs are missing or given twice.
            DataError: a label is no candidate (allowed in a space with feasibility, which may be pruned).
        """
        self._check_labels(labels)
        if (state is None) != (object is None):
            raise CaptError("FrontierMeter: give both factors of the primitive term, state and object, or neither")
        spans: list[tuple[int, int]] = []
        frontier: PairFrontier | None = None
        for start, scores in chunks:
            check_tensor("FrontierMeter", "scores of a chunk", scores, (len(labels), "k"))
            stop = start + scores.shape[1]
            if start < 0 or stop > len(self.space):
                raise CaptError(
                    f"FrontierMeter: a chunk holds the pairs {start} to {stop - 1}, the space only 0 to "
                    f"{len(self.space) - 1}"
                )
            spans.append((start, stop))
            frontier = self._fold(frontier, start, scores, state, object)
        ends = [0, *(stop for _, stop in sorted(spans))]
        for (start, _), end in zip([*sorted(spans), (len(self.space), 0)], ends, strict=True):
            if start != end:
                what = "missing" if start > end else "given twice"
                raise CaptError(f"FrontierMeter: pairs {min(start, end)} to {max(start, end) - 1} are {what}")
        if frontier is not None:
            shape = (len(labels), self._n_groups, self.top)
            self._batches.append((frontier.score.cpu().view(shape), frontier.pair.cpu().view(shape), labels.cpu()))

    def best_pairs(self) -> BestPairs:
        """Of all images so far; with thresholds, at the lowest of them."""
        return self.by_threshold()[0]

    def by_threshold(self) -> list[BestPairs]:
        """Of all images so far at each threshold, as if only the pairs that survive it had been scored."""
        if not len(self):
            raise DataError("FrontierMeter: no image was added; is the split empty?")
        score, pair, labels = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        seen = PairFrontier(score[:, 0], pair[:, 0])
        unseen = PairFrontier(score[:, -1], pair[:, -1])
        found = [BestPairs(self.space, seen, unseen, labels)]
        for group in range(self._n_groups - 2, 0, -1):
            both = torch.cat([unseen.score, score[:, group]], 1), torch.cat([unseen.pair, pair[:, group]], 1)
            unseen = _best(*both, self.top)
            found.append(BestPairs(self.space, seen, unseen, labels))
        return found[::-1]

    def search(self, profile: Literal["clean", "released"] = "clean") -> ThresholdSearch:
        """The first threshold with the highest AUC.

        "clean" drops infeasible pairs and takes the exact AUC; "released" scores them 0 and takes the AUC of the grid.
        """
        if profile not in ("clean", "released"):
            raise CaptError(f"FrontierMeter: profile must be 'clean' or 'released', found {profile!r}")
        if self.thresholds is None:
            raise CaptError("FrontierMeter: a search needs thresholds; give them when the meter is made")
        auc = torch.zeros_like(self.thresholds)
        for index, (threshold, best) in enumerate(zip(self.thresholds.tolist(), self.by_threshold(), strict=True)):
            if profile == "clean":
                auc[index] = best.curve().auc
            else:
                auc[index] = best.infeasible_at_zero(self.space, threshold).grid_curve().auc
        index = int(np.argmax(auc.numpy()))  # the first one, which torch does not promise
        return ThresholdSearch(float(self.thresholds[index]), index, self.thresholds, auc)

    def _fold(
        self, previous: PairFrontier | None, start: int, scores: Tensor, state: Tensor | None, object: Tensor | None
    ) -> PairFrontier:
        self._group, self._pairs = self._group.to(scores.device), self._pairs.to(scores.device)
        part = slice(start, start + scores.shape[1])
        fold = partial(
            pair_frontier,
            group=self._group[part],
            n_groups=self._n_groups,
            start=start,
            state=state,
            object=object,
            pairs=None if state is None else self._pairs[part],
        )
        if self.top == 1:
            return fold(scores, previous=previous)
        rest = scores.detach().clone()
        found = [] if previous is None else [previous]
        for _ in range(self.top):
            best = fold(rest)
            rows, groups = (best.pair >= 0).nonzero(as_tuple=True)
            rest[rows, best.pair[rows, groups] - start] = -torch.inf
            found.append(PairFrontier(best.score[..., None], best.pair[..., None]))
        return _best(torch.cat([one.score for one in found], -1), torch.cat([one.pair for one in found], -1), self.top)

    def _check_labels(self, labels: Tensor) -> None:
        check_tensor("FrontierMeter", "labels", labels, ("B", 2))
        missing = (self.space.position(labels.cpu()) < 0).nonzero().flatten()
        if len(missing) and self.space.feasibility is None:
            image = int(missing[0])
            raise DataError(
                f"FrontierMeter: image {image} of the batch shows the pair {tuple(labels[image].tolist())}, which is "
                "no candidate of this space; is it listed for the evaluated split?"
            )


def _best(score: Tensor, pair: Tensor, top: int) -> PairFrontier:
    """The ``top`` best of the last dimension, best first; equal scores in the order of the pairs."""
    pair, order = pair.sort(dim=-1)
    score, best = score.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return PairFrontier(score[..., :top], pair.gather(-1, best)[..., :top])


def _ascending(thresholds: Any) -> Tensor:
    values = torch.as_tensor(thresholds, dtype=torch.float64)
    if values.ndim != 1 or not len(values) or not (values[1:] >= values[:-1]).all() or values.isnan().any():
        raise CaptError("FrontierMeter: thresholds must be a non-empty vector in ascending order")
    return values
