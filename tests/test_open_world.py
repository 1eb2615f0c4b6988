"""Scores, feasibility and thresholds of the open world: numbers 16 to 18 and 27 to 32 of MSCI's specification."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capt.errors import CaptError, DataError
from capt.evaluation import (
    FrontierMeter,
    PairSpace,
    feasibility,
    feasibility_thresholds,
    pair_scores,
    primitive_factors,
    released_copies,
)
from tests.compositional_oracle import Problem

ROOT = Path(__file__).resolve().parent.parent


def world(seed: int, n_states: int = 5, n_objects: int = 6, n_seen: int = 8) -> PairSpace:
    """An open world whose feasibilities are whole thirds, so that many are equal; some are 0, some below."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randperm(n_states * n_objects, generator=generator)[:n_seen]
    seen_pairs = torch.stack([seen // n_objects, seen % n_objects], 1)
    feasible = torch.randint(-2, 3, (n_states, n_objects), generator=generator) / 3
    feasible[seen_pairs[:, 0], seen_pairs[:, 1]] = 0.0
    return PairSpace.open_world(n_states, n_objects, seen_pairs, feasible)


def images(space: PairSpace, seed: int, *, ties: bool, shift: float = 0.0, n: int = 20) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, len(space))
    scores = torch.randint(-3, 4, shape, generator=generator) if ties else 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, len(space), (n,), generator=generator)
    return Problem(space, scores.float() + shift, labels)


def only_feasible(problem: Problem, threshold: float, infeasible: float) -> Problem:
    """The dense way: a full matrix in which infeasible unseen pairs have one given score."""
    return Problem(
        problem.space,
        problem.scores.masked_fill(~problem.space.feasible(threshold), infeasible),
        problem.labels,
    )


def pruned_first(problem: Problem, threshold: float) -> FrontierMeter:
    """The streamed way: infeasible pairs are never scored."""
    space = problem.space.pruned(threshold)
    meter = FrontierMeter(space)
    kept = problem.space.feasible(threshold)
    meter.add([(0, problem.scores[:, kept])], problem.space.pairs[problem.labels])
    return meter


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.1, 0.9, 0.9), (1.0, 1.0, 1.0), (0.3, 0.0, 0.7), (0.3, 0.7, 0.0), (1, 0, 0)])
def test_16_scores_equal_a_loop_over_pairs(weights: tuple[float, float, float]) -> None:
    torch.manual_seed(0)
    logits, states, objects = torch.randn(3, 12), torch.randn(3, 3), torch.randn(3, 4)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    pair_weight, state_weight, object_weight = weights
    factors = primitive_factors(states, objects, state_weight=state_weight, object_weight=object_weight)
    found = pair_scores(logits, pairs, factors, pair_weight=pair_weight)
    for column, (state, thing) in enumerate(pairs.tolist()):
        first = state_weight * states.softmax(1)[:, state] if state_weight != 0 else 1.0
        second = object_weight * objects.softmax(1)[:, thing] if object_weight != 0 else 1.0
        assert torch.equal(found[:, column], pair_weight * logits[:, column] + first * second)
    if weights == (1, 0, 0):
        assert torch.equal(found, logits + 1)


@pytest.mark.parametrize("copies", [1, 2, 28, 272])
def test_17_copies_divide_the_primitive_term_as_a_repeated_softmax_does(copies: int) -> None:
    torch.manual_seed(0)
    states, objects = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    factors = primitive_factors(states, objects, copies=copies)
    torch.testing.assert_close(factors.state, states.repeat(1, copies).softmax(1)[:, :3])
    torch.testing.assert_close(factors.object, objects.repeat(1, copies).softmax(1)[:, :4])
    once = primitive_factors(states, objects)
    torch.testing.assert_close(
        factors.state[:, :1] * factors.object, once.state[:, :1] * once.object / copies**2, rtol=1e-12, atol=0
    )


def test_17_number_of_copies_of_the_published_data_sets() -> None:
    assert [released_copies(n) for n in (1, 192, 1024, 1025, 1962, 28_175, 7_555, 278_362)] == [
        1, 1, 1, 2, 2, 28, 8, 272,
    ]  # fmt: skip


def test_18_scores_do_not_touch_the_logits() -> None:
    logits, states, objects = torch.randn(2, 6), torch.randn(2, 2), torch.randn(2, 3)
    before = [value.clone() for value in (logits, states, objects)]
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    pair_scores(logits, pairs, primitive_factors(states, objects)).zero_()
    pair_scores(logits, pairs, primitive_factors(states, objects, state_weight=0, object_weight=0)).zero_()
    for value, old in zip((logits, states, objects), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("top", [1, 2])
def test_the_meter_adds_the_primitive_term_of_each_pair(top: int) -> None:
    torch.manual_seed(1)
    space = world(1)
    problem = images(space, 1, ties=False)
    factors = primitive_factors(torch.randn(20, 5), torch.randn(20, 6), state_weight=7, object_weight=7)
    labels = space.pairs[problem.labels]
    fused = FrontierMeter(space, top=top)
    fused.add([(start, problem.scores[:, start : start + 4]) for start in range(0, 30, 4)], labels, **factors._asdict())
    full = Problem(space, pair_scores(problem.scores, space.pairs, factors), problem.labels).meter(top=top)
    for kind in ("seen", "unseen"):
        for a, b in zip(getattr(fused.best_pairs(), kind), getattr(full.best_pairs(), kind), strict=True):
            assert torch.equal(a, b)


# ---- feasibility ---------------------------------------------------------------------------------------------------


def unit(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_27_feasibility_of_a_toy_vocabulary_by_hand() -> None:
    states, objects = unit(0, 60, 180), unit(0, 90, 60)
    found = feasibility(states, 5 * objects, [[0, 0], [0, 1], [1, 0]])
    assert found.dtype == torch.float32
    cos60, cos30, cos120 = 0.5, 3**0.5 / 2, -0.5
    expected = [
        [0, 0, (cos30 + -1) / 2],  # object 2 resembles 0 and 1, which state 0 has; no state was seen with object 2
        [0, (0 + cos60) / 2, (cos60 + -1) / 2],  # (1, 1): object 0 at 90 degrees, state 0 at 60
        [(-1 + cos120) / 2, (-1 + -1) / 2, -1],  # state 2 was seen with nothing: (2, 0) has states 0 and 1 only
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_27_a_pair_is_no_partner_of_itself() -> None:
    states, objects = unit(0, 90), unit(0, 0)
    found = feasibility(states, objects, torch.tensor([[0, 0]]))
    assert found.tolist() == [[0, 0], [-0.5, -1]]  # (0, 1): object 0 is the same word, but no state was seen with 1


def test_27_feasibility_equals_a_loop() -> None:
    torch.manual_seed(0)
    states, objects = torch.randn(7, 5), torch.randn(9, 5)
    seen = {(int(s), int(o)) for s, o in zip(torch.randint(0, 7, (20,)), torch.randint(0, 9, (20,)), strict=True)}

    def cos(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))

    found = feasibility(states, objects, sorted(seen))
    for s in range(7):
        for o in range(9):
            with_state = [cos(objects[o], objects[other]) for other in range(9) if other != o and (s, other) in seen]
            with_object = [cos(states[s], states[other]) for other in range(7) if other != s and (other, o) in seen]
            expected = (max(with_state, default=-1) + max(with_object, default=-1)) / 2
            assert float(found[s, o]) == pytest.approx(0 if (s, o) in seen else expected, abs=1e-6)


@pytest.mark.parametrize(("n_states", "n_objects", "n_seen"), [(115, 245, 1262), (16, 12, 83), (413, 674, 5592)])
def test_28_sizes_of_the_published_data_sets(n_states: int, n_objects: int, n_seen: int) -> None:
    torch.manual_seed(0)
    flat = torch.randperm(n_states * n_objects)[:n_seen]
    seen_pairs = torch.stack([flat // n_objects, flat % n_objects], 1)
    start = time.perf_counter()
    found = feasibility(torch.randn(n_states, 64), torch.randn(n_objects, 64), seen_pairs)
    space = PairSpace.open_world(n_states, n_objects, seen_pairs, found)
    position = space.position(space.pairs)
    thresholds = feasibility_thresholds(space)
    assert time.perf_counter() - start < 10  # seconds on any machine; minutes where membership is looked up in a list
    assert len(space) == {115: 28_175, 16: 192, 413: 278_362}[n_states]
    assert int((found == 0).sum()) == n_seen
    assert torch.equal(position, torch.arange(len(space)))
    lowest, highest = found[~space.seen.view(n_states, n_objects)].aminmax()
    assert (len(thresholds), float(thresholds[0]), float(thresholds[-1])) == (50, float(lowest), float(highest))
    middle = float(thresholds[25])
    survivors = sum(value >= middle for value in found[~space.seen.view(n_states, n_objects)].tolist())
    assert len(space.pruned(middle)) == survivors + n_seen
    assert len(space.pruned(float(lowest))) == len(space)


# ---- thresholds ----------------------------------------------------------------------------------------------------


def test_29_thresholds_up_to_zero_neither_drop_nor_double_seen_scores() -> None:
    for seed in range(20):
        problem = images(world(seed), seed, ties=True)
        for threshold in (-1.0, -1 / 3, 0.0, 0.5, 2.0):
            space = problem.space.pruned(threshold)
            assert int(space.seen.sum()) == int(problem.space.seen.sum())
            best = pruned_first(problem, threshold).best_pairs()
            known = problem.scores[:, problem.space.seen].max(1).values
            assert torch.equal(best.seen.score[:, 0], known)
            assert torch.equal(best.infeasible_at_zero(problem.space, threshold).seen.score[:, 0], known)


@pytest.mark.parametrize("ties", [False, True])
def test_30_pruning_before_scoring_equals_masking_after(ties: bool) -> None:
    exact, corrected = 0, 0
    for seed in range(30):
        problem = images(world(seed), seed, ties=ties, shift=(seed % 3) * 2.0)
        for threshold in (-0.5, 0.2, 0.5, 2.0):
            best = pruned_first(problem, threshold).best_pairs()
            zero = best.infeasible_at_zero(problem.space, threshold)
            masked = only_feasible(problem, threshold, 0.0).meter().best_pairs()
            for kind in ("seen", "unseen"):
                for a, b in zip(getattr(zero, kind), getattr(masked, kind), strict=True):
                    assert torch.equal(a, b)
            assert zero.record() == masked.record()
            # Dropped pairs never win, whatever their score would be.
            dropped = only_feasible(problem, threshold, -torch.inf).meter().best_pairs()
            assert best.record() == dropped.record()
            same = torch.equal(dropped.unseen.pair, masked.unseen.pair)
            assert best.pruning_is_exact(problem.space, threshold) == same
            exact += same
            corrected += not same
            if (best.unseen.score > 0).all():
                assert best.pruning_is_exact(problem.space, threshold)
                assert best.record() == masked.record()
    assert exact and corrected


def test_30_an_infeasible_pair_wins_a_tie_at_zero_only_if_it_comes_first() -> None:
    space = PairSpace.open_world(1, 4, [[0, 3]], torch.tensor([[0.9, 0.1, 0.9, 0.0]]))
    scores = torch.tensor([[0.0, 5.0, -1.0, 1.0], [-1.0, 5.0, 0.0, 1.0], [-1.0, 5.0, -2.0, 1.0], [2.0, 5.0, 3.0, 1.0]])
    labels = space.pairs[torch.tensor([0, 2, 1, 2])]
    meter = FrontierMeter(space.pruned(0.5))
    meter.add([(0, scores[:, [0, 2, 3]])], labels)
    best = meter.best_pairs()
    assert best.space.pairs[best.unseen.pair[:, 0]].tolist() == [[0, 0], [0, 2], [0, 0], [0, 2]]
    assert best.infeasible_at_zero(space, 0.5).unseen.pair[:, 0].tolist() == [0, 1, 1, 2]
    assert best.infeasible_at_zero(space, 0.5).unseen.score[:, 0].tolist() == [0, 0, 0, 3]
    assert not best.pruning_is_exact(space, 0.5)
    assert best.pruning_is_exact(space.pruned(0.5), 0.5)


@pytest.mark.parametrize("top", [1, 3])
def test_31_streamed_search_equals_separate_evaluations(top: int) -> None:
    for seed in range(4):
        problem = images(world(seed), seed, ties=seed % 2 == 0, shift=1.0, n=40)
        thresholds = feasibility_thresholds(problem.space)
        meter = problem.meter(thresholds=thresholds, top=top)
        for profile, infeasible in (("clean", -torch.inf), ("released", 0.0)):
            found = meter.search(profile)  # type: ignore[arg-type]
            expected = []
            for threshold, streamed in zip(thresholds.tolist(), meter.by_threshold(), strict=True):
                separate = only_feasible(problem, threshold, infeasible).meter().best_pairs()
                if profile == "released":
                    streamed = streamed.infeasible_at_zero(problem.space, threshold)
                assert streamed.record() == separate.record()
                curve = separate.curve() if profile == "clean" else separate.grid_curve()
                expected.append(curve.auc)
            assert found.auc.tolist() == expected
            assert found.best == expected.index(max(expected))
            assert found.threshold == thresholds[found.best]


def test_31_the_first_of_equally_good_thresholds_is_taken() -> None:
    space = PairSpace.open_world(1, 3, [[0, 0]], torch.tensor([[0.0, 0.2, 0.8]]))
    meter = FrontierMeter(space, thresholds=[0.1, 0.3, 0.5, 0.8])
    meter.add([(0, torch.tensor([[3.0, 9.0, 1.0], [2.0, 9.0, 3.0]]))], torch.tensor([[0, 0], [0, 2]]))
    found = meter.search()
    assert found.auc.tolist() == [0, 1, 1, 1]
    assert (found.best, found.threshold) == (1, pytest.approx(0.3))


def test_a_label_that_was_pruned_away_is_an_unseen_image_that_is_wrong() -> None:
    space = PairSpace.open_world(1, 3, [[0, 0]], torch.tensor([[0.0, 0.2, 0.8]])).pruned(0.5)
    meter = FrontierMeter(space)
    meter.add([(0, torch.tensor([[3.0, 1.0], [0.0, 1.0]]))], torch.tensor([[0, 1], [0, 2]]))
    curve = meter.best_pairs().curve()
    assert (curve.n_seen, curve.n_unseen, curve.best_unseen) == (0, 2, 0.5)


def test_thresholds_that_do_not_ascend_are_refused() -> None:
    for wrong in ([], [0.2, 0.1], [float("nan")], [[0.1]]):
        with pytest.raises(CaptError, match="non-empty vector in ascending order"):
            FrontierMeter(world(0), thresholds=wrong)


def test_feasibility_refuses_what_does_not_fit() -> None:
    with pytest.raises(CaptError, match=r"objects must have shape \[n_objects, 4\], found \[2, 3\]"):
        feasibility(torch.zeros(2, 4), torch.zeros(2, 3), [[0, 0]])
    with pytest.raises(DataError, match="but there are only 2 objects"):
        feasibility(torch.zeros(2, 3), torch.zeros(2, 3), [[0, 2]])
    with pytest.raises(CaptError, match="has no feasibility"):
        feasibility_thresholds(PairSpace.open_world(1, 2, [[0, 0]]))
    with pytest.raises(DataError, match="every pair of the space is seen"):
        feasibility_thresholds(PairSpace.open_world(1, 1, [[0, 0]], torch.zeros(1, 1)))


# ---- memory --------------------------------------------------------------------------------------------------------

STREAM = """
import resource, sys
import torch
from capt.evaluation import FrontierMeter, PairSpace

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
n_states, n_images = int(sys.argv[1]), int(sys.argv[2])
space = PairSpace.open_world(n_states, 100, torch.tensor([[0, 0], [1, 1]]))
chunk = torch.randn(100, 1000)
meter = FrontierMeter(space)
labels = space.pairs[:100]
for batch in range(n_images // 100):
    meter.add(((start, chunk) for start in range(0, len(space), 1000)), labels)
    if batch == 0:
        before = peak()
meter.best_pairs().record()
print(peak() - before)
"""


def test_32_memory_grows_with_neither_pairs_nor_images_times_pairs() -> None:
    def growth(n_states: int, n_images: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", STREAM, str(n_states), str(n_images)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        return int(done.stdout)

    # The matrix would have 400 MB.
    assert growth(100, 10_000) < 40 * 2**20


def test_32_what_is_kept_depends_on_images_alone() -> None:
    def kept(n_states: int) -> int:
        space = PairSpace.open_world(n_states, 50, [[0, 0]])
        meter = FrontierMeter(space)
        meter.add([(0, torch.zeros(30, len(space)))], space.pairs[:30])
        best = meter.best_pairs()
        return sum(value.nbytes for value in (*best.seen, *best.unseen, best.labels))

    assert kept(1) == kept(400) == 30 * 40
