"""CAPT on several base models: base, novel, harmonic mean and corrections, for both shipped towers.

Every run uses all training images there are (4 a class) and three seeds; the test split is opened once a run.

    python scripts/base_models.py --out docs/results/base_models.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from capt.backbones import load as load_backbone
from capt.cli.fit import DEMO_CONFIG, DEMO_OPTIONS, TOWERS
from capt.data import load as load_data
from capt.files import read_json, write_json
from capt.methods.base.coop import CoOpConfig
from capt.methods.base.ivlp import IVLPConfig
from capt.methods.base.model import BaseConfig
from capt.methods.runs import Run, base_to_novel
from capt.report.summary import markdown_table
from capt.training import TrainingOptions

BASES = {"lite2": ("zero-shot", "coop"), "vit": ("zero-shot", "coop", "ivlp")}
# Short schedules: on a CPU an epoch of prompts costs minutes, and four images a class are soon learned.
PROMPTS = TrainingOptions(epochs=8, lr=3e-3, weight_decay=0.0)
BASE_CONFIGS: dict[str, BaseConfig] = {
    "coop": CoOpConfig(views=0, chunk=256, training=PROMPTS),
    "ivlp": IVLPConfig(views=0, chunk=256, training=replace(PROMPTS, epochs=4)),
}
CONFIGS = {
    "lite2": DEMO_CONFIG,
    "vit": replace(DEMO_CONFIG, adapter_layers="last", training=replace(DEMO_CONFIG.training, epochs=3, lr=3e-4)),
}


def _stored(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; runs that are in it are not repeated")
    parser.add_argument("--runs", type=Path, default=Path("runs/base-models"), help="folder for the runs")
    parser.add_argument("--bases", nargs="*", default=("zero-shot", "coop", "ivlp"))
    parser.add_argument("--towers", nargs="*", default=list(BASES), choices=list(BASES))
    arguments = parser.parse_args()
    data = load_data("emoji")
    results = _stored(arguments.out)
    for tower in arguments.towers:
        for base in BASES[tower]:
            if (name := f"{tower}, {base}") in results or base not in arguments.bases:
                continue
            config, base_config = CONFIGS[tower], BASE_CONFIGS.get(base)
            run = Run(
                base_to_novel(data), load_backbone(TOWERS[tower]), config, replace(DEMO_OPTIONS, base=base),
                base_config=base_config,
            )  # fmt: skip
            folder = arguments.runs / f"{tower}-{base}"
            summary = run.evaluate(folder, run.fit(folder))
            kept = ("metrics", "shots", "seeds", "base_model", "model", "test_opened", "methods", "hashes", "versions")
            results[name] = {key: summary[key] for key in kept} | {
                "config": asdict(config), "base_config": None if base_config is None else asdict(base_config)
            }  # fmt: skip
            # Another process may have added other runs.
            results |= {key: run for key, run in _stored(arguments.out).items() if key not in results}
            write_json(arguments.out, results)
            print(f"{name}\n{markdown_table(summary, seeds=False)}\n", file=sys.stderr)


if __name__ == "__main__":
    main()
