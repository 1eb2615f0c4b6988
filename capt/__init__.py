"""capt: teach a CLIP-family model from its own confusions, new pairs of states and objects, and rare labels.

Names are loaded on first use, so ``import capt`` needs and loads only the core dependencies.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "wrap": "capt.backbones",
    "load": "capt.backbones",
    "Backbone": "capt.backbones",
    "ConfusionBank": "capt.bank",
    "CAPT": "capt.methods.capt",
    "MSCI": "capt.methods.msci",
    "CenterBias": "capt.methods.center_bias",
    "CPRFL": "capt.methods.cprfl",
    "SemanticConfusionMiner": "capt.modules",
    "SampleConfusionMiner": "capt.modules",
    "DiffMannerAdapter": "capt.modules",
    "MultiGranularityDifferenceExpert": "capt.modules",
}
_SUBMODULES = (
    "backbones", "bank", "data", "errors", "evaluation", "methods", "modules", "ops", "reference", "report", "training",
)  # fmt: skip

__all__ = ["__version__", *_LAZY, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"capt.{name}")
    raise AttributeError(f"module 'capt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
