"""Where a loss arises: planted biases are found at their stage with their sign, an unbiased tower raises no alarm."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from capt.data.cutouts import Cutouts, drawn_shapes
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError
from capt.evaluation.concept_survival import concept_scores
from capt.methods.bias.explanation import explain_center_bias
from capt.methods.bias.stages import STAGES
from tests.planted_tower import planted
from tests.pooled_towers import CLASS_TOKEN, KINDS, wrapped

#: Enough objects for a test over pairs at 1 %.
N = 20
PLANTED = {
    "attention to the middle": ({"beta": 1.5, "ground": 0.1}, "in pooling", "center"),
    "attention to the border": ({"beta": -1.5, "ground": 0.1}, "in pooling", "border"),
    "tokens that fade outwards": ({"beta": 0.0, "ground": 0.1, "fade": 1.0}, "before pooling", "center"),
    "tokens that fade inwards": ({"beta": 0.0, "ground": 0.1, "fade": -1.0}, "before pooling", "border"),
    "both": ({"beta": 1.5, "ground": 0.1, "fade": 0.3}, "before and in pooling", "center"),
}


def explained(backbone, **options):
    return explain_center_bias(backbone, backbone.plan.grid(3), center_radius=0.1, **options)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bias_is_found_at_its_stage_and_with_its_sign(name):
    plan, where, favours = PLANTED[name]
    found = explained(planted(N, patches=3, **plan))
    assert (found.visibility.where, found.visibility.favours) == (where, favours)
    assert found.competition.favours == favours
    assert (
        where in found.diagnosis and f"towards the {'border' if favours == 'center' else 'center'}" in found.diagnosis
    )
    assert ("are not to blame" in " ".join(found.words())) == (where == "before pooling")


def test_a_loss_to_the_other_object_alone_is_no_loss_of_lone_objects():
    found = explained(planted(N, patches=3, beta=1.5, ground=0.0))
    assert found.visibility.where == "nowhere" and found.competition.where == "in pooling"
    assert found.diagnosis == "competition loss towards the border, in pooling"


def test_the_parts_of_a_loss_add_up_to_it_and_to_the_margins():
    found = explained(planted(N, patches=3, beta=1.0, ground=0.1, fade=0.5, token_noise=0.05))
    for loss in found.losses:
        parts = loss.before.effect.estimate + loss.pooling.effect.estimate
        assert parts == pytest.approx(loss.total.effect.estimate, abs=1e-9)
    center = found.positions.center
    for stage, part in (("final", found.visibility.total), ("even", found.visibility.before)):
        margins = found.margins[stage].mean(0)
        assert margins[center].mean() - margins[~center].mean() == pytest.approx(part.effect.estimate, abs=1e-5)


def test_survival_and_vanishing_are_those_of_the_construction():
    """Attention that sees the middle patch only: objects elsewhere are in their patches and not in the feature."""
    found = explained(planted(N, patches=3, beta=40.0, ground=0.1))
    center = found.positions.center
    for stage in ("tokens", "values", "single", "oracle"):
        assert (found.survival[stage] == 1).all()
    assert found.survival["final"][center].all() and found.vanish[center].max() == 0
    attention = found.attribution.attention
    assert attention["center_ratio_by_layer"] == [pytest.approx(9, rel=1e-6)]
    gains = np.array(attention["object_gain_map"], float)
    assert gains[1, 1] == pytest.approx(9) and np.delete(gains.reshape(-1), 4).max() < 1e-6
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["losses"]["visibility"]["where"] == "in pooling" and set(record["stages"]) == set(STAGES)


def test_chance_is_that_of_names_that_are_not_shown():
    found = explained(planted(N, patches=3, beta=0.0, ground=0.1, token_noise=50.0), best=5)
    for stage in ("mean", "even", "oracle", "final"):  # tokens of nothing but noise
        assert found.survival[stage].mean() == pytest.approx(found.chance[stage].mean(), abs=0.12)
        assert found.chance[stage].mean() == pytest.approx(5 / N, abs=0.05)
    assert found.chance["single"].mean() >= found.chance["final"].mean() - 0.05


def test_an_unbiased_tower_raises_at_most_10_alarms_in_200_seeds():
    alarms, margins = 0, []
    for seed in range(200):
        found = explained(planted(N, patches=3, beta=0.0, ground=0.1, token_noise=0.4, seed=seed), looked_at=0)
        alarms += found.diagnosis != "none"
        margins.append(found.visibility.total.effect.high - found.visibility.total.effect.low)
    assert alarms <= 10
    assert np.mean(margins) > 0.02  # there was noise to mistake for a bias


# ---- real towers -----------------------------------------------------------------------------------------------------

REAL = (
    "open_clip ViT, class token", "timm ViT, SigLIP map pooling", "open_clip ResNet, 4 x 4", "timm ResNet, 4 x 4",
    "transformers CLIP", "transformers SigLIP",
)  # fmt: skip
WORDS = ("cat", "dog", "bird", "car", "tree", "red cat", "blue dog", "old bird")


def real_grid(backbone) -> PositionGrid:
    cutouts = Cutouts(WORDS, drawn_shapes(len(WORDS)).pictures)
    return PositionGrid.for_backbone(backbone, cutouts, cells=3, backgrounds=("grey",))


def with_words(name):
    from capt import wrap
    from tests.backbone_models import hf_clip, hf_siglip, word_tokenizer

    if not name.startswith("transformers"):
        # Convolutions in double precision are slow.
        return wrapped(name, torch.float32 if "timm ResNet" in name else torch.float64)
    torch.manual_seed(0)
    return wrap((hf_siglip() if "SigLIP" in name else hf_clip(64, eos=63)).double(), word_tokenizer())


@pytest.mark.parametrize("name", REAL)
def test_every_kind_of_tower_is_explained(name):
    backbone = with_words(name)
    grid = real_grid(backbone)
    found = explain_center_bias(backbone, grid, center_radius=0.1)
    texts = backbone.text_features([f"a {word}" for word in WORDS]).double()
    images = grid.tensor(grid.single(2, 0)[1:]).double()
    scores = concept_scores(backbone.image_features(images).double(), texts)
    absent = [i for i in range(len(WORDS)) if i != 2]
    expected = scores[:, 2] - scores[:, absent].mean(1)
    np.testing.assert_allclose(found.margins["final"][2], expected.numpy(), atol=1e-6)
    attribution = found.attribution
    assert attribution.attention["kind"] == KINDS[name]
    layers = len(backbone.tower.blocks) if name in CLASS_TOKEN else 1
    assert len(attribution.attention["center_ratio_by_layer"]) == layers
    assert isinstance(attribution.effects, str) or len(attribution.effects["by_layer_off"]) == layers
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["attention"]["views"].keys() == {"raw", "value_weighted", "without_sinks", "rollout"}
    assert isinstance(record["attention"]["views"]["rollout"], str) == (not backbone.tower.blocks)
    assert isinstance(record["layers"], str) == (name not in CLASS_TOKEN)
    if KINDS[name] == "average":
        assert record["heads"] == "average pooling has no heads"
        return
    whole, margins = record["heads"]["margins"]["whole"], found.margins["final"].mean(0)
    assert whole["center"] == pytest.approx(margins[found.positions.center].mean(), abs=1e-6)
    assert whole["off"] == pytest.approx(margins[~found.positions.center].mean(), abs=1e-6)
    if name in CLASS_TOKEN:  # the row after the last block is the feature
        survival, center = found.survival["final"], found.positions.center
        assert (record["layers"]["center"][-1], record["layers"]["off"][-1]) == pytest.approx(
            (survival[center].mean(), survival[~center].mean())
        )


def test_what_cannot_be_explained_is_refused():
    backbone = planted(4, patches=3)
    with pytest.raises(CaptError, match="pairs"):
        explained(backbone, pairs=3)
    grid = backbone.plan.grid(3)
    alone = PositionGrid(grid.cutouts.choose([0]), grid.image_hw, grid.patch_hw, 3)
    with pytest.raises(CaptError, match="at least 2"):
        explain_center_bias(backbone, alone, center_radius=0.1)


def test_the_opacity_of_a_scene_is_where_its_object_is():
    grid = planted(4, patches=3).plan.grid(3)
    pair = grid.pair(0, 1, 0)[0]
    opacity = grid.opacity(pair)
    assert opacity.shape == (2, *grid.image_hw) and opacity.max() == 1
    for layer, one in zip(opacity, pair.pasted, strict=True):
        inside = torch.zeros_like(layer, dtype=torch.bool)
        inside[one.top : one.top + one.side, one.left : one.left + one.side] = True
        assert layer[~inside].max() == 0 and layer[inside].min() == 1
