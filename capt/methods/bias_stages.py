"""Where in an image tower an off-center object is lost: before the last aggregation, in it, or to another object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt.data.position_grid import PositionGrid, Scene
from capt.errors import CaptError, DataError
from capt.evaluation.concept_survival import concept_scores, margin, vanished
from capt.evaluation.position_results import Positions
from capt.evaluation.position_statistics import Interval, bootstrap, holm, position_gap, sign_flip_test
from capt.modules.attention_statistics import attention_rows, center_ratio, object_gain, position_share
from capt.modules.direct_effects import direct_effects, object_share
from capt.modules.pooling_stages import PoolingStages, oracle, patch_mask, pooling_stages

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.backbones.pooling import Pooling

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
Where = Literal["nowhere", "before pooling", "in pooling", "before and in pooling", "unclear"]

#: Stages of a lone object, from the tokens to the feature; the first three are of single patches.
STAGES = ("tokens", "values", "single", "mean", "oracle", "final")
_PER_PATCH = STAGES[:3]
_DECIMALS = 6  # differences of cosines below it are rounding of single precision
#: Objects whose attention and direct effects are looked at: those take passes of their own.
_LOOKED_AT = 8

# Sources: stages and their read-outs, see capt.modules.pooling_stages. The split of a loss into the part before and the
# part in the pooling, its tests and its words are ours.


class Part(NamedTuple):
    """One part of a loss: its mean over units, center less off-center, and whether a test shows it."""

    effect: Interval
    p: float
    shown: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"effect": self.effect.record(), "p": self.p, "shown": self.shown}


@dataclass(frozen=True)
class Loss:
    """What the center has over the rest, split exactly into ``before`` the pooling and ``pooling``.

    Attributes:
        kind: "visibility": of lone objects, margin of the true name; "competition": of two objects, score of the one in
            the middle above that of the other.
        unit: what the tests count.
        units: how many.
        total, before, pooling: above 0 favours the center; ``before + pooling = total``. ``p`` of the total is adjusted
            for the two kinds of loss, and parts are tested only where the total is shown.
    """

    kind: str
    unit: str
    units: int
    total: Part
    before: Part
    pooling: Part

    @property
    def where(self) -> Where:
        """At which stage it arises: only parts of the total's sign count."""
        if not self.total.shown:
            return "nowhere"
        sign = np.sign(self.total.effect.estimate)
        early, late = (part.shown and np.sign(part.effect.estimate) == sign for part in (self.before, self.pooling))
        if early and late:
            return "before and in pooling"
        return "before pooling" if early else "in pooling" if late else "unclear"

    @property
    def favours(self) -> str:
        """ "center" or "border"; "nothing" if no loss is shown."""
        return "nothing" if not self.total.shown else "center" if self.total.effect.estimate > 0 else "border"

    def words(self) -> str:
        """One sentence."""
        parts = (self.total, self.before, self.pooling)
        total, before, pooling = (
            f"{part.effect.estimate:+.4f} [{part.effect.low:+.4f}, {part.effect.high:+.4f}]" for part in parts
        )
        what = {
            "visibility": "A lone object's margin over other names",
            "competition": "Of two objects, the middle one's score above the other's",
        }[self.kind]
        basis = f"{self.units} {self.unit}s, p {self.total.p:.3g}"
        if not self.total.shown:
            return f"{what} is not shown to depend on the place: center less off-center {total} ({basis})."
        return (
            f"{what} favours the {self.favours}: {total} ({basis}), of which {before} arises before the last "
            f"aggregation (p {self.before.p:.3g}) and {pooling} in it (p {self.pooling.p:.3g}): lost {self.where}."
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        parts = {name: getattr(self, name).record() for name in ("total", "before", "pooling")}
        return {
            "kind": self.kind, "unit": self.unit, "units": self.units, **parts, "where": self.where,
            "favours": self.favours, "words": self.words(),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where objects are lost; see :func:`explain_center_bias`. P positions, S stages.

    Attributes:
        positions: where the lone objects were.
        survival: by stage, float64 [P]: share of pictures whose object is among the best names there; of patches, in
            any patch of the object.
        chance: by stage, float64 [P]: the same of names that are not in the picture.
        vanish: float64 [P], share of pictures whose object is found in a patch (values or single) but not in the
            feature.
        margins: by stage ("mean", "oracle", "final"), float64 [K objects, P].
        visibility, competition: the losses; competition is None with fewer than two objects.
        attention: statistics of the pooling row, JSON-able.
        effects: direct effects by layer, JSON-able; a text says why there are none.
        settings: how it was done.
    """

    positions: Positions
    survival: dict[str, FloatArray]
    chance: dict[str, FloatArray]
    vanish: FloatArray
    margins: dict[str, FloatArray]
    visibility: Loss
    competition: Loss | None
    attention: dict[str, Any]
    effects: dict[str, Any] | str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> list[Loss]:
        """Those that were looked for."""
        return [self.visibility] + ([self.competition] if self.competition else [])

    @property
    def diagnosis(self) -> str:
        """In a few words: "none", or kind, direction and stage of each loss that is shown."""
        found = [
            f"{one.kind} loss towards the {_other(one.favours)}, {one.where}" for one in self.losses if one.total.shown
        ]
        return "; ".join(found) or "none"

    def words(self) -> list[str]:
        """Sentences with the numbers and tests behind the diagnosis."""
        found = [one.words() for one in self.losses]
        off = ~self.positions.center
        kept = {stage: 100 * self.survival[stage] for stage in ("oracle", "final")}
        found.append(
            "Objects among the "
            f"{self.settings.get('best', 3)} best names, center and off-center: pooled from their own patches "
            f"{kept['oracle'][~off].mean():.1f} % and {kept['oracle'][off].mean():.1f} %, in the feature "
            f"{kept['final'][~off].mean():.1f} % and {kept['final'][off].mean():.1f} %. Found in a patch but not in "
            f"the feature: {100 * self.vanish[~off].mean():.1f} % and {100 * self.vanish[off].mean():.1f} %."
        )
        if any(one.where == "before pooling" for one in self.losses):
            found.append("What is lost before the last aggregation cannot be brought back by re-weighting it.")
        return found

    def record(self) -> dict[str, Any]:
        """For JSON."""
        rings = {
            stage: {"survival": self._rings(self.survival[stage]), "chance": self._rings(self.chance[stage])}
            for stage in self.survival
        }
        loss = self.margins["oracle"] - self.margins["final"]
        return {
            "diagnosis": self.diagnosis,
            "words": self.words(),
            "losses": {one.kind: one.record() for one in self.losses},
            "stages": rings,
            "margins": {stage: self._rings(values.mean(0)) for stage, values in self.margins.items()},
            "vanish": self._rings(self.vanish),
            "vanish_map": self.positions.as_map(self.vanish),
            "aggregation_loss": self._rings(loss.mean(0)),
            "aggregation_loss_map": self.positions.as_map(loss.mean(0)),
            "attention": self.attention,
            "direct_effects": self.effects,
            "positions": self.positions.record(),
            "settings": self.settings,
        }

    def _rings(self, values: FloatArray) -> list[dict[str, float]]:
        return self.positions.rings(values)


def _other(side: str) -> str:
    return {"center": "border", "border": "center"}[side]


def explain_center_bias(
    backbone: Backbone,
    grid: PositionGrid,
    *,
    center_radius: float = 0.5,
    caption: str = "a {}",
    best: int = 3,
    pairs: int | None = None,
    level: float = 0.01,
    progress: Progress | None = None,
) -> Explanation:
    """Follow lone objects, and pairs of objects, through the last aggregation of a model.

    The margin of a picture's name (its cosine less the mean of the names that are not shown) is read twice: pooled from
    the object's own patches (``oracle``) and in the feature (``final``). How much more the center has of the first is
    lost before the last aggregation, the rest of what it has more of the second is lost in it. Pairs are treated alike,
    with the score of the object in the middle less that of the other, each object of a pair in both places. Losses are
    tested over objects and pairs (sign flips, Holm for the two kinds); the parts only of a loss that is shown.

    Args:
        backbone: any whose pooling can be taken apart.
        grid: objects, positions and grounds.
        center_radius: as in :func:`capt.evaluation.center_bias.measure_center_bias`.
        caption: text of an object's name.
        best: an object counts as present among so many best names.
        pairs: of objects, disjoint; as many as there are by default.
        level: of the tests.
        progress: called with what is done, how far, of how many.

    Raises:
        CaptError: a pooling that cannot be taken apart.
        DataError: fewer than two objects.
    """
    names = grid.cutouts.names
    if len(names) < 2:
        raise DataError(f"cutouts: found {len(names)} object, expected at least 2 to be told apart")
    best = min(best, len(names) - 1)
    run = _Stages(backbone, grid, backbone.text_features([caption.replace("{}", name) for name in names]))
    positions = Positions.of(grid.grid, center_radius)
    tell = progress or (lambda *_: None)
    lone = run.lone(best, tell)
    visibility = [position_gap(lone.margins[stage], positions.center) for stage in ("final", "oracle")]
    n_pairs = len(names) // 2 if pairs is None else pairs
    competition = run.pairs(n_pairs, tell)
    totals = [visibility[0], competition[0]]
    adjusted = holm([sign_flip_test(values.round(_DECIMALS)) for values in totals])
    tell("attention", 0, 1)
    attention, effects = run.attention(positions), run.effects(positions)
    return Explanation(
        positions,
        lone.survival,
        lone.chance,
        lone.vanish,
        lone.margins,
        _loss("visibility", "object", visibility[0], visibility[1], float(adjusted[0]), level),
        _loss("competition", "pair", competition[0], competition[1], float(adjusted[1]), level),
        attention,
        effects,
        {"grid": grid.record(), "center_radius": center_radius, "caption": caption, "best": best, "level": level},
    )


def _loss(kind: str, unit: str, total: FloatArray, before: FloatArray, p: float, level: float) -> Loss:
    total, before = total.round(_DECIMALS), before.round(_DECIMALS)
    parts = [before, (total - before).round(_DECIMALS)]
    adjusted = holm([sign_flip_test(values) for values in parts])
    shown = p <= level
    made = [
        Part(bootstrap(values), float(one), shown and bool(one <= level))
        for values, one in zip(parts, adjusted, strict=True)
    ]
    return Loss(kind, unit, len(total), Part(bootstrap(total), p, shown), *made)


class _Lone(NamedTuple):
    survival: dict[str, FloatArray]
    chance: dict[str, FloatArray]
    vanish: FloatArray
    margins: dict[str, FloatArray]


class _Stages:
    """Reads pictures of a grid at all stages of one model."""

    def __init__(self, backbone: Backbone, grid: PositionGrid, texts: Tensor) -> None:
        self.backbone, self.grid, self.texts = backbone, grid, texts
        self.pooling: Pooling = backbone.tower.pooling()

    def images(self, scenes: list[Scene]) -> Tensor:
        return self.grid.tensor(scenes).to(device=self.backbone.device, dtype=self.backbone.dtype)

    def masks(self, scenes: list[Scene], which: int = 0) -> Tensor:
        """Patches of one pasted object of each scene, bool [B, N]."""
        opacity = torch.stack([self.grid.opacity(scene)[which] for scene in scenes])
        return patch_mask(opacity, self.pooling.grid).to(self.backbone.device)

    @torch.no_grad()
    def lone(self, best: int, tell: Progress) -> _Lone:
        """Every object in every cell, its stages averaged over variants."""
        k, p = len(self.texts), self.grid.cells**2
        found = {stage: np.zeros((k, p)) for stage in (*STAGES, "vanish")}
        chance = {stage: np.zeros((k, p)) for stage in STAGES}
        margins = {stage: np.zeros((k, p)) for stage in ("mean", "oracle", "final")}
        for thing in range(k):
            tell("stages of lone objects", thing, k)
            for scenes in self._variants(thing):
                masks = self.masks(scenes)
                stages = pooling_stages(self.pooling, self.pooling.inputs(self.images(scenes)), masks)
                own = torch.full((p,), thing, device=masks.device)
                absent = torch.ones(p, k, dtype=torch.bool, device=masks.device)
                absent[:, thing] = False
                present = _present(stages, self.texts, masks, best)
                for stage, values in present.items():
                    found[stage][thing] += values[:, thing].double().cpu().numpy()
                    chance[stage][thing] += (values & absent).sum(1).double().cpu().numpy() / (k - 1)
                in_patches = present["values"][:, thing] | present["single"][:, thing]
                lost = vanished(in_patches[:, None], present["final"][:, thing], torch.ones_like(in_patches[:, None]))
                found["vanish"][thing] += lost.double().cpu().numpy()
                for stage in margins:
                    scores = concept_scores(getattr(stages, stage).double(), self.texts.double())
                    margins[stage][thing] += margin(scores, own, absent).cpu().numpy()
        v = self.grid.variants
        survival = {stage: found[stage].mean(0) / v for stage in STAGES}
        return _Lone(
            survival,
            {stage: values.mean(0) / v for stage, values in chance.items()},
            found["vanish"].mean(0) / v,
            {stage: values / v for stage, values in margins.items()},
        )

    @torch.no_grad()
    def pairs(self, n_pairs: int, tell: Progress) -> tuple[FloatArray, FloatArray]:
        """For each pair, the middle object's score above the other's, in the feature and pooled from own patches."""
        n = len(self.texts)
        if not 1 <= n_pairs <= n // 2:
            raise CaptError(f"pairs: found {n_pairs}, expected 1 to {n // 2}, disjoint pairs of {n} objects")
        chosen = np.random.default_rng(self.grid.seed).permutation(n)[: 2 * n_pairs].reshape(n_pairs, 2)
        final, early = np.zeros(n_pairs), np.zeros(n_pairs)
        for number, (a, b) in enumerate(chosen.tolist()):
            tell("stages of pairs", number, n_pairs)
            for central, peripheral in ((a, b), (b, a)):
                for variant in range(self.grid.variants):
                    scenes = self.grid.pair(central, peripheral, variant)[: len(self.grid.others)]
                    inputs = self.pooling.inputs(self.images(scenes))
                    feature = self.pooling.tower.project(self.pooling.tower.advance(inputs, start=self.pooling.depth))
                    alone = [oracle(self.pooling, inputs, self.masks(scenes, which)) for which in (0, 1)]
                    texts = self.texts[[central, peripheral]].double()
                    scores = concept_scores(feature.double(), texts)
                    final[number] += float((scores[:, 0] - scores[:, 1]).mean())
                    of_own = [concept_scores(x.double(), texts[i : i + 1])[:, 0] for i, x in enumerate(alone)]
                    early[number] += float((of_own[0] - of_own[1]).mean())
        return final / (2 * self.grid.variants), early / (2 * self.grid.variants)

    @torch.no_grad()
    def attention(self, positions: Positions) -> dict[str, Any]:
        """Statistics of the pooling row: by layer and head, and by position of the object."""
        things = range(min(_LOOKED_AT, len(self.texts)))
        ratios, gains, rows = [], [], []
        sinks = 0.0
        for thing in things:
            scenes = next(self._variants(thing))
            found = attention_rows(self.pooling, self.images(scenes))
            ratios.append(center_ratio(found.patches, self.pooling.grid).mean(0))
            gains.append(object_gain(found.patches, self.masks(scenes)).mean(2)[:, -1])
            rows.append(found.patches[positions.middle].mean(1)[-1])
            sinks += float(found.sink_mass()[:, -1].mean()) / len(things)
        ratio, gain = torch.stack(ratios).mean(0).double().cpu(), torch.stack(gains).mean(0).double().cpu().numpy()
        blank = attention_rows(self.pooling, self.images(self._blanks()))
        return {
            "kind": self.pooling.kind,
            "center_ratio_by_layer": ratio.mean(1).tolist(),
            "center_ratio_by_head": ratio[-1].tolist(),
            "center_ratio_of_blank_pictures": float(center_ratio(blank.patches, self.pooling.grid)[:, -1].mean()),
            "position_share": float(position_share(torch.stack(rows)[:, None, None]).mean()) if len(rows) > 1 else None,
            "sink_mass": sinks,
            "object_gain": positions.rings(gain),
            "object_gain_map": positions.as_map(gain),
        }

    @torch.no_grad()
    def effects(self, positions: Positions) -> dict[str, Any] | str:
        """Part of the true name's direct effect that comes from the object's patches, and its amount by layer."""
        shares, layers = [], []
        try:
            for thing in range(min(_LOOKED_AT, len(self.texts))):
                scenes = next(self._variants(thing))
                effects = direct_effects(self.pooling, self.images(scenes))
                scores = effects.concept_scores(self.texts[thing : thing + 1].to(self.backbone.dtype))
                masks = self.masks(scenes)
                shares.append(object_share(scores, masks)[:, 0].double().cpu().numpy())
                patches = scores[..., -masks.shape[1] :, 0] * masks[:, None, None]
                layers.append((patches.sum((2, 3)) / effects.total().norm(dim=-1)[:, None]).double().cpu().numpy())
        except CaptError as error:
            return str(error)
        share, by_layer, center = np.mean(shares, 0), np.mean(layers, 0), positions.center
        return {
            "object_share": positions.rings(share),
            "by_layer_center": by_layer[center].mean(0).tolist(),
            "by_layer_off": by_layer[~center].mean(0).tolist(),
        }

    def _variants(self, thing: int) -> Iterator[list[Scene]]:
        """Scenes with the object in each cell, variant by variant."""
        return (self.grid.single(thing, variant)[1:] for variant in range(self.grid.variants))

    def _blanks(self) -> list[Scene]:
        return [self.grid.single(0, variant)[0] for variant in range(self.grid.variants)]


def _present(stages: PoolingStages, texts: Tensor, masks: Tensor, best: int) -> dict[str, Tensor]:
    """Which names are among the best at each stage, bool [B, K]; at patches: in any patch of the object."""
    found = {}
    for stage in STAGES:
        scores = concept_scores(getattr(stages, stage).float(), texts.float())
        among = scores >= scores.topk(best, dim=-1).values[..., -1:]
        found[stage] = (among & masks[..., None]).any(1) if stage in _PER_PATCH else among
    return found
