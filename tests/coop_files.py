"""Small trees laid out like CoOp's data sets, and few-shot pickles as its library writes them."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

from capt.data.readers.coop_layouts import LAYOUTS
from tests.data_files import save

SPLIT_FILES = {name: layout.files[0] for name, layout in LAYOUTS.items() if layout.files[0].startswith("split_zhou")}
CLASSES = ["Abyssinian_cat", "boxer"]


def zhou(root: Path, dataset: str, per_class: tuple[int, int, int] = (3, 1, 2)) -> Path:
    """Two classes in the layout of one of the nine data sets that have a split file."""
    layout = LAYOUTS[dataset]
    folder = root / layout.folder
    split: dict[str, list] = {}
    for part, count in zip(("train", "val", "test"), per_class, strict=True):
        split[part] = []
        for label, name in enumerate(CLASSES):
            for number in range(count):
                path = f"{name}/{part}_{number}.jpg" if layout.images else f"cars_{part}/{label}_{number}.jpg"
                save(folder / layout.images / path, 10 * label + number)
                split[part].append([path, label, name])
    (folder / layout.files[0]).write_text(json.dumps(split))
    return folder


def fgvc(root: Path) -> Path:
    folder = root / "fgvc_aircraft"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nF/A-18\nDC-3 b\n")
    for number, part in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("707-320", "F/A-18", "DC-3 b")):
            lines.append(f"00{number}{label} {name}\n")
            save(folder / "images" / f"00{number}{label}.jpg")
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    return folder


def imagenet(root: Path) -> Path:
    folder = root / "imagenet"
    for synset in ("n02", "n01", "n03"):
        for number in (10, 2):
            save(folder / "images" / "train" / synset / f"{synset}_{number}.png")
        save(folder / "images" / "val" / synset / "v_1.png")
    (folder / "classnames.txt").write_text("n01 sunglasses\nn02 great white shark\nn03 sunglasses\nn04 absent\n")
    return folder


VARIANTS = ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")
SYNSETS = {"n01": "sunglasses", "n02": "great white shark", "n03": "sunglasses", "n04": "tench"}


def variant(root: Path, dataset: str) -> Path:
    """Two images a class of a variant of ImageNet; -A and -R have three of the four classes."""
    layout = LAYOUTS[dataset]
    folder, used = root / layout.folder, list(SYNSETS)[: 3 if layout.classes == 200 else 4]
    for label, synset in enumerate(used):
        for number in (10, 2):
            place = str(label) if dataset == "imagenetv2" else synset
            save(folder / layout.images / place / f"{number}.jpeg", 50 * label + number)
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in SYNSETS.items()))
    if dataset == "imagenet-a":
        (folder / layout.images / "README.txt").write_text("natural adversarial examples")
    return folder


def tree(root: Path, dataset: str) -> Path:
    """Any of the fifteen data sets, small."""
    if dataset in SPLIT_FILES:
        return zhou(root, dataset)
    return {"imagenet": imagenet, "fgvc_aircraft": fgvc}.get(dataset, lambda root: variant(root, dataset))(root)


def published(monkeypatch: pytest.MonkeyPatch, dataset: str, classes: int, counts: tuple) -> None:
    """Declare other numbers to be the published ones."""
    monkeypatch.setitem(LAYOUTS, dataset, dataclasses.replace(LAYOUTS[dataset], classes=classes, counts=counts))


def datum_class():
    """Dassl's record class, under the module name that its pickles carry."""

    class Datum:
        def __init__(self, impath, label, classname):
            self._impath, self._label, self._domain, self._classname = impath, label, 0, classname

    Datum.__module__, Datum.__qualname__ = "dassl.data.datasets.base_dataset", "Datum"
    return Datum


def importable_datum(monkeypatch: pytest.MonkeyPatch) -> type:
    """The record class where the pickle module can find it."""
    cls = datum_class()
    module = types.ModuleType(cls.__module__)
    module.Datum = cls
    for name in ("dassl", "dassl.data", "dassl.data.datasets"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, cls.__module__, module)
    return cls
