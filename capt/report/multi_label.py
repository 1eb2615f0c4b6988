"""What the report of a multi-label run shows: average precision against training frequency, and confused labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from capt.errors import DamagedFileError
from capt.evaluation import MultiLabelResult
from capt.evaluation.multi_label import GROUPS
from capt.files import load_tensors, read_json
from capt.report.content import NO_IMAGES, add_images, flatten, results
from capt.report.summary import REFERENCE, main_method, method_name, read_summary

if TYPE_CHECKING:
    from capt.data import MultiLabelSet

_LINEAR = ("linear_bce", "linear_asl")
_WAYS = {"half": "probability 0.5", "chosen": "threshold of each class", "top3": "the 3 most probable"}
_RATES = ("OP", "OR", "OF1", "CP", "CR", "CF1")


@dataclass(frozen=True)
class Outcome:
    """One method and seed on all test images.

    Attributes:
        scores: logits float32 [N, C].
        targets: bool [N, C].
        thresholds: float32 [C], least logit of a predicted label.
    """

    scores: Tensor
    targets: Tensor
    thresholds: Tensor

    @property
    def missed(self) -> Tensor:
        """bool [N, C]: labels that are not predicted."""
        return self.targets & (self.scores < self.thresholds)

    @property
    def wrong(self) -> Tensor:
        """bool [N, C]: predicted labels that the image does not have."""
        return ~self.targets & (self.scores >= self.thresholds)


def read_outcome(file: Path) -> Outcome:
    """What ``scores.safetensors`` of a run says.

    Raises:
        DataError: there is no such file.
        DamagedFileError: it does not hold scores, targets and thresholds of one shape.
    """
    tensors = load_tensors(file)
    try:
        scores, targets, thresholds = (tensors[name] for name in ("scores", "targets", "thresholds"))
    except KeyError as error:
        raise DamagedFileError(f"'{file}': holds no {error}; fit the run again") from None
    if scores.dim() != 2 or targets.shape != scores.shape or thresholds.shape != scores.shape[1:]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (scores, targets, thresholds))
        raise DamagedFileError(f"'{file}': scores, targets and thresholds do not fit ({shapes}); fit the run again")
    return Outcome(scores, targets.bool(), thresholds)


def gather(
    run: Path, data: MultiLabelSet | None, *, n_pairs: int, images_per_pair: int, thumbs: Path
) -> dict[str, Any]:
    """Read a run folder; writes thumbnails of test images with confused labels into ``thumbs``.

    Args:
        run: folder of a finished multi-label run.
        data: the data set of the run, for the images; without it the report has none and says so.
        n_pairs: confusions to show at most.
        images_per_pair: images of each at most.
        thumbs: folder for the images.
    """
    summary, record = read_summary(run), read_json(run / "run.json")
    outcomes = {
        method: [read_outcome(run / f"seed-{seed}" / method / "scores.safetensors") for seed in summary["seeds"]]
        for method in summary["methods"]
    }
    try:
        names, frequency = record["classes"], record["frequency"]
        limits = record["options"]["head"], record["options"]["medium"]
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"'{run / 'run.json'}': not the record of a multi-label run ({error!r}); fit it again"
        ) from error
    main, rival = main_method(summary), _rival(summary)
    classes = class_rows(outcomes, names, frequency, limits, main)
    confusions = _confusions(outcomes, main, names, n_pairs)
    add_images(confusions, None if data is None else data.test, images_per_pair, thumbs)
    return {
        **results(summary),
        "main": method_name(main),
        "rival": method_name(rival),
        "limits": limits,
        "figure": frequency_figure(classes, summary, main, rival, limits),
        "classes": classes,
        "excluded": [row["name"] for row in classes if not row["positives"]],
        "further": _further(summary),
        "confusions": confusions,
        "notice": "" if data is not None else NO_IMAGES,
        "record": flatten(record),
        "summary": summary,
    }


def tables(shown: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows of the files that only this kind of report has."""
    methods = [method["key"] for method in shown["methods"]]
    header = ["class", "group", "training images", "test images", *(f"AP: {method}" for method in methods), "threshold"]
    rows = [
        [row["name"], row["group"], row["frequency"], row["positives"],
         *("" if row["ap"][method] is None else f"{100 * row['ap'][method]:.2f}" for method in methods),
         f"{row['threshold']:.4f}"]
        for row in shown["classes"]
    ]  # fmt: skip
    return {"classes.csv": (header, rows)}


def _rival(summary: Mapping[str, Any]) -> str:
    """What the method of a run stands beside in the figure: the better linear classifier, or zero-shot."""
    main, methods = main_method(summary), summary["methods"]
    linear = [method for method in _LINEAR if method in methods and method != main]
    return max(linear, key=lambda method: methods[method]["mean"]["map"], default=REFERENCE)


# ---- classes -----------------------------------------------------------------------------------------------------


def class_rows(
    outcomes: Mapping[str, Sequence[Outcome]], names: Sequence[str], frequency: Sequence[int],
    limits: tuple[int, int], main: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every class, the most frequent first: images, average precision by method as mean over the seeds (None: no test
    image shows it), and the probability that ``main`` asks for in the first seed."""
    found = {
        method: [MultiLabelResult.of(one.scores, one.targets, frequency, thresholds=limits) for one in of_seeds]
        for method, of_seeds in outcomes.items()
    }
    precision = {method: np.mean([one.average_precision for one in of_seeds], 0) for method, of_seeds in found.items()}
    thresholds = outcomes[main][0].thresholds.sigmoid()
    return [
        {
            "name": names[row["class"]],
            "group": row["group"],
            "frequency": row["frequency"],
            "positives": row["positives"],
            "ap": {
                method: round(float(values[row["class"]]), 4) if row["positives"] else None
                for method, values in precision.items()
            },
            "threshold": round(float(thresholds[row["class"]]), 4),
        }
        for row in found[main][0].by_frequency()
    ]


def frequency_figure(
    classes: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], main: str, rival: str, limits: tuple[int, int]
) -> dict[str, Any]:
    """Coordinates of average precision against training frequency: a bar from ``rival`` to ``main`` for each class,
    and the mean of every method over head, medium and tail."""
    methods = list(summary["methods"])
    width, height, left, right, bottom = 900, 470, 46, 14, 42
    top = 36 + 18 * len(methods)
    counted = [row for row in classes if row["positives"]]
    frequencies = [max(row["frequency"], 0.5) for row in counted] or [1.0]
    low, high = math.log(0.75 * min(frequencies)), math.log(1.25 * max(frequencies))

    def x(frequency: float) -> float:
        share = (math.log(max(frequency, 1e-9)) - low) / (high - low)
        return float(round(left + (width - left - right) * min(max(share, 0.0), 1.0), 1))

    def y(value: float) -> float:
        return float(round(height - bottom - (height - bottom - top) * value, 1))

    alike, placed = Counter(row["frequency"] for row in counted), Counter[int]()
    bars = []
    for row in counted:
        # Classes with the same frequency stand side by side.
        number = row["frequency"]
        place = (placed[number] + 0.5) / alike[number] - 0.5
        placed[number] += 1
        values = ", ".join(f"{method_name(method)} {100 * row['ap'][method]:.1f}" for method in methods)
        bars.append(
            {
                "x": x(max(number, 0.5) + 0.8 * place * min(1.0, max(number, 0.5))),
                "main": y(row["ap"][main]),
                "rival": y(row["ap"][rival]),
                "label": f"{row['name']} ({row['group']}): {_images(number, 'training')}, "
                f"{_images(row['positives'], 'test')}; AP {values}",
            }
        )
    edges = [x(high_end) for high_end in (math.inf, *(_edge(limit) for limit in limits), 0)]
    bands = [
        {"x": start, "width": round(end - start, 1), "label": group, "means": _band_means(summary, group, y)}
        for group, start, end in zip(GROUPS, edges[1:], edges, strict=False)
        if any(row["group"] == group for row in counted)
    ]
    ticks = [step * 10**power for power in range(7) for step in (1, 2, 5)]
    legend = [
        {"y": 14 + 18 * number, **_series(number), "dot": method in (main, rival),
         "text": f"{method_name(method)}: mAP {100 * summary['methods'][method]['mean']['map']:.1f}"}
        for number, method in enumerate(methods)
    ]  # fmt: skip
    return {
        "width": width, "height": height, "left": left, "top": top, "right": width - right, "bottom": height - bottom,
        "bars": bars, "bands": bands, "legend": legend,
        "main": methods.index(main) % 4, "rival": methods.index(rival) % 4,
        "x_ticks": [{"at": x(tick), "label": f"{tick:,}"} for tick in ticks if low <= math.log(tick) <= high],
        "y_ticks": [{"at": y(value / 5), "label": str(20 * value)} for value in range(6)],
    }  # fmt: skip


def _edge(limit: int) -> float:
    """Between the last frequency below a limit and the limit, on a logarithmic axis."""
    return math.sqrt(limit * max(limit - 1, 0.5))


def _series(number: int) -> dict[str, Any]:
    return {"series": number % 4, "dashed": number >= 4}


def _band_means(summary: Mapping[str, Any], group: str, y: Any) -> list[dict[str, Any]]:
    means = [(method, found["mean"].get(f"map_{group}")) for method, found in summary["methods"].items()]
    return [
        {"y": y(value), **_series(number), "label": f"{method_name(method)}, {group}: mAP {100 * value:.1f}"}
        for number, (method, value) in enumerate(means)
        if value is not None
    ]


def _images(count: int, what: str) -> str:
    return f"{count:,} {what} image{'' if count == 1 else 's'}"


def _further(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Precision, recall and F1 of predicted labels, in percent, for every way to choose them."""
    rows = []
    for method, found in summary["methods"].items():
        for way, what in _WAYS.items():
            values = (found["mean"].get(f"{rate.lower()}_{way}") for rate in _RATES)
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
            rows.append({"method": method_name(method), "cells": [what, *cells]})
    return {"columns": ["Predicted labels", *_RATES], "rows": rows}


# ---- confusions --------------------------------------------------------------------------------------------------


def _confusions(
    outcomes: Mapping[str, Sequence[Outcome]], main: str, names: Sequence[str], n_pairs: int
) -> list[dict[str, Any]]:
    """The (missed label, wrongly predicted label) pairs that a method has on most images, first seed, with the counts
    of all methods."""
    counts = {method: found[0].missed.float().T @ found[0].wrong.float() for method, found in outcomes.items()}
    ours = outcomes[main][0]
    missed, wrong = ours.missed, ours.wrong
    margin = ours.scores - ours.thresholds
    order = counts[main].flatten().sort(descending=True, stable=True).indices[:n_pairs]
    entries = []
    for true, predicted in (divmod(index, len(names)) for index in order.tolist()):
        if not counts[main][true, predicted]:
            break
        positions = (missed[:, true] & wrong[:, predicted]).nonzero().flatten()
        surest = margin[positions, predicted].sort(descending=True, stable=True).indices
        entries.append(
            {
                "true": names[true],
                "predicted": names[predicted],
                "counts": {method: int(found[true, predicted]) for method, found in counts.items()},
                "positions": positions[surest].tolist(),
            }
        )
    return entries
