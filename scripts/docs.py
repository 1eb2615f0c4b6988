"""Fills the generated parts of README.md and docs/, and checks every relative link in the documentation.

    python scripts/docs.py            rewrite them
    python scripts/docs.py --check    change nothing, fail if something is out of date or broken

Between ``<!-- demo-table -->`` and ``<!-- /demo-table -->`` stands the result of ``capt demo`` as recorded in
docs/results/demo.json (its summary.json); between the ``drop-in`` marks, the marked lines of examples/drop_in.py,
between ``msci-lines`` in docs/msci.md those of examples/compositional.py, and between ``cprfl-lines`` in docs/cprfl.md
those of examples/multi_label.py. ``compositional-table`` in README.md is the first run of
docs/results/compositional.json, ``compositional`` in docs/results.md all of them; ``multi-label-table`` and
``multi-label`` are the same of docs/results/multi_label.json; ``center-bias`` in docs/center-bias.md is
docs/results/center_bias.json. In docs/results.md, the ``tuning-table`` marks hold what scripts/tune_demo.py wrote,
``base-models`` what scripts/base_models.py wrote, and ``ablation`` the table of ``capt ablate``.
``<!-- benchmarks -->`` in README.md holds the goals of benchmarks/results/cpu.json, and ``<!-- benchmark: OP -->`` ...
``<!-- end -->`` in docs/kernels the rows of an op: one whose name, or whose file in benchmarks/, is OP.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from capt.methods.ablation import as_markdown
from capt.report import markdown_table, verdict
from capt.report.bias import words as bias_words
from capt.report.summary import method_name, metric_name, metrics_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # 'benchmarks' is not installed

from benchmarks import tables  # noqa: E402

DEMO = ROOT / "docs" / "results" / "demo.json"
TUNING = ROOT / "docs" / "results" / "tuning.json"
BASE_MODELS = ROOT / "docs" / "results" / "base_models.json"
ABLATION = ROOT / "docs" / "results" / "ablation.json"
COMPOSITIONAL = ROOT / "docs" / "results" / "compositional.json"
MULTI_LABEL = ROOT / "docs" / "results" / "multi_label.json"
CENTER_BIAS = ROOT / "docs" / "results" / "center_bias.json"
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks" / "results" / "cpu.json"
KERNELS = ROOT / "docs" / "kernels"
SPEED = ROOT / "capt" / "assets" / "kernel_speed.json"
MARK = re.compile(r"(<!-- benchmark: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_table() -> str:
    """Means of every method, and what they say."""
    summary = json.loads(DEMO.read_text(encoding="utf-8"))
    sentences = "\n".join(f"- {sentence}" for sentence in verdict(summary))
    return f"{markdown_table(summary, seeds=False)}\n\n{sentences}"


def ten_lines(example: str) -> str:
    """The lines of an example between its marks."""
    code = (
        (EXAMPLES / example).read_text(encoding="utf-8").split("# --- ten lines ---\n")[1].split("    # --- end ---")[0]
    )
    return f"```python\n{textwrap.dedent(code).rstrip()}\n```"


def tuning_table() -> str:
    """Accuracies of every setting, over the held-out styles."""
    rows = json.loads(TUNING.read_text(encoding="utf-8"))["mean_over_held_out_styles"]
    metrics = list(next(iter(rows.values())))
    lines = ["| Setting | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
    lines += [f"| {name} | " + " | ".join(f"{100 * row[m]:.1f}" for m in metrics) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def base_models_table() -> str:
    """Every method on every base model and tower, and what that says about the goals."""
    runs = json.loads(BASE_MODELS.read_text(encoding="utf-8"))
    metrics = next(iter(runs.values()))["metrics"]
    lines = [
        "| Tower | Base model f0 | Method | " + " | ".join(map(metric_name, metrics)) + " | Corrected of f0 |",
        "| --- | --- | --- |" + " ---: |" * (len(metrics) + 1),
    ]
    verdicts = []
    for name, run in runs.items():
        tower, base = name.split(", ")
        methods = run["methods"]
        for method, results in methods.items():
            mean, std = results["mean"], results["std"]
            first = method == "zero_shot"
            cells = [
                "-" if first and metric not in metrics[:3] else f"{100 * mean[metric]:.1f} ± {100 * std[metric]:.1f}"
                for metric in metrics
            ]
            of_base = mean.get("sample_correction_rate_of_base_model")
            cells.append("-" if of_base is None else f"{100 * of_base:.1f}")
            lines.append(f"| {tower} | {base} | {method_name(method)} | " + " | ".join(cells) + " |")
        ours, f0 = methods["capt"]["mean"], methods[base.replace("-", "_")]["mean"]
        below = [method_name(m) for m, r in methods.items() if m != "capt" and r["mean"]["hm"] >= ours["hm"]]
        rate = 100 * ours["sample_correction_rate"]
        verdicts.append(
            f"- {tower}, {base}: CAPT's harmonic mean is "
            + ("above every other method's" if not below else f"not above that of {', '.join(below)}")
            + f"; corrected {rate:.1f} % ({'at least' if rate >= 50.72 else 'below'} 50.72 %); novel accuracy "
            + f"{100 * (ours['novel'] - f0['novel']):+.1f} points against its base model."
        )
    return "\n".join([*lines, "", *verdicts])


def first_table(runs: dict[str, Any]) -> str:
    """The first run: means of every method, and what they say."""
    name, summary = next(iter(runs.items()))
    sentences = "\n".join(f"- {sentence}" for sentence in verdict(summary))
    return f"{markdown_table(summary, seeds=False)}\n\n{name}:\n\n{sentences}"


def run_tables(runs: dict[str, Any]) -> str:
    """A table for each run, by its name "<tower>, <what>"."""
    return "\n\n".join(f"{name}:\n\n{markdown_table(summary, seeds=False)}" for name, summary in runs.items())


def compositional_tables(runs: dict[str, Any]) -> str:
    """The tables, and whether MSCI is above zero-shot and CSP in each."""
    judged = [f"- {name}: {_above(summary)}." for name, summary in runs.items() if "msci" in summary["methods"]]
    return "\n\n".join([run_tables(runs), "\n".join(judged)]).rstrip()


def _above(summary: dict[str, Any]) -> str:
    means = {name: results["mean"] for name, results in summary["methods"].items()}
    rivals = [name for name in ("zero_shot", "csp") if name in means]
    shown = [metric for metric in metrics_of(summary) if metric.endswith(("_best_hm", "_auc"))]
    not_above = [
        f"{method_name(rival)} in {metric_name(metric)} ({100 * means['msci'][metric]:.1f} against "
        f"{100 * means[rival][metric]:.1f})"
        for rival in rivals for metric in shown if means["msci"][metric] <= means[rival][metric]
    ]  # fmt: skip
    everywhere = f"MSCI is above {' and '.join(map(method_name, rivals))} in {', '.join(map(metric_name, shown))}"
    return f"MSCI is not above {', '.join(not_above)}" if not_above else everywhere


def center_bias(recorded: dict[str, Any]) -> str:
    """What was found on each model, step by step, the best members, and what it took."""
    parts = []
    for name, steps in recorded["runs"].items():
        parts.append(f"**{name}**")
        found = {"model": {"name": name}, **steps}
        parts.append("\n".join(f"- {sentence}" for sentence in bias_words(found)))
        if "mitigate" in steps:
            rows = steps["mitigate"]["table"][:8]
            keys = ("calibration_off", "calibration_clean", "held_out_off", "held_out_clean")
            lines = ["| Member | Calibration, off-center | center | Held out, off-center | center |"]
            lines += ["| --- |" + " ---: |" * len(keys)]
            lines += [
                f"| {row['name']} | " + " | ".join(f"{100 * row[key]:.1f}" for key in keys) + " |" for row in rows
            ]
            parts.append("\n".join(lines))
        took = ", ".join(
            f"{step} {one['took']['seconds']:.0f} s ({one['took']['cpu_seconds']:.0f} s of CPU)"
            for step, one in steps.items()
        )
        parts.append(f"Took, with {recorded['machine']['threads']} threads: {took}.")
    return "\n\n".join(parts)


def ablation_table() -> str:
    """The table of ``capt ablate``."""
    return as_markdown(json.loads(ABLATION.read_text(encoding="utf-8")))


def benchmark_summary(recorded: dict[str, Any]) -> str:
    """One line for every goal."""
    return f"{tables.goals_table(tables.goals(recorded['rows']))}\n\n{tables.measured_on(recorded['machine'])}"


def rows_of(mark: str, marks: set[str], recorded: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that belong to a mark: of the op of that name, or of its benchmark file if the op has no mark itself."""
    return [row for row in recorded["rows"] if row["op"] == mark or (row["file"] == mark and row["op"] not in marks)]


def benchmark_tables(text: str, folder: Path, marks: set[str], recorded: dict[str, Any]) -> str:
    """``text`` of a page about a kernel with its measurements renewed."""

    def table(match: re.Match[str]) -> str:
        op, rows = match[2], rows_of(match[2], marks, recorded)
        parts = ["Not measured yet."]
        if rows:
            several = len({row["op"] for row in rows}) > 1
            parts = [tables.measured_on(recorded["machine"]) + " Ratio = rival / ours; floor = share of what the same"
                     " bytes or operations cost at least, measured beside it."]  # fmt: skip
            for name in dict.fromkeys(row["op"] for row in rows):
                parts += [f"`{name}`:"] if several else []
                parts.append(tables.rows_table([row for row in rows if row["op"] == name]))
            goals = tables.goals(rows)
            parts += [tables.goals_table(goals)] if goals else []
        if (folder / f"{op}_gpu.md").is_file():
            parts.append(f"On a GPU: [{op}_gpu.md]({op}_gpu.md).")
        return match[1] + "\n\n".join(parts) + "\n" + match[3]

    return MARK.sub(table, text)


def kernel_pages() -> dict[Path, str]:
    """Pages about kernels as they should be."""
    if not BENCHMARKS.is_file():
        return {}
    recorded = json.loads(BENCHMARKS.read_text(encoding="utf-8"))
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(KERNELS.glob("*.md"))}
    marks = {match[2] for text in texts.values() for match in MARK.finditer(text)}
    homeless = {row["op"] for row in recorded["rows"]} - {
        row["op"] for mark in marks for row in rows_of(mark, marks, recorded)
    }
    if homeless:
        sys.exit(f"docs/kernels: no page has a mark '<!-- benchmark: OP -->' for {', '.join(sorted(homeless))}")
    return {page: benchmark_tables(text, KERNELS, marks, recorded) for page, text in texts.items()}


def generated() -> dict[str, dict[str, str]]:
    """Generated parts by page and mark; what was never recorded stays as it is."""
    pages = {
        "README.md": {"drop-in": ten_lines("drop_in.py")},
        "docs/msci.md": {"msci-lines": ten_lines("compositional.py")},
        "docs/cprfl.md": {"cprfl-lines": ten_lines("multi_label.py")},
        "docs/results.md": {},
    }
    if DEMO.is_file():
        pages["README.md"]["demo-table"] = demo_table()
    if BENCHMARKS.is_file():
        pages["README.md"]["benchmarks"] = benchmark_summary(json.loads(BENCHMARKS.read_text(encoding="utf-8")))
    if TUNING.is_file():
        pages["docs/results.md"]["tuning-table"] = tuning_table()
    if BASE_MODELS.is_file():
        pages["docs/results.md"]["base-models"] = base_models_table()
    if ABLATION.is_file():
        pages["docs/results.md"]["ablation"] = ablation_table()
    if COMPOSITIONAL.is_file():
        runs = json.loads(COMPOSITIONAL.read_text(encoding="utf-8"))
        pages["README.md"]["compositional-table"] = first_table(runs)
        pages["docs/results.md"]["compositional"] = compositional_tables(runs)
    if MULTI_LABEL.is_file():
        runs = json.loads(MULTI_LABEL.read_text(encoding="utf-8"))
        pages["README.md"]["multi-label-table"] = first_table(runs)
        pages["docs/results.md"]["multi-label"] = run_tables(runs)
    if CENTER_BIAS.is_file():
        pages["docs/center-bias.md"] = {"center-bias": center_bias(json.loads(CENTER_BIAS.read_text(encoding="utf-8")))}
    return pages


def filled(page: str, text: str, parts: dict[str, str]) -> str:
    """``text`` of a page with its generated parts renewed."""
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            sys.exit(f"{page}: expected the marks <!-- {name} --> and <!-- /{name} --> once, found {count}")
    return text


def broken_links() -> list[str]:
    """Relative links in README.md and docs/ whose target does not exist."""
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        without_code = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
            if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    return broken


def kernel_speed() -> dict[Path, str]:
    """What 'capt doctor' says about the cost of a missing kernel."""
    if not BENCHMARKS.is_file():
        return {}
    recorded = json.loads(BENCHMARKS.read_text(encoding="utf-8"))
    content = {"commit": recorded["machine"].get("commit"), "ops": tables.speeds(recorded["rows"])}
    return {SPEED: json.dumps(content, indent=1) + "\n"}


def renewed() -> dict[Path, str]:
    """Every page with a generated part, as it should be."""
    pages = {ROOT / page: filled(page, (ROOT / page).read_text(encoding="utf-8"), parts)
             for page, parts in generated().items()}  # fmt: skip
    return pages | kernel_pages() | kernel_speed()


def main() -> None:
    """Entry point."""
    for path, new in renewed().items():
        page = path.relative_to(ROOT)
        if path.is_file() and new == path.read_text(encoding="utf-8"):
            continue
        if "--check" in sys.argv[1:]:
            sys.exit(f"{page} is out of date: run 'make docs'")
        path.write_text(new, encoding="utf-8")
        print(f"{page} renewed")
    if links := broken_links():
        sys.exit("broken links:\n" + "\n".join(links))


if __name__ == "__main__":
    main()
