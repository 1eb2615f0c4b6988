"""Confusion Bank. Numbers in test names are those of docs/fidelity.md's list of required behaviours."""

from __future__ import annotations

import json

import pytest
import torch

from capt import ConfusionBank
from capt.data import few_shot
from capt.errors import CaptError, DamagedFileError, DataError
from tests.tiny import CLASSES, backbone, data_set

C, DIM = 6, 16


def records(n: int = 300, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(n, DIM, generator=generator), dim=-1)
    logits = torch.randn(n, C, generator=generator)
    labels = torch.randint(C, (n,), generator=generator)
    ids = torch.randperm(10 * n, generator=generator)[:n]
    return features, logits, labels, ids


def make(seed: int = 0, order: torch.Tensor | None = None) -> ConfusionBank:
    features, logits, labels, ids = records(seed=seed)
    order = torch.arange(len(labels)) if order is None else order
    names = [f"image-{int(i)}.png" for i in ids[order]]
    return ConfusionBank.from_logits(
        features[order], logits[order], labels[order], ids[order], [f"class {i}" for i in range(C)], names=names
    )


def test_01_counts_equal_a_brute_force_confusion_matrix():
    _, logits, labels, _ = records()
    expected = torch.zeros(C, C, dtype=torch.long)
    for label, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        expected[label, predicted] += label != predicted
    counts = make().counts()
    assert torch.equal(counts, expected)
    assert counts.sum() == (logits.argmax(1) != labels).sum() > 0
    assert counts.diagonal().sum() == 0


def test_02_rows_are_partitioned_by_pair_and_building_twice_gives_identical_bytes(tmp_path):
    bank = make()
    labels, predictions, counts = bank.cells()
    assert bank.cell_offsets[0] == 0 and bank.cell_offsets[-1] == len(bank) and (counts > 0).all()
    for cell in range(len(counts)):
        rows = slice(int(bank.cell_offsets[cell]), int(bank.cell_offsets[cell + 1]))
        assert (bank.labels[rows] == labels[cell]).all() and (bank.predictions[rows] == predictions[cell]).all()
    for column in range(C):
        start, stop = bank.column_offsets[column : column + 2]
        assert (bank.predictions[start:stop] == column).all()
    bank.save(tmp_path / "a")
    make().save(tmp_path / "b")
    for name in ("bank.json", "rows.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_03_test_images_are_refused():
    data = data_set()
    with pytest.raises(DataError, match="training images only"):
        ConfusionBank.build(backbone(), data.test, forbidden_ids=data.test.ids)


def test_04_a_perfect_model_gives_an_empty_bank_on_which_everything_works(tmp_path):
    features, _, labels, ids = records()
    logits = torch.nn.functional.one_hot(labels, C).float()
    bank = ConfusionBank.from_logits(features, logits, labels, ids, [str(i) for i in range(C)])
    assert len(bank) == 0 and bank.counts().sum() == 0 and bank.top_pairs() == []
    for orientation in ("column", "row", "sum"):
        assert bank.statistics(orientation).offsets.tolist() == [0] * (C + 1)
    scores, rows = bank.search(features[:3], labels[:3], (labels[:3, None] + 1) % C, m=2, exclude=ids[:3])
    assert rows.shape == (3, 1, 2) and (rows == -1).all() and torch.isneginf(scores).all()
    bank.save(tmp_path)
    assert len(ConfusionBank.load(tmp_path)) == 0


def test_05_sample_order_changes_nothing():
    shuffled = make(order=torch.randperm(300, generator=torch.Generator().manual_seed(1)))
    bank = make()
    for field in ("features", "labels", "predictions", "sample_ids", "confidences", "cell_keys", "cell_offsets"):
        assert torch.equal(getattr(bank, field), getattr(shuffled, field)), field
    assert bank.names == shuffled.names


def test_06_few_shot_bank_holds_few_shot_images_only():
    images = few_shot(data_set().train, 2, seed=3)
    bank = ConfusionBank.build(backbone(), images)
    assert len(bank) > 0 and set(bank.sample_ids.tolist()) <= set(images.ids.tolist())
    assert bank.class_names == CLASSES
    by_id = dict(zip(images.ids.tolist(), images.names, strict=True))
    assert bank.names == [by_id[i] for i in bank.sample_ids.tolist()]


def test_16_retrieval_equals_brute_force_and_never_returns_the_query():
    bank = make()
    features, logits, _, ids = records()
    pseudo = logits.argmax(1)
    confusing = logits.topk(3).indices[:, 1:]
    _, rows = bank.search(features, pseudo, confusing, m=2, exclude=ids)
    similarity = features @ bank.features.T
    for b in range(len(features)):
        for j in range(2):
            p, i = int(pseudo[b]), int(confusing[b, j])
            other = bank.sample_ids != ids[b]
            pair = (
                ((bank.labels == i) & (bank.predictions == p)) | ((bank.labels == p) & (bank.predictions == i))
            ) & other
            allowed = pair if pair.any() else (bank.predictions == p) & other
            order = sorted(allowed.nonzero().flatten().tolist(), key=lambda r: (-float(similarity[b, r]), r))[:2]
            expected = order + [-1] * (2 - len(order))
            found = rows[b, j].tolist()
            assert found == expected or torch.allclose(similarity[b, found], similarity[b, expected], atol=1e-6)
            assert all(bank.sample_ids[r] != ids[b] for r in found if r >= 0)


def test_18_no_gradient_reaches_stored_features():
    bank = make()
    query = bank.features[:4].clone().requires_grad_()
    scores, _ = bank.search(query, bank.predictions[:4], bank.labels[:4, None])
    assert not scores.requires_grad and not bank.features.requires_grad


def test_statistics_orientation_on_an_asymmetric_matrix():
    ids = torch.arange(3)
    bank = ConfusionBank(
        torch.eye(3), torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.ones(3), ids, ["a", "b", "c"]
    )  # a is taken for b twice, b for a once
    seen = {}
    for orientation in ("column", "row", "sum"):
        statistics = bank.statistics(orientation)
        start, stop = statistics.offsets[1:3]
        seen[orientation] = dict(
            zip(statistics.classes[start:stop].tolist(), statistics.counts[start:stop].tolist(), strict=True)
        )
    assert seen == {"column": {0: 2}, "row": {0: 1}, "sum": {0: 3}}
    with pytest.raises(CaptError, match="orientation"):
        bank.statistics("diagonal")


def test_a_saved_bank_is_the_same_bank(tmp_path):
    bank = make()
    bank.save(tmp_path)
    loaded = ConfusionBank.load(tmp_path)
    for field in ("features", "labels", "predictions", "sample_ids", "confidences"):
        assert torch.equal(getattr(bank, field), getattr(loaded, field)), field
    assert loaded.names == bank.names and loaded.top_pairs(3) == bank.top_pairs(3)


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "missing", "schema"])
def test_a_damaged_bank_is_refused(tmp_path, damage):
    make().save(tmp_path)
    rows, manifest = tmp_path / "rows.safetensors", tmp_path / "bank.json"
    if damage == "flip":
        data = bytearray(rows.read_bytes())
        data[len(data) // 2] ^= 4
        rows.write_bytes(data)
    elif damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-5])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "missing":
        manifest.write_text("{}")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(DamagedFileError, match=str(tmp_path)):
        ConfusionBank.load(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        ConfusionBank.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 9])}, "labels"),
        ({"labels": torch.tensor([1, 1])}, "not a mistake"),
        ({"sample_ids": torch.tensor([4, 4])}, "repeat"),
        ({"confidences": torch.ones(3)}, "lengths"),
    ],
)
def test_wrong_records_are_refused(change, message):
    arguments = {
        "features": torch.eye(2),
        "labels": torch.tensor([0, 1]),
        "predictions": torch.tensor([1, 0]),
        "confidences": torch.ones(2),
        "sample_ids": torch.tensor([4, 5]),
    }
    with pytest.raises(CaptError, match=message):
        ConfusionBank(**{**arguments, **change}, class_names=["a", "b"])
