"""The command line on multi-label data: fit, evaluate, predict and report, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from capt.backbones import import_torchvision
from capt.data import load_multi_label
from capt.errors import CaptError
from capt.files import load_tensors, read_json, write_json
from capt.methods.multi_label.prediction import predict
from capt.methods.multi_label.registry import load_model
from capt.methods.multi_label.run import picture_transform
from tests import label_files, pair_files, run_folders, tiny
from tests.test_cli import capt

SMALL = (
    "--training.epochs", 2, "--training.lr", 3e-3, "--dim", 16, "--n-heads", 2, "--linear.training.epochs", 2,
    "--head", label_files.HEAD, "--medium", label_files.MEDIUM,
)  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_files.write_labels(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that open a tiny open_clip model: a name made known to open_clip, and a checkpoint of random weights."""
    import_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("models")
    write_json(folder / "tiny-labels.json", {"embed_dim": 48, "vision_cfg": tiny.VISION["vit"], "text_cfg": tiny.TEXT})
    open_clip.add_model_config(folder / "tiny-labels.json")
    torch.save(open_clip.create_model("tiny-labels").state_dict(), folder / "weights.pt")
    return "--model", "tiny-labels", "--pretrained", str(folder / "weights.pt")


@pytest.fixture(scope="module")
def run(table: Path, model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two linear classifiers and CPRFL, fitted by command."""
    out = tmp_path_factory.mktemp("runs") / "cprfl"
    assert capt("fit", "cprfl", table, *model, "--seeds", 1, *SMALL, "--out", out) == 0
    return out


def test_fit_shows_and_stores_all_four(run: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    summary, record = read_json(run / "summary.json"), read_json(run / "run.json")
    assert list(summary["methods"]) == ["zero_shot", "linear_bce", "linear_asl", "cprfl"]
    assert summary["protocol"] == "multi-label" and summary["sizes"]["groups"] == {"head": 2, "medium": 1, "tail": 2}
    assert record["opened_with"] == {"model": model[1], "pretrained": model[3]}
    assert [record["models"][name]["loss"] for name in record["models"]] == ["bce", "asl", "asl"]
    assert record["models"]["cprfl"]["dim"] == 16 and record["models"]["linear_asl"]["training"]["epochs"] == 2
    assert capt("report", run, "--markdown") == 0
    out = capsys.readouterr().out
    assert "| Method | Seed | mAP | mAP head | mAP medium | mAP tail |" in out and "| **Linear (ASL)** | mean |" in out


def test_cprfl_without_rivals_and_a_linear_classifier_alone(
    table: Path, model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (table, *model, "--seeds", 3, "--training.epochs", 1, "--json")
    assert capt("fit", "cprfl", *common, "--dim", 16, "--rivals", "--out", tmp_path / "cprfl") == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["zero_shot", "cprfl"]
    assert capt("fit", "linear-labels", *common, "--loss", "focal", "--out", tmp_path / "linear") == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["zero_shot", "linear_focal"]


def test_evaluate_repeats_the_result(run: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_json(run / "summary.json")
    assert capt("evaluate", run, table, "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert {name: found["per_seed"] for name, found in after["methods"].items()} == {
        name: found["per_seed"] for name, found in before["methods"].items()
    }
    assert after["test_opened"] == 2 and read_json(run / "summary.json") == before
    assert capt("evaluate", run, table) == 0
    shown = capsys.readouterr().out
    assert "Mean average precision over all classes: CPRFL" in shown
    assert re.search(r"CPRFL (beats|does not beat) Linear \(ASL\) in mAP tail", shown)


def test_predict_names_labels_with_their_thresholds(run: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [table.parent / "test-0.png", table.parent / "test-1.png"]
    assert capt("predict", run, *images, "--top", 99, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [str(image) for image in images]
    thresholds = load_tensors(run / "seed-1" / "cprfl" / "scores.safetensors")["thresholds"].sigmoid()
    expected = dict(zip(read_json(run / "run.json")["classes"], thresholds.tolist(), strict=True))
    for entry in found:
        assert {label["name"] for label in entry["labels"]} == set(label_files.SHAPES)
        probabilities = [label["probability"] for label in entry["labels"]]
        assert probabilities == sorted(probabilities, reverse=True)
        for label in entry["labels"]:
            assert label["threshold"] == pytest.approx(expected[label["name"]], abs=1e-6)
            assert label["predicted"] == (label["probability"] >= label["threshold"])


def test_one_probability_for_all_replaces_the_thresholds(
    run: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = table.parent / "test-0.png"
    assert capt("predict", run, image, "--threshold", 0, "--top", 1) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{image}: ") and line.count("%") == len(label_files.SHAPES)
    assert capt("predict", run, image, "--threshold", 1, "--top", 2, "--method", "linear_bce") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{image}: no label"
    assert second.startswith("    below their thresholds: ") and second.count("(of 100.0 %)") == 2


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_files.write_run(tmp_path_factory.mktemp("runs") / "shapes", table, seeds=(1,), epochs=1)


@pytest.mark.parametrize("method", ["linear_bce", "cprfl"])
def test_predictions_are_those_of_the_evaluation(trained: Path, table: Path, method: str) -> None:
    data = load_multi_label(table)
    assert data.test is not None
    model = load_model(trained / "seed-1" / method, tiny.backbone())
    pictures = [data.test.image(position) for position in range(len(data.test))]
    found = predict(model, pictures, picture_transform(model.backbone, "squash"), top=len(data.classes))
    stored = load_tensors(trained / "seed-1" / method / "scores.safetensors")
    for labels, scores in zip(found, stored["scores"], strict=True):
        values = {label.name: label.probability for label in labels}
        ordered = torch.tensor([values[name] for name in data.classes])
        torch.testing.assert_close(ordered, scores.sigmoid(), atol=1e-5, rtol=1e-4)
    with pytest.raises(CaptError, match="threshold: expected a probability"):
        predict(model, pictures[:1], picture_transform(model.backbone, "squash"), threshold=1.5)


def test_report_of_the_run(run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt("report", run, "--data", table, "--out", tmp_path) == 0
    page = Path(capsys.readouterr().out.strip())
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "index.html" and "Precision by frequency" in html and "No images" not in html


def test_data_without_validation_images_serve_every_command(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = label_files.write_labels(tmp_path, splits=("train", "test"))
    out = tmp_path / "run"
    small = ("--training.epochs", 1, "--dim", 16, "--rivals", "--seeds", 1, "--val-fraction", 0.3)
    assert capt("fit", "cprfl", table, *model, *small, "--out", out) == 0
    assert read_json(out / "run.json")["data"]["images"]["val"] > 0
    assert capt("evaluate", out, table) == 0
    assert capt("report", out, "--data", table) == 0
    assert capsys.readouterr().err.count("capt:") == 0


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_wrong_runs_data_and_options_are_named(
    run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = table.parent / "test-0.png"
    other = run_folders.write_run(tmp_path / "other")
    untested = label_files.write_labels(tmp_path, splits=("train",))
    renamed, swapped = tmp_path / "renamed.csv", tmp_path / "swapped.csv"
    listed = table.read_text("utf-8")
    renamed.write_text(listed.replace("red bar", "pink bar"), encoding="utf-8")
    turned = listed.replace(",train", ",x").replace(",test", ",train").replace(",x", ",test")
    swapped.write_text(turned, encoding="utf-8")
    for arguments, code, message in (
        (("fit", "cprfl", "emoji"), 3, "for load, 'capt fit capt'"),
        (("fit", "cprfl", "emoji-pairs"), 3, "for load_compositional, 'capt fit msci'"),
        (("fit", "capt", "clipart"), 3, "for load_multi_label and 'capt fit cprfl'"),
        (("fit", "msci", "clipart"), 3, "for load_multi_label and 'capt fit cprfl'"),
        (("fit", "capt", "emoji-pairs"), 3, "for load_compositional, 'capt fit msci'"),
        (("fit", "cprfl", "coco-lt"), 3, "--root"),
        (("fit", "cprfl", table, "--test-fraction", 0.5), 3, "--test-fraction"),
        (("fit", "cprfl", untested), 3, "has no test images"),
        (("fit", "cprfl", table, "--out", image), 2, "a file is there"),
        (("fit", "cprfl", table, "--linear.loss", "focal"), 2, "--linear.loss"),
        (("fit", "cprfl", table, "--val-fraction", 2), 2, "val_fraction"),
        (("fit", "cprfl", table, "--dim", 0), 2, "dim: expected at least 1"),
        (("evaluate", run, "emoji"), 3, "no multi-label data set"),
        (("evaluate", run, renamed, "--root", table.parent), 3, "others or in another order"),
        (("evaluate", run, swapped, "--root", table.parent), 3, "was trained on"),
        (("evaluate", run, table, "--protocol", "few-shot"), 2, "--protocol"),
        (("evaluate", run, table, "--worlds", "open"), 2, "--worlds"),
        (("evaluate", run, table, "--threshold", 0.5), 2, "--threshold"),
        (("evaluate", tmp_path, "nowhere"), 3, "no run.json there"),
        (("evaluate", tmp_path / "nothing", "nowhere"), 3, "no such folder"),
        (("predict", run), 3, "no images given"),
        (("predict", run, image, "--classes", "a cat"), 2, "--classes"),
        (("predict", run, image, "--world", "open"), 2, "--world"),
        (("predict", run, image, "--method", "dpc"), 3, "the run holds linear_bce, linear_asl, cprfl"),
        (("predict", run, image, "--threshold", 7), 2, "threshold: expected a probability"),
        (("predict", run, image, "--top", 0), 2, "top"),
        (("predict", run, image, "--seed", 8), 3, "holds the seeds 1, not 8"),
        (("predict", run, image, "--model", "embedded-vit"), 2, "trained on another backbone"),
        (("predict", other, image, "--threshold", 0.5), 2, "--threshold"),
        (("predict", tmp_path, image), 3, "no run.json there"),
        (("report", run, "--data", untested), 3, "give the data set of the run"),
        (("report", run, "--pairs", -1), 2, "--pairs"),
        (("report", run, "--images", -1), 2, "--images"),
    ):
        assert capt(*arguments) == code, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (arguments, error)


def test_an_unfinished_compositional_run_says_that_it_knows_no_feasibility(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from capt.cli.common import RunModelOptions

    monkeypatch.setattr(RunModelOptions, "open", lambda *_: tiny.backbone())
    table = pair_files.write_pairs(tmp_path)
    run = pair_files.write_run(tmp_path / "run", table, seeds=(1,), epochs=1)
    (run / "summary.json").unlink()
    assert capt("predict", run, tmp_path / "red-circle-test-0.png", "--world", "open") == 0
    error = capsys.readouterr().err
    assert "capt: warning: " in error and "feasibility threshold is unknown; all pairs" in error


def test_blank_lines_at_the_end_of_a_list_are_nothing(table: Path, tmp_path: Path) -> None:
    blank = tmp_path / "shapes.csv"
    blank.write_text(table.read_text("utf-8") + "\n  \n,,\n", encoding="utf-8")
    assert load_multi_label(blank, table.parent).fingerprint() == load_multi_label(table).fingerprint()
