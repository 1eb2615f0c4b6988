"""The four-way test on photographs of two objects in a spatial relation ("What'sUp").

File names, captions, groups and the four choices are those of the published evaluation script for What'sUp pictures.
What goes beyond it is ours: both orders of the names, rows for each relation, and three ways of preprocessing, because
cutting out the middle of a photograph makes a center bias that no encoder has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.transforms import EvalTransform
from capt.data.decode import EXTENSIONS, decode_image
from capt.errors import CaptError, DataError
from capt.evaluation.position_statistics import bootstrap

if TYPE_CHECKING:
    from PIL.Image import Image

    from capt.backbones import Backbone

DISTRACTOR = "a cat and a refrigerator"
#: Choices of the four-way test: both objects, only one of them, or neither.
CHOICES = ("both", "first only", "second only", "neither")
PREPROCESSING = ("native", "squash", "pad")
_PADDING = (128, 128, 128)


class Photograph(NamedTuple):
    """What a file name says: two objects and how the first lies to the second."""

    first: str
    relation: str
    second: str
    central: bool


def parse_photograph(name: str) -> Photograph | None:
    """Read a file name "<object>_<relation>_<object>.jpeg"; None where it has fewer than three parts.

    Hyphens within a name stand for spaces. A picture counts as central exactly if "_on_" is in its name; "under" is
    off center.
    """
    parts = name.split("_")
    if len(parts) < 3:
        return None
    second = re.sub(r"\.[^.]*$", "", parts[-1])
    relation = "_".join(parts[1:-1])
    return Photograph(parts[0].replace("-", " "), relation, second.replace("-", " "), "_on_" in name)


def four_captions(first: str, second: str, distractor: str = DISTRACTOR) -> list[str]:
    """The four captions, verbatim: both, first, second, neither. No article is corrected."""
    return [f"a {first} and a {second}", f"a {first}", f"a {second}", distractor]


def four_way_choice(images: Tensor, captions: Tensor, scale: float = 100.0) -> Tensor:
    """Chosen caption of each image, int64 [..., B]; the first of equal ones.

    Args:
        images: unit-norm features [B, E].
        captions: unit-norm features [4, E], or [..., B, 4, E] where each image has its own.
        scale: factor of the cosines; it cannot change the choice.
    """
    scores = scale * (images[:, None] * captions).sum(-1)
    choice: Tensor = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    return choice


# ---- preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PadTransform:
    """The longer side to the target, the rest filled with grey: nothing is cut off, nothing is stretched."""

    to_tensor: EvalTransform

    def __call__(self, image: Image) -> Tensor:
        """PIL image to float32 [3, height, width]."""
        from PIL import Image as image_module

        height, width = self.to_tensor.size
        scale = min(height / image.height, width / image.width)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        method = image_module.Resampling[self.to_tensor.interpolation.upper()]
        canvas = image_module.new("RGB", (width, height), _PADDING)
        corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        canvas.paste(image.convert("RGB").resize(inner, method), corner)
        return self.to_tensor(canvas)


def preprocessing(backbone: Backbone, mode: str) -> Callable[[Image], Tensor]:
    """A model's preprocessing ("native"), or the same without any cut: stretched ("squash") or with borders ("pad")."""
    if mode not in PREPROCESSING:
        raise CaptError(f"mode: found {mode!r}, expected one of {', '.join(PREPROCESSING)}")
    if mode == "native":
        return backbone.preprocess
    like = backbone.preprocess
    if not isinstance(like, EvalTransform):
        like = EvalTransform(backbone.image_hw, backbone.train_transform.mean, backbone.train_transform.std)
    squash = replace(like, resize_mode="squash")
    return squash if mode == "squash" else PadTransform(squash)


def surviving_share(transform: Any, width: int, height: int) -> float | None:
    """Share of a picture's area that a transform lets through; None where the transform is not one of ours."""
    if isinstance(transform, PadTransform):
        return 1.0
    if not isinstance(transform, EvalTransform):
        return None
    if transform.resize_mode == "squash":
        return 1.0
    target = transform.size[1] / transform.size[0]
    return min(width / height / target, target / (width / height))


# ---- the test --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WhatsUpResult:
    """Choices on N photographs.

    Attributes:
        names: file names, [N].
        photographs: what they say, [N].
        choices: int64 [2, N] by preprocessing: the caption with the names in the order of the file name, and swapped
            (a choice still means the file name's first and second object).
        margins: float64 [2, N] by preprocessing, cosine of "both" less the best other one.
        shares: float64 [N] by preprocessing, area of the photograph that the model gets to see; None if unknown.
    """

    names: Sequence[str]
    photographs: Sequence[Photograph]
    choices: dict[str, NDArray[np.int64]]
    margins: dict[str, NDArray[np.float64]]
    shares: dict[str, NDArray[np.float64] | None]

    def accuracy(self, mode: str, order: int = 0) -> dict[str, float | None]:
        """Accuracy of all, central and off-center photographs, and their gap; None for a group without any."""
        right = self.choices[mode][order] == 0
        central = np.array([one.central for one in self.photographs])
        groups = {"all": right, "center": right[central], "off": right[~central]}
        found = {name: float(values.mean()) if values.size else None for name, values in groups.items()}
        both = found["center"] is not None and found["off"] is not None
        return found | {"gap": found["center"] - found["off"] if both else None}  # type: ignore[operator]

    def record(self) -> dict[str, Any]:
        """For JSON: one entry for each preprocessing."""
        return {
            "n": len(self.names),
            "chance": 0.25,
            "preprocessing": {mode: self._mode(mode) for mode in self.choices},
        }

    def _mode(self, mode: str) -> dict[str, Any]:
        share = self.shares[mode]
        central = np.array([one.central for one in self.photographs])
        return {
            "file_order": self.accuracy(mode, 0),
            "swapped_order": self.accuracy(mode, 1),
            "gap": self._gap(mode),
            "left_right_gap": self._left_right_gap(mode),
            "choices": {
                name: self._histogram(mode, chosen)
                for name, chosen in (("all", np.full(central.shape, True)), ("center", central), ("off", ~central))
            },
            "relations": {
                relation: {"n": int(chosen.sum()), **self._histogram(mode, chosen)}
                for relation, chosen in self._relations().items()
            },
            "median_margin": float(np.median(self.margins[mode])),
            "surviving_share": None if share is None else float(share.mean()),
        }

    def _relations(self) -> dict[str, NDArray[np.bool_]]:
        found = np.array([one.relation for one in self.photographs])
        return {str(relation): found == relation for relation in np.unique(found)}

    def _histogram(self, mode: str, chosen: NDArray[np.bool_]) -> dict[str, int]:
        counts = np.bincount(self.choices[mode][0][chosen], minlength=len(CHOICES))
        return {name: int(count) for name, count in zip(CHOICES, counts, strict=True)}

    def _gap(self, mode: str, off: NDArray[np.bool_] | None = None) -> dict[str, float | None] | None:
        """Gap averaged over both orders, with an interval over pairs of objects, which share their pictures."""
        central = np.array([one.central for one in self.photographs])
        off = ~central if off is None else off
        if not central.any() or not off.any():
            return None
        right = (self.choices[mode] == 0).mean(0)
        pairs = np.unique([f"{one.first}\t{one.second}" for one in self.photographs], return_inverse=True)[1]
        sums = [np.bincount(pairs, weights) for weights in (right * central, central, right * off, off)]
        return bootstrap(np.stack(sums, 1), lambda means: means[0] / means[1] - means[2] / means[3]).record()

    def _left_right_gap(self, mode: str) -> dict[str, float | None] | None:
        """The gap to pictures with the objects beside each other, where neither hides the other."""
        return self._gap(mode, np.array([one.relation in ("left_of", "right_of") for one in self.photographs]))


def score_photographs(
    backbone: Backbone,
    folder: str | Path,
    *,
    modes: Sequence[str] = PREPROCESSING,
    batch_size: int = 32,
) -> WhatsUpResult:
    """Run the four-way test on the photographs of a folder named "<object>_<relation>_<object>.jpeg".

    Args:
        backbone: the model; single precision is advised, since near ties flip in half precision.
        folder: pictures in any common format; files whose names have fewer than three parts are passed over.
        modes: ways of preprocessing, see :func:`preprocessing`. Only a gap that stays without a cut ("squash", "pad")
            is the encoder's.
        batch_size: photographs at a time.

    Raises:
        DataError: no such folder, no photograph with such a name, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"'{folder}': expected a folder of photographs, found no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())
    parsed = {file: one for file in files if (one := parse_photograph(file.name)) is not None}
    if not parsed:
        raise DataError(
            f"'{folder}': {len(files)} pictures, none of them called <object>_<relation>_<object>.jpeg, such as "
            "mug_left_of_plate.jpeg or red-cup_on_table.jpeg; rename them"
        )
    transforms = {mode: preprocessing(backbone, mode) for mode in modes}
    photographs = list(parsed.values())
    # The four captions in the order of the file name, and the first one with the names swapped.
    texts = [[*four_captions(one.first, one.second), f"a {one.second} and a {one.first}"] for one in photographs]
    captions = backbone.text_features([text for five in texts for text in five]).reshape(len(photographs), 5, -1)
    orders = torch.stack([captions[:, [0, 1, 2, 3]], captions[:, [4, 1, 2, 3]]])  # [2, N, 4, E]
    choices: dict[str, list[Tensor]] = {mode: [] for mode in modes}
    margins: dict[str, list[Tensor]] = {mode: [] for mode in modes}
    shares: dict[str, list[float | None]] = {mode: [] for mode in modes}
    for start in range(0, len(photographs), batch_size):
        stop = start + batch_size
        images = [decode_image(file.read_bytes(), file.name) for file in list(parsed)[start:stop]]
        for mode, transform in transforms.items():
            shares[mode] += [surviving_share(transform, *image.size) for image in images]
            with torch.inference_mode():
                features = backbone.image_features(torch.stack([transform(image) for image in images]))
                features = F.normalize(features.float(), dim=-1)
                scores = (features[:, None] * orders[:, start:stop]).sum(-1)
            choices[mode].append(four_way_choice(features, orders[:, start:stop]))
            margins[mode].append(scores[..., 0] - scores[..., 1:].amax(-1))
    return WhatsUpResult(
        [file.name for file in parsed],
        photographs,
        {mode: torch.cat(found, 1).cpu().numpy() for mode, found in choices.items()},
        {mode: torch.cat(found, 1).double().cpu().numpy() for mode, found in margins.items()},
        {mode: None if None in found else np.array(found, np.float64) for mode, found in shares.items()},
    )
