"""From the numbers of a run to the words and rows that are shown: one text for terminal, README and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capt.errors import DamagedFileError, DataError
from capt.evaluation.protocols import METRICS
from capt.files import read_json

METHOD_NAMES = {"zero_shot": "Zero-shot", "linear_adapter": "Linear adapter", "capt": "CAPT"}
METRIC_NAMES = {
    "base": "Base",
    "novel": "Novel",
    "hm": "HM",
    "sample_correction_rate": "Corrected",
    "pair_resolution_rate": "Pairs resolved",
    "net_reduction": "Net reduction",
    "new_error_rate": "New errors",
}
METRIC_HELP = {
    "base": "accuracy on test images of the classes trained on",
    "novel": "accuracy on test images of classes never trained on",
    "hm": "harmonic mean of base and novel",
    "sample_correction_rate": "share of the zero-shot mistakes on base test that are now right",
    "pair_resolution_rate": "share of the confused (true, predicted) pairs whose count at least halved",
    "net_reduction": "change of the number of mistakes on base test, as a share of the zero-shot ones",
    "new_error_rate": "share of what zero-shot had right on base test that is now wrong",
}
REFERENCE = "zero_shot"
_SCHEMA = 1


def read_summary(run: str | Path) -> dict[str, Any]:
    """``summary.json`` of a run folder, checked.

    Raises:
        DataError: there is no finished run in the folder.
        DamagedFileError: the file does not have the promised keys.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise DataError(
            f"'{run}': no summary.json there; expected the folder of a finished run, the --out of 'capt fit'"
        )
    summary = read_json(path)
    try:
        if summary["schema"] != _SCHEMA:
            raise DamagedFileError(f"'{path}': schema {summary['schema']}, expected {_SCHEMA}: evaluate again")
        for method in summary["methods"].values():
            for record in [method["mean"], method["std"], *method["per_seed"].values()]:
                for metric in METRICS:
                    float(record[metric])
        if REFERENCE not in summary["methods"]:
            raise KeyError(REFERENCE)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"'{path}': not a run summary ({error!r} is missing or of another type)") from error
    return dict(summary)


@dataclass(frozen=True)
class Row:
    """One line of the result table, in percent."""

    method: str
    label: str  # a seed, "mean" or "std"
    cells: tuple[str, ...]  # one per metric


def method_name(key: str) -> str:
    """The name a method is shown under."""
    return METHOD_NAMES.get(key, key.replace("_", " ").capitalize())


def _cell(method: str, metric: str, value: float, spread: float | None) -> str:
    if method == REFERENCE and metric not in ("base", "novel", "hm"):
        return "-"  # corrections are measured against this very model
    text = f"{100 * value:.1f}"
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def table_rows(summary: Mapping[str, Any], *, spread: Literal["beside", "below"] = "beside") -> list[Row]:
    """Rows in percent: of every method its seeds, then the mean and the population standard deviation.

    Args:
        spread: the deviation stands ``beside`` the mean as "mean ± std", or ``below`` it in a row of its own.
    """
    rows = []
    for method, results in summary["methods"].items():
        for seed, record in results["per_seed"].items():
            rows.append(Row(method, seed, tuple(_cell(method, m, record[m], None) for m in METRICS)))
        several = len(results["per_seed"]) > 1
        deviations = results["std"] if several and spread == "beside" else {}
        cells = (_cell(method, m, results["mean"][m], deviations.get(m)) for m in METRICS)
        rows.append(Row(method, "mean", tuple(cells)))
        if several and spread == "below":
            rows.append(Row(method, "std", tuple(_cell(method, m, results["std"][m], None) for m in METRICS)))
    return rows


def markdown_table(summary: Mapping[str, Any], *, seeds: bool = True) -> str:
    """The result table as GitHub Markdown, in percent; without ``seeds`` the means only."""
    lines = [
        "| Method | Seed | " + " | ".join(METRIC_NAMES[m] for m in METRICS) + " |",
        "| --- | --- |" + " ---: |" * len(METRICS),
    ]
    for row in table_rows(summary):
        if not seeds and row.label != "mean":
            continue
        mark = "**" if row.label == "mean" else ""
        name = method_name(row.method).replace("|", "\\|")
        lines.append(
            f"| {mark}{name}{mark} | {row.label} | " + " | ".join(f"{mark}{c}{mark}" for c in row.cells) + " |"
        )
    return "\n".join(lines)


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points"


def _compare(summary: Mapping[str, Any], metric: str, other: str) -> str:
    """'x.x %, <other> y.y % (z.z points higher in the mean, higher in n of m seeds)' for CAPT."""
    ours, theirs = summary["methods"]["capt"], summary["methods"][other]
    difference = ours["mean"][metric] - theirs["mean"][metric]
    shared = [seed for seed in ours["per_seed"] if seed in theirs["per_seed"]]
    wins = sum(ours["per_seed"][seed][metric] > theirs["per_seed"][seed][metric] for seed in shared)
    word = "higher" if difference > 0 else "lower"
    size = "the same" if round(1000 * difference) == 0 else f"{abs(100 * difference):.1f} points {word}"
    seeds = f"in the mean, higher in {wins} of {len(shared)} seeds" if len(shared) > 1 else "with one seed"
    values = f"{100 * ours['mean'][metric]:.1f} %, {method_name(other).lower()} {100 * theirs['mean'][metric]:.1f} %"
    return f"{values} ({size} {seeds})"


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: better or worse than zero-shot and than the linear adapter."""
    methods = summary["methods"]
    if "capt" not in methods:
        return ["This run holds no CAPT result, only " + ", ".join(method_name(m) for m in methods) + "."]
    mean = methods["capt"]["mean"]
    sentences = [
        f"Accuracy on the classes it was trained on: CAPT {_compare(summary, 'base', REFERENCE)}.",
        f"On classes it never saw: CAPT {_compare(summary, 'novel', REFERENCE)}.",
        f"Harmonic mean of the two: CAPT {_compare(summary, 'hm', REFERENCE)}.",
        f"Of the zero-shot mistakes on base test CAPT corrects {100 * mean['sample_correction_rate']:.1f} %; "
        f"of what zero-shot had right it breaks {100 * mean['new_error_rate']:.1f} %."
        if mean.get("n_mistakes", 1)
        else "Zero-shot makes no mistake on base test, so there is nothing to correct.",
    ]
    if "linear_adapter" in methods:
        difference = mean["hm"] - methods["linear_adapter"]["mean"]["hm"]
        word = "beats" if difference > 0 else "does not beat"
        sentences.append(
            f"CAPT {word} an ordinary linear adapter in harmonic mean: {_compare(summary, 'hm', 'linear_adapter')}."
        )
    return sentences
