"""One CAPT training step against the published ones, on the shipped images with the shipped model.

    python -m benchmarks.training_step --out benchmarks/results/training_step.json

All take turns in one process. Ours is what a run does from its second epoch on: tokens and base features are cached.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine_card
from benchmarks.rivals.training_step import Costs, Port, Released, index_text
from benchmarks.timer import Timing, interleaved
from capt import CAPT, ConfusionBank
from capt.backbones import load as load_backbone
from capt.cli.fit import DEMO_CONFIG
from capt.data import base_novel, few_shot
from capt.data import load as load_data

BATCH = 32
NOTHING = Costs(index_file=False, text_tower=False, read_images=False, encode_images=False)


class Scene:
    """The shipped base classes, a bank of zero-shot mistakes, a model in training."""

    def __init__(self, shots: int = 4) -> None:
        torch.manual_seed(0)
        self.backbone = load_backbone("embedded")
        base, _ = base_novel(load_data("emoji"))
        self.images = few_shot(base.train, shots, 1)
        self.labels, self.ids = (torch.from_numpy(x.copy()) for x in (self.images.labels, self.images.ids))
        self.model = CAPT(self.backbone, base.classes, config=replace(DEMO_CONFIG, dropout=0.0)).train()
        self.kept_pixels = self.pixels(range(len(self.images)))
        self.tokens = torch.cat([self.model.tokens(part) for part in self.kept_pixels.split(BATCH)])
        self.raw = self.model.base_features(self.tokens)
        self.bank = ConfusionBank.from_logits(
            self.raw, self.model.base.logits(self.raw, base.classes), self.labels, self.ids, base.classes,
            backbone=self.backbone.fingerprint(),
        )  # fmt: skip
        self.model.use_bank(self.bank)
        position = {int(i): n for n, i in enumerate(self.ids)}
        self.stored = torch.tensor([position[int(i)] for i in self.bank.sample_ids])
        self.optimizer = torch.optim.AdamW(list(self.model.trainable().values()), lr=1e-4)
        self.batch = torch.randperm(len(self.images))[:BATCH]

    def pixels(self, positions: Sequence[int]) -> Tensor:
        """Images read, decoded and prepared, float [n, 3, H, W]."""
        return torch.stack([self.backbone.preprocess(self.images.image(i)) for i in positions])

    def losses(self) -> dict[str, Tensor]:
        """Of the same batch every time, with the same draws."""
        torch.manual_seed(1)
        return self.model.losses(
            self.tokens[self.batch], self.labels[self.batch], sample_ids=self.ids[self.batch],
            bank_tokens=lambda rows: self.tokens[self.stored[rows]], base_features=self.raw[self.batch],
        )  # fmt: skip

    def step(self) -> None:
        """Forward, backward, update."""
        loss = self.losses()["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def port_step(self) -> None:
        """The same with the loops of the port."""
        with Port(self.model):
            self.step()


def measure(rounds: int, shots: int = 4) -> dict[str, Any]:
    """Times of all steps, and what each cost of the released one amounts to alone."""
    scene = Scene(shots)
    with Port(scene.model):
        looped = scene.losses()["loss"]
    if not torch.allclose(looped, scene.losses()["loss"], rtol=1e-4):
        raise RuntimeError(f"the port computes another loss: {float(looped)} and {float(scene.losses()['loss'])}")
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.json"
        index.write_text(index_text(scene.images), encoding="utf-8")
        variants = {"released": Costs(), "released, nothing but its loops": NOTHING} | {
            f"released, with {name} alone": replace(NOTHING, **{name: True, "encode_images": name != "text_tower"})
            for name in ("text_tower", "encode_images")
        }
        steps: dict[str, Callable[[], object]] = {"capt": scene.step, "port": scene.port_step}
        for name, costs in variants.items():
            rival = Released(scene.backbone, scene.images, index, costs, scene.pixels, scene.kept_pixels, scene.raw)
            steps[name] = lambda rival=rival: rival.step(scene.batch)
        timings: dict[str, Timing] = interleaved(steps, rounds=rounds, warmup=1)
        size = index.stat().st_size
    ours = timings["capt"].median
    return {
        "schema": 1,
        "machine": machine_card(),
        "batch": BATCH, "k": scene.model.config.k, "classes": len(scene.images.classes), "bank": len(scene.bank),
        "images": len(scene.images), "index_file_bytes": size,
        "milliseconds": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_capt": {name: round(t.median / ours, 2) for name, t in timings.items() if name != "capt"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    for name, timing in found["milliseconds"].items():
        slower = found["times_slower_than_capt"].get(name, 1.0)
        print(f"{name:40s} {timing['median']:9.1f} ms ({timing['low']:.1f} to {timing['high']:.1f})  {slower:6.1f}x")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
