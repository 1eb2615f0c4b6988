"""Pictures to tensors with Pillow alone, pixel for pixel what torchvision's Pillow path gives."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from capt.errors import CaptError

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Transform:
    """Size (height, width), interpolation and normalisation; picklable, so that loader workers can have it."""

    size: tuple[int, int]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise CaptError(f"interpolation: expected 'bicubic' or 'bilinear', found {self.interpolation!r}.")

    def _resized(self, image: Image, height: int, width: int) -> Image:
        from PIL.Image import Resampling

        return image.resize((width, height), Resampling[self.interpolation.upper()])

    def _normalised(self, image: Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous().to(torch.float32)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return pixels.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class EvalTransform(_Transform):
    """Shorter side to the target and the centre of it, or (``squash``) straight to the target size.

    A call takes a PIL image and returns float32 [3, height, width].
    """

    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize_mode not in ("shortest", "squash"):
            raise CaptError(f"resize_mode: expected 'shortest' or 'squash', found {self.resize_mode!r}.")

    def __call__(self, image: Image) -> Tensor:
        image = image.convert("RGB")  # first, because a palette cannot be interpolated
        height, width = self.size
        if self.resize_mode == "squash":
            return self._normalised(self._resized(image, height, width))
        if image.width * height <= image.height * width:
            image = self._resized(image, int(width * image.height / image.width), width)
        else:
            image = self._resized(image, height, int(height * image.width / image.height))
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return self._normalised(image.crop((left, top, left + width, top + height)))


@dataclass(frozen=True)
class TrainTransform(_Transform):
    """Random resized crop and horizontal flip, the few-shot literature's training augmentation.

    Attributes:
        scale: range of the crop's share of the picture's area.
        ratio: range of the crop's width over height.
        flip: probability of a horizontal flip.

    A call takes a PIL image and a ``torch.Generator`` (torch's global one by default) and returns float32
    [3, height, width]. The same generator state gives the same crop.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Image, generator: torch.Generator | None = None) -> Tensor:
        from PIL.Image import Transpose

        image = image.convert("RGB")
        left, top, width, height = self._box(image.width, image.height, generator)
        image = self._resized(image.crop((left, top, left + width, top + height)), *self.size)
        if torch.rand(1, generator=generator).item() < self.flip:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return self._normalised(image)

    def _box(self, width: int, height: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
        log_low, log_high = torch.log(torch.tensor(self.ratio))
        for _ in range(10):
            share = torch.empty(1).uniform_(*self.scale, generator=generator).item()
            log_ratio = torch.empty(1).uniform_(float(log_low), float(log_high), generator=generator)
            area, ratio = width * height * share, torch.exp(log_ratio).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
                return left, top, w, h
        # A very long picture: the largest centred crop of an allowed shape.
        w, h = width, height
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (width - w) // 2, (height - h) // 2, w, h


def train_transform_like(evaluation: Callable[..., Any], size: tuple[int, int]) -> TrainTransform:
    """The training transform with the size, mean and std of an evaluation transform (ours or a torchvision Compose)."""
    if isinstance(evaluation, _Transform):
        return TrainTransform(evaluation.size, evaluation.mean, evaluation.std)
    for step in getattr(evaluation, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            mean, std = (tuple(float(v) for v in values) for values in (step.mean, step.std))
            return TrainTransform(size, mean, std)
    return TrainTransform(size)


def describe_transform(transform: Any) -> dict[str, Any]:
    """A JSON-able record of a transform, for run records: steps, sizes, mean, std, decoder."""
    record: dict[str, Any] = {"name": type(transform).__name__}
    with contextlib.suppress(PackageNotFoundError):
        record["pillow"] = version("pillow")
    if isinstance(transform, _Transform):
        return record | asdict(transform)
    if hasattr(transform, "__qualname__"):
        record["name"] = transform.__qualname__
    # Addresses differ from run to run and say nothing.
    record["repr"] = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
    return record


def from_open_clip(config: dict[str, Any] | None, size: tuple[int, int]) -> Callable[..., Tensor]:
    """The evaluation transform of an open_clip preprocessing configuration (``model.visual.preprocess_cfg``)."""
    config = config or {}
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    mean, std = (_three(config.get(key) or default) for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    if mode == "squash" or (mode == "shortest" and size[0] == size[1]):
        return EvalTransform(size, mean, std, "bilinear" if interpolation == "bilinear" else "bicubic", mode)
    from capt.backbones._optional import import_optional

    import_optional("open_clip", f"preprocessing with resize_mode={mode!r}")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = {key: value for key, value in config.items() if key in PreprocessCfg.__dataclass_fields__}
    transform: Callable[..., Tensor] = image_transform_v2(PreprocessCfg(**(known | {"size": size})), is_train=False)
    return transform


def from_transformers(config: dict[str, Any], size: tuple[int, int]) -> EvalTransform:
    """The evaluation transform of a transformers image-processor configuration (``preprocessor_config.json``)."""
    mode = "squash" if not config.get("do_center_crop", "crop_size" in config) else "shortest"
    interpolation = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3), "bicubic")
    mean, std = _three(config.get("image_mean") or CLIP_MEAN), _three(config.get("image_std") or CLIP_STD)
    return EvalTransform(size, mean, std, interpolation, mode)


def _three(values: float | Sequence[float]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(float(v) for v in values)
