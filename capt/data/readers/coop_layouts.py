"""Where the data sets of CoOp's layout lie, and how large their published versions are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from capt.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Where a data set lies below the common root, and how large the published version is.

    Attributes:
        name: key of :data:`LAYOUTS`.
        title: name used in papers.
        folder: its folder below the root.
        images: folder of the images below ``folder``; "" is the folder itself.
        files: files that must be there, the list of images or of classes first.
        classes: number of classes.
        counts: number of images of train, val and test; None where there is no such split. 0 training images: the
            data set is for testing only.
        aliases: other names, compared without case and punctuation.
        kind: how membership is known: "split" file, "fgvc" lists, or class folders: "imagenet" (train and val),
            "numbered" (by position among the synsets), "synsets" (every one of classnames.txt), "subset" (some).
        class_folders: whether all images of one folder belong to one class, so that a changed label shows.
    """

    name: str
    title: str
    folder: str
    images: str
    files: tuple[str, ...]
    classes: int
    counts: tuple[int, int | None, int]
    aliases: tuple[str, ...] = ()
    kind: Literal["split", "fgvc", "imagenet", "numbered", "synsets", "subset"] = "split"
    class_folders: bool = False

    @property
    def from_folders(self) -> bool:
        """Whether the images are what lies in class folders, not what a list names."""
        return self.kind not in ("split", "fgvc")

    @property
    def image_folders(self) -> tuple[str, ...]:
        """Folders below ``folder`` that must be there."""
        if self.kind == "imagenet":
            return ("images/train", "images/val")
        return (self.images,) if self.images else ()


def _zhou(title: str) -> tuple[str, ...]:
    return (f"split_zhou_{title}.json",)


_FGVC_FILES = ("images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt", "variants.txt")
_NAMES = ("classnames.txt",)

# fmt: off
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("imagenet", "ImageNet", "imagenet", "images", _NAMES, 1000, (1_281_167, None, 50_000), kind="imagenet"),
        Layout(
            "caltech101", "Caltech101", "caltech-101", "101_ObjectCategories", _zhou("Caltech101"),
            100, (4_128, 1_649, 2_465), ("caltech",), class_folders=True,
        ),
        Layout(
            "oxford_pets", "OxfordPets", "oxford_pets", "images", _zhou("OxfordPets"),
            37, (2_944, 736, 3_669), ("pets",),
        ),
        Layout(
            "stanford_cars", "StanfordCars", "stanford_cars", "", _zhou("StanfordCars"),
            196, (6_509, 1_635, 8_041), ("cars",),
        ),
        Layout(
            "oxford_flowers", "Flowers102", "oxford_flowers", "jpg", _zhou("OxfordFlowers"),
            102, (4_093, 1_633, 2_463), ("flowers", "flowers102", "oxfordflowers102"),
        ),
        Layout(
            "food101", "Food101", "food-101", "images", _zhou("Food101"),
            101, (50_500, 20_200, 30_300), ("food",), class_folders=True,
        ),
        Layout(
            "fgvc_aircraft", "FGVCAircraft", "fgvc_aircraft", "images", _FGVC_FILES,
            100, (3_334, 3_333, 3_333), ("aircraft", "fgvc"), kind="fgvc",
        ),
        Layout(
            "sun397", "SUN397", "sun397", "SUN397", _zhou("SUN397"),
            397, (15_880, 3_970, 19_850), ("sun",), class_folders=True,
        ),
        Layout(
            "dtd", "DTD", "dtd", "images", _zhou("DescribableTextures"),
            47, (2_820, 1_128, 1_692), ("describabletextures", "textures"), class_folders=True,
        ),
        Layout(
            "eurosat", "EuroSAT", "eurosat", "2750", _zhou("EuroSAT"),
            10, (13_500, 5_400, 8_100), class_folders=True,
        ),
        Layout(
            "ucf101", "UCF101", "ucf101", "UCF-101-midframes", _zhou("UCF101"),
            101, (7_639, 1_898, 3_783), ("ucf",), class_folders=True,
        ),
        Layout(
            "imagenetv2", "ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", _NAMES,
            1000, (0, None, 10_000), kind="numbered",
        ),
        Layout(
            "imagenet-sketch", "ImageNet-Sketch", "imagenet-sketch", "images", _NAMES,
            1000, (0, None, 50_889), kind="synsets",
        ),
        Layout(
            "imagenet-a", "ImageNet-A", "imagenet-adversarial", "imagenet-a", _NAMES,
            200, (0, None, 7_500), kind="subset",
        ),
        Layout(
            "imagenet-r", "ImageNet-R", "imagenet-rendition", "imagenet-r", _NAMES,
            200, (0, None, 30_000), kind="subset",
        ),
    )
}
# fmt: on


def layout_of(dataset: str) -> Layout:
    """The layout of a data set by any of its names.

    Raises:
        DataError: unknown name.
    """
    wanted = re.sub(r"[^a-z0-9]", "", dataset.lower())
    for layout in LAYOUTS.values():
        names = {re.sub(r"[^a-z0-9]", "", one.lower()) for one in (layout.name, layout.title, layout.folder)}
        if wanted in names or wanted in layout.aliases:
            return layout
    raise DataError(f"'coop:{dataset}': unknown data set; expected one of {', '.join(LAYOUTS)}")
