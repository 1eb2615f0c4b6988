"""Tip-Adapter and linear probe on the shipped emoji, on training images alone: each drawing style held out in turn.

Three of the four training styles train, on the base classes; the fourth plays the test set. The test styles are never
opened. Prints base accuracies averaged over the held-out styles (both models leave new classes to zero-shot CLIP) and
writes them as JSON. ``own mistakes`` is the share of training images that the fitted model gets wrong.

    python scripts/tune_caches.py --out docs/results/caches.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from capt.backbones import load as load_backbone
from capt.data import base_novel
from capt.data import load as load_data
from capt.files import write_json
from capt.methods.base.linear_probe import LinearProbeConfig
from capt.methods.base.model import BaseConfig
from capt.methods.base.registry import make_base
from capt.methods.base.tip_adapter import TipAdapterConfig
from capt.training import TokenStore, TrainingOptions, train


def _probe(lr: float, views: int = 2, decay: float = 0.0, **options: str | bool) -> LinearProbeConfig:
    return LinearProbeConfig(views=views, training=TrainingOptions(lr=lr, weight_decay=decay), **options)  # type: ignore[arg-type]


SETTINGS: dict[str, tuple[str, BaseConfig | None]] = {
    "zero-shot": ("zero-shot", BaseConfig(views=0)),
    "Tip-Adapter": ("tip-adapter", None),
    "Tip-Adapter, own votes": ("tip-adapter", TipAdapterConfig(own_votes=True)),
    "Tip-Adapter, alpha 3": ("tip-adapter", TipAdapterConfig(alpha=3.0)),
    "Tip-Adapter-F": ("tip-adapter", TipAdapterConfig(finetune=True, views=2)),
    "Tip-Adapter-F, no views": ("tip-adapter", TipAdapterConfig(finetune=True)),
    "probe": ("linear-probe", None),
    "probe, lr 3e-4": ("linear-probe", _probe(3e-4)),
    "probe, lr 3e-3": ("linear-probe", _probe(3e-3)),
    "probe, decay 0.05": ("linear-probe", _probe(1e-3, decay=0.05)),
    "probe, no views": ("linear-probe", _probe(1e-3, views=0)),
    "probe, bias": ("linear-probe", _probe(1e-3, bias=True)),
    "probe, zero start": ("linear-probe", _probe(3e-3, initial="zero")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    data, backbone = load_data("emoji"), load_backbone("embedded")
    images, names = base_novel(data)[0].train, base_novel(data)[0].classes
    sources, labels = np.array(images.sources), torch.from_numpy(images.labels.copy())
    inputs = make_base("zero-shot", backbone, names).inputs
    transforms = [(backbone.preprocess, None), *((backbone.train_transform, view) for view in range(2))]
    everything = torch.arange(len(images))
    views = torch.stack([TokenStore(images, t, inputs, seed=seed)(everything) for t, seed in transforms])
    results: dict[str, dict[str, float]] = {}
    for name, (kind, config) in SETTINGS.items():
        base, own = [], []
        for style in sorted(set(images.sources or ())):
            shots, held_out = (torch.from_numpy(np.flatnonzero(hit)) for hit in (sources != style, sources == style))
            torch.manual_seed(1)
            model = make_base(kind, backbone, names, config).train()
            model.prepare(lambda rows, shots=shots: views[0][shots[rows]], labels[shots])

            def step(batch: torch.Tensor, generator: torch.Generator, model=model, shots=shots) -> dict:
                view = torch.randint(model.config.views + 1, (len(batch),), generator=generator)
                return model.losses(views[view, shots[batch]], labels[shots[batch]])

            generator = torch.Generator().manual_seed(1)
            train(model.trainable().values(), step, len(shots), model.config.training, generator=generator)
            model.finish()
            for rows, found in ((held_out, base), (shots, own)):
                found.append(float((model.logits(views[0][rows], names).argmax(-1) == labels[rows]).double().mean()))
        results[name] = {"base": float(np.mean(base)), "own_mistakes": 1 - float(np.mean(own))}
        row = (f"base {100 * results[name]['base']:5.1f}", f"own mistakes {100 * results[name]['own_mistakes']:5.1f}")
        print(f"{name:26s}", *row, file=sys.stderr)
    write_json(arguments.out, {"classes": len(names), "shots": 3, "mean_over_held_out_styles": results})


if __name__ == "__main__":
    main()
