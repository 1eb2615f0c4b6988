"""Training of one compositional model for one seed, with the best epoch chosen on validation images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capt.methods.compositional.model import CompositionalConfig, CompositionalModel
from capt.methods.compositional.registry import model_type
from capt.methods.compositional.scoring import closed_world, encode_pairs, labels_of, score
from capt.methods.runs.inputs import InputCache
from capt.methods.runs.options import Progress
from capt.methods.runs.views import Views
from capt.training import train

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import CompositionalSet


def make_model(config: CompositionalConfig, data: CompositionalSet, backbone: Backbone) -> CompositionalModel:
    """A fresh model of these settings for the training pairs of ``data``."""
    pairs = torch.from_numpy(data.pairs[data.split_pairs["train"]])
    return model_type(config)(backbone, data.states, data.objects, pairs, config).to(backbone.device)


def fit_model(
    name: str,
    config: CompositionalConfig,
    data: CompositionalSet,
    cache: InputCache,
    seed: int,
    folder: Path,
    progress: Progress,
) -> CompositionalModel:
    """Train one model and leave it at the epoch with the best validation AUC (closed world, exact curve).

    Validation images that are all of seen or all of unseen pairs have no AUC: their best accuracy takes its place.

    ``metrics.jsonl`` and ``validation.jsonl`` in ``folder`` hold losses and validation metrics of every epoch.
    """
    device = cache.backbone.device
    folder.mkdir(parents=True, exist_ok=True)
    metrics, log = folder / "metrics.jsonl", folder / "validation.jsonl"
    for path in (metrics, log):
        path.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_model(config, data, cache.backbone)
        labels = _train_labels(data).to(device)
        plain = cache(model, data.train, "train")
        views = Views(
            [plain, *(cache(model, data.train, "train", v) for v in range(config.views))], torch.arange(len(labels))
        )
        validation, space = cache(model, data.val, "val"), closed_world(data, "val")
        answers, clean = labels_of(data, "val"), config.profile == "clean"
        best, kept = -1.0, model.state()

        def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
            return model.losses(views.take(batch, views.choose(batch, generator)), labels[batch], generator)

        def after(epoch: int, epochs: int, loss: float) -> None:
            nonlocal best, kept
            model.eval()
            texts = encode_pairs(model, space)
            if clean:
                curve = score(model, texts, space, validation, answers).best_pairs().curve()
                model.train()
            else:
                # The published code selects by its grid of biases, with weights of 1 and without repeated primitives;
                # and it never goes back to training mode.
                texts = texts._replace(world=1)
                curve = score(model, texts, space, validation, answers, weights=(1, 1, 1)).best_pairs().grid_curve()
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"epoch": epoch, **curve.record()}) + "\n")
            both = curve.n_seen and curve.n_unseen
            measure, value = ("AUC", curve.auc) if both else ("accuracy", max(curve.best_seen, curve.best_unseen))
            if value > best:
                best, kept = value, {key: value.detach().clone() for key, value in model.state().items()}
            progress(f"seed {seed}: {name}, loss {loss:.3f}, best validation {measure} {100 * best:.1f}", epoch, epochs)

        model.train()
        train(
            model.trainable().values(), step, len(labels), config.training,
            generator=torch.Generator().manual_seed(seed), metrics_path=metrics, progress=after,
        )  # fmt: skip
        model.load_state_dict(kept, strict=False)
    return model.requires_grad_(False).eval()


def _train_labels(data: CompositionalSet) -> Tensor:
    """Place of each training image's pair in the list of training pairs, int64 [N]."""
    listed = data.split_pairs["train"]
    place = torch.full((len(data.pairs),), -1)
    place[torch.from_numpy(listed.copy())] = torch.arange(len(listed))
    return place[torch.from_numpy(data.train.labels.copy())]
