"""The last aggregation of every kind of tower, taken apart: it is still the tower's own feature."""

from __future__ import annotations

import pytest
import torch

import capt
from capt.errors import CaptError
from tests.backbone_models import TOWERS, clip, timm_vit
from tests.pooled_towers import CLASS_TOKEN, KINDS, SOME, pictures, relative, wrapped


@pytest.mark.parametrize("name", KINDS)
def test_the_pooling_put_together_again_is_the_towers_feature(name: str) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        backbone = wrapped(name, dtype)
        pooling, images = backbone.tower.pooling(), pictures(backbone)
        inputs = pooling.inputs(images)
        assert pooling.kind == KINDS[name]
        assert relative(pooling.pool(pooling.weights(inputs), inputs), backbone.image_features(images)) < bound


@pytest.mark.parametrize("name", KINDS)
def test_patches_are_the_last_keys(name: str) -> None:
    backbone = wrapped(name)
    pooling = backbone.tower.pooling()
    inputs = pooling.inputs(pictures(backbone))
    weights, values = pooling.weights(inputs), pooling.values(inputs)
    assert weights.shape[1:] == (pooling.n_heads, values.shape[1]) and values.shape[1] >= pooling.n_patches
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # A patch that is changed changes its own value and no other patch's.
    place = -pooling.n_patches + 1
    changed = inputs.clone()
    changed[:, place] = changed[:, place].flip(-1)
    moved = (pooling.values(changed) - values).abs().flatten(2).amax((0, 2))[-pooling.n_patches :] > 1e-9
    assert moved.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_every_block_attends_as_its_parts_do(name: str) -> None:
    backbone = wrapped(name)
    x = backbone.tower.embed(pictures(backbone))
    for block in backbone.tower.blocks:
        parts = block.attention()
        assert relative(x + parts.attend(parts.before(x)), block.attend(x)) < 1e-12
        x = block.feed_forward(block.attend(x))


def test_several_rows_are_pooled_at_once_and_one_row_serves_all_images() -> None:
    for name in SOME:
        backbone = wrapped(name)
        pooling = backbone.tower.pooling()
        inputs = pooling.inputs(pictures(backbone))
        weights = pooling.weights(inputs)
        both = pooling.pool(torch.stack([weights, weights.flip(-1)]), inputs)
        torch.testing.assert_close(both[0], pooling.pool(weights, inputs))
        torch.testing.assert_close(both[1], pooling.pool(weights.flip(-1), inputs))
        shared = weights[:1]
        torch.testing.assert_close(pooling.pool(shared, inputs), pooling.pool(shared.expand_as(weights), inputs))


def test_the_projection_is_found_as_a_matrix_or_refused() -> None:
    for name in SOME:
        pooling = wrapped(name).tower.pooling()
        row = torch.randn(3, 24 if name == "open_clip ResNet, 4 x 4" else pooling.tower.width, dtype=torch.float64)
        affine = pooling.affine(row)
        torch.testing.assert_close(affine(row), pooling.projection(row))
    with pytest.raises(CaptError, match="not linear"):
        pooling = wrapped("timm ConvNeXt, 4 x 4").tower.pooling()
        pooling.affine(torch.randn(1, pooling.tower.width, dtype=torch.float64))


@pytest.mark.parametrize(
    "make, found",
    [
        (TOWERS["timm ResNet, rotary attention pool"], "not pooled by averaging"),
        (lambda: clip({"attentional_pool": "parallel", "attn_pooler_heads": 2}), "several queries"),
        (lambda: timm_vit(global_pool="avgmax"), "avgmax"),
    ],
)
def test_poolings_of_another_kind_are_refused(make: object, found: str) -> None:
    with pytest.raises(CaptError, match=found):
        capt.wrap(make()).tower.pooling()  # type: ignore[operator]


def test_the_global_random_state_is_left_alone() -> None:
    tower = capt.wrap(TOWERS["timm ResNet"]()).tower
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tower.pooling()
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name, kind", [("embedded-vit", "class token"), ("embedded", "average")])
def test_the_shipped_models_are_taken_apart(name: str, kind: str) -> None:
    backbone = capt.load(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone, 2)
    inputs = pooling.inputs(images)
    assert pooling.kind == kind
    assert relative(pooling.pool(pooling.weights(inputs), inputs), backbone.image_features(images)) < 2e-6
