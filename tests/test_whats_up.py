"""The four-way test on photographs: names, captions, groups, ties, orders, preprocessing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from capt.backbones.transforms import EvalTransform
from capt.errors import CaptError, DataError
from capt.evaluation.whats_up import (
    Photograph,
    four_captions,
    four_way_choice,
    parse_photograph,
    preprocessing,
    score_photographs,
    surviving_share,
)
from tests.tiny import backbone

NAMES = (
    "mug_on_table.jpeg",
    "mug_under_table.jpeg",
    "red-cup_left_of_tea-pot.jpeg",
    "red-cup_right_of_tea-pot.png",
    "bowl_in-front_of_plate.jpeg",
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mug_on_table.jpeg", Photograph("mug", "on", "table", True)),
        ("mug_under_table.jpeg", Photograph("mug", "under", "table", False)),
        ("red-cup_left_of_tea-pot.jpeg", Photograph("red cup", "left_of", "tea pot", False)),
        ("a_in-front_of_b.jpeg", Photograph("a", "in-front_of", "b", False)),
        ("lamp_on_top_of_desk.v2.jpeg", Photograph("lamp", "on_top_of", "desk.v2", True)),
        ("mug_table.jpeg", None),
        ("holiday.jpeg", None),
    ],
)
def test_file_names_are_taken_apart(name, expected):
    assert parse_photograph(name) == expected


def test_captions_are_verbatim_and_uncorrected():
    assert four_captions("orange", "red cup") == [
        "a orange and a red cup",
        "a orange",
        "a red cup",
        "a cat and a refrigerator",
    ]


def test_a_tie_goes_to_the_first_caption():
    captions = F.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]), dim=1)
    images = torch.tensor([[1.0, 0, 0], [0.0, 1, 0], [0, 0, 0]])
    assert four_way_choice(images, captions).tolist() == [0, 2, 0]


def test_the_scale_does_not_change_the_choice():
    torch.manual_seed(0)
    images, captions = F.normalize(torch.randn(500, 16), dim=1), F.normalize(torch.randn(500, 4, 16), dim=2)
    own = four_way_choice(images, captions)
    assert torch.equal(own, four_way_choice(images, captions, scale=1.0))
    assert torch.equal(own, torch.softmax(100 * torch.einsum("be,bke->bk", images, captions), 1).argmax(1))
    assert torch.equal(four_way_choice(images, captions[0]), (images @ captions[0].T).argmax(1))


def photographs(folder, names=NAMES, size=(64, 48)) -> None:
    random = np.random.default_rng(0)
    for name in names:
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)


def test_a_folder_is_scored_as_one_picture_at_a_time(tmp_path):
    photographs(tmp_path, (*NAMES, "holiday.jpeg"))
    model = backbone()
    found = score_photographs(model, tmp_path, batch_size=2)
    assert found.names == sorted(NAMES)
    for mode in ("native", "squash", "pad"):
        for number, (name, one) in enumerate(zip(found.names, found.photographs, strict=True)):
            image = Image.open(tmp_path / name).convert("RGB")
            feature = model.encode_image(preprocessing(model, mode)(image)[None], normalize=True)
            for order, (first, second) in enumerate(((one.first, one.second), (one.second, one.first))):
                texts = [f"a {first} and a {second}", *four_captions(one.first, one.second)[1:]]
                scores = (feature @ model.text_features(texts).T)[0]
                assert found.choices[mode][order, number] == int(scores.argmax())
                assert found.margins[mode][order, number] == pytest.approx(
                    float(scores[0] - scores[1:].max()), abs=1e-5
                )


def test_groups_relations_and_histograms(tmp_path):
    photographs(tmp_path)
    found = score_photographs(backbone(), tmp_path)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["n"] == 5
    native = record["preprocessing"]["native"]
    assert sum(native["choices"]["all"].values()) == 5
    assert sum(native["choices"]["center"].values()) == 1 and sum(native["choices"]["off"].values()) == 4
    assert {name: row["n"] for name, row in native["relations"].items()} == {
        "in-front_of": 1, "left_of": 1, "on": 1, "right_of": 1, "under": 1,
    }  # fmt: skip
    found.choices["native"][0] = [1 if "_on_" in name else 0 for name in found.names]
    assert found.accuracy("native") == {"all": 0.8, "center": 0.0, "off": 1.0, "gap": -1.0}
    assert found.accuracy("native", 1).keys() == {"all", "center", "off", "gap"}


def test_a_group_without_photographs_has_no_accuracy(tmp_path):
    photographs(tmp_path, NAMES[1:])
    found = score_photographs(backbone(), tmp_path, modes=["squash"])
    assert found.accuracy("squash")["center"] is None is found.accuracy("squash")["gap"]
    assert found.record()["preprocessing"]["squash"]["gap"] is None


def ramp(width=160, height=120) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, 1, 3)))


def test_only_the_shorter_side_rule_cuts_the_sides_off():
    cut = EvalTransform((60, 60), (0.0,) * 3, (1.0,) * 3)
    squash = EvalTransform((60, 60), (0.0,) * 3, (1.0,) * 3, resize_mode="squash")
    lost, whole = (transform(ramp())[0, 30] for transform in (cut, squash))
    assert lost[0] == pytest.approx(0.125, abs=0.02) and lost[-1] == pytest.approx(0.875, abs=0.02)
    assert whole[0] < 0.02 and whole[-1] > 0.98
    assert surviving_share(cut, 160, 120) == pytest.approx(0.75) == surviving_share(cut, 120, 160)
    assert surviving_share(squash, 160, 120) == 1
    assert surviving_share(cut, 100, 100) == 1 and surviving_share(lambda image: image, 160, 120) is None


def test_padding_keeps_shape_and_everything():
    model = backbone()
    pad = preprocessing(model, "pad")
    image = (pad(ramp()) * 0.5 + 0.5)[0]
    assert image.shape == (32, 32) and surviving_share(pad, 160, 120) == 1
    grey = abs(image - 128 / 255) < 0.005
    assert grey[:4].all() and grey[28:].all()
    assert image[16, 0] < 0.05 and image[16, -1] > 0.95


def test_what_cannot_be_scored_is_refused(tmp_path):
    photographs(tmp_path, ["holiday.jpeg"])
    with pytest.raises(DataError, match="1 pictures, none of them called"):
        score_photographs(backbone(), tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        score_photographs(backbone(), tmp_path / "nowhere")
    with pytest.raises(CaptError, match="mode: found 'crop'"):
        preprocessing(backbone(), "crop")
