"""How the demo's settings were chosen: on training images alone, each drawing style held out in turn.

Three of the four training styles of the shipped emoji train, the fourth plays the test set. The test styles are never
opened. Prints, for every setting, accuracies averaged over the held-out styles, and writes them as JSON.

    python scripts/tune_demo.py --out docs/results/tuning.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from capt.backbones import load as load_backbone
from capt.cli.fit import DEMO_CONFIG, DEMO_OPTIONS
from capt.data import DataSet
from capt.data import load as load_data
from capt.files import write_json
from capt.methods.base_to_novel import METHODS, BaseToNovelRun
from capt.methods.capt import CAPTConfig

METRICS = ("base", "novel", "hm", "sample_correction_rate", "new_error_rate")


def with_lr(config: CAPTConfig, lr: float) -> CAPTConfig:
    """``config`` trained at another learning rate."""
    return replace(config, training=replace(config.training, lr=lr))


SETTINGS = {
    "demo": DEMO_CONFIG,
    "lr 3e-4": with_lr(DEMO_CONFIG, 3e-4),
    "no evidence": replace(DEMO_CONFIG, evidence=0.0),
    "no evidence, lr 1e-3": with_lr(replace(DEMO_CONFIG, evidence=0.0), 1e-3),
    "as published": DEMO_CONFIG.as_published(),
    "as published, lr 1e-3": with_lr(DEMO_CONFIG.as_published(), 1e-3),
}


def held_out(data: DataSet, style: str) -> DataSet:
    """The training images without ``style``, tested on ``style``."""
    of_style = np.array(data.train.sources) == style
    return replace(data, train=data.train.subset(~of_style), val=None, test=data.train.subset(of_style))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    data, backbone = load_data("emoji"), load_backbone("embedded")
    styles = sorted(set(data.train.sources or ()))
    results: dict[str, dict[str, float]] = {}
    for name in arguments.settings:
        summaries = []
        for style in styles:
            with tempfile.TemporaryDirectory() as folder:
                options = replace(DEMO_OPTIONS, shots=len(styles) - 1, seeds=(1,))
                summaries.append(BaseToNovelRun(held_out(data, style), backbone, SETTINGS[name], options).fit(folder))
        for method in METHODS:
            # Zero-shot and the linear adapter do not depend on the setting of CAPT.
            row = name if method == "capt" else method
            if row not in results:
                means = [summary["methods"][method]["mean"] for summary in summaries]
                results[row] = {metric: float(np.mean([m[metric] for m in means])) for metric in METRICS}
                print(f"{row:24s}", *(f"{m} {100 * v:5.1f}" for m, v in results[row].items()), file=sys.stderr)
        write_json(arguments.out, {"held_out": styles, "seed": 1, "mean_over_held_out_styles": results})


if __name__ == "__main__":
    main()
