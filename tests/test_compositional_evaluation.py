"""Seen-unseen curve and streamed evaluation, numbers 20 to 26 of MSCI's specification, against dense sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compositional_evaluation import against_dense
from capt.errors import CaptError, DataError, NumericError
from capt.evaluation import FrontierMeter, PairSpace, SeenUnseenCurve
from tests.compositional_oracle import Problem, between, random_problem, summary

METRICS = ("best_seen", "best_unseen", "best_hm", "auc")


def metrics(curve: SeenUnseenCurve) -> dict[str, float]:
    return {name: getattr(curve, name) for name in METRICS}


def at(curve: SeenUnseenCurve, bias: float) -> tuple[int, int]:
    point = np.searchsorted(curve.biases, bias, "right") - 1
    return int(curve.seen_right[point]), int(curve.unseen_right[point])


def two_by_two(scores: list[list[float]], labels: list[int]) -> Problem:
    """States 0, 1 and objects 0, 1; seen are the pairs 0 and 3."""
    space = PairSpace.open_world(2, 2, [[0, 0], [1, 1]])
    return Problem(space, torch.tensor(scores, dtype=torch.float32), torch.tensor(labels))


FOUR_IMAGES = two_by_two([[5, 3, 0, 1], [1, 3.5, 0, 4], [4, 3, 1, 0], [6, 2, 3, 0]], [0, 3, 1, 2])


def test_20_candidates_of_a_split_are_its_pairs_and_the_seen_ones() -> None:
    pairs = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    seen = np.array([True, False, False, True, False])
    validation = PairSpace.closed_world(pairs, seen, np.array([3, 1]), n_states=3, n_objects=2)
    assert validation.pairs.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert validation.seen.tolist() == [True, False, True]
    assert validation.position(torch.from_numpy(pairs)).tolist() == [0, 1, -1, 2, -1]
    meter = FrontierMeter(validation)
    meter.add([(0, torch.zeros(0, 3))], torch.zeros(0, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="no image was added; is the split empty"):
        meter.best_pairs()
    with pytest.raises(DataError, match=r"image 1 of the batch shows the pair \(2, 0\)"):
        meter.add([(0, torch.zeros(2, 3))], torch.tensor([[0, 0], [2, 0]]))


def test_19_positions_in_the_open_world_are_state_major() -> None:
    space = PairSpace.open_world(413, 674, torch.tensor([[412, 673], [0, 5]]))
    assert len(space) == 278_362
    assert space.seen.nonzero().flatten().tolist() == [5, 278_361]
    some = torch.tensor([[0, 0], [1, 0], [412, 673], [200, 31]])
    assert torch.equal(space.position(some), some[:, 0] * 674 + some[:, 1])


def test_positions_of_pairs_in_any_order() -> None:
    pairs = torch.tensor([[3, 1], [0, 2], [2, 0]])
    space = PairSpace(pairs, torch.tensor([True, False, True]), 4, 3)
    assert space.position(torch.tensor([[2, 0], [0, 0], [3, 1], [0, 2]])).tolist() == [2, -1, 0, 1]
    assert space.position(torch.zeros(0, 2, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_21_exact_curve_equals_a_dense_sweep(first: int) -> None:
    for seed in range(first, first + 100):
        problem = random_problem(seed, ties=seed % 2 == 0, holes=seed % 5 == 0)
        best = problem.meter().best_pairs()
        curve = best.curve()
        n_seen, n_unseen = int(problem.seen_images.sum()), int((~problem.seen_images).sum())
        assert (curve.n_seen, curve.n_unseen) == (n_seen, n_unseen)
        biases = between(problem.break_points())
        dense = [problem.counts(bias) for bias in biases]
        assert [at(curve, bias) for bias in biases] == dense, seed
        assert metrics(curve) == summary(dense, n_seen, n_unseen), seed
        points = list(zip(curve.seen_right.tolist(), curve.unseen_right.tolist(), strict=True))
        assert points == list(dict.fromkeys(dense)), seed
        assert curve.seen_accuracy.tolist() == [s / max(n_seen, 1) for s, _ in points]
        for bias in biases[:: max(len(biases) // 10, 1)]:
            assert best.predictions(bias).tolist() == problem.ranking(bias)[:, 0].tolist(), seed


@pytest.mark.parametrize("ties", [False, True])
def test_21_reduced_form_equals_full_procedure(ties: bool) -> None:
    for seed in range(100):
        problem = random_problem(1000 + seed, ties=ties)
        labels, seen, scores = problem.labels.numpy(), problem.seen_images, problem.scores.double().numpy()
        correct = (problem.ranking(1000.0)[:, 0] == labels) & ~seen
        known = np.where(problem.space.seen.numpy(), scores, -1e10).max(1)
        margins = sorted((known - scores[np.arange(len(labels)), labels] - 1e-4)[correct])
        biases = [*margins[:: max(len(margins) // 20, 1)], 1000.0]
        curve = problem.meter().best_pairs().grid_curve()
        points = [problem.counts(bias) for bias in biases]
        assert list(zip(curve.seen_right.tolist(), curve.unseen_right.tolist(), strict=True)) == points, seed
        assert metrics(curve) == summary(points, curve.n_seen, curve.n_unseen), seed


def test_21_ties_go_to_the_unseen_pair_under_a_bias_and_to_the_earlier_pair_without() -> None:
    best = two_by_two([[2, 2, 0, 0], [0, 1, 1, 1], [0, 0, 3, 3], [1, 1, 1, 1]], [0, 1, 2, 3]).meter().best_pairs()
    assert best.predictions().tolist() == [0, 1, 2, 0]
    assert best.predictions(0.0).tolist() == [1, 1, 2, 1]
    assert best.predictions(-1e-9).tolist() == [0, 3, 3, 0]


def test_22_four_images_by_hand() -> None:
    curve = FOUR_IMAGES.meter().best_pairs().curve()
    assert curve.biases.tolist() == [-np.inf, 0.5, 1, 2, 3]
    assert curve.seen_accuracy.tolist() == [1, 0.5, 0.5, 0, 0]
    assert curve.unseen_accuracy.tolist() == [0, 0, 0.5, 0.5, 1]
    assert curve.record() == {"best_seen": 1, "best_unseen": 1, "best_hm": 0.5, "best_bias": 1, "auc": 0.25}


def test_22_four_images_on_the_published_grid() -> None:
    curve = FOUR_IMAGES.meter().best_pairs().grid_curve()
    assert curve.biases.tolist() == [1 - 1e-4, 3 - 1e-4, 1000]
    assert curve.seen_accuracy.tolist() == [0.5, 0, 0]
    assert curve.unseen_accuracy.tolist() == [0, 0.5, 1]
    assert curve.record() == {"best_seen": 0.5, "best_unseen": 1, "best_hm": 0, "best_bias": 1 - 1e-4, "auc": 0.125}


@pytest.mark.parametrize(
    ("n_correct", "n_biases"), [(0, 0), (1, 1), (19, 19), (20, 20), (39, 39), (40, 20), (1000, 20)]
)
def test_23_length_of_the_bias_list(n_correct: int, n_biases: int) -> None:
    margin = np.random.default_rng(0).normal(size=n_correct + 5)
    right = np.arange(n_correct + 5) < n_correct
    curve = SeenUnseenCurve.grid(margin, right, np.zeros(n_correct + 5, bool))
    assert len(curve.biases) == n_biases + 1
    assert curve.biases[-1] == 1000
    if not n_correct:
        assert curve.auc == 0 and curve.best_hm == 0


def test_24_a_constant_on_all_scores_or_on_all_unseen_ones_changes_no_metric() -> None:
    for seed in range(50):
        problem = random_problem(seed, ties=True)
        unseen = (~problem.space.seen).float()
        expected = problem.meter().best_pairs()
        for shifted in (problem.scores + 17, problem.scores + 4 * unseen, problem.scores - 4 * unseen):
            found = Problem(problem.space, shifted, problem.labels).meter().best_pairs()
            assert metrics(found.curve()) == metrics(expected.curve())
        found = Problem(problem.space, problem.scores + 17, problem.labels).meter().best_pairs()
        assert found.record() == expected.record()


def test_25_area_lies_within_best_seen_times_best_unseen() -> None:
    for seed in range(200):
        best = random_problem(seed, ties=seed % 2 == 0).meter().best_pairs()
        for curve in (best.curve(), best.grid_curve()):
            assert 0 <= curve.auc <= curve.best_seen * curve.best_unseen * (1 + 1e-12)
            assert (np.diff(curve.seen_right) <= 0).all() and (np.diff(curve.unseen_right) >= 0).all()


def test_25_perfect_images_with_equal_margins_have_half_the_area() -> None:
    for curve in (SeenUnseenCurve.exact, SeenUnseenCurve.grid):
        equal = curve(np.zeros(80), np.ones(80, bool), np.arange(80) < 40)
        assert (equal.best_seen, equal.best_unseen, equal.best_hm, equal.auc) == (1, 1, 0, 0.5)
    margin, seen = np.arange(80.0), np.arange(80) >= 40
    assert SeenUnseenCurve.exact(margin, np.ones(80, bool), seen).auc == 1
    spread = SeenUnseenCurve.grid(margin, np.ones(80, bool), seen)
    assert spread.best_hm == pytest.approx(2 * 0.95 / 1.95)
    assert spread.auc == pytest.approx(0.975)


@pytest.mark.parametrize("label", [0, 1])
def test_26_a_split_of_one_kind_has_defined_metrics(label: int) -> None:
    best = two_by_two([[2, 1, 0, 0], [1, 3, 0, 0]], [label, label]).meter().best_pairs()
    found = best.record()
    assert (found["images_seen"], found["images_unseen"]) == ((2, 0) if label == 0 else (0, 2))
    assert found["auc"] == found["best_hm"] == found["grid"]["auc"] == found["grid"]["best_hm"] == 0
    assert found["best_seen" if label == 0 else "best_unseen"] == 1
    assert found["best_unseen" if label == 0 else "best_seen"] == 0


@pytest.mark.parametrize("seen", [True, False])
def test_26_a_world_of_one_kind_predicts_that_kind_at_every_bias(seen: bool) -> None:
    space = PairSpace(torch.tensor([[0, 0], [0, 1]]), torch.tensor([seen, seen]), 1, 2)
    best = Problem(space, torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1])).meter().best_pairs()
    for bias in (None, -np.inf, -1e9, 0.0, 1e9):
        assert best.predictions(bias).tolist() == [1, 0]
        assert best.accuracy(bias) == {"pair": 0.5, "state": 1.0, "object": 0.5}
    curve = best.curve()
    assert curve.auc == 0 and max(curve.best_seen, curve.best_unseen) == 0.5


def test_26_images_without_any_candidate_are_wrong() -> None:
    best = two_by_two([[-np.inf] * 4, [np.nan] * 4, [5, 3, 0, 1]], [0, 1, 0]).meter().best_pairs()
    assert best.predictions().tolist() == best.predictions(0.0).tolist() == [-1, -1, 0]
    assert best.accuracy()["state"] == best.accuracy()["object"] == pytest.approx(1 / 3)
    assert best.curve().best_seen == 0.5 and best.curve().best_unseen == 0


@pytest.mark.parametrize("top", [1, 2, 3, 5])
def test_top_k_curve_equals_a_dense_sweep(top: int) -> None:
    for seed in range(60):
        problem = random_problem(2000 + seed, ties=seed % 2 == 0, holes=seed % 3 == 0)
        best = problem.meter(top=5).best_pairs()
        curve = best.curve(top)
        biases = between(problem.break_points())
        dense = [problem.counts(bias, top) for bias in biases]
        assert [at(curve, bias) for bias in biases] == dense, seed
        assert metrics(curve) == summary(dense, curve.n_seen, curve.n_unseen), seed
        assert best.record() == problem.meter().best_pairs().record()


def test_state_and_object_accuracy_and_counts_per_pair() -> None:
    best = FOUR_IMAGES.meter().best_pairs()  # predicted: 0, 3, 0, 0 instead of 0, 3, 1, 2
    assert best.accuracy() == {"pair": 0.5, "state": 0.75, "object": 0.75}
    assert best.accuracy(best.curve().best_bias) == {"pair": 0.5, "state": 0.5, "object": 1.0}
    pairs, images, right = best.counts()
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert images.tolist() == [1, 1, 1, 1] and right.tolist() == [1, 0, 0, 1]
    assert best.counts(1e9).right.tolist() == [0, 1, 1, 0]


def test_chunks_and_batches_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    space = PairSpace.open_world(6, 7, torch.randint(0, 6, (9, 2), generator=generator))
    scores = torch.randint(0, 4, (20, 42), generator=generator).float()
    labels = space.pairs[torch.randint(0, 42, (20,), generator=generator)]
    for top in (1, 3):
        whole = FrontierMeter(space, top=top)
        whole.add([(0, scores)], labels)
        parts = FrontierMeter(space, top=top)
        for rows in (slice(0, 1), slice(1, 20)):
            parts.add([(start, scores[rows, start : start + 5]) for start in range(40, -1, -5)], labels[rows])
        assert len(parts) == len(whole) == 20
        for a, b in zip(whole.best_pairs().unseen, parts.best_pairs().unseen, strict=True):
            assert torch.equal(a, b)
        assert whole.best_pairs().record() == parts.best_pairs().record()


def test_scores_keep_their_tensor() -> None:
    scores = FOUR_IMAGES.scores.clone()
    FOUR_IMAGES.meter(top=2)
    assert torch.equal(scores, FOUR_IMAGES.scores)


SPACE = FOUR_IMAGES.space
LABELS = torch.tensor([[0, 0], [1, 1]])
BAD_CALLS: dict[str, Any] = {
    r"n_states must be an integer of at least 1": lambda: PairSpace.open_world(0, 2, torch.zeros(0, 2).long()),
    r"pair 1 of pairs is \(0, 2\), but there are only 2 objects, 0 to 1": lambda: SPACE.position(
        torch.tensor([[0, 0], [0, 2]])
    ),
    r"pair 0 of pairs is \(-1, 0\), but there are only 2 states": lambda: SPACE.position(torch.tensor([[-1, 0]])),
    r"pair \(0, 1\) occurs twice, at 0 and 2; once as seen and once as unseen: list it once": lambda: PairSpace(
        torch.tensor([[0, 1], [0, 0], [0, 1]]), torch.tensor([True, True, False]), 1, 2
    ),
    "there is no pair to choose from": lambda: PairSpace(torch.zeros(0, 2).long(), torch.zeros(0).bool(), 1, 1),
    "seen must be bool": lambda: PairSpace(torch.zeros(1, 2).long(), torch.zeros(1), 1, 1),
    "pairs must be int64": lambda: PairSpace(torch.zeros(1, 2), torch.zeros(1).bool(), 1, 1),
    "the split lists no pair": lambda: PairSpace.closed_world(
        SPACE.pairs, SPACE.seen, [], n_states=2, n_objects=2
    ),
    "the split lists pair 4, but there are only 4 pairs": lambda: PairSpace.closed_world(
        SPACE.pairs, SPACE.seen, [1, 4], n_states=2, n_objects=2
    ),
    "feasibility of an unseen pair is NaN": lambda: PairSpace.open_world(
        2, 2, SPACE.pairs[:1], torch.full((2, 2), np.nan)
    ),
    "no image was added": lambda: FrontierMeter(SPACE).best_pairs(),
    "pairs 2 to 3 are missing": lambda: FrontierMeter(SPACE).add([(0, torch.zeros(2, 2))], LABELS),
    "pairs 0 to 3 are missing": lambda: FrontierMeter(SPACE).add([], LABELS),
    "pairs 1 to 1 are given twice": lambda: FrontierMeter(SPACE).add(
        [(1, torch.zeros(2, 3)), (0, torch.zeros(2, 2))], LABELS
    ),
    "a chunk holds the pairs 2 to 5, the space only 0 to 3": lambda: FrontierMeter(SPACE).add(
        [(2, torch.zeros(2, 4))], LABELS
    ),
    r"scores of a chunk must have shape \[2, k\], found \[3, 4\]": lambda: FrontierMeter(SPACE).add(
        [(0, torch.zeros(3, 4))], LABELS
    ),
    r"labels must have shape \[B, 2\], found \[2\]": lambda: FrontierMeter(SPACE).add([], torch.tensor([0, 1])),
    "give both factors": lambda: FrontierMeter(SPACE).add([], LABELS, state=torch.zeros(2, 2)),
    "thresholds need the feasibility": lambda: FrontierMeter(SPACE, thresholds=[0.0]),
    "pruning needs the feasibility": lambda: SPACE.pruned(0.5),
    "a search needs thresholds": lambda: FrontierMeter(SPACE).search(),
    "profile must be 'clean' or 'released', found 'paper'": lambda: FrontierMeter(SPACE).search("paper"),  # type: ignore[arg-type]
    "top must be an integer of at least 1": lambda: FrontierMeter(SPACE, top=0),
    "top 2 was asked for, but only 1 pairs": lambda: FOUR_IMAGES.meter().best_pairs().curve(2),
    "right must be bool": lambda: SeenUnseenCurve.exact([0.0], [1], [True]),
    r"seen must have shape \[1\], found \[2\]": lambda: SeenUnseenCurve.grid([0.0], [True], [True, False]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str) -> None:
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()


def test_margins_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericError, match="margin of an image is NaN"):
        SeenUnseenCurve.exact([np.nan], [True], [True])
    assert SeenUnseenCurve.exact([np.nan], [False], [True]).best_seen == 0


def test_the_benchmark_agrees_with_its_dense_sweep() -> None:
    found = against_dense(60, 10, 20, batch=16, chunk=64, rounds=1)
    assert found["same_accuracies"] and found["metrics"]["auc"] > 0
