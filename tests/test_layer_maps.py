"""Layer maps of every kind of image tower: which layers, in which order, and adapters that start at 0."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import capt
from capt.backbones import Backbone
from capt.errors import CaptError
from capt.modules.bottleneck_adapter import BottleneckAdapter
from capt.modules.layer_aggregator import LayerAggregator
from capt.modules.layer_maps import BlockTap, LayerMaps, LayerTap, PyramidTap, layer_tap
from tests.backbone_models import TOWERS

BLOCKS = ("open_clip ViT, class token", "timm ViT, class token", "timm ViT, registers, average", "transformers CLIP",
          "transformers SigLIP")  # fmt: skip
STAGES = ("open_clip ResNet", "timm ResNet", "timm ConvNeXt", "timm Swin", "timm EVA")


@functools.cache
def wrapped(kind: str) -> Backbone:
    return capt.wrap(TOWERS[kind]())


def pictures(backbone: Backbone, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, *backbone.image_hw, generator=torch.Generator().manual_seed(1)).to(backbone.dtype)


def maps(tap: LayerTap, backbone: Backbone, n: int = 2) -> LayerMaps:
    return tap.eval()(tap.inputs(pictures(backbone, n)))


def shaken(tap: LayerTap) -> LayerTap:
    """The tap with adapters that do something."""
    for adapter in tap.modules():
        if isinstance(adapter, BottleneckAdapter):
            torch.nn.init.normal_(adapter.up.weight)
    return tap


@pytest.mark.parametrize("kind", BLOCKS + STAGES)
def test_01_fresh_adapters_leave_the_image_feature_as_it_is(kind):
    backbone = wrapped(kind)
    tap = layer_tap(backbone.tower, 1, 1)
    expected = backbone.image_features(pictures(backbone))
    torch.testing.assert_close(maps(tap, backbone).feature, expected, rtol=1e-5, atol=1e-5)
    assert (maps(shaken(tap), backbone).feature - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BLOCKS)
def test_02_blocks_are_tapped_from_both_ends_in_order_with_all_prefix_tokens(kind):
    backbone = wrapped(kind)
    tower, depth = backbone.tower, len(backbone.tower.blocks)
    n_low, n_high = (2, 1) if depth == 3 else (1, 1)
    found = maps(layer_tap(tower, n_low, n_high), backbone)
    tokens = tower.embed(pictures(backbone))
    projected = [
        tower.project_tokens(tokens := tower.advance(tokens, start=index, stop=index + 1)) for index in range(depth)
    ]
    torch.testing.assert_close(found.low, torch.cat(projected[:n_low], -1))
    torch.testing.assert_close(found.high, torch.cat(projected[-n_high:], -1))
    assert found.low.shape[1] == tower.n_prefix + tower.grid[0] * tower.grid[1]
    if tower.n_prefix == 1:  # the class token is token 0, and what the tower pools
        torch.testing.assert_close(found.high[:, 0, -tower.dim :], found.feature, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [*BLOCKS, "open_clip ViT, average, norm after pooling", "open_clip ViT, attention pooling", "timm ResNet"]
)
def test_a_projected_token_is_what_the_tower_makes_of_a_map_of_nothing_else(kind):
    tower = wrapped(kind).tower
    tokens = tower.run(pictures(wrapped(kind)))
    projected = tower.project_tokens(tokens)
    for place in (0, tokens.shape[1] - 1):
        expected = tower.project(tokens[:, place : place + 1].expand_as(tokens))
        torch.testing.assert_close(projected[:, place], expected, rtol=1e-4, atol=1e-4)


def test_02_a_single_layer_is_the_raw_projected_map_of_that_layer():
    backbone = wrapped("open_clip ViT, class token")
    tap, tower = layer_tap(backbone.tower, 1, 1), backbone.tower
    after_first = tower.project_tokens(tower.advance(tower.embed(pictures(backbone)), stop=1))
    torch.testing.assert_close(maps(tap, backbone).low, after_first)
    assert (tap.n_low, tap.low_width, tap.high_width) == (1, tower.dim, tower.dim)


def test_03_an_aggregator_makes_one_map_that_is_never_negative():
    aggregator = LayerAggregator(72, 24).eval()
    found = aggregator(torch.randn(2, 17, 72))
    assert found.shape == (2, 17, 24) and found.min() == 0 and (found > 0).any()


def test_only_tapped_layers_are_projected(monkeypatch):
    """The published code projects all of them (its item 19)."""
    backbone, calls = wrapped("open_clip ViT, class token"), []
    project = backbone.tower.project_tokens
    monkeypatch.setattr(backbone.tower, "project_tokens", lambda x: calls.append(len(x)) or project(x))
    maps(layer_tap(backbone.tower, 1, 1), backbone)
    assert calls == [2, 2]
    maps(layer_tap(backbone.tower, 0, 1), backbone)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("kind", BLOCKS + STAGES)
def test_the_depth_comes_from_the_tower_and_groups_that_overlap_are_refused(kind):
    """The published code has 24 blocks (its item 17)."""
    tower = wrapped(kind).tower
    tap = layer_tap(tower)
    depth = len(tower.blocks) or len(tower.stages(torch.zeros(1, 3, *tower.image_hw)))
    assert isinstance(tap, BlockTap if tower.blocks else PyramidTap)
    assert tap.n_low == tap.n_high == min(3, depth // 2)
    layer_tap(tower, depth - 1, 1)
    with pytest.raises(CaptError, match=rf"n_low={depth} and n_high=1.*this image tower has {depth}.*take fewer"):
        layer_tap(tower, depth, 1)
    with pytest.raises(CaptError, match="n_low=-1"):
        layer_tap(tower, -1, 1)


@pytest.mark.parametrize("kind", STAGES)
def test_stages_are_averaged_to_one_grid_and_the_final_tokens_stand_for_the_deepest(kind):
    backbone = wrapped(kind)
    tower = backbone.tower
    tokens, stages = tower.run_stages(pictures(backbone))
    n = len(stages)
    tap = layer_tap(tower, 1, min(2, n - 1))
    found = maps(tap, backbone)
    first = stages[0].tokens.transpose(1, 2).unflatten(2, stages[0].grid)
    low = torch.nn.functional.adaptive_avg_pool2d(first, [min(side, 14) for side in stages[0].grid])
    torch.testing.assert_close(found.low, low.flatten(2).mT)
    final = tower.project_tokens(tower.patches(tokens))
    if tap.grids[1] == tower.grid:
        torch.testing.assert_close(found.high[..., -tower.dim :], final)
    assert found.high.shape[2] == tap.high_width and found.low.shape[2] == tap.low_width


@pytest.mark.parametrize("kind", ["timm ResNet", "open_clip ResNet", "transformers CLIP"])
def test_only_adapters_learn_and_all_of_them_do(kind):
    backbone = wrapped(kind)
    tap = shaken(layer_tap(backbone.tower, 1, 1))
    feature, low, high = tap(tap.inputs(pictures(backbone)))
    (feature.square().sum() + high.square().sum() + low.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tap.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_without_adapters_nothing_learns():
    for kind in ("transformers CLIP", "open_clip ResNet"):
        assert not list(layer_tap(wrapped(kind).tower, 1, 1, adapter_width=0).parameters())


def test_two_adapters_a_block_of_the_published_size():
    tower = wrapped("open_clip ViT, class token").tower
    n = sum(parameter.numel() for parameter in layer_tap(tower, 1, 1, adapter_width=64).parameters())
    assert n == 2 * len(tower.blocks) * (2 * 64 * tower.width + 64 + tower.width)


@pytest.mark.parametrize("kind", ["open_clip ViT, class token", "open_clip ResNet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_towers_of_another_precision_give_float32_maps(kind, dtype):
    full = wrapped(kind)
    expected = maps(layer_tap(full.tower, 1, 1), full)
    backbone = capt.wrap(copy.deepcopy(full.model).to(dtype))
    tap = layer_tap(backbone.tower, 1, 1)
    assert tap.inputs(pictures(backbone)).dtype == dtype
    for found, wanted in zip(maps(tap, backbone), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
