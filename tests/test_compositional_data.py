"""Compositional data: pair lists, seen and unseen, what is refused, and the layouts of the published data sets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from capt.cli import main
from capt.data import CompositionalSet, load, load_compositional
from capt.data.compositional import build_compositional
from capt.data.sources import MemorySource
from capt.errors import DataError
from tests.data_files import save

ROWS = [
    ("a.png", "red", "heart", "train"),
    ("b.png", "blue", "book", "train"),
    ("c.png", "red", "heart", "val"),
    ("d.png", "red", "book", "val"),
    ("e.png", "blue", "book", "test"),
    ("f.png", "blue", "heart", "test"),
]


def table(folder: Path, rows: list[tuple[str, ...]] = ROWS, name: str = "list.csv") -> Path:
    for number, row in enumerate(rows):
        save(folder / row[0], number)
    if name.endswith(".jsonl"):
        keys = ("path", "state", "object", "split")
        text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        text = "".join(separator.join(row) + "\n" for row in [("path", "state", "object", "split"), *rows])
    (folder / name).write_text(text)
    return folder / name


def tiny(**changes: dict) -> CompositionalSet:
    lists = {"train": [("red", "heart"), ("blue", "book")], "val": [("red", "book")], "test": [("blue", "heart")]}
    members = {split: [(f"{split}{place}", pair) for place, pair in enumerate(lists[split])] for split in lists}
    for split, pairs in changes.get("lists", {}).items():
        lists[split] = pairs
    for split, images in changes.get("members", {}).items():
        members[split] = images
    return build_compositional("tiny", lists, members, MemorySource({}))


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl"])
def test_19_a_list_gives_sorted_primitives_and_pairs_with_seen_and_unseen(tmp_path, name):
    data = load_compositional(table(tmp_path, name=name))
    assert data.name == "list" and data.states == ("blue", "red") and data.objects == ("book", "heart")
    assert data.data.classes == ("blue book", "blue heart", "red book", "red heart")
    assert data.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert {split: listed.tolist() for split, listed in data.split_pairs.items()} == {
        "train": [0, 3], "val": [2, 3], "test": [0, 1],
    }  # fmt: skip
    assert data.seen.tolist() == [True, False, False, True]
    assert [data.train.labels.tolist(), data.val.labels.tolist(), data.test.labels.tolist()] == [[3, 0], [3, 2], [0, 1]]
    assert data.train.image(0).size == (8, 6)
    assert data.counts()["test"] == {"seen_pairs": 1, "unseen_pairs": 1, "seen_images": 1, "unseen_images": 1}
    assert not data.pairs.flags.writeable and not data.seen.flags.writeable
    record = data.record()
    assert (record["states"], record["objects"], record["classes"]) == (2, 2, 4) and json.dumps(record)
    assert str(tmp_path) not in json.dumps(record)


def test_rows_in_another_order_change_ids_but_no_pair(tmp_path):
    data, shuffled = load_compositional(table(tmp_path)), random.Random(0).sample(ROWS, len(ROWS))
    other = load_compositional(table(tmp_path, shuffled, "other.csv"), name="list")
    assert data.pairs.tolist() == other.pairs.tolist()
    assert all(np.array_equal(data.split_pairs[split], other.split_pairs[split]) for split in data.split_pairs)


def test_the_fingerprint_stays_and_sees_every_change():
    same, other = tiny().fingerprint(), set()
    assert tiny().fingerprint() == same == "c9a164e1cdc5b97b055ec387c209d66e"
    other.add(tiny(lists={"val": [("red", "book"), ("red", "heart")]}).fingerprint())
    other.add(tiny(lists={"train": [("blue", "book"), ("red", "heart")]}).fingerprint())
    other.add(tiny(members={"val": [("other", ("red", "book"))]}).fingerprint())
    other.add(tiny(members={"test": [("test0", ("red", "book"))]}).fingerprint())
    assert len(other | {same}) == 5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("e.png", "blue", "book", ""), "line 6: the split '' is none of"),
        (("e.png", "", "book", "test"), "line 6: the class name '' is empty"),
        (("e.png", "green", "book", "test"), "the state 'green' of the test pair .* is in no training pair"),
        (("e.png", "blue", "tree", "test"), "the object 'tree' of the test pair .* is in no training pair"),
        (("a.png", "blue", "book", "test"), "line 6: 'a.png' is already listed in line 2"),
        (("../e.png", "blue", "book", "test"), "line 6: the path '../e.png' leaves"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changed, words):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=words):
        load_compositional(table(tmp_path / "in", [*ROWS[:4], changed, ROWS[5]]))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_needs_images(tmp_path, split):
    with pytest.raises(DataError, match=f"the split '{split}' has no pair; expected all of train, val and test"):
        load_compositional(table(tmp_path, [row for row in ROWS if row[3] != split]))
    with pytest.raises(DataError, match=f"the split '{split}' has no image"):
        tiny(members={split: []})


def test_a_list_needs_its_four_columns_in_every_row(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.png,cat\n")
    with pytest.raises(DataError, match=r"no column 'state'; found path, label; expected path,state,object\[,split\]"):
        load_compositional(tmp_path / "list.csv")
    save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"path": "a.png", "state": "red", "object": "heart"}\n')
    with pytest.raises(DataError, match="line 1: no split"):
        load_compositional(tmp_path / "list.jsonl")


def test_pairs_of_one_name_are_refused():
    pairs = [("light", "blue car"), ("light blue", "car"), ("light", "car"), ("light blue", "blue car")]
    with pytest.raises(DataError, match=r"\('light', 'blue car'\) and \('light blue', 'car'\) are both called"):
        tiny(lists={"train": pairs, "val": pairs[2:], "test": pairs[2:]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lists": {"val": [("red", "book")] * 2}}, r"val lists the pair \('red', 'book'\) twice"),
        ({"lists": {"test": [("green", "heart")]}}, "the state 'green' of the test pair"),
        ({"lists": {"val": [("red", "tree")]}}, "the object 'tree' of the val pair"),
        ({"members": {"val": [("x", ("green", "book"))]}}, "the val image 'x' shows the unknown state 'green'"),
        ({"members": {"val": [("x", ("red", "tree"))]}}, "the val image 'x' shows the unknown object 'tree'"),
        ({"members": {"val": [("test0", ("red", "book"))]}}, "the image 'test0' is listed twice"),
        ({"members": {"train": [("x", ("red", "book"))]}}, r"the pair \('red', 'book'\) is unseen, .* image 'x' shows"),
        (
            {"lists": {"test": [("red", "heart")]}, "members": {"test": [("x", ("blue", "heart"))]}},
            r"the test image 'x' shows the pair \('blue', 'heart'\), which no pair list has",
        ),
    ],
)
def test_pair_lists_and_images_that_do_not_fit_are_named(changes, words):
    with pytest.raises(DataError, match=words):
        tiny(**changes)


def test_an_image_stays_in_its_split_when_only_another_list_has_its_pair():
    data = tiny(members={"test": [("x", ("red", "book"))]})
    assert data.test.names == ["x"] and data.data.classes[data.test.labels[0]] == "red book"


@pytest.mark.parametrize("spec", ["emoji-pairs", "czsl:cgqa"])
def test_a_compositional_set_where_classes_are_needed_is_named_as_such(spec, tmp_path):
    with pytest.raises(DataError, match="but a compositional data set, for load_compositional, 'capt fit msci'"):
        load(spec, root=tmp_path)


def test_unknown_specs_and_options_say_what_there_is(tmp_path):
    with pytest.raises(DataError, match="no compositional data set"):
        load_compositional("emoji")
    with pytest.raises(DataError, match="unknown option 'shots'; this format takes root, check_files"):
        load_compositional(table(tmp_path), shots=3)
    data = tiny()
    assert load_compositional(data) is data


def test_capt_data_check_reads_pair_lists(tmp_path, capsys):
    for name in ("list.csv", "list.jsonl"):
        assert main(["data", "check", str(table(tmp_path, name=name))]) == 0
        assert "list: 2 states, 2 objects, 4 pairs (2 seen)" in capsys.readouterr().out
    rows = [row for row in ROWS if row[0] != "f.png"]
    assert main(["data", "check", str(table(tmp_path, rows)), "--lists-only"]) == DataError.exit_code
    assert "problem: test: no image of unseen pairs" in capsys.readouterr().out
