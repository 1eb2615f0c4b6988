"""Where in an image tower an off-center object is lost: before the last aggregation, in it, or to another object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from capt.data.position_grid import PositionGrid
from capt.errors import DataError
from capt.evaluation.position_results import Positions
from capt.evaluation.position_statistics import Interval, bootstrap, check_level, holm, position_gap, sign_flip_test
from capt.methods.bias.attribution import LOOKED_AT, Attribution, attribute
from capt.methods.bias.stages import FloatArray, Progress, StageReader

if TYPE_CHECKING:
    from capt.backbones import Backbone

Where = Literal["nowhere", "before pooling", "in pooling", "before and in pooling", "unclear"]

_DECIMALS = 6  # differences of cosines below it are rounding of single precision

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
        margins: by stage ("mean", "even", "oracle", "final"), float64 [K objects, P].
        visibility, competition: the losses; competition is None with fewer than two objects.
        attribution: attention, concepts, blocks and heads; None if no object was looked at.
        settings: how it was done.
    """

    positions: Positions
    survival: dict[str, FloatArray]
    chance: dict[str, FloatArray]
    vanish: FloatArray
    margins: dict[str, FloatArray]
    visibility: Loss
    competition: Loss | None
    attribution: Attribution | None
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
        absent = 100 * self.chance["final"].mean()
        found.append(
            f"Objects among the {self.settings['best']} best names, center and off-center: pooled from their own "
            f"patches {kept['oracle'][~off].mean():.1f} % and {kept['oracle'][off].mean():.1f} %, in the feature "
            f"{kept['final'][~off].mean():.1f} % and {kept['final'][off].mean():.1f} % (names that are not shown: "
            f"{absent:.1f} %). Found in a patch but not in the feature: {100 * self.vanish[~off].mean():.1f} % and "
            f"{100 * self.vanish[off].mean():.1f} %."
        )
        if any(one.where == "before pooling" for one in self.losses):
            found.append("With equal weights of all patches it is lost as well: those of the pooling are not to blame.")
        return found + (self.attribution.words() if self.attribution else [])

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
            **(self.attribution.record() if self.attribution else {}),
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
    looked_at: int = LOOKED_AT,
    progress: Progress | None = None,
) -> Explanation:
    """Follow lone objects, and pairs of objects, through the last aggregation of a model.

    The margin of a picture's name (its cosine less the mean of the names that are not shown) is read twice: with equal
    weights of all patches in the pooling row (``even``) and in the feature (``final``). Equal weights prefer no place,
    so how much more the center has of the first is lost before the last aggregation, and the rest of what it has more
    of the second is lost in it. Pairs are treated alike,
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
        looked_at: objects whose attention, concepts and heads are followed (:mod:`capt.methods.bias.attribution`),
            0 for none.
        progress: called with what is done, how far, of how many.

    Raises:
        CaptError: a pooling that cannot be taken apart.
        DataError: fewer than two objects.
    """
    check_level(level)
    names = grid.cutouts.names
    if len(names) < 2:
        raise DataError(f"cutouts: found {len(names)} object, expected at least 2 to be told apart")
    best = min(best, len(names) - 1)
    run = StageReader(backbone, grid, backbone.text_features([caption.replace("{}", name) for name in names]))
    positions = Positions.of(grid.grid, center_radius)
    tell = progress or (lambda *_: None)
    lone = run.lone(best, tell)
    visibility = [position_gap(lone.margins[stage], positions.center) for stage in ("final", "even")]
    n_pairs = len(names) // 2 if pairs is None else pairs
    competition = run.pairs(n_pairs, tell)
    totals = [visibility[0], competition[0]]
    adjusted = holm([sign_flip_test(values.round(_DECIMALS)) for values in totals])
    attribution = attribute(run, positions, caption, best, looked_at, tell) if looked_at > 0 else None
    return Explanation(
        positions,
        lone.survival,
        lone.chance,
        lone.vanish,
        lone.margins,
        _loss("visibility", "object", visibility[0], visibility[1], float(adjusted[0]), level),
        _loss("competition", "pair", competition[0], competition[1], float(adjusted[1]), level),
        attribution,
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
