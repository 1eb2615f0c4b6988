"""Base models by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt.errors import CaptError, DamagedFileError
from capt.methods.base.model import BaseConfig, BaseModel, read_record
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

# Where each model is written; imported on use.
_PLACES = {
    "zero-shot": ("capt.methods.base.model", "ZeroShot"),
    "coop": ("capt.methods.base.coop", "CoOp"),
    "ivlp": ("capt.methods.base.ivlp", "IVLP"),
    "promptsrc": ("capt.methods.base.promptsrc", "PromptSRC"),
    "promptkd": ("capt.methods.base.promptkd", "PromptKD"),
    "tip-adapter": ("capt.methods.base.tip_adapter", "TipAdapter"),
    "linear-probe": ("capt.methods.base.linear_probe", "LinearProbe"),
    "dpc": ("capt.methods.base.dpc", "DPCStyle"),
}

BASES = tuple(_PLACES)


def base_type(kind: str) -> type[BaseModel]:
    """The class of a base model.

    Raises:
        CaptError: no such model.
    """
    if kind not in _PLACES:
        raise CaptError(f"base: found {kind!r}, expected one of {', '.join(BASES)}, or the folder of a fitted run")
    module, name = _PLACES[kind]
    found: type[BaseModel] = getattr(importlib.import_module(module), name)
    return found


def make_base(kind: str, backbone: Backbone, class_names: Sequence[str], config: BaseConfig | None = None) -> BaseModel:
    """A base model that is not trained yet."""
    return base_type(kind)(backbone, class_names, config)


def load_base(folder: str | Path, backbone: Backbone) -> BaseModel:
    """A base model that was written by :meth:`BaseModel.save`, frozen.

    Raises:
        DataError, DamagedFileError, CaptError: see :func:`read_record` and :meth:`BaseModel.restore`.
    """
    folder = Path(folder)
    record = read_record(folder, backbone)
    kind = base_type(record["kind"])
    model = kind.stored(folder, backbone, record["class_names"], base_config(kind, record["config"], folder))
    model.restore(folder, record)
    return model.to(backbone.device).finish()


def base_config(kind: type[BaseModel], values: dict[str, Any], where: Path | str = "") -> BaseConfig:
    """The configuration that ``dataclasses.asdict`` turned into a dictionary."""
    known = {field.name for field in fields(kind.config_type)}
    try:
        if unknown := set(values) - known:
            raise TypeError(f"unknown settings {sorted(unknown)}")
        training = TrainingOptions(**values["training"])
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        plain["training"] = training
        return kind.config_type(**plain)
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"'{where}': the stored configuration does not fit this version: {error}") from error
