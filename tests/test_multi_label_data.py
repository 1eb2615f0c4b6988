"""Multi-label data: sets of labels, lists and published layouts, head, medium and tail, hold-out and long tails."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from capt.cli import main
from capt.data import MultiLabelImages, MultiLabelSet, batches, load_multi_label, long_tail
from capt.data.lock import TestLock, lock_test
from capt.data.long_tail import pareto_targets
from capt.data.multi_label import build_multi_label, hold_out
from capt.data.readers.long_tail_lists import LAYOUTS, read_class_file, read_image_list
from capt.data.sources import MemorySource
from capt.errors import DataError
from tests.data_files import picture, save, to_tensor

ROWS = [
    ("a.png", "dog;animal", "train"),
    ("b.png", "animal; traffic light;animal", ""),
    ("c.png", "", "train"),
    ("d.png", "dog", "val"),
    ("e.png", " ;traffic light;", "test"),
]


def table(folder: Path, rows: list[tuple[str, str, str]] = ROWS, name: str = "list.csv") -> Path:
    for number, row in enumerate(rows):
        save(folder / row[0], number)
    if name.endswith(".jsonl"):
        text = ""
        for path, labels, split in rows:
            entry = {"path": path, "labels": labels.split(";")}
            text += json.dumps({**entry, "split": split} if split else entry) + "\n"
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        shown = [(path, labels, split or "train") for path, labels, split in rows]
        text = "".join(separator.join(row) + "\n" for row in [("path", "labels", "split"), *shown])
    (folder / name).write_text(text)
    return folder / name


def made_up(n_images: int = 600, n_classes: int = 12, seed: int = 0) -> MultiLabelImages:
    """Images whose classes are the rarer the later, often together."""
    draws = np.random.default_rng(seed).random((n_images, n_classes))
    targets = draws < 0.6 * 0.75 ** np.arange(n_classes)
    names = [f"{number}.png" for number in range(n_images)]
    return MultiLabelImages([f"class {c}" for c in range(n_classes)], targets, range(n_images), names, MemorySource({}))


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl"])
def test_a_list_gives_a_target_matrix_with_repeated_labels_counted_once(tmp_path, name):
    data = load_multi_label(table(tmp_path, name=name))
    assert isinstance(data, MultiLabelSet) and data.classes == ("animal", "dog", "traffic light")
    assert data.train.targets.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]] and data.train.targets.dtype == np.uint8
    assert data.val.targets.tolist() == [[0, 1, 0]] and data.test.targets.tolist() == [[0, 0, 1]]
    assert data.frequency.tolist() == data.train.counts.tolist() == [2, 1, 1]
    assert data.train.unlabelled == 1 and data.train.names_of(1) == ["animal", "traffic light"]
    assert (data.meta["repeated_labels"], data.meta["classes_without_training_image"]) == (1, 0)
    assert np.concatenate([images.ids for images in data.splits().values()]).tolist() == list(range(5))
    assert data.train.image(0).size == (8, 6)
    assert not data.train.targets.flags.writeable and not data.frequency.flags.writeable
    assert data.counts()["train"] == {
        "images": 3, "labels": 4, "labels_per_image": 1.333, "unlabelled_images": 1, "classes_without_positive": 0,
    }  # fmt: skip
    record = json.dumps(data.record())
    assert str(tmp_path) not in record and data.fingerprint() in record


def test_with_class_names_a_class_may_lack_images_and_numbers_are_positions(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "a.png", "labels": [2, "dog"]}\n{"path": "b.png", "labels": []}\n')
    names = ["dog", "cat", "bird"]
    data = load_multi_label(tmp_path / "list.jsonl", class_names=names, check_files=False)
    assert data.classes == tuple(names) and data.train.targets.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert data.meta["classes_without_training_image"] == 1 and data.val is None and data.test is None
    assert data.groups().tail.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,labels\na.png,dog\nb.png,dog;wolf\n", "line 3: the label 'wolf' is none of the 2 classes"),
        ("path,labels\na.png,7\n", "line 2: the label '7' is none of the 2 classes"),
        ("path,labels\na.png,dog\na.png,cat\n", "line 3: 'a.png' is already listed in line 2"),
        ("path,labels,split\na.png,dog,held\n", "line 2: the split 'held' is none of"),
        ("path,labels\n../a.png,dog\n", "line 2: the path '../a.png' leaves"),
        ("path,labels\n", "found no row"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        load_multi_label(tmp_path / "list.csv", class_names=["dog", "cat"], check_files=False)


@pytest.mark.parametrize("labels", ['"dog;cat"', "[1.5]", "[null]", "7", '{"dog": 1}'])
def test_json_labels_are_a_list_of_names_or_numbers(tmp_path, labels):
    (tmp_path / "list.jsonl").write_text(f'{{"path": "a.png", "labels": {labels}}}\n')
    with pytest.raises(DataError, match=r"line 1: expected a path .* and a list"):
        load_multi_label(tmp_path / "list.jsonl", check_files=False)


def test_no_label_anywhere_and_one_class(tmp_path):
    (tmp_path / "list.csv").write_text("path,labels\na.png,\n")
    with pytest.raises(DataError, match="found no class"):
        load_multi_label(tmp_path / "list.csv", check_files=False)
    data = load_multi_label(tmp_path / "list.csv", class_names=["dog"], check_files=False)
    assert data.train.targets.tolist() == [[0]] and data.record()["groups"] == {"head": 0, "medium": 0, "tail": 1}


def tiny(**changes: list) -> MultiLabelSet:
    members = {"train": [("a", [0, 1]), ("b", [])], "test": [("c", [1])]}
    return build_multi_label("tiny", ["x", "y"], {**members, **changes}, MemorySource({}))


def test_the_fingerprint_stays_and_sees_every_change():
    same = tiny().fingerprint()
    assert tiny().fingerprint() == same == "4c6475f2eb5643a64075e62166c1dbc1"
    other = [
        tiny(train=[("a", [0]), ("b", [])]),
        tiny(train=[("b", []), ("a", [0, 1])]),
        tiny(train=[("a", [0, 1]), ("z", [])]),
        tiny(test=[("c", [0])]),
        tiny(val=[("d", [0])]),
    ]
    assert len({same, *(data.fingerprint() for data in other)}) == 6
    assert tiny(train=[("a", [1, 0, 1]), ("b", [])]).fingerprint() == same


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": [("a", [2])]}, "'a' has the label 2, expected 0 to 1"),
        ({"train": [("a", [-1])]}, "'a' has the label -1"),
        ({"test": [("a", [1])]}, "the image 'a' is listed twice"),
        ({"train": [], "test": []}, "found no image"),
    ],
)
def test_members_that_do_not_fit_are_named(changes, words):
    with pytest.raises(DataError, match=words):
        tiny(**changes)


def test_targets_must_fit_names_and_classes():
    for targets, words in (([[1]], "expected \\[1, 2\\]"), ([[1, 2]], "other than 0 and 1"), ([1, 0], "found shape")):
        with pytest.raises(DataError, match=words):
            MultiLabelImages(["x", "y"], targets, [0], ["a"], MemorySource({}))
    assert MultiLabelImages(["x", "y"], [[True, False]], [0], ["a"], MemorySource({})).targets.tolist() == [[1, 0]]


def test_batches_carry_target_rows_and_the_lock_keeps_test_images_shut():
    images = {name: picture(number) for number, name in enumerate("abc")}
    members = {"train": [("a", [0, 1]), ("b", [])], "test": [("c", [1])]}
    data = build_multi_label("tiny", ["x", "y"], members, MemorySource(images))
    (batch,) = batches(data.train, to_tensor, batch_size=4)
    assert batch.labels.dtype == torch.uint8 and batch.labels.tolist() == [[1, 1], [0, 0]]
    lock = TestLock()
    locked = lock_test(data, lock)
    assert isinstance(locked.test, MultiLabelImages) and locked.fingerprint() == data.fingerprint()
    with pytest.raises(DataError, match="the test split is locked"):
        locked.test.image(0)
    with lock.opened():
        assert locked.test.image(0).size == (8, 6)


def test_a_subset_keeps_ids_targets_and_classes():
    images = made_up(20)
    part = images.subset([3, 7], meta={"why": "test"})
    assert isinstance(part, MultiLabelImages) and part.ids.tolist() == [3, 7]
    assert np.array_equal(part.targets, images.targets[[3, 7]]) and part.meta["why"] == "test"


def test_30_groups_at_their_boundaries():
    frequency = [0, 19, 20, 99, 100, 101]
    members = [(f"{c} {n}", [c]) for c, count in enumerate(frequency) for n in range(count)]
    data = build_multi_label("made up", [str(c) for c in range(6)], {"train": members}, MemorySource({}))
    groups = data.groups()
    assert [ids.tolist() for ids in vars(groups).values()] == [[4, 5], [2, 3], [0, 1]]
    assert data.groups((101, 0)).head.tolist() == [5] and data.groups((101, 0)).tail.tolist() == []
    with pytest.raises(DataError, match=r"thresholds: found \(20, 100\)"):
        data.groups((20, 100))


def lists(root: Path, dataset: str, *, train: str | None = None, test: str = "x/1.png 0\n", labels: str = "") -> Path:
    """A made-up copy of a published data set: the published frequencies on other images, dealt out in turn."""
    layout = LAYOUTS[dataset]
    folder = root / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    if train is None:
        rows: list[list[int]] = [[] for _ in range(layout.train)]
        place = 0
        for label, count in enumerate(layout.frequency):
            for _ in range(count):
                rows[place % layout.train].append(label)
                place += 1
        train = "\n".join(f"train/{n:06d}.jpg {' '.join(map(str, row))} " for n, row in enumerate(rows))
    labels = labels or "".join(f"thing {number} {number}\n" for number in range(len(layout.frequency)))
    for what, text in (("train", train), ("test", test), ("labels", labels)):
        (folder / layout.files[what]).write_bytes(text.encode())
    return root


@pytest.mark.parametrize(("dataset", "sizes"), [("coco-lt", (22, 33, 25)), ("voc-lt", (6, 6, 8))])
def test_30_frequencies_are_counted_in_the_training_list_and_give_the_published_groups(tmp_path, dataset, sizes):
    layout = LAYOUTS[dataset]
    test = "\n".join(f"test/{number}.jpg {number % 5 or ''}" for number in range(layout.test))
    root = lists(tmp_path, dataset, test=test)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_multi_label(dataset, root, check_files=False)
    assert tuple(data.frequency) == layout.frequency == tuple(data.train.counts)
    assert tuple(len(ids) for ids in vars(data.groups()).values()) == sizes
    assert (len(data.train), len(data.test), data.val) == (layout.train, layout.test, None)
    assert data.test.unlabelled == -(-layout.test // 5) and "differs_from_published" not in data.meta
    assert sorted(data.meta["sha256"]) == sorted(layout.files.values())
    assert load_multi_label(dataset, root / layout.folder, check_files=False).fingerprint() == data.fingerprint()
    held = load_multi_label(dataset, root, check_files=False, val_fraction=0.2, split_seed=3)
    assert np.array_equal(held.frequency, data.frequency) and len(held.train) + len(held.val) == layout.train
    assert held.test.fingerprint() == data.test.fingerprint() and held.meta["hold_out"] == {"fraction": 0.2, "seed": 3}


def test_30_the_totals_of_the_published_training_lists():
    assert [sum(LAYOUTS[name].frequency) for name in ("coco-lt", "voc-lt")] == [8316, 2346]
    assert [max(LAYOUTS[name].frequency) for name in ("coco-lt", "voc-lt")] == [1128, 775]


def test_29_the_list_parser_takes_lists_as_people_have_them(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa/1.jpg 3 1 \r\n./b/2.jpg\r\n\r\nc/3.jpg 0 2 0 2".encode())
    assert read_image_list(path, 4) == [("a/1.jpg", [3, 1]), ("b/2.jpg", []), ("c/3.jpg", [0, 2, 0, 2])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg 0\nb.jpg 4\n", "line 2: the class number '4' is none of 0 to 3"),
        ("a.jpg -1\n", "line 1: the class number '-1'"),
        ("a.jpg 1.0\n", "line 1: the class number '1.0'"),
        ("a.jpg dog\n", "line 1: the class number 'dog'"),
        ("a.jpg 0\na.jpg 1\n", "line 2: 'a.jpg' is already listed in line 1"),
        ("/a.jpg 0\n", "line 1: the path '/a.jpg' is absolute"),
        ("\n \n", "the file is empty"),
    ],
)
def test_29_a_bad_line_is_named(tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        read_image_list(tmp_path / "list.txt", 4)


def test_29_class_names_may_have_several_words_and_stand_in_any_order(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("traffic light 1\nperson 0\r\nold teddy bear 2")
    assert read_class_file(path) == ("person", "traffic light", "old teddy bear")
    for text, words in (
        ("person\n", "line 1: expected a class name and its number, found 'person'"),
        ("0\n", "line 1: expected a class name"),
        ("person 0\ndog 0\n", "line 2: the number 0 is given to 'person' already"),
        ("person 0\ndog 2\n", "no class has the number 1"),
        ("person 0\nperson 1\n", "are the same text"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_class_file(path)


def test_other_numbers_than_published_are_warned_of_and_recorded(tmp_path):
    root = lists(tmp_path, "voc-lt", train="x/2.png 0 0 1\nx/3.png 1")
    with pytest.warns(UserWarning, match="2 training images, expected 1,142; 1 test images"):
        data = load_multi_label("voc-lt", root, check_files=False)
    assert data.meta["repeated_labels"] == 1 and data.frequency[:3].tolist() == [1, 2, 0]
    assert "first 'thing 0': 1, expected 6" in data.meta["differs_from_published"][-1]


def test_missing_files_images_and_root_are_named(tmp_path):
    with pytest.raises(DataError, match=r"root \(--root\) is missing"):
        load_multi_label("coco-lt")
    with pytest.raises(DataError, match=r"lacks 'coco_lt_train.txt', 'coco_lt_test.txt', 'coco_labels.txt'"):
        load_multi_label("coco-lt", tmp_path)
    root = lists(tmp_path, "voc-lt", train="x/2.png 0")
    save(root / "voc" / "x" / "1.png")
    with pytest.raises(DataError, match=r"1 of 2 images are missing in .*: 'x/2.png'"):
        load_multi_label("voc-lt", root)
    save(root / "voc" / "x" / "2.png")
    assert load_multi_label("voc-lt", root, warn=False).train.image(0).size == (8, 6)
    with pytest.raises(DataError, match="no multi-label data set"):
        load_multi_label("emoji")
    with pytest.raises(DataError, match="unknown option 'shots'; this format takes root, class_names"):
        load_multi_label(table(tmp_path), shots=3)


def test_hold_out_keeps_the_share_of_every_class_and_its_last_image():
    images = made_up()
    kept, held = hold_out(images, 0.25, seed=1)
    assert sorted([*kept.ids, *held.ids]) == images.ids.tolist()
    assert np.abs(held.counts - 0.25 * images.counts).max() <= 3
    assert abs(held.unlabelled - 0.25 * images.unlabelled) <= 0.5
    assert kept.counts.min() >= 1
    shuffled = images.subset(random.Random(0).sample(range(len(images)), len(images)))
    assert sorted(hold_out(shuffled, 0.25, seed=1)[1].names) == sorted(held.names)
    assert set(hold_out(images, 0.25, seed=2)[1].names) != set(held.names)
    pairs = MultiLabelImages("xyz", [[1, 1, 1], [1, 1, 0], [0, 0, 1]], range(3), "abc", MemorySource({}))
    for seed in range(20):
        assert hold_out(pairs, 0.9, seed)[0].counts.min() >= 1
    for fraction in (0, 1, -0.5):
        with pytest.raises(DataError, match="val_fraction"):
            hold_out(images, fraction)


def test_a_validation_split_is_never_replaced_and_never_taken_from_the_test(tmp_path):
    with pytest.raises(DataError, match="val_fraction: 'list' has 1 validation images"):
        load_multi_label(table(tmp_path), val_fraction=0.5)
    data = tiny().hold_out(0.5)
    assert len(data.train) + len(data.val) == 2 and data.test.names == ["c"]
    assert load_multi_label(data) is data


def test_a_pareto_target_falls_from_the_largest_to_the_smallest():
    wanted = pareto_targets(80, 1200, 6)
    assert wanted[0] == 1200 and wanted[-1] == 6 and (np.diff(wanted) <= 0).all()
    assert pareto_targets(1, 5, 2).tolist() == [5] and pareto_targets(3, 4, 4).tolist() == [4, 4, 4]
    for arguments in ((0, 5, 1), (3, 1, 2), (3, 5, 0), (3, 5, 1, 0.0)):
        with pytest.raises(DataError, match="long tail: found"):
            pareto_targets(*arguments)


def test_a_long_tail_never_goes_beyond_its_target_and_reaches_most_of_it():
    images = made_up(3000)
    tail = long_tail(images, largest=200, smallest=4, seed=5)
    order = np.argsort(-images.counts, kind="stable")
    wanted = np.minimum(pareto_targets(12, 200, 4), images.counts[order])
    assert (tail.counts[order] <= wanted).all() and tail.counts.min() >= 1 and tail.unlabelled == 0
    assert tail.counts.sum() >= 0.9 * wanted.sum()
    short = {images.classes[c]: int(w - n) for c, w, n in zip(order, wanted, tail.counts[order], strict=True) if n < w}
    assert tail.meta["long_tail"]["short"] == short and tail.meta["long_tail"]["over"] == {}
    assert tail.ids.tolist() == sorted(tail.ids)
    shuffled = images.subset(random.Random(1).sample(range(len(images)), len(images)))
    again = long_tail(shuffled, largest=200, smallest=4, seed=5)
    assert sorted(again.names) == sorted(tail.names)
    assert sorted(long_tail(images, largest=200, smallest=4, seed=6).names) != sorted(tail.names)


def test_a_long_tail_leaves_no_class_without_an_image():
    targets = [[1, 1, 0]] * 3 + [[1, 0, 1]] * 2 + [[1, 0, 0]] * 20 + [[0, 0, 0]]
    images = MultiLabelImages("abc", targets, range(26), [str(n) for n in range(26)], MemorySource({}))
    tail = long_tail(images, largest=1, smallest=1)
    assert tail.counts.tolist() == [2, 1, 1] and tail.meta["long_tail"]["over"] == {"a": 1}


def test_a_class_beyond_its_target_does_not_stop_the_others() -> None:
    targets = [[1, 1, 0, 0]] * 3 + [[1, 0, 1, 0]] * 2 + [[0, 0, 0, 1]] * 30
    images = MultiLabelImages("abcd", targets, range(35), [str(n) for n in range(35)], MemorySource({}))
    tail = long_tail(images, largest=1, smallest=1)
    assert tail.counts.tolist() == [2, 1, 1, 1] and tail.meta["long_tail"]["short"] == {}
    with pytest.raises(DataError, match="seed"):
        long_tail(images, largest=1, seed=0.5)  # type: ignore[arg-type]


def test_capt_data_check_reads_multi_label_lists(tmp_path, capsys):
    for name in ("list.csv", "list.jsonl"):
        assert main(["data", "check", str(table(tmp_path, name=name))]) == 0
        shown = capsys.readouterr().out
        assert "list: 3 classes (0 head, 0 medium, 3 tail)" in shown and "every image can be read" in shown
        assert "note: 1 labels are given to their image twice" in shown
        assert "note: val: no image of 2 of 3 classes, first 'animal'" in shown
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert main(["data", "check", str(tmp_path / "list.csv"), "--json"]) == DataError.exit_code
    found = json.loads(capsys.readouterr().out)
    assert found["bad_images"][0]["image"] == "a.png" and found["labels"]["train"]["unlabelled_images"] == 1
    root = lists(tmp_path / "data", "voc-lt", train="x/2.png 0 0")
    for name in ("1.png", "2.png"):
        save(root / "voc" / "x" / name)
    assert main(["data", "check", "voc-lt", "--root", str(root)]) == 0
    assert "note: 1 training images, expected 1,142" in capsys.readouterr().out
