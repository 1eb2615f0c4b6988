"""Optimisers and schedules of the training loop, against calculations by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from capt.errors import CaptError
from capt.training import TrainingOptions, train
from capt.training.loop import RawEpsAdamW


def descend(options: TrainingOptions, parameters: list[nn.Parameter], n: int = 4, path=None) -> None:
    """Every gradient is 1."""
    train(
        parameters, lambda batch, generator: {"loss": sum(p.sum() for p in parameters)}, n, options,
        generator=torch.Generator().manual_seed(0), metrics_path=path,
    )  # fmt: skip


def test_14_the_rate_halves_every_five_epochs(tmp_path):
    options = TrainingOptions(
        epochs=17, batch_size=2, optimizer="sgd", lr=0.8, weight_decay=0.0, schedule="halving", warmup_epochs=0,
        clip_norm=0,
    )  # fmt: skip
    descend(options, [nn.Parameter(torch.zeros(1))], path=tmp_path / "log.jsonl")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # What the log holds is the rate of the next epoch.
    assert rates == pytest.approx([0.8] * 4 + [0.4] * 5 + [0.2] * 5 + [0.1] * 3)


def test_14_every_step_of_an_epoch_has_the_rate_of_that_epoch():
    options = TrainingOptions(
        epochs=3, batch_size=2, optimizer="sgd", lr=1.0, weight_decay=0.0, schedule="halving", halving_epochs=1,
        warmup_epochs=0, clip_norm=0,
    )  # fmt: skip
    weight = nn.Parameter(torch.zeros(()))
    descend(options, [weight])
    value = velocity = 0.0
    for rate in (1.0, 1.0, 0.5, 0.5, 0.25, 0.25):  # two steps an epoch, momentum 0.9
        velocity = 0.9 * velocity + 1
        value -= rate * velocity
    assert weight.item() == pytest.approx(value)


def by_hand(value: float, gradients: list[float], lr: float, decay: float, eps: float) -> float:
    mean = square = 0.0
    for t, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        value -= lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * mean / (math.sqrt(square) + eps)
        value -= lr * decay * value
    return value


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_14_raw_eps_adamw_is_the_calculation_by_hand(eps):
    gradients = [0.3, -2.0, 0.01]
    weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    optimizer = RawEpsAdamW([weight], lr=0.1, eps=eps, weight_decay=0.2)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert weight.item() == pytest.approx(by_hand(1.5, gradients, 0.1, 0.2, eps), rel=1e-12)


def test_14_raw_eps_adamw_is_not_the_usual_adamw():
    """Epsilon before the bias correction, decay after the update."""
    weights = [nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2)]
    kinds = RawEpsAdamW, torch.optim.AdamW
    for weight, kind in zip(weights, kinds, strict=True):
        weight.grad = torch.tensor(0.3, dtype=torch.float64)
        kind([weight], lr=0.1, eps=0.1, weight_decay=0.2).step()
    assert abs(weights[0].item() - weights[1].item()) > 1e-2


def test_a_parameter_without_gradient_is_not_even_decayed():
    idle = nn.Parameter(torch.ones(2))
    RawEpsAdamW([idle], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(idle, torch.ones(2))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw_raw_eps", "sgd"])
def test_decay_reaches_vectors_only_when_asked_to(optimizer):
    found = {}
    for every in (False, True):
        weights = [nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))]
        options = TrainingOptions(
            epochs=1, batch_size=4, optimizer=optimizer, lr=0.1, weight_decay=0.5, decay_all=every,
            schedule="halving", warmup_epochs=0, clip_norm=0,
        )  # fmt: skip
        train(
            weights, lambda batch, generator, own=weights: {"loss": sum(1e-3 * p.sum() for p in own)}, 4, options,
            generator=torch.Generator(),
        )  # fmt: skip
        found[every] = [weight.detach() for weight in weights]
    assert torch.equal(found[True][0], found[False][0])
    if optimizer == "adam":  # its decay is part of a gradient that is normalised
        assert torch.equal(found[True][1], found[True][0][0])
    else:
        assert found[True][1][0] < found[False][1][0] - 0.05


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, adam, adamw_raw_eps, found 'lion'"),
        ({"schedule": "steps"}, "schedule: expected one of cosine, halving, found 'steps'"),
        ({"halving_epochs": 0}, "halving_epochs: expected at least 1, found 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number >= 0, found nan"),
        ({"clip_norm": float("inf")}, "clip_norm: expected a finite number"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: expected a finite number >= 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        TrainingOptions(**values)
