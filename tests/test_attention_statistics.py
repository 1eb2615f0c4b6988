"""Statistics of pooling rows and rollout: closed forms, symmetries, and the matrix product that is never made."""

from __future__ import annotations

import math

import pytest
import torch

from capt.errors import CaptError
from capt.modules import (
    attention_map,
    attention_rollout,
    attention_rows,
    center_mass,
    center_ratio,
    entropy,
    mean_radius,
    object_gain,
    patch_positions,
    position_share,
    radial_profile,
    rollout_matrix,
)
from tests.pooled_towers import SOME, pictures, relative, wrapped

GRID = (6, 6)
N = 36


def test_an_even_row_has_no_preference() -> None:
    even = torch.full((2, 3, N), 1 / N, dtype=torch.float64)
    ones = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(center_ratio(even, GRID), ones)
    torch.testing.assert_close(mean_radius(even, GRID), ones * patch_positions(GRID).radius.mean())
    torch.testing.assert_close(entropy(even), ones)
    torch.testing.assert_close(object_gain(even, torch.arange(N) < 4), ones)
    torch.testing.assert_close(radial_profile(even, GRID, 3), torch.ones(2, 3, 3, dtype=torch.float64))


def test_a_row_on_one_corner_is_at_its_radius() -> None:
    corner = torch.zeros(N, dtype=torch.float64)
    corner[0] = 1.0
    assert mean_radius(corner, GRID) == patch_positions(GRID).radius[0]
    assert center_mass(corner, GRID) == 0 and entropy(corner) == 0
    assert radial_profile(corner, GRID, 3).tolist() == pytest.approx([0, 0, N / 20])
    assert object_gain(corner[None], torch.arange(N)[None] < 2).item() == pytest.approx(N / 2)
    assert center_ratio(torch.full((N,), 1.0), GRID, 1 / 3).item() == pytest.approx(N)


def test_statistics_do_not_see_a_flip() -> None:
    rows = torch.rand(4, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    flipped = rows.view(4, *GRID).flip(-1).flatten(1)
    for statistic in (center_mass, mean_radius):
        torch.testing.assert_close(statistic(rows, GRID), statistic(flipped, GRID))
    torch.testing.assert_close(radial_profile(rows, GRID, 3), radial_profile(flipped, GRID, 3))


def test_position_explains_everything_or_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(N, generator=generator, dtype=torch.float64).softmax(-1)
    assert position_share(position.expand(5, 1, 1, N)).item() == pytest.approx(1.0)
    free = torch.randn(4000, 1, 1, N, generator=generator, dtype=torch.float64).softmax(-1)
    assert position_share(free).item() < 0.01
    with pytest.raises(CaptError, match="at least two images"):
        position_share(position.expand(1, 1, 1, N))


@pytest.mark.parametrize("name", SOME)
def test_rows_are_those_of_the_pooling(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    rows = attention_rows(pooling, images)
    inputs = pooling.inputs(images)
    weights, n = pooling.weights(inputs), pooling.n_patches
    last = weights[..., -n:] / weights[..., -n:].sum(-1, keepdim=True)
    torch.testing.assert_close(rows.patches[:, -1], last)
    torch.testing.assert_close(rows.prefix[:, -1], weights[..., :-n].sum(-1))
    assert rows.patches.shape[1] == (len(backbone.tower.blocks) if pooling.kind == "class token" else 1)
    one = torch.zeros_like(pooling.values(inputs)[:, -1])
    one[:, 0] = pooling.values(inputs)[:, -1, 0]
    alone = pooling.merge(one) - pooling.merge(torch.zeros_like(one))
    torch.testing.assert_close(rows.value_norms[:, -1, 0, -1], alone.norm(dim=-1))
    for weighted in (rows.value_weighted(), rows.without_sinks()):
        torch.testing.assert_close(weighted.sum(-1), torch.ones_like(weighted[..., 0]))


def test_sinks_are_left_out_when_asked() -> None:
    backbone = wrapped("open_clip ViT, class token")
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    rows = attention_rows(pooling, images)
    sinks = torch.zeros_like(rows.sinks)
    sinks[:, :, 3] = True
    marked = rows._replace(sinks=sinks)
    torch.testing.assert_close(marked.sink_mass(), rows.patches[..., 3])
    left = marked.without_sinks()
    assert left[..., 3].max() == 0
    torch.testing.assert_close(left[..., 4], rows.patches[..., 4] / (1 - rows.patches[..., 3]))


# ---- rollout -----------------------------------------------------------------------------------------------

BLOCKS = ("open_clip ViT, class token", "timm ViT, registers, class token", "transformers CLIP")


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_chain_of_vectors_is_the_row_of_the_matrix_product(name: str, fusion: str) -> None:
    backbone = wrapped(name)
    tower, pooling, images = backbone.tower, backbone.tower.pooling(), pictures(backbone)
    x, maps = tower.embed(images), []
    for index in range(len(tower.blocks)):
        maps.append(attention_map(tower.blocks[index], x))
        x = tower.advance(x, start=index, stop=index + 1)
    product = rollout_matrix(maps, fusion)  # type: ignore[arg-type]
    torch.testing.assert_close(product.sum(-1), torch.ones_like(product[..., 0]))
    found = attention_rollout(pooling, images, fusion=fusion)  # type: ignore[arg-type]
    torch.testing.assert_close(found, product[:, 0, -pooling.n_patches :], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["timm ViT, SigLIP map pooling", "timm ViT, registers, average"])
def test_a_pooling_layer_starts_the_chain_with_its_own_row(name: str) -> None:
    backbone = wrapped(name)
    tower, pooling, images = backbone.tower, backbone.tower.pooling(), pictures(backbone)
    x, maps = tower.embed(images), []
    for index in range(len(tower.blocks)):
        maps.append(attention_map(tower.blocks[index], x))
        x = tower.advance(x, start=index, stop=index + 1)
    first = torch.nn.functional.pad(pooling.weights(x).mean(1), (tower.n_prefix, 0))
    expected = (first[:, None] @ rollout_matrix(maps))[:, 0, -pooling.n_patches :]
    torch.testing.assert_close(attention_rollout(pooling, images), expected, rtol=1e-12, atol=1e-15)


def test_small_weights_can_be_discarded() -> None:
    backbone = wrapped("open_clip ViT, class token")
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    plain, sharp = (attention_rollout(pooling, images, discard=d) for d in (0.0, 0.9))
    assert (entropy(sharp / sharp.sum(-1, keepdim=True)) < entropy(plain / plain.sum(-1, keepdim=True))).all()


@pytest.mark.parametrize("name", ["open_clip ViT, class token", "timm ViT, SigLIP map pooling"])
def test_gradients_of_a_concept_choose_among_the_paths(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    concepts = torch.randn(2, backbone.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (attention_rollout(pooling, images, concept=concept) for concept in concepts)
    assert (one >= 0).all() and torch.isfinite(one).all() and relative(one, other) > 1e-3
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_rollout_mistakes_are_named() -> None:
    backbone = wrapped("timm ResNet, 4 x 4")
    with pytest.raises(CaptError, match="convolutional tower"):
        attention_rollout(backbone.tower.pooling(), pictures(backbone))
    vit = wrapped("open_clip ViT, class token")
    for options, found in (({"fusion": "sum"}, "found 'sum'"), ({"discard": 1.0}, "part of 1"), ({"discard": math.nan}, "part of 1")):  # fmt: skip  # noqa: E501
        with pytest.raises(CaptError, match=found):
            attention_rollout(vit.tower.pooling(), pictures(vit), **options)
