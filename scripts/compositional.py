"""MSCI, CSP and zero-shot CLIP on the shipped emoji pairs, closed and open world, and what each part of MSCI does.

Three seeds a run; the test split is opened once a run. Settings were chosen on validation images; --tune measures some.
Runs that are in the output are not repeated.

    python scripts/compositional.py --out docs/results/compositional.json
    python scripts/compositional.py --tune docs/results/compositional_tuning.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capt.backbones import load as load_backbone
from capt.data import load_compositional
from capt.files import read_json, write_json
from capt.methods.compositional.csp import CSPConfig
from capt.methods.compositional.model import CompositionalConfig
from capt.methods.compositional.run import CompositionalOptions, CompositionalRun
from capt.methods.compositional.training import fit_model
from capt.methods.msci_config import MSCIConfig
from capt.methods.runs.inputs import InputCache
from capt.report.summary import markdown_table
from capt.training import TrainingOptions

TOWERS = {"lite2": "embedded", "vit": "embedded-vit"}
SEEDS = (1, 2, 3)
SCHEDULE = TrainingOptions(
    epochs=8, batch_size=32, optimizer="adam", lr=1e-3, weight_decay=1e-5, schedule="halving", halving_epochs=3,
    warmup_epochs=0.0, clip_norm=0.0, decay_all=True, amp=True,
)  # fmt: skip
CSP = CSPConfig(training=replace(SCHEDULE, epochs=12))
# Short schedules and a narrow feed-forward part: what a CPU can do for three seeds of every row.
MSCI = MSCIConfig(stage_mlp=1.0, stage_dropout=0.0, pairs_per_step=64, training=SCHEDULE)
RUNS: dict[str, dict[str, CompositionalConfig]] = {
    "main": {"csp": CSP, "msci": MSCI},
    "ablation": {
        "msci_no_low": replace(MSCI, stages="high"),
        "msci_no_high": replace(MSCI, stages="low"),
        "msci_no_stages": replace(MSCI, stages="none"),
        "msci_dynamic": replace(MSCI, fusion="dynamic"),
    },
}
TRIED: dict[str, CompositionalConfig] = {
    **{f"CSP, lr {lr:g}": replace(CSP, training=replace(CSP.training, lr=lr)) for lr in (1e-3, 3e-3)},
    **{f"MSCI, lr {lr:g}": replace(MSCI, training=replace(SCHEDULE, lr=lr)) for lr in (5e-4, 1e-3, 2e-3)},
}


def tune(out: Path, runs: Path, tower: str) -> None:
    """Best validation AUC of every setting of ``TRIED``, seed 1."""
    data, backbone = load_compositional("emoji-pairs"), load_backbone(TOWERS[tower])
    cache = InputCache(backbone, 2 << 30, lambda what, done, total: None)
    found = _stored(out)
    for name, config in TRIED.items():
        if (key := f"{tower}: {name}") in found:
            continue
        folder = runs / "tune" / key.replace(" ", "-")
        fit_model(name, config, data, cache, 1, folder, lambda what, done, total: None)
        lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        best = max(lines, key=lambda line: line["auc"])
        found[key] = {name: best[name] for name in ("epoch", "auc", "best_hm", "best_seen", "best_unseen")}
        write_json(out, found)
        print(key, found[key], file=sys.stderr)


def measure(out: Path, runs: Path, tower: str, which: str) -> None:
    """One run: every model of it on three seeds."""
    results = _stored(out)
    if (key := f"{tower}, {which}") in results:
        return
    run = CompositionalRun(
        load_compositional("emoji-pairs"), load_backbone(TOWERS[tower]), RUNS[which], CompositionalOptions(seeds=SEEDS),
        progress=lambda what, done, total: print(what, done, total, file=sys.stderr) if done == total else None,
    )  # fmt: skip
    folder = runs / f"{tower}-{which}"
    summary = run.evaluate(folder, run.fit(folder))
    record = read_json(folder / "run.json")
    results = {**_stored(out), key: {**summary, "models": record["models"]}}
    write_json(out, results)
    print(f"{key}\n{markdown_table(summary, seeds=False)}\n", file=sys.stderr)


def _stored(path: Path) -> dict[str, Any]:
    found: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return dict(found)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--tune", type=Path, help="JSON file of validation results of the settings that were tried")
    parser.add_argument("--runs", type=Path, default=Path("runs/compositional"), help="folder for the runs")
    parser.add_argument("--towers", nargs="*", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument("--which", nargs="*", default=list(RUNS), choices=list(RUNS))
    arguments = parser.parse_args()
    for tower in arguments.towers:
        if arguments.tune:
            tune(arguments.tune, arguments.runs, tower)
        for which in arguments.which if arguments.out else ():
            measure(arguments.out, arguments.runs, tower, which)


if __name__ == "__main__":
    main()
