"""Is an image-text model center-biased? Measured on pictures that differ only in where an object is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from capt.data.cutouts import Cutouts
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError, DataError
from capt.evaluation.position_results import (
    BOTH,
    CENTRAL,
    NEITHER,
    PERIPHERAL,
    Capacity,
    Competition,
    Positions,
    Visibility,
)
from capt.evaluation.position_statistics import Interval, bootstrap, check_level, holm, sign_flip_test
from capt.evaluation.scene_encoder import Encoder, SceneEncoder
from capt.evaluation.whats_up import DISTRACTOR, four_captions, four_way_choice

FloatArray = NDArray[np.float64]
Layout = Literal["single", "pair", "full"]
LAYOUTS: tuple[Layout, ...] = ("single", "pair", "full")
NOT_SHOWN = "not shown to be biased"
NOT_TOLD = "cannot be told: objects are named no better than by chance"
TO_CENTER = "biased to the center"
TO_BORDER = "biased to the border"
_OTHER_GROUNDS = ("white", "grey", "gradient", "noise", "texture")  # for choosing objects


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        question: what was asked.
        compared: what the effect is a difference of.
        unit: what the test counts ("object", "pair").
        units: how many.
        effect: mean over the units with its 95 % interval; above 0 favours the center.
        p: of the sign-flip test over units.
        p_adjusted: the same after Holm's correction for all questions of the result.
        verdict: "biased to the center", "biased to the border" or "not shown to be biased".
    """

    question: str
    compared: str
    unit: str
    units: int
    effect: Interval
    p: float
    p_adjusted: float
    verdict: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "effect": self.effect.record()}


@dataclass(frozen=True)
class Cost:
    """What a measurement took.

    Attributes:
        images, texts: how many were encoded.
        seconds: all of it.
        drawing_seconds: of them, spent on making pictures.
    """

    images: int
    texts: int
    seconds: float
    drawing_seconds: float


@dataclass(frozen=True, eq=False)
class CenterBiasResult:
    """Everything that was measured; see :func:`measure_center_bias`.

    Attributes:
        single, pair, full: outcomes by layout; None where it was not run.
        settings: how it was measured, JSON-able.
        level: of the tests.
        cost: time and images.
        findings: one answer a question, by name ("visibility", "lift", "competition").
    """

    single: Visibility | None
    pair: Competition | None
    full: Capacity | None
    settings: dict[str, Any]
    level: float
    cost: Cost
    findings: dict[str, Finding] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", _findings(self.single, self.pair, self.level))

    @property
    def verdict(self) -> str:
        """The strongest of the findings' verdicts: to the center, to the border, or not shown; or it cannot be told."""
        verdicts = {finding.verdict for finding in self.findings.values()}
        nothing = NOT_TOLD if self.at_chance else NOT_SHOWN
        return next((one for one in (TO_CENTER, TO_BORDER) if one in verdicts), nothing)

    @property
    def biased(self) -> bool:
        """Whether a bias to the center was shown."""
        return self.verdict == TO_CENTER

    @property
    def at_chance(self) -> bool:
        """Whether lone objects are named no better than by chance, so that there is nothing to lose at the border."""
        return self.single is not None and bootstrap(self.single.right.mean((1, 2))).low <= 1 / len(self.single.names)

    @property
    def warnings(self) -> list[str]:
        """Why "not shown" may say little: what the model does not recognise anywhere cannot be lost at the border."""
        found = []
        if self.at_chance:
            found.append(
                "lone objects are named no better than by chance, so their accuracy says nothing about positions; use "
                "fewer cells, larger objects (fill=1), or objects the model knows, chosen among more candidates"
            )
        for name, finding in self.findings.items():
            if 2.0 ** (1 - finding.units) * len(self.findings) > self.level:
                found.append(
                    f"{finding.units} {finding.unit}s are too few for the test of {name} to show anything at "
                    f"{self.level:g}; use more objects"
                )
        if self.pair is not None and self.pair.shares(self.pair.choice)["neither"] > 0.5:
            found.append("in most pictures of two objects neither is found, so few are left to compete")
        return found

    def record(self) -> dict[str, Any]:
        """Every number, for :func:`capt.files.write_json`."""
        layouts = {"single": self.single, "pair": self.pair, "full": self.full}
        return {
            "verdict": self.verdict,
            "level": self.level,
            "warnings": self.warnings,
            "findings": {name: finding.record() for name, finding in self.findings.items()},
            **{name: found.record() if found else None for name, found in layouts.items()},
            "positions": located.positions.record() if (located := self.single or self.pair) else None,
            "settings": self.settings,
            "cost": dict(self.cost.__dict__),
        }


def _findings(single: Visibility | None, pair: Competition | None, level: float) -> dict[str, Finding]:
    asked: dict[str, tuple[str, str, str, FloatArray]] = {}
    if single is not None:
        asked["visibility"] = (
            "is a lone object named correctly more often in the center?",
            "accuracy, center less off-center",
            "object",
            single.gaps(),
        )
        asked["lift"] = (
            "does a lone object change the score of its name more in the center?",
            "change, center less off-center",
            "object",
            single.lift_gaps(),
        )
    if pair is not None:
        asked["competition"] = (
            "of two objects, is the one in the middle kept more often?",
            "share of pictures with only that one found less share with only the other",
            "pair",
            pair.kept(),
        )
    if not asked:
        return {}
    p_values = [sign_flip_test(values) for *_, values in asked.values()]
    found = {}
    for (name, (question, compared, unit, values)), p, adjusted in zip(
        asked.items(), p_values, holm(p_values), strict=True
    ):
        effect = bootstrap(values)
        shown = TO_CENTER if effect.estimate > 0 else TO_BORDER
        verdict = shown if adjusted <= level else NOT_SHOWN
        found[name] = Finding(question, compared, unit, len(values), effect, p, float(adjusted), verdict)
    return found


def measure_center_bias(
    model: Encoder,
    grid: PositionGrid,
    *,
    layouts: Sequence[Layout] = LAYOUTS,
    center_radius: float = 0.5,
    pairs: int | None = None,
    full_cells: int = 3,
    caption: str = "a {}",
    distractor: Literal["fixed", "absent"] = "fixed",
    batch_size: int = 64,
    level: float = 0.01,
) -> CenterBiasResult:
    """Measure whether, and how, a model favours the middle of its input.

    A verdict rests on up to three tests over objects or pairs of objects (naming accuracy of lone objects, lift of
    their score, which of two objects is kept), each a sign-flip test, corrected by Holm; a bias is said to be shown at
    ``level``. What is not shown may still be there: look at the intervals.

    Args:
        model: a backbone, or anything with ``image_features`` and ``text_features``.
        grid: objects, positions and grounds, see :meth:`capt.data.position_grid.PositionGrid.for_backbone`.
        layouts: "single": one object (visibility); "pair": one in the middle and one elsewhere (competition); "full":
            one in every cell (capacity).
        center_radius: positions with max(|x|, |y|) up to it are the center; 0.5 is a quarter of the area. In the layout
            "full" it is 1/3 at most, the middle cell of three by three.
        pairs: of objects, disjoint; as many as there are by default.
        full_cells: cells along each side of layout "full"; needs more objects than cells.
        caption: text of a lone object's name.
        distractor: fourth caption of pairs: "fixed" is about a cat and a refrigerator, "absent" about two of the
            objects that are not shown.
        batch_size: images at a time; memory does not grow with the number of images.
        level: chance of a false alarm that is accepted.

    Raises:
        CaptError: options that cannot be met.
        DataError: too few objects for a layout.
        NumericError: the model's features are not finite.
    """
    started = time.perf_counter()
    for layout in layouts:
        if layout not in LAYOUTS:
            raise CaptError(f"layouts: found {layout!r}, expected some of {', '.join(LAYOUTS)}")
    if caption.count("{}") != 1:
        raise CaptError(f"caption: found {caption!r}, expected '{{}}' once, for the name of the object")
    check_level(level)
    run = SceneEncoder(model, grid, batch_size)
    positions = Positions.of(grid.grid, center_radius)
    single = _single(run, positions, caption) if "single" in layouts else None
    pair = _pair(run, positions, pairs, distractor) if "pair" in layouts else None
    full = _full(run, full_cells, center_radius, caption) if "full" in layouts else None
    settings = {
        "grid": grid.record(),
        "layouts": list(layouts),
        "center_radius": center_radius,
        "full_cells": full_cells,
        "caption": caption,
        "distractor": distractor,
    }
    cost = Cost(run.images, run.texts, time.perf_counter() - started, run.drawing)
    return CenterBiasResult(single, pair, full, settings, level, cost)


def recognised_objects(
    model: Encoder,
    grid: PositionGrid,
    n: int,
    *,
    center_radius: float = 0.5,
    caption: str = "a {}",
    batch_size: int = 64,
) -> Cutouts:
    """The ``n`` objects of a grid that a model names best, chosen without favouring any position.

    Each object is shown in the middle and in two opposite corner cells (the other two for every other object), on a
    ground that the grid does not use, so no picture is measured again. Middle and corners count as much as there are
    positions in the center and outside: what luck a chosen object had in one cell then lifts the means of both by the
    same, and an encoder without a center bias does not get one by the choice.

    Args:
        model: what will be measured.
        grid: with more objects than wanted.
        n: objects to keep.
        center_radius, caption: as in :func:`measure_center_bias`.
        batch_size: images at a time.

    Returns:
        Cut-outs, best first: those with the highest cosine of their own name less the best other name.
    """
    if not 1 <= n <= len(grid.cutouts):
        raise DataError(f"n: found {n}, expected 1 to {len(grid.cutouts)}, the objects of the grid")
    used = {str(one.name) for one in grid.grounds}
    ground = next((one for one in _OTHER_GROUNDS if one not in used), _OTHER_GROUNDS[0])
    other = replace(grid, seed=grid.seed + 1, backgrounds=(ground,))
    inside = Positions.of(grid.grid, center_radius).center
    run = SceneEncoder(model, other, batch_size)
    texts = run.encode_texts([caption.replace("{}", name) for name in grid.cutouts.names])
    diagonals = other.corners[::3], other.corners[1:3]
    scenes = [
        other.single(thing, variant)[1 + cell]
        for thing in range(len(grid.cutouts))
        for variant in range(other.variants)
        for cell in (other.middle, *diagonals[thing % 2])
    ]
    found = run.encode(scenes) @ texts.T
    own = torch.eye(len(texts), dtype=torch.bool).repeat_interleave(3 * other.variants, 0)
    margin = found[own] - found.masked_fill(own, -torch.inf).amax(1)
    middle, away = margin.view(len(texts), other.variants, 3).mean(1).split([1, 2], dim=1)
    scores = int(inside.sum()) * middle[:, 0] + int((~inside).sum()) * away.mean(1)
    return grid.cutouts.choose(scores.argsort(descending=True, stable=True)[:n].tolist())


def _single(run: SceneEncoder, positions: Positions, caption: str) -> Visibility:
    grid, names = run.grid, run.grid.cutouts.names
    if len(names) < 2:
        raise DataError(f"cutouts: found {len(names)} object, expected at least 2 to be told apart")
    texts = run.encode_texts([caption.replace("{}", name) for name in names])
    shape = (len(names), grid.variants, len(positions.ring))
    predicted, margin = np.empty(shape, np.int64), np.empty(shape)
    lift, influence = np.empty(shape), np.empty(shape)
    for thing in range(len(names)):
        scenes = [scene for variant in range(grid.variants) for scene in grid.single(thing, variant)]
        for variant, features in enumerate(run.encode(scenes).unflatten(0, (grid.variants, -1))):
            scores = features @ texts.T  # [1 + P, K], the blank ground first
            own, rest = scores[:, thing], scores.clone()
            rest[:, thing] = -torch.inf
            predicted[thing, variant] = scores[1:].numpy().argmax(1)
            margin[thing, variant] = (own - rest.amax(1))[1:]
            lift[thing, variant] = own[1:] - own[0]
            influence[thing, variant] = (features[1:] - features[0]).norm(dim=1)
    return Visibility(names, positions, predicted, margin, lift, influence)


#: What each caption keeps when the peripheral object is named first, and when it is named last.
_MEANING = np.array([[BOTH, PERIPHERAL, CENTRAL, NEITHER], [BOTH, CENTRAL, PERIPHERAL, NEITHER]])


def _pair(run: SceneEncoder, positions: Positions, n_pairs: int | None, distractor: str) -> Competition:
    grid, names = run.grid, run.grid.cutouts.names
    most = len(names) // 2
    n_pairs = most if n_pairs is None else n_pairs
    if not 1 <= n_pairs <= most:
        raise DataError(f"pairs: found {n_pairs}, expected 1 to {most}, disjoint pairs of {len(names)} objects")
    generator = np.random.default_rng(grid.seed)
    chosen = generator.permutation(len(names))[: 2 * n_pairs].reshape(n_pairs, 2)
    n_others, shape = len(positions.others), (n_pairs, 2, grid.variants, 2)
    choice = np.empty((*shape, n_others), np.int64)
    control = np.empty((*shape, len(grid.corners)), np.int64)
    center, preference = np.empty(shape, np.int64), np.empty((*shape[:3], n_others))
    for number, (a, b) in enumerate(chosen.tolist()):
        last = _last_caption(distractor, names, (a, b), generator)
        for role, (central, peripheral) in enumerate(((a, b), (b, a))):
            orders = ((names[peripheral], names[central]), (names[central], names[peripheral]))
            texts = torch.stack([run.encode_texts(four_captions(*order, last)) for order in orders])
            scenes = [scene for variant in range(grid.variants) for scene in grid.pair(central, peripheral, variant)]
            for variant, features in enumerate(run.encode(scenes).unflatten(0, (grid.variants, -1))):
                for order, captions in enumerate(texts):
                    kept = _MEANING[order][four_way_choice(features, captions).numpy()]
                    at = (number, role, variant, order)
                    choice[at], center[at], control[at] = kept[:n_others], kept[n_others], kept[n_others + 1 :]
                alone = features[:n_others] @ texts[0, 1:3].T
                preference[number, role, variant] = alone[:, 1] - alone[:, 0]
    pairs = [(names[a], names[b]) for a, b in chosen.tolist()]
    return Competition(pairs, positions, choice, control, center, preference)


def _last_caption(kind: str, names: Sequence[str], shown: tuple[int, int], generator: np.random.Generator) -> str:
    if kind == "fixed":
        return DISTRACTOR
    if kind != "absent":
        raise CaptError(f"distractor: found {kind!r}, expected 'fixed' or 'absent'")
    absent = [name for number, name in enumerate(names) if number not in shown]
    if len(absent) < 2:
        raise DataError(f"distractor: 'absent' needs at least 4 objects, found {len(names)}")
    first, second = generator.permutation(len(absent))[:2]
    return f"a {absent[first]} and a {absent[second]}"


def _full(run: SceneEncoder, cells: int, center_radius: float, caption: str) -> Capacity:
    names = run.grid.cutouts.names
    n = cells**2
    if len(names) <= n:
        raise DataError(
            f"full_cells: {cells} x {cells} cells need more than {n} objects, found {len(names)}; the others are the "
            "names that are absent. Use more objects or leave the layout 'full' out."
        )
    grid = replace(run.grid, cells=cells)
    positions = Positions.of(grid.grid, min(center_radius, 1 / 3))
    texts = run.encode_texts([caption.replace("{}", name) for name in names])
    order = np.random.default_rng(grid.seed).permutation(len(names)).tolist()
    shown, absent = order[:n], order[n:]
    auc = np.empty((n, grid.variants, n))
    for variant in range(grid.variants):
        scores = run.encode(grid.full(shown, variant), grid) @ texts.T
        own, others = scores[:, shown], scores[:, absent]  # [turns, n], [turns, absent]
        above = (own[:, :, None] > others[:, None]).double() + 0.5 * (own[:, :, None] == others[:, None])
        for turn, values in enumerate(above.mean(2).numpy()):
            # In scene ``turn`` object i lies in cell (i - turn) % n.
            auc[np.arange(n), variant, (np.arange(n) - turn) % n] = values
    return Capacity([names[i] for i in shown], positions, auc)
