"""Training of one multi-label model for one seed, its epoch and thresholds chosen on validation images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capt.data.multi_label import MultiLabelImages
from capt.evaluation.multi_label import MultiLabelResult, best_thresholds
from capt.methods.multi_label.model import MultiLabelConfig, MultiLabelModel
from capt.methods.multi_label.registry import model_type
from capt.methods.runs.inputs import InputCache
from capt.methods.runs.options import Progress
from capt.methods.runs.views import Views
from capt.training import WeightAverage, train

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import MultiLabelSet

IMAGES = 32  # scored together


def make_model(config: MultiLabelConfig, data: MultiLabelSet, backbone: Backbone) -> MultiLabelModel:
    """A fresh model of these settings for the classes of ``data``."""
    return model_type(config)(backbone, data.classes, config).to(backbone.device)


@torch.no_grad()
def scores(
    model: MultiLabelModel, inputs: Callable[[Tensor], Tensor], n_images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Logits float32 [N, C] on the CPU of all images, in evaluation mode.

    Args:
        inputs: image positions int64 [B] -> the model's inputs of these images.
        progress: called with (images done, images).
    """
    parts = []
    for batch in torch.arange(n_images).split(IMAGES):
        parts.append(model.logits(inputs(batch)).float().cpu())
        if progress is not None:
            progress(int(batch[-1]) + 1, n_images)
    return torch.cat(parts)


def fit_model(
    name: str,
    config: MultiLabelConfig,
    data: MultiLabelSet,
    cache: InputCache,
    seed: int,
    folder: Path,
    progress: Progress,
) -> MultiLabelModel:
    """Train one model and leave it at the epoch with the best validation mAP, with thresholds of the best F1 there.

    With ``ema`` the moving average of the weights is what is validated and kept. ``metrics.jsonl`` and
    ``validation.jsonl`` in ``folder`` hold losses and validation mAP of every epoch, that of the raw weights as well.
    """
    validation = data.val
    assert validation is not None  # a run makes one
    device = cache.backbone.device
    folder.mkdir(parents=True, exist_ok=True)
    metrics, log = folder / "metrics.jsonl", folder / "validation.jsonl"
    for path in (metrics, log):
        path.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_model(config, data, cache.backbone)
        loss = config.make_loss(data.train).to(device)
        targets = torch.from_numpy(data.train.targets.copy()).to(device)
        views = Views(
            [cache(model, data.train, "train", view) for view in (None, *range(config.views))],
            torch.arange(len(targets)),
        )
        seen = cache(model, validation, "val")
        plain = (views.plain(batch) for batch in torch.arange(len(targets)).split(IMAGES))
        model.prepare(plain, torch.from_numpy(data.train.counts.copy()))
        average = WeightAverage(model.trainable(), config.ema) if config.ema else None
        best, kept = -1.0, model.state()

        def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
            return {"loss": loss(model.logits(views.take(batch, views.choose(batch, generator))), targets[batch])}

        def validated(averaged: bool) -> MultiLabelResult:
            with average.applied() if average and averaged else nullcontext():
                return MultiLabelResult.of(scores(model, seen, len(validation)), validation.targets, data.frequency)

        def after(epoch: int, epochs: int, mean_loss: float) -> None:
            nonlocal best, kept
            model.eval()
            result = validated(averaged=True)
            record = {"epoch": epoch, **result.record()}
            if average:
                record["raw_map"] = validated(averaged=False).mean()
            model.train()
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            if result.mean() > best:
                best = result.mean()
                with average.applied() if average else nullcontext():
                    kept = {key: value.detach().clone() for key, value in model.state().items()}
            progress(f"seed {seed}: {name}, loss {mean_loss:.4f}, best validation mAP {100 * best:.1f}", epoch, epochs)

        model.train()
        train(
            model.trained_by_rate(), step, len(targets), config.training,
            generator=torch.Generator().manual_seed(seed), metrics_path=metrics, progress=after,
            after_step=average.update if average else None, before_epoch=model.start_epoch,
        )  # fmt: skip
        model.load_state_dict(kept, strict=False)
    model.requires_grad_(False).eval()
    choose_thresholds(model, validation, seen)
    return model


def choose_thresholds(model: MultiLabelModel, images: MultiLabelImages, inputs: Callable[[Tensor], Tensor]) -> None:
    """Set the model's thresholds to those of the best F1 of each class on these (validation) images.

    A class that none of them shows gets the one threshold that is best for all classes together.
    """
    found, targets = scores(model, inputs, len(images)), images.targets
    (common,) = best_thresholds(found.reshape(-1, 1), targets.reshape(-1, 1), default=0.0)
    model.thresholds.copy_(torch.from_numpy(best_thresholds(found, targets, default=float(common))))
