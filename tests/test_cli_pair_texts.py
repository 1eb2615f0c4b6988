"""``capt data pair-texts``: from the request to a file of pair texts. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from capt import ConfusionBank, cli
from capt.backbones import Backbone
from capt.cli.common import ModelOptions
from capt.data import load_pair_texts
from capt.data.pair_text_requests import pair_text_request, read_answers
from capt.data.pair_texts import PairText
from capt.errors import DataError
from tests import data_files

#: In alphabetic order, as folders are read: the first three are base classes.
CLASSES = ("ball", "bat", "hot dog", "mug", "shoe", "whale")


@pytest.fixture(scope="module", autouse=True)
def opened_once() -> Any:
    """The shipped model stays open between the commands of this file."""
    backbone, original = ModelOptions().open(), ModelOptions.open

    def open_model(self: ModelOptions) -> Backbone:
        return backbone if self == ModelOptions() else original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelOptions, "open", open_model)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_files.folders(tmp_path_factory.mktemp("photos"), dict.fromkeys(CLASSES, 2))


def pair_texts(*arguments: object) -> int:
    try:
        return cli.main(["data", "pair-texts", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


def entry(a: str, b: str) -> dict[str, list[str]]:
    """An answer for one pair, as a language model would give it."""
    return {
        "commonality": [f"a {a} and a {b} are small", "both are round"],
        "difference_ab": [f"a {a} has a seam"],
        "difference_ba": [f"a {b} has a handle"],
    }


def answers(path: Path, pairs: dict[str, Any] | None = None, form: str = "%s") -> Path:
    if pairs is None:
        pairs = {f"{a}|{b}": entry(a, b) for a, b in (("ball", "bat"), ("ball", "hot dog"), ("bat", "hot dog"))}
    path.write_text(form.replace("%s", json.dumps(pairs)), encoding="utf-8")
    return path


# ---- request ---------------------------------------------------------------------------------------------------------


def test_request_names_pairs_of_base_classes_and_forbids_the_novel_ones(photos: Path, tmp_path: Path) -> None:
    assert pair_texts(photos, "--emit", tmp_path / "ask.json", "--texts", 3) == 0
    request = json.loads((tmp_path / "ask.json").read_text(encoding="utf-8"))
    assert request["pairs"] == ["ball|bat", "ball|hot dog", "bat|hot dog"]
    assert request["never_mention"] == ["mug", "shoe", "whale"]
    assert "step by step" in request["instruction"] and "fit into 30 tokens" in request["instruction"]
    assert all(len(lists) == 3 for lists in request["answer_format"]["a|b"].values())
    assert list(request["answer_format"]["a|b"]) == list(PairText._fields)


def test_request_of_novel_or_all_classes_forbids_nothing(photos: Path, tmp_path: Path) -> None:
    for split, n_pairs in (("novel", 3), ("all", 15)):
        assert pair_texts(photos, "--emit", tmp_path / "ask.json", "--split", split) == 0
        request = json.loads((tmp_path / "ask.json").read_text(encoding="utf-8"))
        assert len(request["pairs"]) == n_pairs and request["never_mention"] == []


def test_request_asks_for_the_cells_of_a_bank_and_not_for_what_is_there(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, ones = torch.randn(2, 8), torch.ones(2)
    bank = ConfusionBank(features, torch.tensor([2, 1]), torch.tensor([0, 2]), ones, torch.arange(2), CLASSES[:3])
    bank.save(tmp_path / "bank")
    options = ("--bank", tmp_path / "bank", "--neighbours", 0, "--emit", tmp_path / "ask.json")
    assert pair_texts(photos, *options) == 0
    assert json.loads((tmp_path / "ask.json").read_text(encoding="utf-8"))["pairs"] == ["ball|hot dog", "bat|hot dog"]
    some = answers(tmp_path / "some.json", {"ball|hot dog": entry("ball", "hot dog")})
    assert pair_texts(photos, "--ingest", some, "--out", tmp_path / "have.json") == 0
    capsys.readouterr()
    assert pair_texts(photos, *options, "--have", tmp_path / "have.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 1
    assert json.loads((tmp_path / "ask.json").read_text(encoding="utf-8"))["pairs"] == ["bat|hot dog"]
    assert pair_texts(photos, *options, "--split", "all") == DataError.exit_code
    assert "are not the 6 of this data set" in capsys.readouterr().err


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "%s",
        '{"format": "capt.pair_texts", "pairs": %s}',
        "```json\n%s\n```",
        "Step by step: {round} or not?\n\n```json\n%s\n```\nDone.\n```\nnot json\n```\n",
        "Here it is:\n%s\nDone.",
    ],
)
def test_an_answer_is_read_in_every_wrapping(tmp_path: Path, form: str) -> None:
    pairs, findings = read_answers(answers(tmp_path / "a.txt", form=form), CLASSES[:3])
    assert not findings and list(pairs) == [("ball", "bat"), ("ball", "hot dog"), ("bat", "hot dog")]
    assert pairs["ball", "bat"].difference_ba == ("a bat has a handle",)


def test_several_fences_and_files_count_together(photos: Path, tmp_path: Path) -> None:
    two = "".join(f"```json\n{json.dumps({f'ball|{b}': entry('ball', b)})}\n```\n" for b in ("bat", "hot dog"))
    (tmp_path / "a.md").write_text(two, encoding="utf-8")
    b = answers(tmp_path / "b.json", {"bat|hot dog": entry("bat", "hot dog")})
    assert pair_texts(photos, "--ingest", tmp_path / "a.md", b, "--out", tmp_path / "out.json") == 0
    assert len(load_pair_texts(tmp_path / "out.json").pairs) == 3


def test_ingested_answers_are_stored_with_their_coverage(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = answers(tmp_path / "some.json", {"ball|bat": entry("ball", "bat")})
    assert pair_texts(photos, "--ingest", some, "--out", tmp_path / "one.json") == 0
    assert "1 of 3 pairs that can occur" in capsys.readouterr().out
    more = answers(tmp_path / "more.json", {"ball|hot dog": entry("ball", "hot dog"), "ball|bat": entry("a", "b")})
    have = ("--have", tmp_path / "one.json")
    assert pair_texts(photos, "--ingest", more, "--out", tmp_path / "two.json", *have, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pairs"], report["replaced"], report["can_occur"]) == (2, 1, 3)
    assert report["missing"] == ["bat|hot dog"] and report["problems"] == []
    stored = load_pair_texts(tmp_path / "two.json")
    assert stored.split == "base" and stored.classes == CLASSES[:3] and "language model" in stored.source
    assert stored.pairs["ball", "bat"].difference_ab == ("a a has a seam",)
    assert pair_texts(photos, "--ingest", more, "--out", tmp_path / "x.json", *have, "--split", "novel") == 3
    assert "expected the novel classes" in capsys.readouterr().err


def test_13_every_problem_is_reported_with_its_pair_and_nothing_is_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = entry("ball", "bat") | {"commonality": ["as round as mugs"]}
    bad = {
        "ball|bat": leak,
        "hot dog|ball": entry("hot dog", "ball"),
        "bat|hot dog": entry("bat", "hot dog") | {"difference_ab": ["wing " * 40], "difference_ba": []},
        "bat|lamp": entry("bat", "lamp"),
        "bat": {},
    }
    path, out = answers(tmp_path / "bad.json", bad), tmp_path / "out.json"
    assert pair_texts(photos, "--ingest", path, "--out", out) == DataError.exit_code
    lines = capsys.readouterr().out.splitlines()
    expected = {
        "'bat': expected two class names",
        "'ball|bat': commonality, text 1 names the class 'mug'",
        "'hot dog|ball': is reversed",
        "'bat|hot dog': difference_ba has 0 texts",
        "'bat|hot dog': difference_ab, text 1: texts: ",
        "'bat|lamp': no class is named 'lamp'",
    }
    assert len(lines) == len(expected) + 1 and "nothing was written" in lines[-1]
    assert all(any(line.startswith(f"problem: {start}") for line in lines) for start in expected)
    assert pair_texts(photos, "--ingest", path, "--out", out, "--json") == DataError.exit_code
    report = json.loads(capsys.readouterr().out)
    assert report["file"] is None and len(report["problems"]) == 6 and not out.exists()


def test_pairs_given_twice_are_problems(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = json.dumps(entry("ball", "bat"))
    (tmp_path / "a.json").write_text(f'{{"ball|bat": {one}, "ball|bat": {one}}}', encoding="utf-8")
    b = answers(tmp_path / "b.json")
    assert pair_texts(photos, "--ingest", tmp_path / "a.json", b, "--out", tmp_path / "out.json") == 3
    out = capsys.readouterr().out
    assert "'ball|bat': is given twice in one answer" in out and "'ball|bat': is given again in" in out


def test_answers_that_are_no_answers_are_errors(tmp_path: Path) -> None:
    for number, (text, message) in enumerate([("I cannot do that.", "found no JSON"), ("{1}", "found no JSON"),
                                              ("```json\n[1]\n```", "found a JSON list")]):  # fmt: skip
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_answers(tmp_path / f"{number}.txt", CLASSES)
    with pytest.raises(DataError, match="cannot be read"):
        read_answers(tmp_path / "absent.txt", CLASSES)


def test_usage_errors(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    for options in ((), ("--ingest", out), ("--out", out), ("--emit", out, "--ingest", out, "--out", out)):
        assert pair_texts(photos, *options) == 2
        assert "--emit FILE, or --ingest ANSWERS with --out FILE" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 to 16"):
        pair_text_request("toy", "base", [], texts=17)
