"""FAISS beside the bank: the answers of bank_topk, recall, and what is said when something is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from capt import ops, reference
from capt.bank import ConfusionBank
from capt.bank.faiss_index import FaissIndex
from capt.errors import CaptError, MissingDependencyError

faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install 'capt[faiss]'")


def unit(count: int, dim: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim), dim=1)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_candidates_give_exactly_the_bank_search(kind, dtype):
    features = torch.randint(-3, 4, (300, 8)).to(dtype)  # integers: scores are exact, many are equal
    queries = torch.randint(-3, 4, (9, 8)).to(dtype)
    index = FaissIndex(features, kind, device="cpu", n_lists=5, n_probe=5)
    found = index.search(queries, k=20, candidates=300)
    exact = reference.bank_topk(queries, features, 20)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    if kind == "hnsw":  # a graph may leave rows out of reach
        assert index.recall(queries, k=20, candidates=300) > 0.95
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_approximate_kinds_miss_rows_but_never_misjudge_one():
    features, queries = unit(3000, 24), unit(40, 24)
    _, exact = ops.bank_topk(queries, features, k=10)
    for kind, options in (("flat", {}), ("ivf", {"n_probe": 2}), ("hnsw", {"degree": 8})):
        index = FaissIndex(features, kind, device="cpu", **options)
        score, row = index.search(queries, k=10)
        torch.testing.assert_close(score, (queries[:, None] * features[row]).sum(2))
        assert (score.diff(dim=1) <= 0).all()
        recall = index.recall(queries, k=10)
        share = (exact[:, :, None] == row[:, None]).any(2).float().mean()
        assert recall == pytest.approx(float(share)) and 0.1 < recall <= 1
        assert recall == 1 or kind != "flat"
    few = FaissIndex(features, "ivf", device="cpu", n_probe=1).recall(queries, k=10)
    many = FaissIndex(features, "ivf", device="cpu", n_probe=20).recall(queries, k=10)
    assert few < many


def test_short_lists_empty_banks_and_no_queries():
    index = FaissIndex(unit(3, 4), device="cpu")
    score, row = index.search(unit(2, 4), k=5)
    assert (row[:, 3:] == -1).all() and (score[:, 3:] == -torch.inf).all() and (row[:, :3] >= 0).all()
    assert index.search(unit(0, 4), k=2)[0].shape == (0, 2) and index.recall(unit(0, 4), k=2) == 1
    empty = FaissIndex(torch.empty(0, 4), "ivf", device="cpu")
    score, row = empty.search(unit(2, 4), k=3)
    assert len(empty) == 0 and (row == -1).all() and (score == -torch.inf).all()


def test_a_bank_is_indexed_and_a_sample_can_be_left_out():
    features, labels = unit(60, 6), torch.randint(0, 3, (60,))
    bank = ConfusionBank(features, labels, (labels + 1) % 3, torch.rand(60), torch.arange(60) + 1000, ["a", "b", "c"])
    index = FaissIndex.from_bank(bank, device="cpu")
    queries, own = bank.features[:5], bank.sample_ids[:5]
    assert torch.equal(index.search(queries, k=3)[1][:, 0], torch.arange(5))
    found = index.search(queries, k=3, exclude=own)
    exact = ops.bank_topk(queries, bank.features, k=3, row_ids=bank.sample_ids, exclude=own)
    assert torch.equal(found[1], exact[1])
    torch.testing.assert_close(found[0], exact[0])
    nothing = index.search(queries, k=3, exclude=torch.full((5,), -1))
    assert torch.equal(nothing[1], index.search(queries, k=3)[1])


def test_settings_of_faiss_and_torch_are_left_alone():
    threads = torch.get_num_threads(), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    FaissIndex(unit(50, 4), device="cpu").search(unit(20, 4), k=2)
    after = torch.get_num_threads(), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    assert threads == after


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'capt\[faiss\]'"):
        FaissIndex(unit(3, 4))


def test_what_this_faiss_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert FaissIndex(unit(3, 4)).device == "cpu"
    with pytest.raises(CaptError, match="pip install faiss-gpu"):
        FaissIndex(unit(3, 4), device="cuda")
    for device in (None, "cpu"):
        with pytest.raises(CaptError, match="pip install faiss-gpu-cuvs; kind='hnsw'"):
            FaissIndex(unit(3, 4), "cagra", device=device)


BAD_CALLS = {
    "kind must be one of flat, ivf, hnsw, cagra, found 'tree'": lambda: FaissIndex(unit(3, 4), "tree"),
    "device must be 'cpu', 'cuda' or None, found 'gpu'": lambda: FaissIndex(unit(3, 4), device="gpu"),
    r"features must be floating \[N, d\], found torch.int64": lambda: FaissIndex(torch.ones(3, 4).long()),
    "features must be finite": lambda: FaissIndex(torch.full((3, 4), torch.nan)),
    r"row_ids must be int64 \[3\], found torch.int64 \[2\]": lambda: FaissIndex(unit(3, 4), row_ids=torch.arange(2)),
    r"queries must be floating \[Q, 4\], found torch.float32 \[2, 5\]": lambda: FaissIndex(
        unit(3, 4), device="cpu"
    ).search(unit(2, 5), k=1),
    "k must be an integer of at least 1, found 0": lambda: FaissIndex(unit(3, 4), device="cpu").search(unit(2, 4), k=0),
    "needs row_ids at construction": lambda: FaissIndex(unit(3, 4), device="cpu").search(
        unit(2, 4), k=1, exclude=torch.arange(2)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()
