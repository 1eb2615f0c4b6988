"""Peak memory of one training pass over many classes, in a process of its own: prints announced and measured bytes."""

from __future__ import annotations

import json
import sys

import torch

import capt
from capt.backbones import import_torchvision
from capt.modules.prompts import TextPrompts

N_CLASSES = 1000


def resident(what: str) -> int:
    """A line of /proc/self/status, bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{what}:"))


def main(chunk: int, quick_gelu: bool) -> None:
    """Print JSON: announced and measured bytes of one pass there and back."""
    torch.set_num_threads(1)
    import_torchvision()
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
    model = open_clip.CLIP(128, vision, text, quick_gelu=quick_gelu)
    backbone = capt.wrap(model, open_clip.get_tokenizer("ViT-B-32", context_length=24))
    prompts = TextPrompts(backbone, depth=4, chunk=chunk)
    names = [f"{first} number {i}" for i in range(N_CLASSES // 2) for first in ("cat", "a rather large red dog")]
    TextPrompts(backbone, depth=4, chunk=1)(backbone, names[:2]).sum().backward()  # imports and work space
    announced = prompts.memory(backbone, names)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # forget the peak so far
    before = resident("VmRSS")
    prompts(backbone, names).square().sum().backward()
    print(json.dumps({"announced": announced, "measured": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "quick")
