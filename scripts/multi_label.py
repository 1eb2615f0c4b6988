"""CPRFL, linear classifiers and zero-shot CLIP on the shipped clip art, and what each part of CPRFL does.

Three seeds a run; the test split is opened once a run. Settings were chosen on validation images; --tune measures some.
Runs that are in the output are not repeated.

    python scripts/multi_label.py --out docs/results/multi_label.json
    python scripts/multi_label.py --tune docs/results/multi_label_tuning.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from capt.backbones import load as load_backbone
from capt.data import load_multi_label
from capt.files import read_json, write_json
from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.model import LinearLabelsConfig, MultiLabelConfig
from capt.methods.multi_label.run import MultiLabelOptions, MultiLabelRun, picture_transform
from capt.methods.multi_label.training import fit_model
from capt.methods.runs.inputs import InputCache
from capt.report.summary import markdown_table

TOWERS = {"lite2": "embedded", "vit": "embedded-vit"}
SEEDS = (1, 2, 3)
CPRFL = CPRFLConfig()
LINEAR = LinearLabelsConfig()
RUNS: dict[str, dict[str, MultiLabelConfig]] = {
    "main": {
        "linear_bce": replace(LINEAR, loss="bce"),
        "linear_asl": LINEAR,
        "cprfl": CPRFL,
    },
    "from zero": {
        "linear_bce_zero": replace(LINEAR, loss="bce", initial="zero"),
        "linear_asl_zero": replace(LINEAR, initial="zero"),
    },
    "ablation": {
        "cprfl_no_prior": replace(CPRFL, text_prior=False),
        "cprfl_no_shrinkage": replace(CPRFL, shrinkage=0.0),
        "cprfl_encoder_path": replace(CPRFL, paths="encoder"),
        "cprfl_classifier_path": replace(CPRFL, paths="classifier"),
        "cprfl_residual": replace(CPRFL, residual=True),
        "cprfl_bce": replace(CPRFL, loss="bce"),
        "cprfl_db": replace(CPRFL, loss="distribution-balanced"),
    },
    "further": {
        "cprfl_linear_prompts": replace(CPRFL, linear_prompts=True),
        "cprfl_alternate": replace(CPRFL, refinement="alternate", training=replace(CPRFL.training, epochs=10)),
    },
}
TRIED: dict[str, MultiLabelConfig] = {
    **{
        f"linear, {loss}, {initial}, lr {lr:g}": replace(
            LINEAR, loss=loss, initial=initial, training=replace(LINEAR.training, lr=lr)
        )
        for loss in ("bce", "asl")
        for initial in ("text", "zero")
        for lr in (3e-4, 1e-3, 3e-3)
    },
    **{
        f"CPRFL, lr {lr:g}, shrinkage {shrinkage:g}": replace(
            CPRFL, shrinkage=shrinkage, training=replace(CPRFL.training, lr=lr)
        )
        for lr, shrinkage in ((3e-4, 0.0), (3e-4, 20.0), (3e-4, 60.0), (6e-4, 20.0))
    },
}  # fmt: skip


def tune(out: Path, runs: Path, tower: str, only: str) -> None:
    """Best validation mAP of every setting of ``TRIED``, seed 1."""
    data, backbone = load_multi_label("clipart"), load_backbone(TOWERS[tower])
    cache = InputCache(backbone, 2 << 30, lambda what, done, total: None, picture_transform(backbone, "squash"))
    found = _stored(out)
    for name, config in TRIED.items():
        if (key := f"{tower}: {name}") in found or only not in name:
            continue
        folder = runs / "tune" / key.replace(" ", "-")
        fit_model(name, config, data, cache, 1, folder, lambda what, done, total: None)
        lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        best = max(lines, key=lambda line: line["total"]["map"])
        found[key] = {"epoch": best["epoch"], **{g: best[g]["map"] for g in ("total", "head", "medium", "tail")}}
        write_json(out, found)
        print(key, found[key], file=sys.stderr)


def measure(out: Path, runs: Path, tower: str, which: str, seeds: tuple[int, ...]) -> None:
    """One run: every model of it on all seeds."""
    if (key := f"{tower}, {which}") in _stored(out):
        return
    run = MultiLabelRun(
        load_multi_label("clipart"), load_backbone(TOWERS[tower]), RUNS[which], MultiLabelOptions(seeds=seeds),
        progress=lambda what, done, total: print(what, done, total, file=sys.stderr) if done == total else None,
    )  # fmt: skip
    folder = runs / f"{tower}-{which.replace(' ', '-')}"
    summary = run.evaluate(folder, run.fit(folder))
    record = read_json(folder / "run.json")
    write_json(out, {**_stored(out), key: {**summary, "models": record["models"]}})
    print(f"{key}\n{markdown_table(summary, seeds=False)}\n", file=sys.stderr)


def _stored(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--tune", type=Path, help="JSON file of validation results of the settings that were tried")
    parser.add_argument("--only", default="", help="tune settings whose names hold this")
    parser.add_argument("--runs", type=Path, default=Path("runs/multi_label"), help="folder for the runs")
    parser.add_argument("--towers", nargs="*", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument("--which", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    for tower in arguments.towers:
        if arguments.tune:
            tune(arguments.tune, arguments.runs, tower, arguments.only)
        for which in arguments.which if arguments.out else ():
            measure(arguments.out, arguments.runs, tower, which, tuple(arguments.seeds))


if __name__ == "__main__":
    main()
