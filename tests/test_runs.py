"""Runs: protocols, the lock on the test split, base models, rivals and variants side by side."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from capt.data import DataSet
from capt.data.lock import TestLock, lock_test
from capt.errors import CaptError, DataError
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel, evaluate, few_shot_all
from capt.methods.runs.protocol import make_protocol
from capt.training import TrainingOptions
from tests.tiny import CLASSES, backbone, data_set

CONFIG = CAPTConfig(heads=4, hidden=16, views=0, training=TrainingOptions(epochs=2, batch_size=9, lr=3e-3))
OPTIONS = RunOptions(shots=2, seeds=(0,), linear=TrainingOptions(epochs=2, lr=3e-3))


def other(name: str, seed: int = 1, classes=None) -> DataSet:
    """Another data set with the tiny one's classes, or with some of them."""
    data = replace(data_set(per_class=2, seed=seed), name=name)
    return data if classes is None else data.select_classes(classes)


def read(path):
    return json.loads(path.read_text())


def test_test_images_cannot_be_read_before_an_evaluation():
    lock = TestLock()
    data = lock_test(data_set(), lock)
    with pytest.raises(DataError, match="locked"):
        data.test.image(0)
    with pytest.raises(DataError, match="locked"):
        data.select_classes([1, 2]).test.subset([0]).image(0)
    with lock.opened():
        assert data.test.image(0).mode == "RGB"
    with pytest.raises(DataError, match="locked"):
        data.test.image(0)
    assert data.test.counts.sum() == len(data.test) and data.train.image(0) is not None


def test_a_run_says_how_often_its_test_split_was_opened(tmp_path):
    run = Run(base_to_novel(data_set()), backbone(), CONFIG, OPTIONS)
    models = run.fit(tmp_path)
    assert read(tmp_path / "run.json")["test_opened"] == 0 and not (tmp_path / "summary.json").exists()
    assert run.evaluate(tmp_path, models)["test_opened"] == 1
    assert evaluate(tmp_path, data_set(), backbone())["test_opened"] == 2
    assert read(tmp_path / "run.json")["test_opened"] == 2
    assert not run.protocol.lock.is_open


def test_rows_and_metrics_of_base_to_novel(tmp_path):
    run = Run(
        base_to_novel(data_set()),
        backbone(),
        CONFIG,
        replace(OPTIONS, rivals=("linear_adapter", "tip_adapter", "plain_adapter")),
    )
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert list(summary["methods"]) == ["zero_shot", "linear_adapter", "plain_adapter", "tip_adapter", "capt"]
    assert summary["metrics"][:3] == ["base", "novel", "hm"] and summary["base_model"] == "zero-shot"
    # Among classes the cache has never seen it adds nothing.
    methods = summary["methods"]
    assert methods["tip_adapter"]["mean"]["novel"] == methods["zero_shot"]["mean"]["novel"]
    rows = list(csv.DictReader((tmp_path / "seed-0" / "pairs.csv").open()))
    assert sum(int(row["zero_shot"]) for row in rows) == methods["zero_shot"]["per_seed"]["0"]["n_mistakes"]
    models = run.fit(tmp_path)
    sizes = [sum(p.numel() for p in module.parameters()) for module in models[0].adapters.values()]
    capt_size = sum(p.numel() for p in models[0].capt["capt"].trainable().values())
    assert abs(sizes[1] - capt_size) <= 2 * backbone().dim + 1


@pytest.mark.parametrize("kind", ["coop", "ivlp", "tip-adapter", "linear-probe"])
def test_capt_corrects_any_base_model(kind, tmp_path):
    run = Run(base_to_novel(data_set()), backbone(), CONFIG, replace(OPTIONS, base=kind, rivals=("linear_adapter",)))
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    row = kind.replace("-", "_")
    assert list(summary["methods"]) == ["zero_shot", row, "linear_adapter", "capt"]
    assert "sample_correction_rate_of_base_model" in summary["methods"]["capt"]["mean"]
    again = evaluate(tmp_path, data_set(), backbone())
    assert again["methods"] == summary["methods"]


def test_a_base_model_alone_and_then_capt_on_the_very_same_one(tmp_path):
    protocol = base_to_novel(data_set())
    alone = Run(protocol, backbone(), {}, replace(OPTIONS, base="coop"))
    first = alone.evaluate(tmp_path / "coop", alone.fit(tmp_path / "coop"))
    assert list(first["methods"]) == ["zero_shot", "coop"]
    on_top = Run(protocol, backbone(), CONFIG, replace(OPTIONS, base=str(tmp_path / "coop"), rivals=()))
    second = on_top.evaluate(tmp_path / "capt", on_top.fit(tmp_path / "capt"))
    assert second["methods"]["coop"] == first["methods"]["coop"] and second["base_model"] == "coop"
    with pytest.raises(CaptError, match="other images"):
        wrong = Run(protocol, backbone(), CONFIG, replace(OPTIONS, shots=1, base=str(tmp_path / "coop")))
        wrong.fit(tmp_path / "wrong")
    with pytest.raises(CaptError, match="seed 5"):
        Run(protocol, backbone(), CONFIG, replace(OPTIONS, seeds=(5,), base=str(tmp_path / "coop"))).fit(tmp_path / "x")


def test_few_shot_cross_dataset_and_domain_generalisation(tmp_path):
    run = Run(few_shot_all(data_set()), backbone(), CONFIG, OPTIONS)
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert summary["metrics"][0] == "accuracy" and summary["n_classes"] == {"tiny": len(CLASSES)}
    near, far = other("sketch", classes=[8, 2, 0]), other("elsewhere")
    moved = evaluate(tmp_path, data_set(), backbone(), targets=[near], protocol="domain-generalisation")
    assert moved["metrics"][:3] == ["source", "sketch", "average"]
    assert moved["methods"]["capt"]["mean"]["source"] == summary["methods"]["capt"]["mean"]["accuracy"]
    crossed = evaluate(tmp_path, data_set(), backbone(), targets=[near, far], protocol="cross-dataset")
    mean = crossed["methods"]["capt"]["mean"]
    assert mean["average"] == pytest.approx((mean["sketch"] + mean["elsewhere"]) / 2)
    assert crossed["test_opened"] == 3
    with pytest.raises(DataError, match="is none"):
        renamed = replace(far, classes=("violin", *far.classes[1:]))
        make_protocol("domain-generalisation", data_set(), [renamed])
    with pytest.raises(DataError, match="data sets to test on"):
        make_protocol("cross-dataset", data_set())
    with pytest.raises(DataError, match="takes no further"):
        make_protocol("few-shot", data_set(), [far])


def test_variants_share_a_base_model_and_are_stored_apart(tmp_path):
    variants = {"full": CONFIG, "no_evidence": replace(CONFIG, evidence=0.0)}
    run = Run(base_to_novel(data_set()), backbone(), variants, replace(OPTIONS, rivals=("linear_adapter",)))
    models = run.fit(tmp_path)
    summary = run.evaluate(tmp_path, models)
    assert list(summary["methods"]) == ["zero_shot", "linear_adapter", "full", "no_evidence"]
    assert models[0].capt["full"].base is models[0].capt["no_evidence"].base
    trained = [dict(model.trainable()) for model in models[0].capt.values()]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert evaluate(tmp_path, data_set(), backbone())["methods"] == summary["methods"]


def test_unusable_options_are_refused(tmp_path):
    with pytest.raises(CaptError, match="rivals"):
        RunOptions(rivals=("linear",))
    with pytest.raises(CaptError, match="seeds"):
        RunOptions(seeds=())
    with pytest.raises(CaptError, match="base: found 'cop'"):
        Run(base_to_novel(data_set()), backbone(), CONFIG, replace(OPTIONS, base="cop")).fit(tmp_path / "out")
    assert not (tmp_path / "out").exists()
