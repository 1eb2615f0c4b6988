"""Re-weighted pooling rows: what each rule promises, and the tower and backbone that carry one."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import capt
from capt.errors import CaptError
from capt.modules import (
    CenterGroups,
    MassTransfer,
    PriorCancellation,
    RadialBias,
    Redistribution,
    RegionBoost,
    RegionGroups,
    Temperature,
    UniformMixture,
    attention_prior,
    mixed_values,
    patch_positions,
    redistributed,
    redistributed_rows,
)
from capt.modules.key_groups import KeyGroups
from capt.modules.layer_maps import layer_tap
from capt.modules.prompts import PromptedTower
from tests.pooled_towers import KINDS, SOME, pictures, relative, wrapped

GRID = (4, 4)
N = 16


def scores(n_prefix: int = 1, n_heads: int = 3, n: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_heads, n_prefix + N, dtype=torch.float64, generator=generator)


def groups(n_prefix: int = 1) -> KeyGroups:
    return CenterGroups().of(GRID, n_prefix + N, torch.zeros(2, N, 4))


def row(rule: Redistribution, s: Tensor, of: KeyGroups | None = None) -> Tensor:
    return redistributed_rows(s, [rule], of or groups(s.shape[-1] - N), GRID)[0]


RULES = {
    "radial bias": RadialBias(1.0),
    "radial bias, step": RadialBias(-0.7, "step"),
    "mass transfer": MassTransfer(0.6),
    "temperature": Temperature(0.5),
    "prior cancellation": PriorCancellation(torch.rand(1, N, generator=torch.Generator().manual_seed(1)) + 0.1),
    "mixture": UniformMixture(0.3),
    "mass transfer, free prefix": MassTransfer(0.6, keep_prefix=False),
    "radial bias, free prefix": RadialBias(2.0, "r2", keep_prefix=False),
    "one head": RadialBias(1.0, heads=(0,)),
    "biased heads": MassTransfer(1.0, heads="biased"),
}
NEUTRAL = (
    RadialBias(0.0), MassTransfer(0.0), Temperature(1.0), PriorCancellation(torch.rand(1, N) + 0.1, 0.0),
    RegionBoost(0.0), UniformMixture(0.0),
)  # fmt: skip


# ---- the rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_rows_sum_to_one_and_the_prefix_keeps_its_share(name: str) -> None:
    for n_prefix in (0, 1, 3):
        s = scores(n_prefix)
        new, old = row(RULES[name], s), s.softmax(-1)
        torch.testing.assert_close(new.sum(-1), torch.ones_like(new[..., 0]))
        if RULES[name].keep_prefix:
            torch.testing.assert_close(new[..., :n_prefix], old[..., :n_prefix])
        assert (new >= 0).all() and (new - old).abs().max() > 1e-3


def test_a_radial_bias_is_a_factor_of_the_weights() -> None:
    s, factor = scores(), RadialBias(1.5, "r").bias(GRID).double().exp()
    by_factor = s.softmax(-1) * torch.cat([torch.ones(1, 1), factor], dim=-1)
    torch.testing.assert_close(row(RadialBias(1.5, keep_prefix=False), s), by_factor / by_factor.sum(-1, keepdim=True))
    patches = s.softmax(-1)[..., 1:] * factor
    kept = patches / patches.sum(-1, keepdim=True) * s.softmax(-1)[..., 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(row(RadialBias(1.5), s)[..., 1:], kept)


def test_a_constant_added_to_every_bias_changes_nothing_where_the_prefix_is_kept() -> None:
    prior = torch.rand(3, N, dtype=torch.float64) + 0.1
    one, scaled = (row(PriorCancellation(p), scores()) for p in (prior, 7 * prior))
    torch.testing.assert_close(one, scaled)


def test_mass_transfer_empties_the_centre_and_moves_what_it_says() -> None:
    s, center = scores(), torch.cat([torch.tensor([False]), CenterGroups().center(GRID)])
    old, new = s.softmax(-1), row(MassTransfer(0.6), s)
    torch.testing.assert_close(new[..., center], 0.4 * old[..., center])
    off = ~center
    off[0] = False
    torch.testing.assert_close((new - old)[..., off].sum(-1), 0.6 * old[..., center].sum(-1))
    gain = (new / old)[..., off]
    torch.testing.assert_close(gain, gain[..., :1].expand_as(gain))
    assert row(MassTransfer(1.0), s)[..., center].max() == 0


def test_a_temperature_scales_patch_scores_alone() -> None:
    s = scores()
    flat = (0.5 * s[..., 1:]).softmax(-1) * (1 - s.softmax(-1)[..., :1])
    torch.testing.assert_close(row(Temperature(0.5), s)[..., 1:], flat)
    free = torch.cat([s[..., :1], 0.5 * s[..., 1:]], dim=-1).softmax(-1)
    torch.testing.assert_close(row(Temperature(0.5, keep_prefix=False), s), free)


def test_a_cancelled_prior_leaves_nothing_of_the_position() -> None:
    s = scores()
    s[..., 1:] += 3 * RadialBias(-1.0, "r2").bias(GRID).double()
    only_position = s.mean((0, 1), keepdim=True).expand_as(s)
    prior = only_position.softmax(-1)[0, :1, 1:]
    flat = row(PriorCancellation(prior, 1.0), only_position)[..., 1:]
    torch.testing.assert_close(flat, flat.mean(-1, keepdim=True).expand_as(flat))


def test_a_region_is_boosted_by_its_factor_and_infinity_leaves_nothing_else() -> None:
    s, mask = scores(), torch.zeros(N, dtype=torch.bool)
    mask[[3, 7]] = True
    of = RegionGroups(mask).of(GRID, N + 1, torch.zeros(2, N, 4))
    old, new = s.softmax(-1)[..., 1:], row(RegionBoost(math.log(9.0)), s, of)[..., 1:]
    torch.testing.assert_close((new / old)[..., mask], 9 * (new / old)[..., ~mask][..., :2])
    only = row(RegionBoost(math.inf, keep_prefix=False), s, of)
    assert only[..., 0].max() == 0 and only[..., 1:][..., ~mask].max() == 0
    torch.testing.assert_close(only[..., 1:][..., mask], s[..., 1:][..., mask].softmax(-1))


def test_a_mixture_spreads_a_part_evenly_over_the_outside() -> None:
    s = scores()
    old, new = s.softmax(-1)[..., 1:], row(UniformMixture(0.3), s)[..., 1:]
    off = ~CenterGroups().center(GRID)
    even = off.double() / off.sum()
    torch.testing.assert_close(new, 0.7 * old + 0.3 * old.sum(-1, keepdim=True) * even)


def test_the_mean_radius_rises_with_the_bias_at_the_speed_of_its_variance() -> None:
    s, r = scores(0), patch_positions(GRID).radius.double()

    def mean_radius(strength: float) -> Tensor:
        return (row(RadialBias(strength), s) * r).sum(-1)

    radii = torch.stack([mean_radius(x) for x in (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)])
    assert (radii.diff(dim=0) > 0).all()
    slope = (mean_radius(1e-4) - mean_radius(-1e-4)) / 2e-4
    variance = (s.softmax(-1) * r.square()).sum(-1) - mean_radius(0.0).square()
    torch.testing.assert_close(slope, variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_prefix_that_takes_everything_is_left_alone(name: str) -> None:
    s = scores().float()
    s[..., 0] += 300.0  # the patches' weights are 0 in single precision
    new = row(RULES[name], s)
    assert torch.isfinite(new).all() and (new[..., 0] == 1).all()


def test_only_chosen_heads_change() -> None:
    s = scores()
    new, old = row(RadialBias(1.0, heads=(1,)), s), s.softmax(-1)
    assert torch.equal(new[:, [0, 2]], old[:, [0, 2]]) and (new - old)[:, 1].abs().max() > 0.01
    s[:, 0, 1:][:, ~CenterGroups().center(GRID)] -= 3.0  # a head that looks at the middle
    s[:, 1, 1:][:, CenterGroups().center(GRID)] -= 3.0
    s[:, 2, 0] += 20.0  # one that looks at the class token
    new, old = row(MassTransfer(1.0, heads="biased"), s), s.softmax(-1)
    assert torch.equal(new[:, 1:], old[:, 1:]) and (new - old)[:, 0].abs().max() > 0.1


def test_sinks_are_groups_of_their_own() -> None:
    tokens = torch.ones(2, 1 + N, 4)
    tokens[0, 1 + 2] *= 5  # off centre
    tokens[1, 1 + 5] *= 5  # in the centre
    of = CenterGroups(sinks=True).of(GRID, N + 1, tokens)
    assert of.labels.shape == (2, N + 1) and of.counts().tolist() == [[1, 4, 11, 0, 1], [1, 3, 12, 1, 0]]
    s = scores()
    new = row(MassTransfer(1.0, ("center sink", "off sink"), ("off",)), s, of)
    assert new[0, :, 3].max() == 0 and new[1, :, 6].max() == 0
    torch.testing.assert_close(new.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_a_random_group_is_as_large_as_the_centre() -> None:
    plain, control = CenterGroups(), CenterGroups(seed=1)
    assert control.center(GRID).sum() == plain.center(GRID).sum() == 4
    assert not torch.equal(control.center(GRID), plain.center(GRID))
    assert torch.equal(control.center(GRID), CenterGroups(seed=1).center(GRID))


def test_positions_are_symmetric_and_know_rows_from_columns() -> None:
    at = patch_positions((2, 4))
    assert at.x.tolist() == [-0.75, -0.25, 0.25, 0.75] * 2 and at.y.tolist() == [-0.5] * 4 + [0.5] * 4
    torch.testing.assert_close(at.radius, at.radius.view(2, 4).flip(0, 1).flatten())
    assert patch_positions((101, 101)).radius.max() < 1 < patch_positions((101, 101)).radius.max() + 0.02


# ---- the row as mixed values -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_group_sums_are_the_explicit_rows(name: str) -> None:
    backbone = wrapped(name)
    pooling = backbone.tower.pooling()
    inputs = pooling.inputs(pictures(backbone))
    n = pooling.n_patches
    heads = torch.rand(pooling.n_heads, n, generator=torch.Generator().manual_seed(2)) + 0.1
    rules = [
        RadialBias(1.0), MassTransfer(0.6), Temperature(0.5), Temperature(2.0, keep_prefix=False),
        PriorCancellation(heads), UniformMixture(0.4), RadialBias(-1.0, "square", heads=(0,)),
        MassTransfer(1.0, heads="biased"), RadialBias(0.0),
    ]  # fmt: skip
    for grouping in (CenterGroups(0.67), CenterGroups(0.67, sinks=True), CenterGroups(0.67, seed=0)):
        s = pooling.scores(inputs)
        rows = redistributed_rows(s, rules, grouping.of(pooling.grid, s.shape[-1], inputs), pooling.grid)
        expected = torch.einsum("mbhl,blhc->mbhc", rows, pooling.values(inputs))
        assert relative(mixed_values(pooling, inputs, rules, grouping), expected) < 1e-12
    mask = torch.rand(len(inputs), n, generator=torch.Generator().manual_seed(3)) < 0.5
    regions = RegionGroups(mask.index_fill(1, torch.tensor([0]), True))
    rules = [RegionBoost(2.0), RegionBoost(math.inf, keep_prefix=False), RegionBoost(-1.0)]
    rows = redistributed_rows(s, rules, regions.of(pooling.grid, s.shape[-1], inputs), pooling.grid)
    expected = torch.einsum("mbhl,blhc->mbhc", rows, pooling.values(inputs))
    assert relative(mixed_values(pooling, inputs, rules, regions), expected) < 1e-12


@pytest.mark.parametrize("name", SOME)
def test_neutral_rules_give_the_towers_feature(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    inputs = pooling.inputs(images)
    rules = [r for r in NEUTRAL if not isinstance(r, RegionBoost | PriorCancellation)]
    for features in pooling.features(mixed_values(pooling, inputs, rules, CenterGroups(0.67)), inputs):
        assert relative(features, backbone.image_features(images)) < 1e-12


def test_a_prior_is_a_mean_row_of_the_patches() -> None:
    backbone = wrapped("open_clip ViT, class token")
    pooling = backbone.tower.pooling()
    prior = attention_prior(pooling, pooling.inputs(pictures(backbone)))
    assert prior.shape == (pooling.n_heads, pooling.n_patches)
    torch.testing.assert_close(prior.sum(-1), torch.ones_like(prior[:, 0]))


# ---- the backbone that carries a rule ----------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_neutral_rule_is_the_plain_backbone_bit_for_bit(name: str) -> None:
    backbone = wrapped(name, torch.float32)
    images = pictures(backbone)
    plain = backbone.image_features(images)
    for rule in NEUTRAL:
        other = redistributed(backbone, rule, CenterGroups(0.8))
        assert torch.equal(other.image_features(images), plain)
        assert other.fingerprint() == backbone.fingerprint()


@pytest.mark.parametrize("name", KINDS)
def test_a_redistributed_backbone_pools_by_the_changed_row(name: str) -> None:
    backbone = wrapped(name)
    pooling, images = backbone.tower.pooling(), pictures(backbone)
    before = backbone.image_features(images)
    inputs = pooling.inputs(images)
    rule, grouping = MassTransfer(0.8), CenterGroups()
    other = redistributed(backbone, rule, grouping)
    s = pooling.scores(inputs)
    rows = redistributed_rows(s, [rule], grouping.of(pooling.grid, s.shape[-1], inputs), pooling.grid)[0]
    assert relative(other.image_features(images), pooling.pool(rows, inputs)) < 1e-12
    assert relative(other.image_features(images), before) > 1e-6
    assert torch.equal(backbone.image_features(images), before)


def test_the_fingerprint_tells_rules_groups_and_layers_apart() -> None:
    backbone = wrapped("open_clip ViT, class token")
    made = [
        redistributed(backbone, MassTransfer(0.6)),
        redistributed(backbone, MassTransfer(0.5)),
        redistributed(backbone, MassTransfer(0.6), CenterGroups(0.8)),
        redistributed(backbone, MassTransfer(0.6), layers=2),
        redistributed(backbone, PriorCancellation(torch.rand(1, N) + 0.1)),
        redistributed(backbone, PriorCancellation(torch.rand(1, N) + 0.1)),
    ]
    assert len({backbone.fingerprint(), *(other.fingerprint() for other in made)}) == 7


def test_patch_tokens_of_the_last_block_stay_as_they_were() -> None:
    backbone = wrapped("open_clip ViT, class token")
    images = pictures(backbone)
    plain, changed = (b.tower.run(images) for b in (backbone, redistributed(backbone, MassTransfer(1.0))))
    assert torch.equal(plain[:, 1:], changed[:, 1:]) and not torch.equal(plain[:, 0], changed[:, 0])
    earlier = redistributed(backbone, MassTransfer(1.0), layers=None).tower.run(images)
    assert not torch.equal(plain[:, 1:], earlier[:, 1:])


def test_gradients_pass_through_a_redistributed_tower() -> None:
    tower = redistributed(wrapped("open_clip ViT, class token"), RadialBias(1.0)).tower
    tokens = tower.embed(pictures(wrapped("open_clip ViT, class token"))).requires_grad_()
    tower.project(tower.advance(tokens)).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["open_clip ViT, class token", "timm ViT, SigLIP map pooling", "timm ResNet, 4 x 4"])
def test_copies_and_pickles_carry_the_rule_and_their_own_weights(name: str) -> None:
    backbone = redistributed(wrapped(name, torch.float32), RadialBias(2.0))
    images = pictures(backbone)
    features = backbone.image_features(images)
    assert torch.equal(pickle.loads(pickle.dumps(backbone)).image_features(images), features)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(backbone.image_features(images), features)
    assert not torch.equal(other.image_features(images), features)


@pytest.mark.parametrize(
    "name", ["open_clip ViT, class token", "open_clip ResNet, 4 x 4", "timm EfficientNet-Lite, 4 x 4"]
)
def test_methods_that_read_layers_take_a_redistributed_tower(name: str) -> None:
    backbone = wrapped(name, torch.float32)
    images = pictures(backbone)
    maps = []
    for b in (backbone, redistributed(backbone, UniformMixture(1.0, ("off", "center")))):
        tap = layer_tap(b.tower, adapter_width=0).eval()
        maps.append(tap(tap.inputs(images)))
    assert not torch.equal(maps[0].feature, maps[1].feature)
    assert maps[0].low is not None and maps[1].low is not None and torch.equal(maps[0].low, maps[1].low)


def test_learned_tokens_are_prefix_for_a_rule() -> None:
    backbone, rule = wrapped("open_clip ViT, class token"), MassTransfer(1.0)
    images = pictures(backbone)
    torch.manual_seed(0)
    plain, changed = (PromptedTower(b.tower, n_ctx=2, depth=3) for b in (backbone, redistributed(backbone, rule)))
    with torch.no_grad():
        plain.prompts.mul_(30)
        changed.prompts.copy_(plain.prompts)
        tokens = plain.advance(plain.embed(images), stop=2)
        seen = plain.prompted(plain.stripped(tokens), 2)  # [class, 2 learned, 16 patches]
        parts = backbone.tower.blocks[-1].attention()
        y = parts.before(seen)
        s = torch.einsum("bhc,blhc->bhl", parts.queries(y[:, 0]), parts.keys(y)) * parts.scale
        of = CenterGroups().of(GRID, 19, seen)
        weights = redistributed_rows(s, [rule], of, GRID)[0]
        x = seen[:, 0] + parts.merge(torch.einsum("bhl,blhc->bhc", weights, parts.values(y)))
        expected = backbone.tower.project(backbone.tower.blocks[-1].feed_forward(x)[:, None])
        found = changed.project(changed.run(images))
    assert of.counts().tolist() == [3, 4, 12]
    assert relative(found, expected) < 1e-12 < relative(found, plain.project(plain.run(images)))


def test_bfloat16_towers_can_be_redistributed() -> None:
    exact = wrapped("open_clip ViT, class token", torch.float32)
    backbone = capt.wrap(copy.deepcopy(exact.model).bfloat16())
    images = pictures(exact)
    found = redistributed(backbone, RadialBias(16.0)).image_features(images)
    exact = redistributed(exact, RadialBias(16.0)).image_features(images)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert relative(found.float(), exact) < 0.1


def test_mistakes_are_named() -> None:
    vit, average = wrapped("open_clip ViT, class token"), wrapped("timm ResNet, 4 x 4")
    with pytest.raises(CaptError, match="changed already"):
        redistributed(redistributed(vit, MassTransfer()), MassTransfer())
    with pytest.raises(CaptError, match="use layers=1"):
        redistributed(average, MassTransfer(), layers=4)
    with pytest.raises(CaptError, match="has 3 blocks"):
        redistributed(vit, MassTransfer(), layers=4)
    with pytest.raises(CaptError, match="only pooling row"):
        redistributed(wrapped("timm ViT, SigLIP map pooling"), MassTransfer(), layers=2)
    with pytest.raises(CaptError, match=r"part of 1, found 1\.5"):
        MassTransfer(1.5)
    images = pictures(vit)
    for rule, found in (
        (RegionBoost(), "needs groups of a region"),
        (MassTransfer(donors=("sink",)), "name the beginning"),
        (PriorCancellation(torch.ones(1, 9)), "4 x 4 grid"),
        (RadialBias(heads=(5,)), "0 to 1"),
        (UniformMixture(receivers=("nowhere",)), "no patch"),
        (RadialBias(shape="ring"), "found 'ring'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(CaptError, match=found):
            redistributed(vit, rule).image_features(images)
    with pytest.raises(CaptError, match="in the center"):
        redistributed(vit, MassTransfer(), CenterGroups(0.1)).image_features(images)
