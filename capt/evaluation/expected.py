"""Published numbers, and whether a run found what it should have found.

The numbers lie in ``capt/assets/expected``, one file a protocol, as they are printed, with their source, a mark
("printed", "second-hand" or "unverified"), the tolerance and where the printed numbers contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from capt.data.readers.coop_layouts import LAYOUTS
from capt.errors import CaptError, DataError
from capt.evaluation.protocols import base_to_novel_table
from capt.files import read_json

Verdict = Literal["within", "above", "below", "not comparable"]

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "expected"
PROTOCOLS = ("base-to-novel", "cross-dataset", "domain-generalisation")
_BACKBONES = frozenset(("vitb16", "vitb16quickgelu", "clipvitbasepatch16", "openaiclipvitbasepatch16"))
_TITLES = {layout.title: name for name, layout in LAYOUTS.items()}


@dataclass(frozen=True)
class Judgement:
    """One metric of one method beside its published number; numbers are fractions in [0, 1].

    Attributes:
        method: row of the run.
        metric: "base", "novel", "hm" or "average".
        found: what was measured.
        expected: the published number; None if there is none.
        tolerance: distance up to which both count as the same.
        verdict: "within", "above" or "below" the tolerance, or "not comparable".
        why: reason why it is not comparable, otherwise "".
        source: where the published number stands.
        mark: "printed", "second-hand" or "unverified"; "" without a number.
        caution: what the published method had that a run may not have had.
    """

    method: str
    metric: str
    found: float
    expected: float | None
    tolerance: float
    verdict: Verdict
    why: str = ""
    source: str = ""
    mark: str = ""
    caution: str = ""


@cache
def expected_numbers(protocol: str) -> dict[str, Any]:
    """The file of one protocol; numbers in percent, as printed. Do not change what is returned.

    Raises:
        CaptError: no numbers are published for this protocol.
    """
    if protocol not in PROTOCOLS:
        raise CaptError(f"protocol: found {protocol!r}; published numbers exist for {', '.join(PROTOCOLS)}")
    numbers: dict[str, Any] = read_json(FOLDER / f"{protocol.replace('-', '_')}.json")
    return numbers


def expected_metrics(protocol: str, dataset: str, method: str) -> dict[str, float]:
    """What a method should reach, by metric, as fractions; empty if nothing is published.

    Of base-to-novel the harmonic mean is that of the printed base and novel accuracies, not the printed one, and
    "average" is recomputed from the cells where there are cells.

    Args:
        protocol: "base-to-novel", "cross-dataset" or "domain-generalisation"; any other has no numbers.
        dataset: name of a data set for ``coop:``, its title in papers, or "average".
        method: row of a run: "capt", "coop", "promptkd", "zero_shot" and so on.
    """
    if protocol not in PROTOCOLS:
        return {}
    numbers, name = expected_numbers(protocol), _TITLES.get(dataset, dataset)
    if protocol != "base-to-novel":
        cell = numbers["cells"].get(name, {}).get(method, {})
        return {metric: value / 100 for metric, value in cell.items()}
    named = numbers["cells"].values() if name == "average" else [numbers["cells"].get(name, {})]
    rows = [(cells[method]["base"], cells[method]["novel"]) for cells in named if method in cells]
    if name == "average" and not rows and method in numbers["printed_average"]:
        printed = numbers["printed_average"][method]
        rows = [(printed["base"], printed["novel"])]
    if not rows:
        return {}
    average = base_to_novel_table(rows)
    return {"base": average["base"] / 100, "novel": average["novel"] / 100, "hm": average["hm_of_means"] / 100}


def judge(
    dataset: str,
    backbone_name: str,
    method: str,
    protocol: str,
    metrics: Mapping[str, float],
    *,
    shots: int = 16,
    n_classes: int | None = None,
    base_model: str | None = None,
    pretrained: str | None = None,
) -> list[Judgement]:
    """Compare what a method reached with what is published for it. Pure.

    Args:
        dataset: name of the data set, of ``coop:`` or as in papers; "average": over the eleven of base-to-novel.
        backbone_name: the image-text model; published numbers are of CLIP ViT-B/16 with OpenAI's weights.
        method: row of a run.
        protocol: of the run.
        metrics: fractions by name: "base", "novel" and "hm"; or the accuracy of every target by its title, from which
            the average over the published targets is taken.
        shots: training images a class.
        n_classes: classes of the data set, if known; another number than published is not comparable.
        base_model: what CAPT corrects in this run, if known; published CAPT corrects PromptKD.
        pretrained: tag of the weights, if known.

    Returns:
        One judgement a published metric that was measured; if nothing is published, one "not comparable" for each
        metric given.
    """
    expected = expected_metrics(protocol, dataset, method)
    if not expected:
        why = f"no number is published for '{method}' on '{dataset}' under {protocol}"
        return [
            Judgement(method, metric, float(found), None, 0.0, "not comparable", why)
            for metric, found in metrics.items()
        ]
    numbers = expected_numbers(protocol)
    known = numbers["methods"][method]
    tolerance = numbers["tolerance"]["points"] / 100
    why = _not_comparable(
        numbers, known, _TITLES.get(dataset, dataset), backbone_name, shots, n_classes, base_model, pretrained
    )
    measured = dict(metrics)
    if "targets" in numbers:
        titles = [LAYOUTS[name].title for name in numbers["targets"]]
        if absent := [title for title in titles if title not in metrics]:
            why = why or f"the published average is over {len(titles)} data sets; not tested: {', '.join(absent)}"
        else:
            measured["average"] = sum(metrics[title] for title in titles) / len(titles)
    return [
        Judgement(
            method, metric, float(measured[metric]), value, tolerance,
            "not comparable" if why else _verdict(float(measured[metric]), value, tolerance),
            why, known["source"], known["mark"], known.get("transductive", ""),
        )
        for metric, value in expected.items()
        if metric in measured
    ]  # fmt: skip


def judge_run(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Judge every method of a run for which numbers are published.

    Args:
        summary: what ``summary.json`` of a run holds: "dataset", "model", "shots", "methods", and, if there,
            "protocol" (default: base-to-novel), "n_classes", "base_model" and "pretrained".

    Returns:
        For JSON: what the published numbers are of, the reason for the tolerance, and a list of judgements; None if
        nothing is published for the data set under this protocol, or for none of the methods.

    Raises:
        DataError: the summary lacks one of its parts.
    """
    protocol = summary.get("protocol", "base-to-novel")
    try:
        dataset, model, shots = summary["dataset"], summary["model"], summary["shots"]
        rows = {name: dict(method["mean"]) for name, method in summary["methods"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"summary: lacks a part of a run's summary.json ({error!r}); evaluate the run again") from error
    # Printed tables hold the harmonic mean of the seeds' means.
    for name, method in summary["methods"].items():
        if "hm_of_means" in method:
            rows[name]["hm"] = method["hm_of_means"]
    found = [
        judgement
        for name, metrics in rows.items()
        if expected_metrics(protocol, dataset, name)
        for judgement in judge(
            dataset, model, name, protocol, metrics, shots=shots, n_classes=_classes(summary, protocol),
            base_model=summary.get("base_model"), pretrained=summary.get("pretrained"),
        )
    ]  # fmt: skip
    if not found:
        return None
    numbers = expected_numbers(protocol)
    return {
        "protocol": protocol,
        "dataset": dataset,
        "published": {key: numbers[key] for key in ("backbone", "weights", "shots")},
        "tolerance": numbers["tolerance"]["why"],
        "judgements": [asdict(judgement) for judgement in found],
    }


def _classes(summary: Mapping[str, Any], protocol: str) -> int | None:
    """Classes of the data set that was trained on, if the summary says so."""
    counts = summary.get("n_classes")
    if not isinstance(counts, Mapping) or not counts:
        return None
    return sum(counts.values()) if protocol == "base-to-novel" else int(next(iter(counts.values())))


def _not_comparable(
    numbers: Mapping[str, Any], known: Mapping[str, Any], dataset: str, backbone_name: str, shots: int,
    n_classes: int | None, base_model: str | None, pretrained: str | None,
) -> str:  # fmt: skip
    """Why a run is no repetition of what was published; "" if it may be one."""
    if known["mark"] == "unverified":
        return "the published number is known second-hand, and what it is the average of is not"
    if re.sub(r"[^a-z0-9]", "", backbone_name.lower()) not in _BACKBONES:
        return f"other backbone: published for CLIP {numbers['backbone']}, this run used '{backbone_name}'"
    if pretrained is not None and pretrained != numbers["weights"]:
        return f"other weights: published for those of OpenAI, this run used '{pretrained}'"
    needed = known.get("shots", numbers["shots"])  # 0: nothing is trained
    if needed and shots != needed:
        return f"other number of shots: published for {needed}, this run used {shots}"
    if dataset in LAYOUTS and n_classes not in (None, LAYOUTS[dataset].classes):
        return f"other data: the published data set has {LAYOUTS[dataset].classes:,} classes, this one {n_classes:,}"
    wanted = known.get("base_model")
    if wanted and base_model not in (None, wanted):
        return f"other base model: published on top of {wanted}, this run used {base_model}"
    return ""


def _verdict(found: float, expected: float, tolerance: float) -> Verdict:
    # Half a millionth: percentages with two decimals are not exact in binary.
    if abs(found - expected) <= tolerance + 5e-7:
        return "within"
    return "above" if found > expected else "below"
