"""Sparse concepts, text spans and concept survival."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError, NumericError
from capt.evaluation.concept_survival import (
    concept_present,
    concept_scores,
    margin,
    sparse_present,
    vanished,
)
from capt.modules import SparseConcepts, nonnegative_lasso, text_span

WIDTH, CONCEPTS = 24, 60
EXACT = {"tolerance": 1e-12, "max_iterations": 50_000}


def problem(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(CONCEPTS, WIDTH, dtype=torch.float64, generator=generator), dim=-1)
    return dictionary, F.normalize(torch.randn(n, WIDTH, dtype=torch.float64, generator=generator), dim=-1)


def objective(weights: Tensor, dictionary: Tensor, targets: Tensor, penalty: float) -> Tensor:
    return (weights @ dictionary - targets).square().sum(-1) + penalty * weights.sum(-1)


@pytest.mark.parametrize("penalty", [0.05, 0.2, 0.5])
def test_weights_are_those_of_scikit_learn(penalty: float) -> None:
    dictionary, targets = problem()
    found = nonnegative_lasso(dictionary, targets, penalty, **EXACT)
    assert found.converged.all()
    for target, weights in zip(targets, found.weights, strict=True):
        lasso = Lasso(penalty / (2 * WIDTH), positive=True, fit_intercept=False, tol=1e-14, max_iter=200_000)
        expected = lasso.fit(dictionary.T.numpy(), target.numpy()).coef_
        np.testing.assert_allclose(weights.numpy(), expected, rtol=0, atol=1e-7)


def test_the_woodbury_step_is_the_direct_one() -> None:
    """ADMM with the c x c inverse, written out, iteration by iteration."""
    dictionary, targets = problem(1)
    rho, penalty = 5.0, 0.2
    inverse = (2 * dictionary @ dictionary.T + rho * torch.eye(CONCEPTS, dtype=torch.float64)).inverse()
    y = u = torch.zeros(CONCEPTS, dtype=torch.float64)
    for _ in range(7):
        x = inverse @ (2 * dictionary @ targets[0] + rho * (y - u))
        y = (x + u - penalty / rho).clamp_min(0)
        u = u + x - y
    found = nonnegative_lasso(dictionary, targets, penalty, max_iterations=7)
    torch.testing.assert_close(found.weights[0], y, rtol=0, atol=1e-12)
    assert not found.converged.any() and found.iterations.tolist() == [7]


def test_the_optimum_satisfies_its_conditions() -> None:
    dictionary, targets = problem()
    weights = nonnegative_lasso(dictionary, targets, 0.2, **EXACT).weights
    slope = 2 * (weights @ dictionary - targets) @ dictionary.T + 0.2
    active = weights > 1e-9
    assert slope[active].abs().max() < 1e-8 and slope[~active].min() > -1e-8


def test_a_larger_penalty_keeps_fewer_concepts_and_a_large_one_none() -> None:
    dictionary, targets = problem()
    counts = [
        int((nonnegative_lasso(dictionary, targets, penalty, **EXACT).weights > 1e-9).sum())
        for penalty in (0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    assert all(a >= b for a, b in itertools.pairwise(counts)) and counts[0] > counts[-1]
    most = float(2 * (targets @ dictionary.T).max())
    assert nonnegative_lasso(dictionary, targets, most, **EXACT).weights.max() == 0
    assert nonnegative_lasso(dictionary, targets, 0.98 * most, **EXACT).weights.max() > 0


def test_planted_codes_are_recovered() -> None:
    generator = torch.Generator().manual_seed(3)
    dictionary = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q
    planted = torch.zeros(5, WIDTH, dtype=torch.float64)
    for row in planted:
        row[torch.randperm(WIDTH, generator=generator)[:3]] = 0.5 + torch.rand(3, generator=generator).double()
    found = nonnegative_lasso(dictionary, planted @ dictionary, 0.02, **EXACT).weights
    torch.testing.assert_close(found, (planted - 0.01).clamp_min(0), rtol=0, atol=1e-9)


def test_targets_do_not_depend_on_their_company_or_on_the_start() -> None:
    dictionary, targets = problem(40)
    together = nonnegative_lasso(dictionary, targets, 0.2, **EXACT)
    alone = nonnegative_lasso(dictionary, targets[7:8], 0.2, **EXACT)
    torch.testing.assert_close(together.weights[7:8], alone.weights, rtol=0, atol=1e-9)
    assert len(together.iterations.unique()) > 1  # they left the batch at different times
    warm = nonnegative_lasso(dictionary, targets, 0.2, start=together.weights, **EXACT)
    torch.testing.assert_close(warm.weights, together.weights, rtol=0, atol=1e-9)
    assert warm.iterations.sum() < together.iterations.sum()
    single = nonnegative_lasso(dictionary.float(), targets.float(), 0.2).weights.double()
    gap = objective(single, dictionary, targets, 0.2) - objective(together.weights, dictionary, targets, 0.2)
    assert gap.abs().max() < 1e-4


def test_names_and_quality_describe_an_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(30, WIDTH, dtype=torch.float64, generator=generator)
    mean = 0.3 * F.normalize(torch.randn(WIDTH, dtype=torch.float64, generator=generator), dim=-1)
    concepts = SparseConcepts(texts, mean, [f"word {i}" for i in range(30)])
    planted = torch.zeros(30, dtype=torch.float64)
    planted[4], planted[11] = 1.0, 0.6
    embedding = 7.0 * concepts.reconstruct(planted)
    weights = concepts.decompose(embedding, 0.05)
    assert [name for name, _ in concepts.described(weights, 2)] == ["word 4", "word 11"]
    assert concepts.quality(embedding, weights) > 0.95
    assert concepts.decompose(embedding.expand(2, 3, -1)).shape == (2, 3, 30)
    with pytest.raises(CaptError, match="different names"):
        SparseConcepts(texts, mean, ["same"] * 30)
    with pytest.raises(CaptError, match="image_mean"):
        SparseConcepts(texts, mean[:5], concepts.names)


def test_bad_problems_are_named() -> None:
    dictionary, targets = problem()
    with pytest.raises(NumericError, match="finite"):
        nonnegative_lasso(dictionary, targets * torch.nan, 0.2)
    with pytest.raises(CaptError, match="at least 0"):
        nonnegative_lasso(dictionary, targets, -1.0)


# ---- text span ---------------------------------------------------------------------------------------------


def test_texts_along_the_variation_are_found_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q
    texts = torch.cat(
        [basis[:6], F.normalize(torch.randn(20, WIDTH, dtype=torch.float64, generator=generator), dim=-1)]
    )
    spread = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    codes = torch.randn(500, 6, dtype=torch.float64, generator=generator) * spread
    found = text_span(codes @ basis[:6] + 5 * basis[10], texts, n_texts=3)
    assert found.texts.tolist() == [1, 3, 5]
    assert (found.explained.diff() > 0).all() and found.explained[-1].item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(CaptError, match="ask for 1 to 26"):
        text_span(codes @ basis[:6], texts, n_texts=27)


# ---- survival ----------------------------------------------------------------------------------------------


def test_a_concept_is_present_by_rank() -> None:
    texts = torch.eye(4)
    vectors = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    scores = concept_scores(vectors, texts)
    concept = torch.tensor([1, 1])
    assert concept_present(scores, concept, 2).tolist() == [True, False]
    assert concept_present(scores, concept, 3).tolist() == [True, True]
    assert concept_present(scores[:, None].expand(2, 5, 4), concept, 2).shape == (2, 5)
    assert concept_present(torch.ones(1, 4), torch.tensor([2]), 1).item()
    assert sparse_present(torch.tensor([[0.0, 0.0, 0.5, 1e-6]]), torch.tensor([3])).tolist() == [False]
    assert sparse_present(torch.tensor([[0.0, 0.0, 0.5, 1e-6]]), torch.tensor([2])).tolist() == [True]


def test_what_patches_have_and_the_feature_lacks_has_vanished() -> None:
    patches = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    objects = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
    feature = torch.tensor([False, True, False, False])
    assert vanished(patches, feature, objects).tolist() == [True, False, False, False]


def test_a_margin_is_over_the_names_that_are_not_shown() -> None:
    final = torch.tensor([[0.2, 0.1, 0.3], [0.5, 0.1, 0.1]])
    concept, absent = torch.tensor([0, 0]), torch.tensor([[False, True, True], [False, False, True]])
    torch.testing.assert_close(margin(final, concept, absent), torch.tensor([0.0, 0.4]))
    with pytest.raises(CaptError, match="does not show"):
        margin(final, concept, torch.zeros(2, 3, dtype=torch.bool))
