"""Behaviours 1 to 18 through real runs and the corners that the modules' own tests leave (docs/fidelity.md)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from capt import CAPT, ConfusionBank, SemanticConfusionMiner
from capt.data import save_few_shot
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel
from capt.modules.kmeans import spherical_kmeans
from capt.ops import bank_topk, confusion_pairs
from capt.training import TrainingOptions
from tests.tiny import CLASSES, backbone, data_set

CONFIG = CAPTConfig(heads=4, hidden=16, views=0, training=TrainingOptions(epochs=2, batch_size=9, lr=3e-3))
OPTIONS = RunOptions(shots=3, seeds=(2,), rivals=())
BASE, NOVEL = CLASSES[:5], CLASSES[5:]
D = 16


def pixels(n: int = 9) -> torch.Tensor:
    images = data_set().train
    return torch.stack([backbone().preprocess(images.image(6 * i)) for i in range(n)])


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- bank ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [0, 1])
def test_03_the_bank_of_a_run_knows_base_classes_and_training_ids_only(refresh, tmp_path):
    data = data_set()
    held = [i for i in range(len(data.train)) if i % 6 == 5]
    val, train = data.train.subset(held), data.train.subset([i for i in range(len(data.train)) if i % 6 != 5])
    run = Run(
        base_to_novel(replace(data, train=train, val=val)), backbone(), replace(CONFIG, bank_refresh=refresh), OPTIONS
    )
    bank = run.fit(tmp_path)[2].capt["capt"].bank
    stored = ConfusionBank.load(tmp_path / "seed-2" / "bank")
    assert len(bank) and torch.equal(bank.sample_ids, stored.sample_ids)
    ids = set(stored.sample_ids.tolist())
    assert ids <= set(run.shots(2).ids.tolist()) <= set(train.ids.tolist())
    assert not ids & {*val.ids.tolist(), *data.test.ids.tolist()}
    assert stored.class_names == BASE and not set(NOVEL) & {name for pair in stored.top_pairs() for name in pair[:2]}
    true = dict(zip(train.ids.tolist(), train.labels.tolist(), strict=True))
    assert [true[i] for i in stored.sample_ids.tolist()] == stored.labels.tolist()  # base classes keep their numbers
    assert max(stored.labels.max(), stored.predictions.max()) < len(BASE)


def test_04_after_a_perfect_base_model_everything_works_and_equals_it(tmp_path):
    wrapped, n = backbone(), len(CLASSES)
    labels = torch.arange(27) % n
    bank = ConfusionBank.from_logits(
        torch.randn(27, wrapped.dim), one_hot(labels, n).float(), labels, torch.arange(27), CLASSES,
        backbone=wrapped.fingerprint(),
    )  # fmt: skip
    assert len(bank) == 0
    config = replace(CONFIG, bank_at_inference=True, dynamic_alpha=True, bank_shuffle=True, m=2)
    model = CAPT(wrapped, CLASSES, config=config, bank=bank)
    with torch.no_grad():
        for names in (CLASSES, NOVEL, CLASSES[3:7]):
            expected = model.base(pixels(), names)
            assert torch.equal(model.logits(pixels(), names), expected)
            consulted = model(model.tokens(pixels()), model.class_set(names), bank_tokens=lambda rows: rows)
            assert torch.equal(consulted.logits, expected)
    losses = model.train().losses(
        model.tokens(pixels()), torch.arange(9), bank_tokens=lambda rows: rows, sample_ids=torch.arange(9)
    )
    losses["loss"].backward()
    assert all(bool(value.isfinite()) for value in losses.values()) and losses["representatives"] == 0
    assert len(model.predict(pixels(2))) == 2
    model.save(tmp_path)
    again = CAPT.load(tmp_path, wrapped)
    assert len(again.bank) == 0 and torch.equal(again.logits(pixels()), model.logits(pixels()))


def records(order: torch.Tensor) -> ConfusionBank:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(200, 6, generator=generator), torch.randint(6, (200,), generator=generator)
    ids = torch.randperm(900, generator=generator)[:200]
    names = [f"class {c}" for c in range(6)]
    return ConfusionBank.from_logits(unit(200)[order], logits[order], labels[order], ids[order], names)


def test_05_permuting_the_samples_changes_neither_counts_nor_what_is_retrieved():
    bank = records(torch.arange(200))
    queries, pseudo = unit(40, seed=2), torch.arange(40) % 6
    confusing = torch.stack([(pseudo + 1) % 6, (pseudo + 3) % 6], 1)
    _, rows = bank.search(queries, pseudo, confusing, m=3)
    for seed in range(4):
        other = records(torch.randperm(200, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(other.counts(), bank.counts())
        _, found = other.search(queries, pseudo, confusing, m=3)
        assert torch.equal(other.sample_ids[found], bank.sample_ids[rows]) and (rows >= 0).any()


@pytest.mark.parametrize("refresh", [0, 1])
def test_06_a_given_list_of_images_bounds_the_bank(refresh, tmp_path):
    protocol = base_to_novel(data_set())
    chosen = protocol.train.subset([i for i in range(30) if i % 6 in (1, 4)])
    save_few_shot(tmp_path / "list-2-2.json", chosen)
    options = replace(OPTIONS, shots=2, few_shot_lists=str(tmp_path / "list-{shots}-{seed}.json"))
    bank = Run(protocol, backbone(), replace(CONFIG, bank_refresh=refresh), options).fit(tmp_path)[2].capt["capt"].bank
    assert len(bank) and set(bank.sample_ids.tolist()) <= set(chosen.ids.tolist())
    assert set(bank.names) <= set(chosen.names)
    used = {image["id"] for image in json.loads((tmp_path / "seed-2" / "few_shot.json").read_text())["images"]}
    assert used == set(chosen.ids.tolist())


# ---- semantic confusion miner ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n_classes", [2, 7, 33, 130])
def test_09_softmax_and_log_domain_select_the_same_classes_in_the_same_order(n_classes, backend):
    generator = torch.Generator().manual_seed(n_classes)
    logits = torch.randn(20, n_classes, generator=generator) * 3
    dense = torch.randint(0, 4, (n_classes, n_classes), generator=generator).fill_diagonal_(0)
    keys, others = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), dense.ne(0).sum(1).cumsum(0)])
    k = min(5, n_classes - 1)
    pseudo, index, _ = confusion_pairs(
        logits, k=k, offsets=offsets, classes=others, counts=dense[keys, others], backend=backend
    )
    share = (dense / dense.sum(1, keepdim=True).clamp_min(1)).double()[pseudo]
    softmax = (1 + share) * logits.double().softmax(1)
    logs = logits.double() + share.log1p() - logits.double().logsumexp(1, keepdim=True)
    own = one_hot(pseudo, n_classes).bool()
    for score in (softmax, logs):
        assert torch.equal(score.masked_fill(own, -torch.inf).topk(k).indices, index)
    # Equal scores, boosted alike or not at all: the lower id comes first.
    level = torch.zeros(3, n_classes)
    everyone = torch.arange(n_classes).repeat(n_classes)
    statistics = {"offsets": torch.arange(0, n_classes**2 + 1, n_classes), "classes": everyone}
    for options in ({}, {**statistics, "counts": torch.ones_like(everyone)}):
        pseudo, index, _ = confusion_pairs(level, k=k, backend=backend, **options)
        assert pseudo.tolist() == [0] * 3 and index.tolist() == [list(range(1, k + 1))] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_11_confidences_of_an_image_sum_to_one(dtype, tolerance):
    logits = (unit(12, seed=3) * 40).to(dtype)
    pseudo, index, score = confusion_pairs(logits, k=D - 1)
    own = logits.double().softmax(1).gather(1, pseudo[:, None])
    assert index.shape == (12, D - 1) and ((score.double().sum(1, keepdim=True) + own) - 1).abs().max() < tolerance
    extreme = torch.zeros(4, D, dtype=dtype)
    extreme[:, 2], extreme[:, 5] = 1e4, -1e4
    _, _, score = confusion_pairs(extreme, k=D - 1)
    assert score.isfinite().all() and score.abs().max() < tolerance
    for prediction in CAPT(backbone(), CLASSES, config=CONFIG).predict(pixels(3), top=len(CLASSES)):
        assert abs(sum(prediction.probabilities) - 1) < 1e-6


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_15_kmeans_with_empty_clusters_too_few_points_and_nothing_usable():
    three = torch.eye(D)[:3].repeat(10, 1)
    assert spherical_kmeans(three, 5).shape == (3, D)  # five clusters of three distinct points: two would be empty
    for points, k, n in ((three[:2], 5, 2), (three[:1], 1, 1), (unit(40), 8, 8), (torch.cat([three, -three]), 6, 6)):
        centres = spherical_kmeans(points, k, seed=1)
        assert centres.shape == (n, D) and centres.isfinite().all()
        assert torch.allclose(centres.norm(dim=1), torch.ones(n), atol=1e-5)
        assert len(torch.unique(centres.round(decimals=5), dim=0)) == n
        assert torch.equal(centres, spherical_kmeans(points, k, seed=1))
    unusable = torch.stack([torch.full((D,), value) for value in (float("nan"), float("inf"), 0.0)])
    assert spherical_kmeans(unusable, 5).shape == (0, D)
    assert torch.equal(spherical_kmeans(torch.cat([unusable, three]), 3), spherical_kmeans(three, 3))


# ---- sample confusion miner ------------------------------------------------------------------------------------------


def test_16_an_empty_cell_gives_mask_0_and_reads_nothing():
    names = [f"class {c}" for c in range(4)]
    bank = ConfusionBank(
        unit(2), torch.tensor([1, 1]), torch.tensor([0, 0]), torch.ones(2), torch.tensor([7, 9]), names
    )
    pseudo = torch.tensor([0, 1, 2, 3, 0])
    confusing = torch.tensor([[1, 2], [0, 2], [0, 1], [0, 1], [1, 3]])
    score, rows = bank.search(unit(5, seed=4), pseudo, confusing, m=3, exclude=torch.tensor([-1, -1, -1, -1, 7]))
    there = (rows >= 0).sum(2).tolist()
    # (0, 1) is stored, (0, .) falls back to what was taken for 0, (1, 0) is the same pair, the others are nowhere.
    assert there == [[2, 2], [2, 0], [0, 0], [0, 0], [1, 1]]
    assert bool((rows.clamp_max(1) == rows).all()) and torch.equal(score.isneginf(), rows < 0)
    assert bank.sample_ids[rows[4][rows[4] >= 0]].tolist() == [9, 9]


def test_17_rescaled_queries_and_stored_features_retrieve_the_same():
    bank = records(torch.arange(200))
    pseudo = torch.arange(40) % 6
    confusing = torch.stack([(pseudo + 1) % 6, (pseudo + 2) % 6], 1)
    scale = torch.logspace(-3, 3, len(bank)).unsqueeze(1)
    other = ConfusionBank(
        scale * bank.features, bank.labels, bank.predictions, bank.confidences, bank.sample_ids, bank.class_names
    )
    expected = bank.search(unit(40, seed=5), pseudo, confusing, m=2)
    found = other.search(normalize(1e3 * unit(40, seed=5), dim=-1), pseudo, confusing, m=2)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tile", [8, 16, 32, 64, 128, 4096])
def test_17_segment_boundaries_hold_around_every_tile(tile, backend):
    rows = -unit(3 * tile, seed=6).abs()
    rows[tile : tile + 2] = unit(2, seed=7).abs()
    queries = unit(3, seed=8).abs()  # the rows outside are better or worse than any within, according to the sign
    for start in (0, tile - 1, tile + 2):
        for length in (0, 1, tile - 1, tile, tile + 1):
            ranges = torch.tensor([start, start + length]).expand(3, 1, 1, 2)
            score, index = bank_topk(queries, rows, k=3, ranges=ranges, backend=backend)
            exact = (queries.double() @ rows[start : start + length].double().T).topk(min(3, length)).values
            n = exact.shape[1]
            assert (index[:, 0, n:] == -1).all() and score[:, 0, n:].isneginf().all()
            assert ((index[:, 0, :n] >= start) & (index[:, 0, :n] < start + length)).all()
            torch.testing.assert_close(score[:, 0, :n].double(), exact, rtol=1e-5, atol=1e-6)


def test_18_training_leaves_the_stored_features_as_they_are():
    wrapped, images = backbone(), data_set().train
    bank = ConfusionBank.build(wrapped, images)
    before = bank.features.clone()
    model = CAPT(wrapped, CLASSES, config=CONFIG, bank=bank).train()
    tokens = model.tokens(pixels())
    output = model.losses(
        tokens, torch.arange(9), bank_tokens=lambda rows: tokens[rows % 9], sample_ids=torch.full((9,), -1)
    )
    output["loss"].backward()
    assert output["representatives"] > 0  # stored mistakes took part
    assert bank.features.grad is None and not bank.features.requires_grad and torch.equal(bank.features, before)
    mined = SemanticConfusionMiner(2)(unit(3), unit(3), torch.eye(D))
    assert not mined.scores.requires_grad
