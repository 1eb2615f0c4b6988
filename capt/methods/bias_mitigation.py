"""Choosing a training-free change of the last aggregation on some objects and testing it on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from capt.backbones import Backbone
from capt.data.position_grid import PositionGrid, Scene
from capt.errors import DataError
from capt.evaluation.position_results import Positions
from capt.evaluation.position_statistics import Interval, bootstrap, sign_flip_test
from capt.evaluation.whats_up import four_captions
from capt.methods.bias_members import Member, family, inverted, save_member, shuffled
from capt.modules.attention_statistics import entropy
from capt.modules.key_groups import RegionGroups
from capt.modules.patch_pooling import PatchPooling
from capt.modules.pooling_replacements import crop_features, late_interaction, region_features
from capt.modules.pooling_stages import oracle, patch_mask, value_tokens
from capt.modules.redistributed_row import attention_prior, mixed_values, redistributed_rows
from capt.modules.redistribution import RegionBoost
from capt.modules.visual_prompts import MARKERS, marked_normalised

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

#: Accuracy on centered objects that a member may cost on the calibration objects.
CLEAN_COST = 0.01
#: Least entropy of the pooling row, of that of an even one.
LEAST_ENTROPY = 0.25
PLAIN = "as it is"
#: Scores that no backbone can carry, since they are no cosine with one feature.
SCORES = ("late interaction over patches", "best of 3 x 3 regions and the whole")
_RANDOM_GROUPS = 3
_LOOKED_AT = 4  # objects whose rows have their entropy taken


class Outcome(NamedTuple):
    """What rows of members (M) do on objects (K) and disjoint pairs of them (K // 2); P positions.

    Attributes:
        lone: float64 [M, K, P], share of the variants in which a lone object is named among the K names.
        both: float64 [M, K // 2, P - 1], share in which both objects of a pair are found, one of them in the middle.
        entropy: float64 [M], of the pooling row on centered objects; NaN where there is no row.
    """

    lone: FloatArray
    both: FloatArray
    entropy: FloatArray

    def off(self, positions: Positions) -> FloatArray:
        """Off-center accuracy of each pair of objects, [M, K // 2]: mean of lone objects' and of the pair's."""
        lone = self.lone[:, :, ~positions.center].mean(2)
        n_pairs = self.both.shape[1]
        off: FloatArray = 0.5 * (lone[:, : 2 * n_pairs].reshape(len(lone), n_pairs, 2).mean(2) + self.both.mean(2))
        return off

    def clean(self, positions: Positions) -> FloatArray:
        """Accuracy of lone objects in the center, [M, K]."""
        return np.asarray(self.lone[:, :, positions.center].mean(2))


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
            f"{100 * off.after:.1f} % ({_points(off.gain)} points, p {off.p:.3g}), centered accuracy from "
            f"{100 * clean.before:.1f} % to {100 * clean.after:.1f} % ({_points(clean.gain)} points)."
        ]
        if self.chosen is None:
            found.append(
                "A gain on held-out objects is not shown, so no member of the family is said to help: the model is "
                "left as it is."
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
        """Store the chosen change for :func:`capt.methods.bias_members.load_member`."""
        save_member(Path(folder), self.chosen, self.plain, opened_with or {"model": self.plain.name})


def _points(gain: Interval) -> str:
    return f"{100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def mitigate_center_bias(
    backbone: Backbone,
    grid: PositionGrid,
    *,
    members: Sequence[Member] | None = None,
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
    the calibration objects is taken, if it is above that of the plain model; of equal ones the weaker. On the held-out
    objects, which share no picture and no name with the others, its gain is tested once, over pairs of objects.

    Args:
        backbone: the model, left as it is.
        grid: objects (at least 8), positions and grounds.
        members: what to choose from; :func:`capt.methods.bias_members.family` by default.
        center_radius, caption: as in :func:`capt.evaluation.center_bias.measure_center_bias`.
        level: of the test on held-out objects.
        region_objects: held-out objects on which visual prompts, crops and region boosts are tried, which know the
            region or take several passes; 0: none.
        progress: called with what is done, how far, of how many.

    Raises:
        CaptError: a pooling that cannot be taken apart.
        DataError: fewer than 8 objects.
    """
    n = len(grid.cutouts)
    if n < 8:
        raise DataError(f"cutouts: found {n} objects, expected at least 8: half of them choose, the others test")
    tell = progress or (lambda *_: None)
    order = np.random.default_rng(grid.seed).permutation(n).tolist()
    halves = [replace(grid, cutouts=grid.cutouts.choose(part)) for part in (order[: n // 2], order[n // 2 :])]
    positions = Positions.of(grid.grid, center_radius)
    trials = [_Trial(backbone, half, caption, positions) for half in halves]
    every = list(members) if members is not None else family(trials[0].pooling, trials[0].prior())
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


class _Trial:
    """Members on one set of objects; what enters the last aggregation is computed once for all of them."""

    def __init__(self, backbone: Backbone, grid: PositionGrid, caption: str, positions: Positions) -> None:
        self.backbone, self.grid, self.positions = backbone, grid, positions
        self.pooling = backbone.tower.pooling()
        self.names = grid.cutouts.names
        self.texts = backbone.text_features([caption.replace("{}", name) for name in self.names])

    def images(self, scenes: Sequence[Scene]) -> Tensor:
        return self.grid.tensor(scenes).to(device=self.backbone.device, dtype=self.backbone.dtype)

    @torch.no_grad()
    def prior(self) -> Tensor:
        """Attention on blank pictures, [H, N]."""
        blanks = [self.grid.single(thing, v)[0] for thing in range(4) for v in range(self.grid.variants)]
        return attention_prior(self.pooling, self.pooling.inputs(self.images(blanks)))

    @torch.no_grad()
    def outcome(self, members: Sequence[Member], what: str, tell: Progress) -> Outcome:
        """Rows: the plain model, the members, the scores that are no features."""
        k, v, p = len(self.names), self.grid.variants, self.grid.cells**2
        lone = np.zeros((1 + len(members) + len(SCORES), k, p))
        both = np.zeros((len(lone), k // 2, p - 1))
        entropies = []
        for thing in range(k):
            tell(what, thing, k + k // 2)
            for variant in range(v):
                inputs = self.pooling.inputs(self.images(self.grid.single(thing, variant)[1:]))
                for row, scores in enumerate(self._scores(inputs, members, self.texts)):
                    lone[row, thing] += (scores.argmax(-1) == thing).double().cpu().numpy() / v
                if variant == 0 and thing < _LOOKED_AT:
                    entropies.append(self._entropies(inputs[self.positions.middle :][:1], members))
        for pair in range(k // 2):
            tell(what, k + pair, k + k // 2)
            for central, peripheral in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
                names = [self.names[peripheral], self.names[central]]
                texts = self.backbone.text_features([*four_captions(*names), f"a {names[1]} and a {names[0]}"])
                for variant in range(v):
                    scenes = self.grid.pair(central, peripheral, variant)[: p - 1]
                    inputs = self.pooling.inputs(self.images(scenes))
                    for row, scores in enumerate(self._scores(inputs, members, texts)):
                        for first in (0, 4):
                            choice = scores[:, [first, 1, 2, 3]].argmax(-1)
                            both[row, pair] += (choice == 0).double().cpu().numpy() / (4 * v)
        return Outcome(lone, both, np.append(np.mean(entropies, 0), [np.nan] * len(SCORES)))

    def _scores(self, inputs: Tensor, members: Sequence[Member], texts: Tensor) -> Iterable[Tensor]:
        """Cosines [B, C] of every row with unit-norm texts [C, d]."""
        done = self.pooling.tower.advance(inputs, start=self.pooling.depth)
        features: list[Tensor | None] = [None] * len(members)
        for groups in dict.fromkeys(one.groups for one in members):
            at = [i for i, one in enumerate(members) if one.groups == groups and not _is_pooling(one)]
            if at:
                rules: list[Any] = [members[i].change for i in at]
                mixed = self.pooling.features(mixed_values(self.pooling, inputs, rules, groups), inputs)
                for i, found in zip(at, mixed, strict=True):
                    features[i] = found
        yield self._cosines(self.pooling.tower.project(done), texts)
        for member, found in zip(members, features, strict=True):
            change: Any = member.change
            yield self._cosines(change.features(self.pooling.tower, done) if found is None else found, texts)
        yield late_interaction(value_tokens(self.pooling, inputs).float(), texts.float())
        cells = min(3, *self.pooling.grid)
        yield self._cosines(region_features(self.pooling, inputs, cells), texts).amax(1)

    def _cosines(self, features: Tensor, texts: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1) @ texts.float().T

    def _entropies(self, inputs: Tensor, members: Sequence[Member]) -> FloatArray:
        """Entropy of the row of one picture under the plain model and each member, [1 + M]."""
        scores, n = self.pooling.scores(inputs), self.pooling.n_patches
        found = [scores.softmax(-1)]
        for one in members:
            change: Any = one.change
            groups = one.groups.of(self.pooling.grid, scores.shape[-1], inputs)
            row = None if _is_pooling(one) else redistributed_rows(scores, [change], groups, self.pooling.grid)[0]
            found.append(torch.full_like(scores, torch.nan) if row is None else row)
        rows = torch.stack(found)[..., -n:].double()
        values: FloatArray = entropy(rows / rows.sum(-1, keepdim=True)).mean((1, 2)).cpu().numpy()
        return values

    # --- what knows the region, or takes several passes ----------------------------------------------

    @torch.no_grad()
    def regions(self, n: int, tell: Progress) -> list[dict[str, Any]]:
        """Naming accuracy of lone objects, first variant, center and off-center; marks with their controls."""
        hits: dict[str, list[FloatArray]] = {}
        moved = []
        n = min(n, len(self.names))
        for thing in range(n):
            tell("visual prompts", thing, n)
            blank, *scenes = self.grid.single(thing, 0)
            images = self.images(scenes)
            boxes = torch.tensor([_box(scene) for scene in scenes]).to(images)
            for name, features in self._marked(images, boxes, scenes).items():
                scores = self._cosines(features, self.texts)
                scores = scores.amax(1) if scores.ndim == 3 else scores
                hits.setdefault(name, []).append((scores.argmax(-1) == thing).double().cpu().numpy())
            empty = self.images([blank])
            marks = self._mark(empty.expand(len(boxes), -1, -1, -1), boxes, "circle")
            plain, with_mark = (F.normalize(self.backbone.image_features(x).float(), dim=-1) for x in (empty, marks))
            moved.append(float((with_mark - plain).norm(dim=-1).mean()))
        center = self.positions.center
        means = {name: np.mean(found, 0) for name, found in hits.items()}
        rows: list[dict[str, Any]] = [
            {"name": name, "clean": float(found[center].mean()), "off": float(found[~center].mean())}
            for name, found in means.items()
        ]
        return [*rows, {"name": "circle on an empty picture moves the feature by", "distance": float(np.mean(moved))}]

    def _marked(self, images: Tensor, boxes: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Features of the pictures as they are, with every mark on the object, and of the controls."""
        encode = self.backbone.image_features
        found = {PLAIN: encode(images)}
        for marker in MARKERS:
            found[f"{marker}{'' if marker == 'frame' else ' on the object'}"] = encode(
                self._mark(images, boxes, marker)
            )
        middle = boxes[self.positions.middle].expand_as(boxes)
        found["control: circle in the middle"] = encode(self._mark(images, middle, "circle"))
        # The mirrored cell is empty; the middle one's is itself, which a corner stands in for.
        elsewhere = boxes.flip(0).clone()
        elsewhere[self.positions.middle] = boxes[0]
        found["control: circle in an empty cell"] = encode(self._mark(images, elsewhere, "circle"))
        masks = patch_mask(torch.stack([self.grid.opacity(scene)[0] for scene in scenes]), self.pooling.grid)
        inputs = self.pooling.inputs(images)
        groups = RegionGroups(masks.to(inputs.device))
        boosted = mixed_values(self.pooling, inputs, [RegionBoost()], groups)[0]
        found["region boost of 100 on the object"] = self.pooling.features(boosted, inputs)
        found["only the object's patches"] = oracle(self.pooling, inputs, masks.to(inputs.device))
        found["best of five crops"] = crop_features(self.backbone, images)
        return found

    def _mark(self, images: Tensor, boxes: Tensor, marker: Any) -> Tensor:
        return marked_normalised(images, boxes, marker, self.grid.mean, self.grid.std)


def _is_pooling(member: Member) -> bool:
    return isinstance(member.change, PatchPooling)


def _box(scene: Scene) -> tuple[int, int, int, int]:
    one = scene.pasted[0]
    return one.left, one.top, one.left + one.side, one.top + one.side
