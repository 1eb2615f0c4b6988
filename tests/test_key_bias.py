"""Biases on the keys of whole blocks: masks, channels and contexts that leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capt.errors import CaptError
from capt.modules import (
    KeyBias,
    MassTransfer,
    RadialBias,
    biased_attention,
    key_bias,
    redistributed,
    redistributed_rows,
)
from capt.modules.key_groups import CenterGroups
from tests.pooled_towers import CLASS_TOKEN, pictures, relative, wrapped

VIT = "open_clip ViT, class token"


def projections(n_heads: int = 3, length: int = 17, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n_heads, length, width, dtype=torch.float64, generator=generator) for _ in range(3)]


def masked_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return ((query @ key.mT) * scale + mask).softmax(-1) @ value


@pytest.mark.parametrize("rows", ["pooling", "all"])
@pytest.mark.parametrize("shape", [(1, 17), (3, 17), (2, 1, 17), (2, 3, 17)])
def test_an_extra_channel_is_the_mask_and_the_masked_softmax(shape: tuple[int, ...], rows: str) -> None:
    q, k, v = projections()
    bias = torch.randn(shape, dtype=torch.float64)
    wide = (bias if bias.ndim == 3 else bias[None])[:, :, None]
    mask = wide.expand(2, 3, 17, 17).clone()
    if rows == "pooling":
        mask[:, :, 1:] = 0
    expected = masked_softmax(q, k, v, mask, 0.3)
    terms = [KeyBias(bias, rows)]  # type: ignore[arg-type]
    assert relative(biased_attention(q, k, v, terms, 0.3), expected) < 1e-12
    assert relative(biased_attention(q, k, v, terms, 0.3, "channel"), expected) < 1e-12


def test_no_mask_of_images_times_heads_is_made() -> None:
    """The mask has one row where all are treated alike, and one image and head where these agree."""
    from capt.modules.key_bias import _mask

    query = torch.zeros(64, 16, 577, 8)
    assert _mask([KeyBias(torch.zeros(1, 577), "all")], query).shape == (1, 1, 1, 577)
    assert _mask([KeyBias(torch.zeros(16, 577), "all")], query).shape == (1, 16, 1, 577)
    assert _mask([KeyBias(torch.zeros(1, 577), "pooling")], query).shape == (1, 1, 577, 577)


def test_forbidden_keys_need_the_mask() -> None:
    q, k, v = projections()
    bias = torch.zeros(1, 17, dtype=torch.float64)
    bias[0, 5:] = -torch.inf
    found = biased_attention(q, k, v, [KeyBias(bias, "all")], 0.3)
    torch.testing.assert_close(found, masked_softmax(q, k[:, :, :5], v[:, :, :5], torch.zeros(()), 0.3))
    with pytest.raises(CaptError, match="finite biases only"):
        biased_attention(q, k, v, [KeyBias(bias, "all")], 0.3, "channel")


@pytest.mark.parametrize("name", CLASS_TOKEN)
@pytest.mark.parametrize("via", ["mask", "channel"])
def test_a_bias_in_the_last_block_is_the_radial_rule_with_a_free_prefix(name: str, via: str) -> None:
    backbone, rule = wrapped(name), RadialBias(1.5, keep_prefix=False)
    images = pictures(backbone)
    expected = redistributed(backbone, rule).image_features(images)
    with key_bias(backbone, rule, via=via):  # type: ignore[arg-type]
        assert relative(backbone.image_features(images), expected) < 1e-12


def test_a_bias_per_head_touches_its_heads_alone() -> None:
    backbone = wrapped(VIT)
    bias = torch.zeros(2, 16, dtype=torch.float64)
    bias[1] = torch.linspace(-2, 2, 16)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    s = pooling.scores(pooling.inputs(images))
    weights = (s + torch.nn.functional.pad(bias, (1, 0))).softmax(-1)
    assert torch.equal(weights[:, 0], s.softmax(-1)[:, 0])
    with key_bias(backbone, bias):
        found = backbone.image_features(images)
    assert relative(found, pooling.pool(weights, pooling.inputs(images))) < 1e-12


@pytest.mark.parametrize("layers", [1, 2, None])
def test_nothing_is_left_behind_even_after_an_error(layers: int | None) -> None:
    backbone = wrapped(VIT, torch.float32)
    images = pictures(backbone)
    before, blocks = backbone.image_features(images), backbone.tower.blocks
    with key_bias(backbone, RadialBias(1.0), layers=layers, rows="all"):
        assert not torch.equal(backbone.image_features(images), before)
    with pytest.raises(RuntimeError, match="stop"), key_bias(backbone, RadialBias(1.0), layers=layers):
        raise RuntimeError("stop")
    assert backbone.tower.blocks is blocks
    assert torch.equal(backbone.image_features(images), before)


@pytest.mark.parametrize("via", ["mask", "channel"])
def test_nested_biases_add_up(via: str) -> None:
    backbone = wrapped(VIT)
    images = pictures(backbone)
    with key_bias(backbone, RadialBias(2.0), layers=2, rows="all"):
        expected = backbone.image_features(images)
    with key_bias(backbone, RadialBias(1.0), layers=2, rows="all", via=via):  # type: ignore[arg-type]
        one = backbone.image_features(images)
        with key_bias(backbone, RadialBias(1.0), layers=2, rows="all", via=via):  # type: ignore[arg-type]
            assert relative(backbone.image_features(images), expected) < 1e-12
        assert torch.equal(backbone.image_features(images), one)


def test_biases_may_differ_between_images() -> None:
    backbone = wrapped(VIT)
    images = pictures(backbone)
    region = torch.zeros(3, 1, 16, dtype=torch.float64)
    region[0, 0, :4] = region[2, 0, 8:] = 2.0
    with key_bias(backbone, region, layers=None, rows="all"):
        together = backbone.image_features(images)
    for i in range(3):
        with key_bias(backbone, region[i], layers=None, rows="all"):
            assert relative(together[i : i + 1], backbone.image_features(images[i : i + 1])) < 1e-12


def test_towers_without_a_class_token_take_biases_in_all_rows() -> None:
    backbone = wrapped("timm ViT, SigLIP map pooling")
    images = pictures(backbone)
    before = backbone.image_features(images)
    with key_bias(backbone, RadialBias(1.0), layers=2, rows="all"):
        assert relative(backbone.image_features(images), before) > 1e-4
    with pytest.raises(CaptError, match="rows='all'"), key_bias(backbone, RadialBias(1.0)):
        pass


def test_a_rule_in_every_block_is_its_row_in_every_block() -> None:
    """The class token's rows of all blocks, re-weighted one after the other by hand."""
    backbone, rule, grouping = wrapped(VIT), MassTransfer(0.7), CenterGroups()
    images = pictures(backbone)
    x = backbone.tower.embed(images)
    for block in backbone.tower.blocks:
        parts = block.attention()
        y = parts.before(x)
        query, key, value = parts.queries(y), parts.keys(y), parts.values(y)
        s = torch.einsum("bihc,bjhc->bhij", query, key) * parts.scale
        weights = s.softmax(-1)
        of = grouping.of(backbone.tower.grid, 17, x)
        weights[:, :, 0] = redistributed_rows(s[:, :, 0], [rule], of, backbone.tower.grid)[0]
        x = block.feed_forward(x + parts.merge(torch.einsum("bhij,bjhc->bihc", weights, value)))
    found = redistributed(backbone, rule, layers=None).image_features(images)
    assert relative(found, backbone.tower.project(x)) < 1e-12


def test_mistakes_are_named() -> None:
    backbone = wrapped(VIT)
    for bias, options, found in (
        (torch.zeros(1, 9), {}, r"expected \[heads or 1, 16\]"),
        (torch.full((1, 16), -torch.inf), {}, "keep at least one"),
        (MassTransfer(), {}, "no fixed bias"),
        (RadialBias(), {"layers": 4}, "has 3 blocks"),
    ):
        with pytest.raises(CaptError, match=found), key_bias(backbone, bias, **options):  # type: ignore[arg-type]
            pass
    with pytest.raises(CaptError, match="has 0 blocks"), key_bias(wrapped("timm ResNet, 4 x 4"), RadialBias()):
        pass
