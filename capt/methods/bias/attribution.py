"""What carries an object as it moves outwards: attention, concepts, blocks and heads, by its distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from capt.data.cutouts import emoji_names
from capt.errors import CaptError
from capt.evaluation.concept_survival import concept_scores, sparse_present
from capt.evaluation.position_results import Positions
from capt.methods.bias.head_effects import LAST_BLOCKS, HeadEffects, center_and_off
from capt.modules.attention_rollout import attention_rollout
from capt.modules.attention_statistics import (
    AttentionRows,
    attention_rows,
    center_ratio,
    object_gain,
    position_share,
)
from capt.modules.direct_effects import DirectEffects, direct_effects, object_share
from capt.modules.pooling_stages import even_row, oracle, row_by_block
from capt.modules.sparse_concepts import SparseConcepts

if TYPE_CHECKING:
    from capt.methods.bias.stages import FloatArray, Progress, StageReader

#: Objects that are followed, each in every cell on the first ground: enough for means, few enough to be quick.
LOOKED_AT = 8
#: Lambda of the sparse concepts, the lower end of what is usual: about 5 concepts a feature of embedded-vit.
PENALTY = 0.15
#: An object counts as present among so many largest weights.
MOST = 10
_SHOWN = 5  # concepts of an example
SPARSE_STAGES = ("even", "oracle", "final")
_ROUNDING = 1e-5  # of single precision: below it nothing differs

# Sources: those of the modules that are used. What is averaged, and the constants: ours.


@dataclass(frozen=True, eq=False)
class Attribution:
    """Statistics of a few objects in every cell, JSON-able; "rings" are means by distance of the object.

    Attributes:
        attention: of the pooling row by layer and head; "views": gain of the object's patches (rings) and center ratio
            of the last layer's weights, "raw", "value_weighted", "without_sinks", and of the "rollout".
        effects: direct effects of the object's patches by layer; a text says why there are none.
        concepts: of the sparse decomposition of the stages "even", "oracle" and "final": how often the object is among
            the largest weights (rings), and how often a name is that is not shown.
        layers: how often the object is among the best names if the class token were projected after each block; a text
            for other poolings.
        heads: share of the object in each head's effect, heads in which it falls fastest with distance, texts that
            span them, margin without what they write; a text says why there are none.
    """

    attention: dict[str, Any]
    effects: dict[str, Any] | str
    concepts: dict[str, Any]
    layers: dict[str, Any] | str
    heads: dict[str, Any] | str

    def words(self) -> list[str]:
        """At most two sentences."""
        stages, found = self.concepts["stages"], []
        part = {
            stage: f"{100 * stages[stage]['center']:.0f} % and {100 * stages[stage]['off']:.0f} %"
            for stage in ("oracle", "final")
        }
        found.append(
            f"As sparse sums of {self.concepts['dictionary']} names, {self.concepts['objects']} objects, center and "
            f"off-center: the object is in {part['oracle']} of what its own patches give and in {part['final']} of the "
            f"features (names that are not shown: {100 * stages['final']['not_shown']:.0f} %)."
        )
        if not isinstance(self.heads, str) and (first := next(iter(self.heads["location"]), None)):
            margins = self.heads["margins"]
            center, off = (margins["ablated"][side] - margins["whole"][side] for side in ("center", "off"))
            found.append(
                f"The object's part of what a head writes about it falls fastest with distance in {first['name']} "
                f"({first['slope']:+.2f} from middle to edge, for {first['objects_falling']} of {first['objects']} "
                f"objects, not tested); with means in place of what {len(self.heads['location'])} such heads "
                f"write, its margin changes by {center:+.4f} in the center and {off:+.4f} off-center."
            )
        return found

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "attention": self.attention, "direct_effects": self.effects, "concepts": self.concepts,
            "layers": self.layers, "heads": self.heads,
        }  # fmt: skip


class _Weights(NamedTuple):
    """Of the attention of one object's pictures: ratios [layers, H], gains [P] and ratios by view, its middle row."""

    ratios: Tensor
    gains: dict[str, FloatArray]
    center: dict[str, float]
    row: Tensor
    sinks: float


class _Effects(NamedTuple):
    """Direct effects of one object's pictures: share [P], by layer [P, layers]; of the last M blocks each head's share
    [P, M, H] and effect [P, M, H, E]; feature [P, E]."""

    share: FloatArray
    layers: FloatArray
    shares: Tensor
    heads: Tensor
    feature: Tensor


class _Seen(NamedTuple):
    """One object in every cell: all that is kept of it."""

    area: float
    weights: _Weights
    no_rollout: str
    effects: _Effects | str
    vectors: dict[str, Tensor]
    rows: Tensor | None


@torch.no_grad()
def attribute(
    reader: StageReader, positions: Positions, caption: str, best: int, n: int, tell: Progress
) -> Attribution:
    """Follow the first ``n`` objects of a grid, each in every cell, with one pass of the tower for all that is read.

    Args:
        reader: model, grid and texts of the names.
        positions: of the cells.
        caption: text of a name.
        best: an object counts as present among so many best names, layer by layer.
        n: how many objects; as many as there are, if fewer.
        tell: progress.
    """
    seen = []
    for thing in range(min(n, len(reader.texts))):
        tell("attention, concepts and heads", thing, min(n, len(reader.texts)))
        seen.append(_look(reader, thing))
    run = _Run(reader, positions, caption, best, seen)
    return Attribution(run.attention(), run.effects(), run.concepts(), run.layers(), run.heads())


# ---- one object ------------------------------------------------------------------------------------------------------


def _look(reader: StageReader, thing: int) -> _Seen:
    pooling, tower = reader.pooling, reader.pooling.tower
    scenes = next(reader.variants(thing))
    images, masks = reader.images(scenes), reader.masks(scenes)
    stream = list(tower.stream(images))
    rows = attention_rows(pooling, images, stream)
    views = {"raw": rows.patches, "value_weighted": rows.value_weighted(), "without_sinks": rows.without_sinks()}
    views = {name: view[:, -1] for name, view in views.items()}
    why = ""
    try:
        views["rollout"] = attention_rollout(pooling, images, stream=stream)[:, None]
    except CaptError as error:
        why = str(error)
    effects: _Effects | str
    try:
        effects = _effects(direct_effects(pooling, images, stream), reader.texts[thing : thing + 1], masks)
    except CaptError as error:
        effects = str(error)
    inputs = stream[pooling.depth]
    vectors = {
        "even": even_row(pooling, inputs), "oracle": oracle(pooling, inputs, masks), "final": tower.project(stream[-1]),
    }  # fmt: skip
    by_block = row_by_block(tower, images, stream).float() if pooling.kind == "class token" else None
    return _Seen(
        float(masks.float().mean()), _weights(reader, rows, views, masks), why, effects,
        {stage: found.float() for stage, found in vectors.items()}, by_block,
    )  # fmt: skip


def _weights(reader: StageReader, rows: AttentionRows, views: dict[str, Tensor], masks: Tensor) -> _Weights:
    grid = reader.pooling.grid
    return _Weights(
        center_ratio(rows.patches, grid).mean(0),
        {name: _array(object_gain(view, masks).mean(1)) for name, view in views.items()},
        {name: float(center_ratio(_unit_mass(view), grid).mean()) for name, view in views.items()},
        rows.patches[reader.grid.middle].mean(1)[-1],
        float(rows.sink_mass()[:, -1].mean()),
    )


def _effects(effects: DirectEffects, text: Tensor, masks: Tensor) -> _Effects:
    scores = effects.concept_scores(text.to(effects.row.dtype))
    patches = scores[..., -masks.shape[1] :, 0]
    own = patches * masks[:, None, None]
    feature = effects.total()
    last = patches[:, -LAST_BLOCKS:].abs()
    shares = (last * masks[:, None, None]).sum(-1) / last.sum(-1).clamp_min(1e-30)
    heads = replace(effects, layers=effects.layers[-LAST_BLOCKS:]).heads()
    return _Effects(
        _array(object_share(scores, masks)[:, 0]),
        _array(own.sum((2, 3)) / feature.norm(dim=-1)[:, None]),
        shares.double().cpu(), heads.float().cpu(), feature.float().cpu(),
    )  # fmt: skip


# ---- all objects -----------------------------------------------------------------------------------------------------


class _Run:
    """Reduces what was seen of n objects."""

    def __init__(
        self, reader: StageReader, positions: Positions, caption: str, best: int, seen: Sequence[_Seen]
    ) -> None:
        self.reader, self.positions, self.caption, self.best, self.seen = reader, positions, caption, best, seen
        self.names = reader.grid.cutouts.names
        self.center = torch.from_numpy(positions.center)

    def attention(self) -> dict[str, Any]:
        pooling, found = self.reader.pooling, [one.weights for one in self.seen]
        ratio = torch.stack([one.ratios for one in found]).mean(0).double().cpu()
        gains = {name: np.mean([one.gains[name] for one in found], 0) for name in found[0].gains}
        views: dict[str, Any] = {
            name: {
                "center_ratio": float(np.mean([one.center[name] for one in found])),
                "object_gain": self.positions.rings(gain),
            }
            for name, gain in gains.items()
        }
        blank = attention_rows(pooling, self.reader.images(self.reader.blanks()))
        return {
            "kind": pooling.kind,
            "center_ratio_by_layer": ratio.mean(1).tolist(),
            "center_ratio_by_head": ratio[-1].tolist(),
            "center_ratio_of_blank_pictures": float(center_ratio(blank.patches, pooling.grid)[:, -1].mean()),
            "position_share": _position_share([one.row for one in found]),
            "sink_mass": float(np.mean([one.sinks for one in found])),
            "object_gain_map": self.positions.as_map(gains["raw"]),
            "views": views | ({} if "rollout" in views else {"rollout": self.seen[0].no_rollout}),
        }

    def effects(self) -> dict[str, Any] | str:
        found = [one.effects for one in self.seen]
        effects = [one for one in found if not isinstance(one, str)]
        if len(effects) < len(found):
            return next(one for one in found if isinstance(one, str))
        by_layer, center = np.mean([one.layers for one in effects], 0), self.positions.center
        return {
            "object_share": self.positions.rings(np.mean([one.share for one in effects], 0)),
            "by_layer_center": by_layer[center].mean(0).tolist(),
            "by_layer_off": by_layer[~center].mean(0).tolist(),
        }

    def concepts(self) -> dict[str, Any]:
        """Decompositions of each stage on its own mean, and what they name in the feature of the first objects."""
        known = [*self.names, *(name for name in emoji_names() if name not in self.names)]
        others = self._texts([self.caption.replace("{}", name) for name in known[len(self.names) :]])
        texts = torch.cat([self.reader.texts, others]).float()
        record = {}
        for stage in SPARSE_STAGES:
            vectors = torch.stack([one.vectors[stage] for one in self.seen])  # [n, P, E]
            concepts = SparseConcepts(texts, F.normalize(vectors, dim=-1).mean((0, 1)), known)
            away = (F.normalize(vectors, dim=-1) - concepts.image_mean).norm(dim=-1, keepdim=True)
            weights = concepts.decompose(vectors, PENALTY) * (away > _ROUNDING)
            own, absent = self._own_and_absent(self._named(weights))
            record[stage] = {
                **center_and_off(own.mean(0), self.center),
                "present": self._rings(own.mean(0)), "chance": self._rings(absent.mean(0)),
                "not_shown": float(absent.mean()),
                "concepts": float((weights > 0).sum(-1).float().mean()),
                "quality": float(concepts.quality(vectors, weights).mean()),
            }  # fmt: skip
        corner = int(self.positions.radius.argmax())
        examples = [
            {"object": name, "where": where, "concepts": concepts.described(weights[thing, cell], _SHOWN)}
            for thing, name in enumerate(self.names[:2])
            for where, cell in (("in the middle", self.positions.middle), ("in the corner", corner))
        ]
        return {
            "penalty": PENALTY, "most": MOST, "dictionary": len(known), "objects": len(self.seen), "stages": record,
            "examples": examples,
        }  # fmt: skip

    def layers(self) -> dict[str, Any] | str:
        found = [one.rows for one in self.seen if one.rows is not None]
        if not found:
            return f"no layer by layer: this model pools by {self.reader.pooling.kind}, not by a class token"
        scores = concept_scores(torch.stack(found), self.reader.texts.float())  # [n, P, blocks + 1, K]
        own, absent = self._own_and_absent(scores >= scores.topk(self.best, dim=-1).values[..., -1:])
        return {
            "best": self.best, "objects": len(found),
            "center": own[:, self.center].mean((0, 1)).tolist(), "off": own[:, ~self.center].mean((0, 1)).tolist(),
            "chance": absent.mean((0, 1)).tolist(),
        }  # fmt: skip

    def heads(self) -> dict[str, Any] | str:
        effects = [one.effects for one in self.seen if not isinstance(one.effects, str)]
        if self.reader.pooling.attention is None:
            return "average pooling has no heads"
        if not effects:
            return str(self.seen[0].effects)
        shares, written, features = (
            torch.stack([getattr(one, what) for one in effects]) for what in ("shares", "heads", "feature")
        )
        found = HeadEffects(self.reader, self.positions, shares, written, features)
        return {"area": float(np.mean([one.area for one in self.seen])), **found.record(self.caption)}

    def _named(self, weights: Tensor) -> Tensor:
        """Which names are among the largest of weights [n, P, c], bool [n, P, K]."""
        flat = weights.flatten(0, 1)
        of = (torch.full_like(flat[:, 0], name, dtype=torch.int64) for name in range(len(self.names)))
        found: Tensor = torch.stack([sparse_present(flat, name, MOST) for name in of], -1)
        return found.reshape(*weights.shape[:2], -1)

    def _own_and_absent(self, among: Tensor) -> tuple[Tensor, Tensor]:
        """Of names that are present, bool [n, P, ..., K]: the object's own, and the mean of the others, [n, P, ...]."""
        among = among.double().cpu()
        own = torch.stack([one[..., thing] for thing, one in enumerate(among)])
        return own, (among.sum(-1) - own) / (len(self.names) - 1)

    def _texts(self, texts: list[str]) -> Tensor:
        found: Tensor = self.reader.backbone.text_features(texts).to(self.reader.texts)
        return found

    def _rings(self, values: Tensor) -> list[dict[str, float]]:
        return self.positions.rings(values.numpy())


def _position_share(rows: list[Tensor]) -> float | None:
    if len(rows) < 2:
        return None
    share = float(position_share(torch.stack(rows)[:, None, None]).mean())
    return None if np.isnan(share) else share


def _unit_mass(rows: Tensor) -> Tensor:
    """Rows that sum to 1: those of a rollout leave the prefix out."""
    return rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)


def _array(values: Tensor) -> FloatArray:
    return values.double().cpu().numpy()
