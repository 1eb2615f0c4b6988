"""What carries an off-center object: known in planted towers, and equal to the long way in real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from capt.evaluation.position_results import Positions
from capt.methods.bias.attribution import attribute
from capt.methods.bias.head_effects import HeadEffects, slopes_with_distance, steepest
from capt.methods.bias.stages import StageReader
from capt.modules import attention_rollout, attention_rows, direct_effects, row_by_block
from tests.planted_tower import planted
from tests.pooled_towers import CLASS_TOKEN, SOME, pictures, relative, wrapped
from tests.test_bias_stages import WORDS, real_grid

N = 6


def reader_of(backbone, grid) -> tuple[StageReader, Positions]:
    texts = backbone.text_features([f"a {name}" for name in grid.cutouts.names])
    return StageReader(backbone, grid, texts), Positions.of(grid.grid, 0.1)


def attributed(**plan):
    backbone = planted(N, patches=3, ground=0.1, **plan)
    return attribute(*reader_of(backbone, backbone.plan.grid(3)), "a {}", 3, 4, lambda *_: None)


def rings(view) -> list[float]:
    return [ring["mean"] for ring in view["object_gain"]]


# ---- planted ---------------------------------------------------------------------------------------------------------


def test_gains_are_those_of_the_construction():
    even = attributed(beta=0.0).attention["views"]
    assert rings(even["raw"]) == pytest.approx([1, 1]) and rings(even["without_sinks"]) == pytest.approx([1, 1])
    written = 9 / (1 + 8 * 0.1)  # an object's value is ten times as long as the ground's
    assert rings(even["value_weighted"]) == pytest.approx([written, written])
    middle = attributed(beta=40.0).attention["views"]
    for view in ("raw", "value_weighted", "without_sinks"):
        assert rings(middle[view]) == pytest.approx([9, 0], abs=1e-5)
        assert middle[view]["center_ratio"] == pytest.approx(9, rel=1e-5)
    assert "convolutional tower" in middle["rollout"]


def test_sparse_concepts_name_every_object_of_an_unbiased_tower():
    stages = attributed(beta=0.0).concepts["stages"]
    for stage in stages.values():
        assert (stage["center"], stage["off"]) == (1, 1)
        assert max(ring["mean"] for ring in stage["chance"]) == 0


def test_sparse_concepts_lose_what_the_pooling_does_not_see():
    found = attributed(beta=40.0)
    stages = found.concepts["stages"]
    assert (stages["oracle"]["center"], stages["oracle"]["off"]) == (1, 1)
    assert (stages["final"]["center"], stages["final"]["off"]) == (1, 0)
    assert found.concepts["dictionary"] > 300
    middle, corner = found.concepts["examples"][:2]
    assert middle["concepts"][0][0] == "object 0" and "object 0" not in dict(corner["concepts"])
    assert "100 % and 0 % of the features (names that are not shown: 0 %)" in found.words()[0]


def test_a_planted_location_head_is_found_described_and_ablated():
    """Head 3 of the second block alone writes the object, the less of it the farther out it is."""
    backbone = planted(N, patches=3)
    reader, positions = reader_of(backbone, backbone.plan.grid(3))
    ring, n = torch.from_numpy(positions.ring), 4
    shares = torch.full((n, 9, 2, 4), 0.5, dtype=torch.float64)
    shares[:, :, 1, 2] -= 0.3 * ring
    shares[:, :, 0, 1] += 0.3 * ring
    heads = torch.zeros(n, 9, 2, 4, backbone.plan.n + 2)
    heads[:, :, 1, 2] = ((1 - ring)[:, None] * reader.texts[:n, None]).float()
    features = heads.sum((2, 3)) + 1  # the rest is the same everywhere
    found = HeadEffects(reader, positions, shares, heads, features).record("a {}")
    (only,) = found["location"]
    assert (only["head"], only["objects_falling"], only["slope"]) == (3, n, pytest.approx(-0.3))
    assert only["center"] == pytest.approx(0.5) and only["off"] == pytest.approx(0.5 - 0.3 * ring[ring > 0].mean())
    assert set(only["texts"][: n - 1]) <= set(reader.grid.cutouts.names[:n]) and only["explained"] > 0.7
    margins = found["margins"]
    assert margins["whole"]["center"] > margins["whole"]["off"] + 0.05
    assert margins["ablated"]["center"] == pytest.approx(margins["ablated"]["off"], abs=1e-6)
    assert margins["others"] == pytest.approx(margins["whole"])


def test_slopes_are_least_squares_and_only_falling_heads_are_named():
    generator = torch.Generator().manual_seed(0)
    ring = torch.tensor([0.0, 0.4, 0.4, 0.8], dtype=torch.float64)
    shares = torch.rand(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    found = slopes_with_distance(shares, ring)
    for place in np.ndindex(3, 2, 3):
        expected = np.polyfit(ring.numpy(), shares[place[0], :, place[1], place[2]].numpy(), 1)[0]
        assert float(found[place]) == pytest.approx(expected)
    slopes = torch.tensor([[0.1, -0.2, -1e-9], [-0.5, 0.0, 0.3]])
    assert steepest(slopes) == [(1, 0), (0, 1)]


# ---- real towers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_one_pass_serves_all_analyses(name):
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    stream = list(backbone.tower.stream(images))
    assert len(stream) == len(backbone.tower.blocks) + 1
    assert relative(backbone.tower.project(stream[-1]), backbone.image_features(images)) < 1e-12
    for own, shared in zip(attention_rows(pooling, images), attention_rows(pooling, images, stream), strict=True):
        torch.testing.assert_close(own, shared)
    nothing = torch.zeros_like(images)  # only the stream is read
    assert relative(direct_effects(pooling, nothing, stream).heads(), direct_effects(pooling, images).heads()) < 1e-12
    if backbone.tower.blocks:
        assert relative(attention_rollout(pooling, nothing, stream=stream), attention_rollout(pooling, images)) < 1e-12
    if name in CLASS_TOKEN:
        assert relative(row_by_block(backbone.tower, nothing, stream), row_by_block(backbone.tower, images)) < 1e-12


@pytest.mark.parametrize("name", ["open_clip ViT, class token", "timm ViT, SigLIP map pooling"])
def test_shares_and_ablation_are_those_of_the_full_contributions(name, monkeypatch):
    backbone = wrapped(name)
    reader, positions = reader_of(backbone, real_grid(backbone))
    pooling, n = reader.pooling, 3
    monkeypatch.setattr("capt.methods.bias.head_effects.NAMED_HEADS", 1000)
    found = attribute(reader, positions, "a {}", 3, n, lambda *_: None).heads
    layers, shares, heads, features = len(found["object_share"]), [], [], []
    for thing in range(n):
        scenes = reader.grid.single(thing, 0)[1:]
        effects, masks = direct_effects(pooling, reader.images(scenes)), reader.masks(scenes)
        parts = torch.stack([effects.contributions(i) for i in range(len(effects.layers))][-layers:], 1)
        size = (parts[..., -pooling.n_patches :, :] @ reader.texts[thing].to(parts)).abs()
        shares.append((size * masks[:, None, None]).sum(-1) / size.sum(-1))
        heads.append(parts.sum(-2))
        features.append(effects.total())
    share, heads, features = torch.stack(shares).mean(0), torch.stack(heads), torch.stack(features)
    expected = [[[ring["mean"] for ring in positions.rings(head.numpy())] for head in one.T] for one in share.unbind(1)]
    np.testing.assert_allclose(found["object_share"], expected, rtol=1e-6)
    means = heads.mean((0, 1))
    slopes = slopes_with_distance(share[None], torch.from_numpy(positions.ring))[0]
    falling = slopes < -1e-6
    assert [(one["head"] - 1, one["slope"]) for one in found["location"]] == [
        (head, pytest.approx(float(slopes[layer, head]))) for layer, head in steepest(slopes)
    ]
    ablated = features + ((means - heads) * falling[..., None]).sum((2, 3))
    cosines = F.normalize(ablated, dim=-1) @ F.normalize(reader.texts.to(ablated), dim=-1).T  # [n, P, K]
    own = torch.stack([cosines[thing, :, thing] for thing in range(n)])
    margins = (own - (cosines.sum(-1) - own) / (len(WORDS) - 1)).mean(0)
    center = torch.from_numpy(positions.center)
    expected_margins = {"center": float(margins[center].mean()), "off": float(margins[~center].mean())}
    assert found["margins"]["ablated"] == pytest.approx(expected_margins, abs=1e-6)
