"""Multi-label evaluation: average precision against brute force and scikit-learn, groups, thresholds, speed."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
import torch

from capt.data.multi_label import frequency_groups
from capt.errors import DataError
from capt.evaluation import multi_label
from capt.evaluation.multi_label import (
    MultiLabelResult,
    average_precision,
    best_thresholds,
    label_metrics,
    predicted_labels,
)


def brute_force(scores, targets) -> float:
    """The definition: sort by (-score, image index), then the mean precision at the positives."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    precisions, hits = [], 0
    for rank, i in enumerate(order, 1):
        if targets[i]:
            hits += 1
            precisions.append(hits / rank)
    return sum(precisions) / len(precisions) if precisions else math.nan


def random_problem(seed: int):
    """Scores with few or many ties, targets rare or frequent; 1 to 40 images."""
    random = np.random.default_rng(seed)
    shape = (random.integers(1, 41), random.integers(1, 6))
    scores = random.normal(size=shape).astype(np.float32)
    if seed % 3:
        scores = np.round(scores * (1 if seed % 3 == 1 else 4)) / 4
    return scores, random.random(shape) < random.choice([0.05, 0.3, 0.8])


def test_32_average_precision_is_the_formula_on_1000_problems():
    for seed in range(1000):
        scores, targets = random_problem(seed)
        found = average_precision(scores, targets)
        want = [brute_force(column.tolist(), labels) for column, labels in zip(scores.T, targets.T, strict=True)]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-15)


def test_32_with_ties_taken_together_it_is_scikit_learn_on_1000_problems():
    from sklearn.metrics import average_precision_score

    tied = 0
    for seed in range(1000):
        scores, targets = random_problem(seed)
        together, alone = average_precision(scores, targets, ties="together"), average_precision(scores, targets)
        for c in range(scores.shape[1]):
            if not targets[:, c].any():
                assert math.isnan(together[c])
                continue
            want = average_precision_score(targets[:, c], scores[:, c])
            assert together[c] == pytest.approx(want, abs=1e-12)
            distinct = len(np.unique(scores[:, c])) == len(scores)
            tied += not distinct
            if distinct:  # the definitions coincide
                assert alone[c] == pytest.approx(want, abs=1e-12)
    assert tied > 1000


@pytest.mark.parametrize("ties", ["index", "together"])
def test_32_special_rankings(ties):
    scores = np.arange(6.0)[::-1, None].repeat(4, 1)
    targets = np.zeros((6, 4), bool)
    targets[:, 0] = True  # all positive
    targets[0, 1] = targets[5, 2] = True  # one positive, first and last rank
    found = average_precision(scores, targets, ties=ties)
    assert found[:3].tolist() == [1.0, 1.0, 1 / 6] and math.isnan(found[3])


def test_32_ties_go_to_the_lower_image_or_to_all():
    scores, targets = np.zeros((4, 1)), np.array([[0], [1], [0], [1]])
    assert average_precision(scores, targets)[0] == (1 / 2 + 2 / 4) / 2
    assert average_precision(scores, targets, ties="together")[0] == 2 / 4
    order = [1, 3, 0, 2]
    assert average_precision(scores[order], targets[order])[0] == 1.0
    assert average_precision(scores[order], targets[order], ties="together")[0] == 2 / 4
    signed = np.array([[0.0], [-0.0]], np.float32)
    assert average_precision(signed, np.array([[0], [1]]))[0] == 0.5  # zeros of both signs are equal


def test_32_infinite_and_extreme_scores_have_their_rank():
    scores = np.array([[-np.inf], [3e38], [1e-42], [np.inf], [-3e38], [-1e-42]], np.float32)
    targets = np.array([[1], [0], [0], [1], [0], [1]])
    assert average_precision(scores, targets)[0] == pytest.approx((1 + 2 / 4 + 3 / 6) / 3)


def test_33_total_is_the_size_weighted_mean_of_the_groups():
    random = np.random.default_rng(0)
    scores, targets = random.normal(size=(200, 80)), random.random((200, 80)) < 0.1
    frequency = np.repeat([150, 50, 5], [22, 33, 25])
    result = MultiLabelResult.of(scores, targets, frequency)
    means = {group: result.mean(group) for group in ("head", "medium", "tail")}
    total = (22 * means["head"] + 33 * means["medium"] + 25 * means["tail"]) / 80
    assert result.mean() == pytest.approx(total, abs=1e-12)
    assert {name: len(members) for name, members in result.groups.items()} == {"head": 22, "medium": 33, "tail": 25}


def test_33_boundaries_of_the_groups_and_classes_without_a_positive():
    assert {name: members.tolist() for name, members in vars(frequency_groups([100, 99, 20, 19, 0])).items()} == {
        "head": [0], "medium": [1, 2], "tail": [3, 4],
    }  # fmt: skip
    assert frequency_groups([3, 2], thresholds=(3, 1)).head.tolist() == [0]
    scores, targets = np.eye(4, 5), np.eye(4, 5)
    result = MultiLabelResult.of(scores, targets, [100, 99, 20, 19, 0])
    assert result.excluded.tolist() == [4] and result.mean() == result.mean("tail") == 1.0
    record = result.record()
    assert record["excluded_classes"] == 1 and record["tail"] == {"map": 1.0, "classes": 2, "counted": 1}


def test_34_empty_groups_do_not_divide_by_zero():
    result = MultiLabelResult.of(np.eye(3), np.zeros((3, 3)), [500, 400, 300])
    record = result.record()
    assert record["total"] == {"map": None, "classes": 3, "counted": 0} and record["medium"]["classes"] == 0
    assert math.isnan(result.mean()) and math.isnan(result.mean("tail"))
    metrics = label_metrics(np.eye(3), np.zeros((3, 3)))
    assert metrics["excluded_classes"] == 3 and not any(
        metrics[name] for name in ("OP", "OR", "OF1", "CP", "CR", "CF1")
    )


@pytest.mark.parametrize("ties", ["index", "together"])
def test_34_average_precision_depends_on_the_order_alone(ties):
    random = np.random.default_rng(1)
    scores = random.integers(-8, 8, (60, 7)) / 4
    targets = random.random((60, 7)) < 0.3
    found = average_precision(scores, targets, ties=ties)
    for changed in (scores + np.arange(7), np.exp(scores), 1 / (1 + np.exp(-scores)), 3 * scores**3):
        assert np.array_equal(average_precision(changed, targets, ties=ties), found)


def test_34_threshold_metrics_by_hand():
    scores = np.array([[0.9, 0.4, 0.6], [0.5, 0.2, 0.1], [0.3, 0.8, 0.7], [0.1, 0.6, 0.2]])
    targets = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    # predicted: image 0 -> 0, 2; 1 -> 0; 2 -> 1, 2; 3 -> 1. Right: (0, 0), (1, 0), (2, 1); wanted: 3, 2, 0.
    found = label_metrics(scores, targets)
    assert found["OP"] == 3 / 6 and found["OR"] == 3 / 5 and found["OF1"] == pytest.approx(2 * 0.3 / 1.1)
    assert found["CP"] == (2 / 2 + 1 / 2) / 2 and found["CR"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    cp, cr = found["CP"], found["CR"]
    assert found["CF1"] == pytest.approx(2 * cp * cr / (cp + cr)) and found["excluded_classes"] == 1
    strict = label_metrics(scores, targets, threshold=0.95)
    assert strict["OP"] == strict["CP"] == 0.0  # never predicted: precision 0
    each = label_metrics(scores, targets, threshold=[0.2, 0.7, 0.9])
    assert each["OP"] == 3 / 4 and each["OR"] == 3 / 5


def test_34_top_k_with_fewer_classes_and_with_ties():
    scores = np.array([[0.9, 0.4], [0.5, 0.5]])
    assert predicted_labels(scores, threshold=None, top_k=3).all()
    assert predicted_labels(scores, threshold=None, top_k=1).tolist() == [[True, False], [True, False]]
    assert predicted_labels(scores, threshold=0.5, top_k=3).tolist() == [[True, False], [True, True]]
    targets = np.array([[1, 0], [0, 1]])
    assert label_metrics(scores, targets, threshold=None, top_k=1)["OP"] == 0.5
    assert label_metrics(scores, targets, threshold=None, top_k=3)["OR"] == 1.0


def test_thresholds_have_the_best_f1_of_all():
    random = np.random.default_rng(2)
    scores = (random.integers(0, 12, (50, 9)) / 11).astype(np.float32)
    targets = random.random((50, 9)) < np.linspace(0, 0.6, 9)
    targets[:, 0] = False
    thresholds = best_thresholds(scores, targets, default=0.25)
    assert thresholds[0] == 0.25

    def f1(threshold, c):
        chosen = scores[:, c] >= threshold
        return 2 * (chosen & targets[:, c]).sum() / (chosen.sum() + targets[:, c].sum())

    for c in range(1, 9):
        best = max(f1(t, c) for t in np.unique(scores[:, c]))
        assert f1(thresholds[c], c) == best
        assert all(f1(t, c) < best for t in np.unique(scores[:, c]) if t > thresholds[c])


def test_the_figure_has_one_entry_a_class_the_most_frequent_first():
    result = MultiLabelResult.of(np.eye(3), [[1, 0, 0], [0, 0, 0], [0, 0, 1]], [5, 300, 40])
    assert result.by_frequency() == [
        {"class": 1, "frequency": 300, "group": "head", "positives": 0, "average_precision": None},
        {"class": 2, "frequency": 40, "group": "medium", "positives": 1, "average_precision": 1.0},
        {"class": 0, "frequency": 5, "group": "tail", "positives": 1, "average_precision": 1.0},
    ]


@pytest.mark.parametrize("ties", ["index", "together"])
def test_chunks_of_classes_do_not_change_anything(monkeypatch, ties):
    random = np.random.default_rng(3)
    scores, targets = random.integers(0, 9, (30, 11)).astype(np.float32), random.random((30, 11)) < 0.2
    whole = average_precision(scores, targets, ties=ties), best_thresholds(scores, targets)
    for entries in (1, 61, 100):
        monkeypatch.setattr(multi_label, "CHUNK_ENTRIES", entries)
        assert np.array_equal(average_precision(scores, targets, ties=ties), whole[0], equal_nan=True)
        assert np.array_equal(best_thresholds(scores, targets), whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_taken_as_they_are(dtype):
    scores, targets = torch.randn(20, 4).to(dtype), torch.rand(20, 4) < 0.4
    want = average_precision(scores.float().numpy(), targets.numpy())
    for kind in (torch.bool, torch.uint8, torch.float32, torch.int64):
        assert np.array_equal(average_precision(scores.requires_grad_(), targets.to(kind)), want)
    assert np.array_equal(predicted_labels(scores), scores.detach().float().numpy() >= 0.5)


def test_inputs_are_left_alone():
    scores, targets = np.random.default_rng(4).normal(size=(20, 3)).astype(np.float32), np.eye(20, 3, dtype=np.uint8)
    before = scores.copy(), targets.copy()
    MultiLabelResult.of(scores, targets, [1, 2, 3])
    best_thresholds(scores, targets)
    assert np.array_equal(scores, before[0]) and np.array_equal(targets, before[1])


def test_20000_images_of_1200_classes_take_seconds_and_memory_of_one_chunk():
    random = np.random.default_rng(5)
    scores = random.standard_normal((20_000, 1200), np.float32)
    targets = np.zeros(scores.shape, bool)
    targets[random.integers(0, 20_000, 60_000), random.integers(0, 1200, 60_000)] = True
    tracemalloc.start()
    try:
        began = time.process_time()
        found = average_precision(scores, targets)
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == (1200,) and not np.isnan(found).any()
    assert seconds < 10, seconds
    assert peak < 200e6, peak


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_precision(np.ones((2, 3)), np.ones((3, 2))), r"found \[2, 3\] and \[3, 2\]"),
        (lambda: average_precision(np.ones(3), np.ones(3)), "must have one shape"),
        (lambda: average_precision(np.ones((0, 3)), np.ones((0, 3))), "with images and classes"),
        (lambda: average_precision([[0.5, np.nan]], [[1, 0]]), "NaN, first for image 0 and class 1"),
        (lambda: average_precision([[0.5]], [[2]]), "targets must be zero or one"),
        (lambda: average_precision([[0.5]], [[1]], ties="first"), "ties must be"),
        (lambda: MultiLabelResult.of([[0.5]], [[1]], [1, 2]), "one number for 1 classes"),
        (lambda: frequency_groups([1], thresholds=(20, 100)), "expected .head, medium. with head >= medium"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
