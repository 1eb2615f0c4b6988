"""The published compositional data sets, as small made-up copies of their layout."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from capt.cli import main
from capt.data import load_compositional
from capt.data.readers.czsl import LAYOUTS, METADATA, read_czsl
from capt.errors import DataError
from tests.czsl_files import PAIRS, RECORDS, tree
from tests.data_files import save


def open_quietly(root: Path, dataset: str = "mit-states", **options):
    return read_czsl(dataset, root=root, warn=False, **options)


def test_the_set_field_decides_the_split_and_pair_files_never_filter(tmp_path):
    data = open_quietly(tree(tmp_path))
    assert data.name == "MIT-States" and data.states == ("blue", "red") and data.objects == ("book", "coat", "heart")
    assert data.train.names == ["images/red_heart/1.png", "images/blue_book/1.png", "images/blue_coat/1.png"]
    assert data.val.names == ["images/blue_book/2.png", "images/red_book/1.png"]
    assert [name.removeprefix("images/") for name in data.test.names] == [
        "red_heart/2.png", "blue_heart/1.png", "red_coat/1.png", "red_book/2.png",
    ]  # fmt: skip
    assert data.data.classes[data.test.labels[3]] == "red book"
    meta = data.data.meta
    assert meta["images_of_pairs_their_split_does_not_list"] == {"train": 0, "val": 0, "test": 1}
    assert meta["skipped_records"] == {"not_annotated": 2, "pair_in_no_list": 1, "repeated": 1}
    assert data.test.image(0).size == (8, 6)


def test_pairs_are_sorted_and_split_lists_keep_the_order_of_their_files(tmp_path):
    data = open_quietly(tree(tmp_path))
    assert [data.data.classes[pair] for pair in data.split_pairs["train"]] == ["red heart", "blue book", "blue coat"]
    assert list(data.data.classes) == sorted(data.data.classes)
    assert data.pairs.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert [data.data.classes[pair] for pair in range(6) if not data.seen[pair]] == [
        "blue heart",
        "red book",
        "red coat",
    ]
    assert data.counts()["test"] == {"seen_pairs": 1, "unseen_pairs": 2, "seen_images": 1, "unseen_images": 3}


def test_the_fingerprint_stays_wherever_the_data_lies(tmp_path):
    first, second = (open_quietly(tree(tmp_path / place)) for place in ("a", "b"))
    assert first.fingerprint() == second.fingerprint() == "ea36d50d0167914e20108c573a8ee73c"
    record = json.dumps(first.record())
    assert str(tmp_path) not in record and METADATA in record


def test_the_root_may_be_the_data_set_itself(tmp_path):
    tree(tmp_path, dataset="cgqa")
    assert open_quietly(tmp_path, "cgqa").fingerprint() == open_quietly(tmp_path / "cgqa", "cgqa").fingerprint()


@pytest.mark.parametrize("folder", ["old_wet dog", "old wet_dog", "old_wet_dog", "old wet dog"])
def test_folders_may_have_underscores_or_spaces(tmp_path, folder):
    records = [(image.replace("red_heart", "old wet dog"), *rest) for image, *rest in RECORDS[:9]]
    tree(tmp_path, records)
    images = tmp_path / "mit-states" / "images"
    (images / "old wet dog").rename(images / folder)
    if folder in ("old_wet_dog", "old wet dog"):
        assert open_quietly(tmp_path).train.names[0] == f"images/{folder}/1.png"
    else:
        with pytest.raises(DataError, match="2 of 9 images are missing"):
            open_quietly(tmp_path)


@pytest.mark.parametrize("place", ["images", "_images"])
def test_images_of_ut_zappos_may_lie_as_in_its_archive(tmp_path, place):
    records = [(*record, f"Shoes/A b/{number}.png") for number, record in enumerate(RECORDS[:9])]
    tree(tmp_path, records, dataset="ut-zappos", images=False)
    for number in range(9):
        save(tmp_path / "ut-zappos" / place / f"Shoes/A b/{number}.png", number)
    data = open_quietly(tmp_path, "ut-zappos")
    assert data.train.names[0] == f"{place}/Shoes/A b/0.png" and data.train.image(0).size == (8, 6)


def test_missing_images_are_counted_and_named(tmp_path):
    tree(tmp_path)
    (tmp_path / "mit-states/images/red_coat/1.png").unlink()
    (tmp_path / "mit-states/images/blue_book/2.png").unlink()
    with pytest.raises(DataError, match=r"2 of 9 images are missing .*'images/blue_book/2.png', 'images/red_coat/1.p"):
        open_quietly(tmp_path)
    assert len(open_quietly(tmp_path, check_files=False).test) == 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": "x.png", "attr": "red", "obj": "heart"}, "record 3: expected the texts image, attr, obj and set"),
        ({"image": 3, "attr": "red", "obj": "heart", "set": "val"}, "record 3: expected the texts"),
        (["x.png"], "record 3: expected the texts"),
        ({"image": "../x.png", "attr": "red", "obj": "heart", "set": "val"}, "record 3: the path '../x.png' leaves"),
        ({"image": "red_heart/1.png", "attr": "red", "obj": "heart", "set": "val"}, "record 3: .* with another pair"),
        (
            {"image": "x.png", "attr": "red", "obj": "book", "set": "train"},
            r"\('red', 'book'\) is unseen, .* 'images/x",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, changed, words):
    tree(tmp_path)
    path = tmp_path / "mit-states" / METADATA
    torch.save([*torch.load(path)[:3], changed, *torch.load(path)[3:]], path)
    with pytest.raises(DataError, match=words):
        open_quietly(tmp_path, check_files=False)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"train": "red heart\n\nblue book\n"}, r"train_pairs.txt', line 2: expected a state and an object"),
        ({"val": "red big heart\n"}, "val_pairs.txt', line 1: expected a state and an object"),
        ({"val": "red book\nred book\n"}, "val lists the pair .* twice"),
        ({"test": "green heart\n"}, "the state 'green' of the test pair .* is in no training pair"),
        ({"test": ""}, "the split 'test' has no pair"),
    ],
)
def test_bad_pair_files_are_named(tmp_path, pairs, words):
    with pytest.raises(DataError, match=words):
        open_quietly(tree(tmp_path, pairs={**PAIRS, **pairs}))


def test_missing_files_unknown_data_sets_and_a_missing_root_are_named(tmp_path):
    with pytest.raises(DataError, match="unknown data set; there are mit-states, ut-zappos, cgqa"):
        load_compositional("czsl:mit", root=tmp_path)
    with pytest.raises(DataError, match=r"root \(--root\) is missing"):
        load_compositional("czsl:cgqa")
    with pytest.raises(DataError, match=f"lacks the file '{METADATA}', 'compositional-split-natural/train_pairs.txt'"):
        load_compositional("czsl:cgqa", root=tmp_path)
    tree(tmp_path)
    (tmp_path / "mit-states" / METADATA).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=f"'{METADATA}': refused"):
        load_compositional("czsl:mit-states", root=tmp_path)


def test_other_sizes_than_published_warn_and_are_recorded(tmp_path):
    with pytest.warns(UserWarning, match="2 states, expected 115; 3 objects, expected 245; 3 training pairs"):
        data = load_compositional("czsl:mit-states", root=tree(tmp_path))
    assert len(data.record()["differs_from_published"]) == 3


def test_the_published_vocabularies_span_the_published_open_worlds():
    assert [layout.states * layout.objects for layout in LAYOUTS.values()] == [28_175, 192, 278_362]


def test_as_many_pairs_as_the_open_world_of_cgqa_take_seconds(tmp_path):
    pairs = [f"s{state} o{thing}" for state in range(413) for thing in range(674)]
    lists = {"train": "\n".join(pairs[:-2]), "val": pairs[-2], "test": pairs[-1]}
    records = [(f"{n}.png", *pair.split(), split) for n, (pair, split) in enumerate(
        [(pair, "train") for pair in pairs[: 1000]] + [(pairs[-2], "val"), (pairs[-1], "test")])]  # fmt: skip
    tree(tmp_path, records, lists, "cgqa", images=False)
    began = time.perf_counter()
    data = open_quietly(tmp_path, "cgqa", check_files=False)
    assert len(data.pairs) == 278_362 and int(data.seen.sum()) == 278_360
    assert time.perf_counter() - began < 15


def test_capt_data_check_says_what_is_there(tmp_path, capsys):
    root = str(tree(tmp_path))
    assert main(["data", "check", "czsl:mit-states", "--root", root]) == 0
    found = capsys.readouterr().out
    for words in (
        "MIT-States: 2 states, 3 objects, 6 pairs (3 seen)", "note: 2 states, expected 115", "every image can be read",
        "note: 2 records without state or split (NA) were left out", "note: 1 records whose pair is in no pair file",
        "note: 1 test images show a pair that only the file of another split lists; they stay",
    ):  # fmt: skip
        assert words in found
    (tmp_path / "mit-states/images/red_coat/1.png").write_bytes(b"no image")
    assert main(["data", "check", "czsl:mit-states", "--root", root, "--json"]) == DataError.exit_code
    findings = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in findings["bad_images"]] == ["images/red_coat/1.png"]
    assert findings["pairs"]["val"]["unseen_images"] == 1 and findings["states"] == 2


def test_the_table_of_the_page_is_what_is_expected():
    page = (Path(__file__).resolve().parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name, layout in LAYOUTS.items():
        counts = (layout.states, layout.objects, layout.states * layout.objects, layout.seen_pairs)
        assert f"| `{name}` | " + " | ".join(f"{count:,}" for count in counts) + " |" in page
