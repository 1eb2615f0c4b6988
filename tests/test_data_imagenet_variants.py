"""ImageNetV2, -Sketch, -A and -R in CoOp's layout: labels, class names, and what is wrong with a damaged tree."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capt.data import check, load
from capt.data.readers.coop_layouts import LAYOUTS, layout_of
from capt.errors import DataError
from capt.files import sha256
from tests.coop_files import SYNSETS, VARIANTS, imagenet, published, variant
from tests.data_files import save

pytestmark = pytest.mark.filterwarnings("ignore:.*not the published data set")


def full_size(root: Path, dataset: str) -> Path:
    """As many class folders and (empty) image files as the published data set has."""
    layout = LAYOUTS[dataset]
    folder = root / layout.folder
    synsets = [f"n{number:08d}" for number in range(1000)]
    (folder / layout.images).mkdir(parents=True)
    (folder / "classnames.txt").write_text("".join(f"{synset} thing {synset[4:]}\n" for synset in synsets))
    step = 1000 // layout.classes
    for place in range(0, 1000, step):
        inside = folder / layout.images / (str(place) if layout.kind == "numbered" else synsets[place])
        inside.mkdir()
        first, last = (layout.counts[2] * (place // step + end) // layout.classes for end in (0, 1))
        for number in range(first, last):
            (inside / f"{number}.jpeg").touch()
    return folder


@pytest.mark.parametrize("dataset", VARIANTS)
def test_reading(tmp_path, dataset):
    folder = variant(tmp_path, dataset)
    data = load(f"coop:{dataset}", root=tmp_path)
    n_classes = 3 if dataset in ("imagenet-a", "imagenet-r") else 4
    assert data.classes == tuple(SYNSETS.values())[:n_classes]
    assert len(data.train) == 0 and data.val is None and len(data.test) == 2 * n_classes
    assert data.test.labels.tolist() == sorted([*range(n_classes)] * 2)
    assert [Path(name).name for name in data.test.names[:2]] == ["2.jpeg", "10.jpeg"]
    assert data.test.image(2).getpixel((0, 0)) == pytest.approx((52, 52, 52), abs=2)
    assert data.meta["sha256"] == {"classnames.txt": sha256(folder / "classnames.txt")}
    assert data.meta["duplicate_class_names"] == ["sunglasses"]
    assert str(tmp_path) not in str(data.record())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ImageNetV2", "imagenetv2"), ("imagenet-v2", "imagenetv2"), ("ImageNet-Sketch", "imagenet-sketch"),
     ("imagenet_sketch", "imagenet-sketch"), ("ImageNet-A", "imagenet-a"), ("imagenet-adversarial", "imagenet-a"),
     ("imagenet_r", "imagenet-r"), ("imagenet-rendition", "imagenet-r"), ("imagenet", "imagenet")],
)  # fmt: skip
def test_names(name, expected):
    assert layout_of(name).name == expected


@pytest.mark.parametrize("dataset", ["imagenetv2", "imagenet-a"])
def test_a_tree_of_published_size_is_ok(tmp_path, dataset):
    folder = full_size(tmp_path, dataset)
    assert check(tmp_path, dataset).ok
    data = load(f"coop:{dataset}", root=tmp_path)
    assert not data.meta.get("differs_from_published")
    # Folder 10 comes before folder 2 in the file system; labels follow the number, or the synset.
    label = 777 if dataset == "imagenetv2" else 155
    name = data.test.names[data.test.labels.tolist().index(label)]
    assert Path(name).parent.name == ("777" if dataset == "imagenetv2" else "n00000775")
    assert data.classes[label] == ("thing 00777" if dataset == "imagenetv2" else "thing 00775")
    shutil.rmtree((folder / name).parent)
    (finding,) = check(tmp_path, dataset).findings
    assert finding.status == "different"
    if dataset == "imagenetv2":
        assert finding.problems == [
            "9,990 test images, expected 10,000",
            "1 classes have no test image, first 'thing 00777'",
        ]
    else:
        assert finding.problems == ["199 classes, expected 200", "7,462 test images, expected 7,500"]


@pytest.mark.parametrize("dataset", ["imagenetv2", "imagenet-sketch"])
def test_a_missing_class_does_not_move_the_labels_behind_it(tmp_path, dataset):
    folder = variant(tmp_path, dataset)
    place = {"imagenetv2": "1", "imagenet-sketch": "n02"}[dataset]
    shutil.rmtree(folder / LAYOUTS[dataset].images / place)
    data = load(f"coop:{dataset}", root=tmp_path)
    assert data.classes == tuple(SYNSETS.values()) and data.test.labels.tolist() == [0, 0, 2, 2, 3, 3]
    assert "1 classes have no test image, first 'great white shark'" in data.meta["differs_from_published"]


def test_subsets_have_the_classes_that_are_there(tmp_path, monkeypatch):
    folder = variant(tmp_path, "imagenet-r")
    published(monkeypatch, "imagenet-r", 3, (0, None, 6))
    shutil.rmtree(folder / "imagenet-r" / "n02")
    data = load("coop:imagenet-r", root=tmp_path)
    assert data.classes == ("sunglasses", "sunglasses") and data.test.labels.tolist() == [0, 0, 1, 1]
    assert check(tmp_path, "imagenet-r").findings[0].problems[0] == "2 classes, expected 3"
    save(folder / "imagenet-r" / "n02" / "1.png")
    save(folder / "imagenet-r" / "n04" / "1.png")
    assert check(tmp_path, "imagenet-r").findings[0].problems == ["4 classes, expected 3"]


@pytest.mark.parametrize("dataset", VARIANTS)
def test_an_unknown_class_folder_is_named(tmp_path, dataset):
    folder = variant(tmp_path, dataset)
    extra = "4" if dataset == "imagenetv2" else "n99"
    save(folder / LAYOUTS[dataset].images / extra / "1.png")
    with pytest.raises(DataError, match=f"found the class folder '{extra}', which classnames.txt does not name"):
        load(f"coop:{dataset}", root=tmp_path)
    (finding,) = check(tmp_path, dataset).findings
    assert finding.status == "damaged" and f"'{extra}'" in finding.problems[0]


@pytest.mark.parametrize("dataset", VARIANTS)
def test_order_of_classnames_does_not_matter(tmp_path, dataset):
    folder = variant(tmp_path, dataset)
    before = load(f"coop:{dataset}", root=tmp_path)
    lines = (folder / "classnames.txt").read_text().splitlines()
    (folder / "classnames.txt").write_text("\n".join(lines[::-1]))
    after = load(f"coop:{dataset}", root=tmp_path)
    assert after.fingerprint() == before.fingerprint() and after.meta["sha256"] != before.meta["sha256"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01 a\nn02 b\nn01 c\n", r"line 3: the synset 'n01' is there twice"),
        ("n01 a\nn02\nn03 b\nn04 c\n", "class name '' is empty"),
        ("", r"which classnames\.txt does not name"),
    ],
)
def test_damaged_classnames(tmp_path, text, message):
    (variant(tmp_path, "imagenet-sketch") / "classnames.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load("coop:imagenet-sketch", root=tmp_path)


@pytest.mark.parametrize("dataset", VARIANTS)
def test_missing_parts_are_named(tmp_path, dataset):
    folder = variant(tmp_path, dataset)
    (folder / "classnames.txt").unlink()
    shutil.rmtree(folder / LAYOUTS[dataset].images)
    (finding,) = check(tmp_path, dataset).findings
    assert finding.status == "incomplete"
    assert finding.problems == ["no file 'classnames.txt'", f"no folder '{LAYOUTS[dataset].images}'"]


def test_files_beside_class_folders_and_hidden_files_do_not_matter(tmp_path):
    folder = variant(tmp_path, "imagenet-a")
    before = load("coop:imagenet-a", root=tmp_path).fingerprint()
    (folder / "README.txt").write_text("x")
    (folder / "imagenet-a" / "n01" / "list.txt").write_text("x")
    save(folder / "imagenet-a" / "n01" / "._2.jpeg")
    save(folder / "imagenet-a" / ".hidden" / "2.jpeg")
    assert load("coop:imagenet-a", root=tmp_path).fingerprint() == before


def test_class_names_are_those_of_imagenet(tmp_path):
    # What domain generalisation relies on: every class of a variant is found among those trained on.
    folder = imagenet(tmp_path)
    for place in ("train", "val"):
        save(folder / "images" / place / "n04" / "1.png")
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in SYNSETS.items()))
    source = load("coop:imagenet", root=tmp_path)
    for dataset in VARIANTS:
        variant(tmp_path, dataset)
        classes = load(f"coop:{dataset}", root=tmp_path).classes
        assert classes == source.classes[: len(classes)]
