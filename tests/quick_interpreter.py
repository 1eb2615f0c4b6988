"""Triton's interpreter without its largest cost: it patches the language anew for every function a kernel calls."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


class _Kept:
    """A patch that stays: this process only interprets."""

    def restore(self) -> None:
        """Nothing to undo."""


def quicken() -> None:
    """Patch the language once for each module that kernels live in; without effect if Triton works otherwise."""
    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    seen: dict[int, Any] = {}

    def once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in seen:
            seen[module] = original(fn)
        return _Kept()

    interpreter._patch_lang = once
