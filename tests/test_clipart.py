"""The shipped multi-label set: public domain, long-tailed, split without leaks, every file what the index says."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from capt.cli import main
from capt.data import load_multi_label
from capt.data.readers.clipart import read_clipart
from capt.errors import DamagedFileError, DataError
from capt.files import read_json, sha256

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "capt" / "assets" / "clipart"
INDEX = read_json(FOLDER / "index.json")
DATA = load_multi_label("clipart")
CLASS = {name: number for number, name in enumerate(DATA.classes)}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "scripts"))
    import build_clipart

    yield build_clipart
    sys.path.remove(str(ROOT / "scripts"))
    for name in set(sys.modules) - before:
        if str(ROOT / "scripts") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def fitted() -> set[str]:
    manifest = read_json(ROOT / "capt" / "assets" / "model" / "fit_manifest.json")
    return {entry["path"] for entry in manifest["clip_art"]}


def test_the_set_is_small_enough_to_ship_and_has_no_stray_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "index.json", "ATTRIBUTION.md", "train.tar", "val.tar", "test.tar",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 14_000_000


def test_it_is_long_tailed_and_every_class_can_be_trained_and_measured() -> None:
    groups = DATA.groups()
    assert [len(ids) for ids in vars(groups).values()] == [8, 44, 93]
    assert DATA.train.counts.min() >= 3 and DATA.test.counts.min() >= 5
    assert DATA.frequency[groups.head].min() >= 100 and DATA.frequency[groups.tail].max() < 20
    assert DATA.train.unlabelled == DATA.val.unlabelled == DATA.test.unlabelled == 0


def test_the_counts_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    known = fitted()
    for split, counts in DATA.counts().items():
        in_fit = sum(bool(known & set(e["files"])) for e in INDEX["images"] if e["split"] == split)
        row = (split, counts["images"], counts["labels"], f"{counts['labels_per_image']:.2f}",
               counts["classes_without_positive"], in_fit)  # fmt: skip
        assert f"| {' | '.join(f'{x:,}' if isinstance(x, int) else x for x in row)} |" in text
    groups = DATA.groups()
    for name, ids in vars(groups).items():
        shown = f"| {name} | {len(ids)} | {DATA.frequency[ids].min()} to {DATA.frequency[ids].max()} |"
        assert shown in text, shown


def test_the_credits_name_the_package_and_every_author_and_all_pictures() -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").rsplit(" | ", 1) for line in text.splitlines() if line.startswith("| ")][2:]
    assert sum(int(count) for _, count in rows) == len(INDEX["images"]) and ("Nicu Buculei" in dict(rows))
    assert "public domain" in text and INDEX["package"]["license"] == "public domain"
    assert f"`{INDEX['package']['package']}` {INDEX['package']['version']}" in text


@pytest.mark.parametrize("tar", INDEX["tars"], ids=lambda tar: tar["name"])
def test_each_tar_is_the_file_of_the_index(tar: dict) -> None:
    assert sha256(FOLDER / f"{tar['name']}.tar") == tar["sha256"]
    assert len(DATA.splits()[tar["name"]]) == tar["images"]


def test_a_picture_of_a_kind_shows_the_kinds_above_it() -> None:
    kinds = {
        "dog": "mammal",
        "mammal": "animal",
        "pear": "fruit",
        "fruit": "food",
        "signal flag": "flag",
        "man": "person",
    }
    for below, above in kinds.items():
        for images in DATA.splits().values():
            assert (images.targets[:, CLASS[below]] <= images.targets[:, CLASS[above]]).all()


def test_pictures_are_what_the_reader_promises() -> None:
    for images in DATA.splits().values():
        for index in range(0, len(images), 90):
            picture = images.image(index)
            assert (picture.size, picture.mode) == ((192, 192), "RGB")
            assert np.asarray(picture).std() > 2


def test_the_seed_gives_these_splits_and_near_copies_stand_on_one_side(script: ModuleType) -> None:
    entries = {(entry["split"], entry["key"]): entry for entry in INDEX["images"]}
    pictures, splits = [], []
    for split in DATA.splits():
        with tarfile.open(FOLDER / f"{split}.tar") as tar:
            for member in tar:
                entry = entries[split, member.name.removesuffix(".webp")]
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                pictures.append(script.Picture(data, entry["files"], labels=set(entry["labels"])))
                splits.append(split)
    files = [file for picture in pictures for file in picture.paths]
    assert len(files) == len(set(files)) and len({picture.data for picture in pictures}) == len(pictures)
    script.group_alike(pictures)
    sides: dict[int, set[str]] = {}
    for picture, split in zip(pictures, splits, strict=True):
        sides.setdefault(picture.group, set()).add(split)
    assert all(len(found) == 1 for found in sides.values()) and len(sides) < len(pictures)
    script.choose_splits(pictures)
    assert [picture.split for picture in pictures] == splits


def test_colours_make_no_difference_to_likeness(script: ModuleType) -> None:
    def shape(colour: str, box: tuple[int, ...]) -> object:
        image = Image.new("RGB", (192, 192), "white")
        image.paste(colour, box)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP")
        return script.Picture(buffer.getvalue())

    pictures = [shape("red", (40, 40, 120, 150)), shape("navy", (40, 40, 120, 150)), shape("red", (90, 20, 170, 80))]
    script.group_alike(pictures)
    assert pictures[0].group == pictures[1].group != pictures[2].group


def test_the_list_that_is_edited_by_hand_has_every_class_and_finds_what_it_should(
    script: ModuleType,
) -> None:
    categories, taken = script.read_categories()
    names = [category.name for category in categories]
    assert set(DATA.classes) <= set(names) and [name for name in names if name in CLASS] == list(DATA.classes)
    records = [
        {"path": "animals/a_dog_01.svg", "title": "Hund", "keywords": [], "author": "A"},
        {"path": "food/hot_dog_01.svg", "title": "Hot Dog", "keywords": ["food"], "author": "A"},
        {"path": "x/y.svg", "title": "Yellow Pears", "keywords": ["hash"], "author": "A"},
        {"path": "x/zzz.svg", "title": "nothing", "keywords": ["Unsorted"], "author": "A"},
    ]
    shown = script.label(records, categories, taken)
    found = {path: {names[number] for number in numbers} for path, numbers in shown.items()}
    assert found["animals/a_dog_01.svg"] == {"dog", "mammal", "animal"}
    assert {"food", "fast food"} <= found["food/hot_dog_01.svg"] and "dog" not in found["food/hot_dog_01.svg"]
    assert found["x/y.svg"] == {"pear", "fruit", "food"} and "x/zzz.svg" not in found


def test_test_images_are_mostly_outside_the_fit_of_the_embedded_models() -> None:
    known = fitted()
    share = {
        split: np.mean([bool(known & set(e["files"])) for e in INDEX["images"] if e["split"] == split])
        for split in DATA.splits()
    }
    assert share["test"] < 0.5 < share["train"]


def test_the_fingerprint_is_that_of_the_release() -> None:
    assert DATA.fingerprint() == "f88c8d3bd68c09d917dd2359dc927b50"


def test_capt_data_check_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "clipart", "--lists-only"]) == 0
    shown = capsys.readouterr().out
    assert "clipart: 145 classes (8 head, 44 medium, 93 tail), fingerprint f88c8d3bd68c09d9" in shown


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "set")
    return tmp_path / "set"


def test_a_changed_or_missing_tar_is_damage(copied: Path) -> None:
    with open(copied / "val.tar", "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff")
    with pytest.raises(DamagedFileError, match=r"'val.tar': missing or not the file"):
        read_clipart(copied)
    with open(copied / "val.tar", "r+b") as stream:
        stream.truncate(300_000)
    with pytest.raises(DataError, match=r"shard 'val.tar'"):
        read_clipart(copied, verify=False)
    (copied / "val.tar").unlink()
    with pytest.raises(DamagedFileError, match=r"'val.tar': missing or not the file"):
        read_clipart(copied, verify=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(version=2), "version 2, expected 1"),
        (lambda index: index.pop("classes"), "not an index of this package"),
        (lambda index: index["classes"].pop(), "not an index of this package"),
        (lambda index: index["tars"].pop(), "not an index of this package"),
        (lambda index: index["images"].pop(), "image of the index"),
        (lambda index: index["images"][0].update(split="held out"), "image of the index"),
        (lambda index: index["images"].append({"key": "new", "split": "test", "labels": [0]}), "lacks 'new'"),
    ],
)
def test_an_index_that_does_not_fit_is_damage(copied: Path, change, words: str) -> None:
    index = read_json(copied / "index.json")
    change(index)
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFileError, match=words):
        read_clipart(copied, verify=False)


def test_it_has_its_own_folder_and_takes_no_root_and_no_other_validation_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"root \(--root\): only 'coco-lt', 'voc-lt' and lists of images take it"):
        load_multi_label("clipart", tmp_path)
    with pytest.raises(DataError, match="val_fraction: 'clipart' has 367 validation images"):
        load_multi_label("clipart", val_fraction=0.1)
