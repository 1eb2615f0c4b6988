"""A run: train every seed with the test split locked, then open it once.

Beside what every run folder holds, ``scores.safetensors``: logits and targets of all test images, from which all
metrics and figures follow, and ``classes.json``: what the model does on each class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from capt.backbones.transforms import EvalTransform
from capt.data.lock import lock_test
from capt.data.multi_label import THRESHOLDS
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation.multi_label import GROUPS, MultiLabelResult, label_metrics
from capt.files import read_json
from capt.methods.multi_label.model import MultiLabelConfig, MultiLabelModel
from capt.methods.multi_label.registry import config_from_dict, load_model, model_type
from capt.methods.multi_label.training import choose_thresholds, fit_model, make_model, scores
from capt.methods.runs.compared import TRAINED_ON, ComparedRun, Outcome
from capt.methods.runs.inputs import InputCache
from capt.methods.runs.options import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from capt.backbones import Backbone
    from capt.data import MultiLabelImages, MultiLabelSet

METRICS = ("map", *(f"map_{group}" for group in GROUPS))


@dataclass(frozen=True)
class MultiLabelOptions:
    """What a run does beside the methods themselves.

    Attributes:
        seeds: one model each.
        val_fraction: part of the training images that is held out for validation where the data has no such split.
        head: least training images of a head class.
        medium: least training images of a medium class; rarer ones are tail.
        resize: ``squash`` whole pictures to the model's size, or prepare them as the model does (``native``), which
            may cut off what is not in the middle.
        token_memory: bytes of frozen inputs to keep for each split; above it they are computed again when needed.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    val_fraction: float = 0.15
    head: int = THRESHOLDS[0]
    medium: int = THRESHOLDS[1]
    resize: Literal["squash", "native"] = "squash"
    token_memory: int = 2 << 30

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise CaptError(f"seeds: expected distinct numbers of 0 or more, at least one, found {list(self.seeds)}")
        if not 0 < self.val_fraction < 1:
            raise CaptError(f"val_fraction: expected a number between 0 and 1, found {self.val_fraction}")
        if not self.head >= self.medium >= 0:
            raise CaptError(f"head, medium: expected head >= medium >= 0, found {self.head} and {self.medium}")
        if self.resize not in ("squash", "native"):
            raise CaptError(f"resize: expected 'squash' or 'native', found {self.resize!r}")
        if self.token_memory < 0:
            raise CaptError(f"token_memory: expected 0 or more, found {self.token_memory}")


def picture_transform(backbone: Backbone, resize: str) -> Callable[..., Tensor]:
    """Evaluation transform of a backbone: its own, or one that squashes whole pictures to its size."""
    if resize == "native":
        return backbone.preprocess
    like = backbone.train_transform
    return EvalTransform(like.size, like.mean, like.std, like.interpolation, resize_mode="squash")


class MultiLabelRun(ComparedRun[MultiLabelModel]):
    """A :class:`ComparedRun` on images with any number of labels."""

    protocol = "multi-label"
    data: MultiLabelSet
    options: MultiLabelOptions

    def __init__(
        self, data: MultiLabelSet, backbone: Backbone, models: Mapping[str, MultiLabelConfig],
        options: MultiLabelOptions | None = None, *, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Prepare; no image is opened yet. ``models``: settings by row name."""
        super().__init__(backbone, models, options or MultiLabelOptions(), progress)
        if data.test is None or not len(data.test):
            raise DataError(f"'{data.name}' has no test images; a list needs a column 'split' with 'train' and 'test'")
        if data.val is None:
            data = data.hold_out(self.options.val_fraction)
        for split, images in data.splits().items():
            if not images.counts.any():
                raise DataError(f"'{data.name}': none of the {len(images)} '{split}' images has a label; expected some")
        self.data = lock_test(data, self.lock)
        transform = picture_transform(backbone, self.options.resize)
        self.cache = InputCache(backbone, self.options.token_memory, self.progress, transform)

    # ---- training ------------------------------------------------------------------------------------

    def _check(self) -> None:
        with torch.random.fork_rng(devices=[]):
            for config in self.models.values():
                make_model(config, self.data, self.backbone)
                config.make_loss(self.data.train)

    def _kind(self, config: MultiLabelConfig) -> str:
        return model_type(config).kind

    def _details(self) -> dict[str, Any]:
        return {"classes": list(self.data.classes), "frequency": self.data.frequency.tolist()}

    def _trained_on(self) -> Iterable[str]:
        return [*self.data.train.names, *self._validation.names]

    def _fit_one(self, name: str, config: MultiLabelConfig, seed: int, folder: Path) -> MultiLabelModel:
        return fit_model(name, config, self.data, self.cache, seed, folder, self.progress)

    @property
    def _validation(self) -> MultiLabelImages:
        assert self.data.val is not None  # made where the data has none
        return self.data.val

    # ---- evaluation ----------------------------------------------------------------------------------

    def _zero_shot(self) -> MultiLabelModel:
        model = make_model(MultiLabelConfig(), self.data, self.backbone).eval()
        choose_thresholds(model, self._validation, self.cache(model, self._validation, "val"))
        return model

    def _evaluate_one(self, what: str, model: MultiLabelModel) -> Outcome:
        images = self.data.test
        assert images is not None
        found = scores(
            model, self.cache(model, images, "test"), len(images),
            lambda done, total: self.progress(f"evaluating {what}", done, total),
        )  # fmt: skip
        thresholds = model.thresholds.cpu()
        targets = torch.from_numpy(images.targets.copy())
        result = MultiLabelResult.of(
            found, targets, self.data.frequency, thresholds=(self.options.head, self.options.medium)
        )
        classes = [
            {"name": self.data.classes[one["class"]], "threshold": float(thresholds[one["class"]]), **one}
            for one in result.by_frequency()
        ]
        tensors = {"scores": found, "targets": targets, "thresholds": thresholds}
        metrics = _metrics(result, found, targets, thresholds)
        return Outcome(metrics, ("scores.safetensors", tensors), {"classes.json": classes})

    def _shown(self, metrics: Mapping[str, float]) -> list[str]:
        # A group without a class that has a positive has no mean.
        return [name for name in METRICS if name in metrics]

    def _sizes(self) -> dict[str, Any]:
        groups = vars(self.data.groups((self.options.head, self.options.medium)))
        return {
            "classes": len(self.data.classes),
            "groups": {name: len(ids) for name, ids in groups.items()},
            "images": self.data.counts(),
        }


def _metrics(result: MultiLabelResult, found: Tensor, targets: Tensor, thresholds: Tensor) -> dict[str, float]:
    """mAP by group; F1 at probability one half, at the chosen thresholds and of the three best; shares in [0, 1]."""
    metrics = {"map": result.mean(), "excluded_classes": float(len(result.excluded))}
    for group in GROUPS:
        metrics[f"map_{group}"] = result.mean(group)
    ways: dict[str, dict[str, Any]] = {
        "half": {"threshold": 0.0},
        "chosen": {"threshold": thresholds.numpy()},
        "top3": {"threshold": None, "top_k": 3},
    }
    for name, options in ways.items():
        of = label_metrics(found, targets, **options)
        metrics |= {f"{key.lower()}_{name}": float(value) for key, value in of.items() if key != "excluded_classes"}
    return {name: value for name, value in metrics.items() if value == value}


def evaluate(
    run: str | Path, data: MultiLabelSet, backbone: Backbone, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Score a finished run's models on a data set again; the run's record counts it, its files stay as they are.

    Raises:
        DataError: the data set has other classes, or a test image was trained on.
        DamagedFileError: ``run.json`` is not the record of a multi-label run.
        CaptError: the backbone is not the run's.
    """
    run = Path(run)
    record = read_json(run / "run.json")
    try:
        options = options_from_dict(record["options"])
        configs = {
            name: config_from_dict(values["kind"], {k: v for k, v in values.items() if k != "kind"})
            for name, values in record["models"].items()
        }
        classes, frequency = list(record["classes"]), np.array(record["frequency"], np.int64)
        if frequency.shape != (len(classes),):
            raise ValueError(f"{len(classes)} classes, {frequency.size} frequencies")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(
            f"'{run / 'run.json'}': not the record of a multi-label run ({error!r}); fit it again"
        ) from error
    if list(data.classes) != classes:
        raise DataError(
            f"'{run}' was trained for {len(classes)} classes, '{data.name}' has {len(data.classes)}, others or in "
            "another order; evaluate it on data with those classes, or fit a new run"
        )
    if data.test is not None and (leaked := sorted(set(read_json(run / TRAINED_ON)) & set(data.test.names))):
        raise DataError(
            f"'{run}' was trained on {len(leaked)} of the test images of '{data.name}', such as '{leaked[0]}'; "
            "evaluate it on the splits it was trained with"
        )
    models = {
        seed: {name: load_model(run / f"seed-{seed}" / name, backbone) for name in configs} for seed in options.seeds
    }
    # Groups are those of the data that the run was trained on.
    again = MultiLabelRun(replace(data, frequency=frequency), backbone, configs, options, progress=progress)
    return again.evaluate(run, models, write=False)


def options_from_dict(values: Mapping[str, Any]) -> MultiLabelOptions:
    """Options as ``run.json`` holds them."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return MultiLabelOptions(**plain)
