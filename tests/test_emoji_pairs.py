"""The shipped compositional set: complete, licensed, split without leaks, and every file what the index says."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from capt.data import load_compositional
from capt.data.readers.emoji_pairs import read_emoji_pairs
from capt.errors import DamagedFileError, DataError
from capt.files import read_json, sha256
from tests.test_emoji_set import ALLOWED, HEADINGS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "capt" / "assets" / "emoji_pairs"
INDEX = read_json(FOLDER / "index.json")
VENDORS = {vendor["name"]: vendor for vendor in INDEX["vendors"]}
NOTO = {"noto", "noto-v1"}
DATA = load_compositional("emoji-pairs")


def test_the_set_is_small_enough_to_ship_and_has_no_stray_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"index.json", "ATTRIBUTION.md", *(f"{v}.tar" for v in VENDORS)}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_the_counts_are_those_of_the_documentation() -> None:
    assert (len(DATA.states), len(DATA.objects), len(DATA.pairs), int(DATA.seen.sum())) == (34, 60, 288, 173)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for split, counts in DATA.counts().items():
        assert f"| {split} | " + " | ".join(map(str, counts.values())) + " |" in text


def test_every_state_and_object_is_trained_and_evaluation_has_seen_and_unseen_pairs() -> None:
    trained = DATA.pairs[DATA.seen]
    assert set(trained[:, 0]) == set(range(len(DATA.states))) and set(trained[:, 1]) == set(range(len(DATA.objects)))
    assert all(min(DATA.counts()[split].values()) >= 40 for split in ("val", "test"))
    assert DATA.train.counts[DATA.seen].min() >= 1 and not DATA.train.counts[~DATA.seen].any()


def test_no_unseen_pair_of_one_split_is_listed_by_another() -> None:
    unseen = {split: set(DATA.split_pairs[split][~DATA.seen[DATA.split_pairs[split]]]) for split in ("val", "test")}
    assert not unseen["val"] & unseen["test"]
    assert len(unseen["val"] | unseen["test"]) == int((~DATA.seen).sum())


def test_seen_and_unseen_test_images_come_from_the_same_vendors_and_no_other_split_has_them() -> None:
    sources = {split: np.array(images.sources) for split, images in DATA.data.splits().items()}
    seen = DATA.seen[DATA.test.labels]
    assert set(sources["test"][seen]) == set(sources["test"][~seen]) == NOTO
    assert not set(sources["train"]) & NOTO and set(sources["train"]) == set(sources["val"]) == set(VENDORS) - NOTO


def test_a_style_validates_whole_or_trains_whole() -> None:
    """The two Fluent designs share outlines, so one may not train on a pair that the other validates."""
    sides: dict[int, set[str]] = {}
    for split in ("train", "val"):
        images = getattr(DATA, split)
        for label, vendor in zip(images.labels.tolist(), images.sources, strict=True):
            if vendor.startswith("fluent"):
                sides.setdefault(label, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())


def test_licences_are_permissive_and_credited() -> None:
    assert {vendor["license"] for vendor in VENDORS.values()} <= ALLOWED
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name, vendor in VENDORS.items():
        assert f"| {name} | {vendor['images']} | " in text and f"`{vendor['package']}` {vendor['version']}" in text
        assert HEADINGS[vendor["license"]] in text
    assert DATA.data.meta["vendors"][0].keys() == {"name", "package", "version", "license"}


@pytest.mark.parametrize("name", list(VENDORS))
def test_each_tar_is_the_file_of_the_index_and_no_picture_is_there_twice(name: str) -> None:
    assert sha256(FOLDER / f"{name}.tar") == VENDORS[name]["sha256"]
    with tarfile.open(FOLDER / f"{name}.tar") as tar:
        pictures = [tar.extractfile(member).read() for member in tar if member.name.endswith(".webp")]  # type: ignore[union-attr]
    assert len(pictures) == VENDORS[name]["images"] == len(set(pictures))


def test_pictures_are_what_the_reader_promises() -> None:
    for images in DATA.data.splits().values():
        for index in range(0, len(images), 40):
            picture = images.image(index)
            assert (picture.size, picture.mode) == ((144, 144), "RGB")
            assert len(picture.getcolors(144 * 144) or ()) > 2


def test_darker_tones_have_darker_pictures_by_every_vendor() -> None:
    """A package stored two tones under each other's names; hands show nothing but their tone."""
    order = [f"{tone}-skinned" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    hands = ("thumbs up", "raised hand", "ok hand", "victory hand", "nose", "ear")
    brightness: dict[tuple[str, str], dict[int, float]] = {}
    for images in DATA.data.splits().values():
        for index, (label, vendor) in enumerate(zip(images.labels, images.sources, strict=True)):
            state, thing = (DATA.states[DATA.pairs[label, 0]], DATA.objects[DATA.pairs[label, 1]])
            if state in order and thing in hands:
                mean = float(np.asarray(images.image(index)).mean())
                brightness.setdefault((vendor, thing), {})[order.index(state)] = mean
    assert len({vendor for vendor, _ in brightness}) == len(VENDORS)
    for drawn in brightness.values():
        values = [drawn[tone] for tone in sorted(drawn)]
        assert values == sorted(values, reverse=True)


def test_the_list_that_is_edited_by_hand_and_the_seed_give_these_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import build_emoji_pairs

    pairs = build_emoji_pairs.read_pairs()
    splits = build_emoji_pairs.choose_unseen(pairs)
    for name in ("build_emoji_pairs", "build_emoji", "emoji_sources"):
        sys.modules.pop(name, None)
    expected = [(entry["state"], entry["object"], entry["split"]) for entry in INDEX["classes"]]
    assert [(p.state, p.object, split) for p, split in zip(pairs, splits, strict=True)] == expected


def test_the_fingerprint_is_that_of_the_release() -> None:
    assert DATA.fingerprint() == "4d9e9067c86a1d07dadd51b72ef593a5"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "set")
    return tmp_path / "set"


def test_a_changed_or_missing_tar_is_damage(copied: Path) -> None:
    with open(copied / "noto.tar", "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff")
    with pytest.raises(DamagedFileError, match=r"'noto.tar': missing or not the file"):
        read_emoji_pairs(copied)
    (copied / "noto.tar").unlink()
    with pytest.raises(DamagedFileError, match=r"'noto.tar': missing or not the file"):
        read_emoji_pairs(copied, verify=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(version=2), "version 2, expected 1"),
        (lambda index: index.pop("classes"), "not an index of this package"),
        (lambda index: index["classes"].pop(), "not an index of this package"),
        (lambda index: index["images"].pop(), "the index says None"),
        (lambda index: index["images"][0].update(split="held out"), "the held out image"),
        (lambda index: [entry.update(split="test") for entry in index["classes"]], "a pair of 'test'"),
        (lambda index: index["vendors"].pop(), "more images of the index"),
    ],
)
def test_an_index_that_does_not_fit_is_damage(copied: Path, change, words: str) -> None:
    index = read_json(copied / "index.json")
    change(index)
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFileError, match=words):
        read_emoji_pairs(copied)


def test_it_has_its_own_folder_and_takes_no_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"root \(--root\): only 'czsl:<data set>' and lists of images take it"):
        load_compositional("emoji-pairs", root=tmp_path)
