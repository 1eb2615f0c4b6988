"""Refuse a model whose activation is not the one its weights were trained with.

open_clip names such as ``ViT-B-32`` build GELU, while OpenAI's weights (and all that were fine-tuned from them)
want QuickGELU. Nothing in the weights says so, and a wrong choice costs points without any error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from capt.backbones._optional import import_optional
from capt.errors import CaptError

_QUICK_WORDS = ("quickgelu", "quick_gelu", "negclip")


def expected_quick_gelu(name: str | None, pretrained: str | None) -> bool | None:
    """Whether weights called so were trained with QuickGELU; None when the names do not tell.

    ``name`` is an open_clip architecture or a hub id, ``pretrained`` an open_clip tag or a file.
    """
    said = [Path(pretrained).name.lower() if pretrained else "", (name or "").lower()]
    if any(word in text for word in _QUICK_WORDS for text in said):
        return True
    if "openai/clip" in said[1] or said[0].startswith("openai"):
        return True
    if not name or not pretrained:
        return None
    open_clip = import_optional("open_clip", "looking up pretrained weights")
    known = open_clip.get_pretrained_cfg(name, pretrained)
    return bool(known.get("quick_gelu", False)) if known else None


def check_activation(found: list[str], name: str | None, pretrained: str | None, allow: bool) -> None:
    """Compare the towers' activations with what the model's names imply.

    Raises:
        CaptError: they disagree and ``allow`` is false.
    """
    expected = expected_quick_gelu(name, pretrained)
    gelus = [activation for activation in found if activation in ("gelu", "quick_gelu")]
    wanted = "quick_gelu" if expected else "gelu"
    if expected is None or not gelus or wanted in gelus:
        return
    label = "/".join(part for part in (name, pretrained) if part)
    remedy = (
        "the model name that ends in '-quickgelu' (or open_clip.create_model with force_quick_gelu=True)"
        if expected
        else "the model name without '-quickgelu'"
    )
    _refuse(f"model: built with {gelus[0]}, but the weights {label!r} were trained with {wanted}. Use {remedy}", allow)


def check_transformers_activation(model: Any, allow: bool) -> None:
    """Compare a transformers model's activation modules with its configuration.

    Raises:
        CaptError: they disagree and ``allow`` is false.
    """
    from transformers.activations import ACT2FN

    for side in ("vision", "text"):
        wanted = getattr(model.config, f"{side}_config").hidden_act
        found = getattr(model, f"{side}_model").encoder.layers[0].mlp.activation_fn
        if type(ACT2FN[wanted]) is not type(found):
            message = f"model: the {side} tower runs {type(found).__name__}, but its configuration says {wanted!r}. "
            _refuse(message + "Load the model again with from_pretrained", allow)


def _refuse(message: str, allow: bool) -> None:
    if not allow:
        raise CaptError(f"{message}, or pass allow_activation_mismatch=True if you know better.")
    warnings.warn(f"{message}; going on because allow_activation_mismatch=True.", stacklevel=4)
