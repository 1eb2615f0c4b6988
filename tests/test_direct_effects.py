"""Features taken apart: exact sums for every pooling, whatever norms and scales the blocks have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError
from capt.modules import (
    direct_effects,
    first_order_shares,
    mean_ablated,
    object_share,
    ring_members,
)
from tests.pooled_towers import ATTENTION, AVERAGE, CLASS_TOKEN, SOME, pictures, relative, wrapped

NORM_IN_HEAD = ("timm ConvNeXt, 4 x 4", "timm EVA")
LINEAR = [name for name in (*CLASS_TOKEN, *ATTENTION, *AVERAGE) if name not in NORM_IN_HEAD]
VIT = "open_clip ViT, class token"


@pytest.mark.parametrize("name", LINEAR)
def test_all_parts_together_are_the_feature(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    effects = direct_effects(pooling, images)
    feature = backbone.image_features(images)
    assert len(effects.layers) == (3 if pooling.kind == "class token" else 1)
    assert relative(effects.total(), feature) < 1e-10
    assert relative(effects.components("uniform").sum(1), feature) < 1e-10


@pytest.mark.parametrize("name", SOME)
def test_tokens_heads_and_layers_add_up_to_the_same(name: str) -> None:
    backbone = wrapped(name)
    effects = direct_effects(backbone.tower.pooling(), pictures(backbone))
    each = torch.stack([effects.contributions(layer) for layer in range(len(effects.layers))], dim=1)
    torch.testing.assert_close(each.sum(3), effects.heads())
    torch.testing.assert_close(each.sum((1, 2)), effects.tokens())
    attention = effects.components()[:, 1 : 1 + len(effects.layers)]
    torch.testing.assert_close(each.sum((2, 3)), attention)


@pytest.mark.parametrize("name", SOME)
def test_fused_scores_are_those_of_the_full_contributions(name: str) -> None:
    backbone = wrapped(name)
    effects = direct_effects(backbone.tower.pooling(), pictures(backbone))
    concepts = torch.randn(5, backbone.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = torch.stack([effects.contributions(layer) @ concepts.T for layer in range(len(effects.layers))], dim=1)
    assert relative(effects.concept_scores(concepts), full) < 1e-12


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_sums_hold_in_lower_precision(dtype: torch.dtype, bound: float) -> None:
    import copy

    import capt

    plain = wrapped(VIT, torch.float32)
    backbone = capt.wrap(copy.deepcopy(plain.model).to(dtype))
    images = pictures(plain).to(dtype)
    effects = direct_effects(backbone.tower.pooling(), images)
    assert relative(effects.total().float(), backbone.image_features(images).float()) < bound


def test_parts_of_a_class_token_are_what_public_code_computes() -> None:
    """The uniform split against the procedure written out: one centring for all, biases spread evenly."""
    backbone = wrapped(VIT)
    visual, images = backbone.model.visual, pictures(backbone)
    x, parts = backbone.tower.embed(images), []
    start = x[:, 0]
    attention, feeding = [], []
    for block in backbone.tower.blocks:
        attended = block.attend(x)
        attention.append((attended - x)[:, 0])
        x = block.feed_forward(attended)
        feeding.append((x - attended)[:, 0])
    parts = [start, *attention, *feeding]
    row = x[:, 0]
    sigma = (row.var(-1, correction=0, keepdim=True) + visual.ln_post.eps).sqrt()
    even = row.mean(-1, keepdim=True) / len(parts)
    expected = [
        (((part - even) / sigma) * visual.ln_post.weight + visual.ln_post.bias / len(parts)) @ visual.proj
        for part in parts
    ]
    effects = direct_effects(backbone.tower.pooling(), images)
    assert relative(effects.components("uniform"), torch.stack(expected, dim=1)) < 1e-10
    assert relative(effects.components("own")[:, 0], effects.components("uniform")[:, 0]) > 1e-3
    with pytest.raises(CaptError, match="found 'even'"):
        effects.components("even")  # type: ignore[arg-type]


def test_rings_add_up_and_objects_take_their_share() -> None:
    backbone = wrapped(VIT)
    pooling = backbone.tower.pooling()
    effects = direct_effects(pooling, pictures(backbone))
    scores = effects.concept_scores(F.normalize(torch.eye(backbone.dim, dtype=torch.float64)[:4], dim=-1))
    patches = scores[:, :, :, -pooling.n_patches :]
    rings = torch.einsum("blhnc,nr->blhrc", patches, ring_members(pooling.grid, 2).double())
    torch.testing.assert_close(rings.sum(3), patches.sum(3))
    objects = torch.zeros(3, pooling.n_patches, dtype=torch.bool)
    objects[:, :5] = True
    by_token = patches.sum((1, 2))
    expected = by_token[:, :5].sum(1) / by_token.abs().sum(1)
    torch.testing.assert_close(object_share(scores, objects), expected)
    torch.testing.assert_close(object_share(scores, objects[0]), expected)


def test_taking_an_objects_contributions_away_lowers_its_score() -> None:
    backbone = wrapped(VIT)
    effects = direct_effects(backbone.tower.pooling(), pictures(backbone))
    tokens = effects.tokens()
    concept = tokens[0, 4]  # what patch 3 of the first image wrote
    before = effects.total()[0] @ concept
    after = (effects.total()[0] - tokens[0, 4]) @ concept
    torch.testing.assert_close(before - after, concept @ concept)
    score = effects.concept_scores(concept[None])[0].sum((0, 1))[4, 0]
    torch.testing.assert_close(score, concept @ concept)


def test_ablated_heads_write_their_mean() -> None:
    backbone = wrapped(VIT)
    effects = direct_effects(backbone.tower.pooling(), pictures(backbone))
    heads = effects.heads()
    means, none = heads.mean(0), torch.zeros(heads.shape[1:3], dtype=torch.bool)
    torch.testing.assert_close(mean_ablated(effects, none, means), effects.total())
    one = none.clone()
    one[1, 0] = True
    expected = effects.total() - heads[:, 1, 0] + means[1, 0]
    torch.testing.assert_close(mean_ablated(effects, one, means), expected)


@pytest.mark.parametrize("name", ["timm ViT, SigLIP map pooling", "transformers SigLIP"])
def test_first_order_shares_are_the_slope_of_the_feature(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    shares = first_order_shares(pooling, images)
    inputs = pooling.inputs(images)
    weights, values = pooling.weights(inputs), pooling.values(inputs)

    def feature(scale: float) -> torch.Tensor:
        factor = torch.ones(weights.shape[-1], dtype=torch.float64)
        factor[2] = scale
        return pooling.pool(weights * factor, inputs)

    assert values.shape[1] == shares.shape[1]
    slope = (feature(1 + 1e-5) - feature(1 - 1e-5)) / 2e-5
    assert relative(shares[:, 2], slope) < 1e-6


def test_first_order_shares_are_the_exact_ones_where_the_tail_is_linear() -> None:
    backbone = wrapped("open_clip ResNet, 4 x 4")
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    torch.testing.assert_close(first_order_shares(pooling, images), direct_effects(pooling, images).tokens())


@pytest.mark.parametrize("name", NORM_IN_HEAD)
def test_a_projection_that_is_not_linear_is_refused(name: str) -> None:
    backbone = wrapped(name)
    with pytest.raises(CaptError, match="not linear"):
        direct_effects(backbone.tower.pooling(), pictures(backbone))
