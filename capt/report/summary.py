"""From the numbers of a run to the words and rows that are shown: one text for terminal, README and HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capt.errors import DamagedFileError, DataError
from capt.evaluation.multi_label import GROUPS
from capt.evaluation.protocols import METRICS
from capt.files import read_json

METHOD_NAMES = {
    "zero_shot": "Zero-shot",
    "linear_adapter": "Linear adapter",
    "plain_adapter": "Plain adapter",
    "tip_adapter": "Tip-Adapter",
    "linear_probe": "Linear probe",
    "coop": "CoOp",
    "ivlp": "IVLP",
    "promptsrc": "PromptSRC",
    "promptkd": "PromptKD",
    "dpc": "DPC-style",
    "capt": "CAPT",
    "full": "CAPT",
    "csp": "CSP",
    "msci": "MSCI",
    "msci_no_low": "MSCI without the low-level stage",
    "msci_no_high": "MSCI without the high-level stage",
    "msci_no_stages": "MSCI without both",
    "msci_dynamic": "MSCI, dynamic fusion",
    "linear_bce": "Linear (BCE)",
    "linear_asl": "Linear (ASL)",
    "cprfl": "CPRFL",
}
WORLDS = ("closed", "open")
_ON_CURVE = {
    "best_seen": ("seen", "highest accuracy on images of seen pairs, whatever the bias"),
    "best_unseen": ("unseen", "highest accuracy on images of unseen pairs, whatever the bias"),
    "best_hm": ("HM", "highest harmonic mean of the two under one bias"),
    "auc": ("AUC", "area under the seen-unseen curve"),
}
METRIC_NAMES = {
    **{f"{world}_{key}": f"{world.capitalize()} {name}" for world in WORLDS for key, (name, _) in _ON_CURVE.items()},
    "map": "mAP",
    **{f"map_{group}": f"mAP {group}" for group in GROUPS},
    "base": "Base",
    "novel": "Novel",
    "hm": "HM",
    "accuracy": "Accuracy",
    "source": "Source",
    "average": "Average",
    "sample_correction_rate": "Corrected",
    "pair_resolution_rate": "Pairs resolved",
    "net_reduction": "Net reduction",
    "new_error_rate": "New errors",
}
METRIC_HELP = {
    **{f"{world}_{key}": f"{world} world: {text}" for world in WORLDS for key, (_, text) in _ON_CURVE.items()},
    "map": "mean over all classes of the average precision, with which a class ranks the test images",
    "map_head": "mean average precision of the classes with many training images",
    "map_medium": "mean average precision of the classes between head and tail",
    "map_tail": "mean average precision of the classes with few training images",
    "base": "accuracy on test images of the classes trained on",
    "novel": "accuracy on test images of classes never trained on",
    "hm": "harmonic mean of base and novel",
    "accuracy": "accuracy on the test images",
    "source": "accuracy on test images of the data set trained on",
    "average": "mean accuracy over the other data sets",
    "sample_correction_rate": "share of the zero-shot mistakes on base test that are now right",
    "pair_resolution_rate": "share of the confused (true, predicted) pairs whose count at least halved",
    "net_reduction": "change of the number of mistakes on base test, as a share of the zero-shot ones",
    "new_error_rate": "share of what zero-shot had right on base test that is now wrong",
}
CORRECTIONS = ("sample_correction_rate", "pair_resolution_rate", "net_reduction", "new_error_rate")
REFERENCE = "zero_shot"
_SCHEMA = 1


def metrics_of(summary: Mapping[str, Any]) -> list[str]:
    """Keys of the result table's columns, in order: those of the run's protocol."""
    return list(summary.get("metrics", METRICS))


def metric_name(key: str) -> str:
    """The name of a column: a metric, or a data set tested on."""
    return METRIC_NAMES.get(key, key)


def metric_help(key: str) -> str:
    """What a column says."""
    return METRIC_HELP.get(key, f"accuracy on the test images of {key}")


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
                for metric in metrics_of(summary):
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
    if method == REFERENCE and metric in CORRECTIONS:
        return "-"  # corrections are measured against this very model
    text = f"{100 * value:.1f}"
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def table_rows(summary: Mapping[str, Any], *, spread: Literal["beside", "below"] = "beside") -> list[Row]:
    """Rows in percent: of every method its seeds, then the mean and the population standard deviation.

    Args:
        spread: the deviation stands ``beside`` the mean as "mean ± std", or ``below`` it in a row of its own.
    """
    rows, metrics = [], metrics_of(summary)
    for method, results in summary["methods"].items():
        for seed, record in results["per_seed"].items():
            rows.append(Row(method, seed, tuple(_cell(method, m, record[m], None) for m in metrics)))
        several = len(results["per_seed"]) > 1
        deviations = results["std"] if several and spread == "beside" else {}
        cells = (_cell(method, m, results["mean"][m], deviations.get(m)) for m in metrics)
        rows.append(Row(method, "mean", tuple(cells)))
        if several and spread == "below":
            rows.append(Row(method, "std", tuple(_cell(method, m, results["std"][m], None) for m in metrics)))
    return rows


def markdown_table(summary: Mapping[str, Any], *, seeds: bool = True) -> str:
    """The result table as GitHub Markdown, in percent; without ``seeds`` the means only."""
    lines = [
        "| Method | Seed | " + " | ".join(metric_name(m) for m in metrics_of(summary)) + " |",
        "| --- | --- |" + " ---: |" * len(metrics_of(summary)),
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


def _compare(summary: Mapping[str, Any], metric: str, other: str, ours: str = "capt") -> str:
    """'x.x %, <other> y.y % (z.z points higher in the mean, higher in n of m seeds)' for one method."""
    mine, theirs = summary["methods"][ours], summary["methods"][other]
    difference = mine["mean"][metric] - theirs["mean"][metric]
    shared = [seed for seed in mine["per_seed"] if seed in theirs["per_seed"]]
    wins = sum(mine["per_seed"][seed][metric] > theirs["per_seed"][seed][metric] for seed in shared)
    word = "higher" if difference > 0 else "lower"
    size = "the same" if round(1000 * difference) == 0 else f"{abs(100 * difference):.1f} points {word}"
    seeds = f"in the mean, higher in {wins} of {len(shared)} seeds" if len(shared) > 1 else "with one seed"
    name = method_name(other)
    name = name[0].lower() + name[1:] if name.split()[0].capitalize() == name.split()[0] else name
    values = f"{100 * mine['mean'][metric]:.1f} %, {name} {100 * theirs['mean'][metric]:.1f} %"
    return f"{values} ({size} {seeds})"


_SENTENCES = {
    "base": "Accuracy on the classes it was trained on",
    "novel": "On classes it never saw",
    "hm": "Harmonic mean of the two",
    "accuracy": "Accuracy",
    "source": "Accuracy on the data set it was trained on",
    "average": "Mean accuracy over the other data sets",
    "closed_best_hm": "Closed world, best harmonic mean of seen and unseen",
    "closed_auc": "Closed world, area under the seen-unseen curve",
    "open_best_hm": "Open world, best harmonic mean of seen and unseen",
    "open_auc": "Open world, area under the seen-unseen curve",
    "map": "Mean average precision over all classes",
    "map_tail": "Mean average precision over the classes that are rare in training",
}
_RIVALS = {"linear_adapter": "an ordinary linear adapter", "plain_adapter": "a plain adapter with as many parameters",
           "tip_adapter": "a cache of the training features (Tip-Adapter)"}  # fmt: skip
#: By protocol, what the method of a run is compared with beside zero-shot, metric by metric.
_COMPARED = {"compositional": ("csp",), "multi-label": ("linear_bce", "linear_asl")}


def main_method(summary: Mapping[str, Any]) -> str:
    """Key of the method that a run is about."""
    methods = list(summary["methods"])
    # An ablation is judged by its full method, a base model alone by itself.
    return next((name for name in ("capt", "full", "msci", "cprfl") if name in methods), methods[-1])


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: better or worse than zero-shot, the base model and every rival."""
    methods, ours = summary["methods"], main_method(summary)
    if ours == REFERENCE:
        return ["This run holds zero-shot results only."]
    name, mean = method_name(ours), methods[ours]["mean"]
    shown = [metric for metric in metrics_of(summary) if metric in _SENTENCES]
    sentences = [f"{_SENTENCES[m]}: {name} {_compare(summary, m, REFERENCE, ours)}." for m in shown]
    if (protocol := summary.get("protocol")) in _COMPARED:
        others = [other for other in _COMPARED[protocol] if other in methods and other != ours]
        return sentences + [_beats(summary, metric, other, ours) for other in others for metric in shown]
    sentences.append(
        f"Of the zero-shot mistakes on the test images of trained classes {name} corrects "
        f"{100 * mean['sample_correction_rate']:.1f} %; of what zero-shot had right it breaks "
        f"{100 * mean['new_error_rate']:.1f} %."
        if mean.get("n_mistakes", 1)
        else "Zero-shot makes no mistake on the test images of trained classes, so there is nothing to correct."
    )
    summed = {"hm": "harmonic mean", "accuracy": "accuracy", "average": "mean accuracy over the other data sets"}
    metric = next(m for m in summed if m in shown)
    base = str(summary.get("base_model", "zero-shot")).replace("-", "_")
    rivals = {base: f"the model it corrects, {method_name(base)},"} if base not in (REFERENCE, ours) else {}
    for rival, description in (rivals | _RIVALS).items():
        if rival in methods and rival != ours:
            difference = mean[metric] - methods[rival]["mean"][metric]
            word = "beats" if difference > 0 else "does not beat"
            sentences.append(
                f"{name} {word} {description} in {summed[metric]}: {_compare(summary, metric, rival, ours)}."
            )
    return sentences + _expected(summary)


def _beats(summary: Mapping[str, Any], metric: str, rival: str, ours: str) -> str:
    """Whether the method of a run beats a rival in one metric."""
    difference = summary["methods"][ours]["mean"][metric] - summary["methods"][rival]["mean"][metric]
    word = "beats" if difference > 0 else "does not beat"
    name = metric_name(metric)[0].lower() + metric_name(metric)[1:]
    compared = _compare(summary, metric, rival, ours)
    return f"{method_name(ours)} {word} {method_name(rival)} in {name}: {compared}."


def _expected(summary: Mapping[str, Any]) -> list[str]:
    """How many published numbers a run on a published data set agrees with; nothing on other data."""
    judgements = summary.get("expected", {}).get("judgements", [])
    if not judgements:
        return []
    counts = Counter(judgement["verdict"] for judgement in judgements)
    if set(counts) == {"not comparable"}:
        return [f"The published numbers for this data set are not comparable: {judgements[0]['why']}."]
    kinds = ("within", "above", "below", "not comparable")
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])
    return [f"Against the published numbers and their tolerance: {listed} (summary.json, 'expected')."]
