"""Base models that learn without labels: which images they read beside the few-shot list, and how that is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capt.data import ImageSet
from capt.errors import CaptError, DataError
from capt.files import read_json
from capt.methods.base.registry import BASES, base_type
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs.options import RunOptions
from capt.methods.runs.protocol import Protocol


def unlabelled_images(protocol: Protocol, options: RunOptions) -> tuple[ImageSet, tuple[str, ...]]:
    """Images and class names for learning without labels.

    All training images of the trained classes; with ``transductive`` those of the other classes, too.

    Raises:
        DataError: one of them is also a validation or test image.
    """
    images, names, others = protocol.train, protocol.classes, protocol.unlabelled
    if options.transductive and others is not None:
        images, names = protocol.data.train, (*names, *others.classes)
    if protocol.forbidden.intersection(map(int, images.ids)):
        raise DataError(
            f"data set '{protocol.data.name}': unlabelled training images also occur in the validation or test split"
        )
    return images, names


def beyond_shots(
    protocol: Protocol, options: RunOptions, variants: Mapping[str, CAPTConfig]
) -> dict[str, Any]:
    """For the run record: ``unlabelled_images`` read without labels, ``transductive`` if some are of new classes.

    A base model taken from the folder of an earlier run brings along what that run recorded.
    """
    n_images = len(unlabelled_images(protocol, options)[0]) if _label_free(options, variants) else 0
    record = Path(options.base) / "run.json"
    earlier = read_json(record) if options.base not in BASES and record.is_file() else {}
    return {
        "unlabelled_images": max(n_images, int(earlier.get("unlabelled_images", 0))),
        "transductive": options.transductive or bool(earlier.get("transductive", False)),
    }


def refuse_transductive(protocol: Protocol, options: RunOptions, variants: Mapping[str, CAPTConfig]) -> None:
    """Raise :class:`CaptError` where ``transductive`` would be recorded although nothing new could be learned from."""
    if protocol.unlabelled is None:
        raise CaptError(
            f"transductive: no image of a tested class is read under {protocol.name!r}, which is inductive here; leave "
            "it out, or use base-to-novel"
        )
    if not _label_free(options, variants):
        raise CaptError(
            f"transductive: base {options.base!r} learns from labelled images alone; leave it out, or use a base model "
            "that learns without labels (promptkd)"
        )


def _label_free(options: RunOptions, variants: Mapping[str, CAPTConfig]) -> bool:
    kinds = {options.base, *(config.bank_source for config in variants.values())} & set(BASES)
    return any(not base_type(kind).uses_labels for kind in kinds)
