"""Semantic Confusion Miner and K-means. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from capt import ConfusionBank, SemanticConfusionMiner
from capt.bank import ConfusionStatistics
from capt.modules.kmeans import spherical_kmeans
from capt.ops import confusion_pairs

B, C, D = 32, 7, 16


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(B, D, generator=generator), dim=-1)
    text = normalize(torch.randn(C, D, generator=generator), dim=-1)
    return features, 10 * features @ text.T, text


def statistics(dense: torch.Tensor) -> ConfusionStatistics:
    """Row p of ``dense`` holds the n_i of pseudo-GT p."""
    keys, others = dense.nonzero(as_tuple=True)
    return ConfusionStatistics.from_pairs(keys, others, dense[keys, others], len(dense))


def pairs(logits, stats=None, k=C):
    options = {} if stats is None else {"offsets": stats.offsets, "classes": stats.classes, "counts": stats.counts}
    return confusion_pairs(logits, k=k, **options)


def test_07_score_is_the_confidence_without_statistics_and_bounded_with_them():
    _, logits, _ = batch()
    counts = torch.randint(0, 5, (C, C), generator=torch.Generator().manual_seed(1)).fill_diagonal_(0)
    pseudo, index, plain = pairs(logits)
    confidence = logits.softmax(1)
    assert torch.allclose(plain, confidence.gather(1, index), atol=1e-7)
    _, index, scored = pairs(logits, statistics(counts))
    ratio = scored / confidence.gather(1, index)
    assert (ratio >= 1 - 1e-6).all() and (ratio <= 2 + 1e-6).all() and (ratio > 1.01).any()
    more = counts.clone()
    more[:, 3] += 4
    more.fill_diagonal_(0)
    _, index_more, scored_more = pairs(logits, statistics(more))
    before, after = torch.zeros(B, C).scatter(1, index, scored), torch.zeros(B, C).scatter(1, index_more, scored_more)
    others = pseudo != 3
    assert (after[others, 3] >= before[others, 3]).all()


def test_08_pseudo_gt_is_never_its_own_pair_and_k_is_capped():
    features, logits, text = batch()
    for k in (1, 3, 50):
        mined = SemanticConfusionMiner(k)(features, logits, text)
        assert mined.confusing.shape == (B, min(k, C - 1))
        assert (mined.confusing != mined.pseudo[:, None]).all()
        assert all(len(set(row)) == len(row) for row in mined.confusing.tolist())
        assert torch.equal(mined.pseudo, logits.argmax(1))


def test_08_a_single_class_has_no_pair_and_guidance_stays_finite():
    features, logits, text = batch()
    mined = SemanticConfusionMiner(3)(features, logits[:, :1], text[:1])
    assert mined.confusing.shape == (B, 0) and torch.isfinite(mined.commonality).all()


def test_09_probability_and_log_domain_rank_alike_and_ties_go_to_the_lower_id():
    _, logits, _ = batch()
    counts = torch.randint(0, 3, (C, C), generator=torch.Generator().manual_seed(2)).fill_diagonal_(0)
    stats = statistics(counts)
    pseudo, index, _ = pairs(logits, stats, k=3)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    in_logs = logits.double() + torch.log1p(share[pseudo].double())
    in_logs.scatter_(1, pseudo[:, None], float("-inf"))
    assert torch.equal(index, in_logs.topk(3).indices)
    pseudo, index, _ = pairs(torch.zeros(2, C), k=3)
    assert pseudo.tolist() == [0, 0] and index.tolist() == [[1, 2, 3]] * 2


def test_10_scaling_all_counts_changes_nothing():
    _, logits, _ = batch()
    counts = torch.randint(0, 4, (C, C), generator=torch.Generator().manual_seed(3)).fill_diagonal_(0)
    once, often = pairs(logits, statistics(counts)), pairs(logits, statistics(counts * 7))
    assert torch.equal(once[1], often[1]) and torch.allclose(once[2], often[2], atol=1e-6)


def test_10_orientation_changes_the_ranking_on_an_asymmetric_bank():
    n = 8  # class 1 is always taken for 0; class 0 is sometimes taken for 2
    bank = ConfusionBank(
        torch.randn(2 * n, D), torch.tensor([1] * n + [0] * n), torch.tensor([0] * n + [2] * n), torch.ones(2 * n),
        torch.arange(2 * n), ["a", "b", "c"],
    )  # fmt: skip
    logits = torch.tensor([[2.0, 1.0, 1.0]])
    assert pairs(logits, bank.statistics("column"), k=1)[1].item() == 1
    assert pairs(logits, bank.statistics("row"), k=1)[1].item() == 2


def test_11_extreme_logits_stay_finite():
    features, _, text = batch()
    logits = torch.zeros(B, C)
    logits[:, 0], logits[:, 1] = 1e4, -1e4
    mined = SemanticConfusionMiner(3)(features, logits, text)
    for values in (mined.scores, mined.commonality, mined.difference):
        assert torch.isfinite(values).all()


def test_12_fallback_prompts_cover_every_pair_commonality_symmetric_difference_not():
    _, _, text = batch()
    forward, backward = [], []
    for first, second in ((0, 1), (2, 5)):
        logits = torch.full((1, C), -9.0)
        logits[0, first], logits[0, second] = 1.0, 0.5
        swapped = logits.clone()
        swapped[0, first], swapped[0, second] = 0.5, 1.0
        miner = SemanticConfusionMiner(1)
        forward.append(miner(text[:1], logits, text))
        backward.append(miner(text[:1], swapped, text))
    for one, other in zip(forward, backward, strict=True):
        assert torch.allclose(one.commonality, other.commonality, atol=1e-6)
        assert torch.allclose(one.difference, -other.difference, atol=1e-6)
        assert torch.allclose(one.commonality.norm(dim=1), torch.ones(1))


def test_15_kmeans_is_finite_deterministic_and_survives_bad_input():
    points = normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    centres = spherical_kmeans(points, 5, seed=3)
    assert torch.equal(centres, spherical_kmeans(points, 5, seed=3))
    assert centres.shape == (5, D) and torch.allclose(centres.norm(dim=1), torch.ones(5), atol=1e-5)
    assert len(torch.unique(centres, dim=0)) == 5
    dirty = points.clone()
    dirty[::7] = float("nan")
    dirty[1] = 0
    assert torch.isfinite(spherical_kmeans(dirty, 5)).all()
    assert len(spherical_kmeans(points[:2], 5)) == 2
    assert len(spherical_kmeans(points[:1].repeat(9, 1), 5)) == 1
    assert spherical_kmeans(torch.full((4, D), float("nan")), 3).shape == (0, D)


def test_15_kmeans_finds_planted_clusters():
    generator = torch.Generator().manual_seed(1)
    directions = torch.eye(D)[:4]
    points = directions.repeat_interleave(20, 0) + 0.1 * torch.randn(80, D, generator=generator)
    centres = spherical_kmeans(points, 4)
    assert ((centres @ directions.T).amax(0) > 0.98).all()


def test_selection_carries_no_gradient_but_guidance_does():
    features, logits, text = batch()
    features.requires_grad_()
    logits.requires_grad_()
    mined = SemanticConfusionMiner(3)(features, logits, text)
    assert not mined.scores.requires_grad
    mined.difference.sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0 and logits.grad is None


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    features, logits, text = batch()
    with pytest.raises(ValueError, match="k"):
        SemanticConfusionMiner(k)(features, logits, text)
