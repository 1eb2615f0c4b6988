"""Transforms: Pillow alone, and pixel for pixel torchvision's."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capt.backbones import EvalTransform, TrainTransform, describe_transform, wrap
from capt.backbones.transforms import CLIP_MEAN, CLIP_STD, from_open_clip, from_transformers
from capt.errors import CaptError
from tests.backbone_models import clip, open_clip

SIZES = [(64, 48), (47, 90), (32, 32), (33, 200), (20, 11)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def theirs(**options: Any) -> Any:
    from open_clip.transform import image_transform

    return image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_transform_equals_torchvisions_bit_for_bit(
    size: tuple[int, int], mode: str, interpolation: str
) -> None:
    ours = EvalTransform((32, 32), interpolation=interpolation, resize_mode=mode)(picture(*size))
    assert torch.equal(ours, theirs(resize_mode=mode, interpolation=interpolation)(picture(*size)))
    assert ours.dtype == torch.float32 and ours.shape == (3, 32, 32)


@pytest.mark.parametrize("size", SIZES)
def test_training_transform_draws_what_torchvision_draws(size: tuple[int, int]) -> None:
    from torchvision import transforms as tv

    reference = tv.Compose(
        [
            tv.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    ours = TrainTransform((32, 32))
    for seed in range(12):
        torch.manual_seed(seed)
        expected = reference(picture(*size))
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(ours(picture(*size), generator), expected)


def test_training_transform_depends_on_its_generator_only() -> None:
    transform, image = TrainTransform((32, 32)), picture(64, 48)
    first = [transform(image, g) for g in [torch.Generator().manual_seed(5)] for _ in range(3)]
    torch.manual_seed(99)
    second = [transform(image, g) for g in [torch.Generator().manual_seed(5)] for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_picture_mode_becomes_three_channels(mode: str) -> None:
    for transform in (EvalTransform((16, 16)), TrainTransform((16, 16))):
        assert transform(picture(40, 30, mode)).shape == (3, 16, 16)


def test_a_wrapped_model_brings_its_own_transforms() -> None:
    model = clip()
    model.visual.preprocess_cfg = {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"}
    backbone = wrap(model)
    assert backbone.preprocess == EvalTransform((32, 32), (0.5,) * 3, (0.25,) * 3, resize_mode="squash")
    assert backbone.train_transform == TrainTransform((32, 32), (0.5,) * 3, (0.25,) * 3)
    given = theirs()
    backbone = wrap(clip(), preprocess=given)
    assert backbone.preprocess is given and backbone.train_transform == TrainTransform((32, 32))


def test_the_padding_resize_mode_is_open_clips() -> None:
    transform = from_open_clip({"resize_mode": "longest", "fill_color": 0}, (32, 32))
    assert torch.equal(transform(picture(64, 48)), theirs(resize_mode="longest")(picture(64, 48)))


def test_transformers_processor_configurations_are_understood() -> None:
    centre = {"do_center_crop": True, "resample": 3, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    assert from_transformers(centre, (32, 32)) == EvalTransform((32, 32), (0.1,) * 3, (0.2,) * 3)
    squash = from_transformers({"resample": 2, "image_mean": 0.5, "image_std": 0.5}, (32, 32))
    assert squash == EvalTransform((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", "squash")


def test_transforms_travel_to_loader_workers() -> None:
    for transform in (EvalTransform((8, 8)), TrainTransform((8, 8))):
        assert pickle.loads(pickle.dumps(transform)) == transform


def test_the_description_is_a_record_that_is_the_same_next_time() -> None:
    record = describe_transform(TrainTransform((32, 32)))
    assert record["name"] == "TrainTransform" and record["scale"] == (0.08, 1.0) and record["mean"] == CLIP_MEAN
    assert "pillow" in record
    assert describe_transform(theirs()) == describe_transform(theirs())
    assert "0x" not in str(describe_transform(lambda image: image))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(CaptError, match="'nearest'"):
        EvalTransform((8, 8), interpolation="nearest")
    with pytest.raises(CaptError, match="'longest'"):
        EvalTransform((8, 8), resize_mode="longest")


def test_open_clips_default_transform_is_the_one_built_here() -> None:
    config = open_clip.transform.PreprocessCfg(size=32)
    theirs_now = open_clip.transform.image_transform_v2(config, is_train=False)
    assert torch.equal(from_open_clip(None, (32, 32))(picture(64, 48)), theirs_now(picture(64, 48)))
