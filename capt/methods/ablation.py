"""Ablations and controls: what each part of CAPT contributes, and what it must not be able to do without."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from capt.errors import CaptError
from capt.evaluation.paired import harmonic_means, paired_difference
from capt.files import load_tensors, read_json, write_bytes, write_json
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run

FULL = "full"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        group: parts, ours, texts, retrieval, bank, adapter, losses.
        what: what is different, for people.
        changes: settings that replace those of the full method.
    """

    group: str
    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def _parts(sem: bool, sam: bool, mgde: bool) -> dict[str, Any]:
    changes = {"semantic": "both" if sem else "none", "sample": sam, "mgde": mgde}
    return changes if sem else changes | {"semantic_evidence": 0.0}  # it rests on the texts of SEM


VARIANTS: dict[str, Variant] = {
    FULL: Variant("", "everything on"),
    "sem": Variant("parts", "SEM alone", _parts(True, False, False)),
    "sam": Variant("parts", "SAM alone", _parts(False, True, False)),
    "mgde": Variant("parts", "MGDE alone", _parts(False, False, True)),
    "sem_sam": Variant("parts", "SEM and SAM", _parts(True, True, False)),
    "sem_mgde": Variant("parts", "SEM and MGDE", _parts(True, False, True)),
    "sam_mgde": Variant("parts", "SAM and MGDE", _parts(False, True, True)),
    "no_evidence": Variant("ours", "without class means as evidence", {"evidence": 0.0}),
    "no_semantic_evidence": Variant("ours", "without written differences as evidence", {"semantic_evidence": 0.0}),
    "no_shared_expert": Variant("ours", "without the shared expert", {"shared_expert": False}),
    "as_published": Variant(
        "ours",
        "none of these, one learning rate, full strength on new classes",
        {"shared_expert": False, "evidence": 0.0, "semantic_evidence": 0.0, "expert_lr": 1.0, "unseen_strength": 1.0},
    ),
    "commonality": Variant("texts", "commonality prompts only", {"semantic": "commonality", "semantic_evidence": 0.0}),
    "difference": Variant("texts", "difference prompts only", {"semantic": "difference"}),
    "derived_texts": Variant("texts", "prompts from class names only", {"pair_texts": "derived"}),
    "random_texts": Variant("texts", "control: prompts of other pairs", {"pair_texts": "random"}),
    "random_retrieval": Variant("retrieval", "control: any stored mistake of the pair", {"retrieval": "random"}),
    "three_mistakes": Variant("retrieval", "3 stored mistakes a pair", {"m": 3}),
    "bank_at_inference": Variant("retrieval", "stored mistakes at prediction, too", {"bank_at_inference": True}),
    "shuffled_bank": Variant("bank", "control: mistakes of other pairs", {"bank_shuffle": True}),
    "refreshed_bank": Variant("bank", "mistakes collected again every 5 epochs", {"bank_refresh": 5}),
    "label_key": Variant("bank", "looked up by the label in training", {"key": "label"}),
    "row_counts": Variant("bank", "counts N[p, i] instead of N[i, p]", {"orientation": "row"}),
    "sum_counts": Variant("bank", "counts of both directions", {"orientation": "sum"}),
    "coop_bank": Variant("bank", "mistakes of CoOp", {"bank_source": "coop"}),
    "local_adapter": Variant("adapter", "convolution only", {"adapter": "local"}),
    "global_adapter": Variant("adapter", "attention only", {"adapter": "global"}),
    "no_adapter": Variant("adapter", "no adapter", {"adapter": "none"}),
    "dynamic_alpha": Variant("adapter", "weight by similarity to the best mistake", {"dynamic_alpha": True}),
    "k1": Variant("losses", "1 confusing class", {"k": 1}),
    "k5": Variant("losses", "5 confusing classes", {"k": 5}),
    "no_confusion_loss": Variant("losses", "cross-entropy only", {"confusion_weight": 0.0}),
    "no_balance": Variant("losses", "no load balance", {"balance_weight": 0.0}),
}
GROUPS = tuple(dict.fromkeys(variant.group for variant in VARIANTS.values() if variant.group))


def chosen_variants(groups: Sequence[str] = (), names: Sequence[str] = ()) -> list[str]:
    """Names of the variants in ``groups`` and ``names`` (neither: all), the full method first.

    Raises:
        CaptError: an unknown name.
    """
    if unknown := [*(set(groups) - set(GROUPS)), *(set(names) - set(VARIANTS))]:
        raise CaptError(
            f"ablation: no group or variant {sorted(unknown)}; groups: {', '.join(GROUPS)}; "
            f"variants: {', '.join(VARIANTS)}"
        )
    everything = not groups and not names
    return [
        name for name, variant in VARIANTS.items()
        if everything or name == FULL or name in names or variant.group in groups
    ]  # fmt: skip


def configurations(config: CAPTConfig, names: Iterable[str]) -> dict[str, CAPTConfig]:
    """CAPT settings by variant; those that the full settings already equal are left out."""
    found: dict[str, CAPTConfig] = {}
    for name in names:
        changed = replace(config, **VARIANTS[name].changes)
        if name == FULL or changed != config:
            found[name] = changed
    return found


def ablate(run: Run, out: str | Path) -> dict[str, Any]:
    """Train and evaluate every variant of ``run``, and write the table.

    Writes the run folder of :class:`Run` and ``ablation.json``, ``.csv``, ``.md``, ``.tex`` and ``.svg`` beside it.
    """
    out = Path(out)
    summary = run.evaluate(out, run.fit(out))
    table = ablation_table(out, summary)
    write_table(out, table)
    return table


def ablation_table(out: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of every row, and its difference to the full method with a 95 % interval over test images."""
    seeds = [str(seed) for seed in summary["seeds"]]
    found = {seed: load_tensors(out / f"seed-{seed}" / "predictions.safetensors") for seed in seeds}
    targets = list(summary["n_classes"])
    score = "hm" if "hm" in summary["metrics"] else summary["metrics"][0]
    rows = []
    for name, results in summary["methods"].items():
        variant = VARIANTS.get(name, Variant("rivals", name.replace("_", " ")))
        row = {"name": name, "group": variant.group, "what": variant.what, "score": score}
        row["mean"] = {metric: results["mean"][metric] for metric in summary["metrics"]}
        row["std"] = {metric: results["std"][metric] for metric in summary["metrics"]}
        row["per_seed"] = {seed: results["per_seed"][seed][score] for seed in seeds}
        if name != FULL and FULL in summary["methods"]:
            used = targets if score == "hm" else targets[:1]
            ours, theirs = ([_right(found, target, which) for target in used] for which in (name, FULL))
            difference, low, high = paired_difference(ours, theirs, harmonic_means)
            row["difference"] = {"mean": difference, "low": low, "high": high}
        rows.append(row)
    record = read_json(out / "run.json")
    return {
        "dataset": summary["dataset"], "model": summary["model"], "base_model": summary["base_model"],
        "protocol": summary["protocol"], "shots": summary["shots"], "seeds": summary["seeds"], "score": score,
        "metrics": summary["metrics"], "test_opened": summary["test_opened"], "rows": rows,
        "versions": record["versions"], "hashes": record["hashes"],
    }  # fmt: skip


def _right(found: Mapping[str, Mapping[str, Tensor]], target: str, row: str) -> np.ndarray:
    """Share of the seeds that got each image right, float [N]."""
    seeds = [(one[f"{target}_{row}"] == one[f"{target}_labels"]).numpy() for one in found.values()]
    return np.asarray(np.mean(seeds, axis=0))


# ---- tables ----------------------------------------------------------------------------------------------------------


def table_cells(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, in percent; the difference is to the full method, with its 95 % interval."""
    metrics = list(table["metrics"])
    header = ["group", "variant", *metrics, f"{table['score']} - full", "95 % interval"]
    rows = []
    for row in table["rows"]:
        cells = [f"{100 * row['mean'][m]:.1f} ± {100 * row['std'][m]:.1f}" for m in metrics]
        gap = row.get("difference")
        text = ["", ""]
        if gap:
            text = [f"{100 * gap['mean']:+.1f}", f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}"]
        rows.append([row["group"], row["what"], *cells, *text])
    return header, rows


def as_markdown(table: Mapping[str, Any]) -> str:
    """GitHub Markdown."""
    header, rows = table_cells(table)
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def as_latex(table: Mapping[str, Any]) -> str:
    """A LaTeX tabular."""
    header, rows = table_cells(table)

    def line(cells: Sequence[str]) -> str:
        escaped = [cell.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$") for cell in cells]
        return " & ".join(escaped) + r" \\"

    middle = [line(header), r"\midrule", *(line(row) for row in rows)]
    columns = "ll" + "r" * (len(header) - 2)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *middle, r"\bottomrule", r"\end{tabular}"])


def write_table(out: Path, table: Mapping[str, Any]) -> None:
    """``ablation.json``, ``.csv``, ``.md``, ``.tex``, and the figure ``ablation.svg`` where matplotlib is installed."""
    write_json(out / "ablation.json", table)
    header, rows = table_cells(table)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    write_bytes(out / "ablation.csv", stream.getvalue().encode())
    write_bytes(out / "ablation.md", (as_markdown(table) + "\n").encode())
    write_bytes(out / "ablation.tex", (as_latex(table) + "\n").encode())
    picture = figure(table)
    if picture is not None:
        write_bytes(out / "ablation.svg", picture)


def figure(table: Mapping[str, Any]) -> bytes | None:
    """Difference of every row to the full method with its interval, as SVG; None without matplotlib."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [row for row in table["rows"] if "difference" in row][::-1]
    canvas = FigureCanvasSVG(Figure(figsize=(7, 0.8 + 0.24 * len(rows)), layout="constrained"))
    axes = canvas.figure.add_subplot()
    middle = np.array([100 * row["difference"]["mean"] for row in rows])
    ends = [[100 * row["difference"][end] for row in rows] for end in ("low", "high")]
    axes.errorbar(middle, range(len(rows)), xerr=[middle - ends[0], ends[1] - middle], fmt="o", capsize=2, markersize=4)
    axes.axvline(0, linewidth=0.8, color="grey")
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=8)
    axes.set_xlabel(f"{table['score']}: points above the full method, 95 % interval over test images")
    stream = io.BytesIO()
    # Without a date the same table gives the same bytes.
    canvas.print_svg(stream, metadata={"Date": None})
    return stream.getvalue()
