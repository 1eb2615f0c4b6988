"""Metrics: numbers 33-35 of the specification's list, and sparse counting at scale."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capt.errors import CaptError, DataError
from capt.evaluation import (
    accuracy,
    aggregate_seeds,
    base_to_novel_metrics,
    base_to_novel_table,
    confusion_counts,
    correction_metrics,
    harmonic_mean,
    mean_std,
    top_confused_pairs,
)

# Base and novel accuracy (percent) of CAPT as printed per data set in its Table 1.
PRINTED_CAPT_ROWS = {
    "ImageNet": (80.51, 75.13),
    "Caltech101": (99.10, 96.34),
    "OxfordPets": (96.44, 97.71),
    "StanfordCars": (83.43, 84.26),
    "Flowers102": (98.78, 82.91),
    "Food101": (92.43, 93.96),
    "FGVCAircraft": (49.67, 40.31),
    "SUN397": (83.98, 81.32),
    "DTD": (88.19, 72.38),
    "EuroSAT": (97.60, 81.32),
    "UCF101": (91.42, 82.36),
}


def test_33_harmonic_mean() -> None:
    for x in (0.0, 1e-9, 0.37, 1.0, 87.41):
        assert harmonic_mean(x, x) == pytest.approx(x, rel=1e-15)
        assert harmonic_mean(x, 0.0) == 0.0
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    with pytest.raises(DataError, match=">= 0"):
        harmonic_mean(float("nan"), 0.5)


def test_34_average_row_follows_from_the_cells_not_from_the_printed_average() -> None:
    average = base_to_novel_table(PRINTED_CAPT_ROWS.values())
    assert round(average["base"], 2) == 87.41
    assert round(average["novel"], 2) == 80.73
    assert round(average["hm_of_means"], 2) == 83.94
    assert round(average["mean_of_hms"], 2) == 83.79


def test_35_identical_predictions_change_nothing() -> None:
    labels, base = [0, 0, 1, 2], [0, 1, 1, 0]
    metrics = correction_metrics(labels, base, base, 3)
    rates = {name: value for name, value in metrics.items() if not name.startswith("n_")}
    assert set(rates.values()) == {0.0}
    assert metrics["n_mistakes"] == 2 and metrics["n_pairs_m1"] == 2 and metrics["n_pairs_m3"] == 0


def test_35_perfect_predictions_correct_everything() -> None:
    labels = [0, 0, 0, 1, 2]
    metrics = correction_metrics(labels, [1, 1, 1, 1, 0], labels, 3)
    assert metrics["sample_correction_rate"] == 1.0
    assert metrics["net_reduction"] == 1.0
    assert metrics["new_error_rate"] == 0.0
    assert metrics["pair_resolution_rate"] == metrics["pair_resolution_rate_m1"] == 1.0
    assert metrics["pair_resolution_rate_m3"] == 1.0 and metrics["n_pairs_m3"] == 1


def test_35_toy_matrix_with_known_answers() -> None:
    # Class 0: ten samples, four read as 1 before; class 1: ten samples, one read as 0 and one as 2 before.
    labels = [0] * 10 + [1] * 10
    before = [1] * 4 + [0] * 6 + [0, 2] + [1] * 8
    # After: two of the four remain, the single 1->0 remains, 1->2 is repaired, and two right ones break as 0->2.
    after = [1, 1, 0, 0] + [2, 2] + [0] * 4 + [0, 1] + [1] * 8
    metrics = correction_metrics(labels, before, after, 3)
    assert metrics["sample_correction_rate"] == pytest.approx(3 / 6)
    assert metrics["pair_resolution_rate_m1"] == pytest.approx(2 / 3)  # 0->1 halved, 1->2 gone, 1->0 stayed
    assert metrics["pair_resolution_rate_m3"] == pytest.approx(1 / 1)
    assert metrics["pair_resolution_rate_m5"] == 0.0 and metrics["n_pairs_m5"] == 0
    assert metrics["net_reduction"] == pytest.approx((6 - 5) / 6)
    assert metrics["new_error_rate"] == pytest.approx(2 / 14)


def test_35_more_mistakes_than_before_is_a_negative_reduction() -> None:
    metrics = correction_metrics([0, 0, 0], [1, 0, 0], [1, 1, 1], 2)
    assert metrics["net_reduction"] == pytest.approx(-2.0)
    assert metrics["new_error_rate"] == 1.0


def test_35_a_count_that_falls_by_less_than_half_is_not_resolved() -> None:
    labels = [0] * 5
    assert correction_metrics(labels, [1] * 5, [1, 1, 1, 0, 0], 2)["pair_resolution_rate"] == 0.0
    assert correction_metrics(labels, [1] * 5, [1, 1, 0, 0, 0], 2)["pair_resolution_rate"] == 1.0


def test_35_a_perfect_base_model_leaves_nothing_to_correct() -> None:
    metrics = correction_metrics([0, 1], [0, 1], [0, 0], 2)
    assert metrics["sample_correction_rate"] == metrics["pair_resolution_rate"] == metrics["net_reduction"] == 0.0
    assert metrics["new_error_rate"] == 0.5


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**31 - 1))
def test_counts_equal_a_dense_brute_force_matrix(n_classes: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, before, after = (rng.integers(0, n_classes, n) for _ in range(3))
    dense = np.zeros((2, n_classes, n_classes), int)
    for t, q0, q1 in zip(labels, before, after, strict=True):
        dense[0, t, q0] += 1
        dense[1, t, q1] += 1
    counts = confusion_counts(labels, before, n_classes)
    rebuilt = np.zeros((n_classes, n_classes), int)
    rebuilt[counts.labels, counts.predictions] = counts.counts
    assert (rebuilt == dense[0]).all() and (counts.counts > 0).all() and counts.total == n

    off = ~np.eye(n_classes, dtype=bool)
    eligible = (dense[0] >= 1) & off
    resolved = eligible & (dense[1] * 2 <= dense[0])
    metrics = correction_metrics(labels, before, after, n_classes)
    assert metrics["pair_resolution_rate"] == (resolved.sum() / eligible.sum() if eligible.any() else 0.0)

    pairs = top_confused_pairs(counts, n_classes**2)
    brute = [
        (-(dense[0, a, b] + dense[0, b, a]), a, b)
        for a in range(n_classes)
        for b in range(a + 1, n_classes)
        if dense[0, a, b] + dense[0, b, a]
    ]
    assert [(-pair.total, pair.first, pair.second) for pair in pairs] == sorted(brute)
    assert all(pair.first_as_second == dense[0, pair.first, pair.second] for pair in pairs)


def test_counts_do_not_depend_on_sample_order() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 50, (2, 5000))
    order = rng.permutation(5000)
    one, two = confusion_counts(labels, predictions, 50), confusion_counts(labels[order], predictions[order], 50)
    assert top_confused_pairs(one, 20) == top_confused_pairs(two, 20)
    assert (one.counts == two.counts).all()


def test_hundred_thousand_classes_stay_sparse() -> None:
    n_classes, n = 100_000, 200_000
    rng = np.random.default_rng(1)
    labels, before = rng.integers(0, n_classes, (2, n))
    tracemalloc.start()
    metrics = correction_metrics(labels, before, labels, n_classes)
    pairs = top_confused_pairs(confusion_counts(labels, before, n_classes), 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert metrics["sample_correction_rate"] == 1.0 and len(pairs) == 20
    assert all(pair.first < pair.second < n_classes for pair in pairs)
    assert peak < 200 * n, f"{peak / 2**20:.0f} MiB for {n:,} predictions"  # a dense matrix would take 40 GB


def test_class_ids_of_the_largest_list_do_not_overflow() -> None:
    n_classes = 3_000_000_000  # squared it passes 2**62, so the combined key still fits in int64
    counts = confusion_counts([n_classes - 1], [n_classes - 2], n_classes)
    assert (counts.labels[0], counts.predictions[0]) == (n_classes - 1, n_classes - 2)


def test_tensors_lists_and_arrays_give_the_same() -> None:
    labels, predictions = [0, 1, 2, 2], [0, 2, 2, 1]
    assert accuracy(labels, predictions) == 0.5
    assert accuracy(torch.tensor(labels), np.array(predictions, np.int32)) == 0.5


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "2 labels but 1 predictions"),
        ([], [], "no samples"),
        ([0.5], [1], "integer class ids"),
        ([[0]], [[0]], "shape"),
        ([0], [-1], "negative"),
    ],
)
def test_bad_input_is_named(labels: list[float], predictions: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy(labels, predictions)


def test_an_id_beyond_the_class_list_is_an_error() -> None:
    with pytest.raises(CaptError, match="class id 7 found, but there are only 3 classes"):
        confusion_counts([0, 7], [1, 1], 3)


def test_both_standard_deviations() -> None:
    mean, population, sample = mean_std([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert population == pytest.approx(np.std([1, 2, 4]))
    assert sample == pytest.approx(np.std([1, 2, 4], ddof=1)) and sample > population
    assert mean_std([5.0]) == (5.0, 0.0, 0.0)


def test_seeds_are_combined_under_both_conventions() -> None:
    labels = [0, 1, 0, 1]
    per_seed = {
        seed: base_to_novel_metrics(
            labels,
            base,
            labels,
            novel,
            reference_base_predictions=[1, 1, 1, 1],
            n_base_classes=2,
        )
        for seed, base, novel in [(1, [0, 1, 0, 1], [0, 0, 0, 1]), (2, [0, 1, 0, 0], [1, 0, 0, 1])]
    }
    assert per_seed[1]["base"] == 1.0 and per_seed[1]["novel"] == 0.75
    assert per_seed[1]["sample_correction_rate"] == 1.0
    combined = aggregate_seeds(per_seed)
    assert list(combined["per_seed"]) == ["1", "2"]
    assert combined["mean"]["base"] == pytest.approx(0.875) and combined["mean"]["novel"] == pytest.approx(0.625)
    assert combined["std"]["base"] == pytest.approx(0.125)
    assert combined["std_sample"]["base"] == pytest.approx(0.125 * 2**0.5)
    assert combined["hm_of_means"] == pytest.approx(harmonic_mean(0.875, 0.625))
    assert combined["mean"]["hm"] == pytest.approx((harmonic_mean(1, 0.75) + harmonic_mean(0.75, 0.5)) / 2)
    assert combined["mean"]["hm"] != pytest.approx(combined["hm_of_means"])


def test_seeds_with_different_metrics_are_refused() -> None:
    with pytest.raises(DataError, match="seed 2 has other metrics"):
        aggregate_seeds({1: {"base": 1.0, "novel": 1.0}, 2: {"base": 1.0}})
    with pytest.raises(DataError, match="no seeds"):
        aggregate_seeds({})
