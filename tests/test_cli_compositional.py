"""The command line on compositional data: fit, evaluate, predict and report, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from capt import cli
from capt.backbones import import_torchvision
from capt.data import load_compositional
from capt.errors import CaptError, DataError
from capt.evaluation import PairSpace
from capt.files import read_json, write_json
from capt.methods.compositional import prediction
from capt.methods.compositional.registry import load_model
from capt.methods.compositional.scoring import encode_pairs, labels_of, score
from tests import pair_files, run_folders, tiny
from tests.test_cli import capt

SMALL = ("--training.epochs", 1, "--training.lr", 3e-3, "--n-thresholds", 3)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_files.write_pairs(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that open a tiny open_clip model: a name made known to open_clip, and a checkpoint of random weights."""
    import_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("models")
    write_json(folder / "tiny-pairs.json", {"embed_dim": 48, "vision_cfg": tiny.VISION["vit"], "text_cfg": tiny.TEXT})
    open_clip.add_model_config(folder / "tiny-pairs.json")
    torch.save(open_clip.create_model("tiny-pairs").state_dict(), folder / "weights.pt")
    return "--model", "tiny-pairs", "--pretrained", str(folder / "weights.pt")


@pytest.fixture(scope="module")
def run(table: Path, model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSP and MSCI, fitted by command."""
    out = tmp_path_factory.mktemp("runs") / "msci"
    small = (*SMALL, "--n-heads", 4, "--adapter-width", 4, "--csp.training.epochs", 1)
    assert capt("fit", "msci", table, *model, "--seeds", 1, *small, "--out", out) == 0
    return out


def test_fit_shows_and_stores_all_three(run: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    summary, record = read_json(run / "summary.json"), read_json(run / "run.json")
    assert list(summary["methods"]) == ["zero_shot", "csp", "msci"] and summary["protocol"] == "compositional"
    assert record["opened_with"] == {"model": model[1], "pretrained": model[3]} and len(record["pairs"]) == 9
    assert record["models"]["msci"]["n_heads"] == 4 and record["models"]["csp"]["training"]["epochs"] == 1
    assert capt("report", run, "--markdown") == 0
    out = capsys.readouterr().out
    assert "| **MSCI** | mean |" in out and "Open AUC" in out


def test_how_the_model_was_opened_is_recorded_before_training(
    table: Path, model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capt.methods.compositional import run as module

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit_model", stopped)
    assert capt("fit", "csp", table, *model, "--out", tmp_path / "run") == cli.INTERRUPTED
    assert read_json(tmp_path / "run" / "run.json")["opened_with"]["model"] == model[1]


def test_csp_alone_and_msci_alone(
    table: Path, model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (table, *model, "--seeds", 3, "--worlds", "closed", *SMALL, "--json")
    assert capt("fit", "csp", *common, "--out", tmp_path / "csp") == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["zero_shot", "csp"]
    assert capt("fit", "msci", *common, "--n-heads", 4, "--rivals", "--out", tmp_path / "msci") == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["methods"]) == ["zero_shot", "msci"] and "open_auc" not in summary["metrics"]


def test_evaluate_repeats_the_result_and_takes_worlds_and_threshold(
    run: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_json(run / "summary.json")
    assert capt("evaluate", run, table, "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert {name: found["per_seed"] for name, found in after["methods"].items()} == {
        name: found["per_seed"] for name, found in before["methods"].items()
    }
    assert capt("evaluate", run, table, "--worlds", "open", "--threshold", 2, "--json") == 0
    pruned = json.loads(capsys.readouterr().out)
    assert pruned["metrics"][0] == "open_best_seen" and pruned["test_opened"] == after["test_opened"] + 1
    # Above every feasibility only the 6 seen ones of 9 pairs are left.
    assert pruned["methods"]["msci"]["mean"]["open_kept"] == pytest.approx(6 / 9)
    assert pruned["methods"]["msci"]["mean"]["open_best_unseen"] == 0
    assert read_json(run / "summary.json") == before
    assert capt("evaluate", run, table) == 0
    assert "Closed world, best harmonic mean" in capsys.readouterr().out


def test_predict_names_pair_state_and_object(run: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [table.parent / "red-circle-test-0.png", table.parent / "blue-bar-test-1.png"]
    assert capt("predict", run, *images, "--top", 99, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [str(image) for image in images]
    for entry in found:
        assert (len(entry["pairs"]), len(entry["states"]), len(entry["objects"])) == (9, 3, 3)
        assert {(p["state"], p["object"]) for p in entry["pairs"] if not p["seen"]} == set(pair_files.UNSEEN)
        for kind in ("pairs", "states", "objects"):
            probabilities = [one["probability"] for one in entry[kind]]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert probabilities == sorted(probabilities, reverse=True)
    assert capt("predict", run, images[0], "--world", "open", "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{images[0]}: ") and lines[1].startswith("    state: ")
    assert lines[2].startswith("    object: ") and lines[2].count("%") == 2


def test_states_of_a_model_without_branches_are_sums_over_pairs(
    run: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = table.parent / "red-circle-test-0.png"
    assert capt("predict", run, image, "--method", "csp", "--top", 9, "--json") == 0
    entry = json.loads(capsys.readouterr().out)[0]
    for kind, key in (("states", "state"), ("objects", "object")):
        for one in entry[kind]:
            parts = [pair["probability"] for pair in entry["pairs"] if pair[key] == one["name"]]
            assert one["probability"] == pytest.approx(sum(parts), abs=1e-6)


def test_report_of_the_run(run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt("report", run, "--data", table, "--out", tmp_path) == 0
    page = Path(capsys.readouterr().out.strip())
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "index.html" and "Seen-unseen curves" in html and 'src="thumbs/' in html


# ---- prediction against evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_files.write_run(tmp_path_factory.mktemp("runs") / "shapes", table, seeds=(1,), epochs=1)


@pytest.mark.parametrize("method", ["csp", "msci"])
@pytest.mark.parametrize("world", ["closed", "open"])
def test_predictions_are_those_of_the_evaluation(trained: Path, table: Path, method: str, world: str) -> None:
    data = load_compositional(table)
    model = load_model(trained / "seed-1" / method, tiny.backbone())
    space = prediction.candidates(trained, model, world, seed=1, method=method)  # type: ignore[arg-type]
    if world == "open":
        kept = read_json(trained / "summary.json")["methods"][method]["per_seed"]["1"]["open_kept"]
        assert len(space) == pytest.approx(kept * 9)
    pictures = [data.test.image(position) for position in range(len(data.test))]
    found = prediction.predict(model, pictures, space, top=1)
    pixels = torch.stack([model.backbone.preprocess(picture) for picture in pictures])
    inputs = model.inputs(pixels)
    meter = score(model, encode_pairs(model, space), space, lambda rows: inputs[rows], labels_of(data, "test"))
    best = space.pairs[meter.best_pairs().predictions()]
    names = [(data.states[state], data.objects[thing]) for state, thing in best.tolist()]
    assert [(one.pairs[0].state, one.pairs[0].object) for one in found] == names


def test_prediction_refuses_what_it_cannot_do(trained: Path, tmp_path: Path) -> None:
    model = load_model(trained / "seed-1" / "csp", tiny.backbone())
    write_json(tmp_path / "run.json", {"models": {}})
    with pytest.raises(DataError, match="lists no pairs"):
        prediction.candidates(tmp_path, model, "closed", seed=1, method="csp")
    with pytest.raises(CaptError, match="top"):
        prediction.predict(model, [], PairSpace(model.train_pairs, torch.ones(6, dtype=torch.bool), 3, 3), top=0)
    # A run that was trained but never evaluated has chosen no threshold: everything is a candidate.
    with pytest.warns(UserWarning, match=r"not finished .*threshold is unknown; all pairs"):
        assert len(prediction.candidates(tmp_path, model, "open", seed=1, method="csp")) == 9


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_wrong_runs_data_and_options_are_named(
    run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = table.parent / "red-circle-test-0.png"
    other = run_folders.write_run(tmp_path / "other")
    small = pair_files.write_pairs(tmp_path)
    kept = [line for line in small.read_text("utf-8").splitlines() if ",bar," not in line]
    small.write_text("\n".join(kept), encoding="utf-8")
    for arguments, code, message in (
        (("fit", "msci", "emoji"), 3, "no compositional data set"),
        (("fit", "msci", "czsl:cgqa"), 3, "--root) is missing"),
        (("fit", "csp", table, "--test-fraction", 0.5), 3, "has its splits"),
        (("fit", "csp", table, "--out", image), 2, "a file is there"),
        (("evaluate", run, "emoji"), 3, "no compositional data set"),
        (("evaluate", run, small), 3, "was trained with 3 objects, 'shapes' has 2"),
        (("evaluate", run, table, "--protocol", "few-shot"), 2, "--protocol"),
        (("evaluate", run, table, "--targets", "emoji"), 2, "--targets"),
        (("evaluate", other, "emoji", "--worlds", "open"), 2, "--worlds"),
        (("evaluate", other, "emoji", "--threshold", 0), 2, "--threshold"),
        (("predict", run), 3, "no images given"),
        (("predict", run, image, "--classes", "a cat"), 2, "--classes"),
        (("predict", run, image, "--method", "dpc"), 3, "the run holds csp, msci"),
        (("predict", run, image, "--seed", 8), 3, "holds the seeds 1, not 8"),
        (("predict", run, image, "--model", "embedded-vit"), 2, "trained on another backbone"),
        (("predict", run, small), 3, "shapes.csv"),
        (("predict", other, image, "--world", "open"), 2, "--world"),
        (("report", run, "--data", small), 3, "give the data set of the run"),
    ):
        assert capt(*arguments) == code, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, arguments


def test_an_image_of_an_unknown_pair_is_named(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = table.read_text("utf-8").splitlines()
    wrong = tmp_path / "wrong.csv"
    listed[-1] = listed[-1].replace("red,square", "golden,square")
    wrong.write_text("\n".join(listed), encoding="utf-8")
    assert capt("fit", "msci", wrong, "--root", table.parent) == 3
    assert "golden" in capsys.readouterr().err
