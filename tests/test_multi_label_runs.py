"""Runs of multi-label models: training with validation, the run folder, the test lock, edges of data, prediction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capt.data import MultiLabelSet, load_multi_label
from capt.data.multi_label import build_multi_label
from capt.data.sources import MemorySource
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation.multi_label import MultiLabelResult, average_precision
from capt.files import load_tensors, read_json, write_json
from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.model import LinearLabels, LinearLabelsConfig, MultiLabelConfig, MultiLabelModel
from capt.methods.multi_label.prediction import predict
from capt.methods.multi_label.registry import config_from_dict, load_model, model_type
from capt.methods.multi_label.run import MultiLabelOptions, MultiLabelRun, evaluate, picture_transform
from capt.methods.multi_label.training import fit_model, scores
from capt.methods.runs.inputs import InputCache
from capt.modules.visual_semantic_interaction import InteractionLayer
from tests.tiny import SHAPES, backbone, one_cycle, shape_set

DATA = shape_set()
CONFIG = CPRFLConfig(dim=32, n_heads=4, head_dim=16, feed_forward=24, ema=0.8, training=one_cycle(3))
LINEAR = LinearLabelsConfig(training=replace(LinearLabelsConfig().training, epochs=3))
MODELS = {"cprfl": CONFIG, "linear": LINEAR}
OPTIONS = MultiLabelOptions(seeds=(3,), head=20, medium=12)


def quiet(what: str, done: int, total: int) -> None:
    pass


def cached(limit: int = 1 << 30) -> InputCache:
    return InputCache(backbone(), limit, quiet, picture_transform(backbone(), "squash"))


def fit_one(folder: Path, config: MultiLabelConfig = CONFIG, seed: int = 3, data: MultiLabelSet = DATA) -> Any:
    return fit_model("model", config, data, cached(), seed, folder, quiet)


def changed(data: MultiLabelSet, **splits: Any) -> MultiLabelSet:
    """Splits given by a new target matrix, a number of images to keep, or None; frequencies follow."""
    made: dict[str, Any] = {}
    for name, change in splits.items():
        images = getattr(data, name)
        if isinstance(change, int):
            images = images.subset(np.arange(len(images)) < change)
        elif change is not None:
            images = type(images)(data.classes, change, images.ids, images.names, images.source)
        made[name] = None if change is None else images
    found = replace(data, **made)
    return replace(found, frequency=found.train.counts)


def without(split: str, label: int, data: MultiLabelSet = DATA) -> MultiLabelSet:
    """No image of the split shows the class."""
    targets = getattr(data, split).targets.copy()
    targets[:, label] = 0
    return changed(data, **{split: targets})


def renamed(classes: tuple[str, ...]) -> MultiLabelSet:
    splits = {
        name: type(images)(classes, images.targets, images.ids, images.names, images.source)
        for name, images in DATA.splits().items()
    }
    return replace(DATA, classes=classes, **splits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[int, dict[str, MultiLabelModel]]]:
    out = tmp_path_factory.mktemp("run")
    run = MultiLabelRun(DATA, backbone(), MODELS, OPTIONS)
    models = run.fit(out, opened_with={"pretrained": "none"})
    return out, run.evaluate(out, models), models


def copied(finished: tuple, folder: Path) -> Path:
    return Path(shutil.copytree(finished[0], folder / "run"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- training --------------------------------------------------------------------------------------------------------


def test_35_a_tiny_model_overfits_coloured_shapes(tmp_path):
    config = replace(CONFIG, interaction_dropout=0.0, text_prior=False, training=one_cycle(40, lr=3e-3))
    model = fit_one(tmp_path, config)
    log = lines(tmp_path / "validation.jsonl")
    assert len(log) == 40 and len(DATA.train) == 60 and len(SHAPES) == 6
    found = MultiLabelResult.of(scores(model, cached()(model, DATA.train, "train"), 60), DATA.train.targets, [1] * 6)
    assert found.mean() > 0.95, found.average_precision
    before = fit_one(tmp_path, replace(config, training=one_cycle(0)))
    start = average_precision(scores(before, cached()(before, DATA.train, "train"), 60), DATA.train.targets)
    assert start.mean() < 0.6


def test_the_averaged_weights_of_the_best_epoch_are_kept(tmp_path):
    model = fit_one(tmp_path, replace(CONFIG, training=one_cycle(6)))
    log, losses = lines(tmp_path / "validation.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in log] == [line["epoch"] for line in losses] == [1, 2, 3, 4, 5, 6]
    found = scores(model, cached()(model, DATA.val, "val"), len(DATA.val))
    result = MultiLabelResult.of(found, DATA.val.targets, DATA.frequency)
    assert result.mean() == max(line["total"]["map"] for line in log)
    assert any(line["raw_map"] != line["total"]["map"] for line in log)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.thresholds.abs().min() > 0  # chosen
    raw = fit_one(tmp_path, replace(CONFIG, ema=0.0))
    assert "raw_map" not in lines(tmp_path / "validation.jsonl")[0] and raw.config.ema == 0


def test_training_mode_returns_after_every_validation(tmp_path, monkeypatch):
    modes: list[tuple[bool, bool]] = []
    plain = InteractionLayer.mixed

    def watched(layer: InteractionLayer, *given: Any) -> Any:
        modes.append((layer.training, torch.is_grad_enabled()))
        return plain(layer, *given)

    monkeypatch.setattr(InteractionLayer, "mixed", watched)
    fit_one(tmp_path)
    epoch = [(True, True)] * 4 + [(False, False)] * 2  # 60 images in batches of 16; averaged and raw weights validated
    assert modes == epoch * 3 + [(False, False)]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    config = replace(CONFIG, views=1)
    torch.manual_seed(11)
    one = fit_one(tmp_path / "a", config)
    torch.manual_seed(12)
    same, other = fit_one(tmp_path / "b", config), fit_one(tmp_path / "c", config, seed=4)
    assert all(torch.equal(value, same.state()[name]) for name, value in one.state().items())
    assert (tmp_path / "a" / "validation.jsonl").read_text() == (tmp_path / "b" / "validation.jsonl").read_text()
    assert not torch.equal(one.projection.weight, other.projection.weight)


@pytest.mark.parametrize("changes", [{}, {"views": 2}])
def test_inputs_that_are_not_kept_give_the_same_model(tmp_path, changes):
    config, made_again = replace(CONFIG, **changes, training=one_cycle(1)), cached(0)
    kept, other = fit_one(tmp_path, config), fit_model("model", config, DATA, made_again, 3, tmp_path, quiet)
    assert len(made_again._stores) == 2 + config.views
    assert all(store._tokens is None for store in made_again._stores.values())
    for name, value in kept.state().items():
        torch.testing.assert_close(value, other.state()[name], rtol=1e-4, atol=1e-5)


def test_a_batch_is_drawn_from_all_views(tmp_path):
    plain, several = (fit_one(tmp_path, replace(CONFIG, views=views)) for views in (0, 2))
    assert not torch.equal(plain.projection.weight, several.projection.weight)
    cache = cached()
    of_view = [cache(several, DATA.train, "train", view)(torch.arange(4)) for view in (None, 0, 1)]
    assert not any(torch.equal(of_view[0], one) for one in of_view[1:]) and not torch.equal(*of_view[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"train_text": True, "backbone_lr_mult": 0.1},
        {"train_image": True, "views": 1},
        {"train_image": True, "train_text": True, "normalize": False},
    ],
)
@pytest.mark.parametrize("amp", [False, True])
def test_towers_that_learn_train_are_stored_and_come_back(tmp_path, changes, amp):
    config = replace(CONFIG, **changes, training=one_cycle(1, amp=amp))
    model = fit_one(tmp_path, config)
    assert all(value.isfinite().all() for value in model.state().values())
    model.save(tmp_path)
    again = load_model(tmp_path, backbone())
    for one in (model, again):
        assert one.tuned is not None and one.tuned.fingerprint() != backbone().fingerprint()
    found = [scores(one, cached()(one, DATA.test, "test"), len(DATA.test)) for one in (model, again)]
    assert torch.equal(*found)


def test_alternate_refinement_and_an_early_end(tmp_path):
    config = replace(CONFIG, refinement="alternate", text_prior=False, training=one_cycle(40, stop_epoch=2))
    model = fit_one(tmp_path, config)
    fresh = fit_one(tmp_path / "fresh", replace(config, training=one_cycle(0)))
    same = {name for name, value in fresh.state().items() if torch.equal(value, model.state()[name])}
    assert {name.split(".")[0] for name in same} == {"text", "trust", "interaction"}


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_36_a_run_folder_holds_records_models_logs_and_scores(finished):
    out, summary, _ = finished
    record = read_json(out / "run.json")
    assert {name: one["kind"] for name, one in record["models"].items()} == {"cprfl": "cprfl", "linear": "linear"}
    assert record["test_opened"] == 1 and record["opened_with"] == {"pretrained": "none"}
    assert record["classes"] == list(SHAPES) and record["frequency"] == DATA.train.counts.tolist()
    assert record["hashes"] == {"backbone": backbone().fingerprint(), "data": DATA.fingerprint()}
    assert read_json(out / "training_images.json") == sorted([*DATA.train.names, *DATA.val.names])
    assert summary == read_json(out / "summary.json")
    assert summary["methods"].keys() == {"zero_shot", "cprfl", "linear"} and summary["pretrained"] == "none"
    assert summary["metrics"] == ["map", "map_head", "map_medium", "map_tail"]
    assert summary["sizes"]["groups"] == {"head": 2, "medium": 2, "tail": 2}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    scored = {"scores.safetensors", "classes.json"}
    trained = {"state.json", "model.safetensors", "metrics.jsonl", "validation.jsonl"} | scored
    assert files == {"run.json", "summary.json", "training_images.json"} | {
        f"seed-3/{name}/{file}" for name in ("zero_shot", *MODELS) for file in (trained if name in MODELS else scored)
    }
    assert str(out) not in json.dumps([record, summary])


def test_36_a_stored_model_carries_names_texts_settings_and_averaged_weights(finished):
    out, _, models = finished
    state = read_json(out / "seed-3" / "cprfl" / "state.json")
    tensors = load_tensors(out / "seed-3" / "cprfl" / "model.safetensors", state["sha256"])
    assert state["classes"] == list(SHAPES) and config_from_dict("cprfl", state["config"]) == CONFIG
    assert torch.equal(tensors["text"], models[3]["cprfl"].text) and tensors["thresholds"].shape == (6,)
    assert not any(name.startswith("backbone.") for name in tensors)
    log = lines(out / "seed-3" / "cprfl" / "validation.jsonl")
    again = load_model(out / "seed-3" / "cprfl", backbone())
    found = scores(again, cached()(again, DATA.val, "val"), len(DATA.val))
    of = MultiLabelResult.of(found, DATA.val.targets, DATA.frequency)
    assert of.mean() == max(line["total"]["map"] for line in log)


def test_metrics_follow_from_the_stored_scores(finished):
    out, summary, _ = finished
    for name in ("zero_shot", "cprfl", "linear"):
        found = load_tensors(out / "seed-3" / name / "scores.safetensors")
        assert torch.equal(found["targets"], torch.from_numpy(DATA.test.targets.copy()))
        metrics = summary["methods"][name]["per_seed"]["3"]
        precision = average_precision(found["scores"], found["targets"])
        assert metrics["map"] == pytest.approx(precision.mean())
        assert metrics["map_tail"] == pytest.approx(precision[DATA.groups((20, 12)).tail].mean())
        predicted, wanted = (found["scores"] >= found["thresholds"]).numpy(), found["targets"].numpy() == 1
        right = (predicted & wanted).sum()
        assert metrics["of1_chosen"] == pytest.approx(2 * right / (predicted.sum() + wanted.sum()))
        classes = read_json(out / "seed-3" / name / "classes.json")
        assert {one["name"]: one["average_precision"] for one in classes} == pytest.approx(
            dict(zip(SHAPES, precision, strict=True))
        )


def test_36_prediction_equals_evaluation_from_memory_and_from_the_folder(finished):
    out, _, models = finished
    pictures = [DATA.test.image(place) for place in range(len(DATA.test))]
    for name in MODELS:
        stored = load_tensors(out / "seed-3" / name / "scores.safetensors")
        want = stored["scores"].sigmoid()
        for model in (models[3][name], load_model(out / "seed-3" / name, backbone())):
            labels = predict(model, pictures, picture_transform(backbone(), "squash"), top=6)
            for row, (found, probability) in enumerate(zip(labels, want, strict=True)):
                by_name = {label.name: label for label in found}
                ranked = probability.sort(descending=True).values
                assert len(by_name) == 6 and [x.probability for x in found] == pytest.approx(ranked.tolist(), rel=1e-6)
                assert [by_name[shape].probability for shape in SHAPES] == pytest.approx(probability.tolist(), rel=1e-6)
                said = stored["scores"][row] >= stored["thresholds"]
                assert [by_name[shape].predicted for shape in SHAPES] == said.tolist()


def test_37_one_image_alone_gets_the_labels_it_gets_in_a_batch(finished):
    model = load_model(finished[0] / "seed-3" / "cprfl", backbone())
    pictures, transform = [DATA.test.image(place) for place in range(8)], picture_transform(backbone(), "squash")
    batch, again = (predict(model, pictures, transform) for _ in range(2))
    assert batch == again and predict(model, [], transform) == []
    for picture, found in zip(pictures, batch, strict=True):
        (alone,) = predict(model, [picture], transform)
        assert [label.name for label in alone] == [label.name for label in found]
        assert [label.probability for label in alone] == pytest.approx([x.probability for x in found], rel=1e-4)
    one = predict(model, pictures, transform, top=1)
    assert all(len(found) == max(1, sum(label.predicted for label in found)) for found in one)
    with pytest.raises(CaptError, match="top: expected at least 1, found 0"):
        predict(model, pictures, transform, top=0)


def test_training_and_choosing_thresholds_never_read_a_test_image(tmp_path, monkeypatch):
    reads: list[str] = []
    source = type(DATA.test.source)
    plain = source.read
    monkeypatch.setattr(source, "read", lambda own, name: reads.append(name) or plain(own, name))
    run = MultiLabelRun(DATA, backbone(), {"linear": LINEAR}, OPTIONS)
    models = run.fit(tmp_path)
    assert {name.split("/")[0] for name in reads} == {"train", "val"}
    with pytest.raises(DataError, match="the test split is locked"):
        run.data.test.image(0)
    run.evaluate(tmp_path, models)
    assert {name for name in reads if name.startswith("test")} == set(DATA.test.names)
    with pytest.raises(DataError, match="the test split is locked"):
        run.data.test.image(0)


def test_fitting_into_a_folder_takes_nothing_of_an_earlier_run(finished, tmp_path):
    out = copied(finished, tmp_path)
    (out / "notes.txt").write_text("kept")
    with pytest.raises(CaptError, match="expected at least one, none called 'zero_shot'"):
        MultiLabelRun(DATA, backbone(), {"zero_shot": LINEAR}, OPTIONS).fit(out)
    bad = replace(LINEAR, loss="class-balanced", negative_scale=-1.0)
    with pytest.raises(CaptError, match="negative_scale must be above 0"):
        MultiLabelRun(DATA, backbone(), {"linear": bad}, OPTIONS).fit(out)
    assert (out / "summary.json").exists()  # nothing is removed for a run that cannot be
    MultiLabelRun(DATA, backbone(), {"other": LINEAR}, replace(OPTIONS, seeds=(5,))).fit(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "run.json", "seed-5", "training_images.json"]
    assert read_json(out / "run.json")["test_opened"] == 0


# ---- models from folders ---------------------------------------------------------------------------------------------


def test_damaged_and_foreign_model_folders_are_refused(finished, tmp_path):
    folder = copied(finished, tmp_path) / "seed-3" / "cprfl"
    record = read_json(folder / "state.json")
    with pytest.raises(CaptError, match=r"trained on another backbone .* give the same --model"):
        load_model(folder, backbone(seed=1))
    for wrong in (
        {**record, "schema": 2}, {**record, "method": "capt"}, {**record, "config": {**record["config"], "bias": 1}},
        {**record, "config": {}}, {name: value for name, value in record.items() if name != "classes"},
        {name: value for name, value in record.items() if name != "sha256"}, [],
        {**record, "config": {**record["config"], "paths": "none"}}, {**record, "classes": list(SHAPES[:5])},
    ):  # fmt: skip
        write_json(folder / "state.json", wrong)
        with pytest.raises(DamagedFileError, match="fit it again"):
            load_model(folder, backbone())
    write_json(folder / "state.json", record)
    tensors = folder / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        load_model(folder, backbone())
    tensors.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_model(folder, backbone())
    (folder / "state.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"state\.json"):
        load_model(folder, backbone())
    with pytest.raises(DataError, match=r"state\.json.*no trained model there"):
        load_model(tmp_path / "nothing", backbone())


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluating_again_gives_the_same_numbers_counts_and_writes_nothing_else(finished, tmp_path):
    out = copied(finished, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.json"}
    found = evaluate(out, DATA, backbone())
    assert found["methods"] == finished[1]["methods"] and found["test_opened"] == 2
    assert found["hashes"] == finished[1]["hashes"] and found["sizes"] == finished[1]["sizes"]
    assert read_json(out / "run.json")["test_opened"] == 2
    assert {path: path.read_bytes() for path in before} == before


def test_36_other_classes_and_training_images_are_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    for classes in ((*SHAPES[:-1], "black triangle"), SHAPES[::-1]):
        with pytest.raises(DataError, match=r"trained for 6 classes, 'tiny-shapes' has 6, others or in another order"):
            evaluate(out, renamed(classes), backbone())
    for split in ("train", "val"):
        swapped = replace(DATA, test=getattr(DATA, split))
        with pytest.raises(DataError, match=rf"was trained on \d+ of the test images .* such as '{split}/"):
            evaluate(out, swapped, backbone())
    with pytest.raises(CaptError, match="trained on another backbone"):
        evaluate(out, DATA, backbone(seed=1))
    assert read_json(out / "run.json")["test_opened"] == 1


def test_groups_of_an_evaluation_are_those_of_the_training_data(finished, tmp_path):
    out = copied(finished, tmp_path)
    rarer = changed(DATA, train=30)
    found = evaluate(out, rarer, backbone())
    assert found["sizes"]["groups"] == finished[1]["sizes"]["groups"]
    assert found["methods"]["cprfl"] == finished[1]["methods"]["cprfl"]


def test_a_damaged_run_folder_is_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    record = read_json(out / "run.json")
    for wrong in (
        {key: value for key, value in record.items() if key != "models"}, [], {**record, "models": ["cprfl"]},
        {**record, "models": {"cprfl": {"kind": "other"}}}, {**record, "options": {"seeds": []}},
        {**record, "models": {"cprfl": {**record["models"]["cprfl"], "loss": "hinge"}}}, {**record, "classes": None},
        {**record, "frequency": ["many"]}, {**record, "frequency": [1, 2]}, {**record, "options": {"sides": 2}},
    ):  # fmt: skip
        write_json(out / "run.json", wrong)
        with pytest.raises(DamagedFileError, match=r"run\.json.*not the record of a multi-label run"):
            evaluate(out, DATA, backbone())
    (out / "run.json").unlink()
    with pytest.raises(DataError, match=r"run\.json.*no such file"):
        evaluate(out, DATA, backbone())
    write_json(out / "run.json", record)
    shutil.rmtree(out / "seed-3" / "linear")
    with pytest.raises(DataError, match="no trained model there; was the run interrupted"):
        evaluate(out, DATA, backbone())
    (out / "training_images.json").unlink()
    with pytest.raises(DataError, match=r"training_images\.json"):
        evaluate(out, DATA, backbone())


def test_a_model_without_anything_to_train_can_be_run_and_loaded(tmp_path):
    run = MultiLabelRun(DATA, backbone(), {"clip": MultiLabelConfig()}, OPTIONS)
    methods = run.evaluate(tmp_path, run.fit(tmp_path))["methods"]
    assert methods["clip"]["per_seed"] == methods["zero_shot"]["per_seed"]
    assert load_model(tmp_path / "seed-3" / "clip", backbone()).kind == "zero-shot"


# ---- edges of the data -----------------------------------------------------------------------------------------------


def outcome(data: MultiLabelSet, folder: Path, **changes: Any) -> dict[str, float]:
    run = MultiLabelRun(data, backbone(), {"linear": replace(LINEAR, **changes)}, OPTIONS)
    metrics: dict[str, float] = run.evaluate(folder, run.fit(folder))["methods"]["linear"]["per_seed"]["3"]
    json.dumps(metrics, allow_nan=False)
    return metrics


def test_images_without_a_label_are_negatives_of_every_class():
    assert min(images.unlabelled for images in DATA.splits().values()) > 0


@pytest.mark.parametrize("loss", ["asl", "bce"])
def test_a_class_without_a_training_image_is_learned_from_its_negatives(tmp_path, loss):
    data = without("train", 2)
    assert data.frequency[2] == 0
    metrics = outcome(data, tmp_path, loss=loss)
    assert metrics["excluded_classes"] == 0 and 0 < metrics["map"] <= 1


@pytest.mark.parametrize("loss", ["focal", "class-balanced", "distribution-balanced", "distribution-balanced-0fl"])
def test_losses_by_frequency_name_the_class_they_cannot_weigh(tmp_path, loss):
    assert outcome(DATA, tmp_path / "fine", loss=loss)["map"] > 0
    run = MultiLabelRun(without("train", 4), backbone(), {"linear": replace(LINEAR, loss=loss)}, OPTIONS)
    with pytest.raises(DataError, match=rf"loss '{loss}': .*; 'pink_circle' is shown by 0 of 60 \(1 such classes\)"):
        run.fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    targets = DATA.train.targets.copy()
    targets[:, 0] = 1
    run = MultiLabelRun(changed(DATA, train=targets), backbone(), {"linear": replace(LINEAR, loss=loss)}, OPTIONS)
    with pytest.raises(DataError, match="'red circle' is shown by 60 of 60"):
        run.fit(tmp_path / "run")


def test_a_class_without_a_test_image_is_left_out_of_every_mean(tmp_path, finished):
    metrics = outcome(without("test", 5), tmp_path)
    whole = finished[1]["methods"]["linear"]["per_seed"]["3"]
    assert metrics["excluded_classes"] == 1 and whole["excluded_classes"] == 0
    assert metrics["map_head"] == whole["map_head"] and metrics["map_tail"] != whole["map_tail"]
    classes = {one["name"]: one for one in read_json(tmp_path / "seed-3" / "linear" / "classes.json")}
    assert classes["gray triangle"]["average_precision"] is None


def test_a_group_without_a_test_image_has_no_number(tmp_path):
    data = without("test", 5, without("test", 3))
    run = MultiLabelRun(data, backbone(), {"linear": LINEAR}, replace(OPTIONS, head=20, medium=12))
    tail = data.groups((20, 12)).tail.tolist()
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert tail == [3, 5] and summary["metrics"] == ["map", "map_head", "map_medium"]


def test_a_class_without_a_validation_image_gets_the_threshold_of_all(tmp_path):
    data = without("val", 5)
    model = fit_one(tmp_path, LINEAR, data=data)
    found = scores(model, cached()(model, data.val, "val"), len(data.val))
    want = found.flatten()[data.val.targets.flatten() == 1]
    assert float(model.thresholds[5]) in want.tolist()
    assert lines(tmp_path / "validation.jsonl")[0]["excluded_classes"] == 1


def test_one_class_alone(tmp_path):
    members = {
        split: [(name, [0] if row[0] else []) for name, row in zip(images.names, images.targets, strict=True)]
        for split, images in DATA.splits().items()
    }
    data = build_multi_label("one", ["red circle"], members, DATA.train.source)
    run = MultiLabelRun(data, backbone(), {"cprfl": CONFIG, "linear": LINEAR}, OPTIONS)
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert summary["metrics"] == ["map", "map_head"] and summary["sizes"]["classes"] == 1
    model = load_model(tmp_path / "seed-3" / "cprfl", backbone())
    ((label,),) = predict(model, [DATA.test.image(0)], picture_transform(backbone(), "squash"))
    assert label.name == "red circle"


def test_labels_given_twice_and_unknown_labels(tmp_path):
    rows = [("train", place, list(np.flatnonzero(row))) for place, row in enumerate(DATA.train.targets[:12])]
    rows += [("test", place, list(np.flatnonzero(row))) for place, row in enumerate(DATA.test.targets[:8])]
    text = "path,labels,split\n"
    for split, place, labels in rows:
        getattr(DATA, split).image(place).save(tmp_path / f"{split}{place}.png")
        text += f"{split}{place}.png,{';'.join(SHAPES[label] for label in [*labels, *labels])},{split}\n"
    (tmp_path / "list.csv").write_text(text)
    data = load_multi_label(tmp_path / "list.csv", class_names=SHAPES)
    assert data.meta["repeated_labels"] > 0 and data.train.targets.tolist() == DATA.train.targets[:12].tolist()
    assert data.val is None
    metrics = outcome(data, tmp_path / "run")
    assert metrics["map"] > 0
    (tmp_path / "list.csv").write_text("path,labels\ntrain0.png,red cube\n")
    with pytest.raises(DataError, match="the label 'red cube' is none of the 6 classes"):
        load_multi_label(tmp_path / "list.csv", class_names=SHAPES, check_files=False)


def test_without_a_validation_split_a_part_of_the_training_images_is_held_out(tmp_path):
    data = changed(DATA, val=None)
    run = MultiLabelRun(data, backbone(), {"linear": LINEAR}, replace(OPTIONS, val_fraction=0.25))
    held = data.hold_out(0.25)
    assert run.data.val.names == held.val.names and run.data.train.names == held.train.names
    assert np.array_equal(run.data.frequency, data.frequency)
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert read_json(tmp_path / "training_images.json") == sorted(data.train.names)
    assert read_json(tmp_path / "run.json")["data"]["hold_out"] == {"fraction": 0.25, "seed": 0}
    assert evaluate(tmp_path, data, backbone())["methods"] == summary["methods"]


def test_data_that_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="'tiny-shapes' has no test images; a list needs a column 'split'"):
        MultiLabelRun(changed(DATA, test=None), backbone(), MODELS, OPTIONS)
    with pytest.raises(DataError, match="has no test images"):
        MultiLabelRun(changed(DATA, test=0), backbone(), MODELS, OPTIONS)
    for split in ("train", "val", "test"):
        nothing = np.zeros_like(getattr(DATA, split).targets)
        with pytest.raises(DataError, match=rf"none of the \d+ '{split}' images has a label"):
            MultiLabelRun(changed(DATA, **{split: nothing}), backbone(), MODELS, OPTIONS)
    few = build_multi_label(
        "few", ["x"], {"train": [("a", [0]), ("b", [])], "test": [("c", [0])]}, MemorySource({})
    )  # fmt: skip
    with pytest.raises(DataError, match="none of the 0 'val' images has a label"):
        MultiLabelRun(few, backbone(), MODELS, OPTIONS)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_linear_classifier_starts_from_the_class_texts():
    model, blank = (LinearLabels(backbone(), SHAPES, replace(LINEAR, initial=start)) for start in ("text", "zero"))
    assert torch.equal(model.rows.weight, backbone().class_text_features([name.replace("_", " ") for name in SHAPES]))
    assert blank.rows.weight.abs().max() == 0 and (model.rows.bias < 0).all() and (blank.rows.bias < 0).all()
    inputs = model.inputs(torch.randn(2, 3, 32, 32))
    model.prepare(iter([inputs[:1], inputs[1:]]), torch.ones(6))
    torch.testing.assert_close(model.logits(inputs).mean(0), torch.full((6,), -4.0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(inputs.norm(dim=-1), torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.logits(inputs)
    assert torch.equal(rough, model.logits(inputs))


@pytest.mark.parametrize("resize", ["squash", "native"])
def test_wide_pictures_are_squashed_or_cut(resize):
    picture = DATA.train.image(0).resize((200, 40))
    found, cut = picture_transform(backbone(), resize)(picture), backbone().preprocess(picture)
    assert found.shape == cut.shape and torch.equal(found, cut) is (resize == "native")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seeds": ()}, "seeds: expected distinct numbers"), ({"seeds": (1, 1)}, "seeds: expected distinct"),
        ({"seeds": (-1,)}, "seeds: expected distinct numbers of 0 or more"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number between 0 and 1, found 1.0"),
        ({"head": 5, "medium": 6}, "head, medium: expected head >= medium >= 0, found 5 and 6"),
        ({"resize": "crop"}, "resize: expected 'squash' or 'native'"),
        ({"token_memory": -1}, "token_memory: expected 0 or more, found -1"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        MultiLabelOptions(**values)


def test_settings_of_another_kind_are_refused():
    with pytest.raises(CaptError, match=r"expected settings of a multi-label model \(MultiLabelConfig, Linear"):
        model_type(object())  # type: ignore[arg-type]
    with pytest.raises(CaptError, match="initial: expected 'text' or 'zero', found 'noise'"):
        LinearLabelsConfig(initial="noise")  # type: ignore[arg-type]
