"""Choosing a training-free change of the last aggregation on some objects and testing it on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capt.backbones import Backbone
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError, DataError
from capt.evaluation.position_results import Positions
from capt.evaluation.position_statistics import Interval, bootstrap, check_level, sign_flip_test
from capt.methods.bias.members import Member, family, inverted, save_member, shuffled
from capt.methods.bias.trial import PLAIN, SCORES, FloatArray, Outcome, Progress, Trial

#: Accuracy on centered objects that a member may cost on the calibration objects.
CLEAN_COST = 0.01
#: Least entropy of the pooling row, of that of an even one.
LEAST_ENTROPY = 0.25
_RANDOM_GROUPS = 3


class Change(NamedTuple):
    """An accuracy before and after, and their difference over units with its test."""

    before: float
    after: float
    gain: Interval
    p: float

    @classmethod
    def of(cls, before: FloatArray, after: FloatArray) -> Change:
        """Of accuracies by unit."""
        gains = (after - before).round(9)
        return cls(float(before.mean()), float(after.mean()), bootstrap(gains), sign_flip_test(gains))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "gain": self.gain.record()}


@dataclass(frozen=True, eq=False)
class Mitigation:
    """What was found; see :func:`mitigate_center_bias`.

    Attributes:
        plain: the model.
        chosen: the member that was chosen and shown to help; None where none was.
        best: the member that the calibration objects prefer; None where none is allowed and better there.
        off, clean: of ``best`` on held-out objects: off-center and centered accuracy, before and after.
        rows: the table, one row a member: accuracies on calibration and held-out objects.
        controls: the same of the controls of ``best``.
        regions: accuracies of what needs to know the region or several passes; empty where not asked for.
        curve: held-out naming accuracy by ring before and after ``best``.
        settings: how it was done.
    """

    plain: Backbone
    chosen: Member | None
    best: Member | None
    off: Change | None
    clean: Change | None
    rows: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    regions: list[dict[str, Any]]
    curve: dict[str, list[dict[str, float]]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The model with the chosen change, accepted wherever a backbone is; the plain one where none helped."""
        return self.plain if self.chosen is None else self.chosen.apply(self.plain)

    @property
    def table(self) -> list[dict[str, Any]]:
        """All members, the plain model first, then by calibrated off-center accuracy."""
        return [self.rows[0], *sorted(self.rows[1:], key=lambda row: -row["calibration_off"])]

    def words(self) -> list[str]:
        """The outcome in sentences."""
        if self.best is None or self.off is None or self.clean is None:
            return [
                f"No member of the family of {len(self.rows) - 1} raises the off-center accuracy of the calibration "
                f"objects ({100 * self.rows[0]['calibration_off']:.1f} %) at a cost of at most {100 * CLEAN_COST:g} "
                "point in the center: the model is left as it is."
            ]
        off, clean = self.off, self.clean
        found = [
            f"Chosen on {self.settings['calibration_objects']} objects: {self.best.name}. On "
            f"{self.settings['held_out_objects']} others off-center accuracy goes from {100 * off.before:.1f} % to "
            f"{100 * off.after:.1f} % ({off.gain.points()} points, p {off.p:.3g}), centered accuracy from "
            f"{100 * clean.before:.1f} % to {100 * clean.after:.1f} % ({clean.gain.points()} points)."
        ]
        if self.chosen is None:
            found.append(
                "A gain on held-out objects is not shown, so no member of the family is said to help: the model is "
                "left as it is."
            )
            if 2.0 ** (1 - self.settings["held_out_objects"] // 2) > self.settings["level"]:
                found.append("So few objects could not have shown one; use more of them.")
        if self.controls:
            gains = "; ".join(f"{one['name']} {100 * one['off']['gain']['estimate']:+.1f}" for one in self.controls)
            found.append(
                f"Off-center gains of the controls, points: {gains}. What a control gains as well is no matter of the "
                "place."
            )
        if self.chosen is not None and clean.gain.estimate < -CLEAN_COST:
            found.append(
                f"The cost in the center is above {100 * CLEAN_COST:g} point on held-out objects, although it was not "
                "on those it was chosen on."
            )
        return found

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "helps": self.chosen is not None,
            "words": self.words(),
            "chosen": self.chosen.record() if self.chosen else None,
            "best": self.best.record() if self.best else None,
            "held_out_off": self.off.record() if self.off else None,
            "held_out_clean": self.clean.record() if self.clean else None,
            "table": self.table,
            "controls": self.controls,
            "regions": self.regions,
            "curve": self.curve,
            "fingerprint": {"plain": self.plain.fingerprint(), "mitigated": self.backbone.fingerprint()},
            "settings": self.settings,
        }

    def save(self, folder: str | Path, opened_with: dict[str, Any] | None = None) -> None:
        """Store the chosen change for :func:`capt.methods.bias.members.load_member`."""
        save_member(Path(folder), self.chosen, self.plain, opened_with or {"model": self.plain.name})


def mitigate_center_bias(
    backbone: Backbone,
    grid: PositionGrid,
    *,
    members: Sequence[Member] | None = None,
    passes: int = 1,
    center_radius: float = 0.5,
    caption: str = "a {}",
    level: float = 0.05,
    region_objects: int = 4,
    progress: Progress | None = None,
) -> Mitigation:
    """Choose a change on half of the objects and test it on the other half.

    Off-center accuracy is the mean of two: lone objects named among all of their half, and pairs of which both objects
    are found (the four-way test, both orders of names) while one lies in the middle. Of the members that cost at most
    one point of centered accuracy and leave the row an entropy of 0.25, the one with the highest off-center accuracy on
    the calibration objects is taken, if it is above that of the plain model; of equal ones the first listed. On the
    held-out objects, which share no picture and no name with the others, its gain is tested once, over pairs.

    Args:
        backbone: the model, left as it is.
        grid: objects (at least 8), positions and grounds.
        members: what to choose from; :func:`capt.methods.bias.members.family` by default.
        passes: through the tower that a member of that family may take for one image; see there.
        center_radius, caption: as in :func:`capt.evaluation.center_bias.measure_center_bias`.
        level: of the test on held-out objects.
        region_objects: held-out objects on which visual prompts, crops and region boosts are tried, which know the
            region or take several passes; 0: none.
        progress: called with what is done, how far, of how many.

    Raises:
        CaptError: a pooling that cannot be taken apart.
        DataError: fewer than 8 objects.
    """
    if passes < 1:
        raise CaptError(f"passes: found {passes}, expected 1 or more; from 6 on crops are members")
    if region_objects < 0:
        raise CaptError(f"region_objects: found {region_objects}, expected 0 or more")
    check_level(level)
    n = len(grid.cutouts)
    if n < 8:
        raise DataError(f"cutouts: found {n} objects, expected at least 8: half of them choose, the others test")
    tell = progress or (lambda *_: None)
    order = np.random.default_rng(grid.seed).permutation(n).tolist()
    halves = [replace(grid, cutouts=grid.cutouts.choose(part)) for part in (order[: n // 2], order[n // 2 :])]
    positions = Positions.of(grid.grid, center_radius)
    trials = [Trial(backbone, half, caption, positions) for half in halves]
    every = list(members) if members is not None else family(trials[0].pooling, trials[0].prior(), passes)
    calibration = trials[0].outcome(every, "calibration objects", tell)
    chosen = _choose(calibration, positions, len(every))
    tested = every if chosen is None else [*every, *_controls(every[chosen])]
    held_out = trials[1].outcome(tested, "held-out objects", tell)
    rows = _rows([PLAIN, *(one.name for one in every), *SCORES], calibration, held_out, positions, len(every))
    off, clean = held_out.off(positions), held_out.clean(positions)
    best = None if chosen is None else every[chosen]
    changes = None if chosen is None else (Change.of(off[0], off[1 + chosen]), Change.of(clean[0], clean[1 + chosen]))
    helps = changes is not None and changes[0].gain.estimate > 0 and changes[0].p <= level
    controls = [
        {"name": one.name, "off": Change.of(off[0], off[at]).record(), "clean": Change.of(clean[0], clean[at]).record()}
        for at, one in enumerate(tested[len(every) :], 1 + len(every))
    ]
    regions = trials[1].regions(region_objects, tell) if region_objects else []
    curve = {PLAIN: positions.rings(held_out.lone[0].mean(0))}
    if best is not None and chosen is not None:
        curve[best.name] = positions.rings(held_out.lone[1 + chosen].mean(0))
    settings = {
        "grid": grid.record(), "calibration_objects": n // 2, "held_out_objects": n - n // 2,
        "calibration_names": list(halves[0].cutouts.names), "center_radius": center_radius, "caption": caption,
        "level": level, "clean_cost": CLEAN_COST, "least_entropy": LEAST_ENTROPY, "region_objects": region_objects,
    }  # fmt: skip
    off_change, clean_change = changes or (None, None)
    return Mitigation(
        backbone, best if helps else None, best, off_change, clean_change, rows, controls, regions, curve, settings
    )


def _choose(found: Outcome, positions: Positions, n: int) -> int | None:
    """Number of the member that is allowed and best on the calibration objects, if above the plain model."""
    off, clean = found.off(positions).mean(1), found.clean(positions).mean(1)
    allowed = (clean >= clean[0] - CLEAN_COST - 1e-9) & ~(found.entropy < LEAST_ENTROPY)
    scores = np.where(allowed, off, -np.inf)[1 : 1 + n].round(9)
    best = int(scores.argmax())
    return best if scores[best] > round(float(off[0]), 9) else None


def _controls(member: Member) -> list[Member]:
    found = [inverted(member), *(shuffled(member, seed) for seed in range(_RANDOM_GROUPS))]
    return [one for one in found if one is not None]


def _rows(
    names: Sequence[str], calibration: Outcome, held_out: Outcome, positions: Positions, n: int
) -> list[dict[str, Any]]:
    """One row a member; the scores at the end of both outcomes are behind the controls of the second."""
    sides = []
    for found in (calibration, held_out):
        at = [*range(1 + n), *range(len(found.lone) - len(SCORES), len(found.lone))]
        sides.append([values.mean(1)[at] for values in (found.off(positions), found.clean(positions))])
    entropies = calibration.entropy
    return [
        {
            "name": name,
            "usable": number <= n,
            "calibration_off": float(sides[0][0][number]),
            "calibration_clean": float(sides[0][1][number]),
            "held_out_off": float(sides[1][0][number]),
            "held_out_clean": float(sides[1][1][number]),
            "entropy": None if np.isnan(entropies[number]) else float(entropies[number]),
        }
        for number, name in enumerate(names)
    ]
