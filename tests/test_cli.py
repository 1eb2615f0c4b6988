"""The command line: verbs, help, errors with exit codes, and one whole journey on a small folder of images."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capt import cli, errors
from tests import run_folders

SPLIT = ("--test-fraction", 0.5)
COLOURS = {
    "red thing": (220, 30, 30),
    "pink thing": (220, 60, 90),
    "blue thing": (30, 30, 220),
    "green thing": (30, 160, 30),
}


def capt(*arguments: object) -> int:
    """One command in this process; usage errors of tyro count as exit codes too."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of noisy coloured squares, ten images each, one sub-folder a class."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(10):
            pixels = np.clip(np.array(colour) + rng.normal(0, 60, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the shipped model on the photos: two shots, two seeds, two epochs."""
    out = tmp_path_factory.mktemp("runs") / "photos"
    code = capt(
        "fit", "capt", photos, "--shots", 2, "--seeds", 0, 1, "--training.epochs", 2, "--views", 1, *SPLIT, "--out", out
    )
    assert code == 0
    return out


# ---- verbs, help, start-up -----------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_help_loads_neither_torch_nor_tyro_nor_rich() -> None:
    done = python("-X", "importtime", "-m", "capt", "--help")
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "capt" in loaded and not loaded & {"torch", "numpy", "tyro", "rich", "PIL", "open_clip"}


def test_no_arguments_print_the_usage_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert capt() == 2
    assert "usage: capt VERB" in capsys.readouterr().out


def test_threads_do_not_spin() -> None:
    program = "from capt.cli import main; main(['doctor', '--json'])"
    findings = json.loads(python("-c", program).stdout)
    assert "GOMP_SPINCOUNT=0" in next(finding["text"] for finding in findings if finding["name"] == "threads")


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself_and_all_of_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt(*name.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: capt {name}" in out
    verb = cli.VERBS[name]
    function = getattr(import_module(verb.module), verb.function)
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in inspect.cleandoc(function.__doc__), parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "did you mean 'capt fit'?"),
        (["qqqqq"], "'capt --help' lists them"),
        (["bank"], "capt bank build, capt bank search"),
        (["data", "chekc"], "capt data check"),
    ],
)
def test_unknown_verbs_are_answered(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_argument_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert capt("data", "check") == 2
    assert "DATA" in capsys.readouterr().err


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CaptError("m"), 2),
        (errors.DataError("m"), 3),
        (errors.DamagedFileError("m"), 4),
        (errors.ResourceError("m"), 5),
        (errors.NumericError("m"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "run", broken)
    assert cli.main(["demo"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("capt: ") and captured.err.count("\n") == 1 and not captured.out


def test_errors_that_are_no_fault_of_the_user_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report", "{tmp}/nowhere"], 3, "no such folder"),
        (["report", "{tmp}"], 3, "no summary.json"),
        (["predict", "{tmp}/nowhere", "x.png"], 3, "no such folder"),
        (["bank", "search", "{tmp}"], 3, "no seed folder there"),
        (["data", "check", "{tmp}/nowhere"], 3, "nowhere"),
        (["data", "check", "{tmp}"], 3, "found"),
        (["evaluate", "{tmp}/nowhere", "emoji"], 3, "no such folder"),
    ],
)
def test_wrong_paths_are_named(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capt(*(argument.format(tmp=tmp_path) for argument in arguments)) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- verbs on small data -------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_broken(capsys: pytest.CaptureFixture[str]) -> None:
    from capt import ops

    assert capt("doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["status"] for finding in findings} <= {"ok", "missing"}
    named = {finding["name"] for finding in findings}
    assert {"torch", "native library", "shipped model", "disk", "memory", "grid_adapter", "bank_topk"} <= named
    assert {name for name in ops.__all__ if name.islower() and name != "explain"} <= named
    assert capt("doctor") == 0
    assert "shipped model" in capsys.readouterr().out


def test_doctor_reports_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from capt import doctor

    def explode() -> Any:
        raise OSError("no disk")

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: explode())
    broken = [finding for finding in doctor.examine() if finding.status == "broken"]
    assert [(finding.topic, finding.text) for finding in broken] == [("machine", "OSError: no disk")]


def test_data_check_names_what_is_wrong(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt("data", "check", photos, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == 4 and not found["bad_images"] and len(found["classes_below_16_shots"]) == 4
    broken = tmp_path / "broken"
    for name in ("a", "b"):
        (broken / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(broken / name / f"{number}.png")
    whole = (broken / "a" / "2.png").read_bytes()
    (broken / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    assert capt("data", "check", broken) == 3
    assert "a/2.png" in capsys.readouterr().out
    assert capt("data", "check", broken, "--lists-only") == 0


def test_few_shot_lists_are_the_same_every_time(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        assert capt("data", "few-shot", photos, "--shots", 2, "--seed", 0, "--out", file, "--json") == 0
        assert json.loads(capsys.readouterr().out)["images"] == 8
    assert files[0].read_bytes() == files[1].read_bytes()
    assert str(photos) not in files[0].read_text(encoding="utf-8")


def test_bank_can_be_built_and_searched(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = tmp_path / "bank"
    assert capt("bank", "build", photos, "--all-classes", "--out", bank, "--json") == 0
    pairs = json.loads(capsys.readouterr().out)
    assert pairs and pairs[0]["count"] >= pairs[-1]["count"] >= 1 and pairs[0]["true"] in COLOURS
    image = next((photos / pairs[0]["true"]).iterdir())
    assert capt("bank", "search", bank, "--image", image, "--top", 3, "--json") == 0
    nearest = json.loads(capsys.readouterr().out)
    assert [entry["similarity"] for entry in nearest] == sorted((e["similarity"] for e in nearest), reverse=True)
    assert capt("bank", "search", bank, "--pair", pairs[0]["true"], pairs[0]["predicted"], "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == min(pairs[0]["count"], 10)
    assert capt("bank", "search", bank, "--pair", "red thing", "nothing") == 3
    assert "no class 'nothing'" in capsys.readouterr().err


def test_a_run_folder_holds_what_was_promised(run: Path) -> None:
    for name in ("run.json", "summary.json"):
        assert (run / name).is_file()
    for seed in (0, 1):
        for name in ("adapter.safetensors", "state.json", "metrics.jsonl", "bank/bank.json"):
            assert (run / f"seed-{seed}" / name).is_file(), name
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for method in ("zero_shot", "linear_adapter", "capt"):
        results = summary["methods"][method]
        for record in (results["per_seed"]["0"], results["per_seed"]["1"], results["mean"]):
            for metric in ("base", "novel", "hm", "sample_correction_rate", "pair_resolution_rate", "new_error_rate"):
                assert 0 <= record[metric] <= 1
            assert record["net_reduction"] <= 1


def test_a_run_can_be_evaluated_again_with_the_same_result(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert capt("evaluate", run, photos, *SPLIT, "--json") == 0
    after = json.loads(capsys.readouterr().out)
    for method in ("zero_shot", "capt"):
        assert after["methods"][method]["per_seed"] == before["methods"][method]["per_seed"]


def test_predict_gives_probabilities_and_confusable_classes(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [photos / name / "0.png" for name in list(COLOURS)[:2]]
    assert capt("predict", run, *images, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [str(image) for image in images]
    for entry in found:
        assert sum(entry["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert entry["probabilities"] == sorted(entry["probabilities"], reverse=True)
        assert entry["confusable_with"] and entry["classes"][0] in COLOURS
    assert capt("predict", run, images[0], "--classes", "a cat", "a dog") == 0
    assert "a cat" in capsys.readouterr().out
    assert capt("predict", run, photos / "none.png") == 3
    assert "none.png" in capsys.readouterr().err
    assert capt("predict", run) == 3


def tiny_transformers_clip(folder: Path) -> Path:
    """A transformers CLIP of a few thousand random weights, saved as a folder."""
    from capt.backbones import import_torchvision

    import_torchvision()
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**sizes, "vocab_size": 49408, "max_position_embeddings": 32, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_the_same_command_takes_any_clip(
    kind: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"hf:{tiny_transformers_clip(tmp_path / 'clip')}" if kind == "transformers" else "ViT-B-32"
    small = ("--shots", 1, "--seeds", 3, "--training.epochs", 1, "--linear.epochs", 1, "--views", 0)
    out = tmp_path / "run"
    data = (photos, "--test-fraction", 0.2, "--model", model)
    assert capt("fit", "capt", *data, *small, "--adapter-layers", "last", "--out", out, "--json") == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["methods"]) == {"zero_shot", "linear_adapter", "tip_adapter", "capt"}
    assert ("the weights are random" in captured.err) == (kind == "open_clip")


def test_report_and_bank_of_a_run(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capt("report", run, "--data", photos, *SPLIT) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == run / "report" / "index.html" and "thumbs/" in page.read_text(encoding="utf-8")
    assert capt("report", run, "--markdown") == 0
    assert "| **CAPT** | mean |" in capsys.readouterr().out
    assert capt("bank", "search", run, "--seed", 1) == 0
    capsys.readouterr()
    assert capt("bank", "search", run, "--seed", 7) == 3
    assert "holds the seeds 0, 1, not 7" in capsys.readouterr().err
    assert capt("report", run, "--data", "emoji") == 3
    assert "give the data set of the run" in capsys.readouterr().err


def test_a_damaged_run_is_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folders.write_run(tmp_path / "run")
    (run / "summary.json").write_text("{", encoding="utf-8")
    assert capt("report", run) == 4
    assert "summary.json" in capsys.readouterr().err


def test_output_may_not_be_a_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert capt("bank", "build", photos, "--out", file) == 2
    assert "a file is there" in capsys.readouterr().err


def test_summary_table_is_printed_with_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    from capt.cli.common import print_summary

    print_summary(run_folders.summary())
    out = capsys.readouterr().out
    assert "CAPT corrects 79.0 %" in out
    means = [line.split() for line in out.splitlines() if " mean  " in line]
    assert [words[words.index("mean") + 1] for words in means] == ["50.0", "85.0", "89.0"]


def test_verbs_point_at_functions() -> None:
    for verb in cli.VERBS.values():
        function: Callable[..., int] = getattr(import_module(verb.module), verb.function)
        assert callable(function) and function.__doc__
