"""CenterBias: what it chooses on some objects holds on others, on every kind of tower, and can be stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import capt
from capt.backbones.transforms import EvalTransform
from capt.data.cutouts import drawn_shapes
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation.center_bias import NOT_SHOWN, TO_CENTER, measure_center_bias
from capt.evaluation.position_results import Positions
from capt.evaluation.preprocessing_check import check_preprocessing
from capt.methods.bias.explanation import explain_center_bias
from capt.methods.bias.members import (
    Member,
    ShuffledBias,
    family,
    inverted,
    load_member,
    save_member,
    shuffled,
)
from capt.methods.bias.mitigation import mitigate_center_bias
from capt.methods.bias.trial import SCORES, Trial, cosines
from capt.modules import MassTransfer, PriorCancellation, RadialBias, Temperature, UniformMixture, attention_prior
from capt.modules.crop_pooling import CropPooling
from capt.modules.key_groups import CenterGroups
from capt.modules.patch_pooling import PatchPooling
from tests.planted_tower import planted
from tests.pooled_towers import wrapped
from tests.test_bias_stages import REAL, WORDS, real_grid, with_words

RADIAL = [Member(f"radial {x}", RadialBias(strength=x, shape="r2")) for x in (-2.0, 1.0, 4.0, 8.0)]


@pytest.fixture(scope="module")
def cured():
    """A planted bias of 2, which a radial bias of 4 (times half of rho^2) cancels exactly."""
    backbone = planted(24, beta=2.0)
    return backbone, mitigate_center_bias(backbone, backbone.plan.grid(5), members=RADIAL, region_objects=1)


def test_the_counter_measure_of_a_planted_bias_is_chosen_and_holds_on_other_objects(cured):
    backbone, found = cured
    assert found.chosen is RADIAL[2] and found.off.after == 1 > found.off.before + 0.2
    assert found.off.gain.low > 0.2 and found.clean.gain.estimate == 0
    before, after = (
        measure_center_bias(one, backbone.plan.grid(5), layouts=["pair"]) for one in (backbone, found.backbone)
    )
    assert before.verdict == TO_CENTER and after.verdict == NOT_SHOWN
    assert after.pair.profile.min() == 1
    assert "center" not in found.words()[0].split(":")[0] and found.chosen.name in found.words()[0]


def test_controls_of_the_choice_do_less_or_harm(cured):
    _, found = cured
    gains = {one["name"]: one["off"]["gain"]["estimate"] for one in found.controls}
    assert len(gains) == 4 and gains.pop("inverted: radial 4.0") <= 0
    assert max(gains.values()) < found.off.gain.estimate


def test_the_table_has_every_member_best_first_and_scores_are_no_backbones(cured):
    _, found = cured
    table = found.table
    assert [row["name"] for row in table[:2]] == ["as it is", "radial 4.0"]
    assert {row["name"] for row in table} == {"as it is", *SCORES, *(one.name for one in RADIAL)}
    assert {row["name"] for row in table if not row["usable"]} == set(SCORES)
    regions = {row["name"] for row in found.regions}
    assert {"circle on the object", "control: circle in the middle", "control: circle in an empty cell"} <= regions
    assert found.regions[-1]["distance"] >= 0
    json.dumps(found.record(), allow_nan=False)


def test_an_unbiased_model_is_left_as_it_is():
    backbone = planted(16, patches=3, beta=0.0, ground=0.1)
    grid = backbone.plan.grid(3)
    found = mitigate_center_bias(backbone, grid, members=RADIAL, center_radius=0.1, region_objects=0)
    assert found.chosen is None and found.best is None and found.backbone is backbone and not found.regions
    assert found.words()[0].startswith("No member of the family")
    assert not found.record()["helps"]


def test_a_gain_by_chance_on_the_calibration_objects_is_not_called_help():
    backbone = planted(16, patches=3, beta=0.0, ground=0.1, token_noise=1.0)
    grid = backbone.plan.grid(3)
    found = mitigate_center_bias(backbone, grid, members=RADIAL, center_radius=0.1, region_objects=0)
    assert found.chosen is None and found.backbone is backbone


def test_a_member_that_costs_too_much_in_the_center_is_not_chosen():
    """Weight on nothing but the rest finds lone objects there, and none in the center."""
    backbone = planted(16, patches=5, beta=3.0, ground=0.5, token_noise=0.1)
    members = [Member("all to the rest", MassTransfer(moved_share=1.0))]
    found = mitigate_center_bias(backbone, backbone.plan.grid(5), members=members, region_objects=0)
    row = next(one for one in found.table if one["name"] == members[0].name)
    assert row["calibration_off"] > found.table[0]["calibration_off"]
    assert row["calibration_clean"] < found.table[0]["calibration_clean"] - 0.01 and found.best is None


# ---- members ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_what_is_scored_is_what_the_changed_backbone_gives(name):
    backbone = with_words(name)
    grid = real_grid(backbone)
    trial = Trial(backbone, grid, "a {}", Positions.of(grid.grid, 0.1))
    members = family(trial.pooling, trial.prior(), passes=6)
    images = trial.images(grid.single(1, 0)[1:4])
    with torch.no_grad():
        rows = list(trial.scores(images, trial.pooling.inputs(images), members, trial.texts))
        assert len(rows) == 1 + len(members) + len(SCORES)
        for member, scores in zip(members, rows[1:], strict=False):
            features = member.apply(backbone).image_features(images)
            torch.testing.assert_close(cosines(features, trial.texts), scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(cosines(backbone.image_features(images), trial.texts), rows[0])


@pytest.mark.parametrize("name", REAL)
def test_every_kind_of_tower_is_mitigated_from_end_to_end(name):
    backbone = with_words(name)
    members = [Member("r", RadialBias(strength=1.0)), Member("mean", PatchPooling("mean token"))]
    found = mitigate_center_bias(backbone, real_grid(backbone), members=members, center_radius=0.1, region_objects=1)
    assert len(found.table) == 5 and all(0 <= row["held_out_off"] <= 1 for row in found.table)
    images = torch.zeros(1, 3, *backbone.image_hw, dtype=backbone.dtype)
    assert found.backbone.image_features(images).shape == (1, backbone.dim)
    json.dumps(found.record(), allow_nan=False)


@pytest.mark.parametrize("change", [RadialBias(strength=1.0), PatchPooling("mean token"), CropPooling()])
def test_a_changed_model_is_not_taken_for_the_plain_one(change):
    plain = with_words("open_clip ViT, class token")
    changed, grid = Member("a", change).apply(plain), real_grid(plain)
    with pytest.raises(CaptError, match="changed already"):
        mitigate_center_bias(changed, grid, center_radius=0.1)
    with pytest.raises(CaptError, match="changed already"):
        explain_center_bias(changed, grid, center_radius=0.1)
    with pytest.raises(CaptError, match="changed already"):
        Member("b", RadialBias(strength=2.0)).apply(changed)


def test_inverted_members_point_the_other_way():
    prior = torch.rand(1, 9)
    assert inverted(Member("a", RadialBias(strength=2.0))).change.strength == -2
    assert inverted(Member("a", PriorCancellation(prior=prior, kappa=0.5))).change.kappa == -0.5
    assert inverted(Member("a", Temperature(alpha=0.5))).change.alpha == 2
    assert inverted(Member("a", MassTransfer())).change.donors == ("off",)
    assert inverted(Member("a", UniformMixture())).change.receivers == ("center",)
    assert inverted(Member("a", CropPooling(9))).change == CropPooling(1)
    assert inverted(Member("a", PatchPooling())) is None and shuffled(Member("a", PatchPooling()), 0) is None


def test_random_patches_keep_the_amounts_and_lose_the_places():
    rule = RadialBias(strength=2.0)
    control = shuffled(Member("a", rule), 3).change
    assert isinstance(control, ShuffledBias)
    assert torch.equal(control.bias((4, 4)).sort().values, rule.bias((4, 4)).sort().values)
    assert not torch.equal(control.bias((4, 4)), rule.bias((4, 4)))
    assert shuffled(Member("a", MassTransfer()), 3).groups == CenterGroups(seed=3)


def test_what_cannot_be_opened_again_is_not_stored(tmp_path):
    backbone = planted(4, patches=3)
    with pytest.raises(CaptError, match="a ShuffledBias cannot be stored"):
        save_member(tmp_path, shuffled(RADIAL[1], 0), backbone, {})


def test_stored_members_come_back_the_same(tmp_path):
    backbone = wrapped("open_clip ViT, class token")
    pooling, images = backbone.tower.pooling(), torch.randn(2, 3, *backbone.image_hw, dtype=torch.float64)
    prior = attention_prior(pooling, pooling.inputs(images)).float()
    for number, member in enumerate(family(pooling, prior, passes=10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_member(folder, member, backbone, {"model": "tiny"})
        found = load_member(folder, backbone)
        assert found.fingerprint() == member.apply(backbone).fingerprint() != backbone.fingerprint()
        assert torch.equal(found.image_features(images), member.apply(backbone).image_features(images))
    save_member(tmp_path, None, backbone, {})
    assert load_member(tmp_path, backbone) is backbone


def test_damaged_and_foreign_mitigations_are_refused(tmp_path):
    backbone, file = wrapped("open_clip ViT, class token"), tmp_path / "mitigation.json"
    with pytest.raises(DataError, match=r"mitigation\.json"):
        load_member(tmp_path, backbone)
    save_member(tmp_path, RADIAL[1], backbone, {"model": "tiny"})
    with pytest.raises(CaptError, match="made for a model with fingerprint"):
        load_member(tmp_path, wrapped("transformers CLIP"))
    stored = json.loads(file.read_text())
    for broken in ([], {"schema": 1}, {**stored, "change": {"rule": "Magic", "options": {}, "name": "a"}}):
        file.write_text(json.dumps(broken))
        with pytest.raises(DamagedFileError):
            load_member(tmp_path, backbone)


# ---- the class -------------------------------------------------------------------------------------------------------


def test_the_class_runs_all_three_and_its_backbone_is_one():
    backbone = with_words("open_clip ViT, class token")
    from capt.data.cutouts import Cutouts

    cutouts = Cutouts(WORDS, drawn_shapes(len(WORDS)).pictures)
    told = []
    bias = capt.CenterBias(
        backbone,
        cutouts,
        n=4,
        candidates=8,
        cells=3,
        backgrounds=("grey",),
        center_radius=0.1,
        progress=lambda *step: told.append(step),
    )
    names = bias.measure().settings["grid"]["objects"]["names"]
    assert len(names) == 4 and set(names) < set(WORDS) and names == list(bias.cutouts.names[:4])
    assert len(bias.explain().margins["final"]) == 4
    assert bias.mitigate(region_objects=0).settings["held_out_objects"] == 4
    assert {"stages of lone objects", "held-out objects"} <= {what for what, _, _ in told}


def test_objects_are_those_that_the_model_knows_and_without_choice_the_first():
    from capt.data.cutouts import Cutouts

    backbone = planted(8, patches=5, beta=0.0)
    plan = backbone.plan.cutouts
    known = backbone.plan.text_features

    def knows_half(texts):
        features = known([texts] if isinstance(texts, str) else list(texts))
        for row, text in zip(features, texts, strict=True):
            if int(text.split()[-1]) < 4:
                row[:] = 0
                row[-1] = 1
        return features

    backbone.text_features = knows_half
    options = {"n": 4, "cells": 5, "backgrounds": ("grey",)}
    assert set(capt.CenterBias(backbone, plan, **options).grid().cutouts.names) == set(plan.names[4:])
    first = capt.CenterBias(backbone, plan, candidates=4, **options)
    assert first.cutouts.names == plan.names[:4]
    few = capt.CenterBias(backbone, Cutouts(plan.names[:3], plan.pictures[:3]), **options)
    assert few.n == 3 and few.grid().cutouts.names == plan.names[:3]


def test_too_few_objects_are_refused():
    backbone = planted(6, patches=3)
    with pytest.raises(DataError, match="at least 8"):
        mitigate_center_bias(backbone, backbone.plan.grid(3), center_radius=0.1)
    with pytest.raises(CaptError, match="at least 2"):
        capt.CenterBias(backbone, n=1)
    for wrong in ({"passes": 0}, {"region_objects": -1}, {"level": 0.0}):
        with pytest.raises(CaptError, match=f"{next(iter(wrong))}: found"):
            mitigate_center_bias(backbone, backbone.plan.grid(3), center_radius=0.1, **wrong)
    with pytest.raises(CaptError, match="candidates: found 3, expected at least the 4"):
        capt.CenterBias(backbone, n=4, candidates=3)
    with pytest.raises(CaptError, match="neither 'emoji' nor 'shapes'"):
        capt.CenterBias(backbone, "nowhere")


# ---- preprocessing ---------------------------------------------------------------------------------------------------


def test_a_crop_that_cuts_objects_off_is_told_from_a_bias_of_the_encoder():
    backbone = planted(8, patches=7, beta=0.0, ground=0.1)
    half = (0.5, 0.5, 0.5)
    backbone.preprocess = EvalTransform(backbone.image_hw, half, half, resize_mode="shortest")
    found = check_preprocessing(backbone, backbone.plan.grid(7, fill=1.0))
    visible = found.visible["native"]
    assert (visible[1:6] == 1).all() and (visible[[0, 6]] < 0.25).all()
    assert (found.visible["squash"] == 1).all() and (found.visible["pad"] == 1).all()
    seen = found.right["native"].mean(0)
    assert seen[1:6].min() == 1 and seen[[0, 6]].max() < 1
    np.testing.assert_allclose(found.x, -found.x[::-1], atol=0.03)
    record = found.record()["preprocessing"]
    assert record["native"]["gap"]["estimate"] > 0.2
    assert found.right["squash"].mean() == 1
    assert "native" in found.words() and "squash" in found.words()
    np.testing.assert_allclose(record["native"]["visible_off"], visible[~found.center].mean())
