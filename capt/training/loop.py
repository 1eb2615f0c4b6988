"""One training loop for every method: shuffled mini-batches, warm-up, cosine, clipping, NaN stop, JSONL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from capt.errors import CaptError, NumericError

#: Steps between two looks at whether all losses are finite: each look waits for the device.
LOOK = 64


@dataclass(frozen=True)
class TrainingOptions:
    """How a method is optimised.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        optimizer: ``adamw``, ``sgd`` (momentum 0.9), ``adam``, or ``adamw_raw_eps`` (epsilon 1e-6 added before the
            bias correction, decay of the updated value; MSCI's code for UT-Zappos).
        lr: peak learning rate.
        weight_decay: decoupled for both forms of adamw, L2 for sgd and adam.
        warmup_epochs: linear warm-up from 0.
        clip_norm: global gradient norm; 0 switches clipping off.
        amp: run the whole forward pass, losses included, under bfloat16 autocast.
        schedule: ``cosine`` to 0 over all steps; ``halving`` it every ``halving_epochs`` epochs; ``one-cycle``: from
            1/25 up to the peak over the first tenth of all steps and down to nearly 0, both as half a cosine, with
            the momentum going the other way.
        halving_epochs: see ``schedule``.
        decay_all: decay every parameter; by default matrices alone.
        stop_epoch: end after this many epochs of the schedule; 0: after all.
    """

    epochs: int = 20
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd", "adam", "adamw_raw_eps"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    clip_norm: float = 1.0
    amp: bool = False
    schedule: Literal["cosine", "halving", "one-cycle"] = "cosine"
    halving_epochs: int = 5
    decay_all: bool = False
    stop_epoch: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not math.isfinite(self.lr) or self.lr < 0:
            raise CaptError(
                f"training options: epochs >= 0, batch_size >= 1 and a finite lr >= 0 are needed, "
                f"found epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}"
            )
        hints = get_type_hints(type(self))
        for name in ("optimizer", "schedule"):
            if (found := getattr(self, name)) not in (known := get_args(hints[name])):
                raise CaptError(f"{name}: expected one of {', '.join(known)}, found {found!r}")
        for name in ("weight_decay", "warmup_epochs", "clip_norm"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise CaptError(f"{name}: expected a finite number >= 0, found {value}")
        if not 0 <= self.stop_epoch <= self.epochs:
            raise CaptError(f"stop_epoch: expected 0 to epochs={self.epochs}, found {self.stop_epoch}")
        if self.halving_epochs < 1:
            raise CaptError(f"halving_epochs: expected at least 1, found {self.halving_epochs}")


def train(
    parameters: Iterable[torch.nn.Parameter] | Mapping[float, Iterable[torch.nn.Parameter]],
    step: Callable[[Tensor, torch.Generator], Mapping[str, Tensor]],
    n_samples: int,
    options: TrainingOptions,
    *,
    generator: torch.Generator,
    metrics_path: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    after_step: Callable[[], None] | None = None,
    before_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise ``step(indices, generator)["loss"]``.

    Args:
        parameters: what is trained; a mapping gives each group a factor on the learning rate.
        step: indices int64 [b] of training samples -> scalar losses by name; ``loss`` is minimised, all are logged.
        n_samples: size of the training set.
        generator: CPU generator; the only source of order and augmentation choices.
        metrics_path: JSONL file, one line an epoch: mean of every loss, learning rate, gradient norm.
        progress: called with (epoch, epochs, mean loss).
        after_step: called after every update of the parameters.
        before_epoch: called with the number of epochs done; it may freeze some of ``parameters`` for a while.

    Returns:
        Mean loss of each epoch.

    Raises:
        NumericError: loss or gradient was not finite; names epoch, step and what was not. Steps are looked at
            together, every ``LOOK`` of them, so that none waits for the device; what was trained is then worthless.
    """
    scaled = parameters if isinstance(parameters, Mapping) else {1.0: parameters}
    scaled = {scale: [p for p in group if p.requires_grad] for scale, group in scaled.items()}
    trained = [parameter for group in scaled.values() for parameter in group]
    if not trained or n_samples == 0 or options.epochs == 0:
        return []
    device = trained[0].device
    # Decay belongs to matrices; gains, biases and scalar gates keep their meaning without it.
    groups = [
        {
            "params": [p for p in group if (options.decay_all or p.ndim >= 2) == matrices],
            "weight_decay": decay,
            "lr": options.lr * scale,
        }
        for scale, group in scaled.items()
        for matrices, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    optimizer = _optimizer(groups, options)
    batch_size = min(options.batch_size, n_samples)
    steps_per_epoch = math.ceil(n_samples / batch_size)
    schedule = _schedule(optimizer, options, steps_per_epoch)
    last_epoch = options.stop_epoch or options.epochs
    history: list[float] = []
    log = metrics_path.open("a", encoding="utf-8") if metrics_path else nullcontext()
    with log as stream:
        for epoch in range(last_epoch):
            if before_epoch is not None:
                before_epoch(epoch)
            order = torch.randperm(n_samples, generator=generator).split(batch_size)
            norm = sums = first_bad = torch.zeros((), device=device)
            names: list[str] = []
            for index, batch in enumerate(order):
                with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                    losses = step(batch, generator)
                names = list(losses)
                optimizer.zero_grad(set_to_none=True)
                losses["loss"].backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_norm or math.inf)
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step()
                values = torch.stack([value.detach().float() for value in losses.values()])
                if index == 0:
                    sums, first_bad = torch.zeros_like(values), torch.full((len(names) + 1,), math.inf, device=device)
                sums = sums + values * len(batch)
                finite = torch.cat([values, norm.float().reshape(1)]).isfinite()
                first_bad = torch.where(finite, first_bad, first_bad.clamp_max(index + 1))
                if (index + 1) % LOOK == 0 or index + 1 == len(order):
                    seen = dict(zip([*names, "the gradient"], first_bad.tolist(), strict=True))
                    _refuse_bad(seen, epoch + 1, options.lr)
            means = {name: value / n_samples for name, value in zip(names, sums.tolist(), strict=True)}
            history.append(means["loss"])
            if stream is not None:
                record = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], "grad_norm": float(norm), **means}
                stream.write(json.dumps(record) + "\n")
                stream.flush()
            if progress is not None:
                progress(epoch + 1, last_epoch, means["loss"])
    return history


def _schedule(
    optimizer: torch.optim.Optimizer, options: TrainingOptions, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    total = steps_per_epoch * options.epochs
    if options.schedule == "one-cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        total = max(total, 3)  # a rise and a fall
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total, pct_start=max(0.1, 2 / total))
    warmup = max(int(steps_per_epoch * options.warmup_epochs), 1)

    def rate(index: int) -> float:
        if index < warmup and options.warmup_epochs > 0:
            return (index + 1) / warmup
        if options.schedule == "halving":
            return float(0.5 ** (index // steps_per_epoch // options.halving_epochs))
        return 0.5 * (1 + math.cos(math.pi * (index - warmup) / max(total - warmup, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _optimizer(groups: list[dict[str, Any]], options: TrainingOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamw_raw_eps": RawEpsAdamW,
    }  # fmt: skip
    return kinds[options.optimizer](groups, lr=options.lr)


class RawEpsAdamW(torch.optim.Optimizer):
    """AdamW with ``p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``, then ``p -= lr * decay * p``.

    Source: what MSCI's published code trains UT-Zappos with; torch's AdamW adds eps to the corrected root.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - b1)
                state["square"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                rate = lr * math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
                p.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-rate)
                p.mul_(1 - lr * group["weight_decay"])


def _refuse_bad(first_bad: Mapping[str, float], epoch: int, lr: float) -> None:
    """Raise if anything was not finite; ``first_bad``: the first step at which each was not, inf for never."""
    step = min(first_bad.values())
    if step == math.inf:
        return
    bad = [name for name, value in first_bad.items() if value == step]
    raise NumericError(
        f"training: {', '.join(bad)} became NaN or Inf in epoch {epoch}, step {int(step)}; "
        f"lower lr (now {lr}) or check the inputs for non-finite values"
    )
