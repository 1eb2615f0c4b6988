"""The shipped emoji set: complete, split by vendor, under known licences, and every file what the index says."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from capt.files import read_json, sha256

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "capt" / "assets" / "emoji"
INDEX = read_json(EMOJI / "index.json")
VENDORS = {vendor["name"]: vendor for vendor in INDEX["vendors"]}
KEYS = [entry["key"] for entry in INDEX["classes"]]
ALLOWED = {"Apache-2.0", "MIT", "CC-BY-4.0"}
HEADINGS = {"Apache-2.0": "Apache License 2.0", "MIT": "MIT License", "CC-BY-4.0": "Creative Commons Attribution 4.0"}


def test_the_set_is_small_enough_to_ship_and_has_no_stray_files() -> None:
    present = {path.name for path in EMOJI.iterdir()}
    texts = {"pair_texts_base.json", "pair_texts_novel.json"}
    assert present == {"index.json", "ATTRIBUTION.md", *texts, *(f"{name}.tar" for name in VENDORS)}
    assert sum(path.stat().st_size for path in EMOJI.iterdir()) <= 20_000_000


def test_there_are_enough_classes_in_alphabetical_order() -> None:
    names = [entry["name"] for entry in INDEX["classes"]]
    assert len(names) >= 300
    assert names == sorted(names) and len(set(names)) == len(names) and len(set(KEYS)) == len(KEYS)
    assert all(name == name.strip() and name for name in names)


def test_every_group_has_classes_to_confuse() -> None:
    assert min(Counter(entry["group"] for entry in INDEX["classes"]).values()) >= 3


def test_every_vendor_draws_every_class() -> None:
    expected = {(vendor, key, number) for vendor in VENDORS for number, key in enumerate(KEYS)}
    found = [(image["vendor"], image["key"], image["class"]) for image in INDEX["images"]]
    assert len(found) == len(set(found)) and set(found) == expected
    assert all(vendor["images"] == len(KEYS) for vendor in VENDORS.values())


def test_train_and_test_share_no_vendor() -> None:
    sides = {side: {name for name, vendor in VENDORS.items() if vendor["split"] == side} for side in ("train", "test")}
    assert len(INDEX["vendors"]) == len(VENDORS) and sides["train"] | sides["test"] == set(VENDORS)
    assert len(sides["train"]) >= 4 and len(sides["test"]) >= 2
    packages = {side: {VENDORS[name]["package"] for name in names} for side, names in sides.items()}
    assert not packages["train"] & packages["test"]


def test_licences_are_permissive() -> None:
    assert {vendor["license"] for vendor in VENDORS.values()} <= ALLOWED


def test_the_credits_name_every_vendor_and_licence() -> None:
    text = (EMOJI / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    credited = {row[0]: row for row in rows[2:]}
    assert set(credited) == set(VENDORS)
    for name, vendor in VENDORS.items():
        _, images, authors, licence, package, link = credited[name]
        assert (int(images), licence) == (vendor["images"], vendor["license"])
        assert package == f"`{vendor['package']}` {vendor['version']}" and authors and "https://" in link
    headings = re.findall(r"^## .*: (.+)$", text, re.MULTILINE)
    assert {HEADINGS[vendor["license"]] for vendor in VENDORS.values()} <= set(headings)


@pytest.mark.parametrize("name", list(VENDORS))
def test_each_tar_holds_what_the_index_says(name: str) -> None:
    path = EMOJI / f"{name}.tar"
    assert sha256(path) == VENDORS[name]["sha256"]
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert set(members) == {f"{key}.{kind}" for key in KEYS for kind in ("cls", "webp")}
    assert all(int(members[f"{key}.cls"]) == number for number, key in enumerate(KEYS))
    assert len({members[f"{key}.webp"] for key in KEYS}) == len(KEYS)  # no drawing stands for two classes
    for key in KEYS[::30]:
        image = Image.open(io.BytesIO(members[f"{key}.webp"]))
        assert (image.format, image.size) == ("WEBP", (224, 224))
        assert len(image.convert("RGB").getcolors(224 * 224) or ()) > 2  # something is drawn


def test_the_list_that_is_edited_by_hand_gives_these_classes() -> None:
    listed, group = {}, ""
    for line in (ROOT / "scripts" / "data" / "emoji_concepts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = line.strip("[] ")
        elif line.strip() and not line.startswith("#"):
            key, _, name = (part.strip() for part in line.partition(":"))
            listed[key] = (name or key.replace("-", " "), group)
    assert listed == {entry["key"]: (entry["name"], entry["group"]) for entry in INDEX["classes"]}
