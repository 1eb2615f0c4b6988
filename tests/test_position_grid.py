"""Position grids: where cells lie, what is pasted, and that nothing but the position differs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from capt.data.backgrounds import background
from capt.data.cutouts import Cutouts, drawn_shapes, emoji_cutouts, read_cutouts
from capt.data.position_grid import PositionGrid, Scene, place_cells
from capt.errors import CaptError, DataError
from tests.tiny import backbone

SHAPES = drawn_shapes(6)


def grid(**options) -> PositionGrid:
    return PositionGrid(SHAPES, **{"image_hw": (96, 96), "patch_hw": (16, 16), **options})


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_matched_phases():
    cells = place_cells((224, 224), (16, 16), 3)
    assert cells.side == 60 and cells.matched
    assert (cells.tops + cells.side / 2).tolist() == [32, 112, 192] == (cells.lefts + cells.side / 2).tolist()
    np.testing.assert_allclose(cells.ring.max(), 80 / 112)


def test_large_patches_keep_matched_cells_away_from_the_border():
    five, three = (place_cells((224, 224), (32, 32), n, placement="matched") for n in (5, 3))
    assert np.diff(five.tops).tolist() == [32] * 4 and np.diff(three.tops).tolist() == [64] * 2
    assert five.ring.max() < 0.6


def test_automatic_placement_is_matched_where_that_reaches_as_far_as_random():
    assert place_cells((224, 224), (16, 16), 3).shifts == (1, 1)
    spread = place_cells((224, 224), (32, 32), 5)
    assert spread.shifts == (32, 32) and spread.ring.max() > 0.65


CASES = list(
    itertools.product(
        [(224, 224), (112, 112), (96, 160), (240, 200)], [(14, 14), (16, 16), (32, 32), (16, 20)], [3, 5, 7]
    )
)


@pytest.mark.parametrize("placement", ["auto", "matched", "random", "border"])
def test_objects_lie_inside_apart_and_symmetric(placement):
    for image_hw, patch_hw, n in CASES:
        cells = place_cells(image_hw, patch_hw, n, placement=placement)
        for starts, length, shifts in zip((cells.tops, cells.lefts), image_hw, cells.shifts, strict=True):
            assert starts[0] - shifts // 2 >= 0
            assert starts[-1] + cells.side + (shifts - 1) // 2 <= length
            assert (np.diff(starts) >= cells.side).all()
            # Rounding to whole pixels moves a center by half a pixel at most.
            centers = starts + cells.side / 2 - length / 2
            assert abs(centers + centers[::-1]).max() <= 1


def test_matched_objects_meet_the_patches_in_one_phase():
    for image_hw, patch_hw, n in CASES:
        cells = place_cells(image_hw, patch_hw, n, placement="matched")
        if cells.matched:
            assert len(set(cells.tops % patch_hw[0])) == len(set(cells.lefts % patch_hw[1])) == 1
    assert not place_cells((112, 112), (64, 64), 3, placement="matched").matched


def test_objects_touch_the_border_when_asked():
    for image_hw, patch_hw, n in CASES:
        cells = place_cells(image_hw, patch_hw, n, placement="border")
        for starts, length in zip((cells.tops, cells.lefts), image_hw, strict=True):
            assert starts[0] == 0 and starts[-1] + cells.side == length


def test_coordinates_of_a_picture_that_is_not_square():
    cells = place_cells((96, 160), (16, 16), 3, placement="border")
    x, y = cells.xy.reshape(3, 3, 2)[2, 0]
    assert x == pytest.approx(-1 + cells.side / 160) and y == pytest.approx(1 - cells.side / 96)
    np.testing.assert_allclose(cells.radius, np.hypot(*cells.xy.T) / 2**0.5)
    assert cells.xy[4].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 4}, "cells: found 4"),
        ({"fill": 0.0}, "fill: found 0.0"),
        ({"placement": "corner"}, "placement: found 'corner'"),
        ({"replicates": 0}, "replicates: found 0"),
        ({"backgrounds": ()}, "backgrounds: found none"),
        ({"backgrounds": ("pink",)}, "'pink' is none of grey, white"),
        ({"seed": -1}, "seed: found -1"),
        ({"cells": 61}, "too small"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(options, message):
    with pytest.raises(CaptError, match=message):
        grid(**options)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_nothing_but_the_position_differs_on_a_plain_ground():
    one = grid(backgrounds=("grey",), cells=3)
    pictures = [np.array(one.picture(scene)) for scene in one.single(2, 0)]
    blank, *others = pictures
    assert (blank == 128).all()
    cells = one.grid
    cut = []
    for number, picture in enumerate(others):
        top, left = cells.tops[number // 3], cells.lefts[number % 3]
        window = (slice(top, top + cells.side), slice(left, left + cells.side))
        cut.append(picture[window].copy())
        picture[window] = 128
        assert (picture == 128).all()
    assert all((one == cut[0]).all() for one in cut) and (cut[0] != 128).any()


@pytest.mark.parametrize("kind", ["noise", "gradient", "texture", "white"])
def test_all_positions_share_one_ground(kind):
    one = grid(backgrounds=(kind,), placement="random")
    blank, *others = (np.asarray(one.picture(scene)) for scene in one.single(3, 0))
    for scene, picture in zip(one.single(3, 0)[1:], others, strict=True):
        pasted = scene.pasted[0]
        outside = np.ones(blank.shape[:2], bool)
        outside[pasted.top : pasted.top + pasted.side, pasted.left : pasted.left + pasted.side] = False
        assert (picture[outside] == blank[outside]).all() and (picture != blank).any()


def test_noise_has_the_stated_contrast_and_differs_by_item():
    one = grid(backgrounds=("noise",), replicates=2)
    pictures = [np.asarray(one.picture(scene)).astype(float) for scene in (Scene((0, 0)), Scene((0, 1)), Scene((1, 0)))]
    for picture in pictures:
        assert abs(picture.mean() - 128) < 0.5 and abs(picture.std() - 20) < 0.5
    assert not any((a == b).all() for a, b in itertools.combinations(pictures, 2))


def test_the_common_shift_of_random_placement_depends_on_the_item_alone():
    one = grid(placement="random", cells=3)
    shifts = set()
    for thing, variant in itertools.product(range(6), range(one.variants)):
        found = {
            (pasted.top - one.grid.tops[cell // 3], pasted.left - one.grid.lefts[cell % 3])
            for cell, scene in enumerate(one.single(thing, variant)[1:])
            for pasted in scene.pasted
        }
        assert len(found) == 1
        shifts |= found
    assert len(shifts) > 10
    down = {shift[0] for shift in shifts}
    assert min(down) >= -8 and max(down) <= 7


def test_the_seed_decides_and_repeats():
    scenes = grid(seed=3).single(1, 1)
    again, other = grid(seed=3), grid(seed=4)
    assert torch.equal(grid(seed=3).tensor(scenes), again.tensor(scenes))
    assert not torch.equal(again.tensor(scenes), other.tensor(scenes))


def test_a_tensor_is_what_the_models_own_preprocessing_makes_of_the_picture():
    model = backbone()
    one = PositionGrid.for_backbone(model, SHAPES, cells=3, backgrounds=("texture", "gradient"), replicates=1)
    assert one.image_hw == (32, 32) and one.patch_hw == (8, 8)
    for scene in [*one.single(3, 0), *one.pair(1, 2, 1), *one.single(3, 1)]:
        torch.testing.assert_close(one.tensor([scene])[0], model.preprocess(one.picture(scene)), rtol=0, atol=1e-6)


def test_transparency_mixes_object_and_ground():
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[...] = (200, 100, 0, 51)
    one = PositionGrid(Cutouts(("glass",), ((picture,),)), (30, 30), (2, 2), 3, backgrounds=("white",))
    scene = one.single(0, 0)[5]
    pixels = np.asarray(one.picture(scene))[15, 15]
    assert pixels.tolist() == [round(0.8 * 255 + 0.2 * value) for value in (200, 100, 0)]


def test_replicates_are_other_drawings_and_then_rotations():
    cutouts = emoji_cutouts(names=["fish"])
    n = len(cutouts.pictures[0])
    one = PositionGrid(cutouts, (96, 96), (16, 16), 3, backgrounds=("grey",), replicates=n + 2)
    looks = [one.tensor(one.single(0, variant)[1:2]) for variant in range(n + 2)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(looks, 2))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_a_pair_has_full_size_side_by_side_and_half_size_scenes():
    one = grid(cells=3)
    scenes = one.pair(4, 2, 0)
    side, half = one.grid.side, one.grid.side // 2
    full, beside, control = scenes[:8], scenes[8], scenes[9:]
    middle = one.grid.tops[1]
    for scene, cell in zip(full, one.others, strict=True):
        central, peripheral = scene.pasted
        assert (central.thing, central.side, central.top, central.left) == (4, side, middle, middle)
        assert (peripheral.thing, peripheral.top, peripheral.left) == (
            2, one.grid.tops[cell // 3], one.grid.lefts[cell % 3],
        )  # fmt: skip
    assert {pasted.side for scene in (beside, *control) for pasted in scene.pasted} == {half}
    left, right = beside.pasted
    assert (left.thing, right.thing) == (4, 2) and left.left + half <= right.left and left.top == right.top
    assert middle <= left.left and right.left + half <= middle + side
    assert one.corners == [0, 2, 6, 8]
    corners = [scene for scene, cell in zip(full, one.others, strict=True) if cell in one.corners]
    for big, small in zip(corners, control, strict=True):
        for a, b in zip(big.pasted, small.pasted, strict=True):
            assert a.thing == b.thing and abs(a.top + side / 2 - b.top - half / 2) <= 1
    assert one.pair(2, 4, 0)[0].key == scenes[0].key  # swapped roles share ground and shift


def test_in_full_layouts_every_object_visits_every_cell_once():
    one = grid(cells=3)
    cutouts = drawn_shapes(9)
    one = PositionGrid(cutouts, (96, 96), (16, 16), 3)
    scenes = one.full(list(range(9)), 0)
    table = np.array([[pasted.thing for pasted in scene.pasted] for scene in scenes])
    for line in (*table, *table.T):
        assert sorted(line) == list(range(9))
    with pytest.raises(CaptError, match="found 3 objects, expected 9"):
        one.full([0, 1, 2], 0)


# ---- objects and grounds ---------------------------------------------------------------------------------------------


def test_shipped_emoji_are_cut_off_their_white_ground():
    cutouts = emoji_cutouts(12, seed=5)
    assert len(cutouts) == 12 and min(map(len, cutouts.pictures)) >= 3
    words = [word for name in cutouts.names for word in name.split()]
    assert len(words) == len(set(words))
    for pictures in cutouts.pictures:
        for picture in pictures:
            opaque = picture[..., 3] == 255
            assert picture.shape[0] == picture.shape[1] and 0.05 < opaque.mean() < 1
            assert opaque.any(0).all() or opaque.any(1).all()  # cut to what is visible
            border = opaque & ~(np.pad(opaque, 1)[2:, 1:-1] & np.pad(opaque, 1)[:-2, 1:-1])
            assert np.median(picture[border][:, :3].min(1)) < 236  # no white rim
    assert emoji_cutouts(12, seed=5).names == cutouts.names != emoji_cutouts(12, seed=6).names


def test_emoji_by_name_and_what_cannot_be_had():
    assert emoji_cutouts(names=["tiger", "banana"]).names == ("tiger", "banana")
    with pytest.raises(DataError, match="no shipped emoji is called 'unicorn pie'"):
        emoji_cutouts(names=["unicorn pie"])
    with pytest.raises(DataError, match="5000 objects asked for"):
        emoji_cutouts(5000)


def test_drawn_shapes_can_leave_out_the_red_circle():
    names = drawn_shapes(without=("red", "circle", "ring")).names
    assert len(names) == 42 and not {"red", "circle", "ring"} & {word for name in names for word in name.split()}
    with pytest.raises(CaptError, match="'octagon' is none of"):
        drawn_shapes(without=("octagon",))
    with pytest.raises(CaptError, match="n: found 65"):
        drawn_shapes(65)


def test_drawn_shapes_have_their_areas():
    expected = {"square": 1, "circle": np.pi / 4, "ring": np.pi / 4 * (1 - 0.36), "cross": 5 / 9}
    shapes = drawn_shapes()
    for name, (picture,) in zip(shapes.names, shapes.pictures, strict=True):
        shape = name.split()[1]
        if shape in expected:
            assert (picture[..., 3] / 255).mean() == pytest.approx(expected[shape], abs=0.01)


def test_own_cutouts_come_from_a_folder_of_transparent_pictures(tmp_path):
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[5:15, 10:16] = (10, 200, 30, 255)
    for name in ("red cup", "plate"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    cutouts = read_cutouts(tmp_path)
    assert cutouts.names == ("plate", "red cup")
    (picture,) = cutouts.pictures[1]
    assert picture.shape == (10, 10, 4) and (picture[:, 2:8, 3] == 255).all() and not picture[:, :2, 3].any()
    Image.fromarray(pixels[..., :3]).save(tmp_path / "plate" / "2.png")
    with pytest.raises(DataError, match=r"plate/2.png.*transparent ground"):
        read_cutouts(tmp_path)


def test_objects_without_pictures_or_pixels_are_refused():
    with pytest.raises(DataError, match="transparent everywhere"):
        Cutouts(("air",), ((np.zeros((4, 4, 4), np.uint8),),))
    with pytest.raises(DataError, match="the object 'air' has none"):
        Cutouts(("air",), ((),))
    with pytest.raises(DataError, match=r"expected uint8 \[height, width, 4\]"):
        Cutouts(("air",), ((np.zeros((4, 4, 3), np.uint8),),))


def test_photographs_are_cut_to_the_canvas_and_never_stretched(tmp_path):
    ramp = np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (60, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    kind = background(tmp_path)
    drawn = [kind.draw((40, 40), np.random.default_rng(seed)) for seed in range(4)]
    for canvas in drawn:
        assert canvas.shape == (40, 40, 3)
        assert np.diff(canvas[20, :, 0].astype(float))[2:-2].mean() == pytest.approx(60 / 40, abs=0.05)
    assert len({int(canvas[0, 0, 0]) for canvas in drawn}) > 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no image"):
        background(tmp_path / "empty")
