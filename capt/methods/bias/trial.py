"""Members of a family of changes, tried on one set of objects from cached inputs of the last aggregation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from capt.backbones import Backbone
from capt.backbones.pooling import plain_pooling
from capt.data.position_grid import PositionGrid, Scene
from capt.evaluation.position_results import Positions
from capt.evaluation.whats_up import four_captions
from capt.methods.bias.members import Member
from capt.modules.attention_statistics import entropy
from capt.modules.crop_pooling import CropPooling
from capt.modules.key_groups import RegionGroups
from capt.modules.patch_pooling import PatchPooling
from capt.modules.pooling_replacements import crop_features, late_interaction, region_features
from capt.modules.pooling_stages import oracle, patch_mask, value_tokens
from capt.modules.redistributed_row import attention_prior, mixed_values, redistributed_rows
from capt.modules.redistribution import Redistribution, RegionBoost
from capt.modules.visual_prompts import MARKERS, marked_normalised

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

PLAIN = "as it is"
#: Scores that no backbone can carry, since they are no cosine with one feature.
SCORES = ("late interaction over patches", "best of 3 x 3 regions and the whole")
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
        both = self.both[:, :, ~positions.center[positions.others]].mean(2)
        off: FloatArray = 0.5 * (lone[:, : 2 * n_pairs].reshape(len(lone), n_pairs, 2).mean(2) + both)
        return off

    def clean(self, positions: Positions) -> FloatArray:
        """Accuracy of lone objects in the center, [M, K]."""
        return np.asarray(self.lone[:, :, positions.center].mean(2))


def cosines(features: Tensor, texts: Tensor) -> Tensor:
    """Cosines [..., C] of features [..., d] with unit-norm texts [C, d], in single precision."""
    return F.normalize(features.float(), dim=-1) @ texts.float().T


class Trial:
    """Members on one set of objects; what enters the last aggregation is computed once for all of them."""

    def __init__(self, backbone: Backbone, grid: PositionGrid, caption: str, positions: Positions) -> None:
        self.backbone, self.grid, self.positions = backbone, grid, positions
        self.pooling = plain_pooling(backbone.tower)
        self.names = grid.cutouts.names
        self.texts = backbone.text_features([caption.replace("{}", name) for name in self.names])

    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """Normalised pictures of scenes on the model's device, [B, 3, height, width]."""
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
                images = self.images(self.grid.single(thing, variant)[1:])
                inputs = self.pooling.inputs(images)
                for row, scores in enumerate(self.scores(images, inputs, members, self.texts)):
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
                    images = self.images(scenes)
                    inputs = self.pooling.inputs(images)
                    for row, scores in enumerate(self.scores(images, inputs, members, texts)):
                        for first in (0, 4):
                            choice = scores[:, [first, 1, 2, 3]].argmax(-1)
                            both[row, pair] += (choice == 0).double().cpu().numpy() / (4 * v)
        return Outcome(lone, both, np.append(np.mean(entropies, 0), [np.nan] * len(SCORES)))

    def scores(self, images: Tensor, inputs: Tensor, members: Sequence[Member], texts: Tensor) -> Iterable[Tensor]:
        """Cosines [B, C] of every row with unit-norm texts [C, d]; ``inputs`` is what enters the pooling of images."""
        done = self.pooling.tower.advance(inputs, start=self.pooling.depth)
        whole = self.pooling.tower.project(done)
        features: dict[int, Tensor] = {}
        for groups in dict.fromkeys(one.groups for one in members):
            at = [i for i, one in enumerate(members) if one.groups == groups and isinstance(one.change, Redistribution)]
            if at:
                rules: list[Any] = [members[i].change for i in at]
                mixed = self.pooling.features(mixed_values(self.pooling, inputs, rules, groups), inputs)
                features |= dict(zip(at, mixed, strict=True))
        crops: dict[tuple[int, float], Tensor] = {}
        for i, one in enumerate(members):
            if isinstance(one.change, PatchPooling):
                features[i] = one.change.features(self.pooling.tower, done)
            elif isinstance(one.change, CropPooling):
                key = one.change.count, one.change.size
                if key not in crops:
                    crops[key] = crop_features(self.backbone, images, *key)
                features[i] = one.change.features(whole, crops[key])
        yield cosines(whole, texts)
        for i in range(len(members)):
            yield cosines(features[i], texts)
        yield late_interaction(value_tokens(self.pooling, inputs).float(), texts.float())
        cells = min(3, *self.pooling.grid)
        yield cosines(region_features(self.pooling, inputs, cells), texts).amax(1)

    def _entropies(self, inputs: Tensor, members: Sequence[Member]) -> FloatArray:
        """Entropy of the row of one picture under the plain model and each member, [1 + M]."""
        scores, n = self.pooling.scores(inputs), self.pooling.n_patches
        found = [scores.softmax(-1)]
        for one in members:
            if isinstance(one.change, Redistribution):
                groups = one.groups.of(self.pooling.grid, scores.shape[-1], inputs)
                found.append(redistributed_rows(scores, [one.change], groups, self.pooling.grid)[0])
            else:
                found.append(torch.full_like(scores, torch.nan))
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
                scores = cosines(features, self.texts)
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


def _box(scene: Scene) -> tuple[int, int, int, int]:
    one = scene.pasted[0]
    return one.left, one.top, one.left + one.side, one.top + one.side
