"""Optional packages, imported late and repaired where an installation needs it."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

from capt.backbones._torchvision import import_torchvision
from capt.errors import MissingDependencyError

_PACKAGE = {
    "open_clip": ("open_clip_torch", "open-clip"),
    "timm": ("timm", "open-clip"),
    "transformers": ("transformers", "hf"),
}


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import ``open_clip``, ``timm`` or ``transformers``.

    All three import torchvision when it is installed, so it is made importable first.

    Raises:
        MissingDependencyError: the package is not installed; the message names the extra that brings it.
    """
    package, extra = _PACKAGE[module]
    # transformers does without torchvision; for the others the import below reports what is missing.
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = package if error.name == module else str(error.name)
        raise MissingDependencyError(missing, purpose, extra) from error
