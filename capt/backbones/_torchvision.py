"""Make torchvision importable beside a torch build that cannot load its compiled operators."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_KEEP_ALIVE: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Return torchvision, declaring the two operators whose absence stops its import.

    A CUDA build of torchvision beside a CPU build of torch cannot load its library; its import then dies
    on ``torchvision::nms``. Declaring the schemas (no kernels: no CLIP model calls them) is enough. Where
    torchvision imports as it is, nothing is declared.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    # A Library unregisters its operators when it is collected, so a reference has to stay.
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEEP_ALIVE.append(library)
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
