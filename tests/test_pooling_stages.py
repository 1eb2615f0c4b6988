"""Read-outs around the last aggregation, sweeps from kept inputs, and other ways to pool."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError, DataError
from capt.modules import (
    MassTransfer,
    PoolingSweep,
    RadialBias,
    RegionBoost,
    RegionGroups,
    Temperature,
    UniformMixture,
    blended,
    by_confidence,
    crop_features,
    generalised_mean,
    late_interaction,
    mean_of_tokens,
    mean_of_values,
    oracle,
    patch_mask,
    pooling_stages,
    redistributed,
    region_features,
    row_by_block,
    top_mean,
    value_tokens,
)
from tests.pooled_towers import SOME, pictures, relative, wrapped

VIT = "open_clip ViT, class token"


@pytest.mark.parametrize("name", SOME)
def test_stages_are_rows_with_all_weight_where_they_say(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    inputs = pooling.inputs(images)
    n, mask = pooling.n_patches, torch.zeros(pooling.n_patches, dtype=torch.bool)
    mask[[0, n - 1]] = True
    stages = pooling_stages(pooling, inputs, mask)
    weights = pooling.weights(inputs)
    one = torch.zeros_like(weights)
    one[..., 2 - n] = 1.0
    assert relative(stages.single[:, 2], pooling.pool(one, inputs)) < 1e-12
    both = torch.zeros_like(weights)
    both[..., [-n, -1]] = weights[..., [-n, -1]]
    assert stages.oracle is not None
    assert relative(stages.oracle, pooling.pool(both / both.sum(-1, keepdim=True), inputs)) < 1e-12
    assert relative(stages.final, backbone.image_features(images)) < 1e-12
    assert stages.tokens.shape == stages.values.shape == (3, n, backbone.dim)
    assert all(torch.isfinite(x).all() for x in stages if x is not None)


@pytest.mark.parametrize("name", SOME)
def test_an_object_that_fills_the_picture_leaves_the_row_without_its_prefix(name: str) -> None:
    backbone = wrapped(name)
    pooling = backbone.tower.pooling()
    inputs = pooling.inputs(pictures(backbone))
    weights = pooling.weights(inputs).clone()
    weights[..., : -pooling.n_patches] = 0
    everything = torch.ones(3, pooling.n_patches, dtype=torch.bool)
    expected = pooling.pool(weights / weights.sum(-1, keepdim=True), inputs)
    assert relative(oracle(pooling, inputs, everything), expected) < 1e-12


def test_values_leave_residual_and_feed_forward_out() -> None:
    backbone = wrapped(VIT)
    visual, pooling = backbone.model.visual, backbone.tower.pooling()
    inputs = pooling.inputs(pictures(backbone))
    attention = visual.transformer.resblocks[-1].attn
    v = F.linear(visual.transformer.resblocks[-1].ln_1(inputs[:, 1:]), *(p.chunk(3)[2] for p in (attention.in_proj_weight, attention.in_proj_bias)))  # fmt: skip # noqa: E501
    assert relative(value_tokens(pooling, inputs), visual.ln_post(attention.out_proj(v)) @ visual.proj) < 1e-12


def test_the_row_after_the_last_block_is_the_feature() -> None:
    backbone = wrapped(VIT)
    images = pictures(backbone)
    rows = row_by_block(backbone.tower, images)
    assert rows.shape == (3, 4, backbone.dim) and torch.equal(rows[:, -1], backbone.image_features(images))
    with pytest.raises(CaptError, match="not its first token's"):
        row_by_block(wrapped("timm ResNet, 4 x 4").tower, images)


def test_patches_of_an_object_are_those_it_covers() -> None:
    alpha = torch.zeros(2, 32, 32)
    alpha[0, 8:24, 8:20] = 1.0  # two rows of one full patch and half of another
    alpha[1, 3:5, 27:30] = 1.0  # less than half of any patch
    mask = patch_mask(alpha, (4, 4))
    assert mask[0].view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert mask[1].nonzero().flatten().tolist() == [3]
    assert torch.equal(patch_mask(alpha[0], (4, 4)), mask[0])
    with pytest.raises(CaptError, match="transparent"):
        patch_mask(torch.zeros(8, 8), (4, 4))


@pytest.mark.parametrize("name", SOME)
def test_a_sweep_gives_the_features_of_redistributed_backbones(name: str) -> None:
    backbone = wrapped(name)
    images = pictures(backbone, 5)
    rules = [RadialBias(1.0, "square"), MassTransfer(0.5), Temperature(0.7), UniformMixture(0.2)]
    from capt.modules import CenterGroups

    grouping = CenterGroups(0.67)
    swept = PoolingSweep(backbone, images.split(2), batch=3).features(rules, grouping)
    assert swept.shape == (4, 5, backbone.dim)
    for rule, features in zip(rules, swept, strict=True):
        assert relative(features, redistributed(backbone, rule, grouping).image_features(images)) < 1e-12
    masks = torch.rand(5, backbone.tower.pooling().n_patches, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    boosted = PoolingSweep(backbone, images, batch=2).features([RegionBoost(2.0)], RegionGroups(masks))[0]
    alone = PoolingSweep(backbone, images[3:4]).features([RegionBoost(2.0)], RegionGroups(masks[3]))[0]
    assert relative(boosted[3:4], alone) < 1e-12


def test_a_sweep_in_single_precision_is_within_rounding_of_the_full_pass() -> None:
    backbone = wrapped(VIT, torch.float32)
    images = pictures(backbone)
    swept = PoolingSweep(backbone, images).features([MassTransfer(0.6)])[0]
    assert relative(swept, redistributed(backbone, MassTransfer(0.6)).image_features(images)) < 2e-6
    with pytest.raises(DataError, match="no images"):
        PoolingSweep(backbone, [])


# ---- replacements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_means_are_means(name: str) -> None:
    backbone = wrapped(name)
    pooling = backbone.tower.pooling()
    inputs = pooling.inputs(pictures(backbone))
    stages = pooling_stages(pooling, inputs)
    torch.testing.assert_close(mean_of_values(pooling, inputs), stages.values.mean(1))
    torch.testing.assert_close(mean_of_tokens(pooling, inputs), stages.mean)
    torch.testing.assert_close(mean_of_tokens(pooling, inputs, project_first=True), stages.tokens.mean(1))


def test_the_generalised_mean_lies_between_mean_and_maximum() -> None:
    tokens = torch.randn(2, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(generalised_mean(tokens, 1.0), tokens.mean(1))
    assert (generalised_mean(tokens) > tokens.mean(1)).all() and (generalised_mean(tokens) < tokens.amax(1)).all()
    torch.testing.assert_close(generalised_mean(tokens, 500.0), tokens.amax(1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(top_mean(tokens, 9), tokens.mean(1))
    assert torch.equal(top_mean(tokens, 1), tokens.amax(1))


def test_late_interaction_is_the_best_patch_or_a_soft_form_of_it() -> None:
    tokens, texts = (
        torch.randn(2, 9, 4, dtype=torch.float64),
        F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1),
    )
    hard = late_interaction(tokens, texts, None)
    assert torch.equal(hard, (F.normalize(tokens, dim=-1) @ texts.T).amax(1))
    torch.testing.assert_close(late_interaction(tokens, texts, 1e-3), hard, rtol=0, atol=0.003)
    mean = (F.normalize(tokens, dim=-1) @ texts.T).mean(1)
    torch.testing.assert_close(late_interaction(tokens, texts, 1e4), mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_regions_are_oracles_of_their_cells(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    inputs, (height, width) = pooling.inputs(images), pooling.grid
    found = region_features(pooling, inputs, 2)
    cell = torch.zeros(height, width, dtype=torch.bool)
    cell[: (height + 1) // 2, (width + 1) // 2 :] = True
    assert found.shape == (3, 5, backbone.dim)
    assert relative(found[:, 1], oracle(pooling, inputs, cell.flatten())) < 1e-12
    assert relative(found[:, 4], backbone.image_features(images)) < 1e-12


def test_crops_see_their_part_of_the_picture() -> None:
    backbone = wrapped("timm ResNet, 4 x 4")
    images = pictures(backbone)
    assert crop_features(backbone, images, 9).shape == (3, 9, backbone.dim)
    whole = crop_features(backbone, images, 5, size=1.0)
    torch.testing.assert_close(whole, backbone.image_features(images)[:, None].expand_as(whole))
    changed = images.clone()
    changed[:, :, -8:, -8:] = 0
    moved = (crop_features(backbone, images) - crop_features(backbone, changed)).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False, False, False, False, True]


def test_blends_and_choices_by_confidence() -> None:
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(blended(a, b, 0.0), F.normalize(a, dim=-1))
    torch.testing.assert_close(blended(a, b, 1.0), F.normalize(b, dim=-1))
    texts = torch.eye(8)[:3]
    features = torch.stack([texts[0], texts.sum(0)])
    found = by_confidence(features, torch.zeros(2, 8), torch.ones(2, 8), texts, threshold=0.5)
    assert found[:, 0].tolist() == [1.0, 0.0]
