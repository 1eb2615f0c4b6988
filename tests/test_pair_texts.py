"""Pair texts: the file, what is refused, mentions of class names. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from capt.data.pair_texts import (
    NameFinder,
    PairText,
    PairTexts,
    length_findings,
    load_pair_texts,
    pair_key,
    parse_pairs,
    save_pair_texts,
    validate_pair_texts,
)
from capt.errors import DamagedFileError, DataError
from tests import tiny

CLASSES = ("cat", "fox", "hot dog", "bun")


def text(word: str = "it") -> PairText:
    return PairText((f"{word} has ears",), (f"{word} has stripes", "long whiskers"), (f"{word} has a bushy tail",))


def texts(pairs: dict[Any, PairText] | None = None) -> PairTexts:
    if pairs is None:
        pairs = {("cat", "fox"): text(), ("hot dog", "bun"): text("food")}
    return PairTexts("toy", "base", CLASSES, pairs, "by hand")


def problems(pairs: dict[Any, PairText], **options: Any) -> list[tuple[str, str]]:
    return [(finding.kind, str(finding)) for finding in validate_pair_texts(texts(pairs), CLASSES, **options)]


# ---- the file --------------------------------------------------------------------------------------------------------


def test_saved_texts_come_back_and_order_does_not_change_the_bytes(tmp_path: Path) -> None:
    save_pair_texts(tmp_path / "a.json", texts())
    assert load_pair_texts(tmp_path / "a.json") == texts()
    turned = dataclasses.replace(texts(), pairs=dict(reversed(texts().pairs.items())))
    save_pair_texts(tmp_path / "b.json", turned)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert list(record["pairs"]) == ["cat|fox", "hot dog|bun"] and record["classes"] == list(CLASSES)
    assert record["pairs"]["cat|fox"]["difference_ab"] == ["it has stripes", "long whiskers"]


def test_a_bar_or_backslash_in_a_class_name_survives(tmp_path: Path) -> None:
    names = ("a|b", "c\\", "c\\|d", "|")
    pairs = {(a, b): text() for i, a in enumerate(names) for b in names[i + 1 :]}
    odd = PairTexts("odd", "all", names, pairs)
    assert len({pair_key(*pair) for pair in pairs}) == len(pairs)
    save_pair_texts(tmp_path / "odd.json", odd)
    assert load_pair_texts(tmp_path / "odd.json").pairs == pairs


def test_names_are_compared_after_normalisation() -> None:
    pairs, findings = parse_pairs(
        {"cafe\u0301 | \u200btea": text()._asdict() | {"commonality": ["x"]}}, ("café", "tea")
    )
    assert not pairs and "no list" in str(findings[0])  # the other two are tuples, not lists
    lists = {kind: list(sentences) for kind, sentences in text()._asdict().items()}
    pairs, findings = parse_pairs({"cafe\u0301 | \u200btea": {**lists, "reasoning": "both hot"}}, ("café", "tea"))
    assert list(pairs) == [("café", "tea")] and not findings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "capt.few_shot"}, "version 1"),
        ({"version": 2}, "version 1"),
        ({"split": "train"}, "'split'"),
        ({"classes": None}, "'classes'"),
        ({"pairs": []}, "'pairs'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_pair_texts(tmp_path / "a.json", texts())
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) | change
    (tmp_path / "a.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=message):
        load_pair_texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"cat-fox": {}}, "two class names"),
        ({"cat|fox|bun": {}}, "two class names"),
        ({"cat|fox": []}, "'commonality' is absent"),
        ({"cat|fox": {"commonality": ["x"], "difference_ab": ["y"]}}, "'difference_ba' is absent"),
        ({"cat|fox": {"commonality": "x", "difference_ab": ["y"], "difference_ba": ["z"]}}, "'commonality' is"),
        ({"cat|fox": {"commonality": [], "difference_ab": ["y"], "difference_ba": ["z"]}}, "0 texts"),
        ({"cat|fox": {"commonality": [3], "difference_ab": ["y"], "difference_ba": ["z"]}}, "found 3"),
        ({"cat|ox": {"commonality": ["x"], "difference_ab": ["y"], "difference_ba": ["z"]}}, "did you mean 'fox'"),
    ],
)
def test_loading_names_pair_and_problem(tmp_path: Path, pairs: dict[str, Any], message: str) -> None:
    save_pair_texts(tmp_path / "a.json", texts())
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) | {"pairs": pairs}
    (tmp_path / "a.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_pair_texts(tmp_path / "a.json")
    assert next(iter(pairs)) in str(caught.value)


def test_nothing_is_written_when_texts_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 1 to 16"):
        save_pair_texts(tmp_path / "a.json", texts({("cat", "fox"): PairText((), ("y",), ("z",))}))
    assert not list(tmp_path.iterdir())


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_sound_texts_have_no_finding() -> None:
    assert problems(texts().pairs, forbidden_classes=("dog", "wolf"), selectable=[[0, 1], [2, 3]]) == []


def test_pairs_with_wrong_names_or_order_are_found() -> None:
    [(kind, what)] = problems({("fox", "cat"): text()})
    assert kind == "order" and "'fox|cat'" in what and "is reversed" in what
    found = problems({("fox", "cat"): text(), ("cat", "fox"): text()})
    assert [kind for kind, _ in found] == ["order"] and "beside 'cat|fox'" in found[0][1]
    assert problems({("cat", "cat"): text()})[0][0] == "order"
    assert problems({("cat", "cow"): text()})[0][0] == "class"
    other = dataclasses.replace(texts({}), classes=("cat", "lynx"))
    assert [(f.kind, f.pair) for f in validate_pair_texts(other, CLASSES)] == [("class", "lynx")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (text()._replace(commonality=()), "commonality has 0 texts"),
        (text()._replace(difference_ba=tuple(map(str, range(17)))), "difference_ba has 17 texts"),
        (text()._replace(difference_ab=("fine", " \u200b")), "difference_ab, text 2 is empty"),
        (text()._replace(commonality=("fine", None)), "commonality, text 2: expected text, found None"),
        (text()._replace(difference_ab=("x", "y"), difference_ba=("y", "x")), "the same texts"),
    ],
)
def test_unusable_texts_are_found(bad: PairText, message: str) -> None:
    [(kind, what)] = problems({("cat", "fox"): bad})
    assert kind == "text" and what.startswith("'cat|fox': ") and message in what


def test_12_selectable_pairs_without_texts_are_listed_and_are_no_error() -> None:
    found = problems({("cat", "fox"): text()}, selectable=[[0, 1], [0, 3], [1, 2]])
    assert [(kind, what.split(":")[0]) for kind, what in found] == [
        ("missing", "'cat|bun'"),
        ("missing", "'fox|hot dog'"),
    ]
    save = texts({("cat", "fox"): text()})
    assert validate_pair_texts(save, CLASSES) == []


@pytest.mark.parametrize(
    ("sentence", "leaks"),
    [
        ("stripes like a tiger", ["tiger"]),
        ("Stripes like a TIGER's.", ["tiger"]),
        ("stripes, as tigers have", ["tiger"]),
        ("a tigerish look", []),
        ("a hot dog in a bun", []),
        ("Hot-dogs in a bun", []),
        ("a hot dog is no dog", ["dog"]),
        ("hot, like dogs", ["dog"]),
        ("a hot dog stand", ["hot dog stand"]),
        ("a wineglass beside it", ["wine glass"]),
        ("wine glasses beside it", ["wine glass"]),
        ("wine in a glass", []),
        ("made from a corn", []),
        ("a peanut on top", ["peanuts"]),
        ("two loaves of bread", ["loaf of bread"]),
        ("strawberries on top", ["strawberry"]),
        ("in running shoes", ["running shoe"]),
        ("a mans shoe", ["man's shoe"]),
        ("a t-shirt or T shirts", ["t shirt"]),
    ],
)
def test_13_a_text_that_names_a_novel_class_is_found(sentence: str, leaks: list[str]) -> None:
    novel = ("tiger", "dog", "hot dog stand", "wine glass", "acorn", "peanuts", "loaf of bread", "strawberry",
             "running shoe", "man's shoe", "t shirt")  # fmt: skip
    found = problems({("hot dog", "bun"): text()._replace(difference_ab=(sentence, "y"))}, forbidden_classes=novel)
    assert [kind for kind, _ in found] == ["leak"] * len(leaks)
    assert all(
        f"{name!r}" in what and "difference_ab, text 1" in what for name, (_, what) in zip(leaks, found, strict=True)
    )


def test_13_only_the_names_of_the_pair_itself_excuse_a_mention() -> None:
    mention = text()._replace(commonality=("sold beside a hot dog",))
    assert [kind for kind, _ in problems({("cat", "fox"): mention}, forbidden_classes=["dog"])] == ["leak"]
    assert problems({("hot dog", "bun"): mention}, forbidden_classes=["dog"]) == []


def test_name_finder_reports_where_a_name_stands() -> None:
    finder = NameFinder(["ice cream", "cream"])
    assert finder.spans("Some ice-creams with cream") == {(1, 3, "ice cream"), (2, 3, "cream"), (4, 5, "cream")}
    assert NameFinder([]).spans("anything") == set()


def test_13_texts_that_do_not_fit_the_text_tower_are_found_with_their_pair() -> None:
    backbone = tiny.backbone()
    assert length_findings(texts(), backbone.tokenize) == []
    long = texts({("cat", "fox"): text(), ("hot dog", "bun"): text()._replace(difference_ba=("fine", "long " * 40))})
    [finding] = length_findings(long, backbone.tokenize)
    assert (finding.kind, finding.pair) == ("length", "hot dog|bun") and "difference_ba, text 2" in finding.problem
