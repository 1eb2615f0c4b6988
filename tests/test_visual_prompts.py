"""Visual prompts: where marks are drawn, what they leave alone, and other poolings as backbones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError
from capt.modules.crop_pooling import CropPooling, cropped
from capt.modules.patch_pooling import PatchPooling, repooled
from capt.modules.pooling_replacements import crop_features, mean_of_tokens
from capt.modules.visual_prompts import MARKERS, marked, marked_normalised, stroke
from tests.pooled_towers import CLASS_TOKEN, SOME, pictures, wrapped

IMAGES = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
BOXES = torch.tensor([[8.0, 12.0, 28.0, 32.0], [40.0, 20.0, 64.0, 44.0]])


def changed(marker, images=IMAGES, boxes=BOXES):
    return (marked(images, boxes, marker) != images).any(1)


@pytest.mark.parametrize("marker", ["circle", "box"])
def test_an_outline_is_red_thin_and_around_its_box(marker):
    images = torch.full((1, 3, 336, 336), 0.5)
    box = torch.tensor([[100.0, 120.0, 200.0, 180.0]])
    found = marked(images, box, marker)
    where = (found != images).any(1)[0]
    rows, columns = where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()
    assert abs(rows[0] - (120 - 3.36)) <= 1 and abs(rows[-1] - (180 + 3.36)) <= 1.5
    assert abs(columns[0] - (100 - 3.36)) <= 1 and abs(columns[-1] - (200 + 3.36)) <= 1.5
    assert (found[0][:, where] == torch.tensor([1.0, 0, 0])[:, None]).all()
    assert stroke(images) == 2
    assert where[150, :150].sum() == 2 and not where[150, 110:190].any()  # two pixels at the left side, none within
    assert bool(where[rows[0] + 1, columns[0] + 1]) == (marker == "box")


@pytest.mark.parametrize("marker", ["blur", "grey", "darken"])
def test_the_object_is_left_alone_and_the_rest_is_not(marker):
    where = changed(marker)
    for image, (left, top, right, bottom) in zip(where, BOXES.int().tolist(), strict=True):
        middle = image[(top + bottom) // 2 - 4 : (top + bottom) // 2 + 4, (left + right) // 2 - 4 : (left + right) // 2]
        assert not middle.any()
        assert image[:6, :6].all()


def test_what_is_outside_is_blurred_desaturated_or_dimmed():
    corner = (slice(None), slice(None), slice(0, 6), slice(0, 6))
    grey = marked(IMAGES, BOXES, "grey")[corner]
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])
    torch.testing.assert_close(marked(IMAGES, BOXES, "darken")[corner], 0.3 * IMAGES[corner])
    blurred = marked(IMAGES, BOXES, "blur")[corner]
    assert blurred.std() < 0.3 * IMAGES[corner].std()
    assert (blurred.mean((2, 3)) - IMAGES.mean((2, 3))).abs().max() < 0.1


def test_a_crop_shows_its_box_with_a_quarter_around_it():
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    images = torch.stack([x / 80, y / 80, torch.zeros_like(x)])[None]
    found = marked(images, torch.tensor([[20.0, 40.0, 40.0, 60.0]]), "crop")
    assert found[0, 0, 40, 0] == pytest.approx(15 / 80, abs=0.01) and found[0, 0, 40, -1] == pytest.approx(
        44 / 80, abs=0.01
    )
    assert found[0, 1, 0, 40] == pytest.approx(35 / 80, abs=0.01)


def test_a_frame_needs_no_box_and_is_in_the_four_corners():
    where = changed("frame")
    assert torch.equal(where[0], where[1])
    assert torch.equal(where, where.flip(1)) and torch.equal(where, where.flip(2))
    assert not where[:, 18:30].any() and where[:, :16, :21].any()


@pytest.mark.parametrize("marker", MARKERS)
def test_marks_stay_in_the_picture_and_other_pictures_are_not_touched(marker):
    both = marked(IMAGES, BOXES, marker)
    assert both.shape == IMAGES.shape and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(both[1:], marked(IMAGES[1:], BOXES[1:], marker))


def test_normalised_pictures_get_the_same_mark():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    found = marked_normalised((IMAGES - shift) / scale, BOXES, "circle", mean, std)
    torch.testing.assert_close(found * scale + shift, marked(IMAGES, BOXES, "circle"))


def test_wrong_markers_and_boxes_are_refused():
    with pytest.raises(CaptError, match="expected one of circle"):
        marked(IMAGES, BOXES, "arrow")
    with pytest.raises(CaptError, match="no area"):
        marked(IMAGES, BOXES.flip(1), "box")
    with pytest.raises(CaptError, match=r"expected \[B, 4\]"):
        marked(IMAGES, BOXES[:1], "box")


# ---- other poolings as backbones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_a_repooled_backbone_gives_what_the_pooling_says_and_leaves_the_plain_one(name):
    backbone = wrapped(name)
    images, pooling = pictures(backbone), backbone.tower.pooling()
    before = backbone.image_features(images)
    other = repooled(backbone, PatchPooling("mean token"))
    torch.testing.assert_close(other.image_features(images), mean_of_tokens(pooling, pooling.inputs(images)))
    mixed = repooled(backbone, PatchPooling("mean of tokens", 0.3)).image_features(images)
    alone = repooled(backbone, PatchPooling("mean of tokens")).image_features(images)
    expected = 0.7 * F.normalize(before, dim=-1) + 0.3 * F.normalize(alone, dim=-1)
    torch.testing.assert_close(mixed, F.normalize(expected, dim=-1))
    assert torch.equal(backbone.image_features(images), before)
    assert (
        len({one.fingerprint() for one in (backbone, other, repooled(backbone, PatchPooling("mean token", 0.3)))}) == 3
    )
    assert not other.tower.pools_first and backbone.tower.pools_first == (name in CLASS_TOKEN)
    assert torch.equal(
        other.tower.project_tokens(pooling.inputs(images)), backbone.tower.project_tokens(pooling.inputs(images))
    )


@pytest.mark.parametrize("name", SOME)
def test_a_cropped_backbone_mixes_the_whole_with_the_mean_of_its_crops(name):
    backbone, pooling = wrapped(name), CropPooling(5, part=0.4)
    images, other = pictures(backbone), cropped(backbone, pooling)
    crops = F.normalize(crop_features(backbone, images), dim=-1).mean(1)
    expected = 0.6 * F.normalize(backbone.image_features(images), dim=-1) + 0.4 * F.normalize(crops, dim=-1)
    torch.testing.assert_close(other.image_features(images), F.normalize(expected, dim=-1))
    tower, plain = other.tower, backbone.tower
    assert torch.equal(tower.embed(images), plain.embed(images))
    torch.testing.assert_close(tower.patches(tower.run(images)), plain.patches(plain.run(images)))
    torch.testing.assert_close(tower.project(plain.run(images)), backbone.image_features(images))
    assert other.fingerprint() != backbone.fingerprint() != cropped(backbone, CropPooling(9)).fingerprint()


def test_poolings_that_are_none_are_refused():
    for wrong in ({"count": 4}, {"size": 0.0}, {"part": 1.5}):
        with pytest.raises(CaptError, match="crops: expected 1, 5 or 9"):
            CropPooling(**wrong)
    with pytest.raises(CaptError, match="mean token"):
        PatchPooling("median")
    with pytest.raises(CaptError, match="part"):
        PatchPooling("mean token", 0.0)
