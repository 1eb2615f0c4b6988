"""Multi-label models by name and by their settings, and models from folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt.errors import CaptError, DamagedFileError
from capt.methods.cprfl import CPRFL
from capt.methods.multi_label.model import LinearLabels, MultiLabelConfig, MultiLabelModel, ZeroShotLabels
from capt.methods.tuned_model import read_state
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

MODELS: dict[str, type[MultiLabelModel]] = {kind.kind: kind for kind in (ZeroShotLabels, LinearLabels, CPRFL)}


def model_type(config: MultiLabelConfig) -> type[MultiLabelModel]:
    """The model that these are the settings of.

    Raises:
        CaptError: they are of no multi-label model.
    """
    for kind in MODELS.values():
        if kind.config_type is type(config):
            return kind
    known = ", ".join(kind.config_type.__name__ for kind in MODELS.values())
    raise CaptError(f"config: expected settings of a multi-label model ({known}), found {config!r}")


def config_from_dict(kind: str, values: Mapping[str, Any]) -> MultiLabelConfig:
    """Settings as a record holds them: the training options are a mapping there."""
    return MODELS[kind].config_type(**{**values, "training": TrainingOptions(**values["training"])})


def load_model(folder: str | Path, backbone: Backbone) -> MultiLabelModel:
    """The model that :meth:`MultiLabelModel.save` wrote, in evaluation mode; nothing of it learns.

    Raises:
        DataError: there is none.
        DamagedFileError: a file was changed, or is of another format.
        CaptError: ``backbone`` is not the one it was trained on.
    """
    folder = Path(folder)
    record = read_state(folder, backbone, MODELS, "multi-label model")
    kind = record["method"]
    try:
        model = MODELS[kind](backbone, record["classes"], config_from_dict(kind, record["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"'{folder / 'state.json'}': not what a '{kind}' model writes ({error!r}); fit it again"
        ) from error
    model.restore(folder, record)
    return model.requires_grad_(False).to(backbone.device).eval()
