"""``capt fit cprfl`` and ``capt fit linear-labels``: any number of labels an image, some of them rare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from capt.cli.common import Data, DataOptions, Model, ModelOptions, Spec, check_out
from capt.cli.fit import fit_models
from capt.errors import CaptError
from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.model import LinearLabelsConfig
from capt.methods.multi_label.run import MultiLabelOptions, MultiLabelRun
from capt.methods.runs.seeds import row_name

Options = Annotated[MultiLabelOptions, tyro.conf.arg(name="")]
Rival = Literal["linear-bce", "linear-asl"]
_LOSSES: dict[Rival, Literal["bce", "asl"]] = {"linear-bce": "bce", "linear-asl": "asl"}


def fit_cprfl(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/cprfl"),
    options: Options = MultiLabelOptions(),  # noqa: B008 - frozen
    config: Annotated[CPRFLConfig, tyro.conf.arg(name="")] = CPRFLConfig(),  # noqa: B008 - frozen
    rivals: tuple[Rival, ...] = ("linear-bce", "linear-asl"),
    linear: LinearLabelsConfig = LinearLabelsConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train CPRFL on images with any number of labels and test it beside zero-shot and linear classifiers.

    Args:
        data: clipart, a list with the columns path, labels and split, or coco-lt or voc-lt with --root.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for trained models, logs and summary.
        options: seeds, validation images, which classes are head, medium and tail.
        config: settings of the method.
        rivals: linear classifiers trained beside it, with cross-entropy and with the asymmetric loss; '--rivals' alone
            leaves them out.
        linear: settings of the linear classifiers; the loss of each is that of its name.
        json: print summary.json instead of a table.
    """
    if linear.loss != LinearLabelsConfig().loss:
        raise CaptError("--linear.loss: a rival has the loss of its name; choose with --rivals, or 'fit linear-labels'")
    beside = {row_name(rival): replace(linear, loss=_LOSSES[rival]) for rival in rivals}
    models = {**beside, "cprfl": config}
    return fit_models(MultiLabelRun, where.open_labels(data), model, check_out(out), options, models, json)


def fit_linear_labels(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/linear-labels"),
    options: Options = MultiLabelOptions(),  # noqa: B008 - frozen
    config: Annotated[LinearLabelsConfig, tyro.conf.arg(name="")] = LinearLabelsConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train a linear classifier of any number of labels on the frozen image feature, and test it beside zero-shot.

    Args:
        data: clipart, a list with the columns path, labels and split, or coco-lt or voc-lt with --root.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for the trained model, logs and summary.
        options: seeds, validation images, which classes are head, medium and tail.
        config: settings of the classifier, its loss among them.
        json: print summary.json instead of a table.
    """
    models = {row_name(f"linear-{config.loss}"): config}
    return fit_models(MultiLabelRun, where.open_labels(data), model, check_out(out), options, models, json)
