"""What CAPT is compared with: adapters and a cache on the features of the same base model, of the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from capt.files import load_tensors, save_tensors
from capt.methods.base.model import BaseModel
from capt.methods.base.registry import load_base
from capt.methods.base.tip_adapter import TipAdapter
from capt.methods.baselines import BottleneckAdapter, LinearAdapter, adapter_loss
from capt.methods.capt import CAPT
from capt.methods.runs.options import Progress, RunOptions
from capt.methods.runs.views import Views, rows_of
from capt.training import TrainingOptions, train

Adapter: TypeAlias = LinearAdapter | BottleneckAdapter
_KINDS: dict[str, type[LinearAdapter] | type[BottleneckAdapter]] = {
    "linear_adapter": LinearAdapter,
    "plain_adapter": BottleneckAdapter,
}


def fit_rivals(
    base: BaseModel, raw: Sequence[Tensor], labels: Tensor, text: Tensor, capt: CAPT, options: RunOptions, seed: int,
    folder: Path, progress: Progress,
) -> tuple[dict[str, Adapter], TipAdapter | None]:  # fmt: skip
    """Train and store the rivals that ``options`` name.

    Args:
        raw: base features float [N, d], un-normalised, of the training images, one tensor a view.
        labels: int64 [N].
        text: float [C, d], class texts of the base model.
        capt: whose size and training the plain adapter takes over.
    """
    views, labels = rows_of(raw), labels.to(text.device)
    adapters: dict[str, Adapter] = {}
    for name in [name for name in _KINDS if name in options.rivals]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter: Adapter
            if name == "linear_adapter":
                adapter, training = LinearAdapter(base.dim), options.linear
            else:
                count = sum(parameter.numel() for parameter in capt.trainable().values())
                adapter, training = BottleneckAdapter.with_parameters(base.dim, count), capt.config.training
        _fit(adapter.to(text.device), name, views, labels, base, text, training, seed, progress)
        save_tensors(folder / f"{name}.safetensors", dict(adapter.state_dict()))
        adapters[name] = adapter.eval()
    if not _has_tip(base, options.rivals):
        return adapters, None
    tip = TipAdapter(base.backbone, capt.class_names)
    tip.prepare(views.plain, labels)
    tip.finish()
    tip.save(folder / "tip")
    return adapters, tip


def _fit(
    adapter: Adapter, name: str, views: Views, labels: Tensor, base: BaseModel, text: Tensor,
    training: TrainingOptions, seed: int, progress: Progress,
) -> None:  # fmt: skip
    def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
        features = views.take(batch, views.choose(batch, generator))
        return {"loss": adapter_loss(adapter, features, text, labels[batch], base.logit_scale)}

    def after(epoch: int, epochs: int, loss: float) -> None:
        progress(f"seed {seed}: {name.replace('_', ' ')}, loss {loss:.3f}", epoch, epochs)

    train(
        adapter.parameters(), step, len(labels), training, generator=torch.Generator().manual_seed(seed), progress=after
    )


def _has_tip(base: BaseModel, names: Sequence[str]) -> bool:
    """A cache is compared with; not where the base model is that very cache: its votes would count twice."""
    return "tip_adapter" in names and base.kind != TipAdapter.kind


def load_rivals(
    folder: Path, base: BaseModel, names: Sequence[str]
) -> tuple[dict[str, Adapter], TipAdapter | None]:  # fmt: skip
    """The rivals that :func:`fit_rivals` stored."""
    adapters: dict[str, Adapter] = {}
    for name in [name for name in _KINDS if name in names]:
        tensors = load_tensors(folder / f"{name}.safetensors")
        adapters[name] = _KINDS[name].like(tensors)
        adapters[name].load_state_dict(tensors)
        adapters[name].to(base.backbone.device).eval()
    tip = load_base(folder / "tip", base.backbone) if _has_tip(base, names) else None
    assert tip is None or isinstance(tip, TipAdapter)
    return adapters, tip
