"""How the settings were chosen: on training images alone, each drawing style held out in turn.

Three of the four training styles of the shipped emoji train, the fourth plays the test set. The test styles are never
opened. Prints, for every setting, scores averaged over the held-out styles, and writes them as JSON.

    python scripts/tune_demo.py --out docs/results/tuning.json
    python scripts/tune_demo.py --out docs/results/tuning-vit-ivlp.json --model embedded-vit --base ivlp
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from capt.backbones import Backbone
from capt.backbones import load as load_backbone
from capt.cli.fit import DEMO_CONFIG, DEMO_OPTIONS
from capt.data import DataSet
from capt.data import load as load_data
from capt.files import write_json
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel

METRICS = ("base", "novel", "hm", "sample_correction_rate", "new_error_rate")


def with_lr(config: CAPTConfig, lr: float) -> CAPTConfig:
    """``config`` trained at another learning rate."""
    return replace(config, training=replace(config.training, lr=lr))


SETTINGS = {
    "demo": DEMO_CONFIG,
    **{f"semantic evidence {x}": replace(DEMO_CONFIG, semantic_evidence=x) for x in (0.0, 0.5, 1.5, 2.0, 3.0)},
    "random pair texts": replace(DEMO_CONFIG, pair_texts="random"),
    "no evidence": replace(DEMO_CONFIG, evidence=0.0),
    "neither evidence": replace(DEMO_CONFIG, evidence=0.0, semantic_evidence=0.0),
    "full strength on new classes": replace(DEMO_CONFIG, unseen_strength=1.0),
    "no correction of new classes": replace(DEMO_CONFIG, unseen_strength=0.0),
    "no evidence, lr 1e-3": with_lr(replace(DEMO_CONFIG, evidence=0.0), 1e-3),
    "as published, lr 1e-3": with_lr(DEMO_CONFIG.as_published(), 1e-3),
}


def held_out(data: DataSet, style: str) -> DataSet:
    """The training images without ``style``, tested on ``style``."""
    of_style = np.array(data.train.sources) == style
    return replace(data, train=data.train.subset(~of_style), val=None, test=data.train.subset(of_style))


def scores(
    data: DataSet, backbone: Backbone, settings: Mapping[str, CAPTConfig], options: RunOptions
) -> dict[str, dict[str, float]]:
    """Mean over the held-out styles of every row: zero-shot, base model, rivals, and each setting of CAPT."""
    styles = sorted(set(data.train.sources or ()))
    found: dict[str, list[dict[str, float]]] = {}
    for style in styles:
        with tempfile.TemporaryDirectory() as folder:
            chosen = replace(options, shots=len(styles) - 1)
            run = Run(base_to_novel(held_out(data, style)), backbone, settings, chosen)
            summary = run.evaluate(folder, run.fit(folder))
        for row, results in summary["methods"].items():
            found.setdefault(row, []).append(results["mean"])
    return {row: {m: float(np.mean([mean[m] for mean in means])) for m in METRICS} for row, means in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--base", default="zero-shot")
    arguments = parser.parse_args()
    data, backbone = load_data("emoji"), load_backbone(arguments.model)
    options = replace(DEMO_OPTIONS, seeds=(1,), base=arguments.base)
    results = scores(data, backbone, {name: SETTINGS[name] for name in arguments.settings}, options)
    for row, values in results.items():
        print(f"{row:24s}", *(f"{metric} {100 * value:5.1f}" for metric, value in values.items()), file=sys.stderr)
    styles = sorted(set(data.train.sources or ()))
    write_json(arguments.out, {
        "held_out": styles, "seed": 1, "model": arguments.model, "base": arguments.base,
        "mean_over_held_out_styles": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()
