"""What the report of a compositional run shows: seen-unseen curves, a state x object grid, the pairs it confuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capt.errors import DamagedFileError, DataError
from capt.evaluation import SeenUnseenCurve
from capt.files import load_tensors, read_json
from capt.report.content import NO_IMAGES, add_images, flatten, results
from capt.report.summary import WORLDS, main_method, method_name, metrics_of, read_summary

if TYPE_CHECKING:
    from capt.data import CompositionalSet

CELL, GAP = 14, 1  # pixels of a cell of the grid, and between cells
LETTER = 7  # pixels a character takes in a label, at most


@dataclass(frozen=True)
class Outcome:
    """One method and seed in one world, on all test images.

    Attributes:
        labels: int64 [N, 2], (state, object) of each image.
        label_seen: bool [N], whether that is a seen pair.
        curve: the exact seen-unseen curve.
        predicted: int64 [N, 2], the pair under the bias of the best harmonic mean.
    """

    labels: Tensor
    label_seen: Tensor
    curve: SeenUnseenCurve
    predicted: Tensor

    @property
    def right(self) -> Tensor:
        """bool [N, 2]: whether the state, and whether the object is right."""
        return self.predicted == self.labels


def read_outcome(file: Path, world: str) -> Outcome:
    """What ``best_pairs.safetensors`` of a run says about a world.

    Raises:
        DataError: there is no such file.
        DamagedFileError: it does not hold that world.
    """
    tensors = load_tensors(file)
    try:
        labels, label_seen, seen, unseen, seen_scores, unseen_scores = (
            tensors[f"{world}_{name}"]
            for name in ("labels", "label_seen", "seen_pairs", "unseen_pairs", "seen_scores", "unseen_scores")
        )
    except KeyError as error:
        raise DamagedFileError(f"'{file}': holds no {error}; fit the run again") from None
    margin = seen_scores.double() - unseen_scores.double()
    # Where there is no candidate of a kind, its score is -inf and its pair means nothing.
    seen, unseen = (
        torch.where((s > -torch.inf)[:, None], p, -1) for s, p in ((seen_scores, seen), (unseen_scores, unseen))
    )
    own = torch.where(label_seen[:, None], seen, unseen)
    curve = SeenUnseenCurve.exact(margin.numpy(), (own == labels).all(1).numpy(), label_seen.numpy())
    predicted = torch.where((margin > curve.best_bias)[:, None], seen, unseen)
    return Outcome(labels, label_seen, curve, predicted)


def gather(
    run: Path, data: CompositionalSet | None, *, n_pairs: int, images_per_pair: int, thumbs: Path
) -> dict[str, Any]:
    """Read a run folder; writes thumbnails of confused test images into ``thumbs``.

    Args:
        run: folder of a finished compositional run.
        data: the data set of the run, for the images; without it the report has none and says so.
        n_pairs: confusions to show at most.
        images_per_pair: images of each at most.
        thumbs: folder for the images.
    """
    summary, record = read_summary(run), read_json(run / "run.json")
    worlds = [world for world in WORLDS if f"{world}_auc" in metrics_of(summary)]
    seeds = [str(seed) for seed in summary["seeds"]]
    outcomes = {
        world: {
            method: [read_outcome(run / f"seed-{seed}" / method / "best_pairs.safetensors", world) for seed in seeds]
            for method in summary["methods"]
        }
        for world in worlds
    }
    names = _names(run, summary)
    main = outcomes[worlds[0]]
    pairs = pair_accuracies(main, names)
    confusions = _confusions(main, main_method(summary), names, n_pairs)
    add_images(confusions, None if data is None else data.test, images_per_pair, thumbs)
    return {
        **results(summary),
        "world": worlds[0],
        "released": any(one.get("profile") == "released" for one in record.get("models", {}).values()),
        "main": method_name(main_method(summary)),
        "curves": [curve_figure(outcomes[world], world, seeds) for world in worlds],
        "mistakes": [_mistakes(method, found) for method, found in main.items()],
        "further": _further(summary, worlds),
        "pairs": pairs,
        "grid": grid_figure(pairs, main_method(summary), len(seeds)),
        "confusions": confusions,
        "notice": "" if data is not None else NO_IMAGES,
        "record": flatten(record),
        "summary": summary,
    }  # fmt: skip


def tables(shown: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows of the files that only this kind of report has."""
    header = ["state", "object", "seen", "images", *(f"right: {method['key']}" for method in shown["methods"])]
    rows = [
        [pair["state"], pair["object"], int(pair["seen"]), pair["images"], *pair["right"].values()]
        for pair in shown["pairs"]
    ]
    return {"pairs.csv": (header, rows)}


def _names(run: Path, summary: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """States and objects, as the trained models list them."""
    for state in sorted(run.glob(f"seed-{summary['seeds'][0]}/*/state.json")):
        record = read_json(state)
        return record["states"], record["objects"]
    raise DataError(f"'{run}': no trained model there; expected the folder of 'capt fit msci' or 'capt fit csp'")


# ---- curves ------------------------------------------------------------------------------------------------------


def curve_figure(outcomes: Mapping[str, Sequence[Outcome]], world: str, seeds: Sequence[str]) -> dict[str, Any]:
    """Coordinates of the seen-unseen curves of one world: a line for each method and seed, a dot at its best HM."""
    width, height, left, right, bottom = 460, 400, 46, 14, 42
    top = 34 + 18 * len(outcomes)
    curves = [outcome.curve for found in outcomes.values() for outcome in found]
    x_end, y_end = (_up(max(getattr(curve, best) for curve in curves)) for best in ("best_unseen", "best_seen"))

    def x(value: float) -> float:
        return float(round(left + (width - left - right) * value / x_end, 1))

    def y(value: float) -> float:
        return float(round(height - bottom - (height - bottom - top) * value / y_end, 1))

    lines = []
    for number, (method, found) in enumerate(outcomes.items()):
        # Without training every seed gives the same.
        shown = found[:1] if method == "zero_shot" else found
        for outcome, seed in zip(shown, seeds, strict=False):
            curve, best = outcome.curve, outcome.curve.harmonic_means.argmax()
            points = zip(curve.unseen_accuracy.tolist(), curve.seen_accuracy.tolist(), strict=True)
            lines.append(
                {
                    "series": number % 4,
                    "dashed": number >= 4,
                    "path": "M" + " L".join(dict.fromkeys(f"{x(unseen)} {y(seen)}" for unseen, seen in points)),
                    "dot": [x(float(curve.unseen_accuracy[best])), y(float(curve.seen_accuracy[best]))],
                    "label": f"{method_name(method)}, seed {seed}: best HM {100 * curve.best_hm:.1f} at seen "
                    f"{100 * curve.seen_accuracy[best]:.1f} and unseen {100 * curve.unseen_accuracy[best]:.1f}",
                }
            )
    legend = [
        {
            "y": 30 + 18 * number,
            "series": number % 4,
            "dashed": number >= 4,
            "text": f"{method_name(method)}: AUC {_mean(found, 'auc')}, best HM {_mean(found, 'best_hm')}",
        }
        for number, (method, found) in enumerate(outcomes.items())
    ]
    return {
        "title": f"{world.capitalize()} world", "width": width, "height": height, "left": left, "top": top,
        "right": width - right, "bottom": height - bottom, "lines": lines, "legend": legend,
        "x_ticks": [{"at": x(value), "label": f"{100 * value:.0f}"} for value in _ticks(x_end)],
        "y_ticks": [{"at": y(value), "label": f"{100 * value:.0f}"} for value in _ticks(y_end)],
    }  # fmt: skip


def _up(value: float) -> float:
    """The next tenth, at least one."""
    return max(0.1, -((-value * 10) // 1) / 10)


def _ticks(end: float) -> list[float]:
    step = 0.1 if end <= 0.5 else 0.2
    return [step * number for number in range(int(end / step + 1e-9) + 1)]


def _mean(found: Sequence[Outcome], metric: str) -> str:
    return f"{100 * sum(getattr(outcome.curve, metric) for outcome in found) / len(found):.1f}"


# ---- pairs -------------------------------------------------------------------------------------------------------


def pair_accuracies(
    outcomes: Mapping[str, Sequence[Outcome]], names: tuple[Sequence[str], Sequence[str]]
) -> list[dict[str, Any]]:
    """Every pair with test images: their number, and of each method how many are right, as mean over its seeds."""
    one = next(iter(outcomes.values()))[0]
    labels, where, images = one.labels.unique(dim=0, return_inverse=True, return_counts=True)
    seen = torch.zeros(len(labels), dtype=torch.bool).index_put_((where,), one.label_seen)
    right = {
        method: sum(where[outcome.right.all(1)].bincount(minlength=len(labels)) for outcome in found) / len(found)
        for method, found in outcomes.items()
    }
    return [
        {
            "state": names[0][state],
            "object": names[1][object_],
            "seen": bool(seen[row]),
            "images": int(images[row]),
            "right": {method: round(float(counts[row]), 2) for method, counts in right.items()},
        }
        for row, (state, object_) in enumerate(labels.tolist())
    ]


def grid_figure(pairs: Sequence[Mapping[str, Any]], method: str, n_seeds: int) -> dict[str, Any]:
    """Coordinates of the grid of ``method``: states as rows, objects as columns, a cell for each pair with images."""
    states, objects = (sorted({pair[kind] for pair in pairs}) for kind in ("state", "object"))
    step = CELL + GAP
    left, top = (round(LETTER * max(map(len, names)) + 10) for names in (states, objects))
    rows, columns = ({name: place for place, name in enumerate(names)} for names in (states, objects))
    cells = []
    for pair in pairs:
        right, images = pair["right"][method], pair["images"]
        others = ", ".join(f"{method_name(name)} {count:g}" for name, count in pair["right"].items())
        cells.append(
            {
                "x": left + step * columns[pair["object"]],
                "y": top + step * rows[pair["state"]],
                "accuracy": round(right / images, 3),
                "seen": pair["seen"],
                "label": f"{pair['state']} {pair['object']}{'' if pair['seen'] else ' (unseen)'}: right of {images} "
                f"image{'' if images == 1 else 's'}{' (mean over the seeds)' if n_seeds > 1 else ''}: {others}",
            }
        )
    return {
        "width": left + step * len(objects), "height": top + step * len(states), "cell": CELL, "cells": cells,
        "left": left, "top": top,
        "rows": [{"at": top + step * place + CELL / 2, "label": name} for name, place in rows.items()],
        "columns": [{"at": left + step * place + CELL / 2, "label": name} for name, place in columns.items()],
    }  # fmt: skip


def _mistakes(method: str, found: Sequence[Outcome]) -> dict[str, Any]:
    """How the predictions of a method split, in percent of the test images, as mean over its seeds."""
    right = torch.stack([outcome.right for outcome in found]).flatten(0, 1)
    state, object_ = right[:, 0], right[:, 1]
    parts = (state & object_, ~state & object_, state & ~object_, ~state & ~object_)
    return {"method": method_name(method), "cells": [f"{100 * part.double().mean():.1f}" for part in parts]}


def _further(summary: Mapping[str, Any], worlds: Sequence[str]) -> dict[str, Any]:
    """Numbers of the summary that the result table has no room for, in percent unless they are thresholds."""
    columns = {
        f"{world}_{key}": f"{world.capitalize()} {name}" for world in worlds
        for key, name in (("accuracy_pair", "pair"), ("accuracy_state", "state"), ("accuracy_object", "object"),
                          ("best_hm_grid", "grid HM"), ("auc_grid", "grid AUC"), ("kept", "pairs kept"),
                          ("threshold", "threshold"))
        if any(f"{world}_{key}" in results["mean"] for results in summary["methods"].values())
    }  # fmt: skip

    def cell(mean: Mapping[str, float], key: str) -> str:
        if key not in mean:
            return "-"
        return f"{mean[key]:.3f}" if key.endswith("threshold") else f"{100 * mean[key]:.1f}"

    rows = [
        {"method": method_name(method), "cells": [cell(found["mean"], key) for key in columns]}
        for method, found in summary["methods"].items()
    ]
    return {"columns": list(columns.values()), "rows": rows}


def _confusions(
    outcomes: Mapping[str, Sequence[Outcome]], ours: str, names: tuple[Sequence[str], Sequence[str]], n_pairs: int
) -> list[dict[str, Any]]:
    """The (true, predicted) pairs that a method exchanges most often, first seed, with the counts of all methods."""
    counts = {method: _exchanged(found[0]) for method, found in outcomes.items()}
    one = outcomes[ours][0]
    seen = {tuple(label): bool(flag) for label, flag in zip(one.labels.tolist(), one.label_seen, strict=True)}
    entries = []
    for (true, predicted), _ in sorted(counts[ours].items(), key=lambda item: (-item[1], item[0]))[:n_pairs]:
        wrong = [kind for kind, a, b in zip(("state", "object"), true, predicted, strict=True) if a != b]
        here = (one.labels == torch.tensor(true)).all(1) & (one.predicted == torch.tensor(predicted)).all(1)
        entries.append(
            {
                "true": _pair_name(true, names),
                "predicted": _pair_name(predicted, names),
                "seen": seen[true],
                "wrong": " and ".join(wrong),
                "counts": {method: found[true, predicted] for method, found in counts.items()},
                "positions": here.nonzero().flatten().tolist(),
            }
        )
    return entries


def _exchanged(outcome: Outcome) -> Counter[tuple[tuple[int, int], tuple[int, int]]]:
    wrong = ~outcome.right.all(1)
    pairs = zip(outcome.labels[wrong].tolist(), outcome.predicted[wrong].tolist(), strict=True)
    return Counter(((true[0], true[1]), (predicted[0], predicted[1])) for true, predicted in pairs)


def _pair_name(pair: tuple[int, int], names: tuple[Sequence[str], Sequence[str]]) -> str:
    return "no candidate" if -1 in pair else f"{names[0][pair[0]]} {names[1][pair[1]]}"
