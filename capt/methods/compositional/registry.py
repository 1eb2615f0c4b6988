"""Compositional models by name and by their settings, and models from folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capt.errors import CaptError, DamagedFileError
from capt.methods.compositional.csp import CSP
from capt.methods.compositional.model import CompositionalConfig, CompositionalModel, ZeroShotPairs
from capt.methods.msci import MSCI
from capt.methods.tuned_model import read_state
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

MODELS: dict[str, type[CompositionalModel]] = {kind.kind: kind for kind in (ZeroShotPairs, CSP, MSCI)}


def model_type(config: CompositionalConfig) -> type[CompositionalModel]:
    """The model that these are the settings of.

    Raises:
        CaptError: they are of no compositional model.
    """
    for kind in MODELS.values():
        if kind.config_type is type(config):
            return kind
    known = ", ".join(kind.config_type.__name__ for kind in MODELS.values())
    raise CaptError(f"config: expected settings of a compositional model ({known}), found {config!r}")


def config_from_dict(kind: str, values: Mapping[str, Any]) -> CompositionalConfig:
    """Settings as a record holds them: tuples have become lists, the training options a mapping."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return MODELS[kind].config_type(**{**plain, "training": TrainingOptions(**values["training"])})


def load_model(folder: str | Path, backbone: Backbone) -> CompositionalModel:
    """The model that :meth:`CompositionalModel.save` wrote, in evaluation mode.

    Raises:
        DataError: there is none.
        DamagedFileError: a file was changed, or is of another format.
        CaptError: ``backbone`` is not the one it was trained on.
    """
    folder = Path(folder)
    record = read_state(folder, backbone, MODELS, "compositional model")
    kind = record["method"]
    try:
        model = MODELS[kind](
            backbone, record["states"], record["objects"], torch.tensor(record["train_pairs"]).reshape(-1, 2),
            config_from_dict(kind, record["config"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"'{folder / 'state.json'}': not what a '{kind}' model writes ({error!r}); fit it again"
        ) from error
    model.restore(folder, record)
    return model.eval()
