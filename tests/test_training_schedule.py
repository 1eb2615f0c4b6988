"""Optimisers, schedules and moving averages of the training loop, against calculations by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from capt.errors import CaptError
from capt.methods.cprfl_config import CPRFLConfig
from capt.training import TrainingOptions, WeightAverage, train
from capt.training.loop import RawEpsAdamW, _optimizer, _schedule


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
        ({"schedule": "steps"}, "schedule: expected one of cosine, halving, one-cycle, found 'steps'"),
        ({"halving_epochs": 0}, "halving_epochs: expected at least 1, found 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number >= 0, found nan"),
        ({"clip_norm": float("inf")}, "clip_norm: expected a finite number"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: expected a finite number >= 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        TrainingOptions(**values)


# ---- one-cycle -------------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[list[dict[str, Any]]]]:
    """Rate, momentum, decay and parameters of every group at every step of any optimiser."""
    steps: list[list[dict[str, Any]]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append([{**group, "params": list(group["params"])} for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


def half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("n_images, total", [(1909, 9600), (1142, 5760)])
def test_25_one_cycle_of_the_published_length(n_images, total):
    options = replace(CPRFLConfig().training, epochs=80, batch_size=16, lr=5e-5)
    with watched() as steps:  # the first of 80 epochs
        descend(replace(options, stop_epoch=1), [nn.Parameter(torch.zeros(1))], n_images)
    found = [(step[1]["lr"], step[1]["betas"]) for step in steps]
    assert len(found) == total // 80
    optimizer = _optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 5e-5}], options)
    schedule, whole = _schedule(optimizer, options, total // 80), []
    for _ in range(total):
        (group,) = optimizer.param_groups
        whole.append((group["lr"], group["betas"]))
        optimizer.step()  # without a gradient
        schedule.step()
    assert found == whole[: len(found)]
    turn = 0.1 * total - 1
    for i, (rate, momenta) in enumerate(whole):
        rising, rise, fall = i <= turn, i / turn, (i - turn) / (total - 1 - turn)
        want = half_cosine(2e-6, 5e-5, rise) if rising else half_cosine(5e-5, 2e-10, fall)
        momentum = half_cosine(0.95, 0.85, rise) if rising else half_cosine(0.85, 0.95, fall)
        assert (rate, *momenta) == pytest.approx((want, momentum, 0.999), rel=1e-9)
    if total == 9600:
        published = {
            0: 2e-6, 959: 5e-5, 1200: 4.9904e-5, 1800: 4.8840e-5, 4800: 2.9332e-5, 9479: 2.40e-8, 9599: 2e-10,
        }  # fmt: skip
        assert [whole[i][0] for i in published] == pytest.approx(list(published.values()), rel=2e-3)


@pytest.mark.parametrize("total", range(1, 8))
def test_25_a_cycle_of_a_few_steps_rises_and_falls(total):
    options = TrainingOptions(epochs=total, batch_size=1, lr=1.0, schedule="one-cycle", clip_norm=0)
    with watched() as steps:
        descend(options, [nn.Parameter(torch.zeros(1))], 1)
    rates = [step[1]["lr"] for step in steps]
    assert len(rates) == total and rates[0] == pytest.approx(0.04)
    assert max(rates) == (pytest.approx(1.0) if total > 1 else rates[0]) and min(rates) > 0


def test_25_an_early_end_keeps_the_schedule():
    options = TrainingOptions(epochs=30, batch_size=4, lr=1.0, schedule="one-cycle", clip_norm=0)
    found = []
    for stop in (0, 12):
        with watched() as steps:
            descend(replace(options, stop_epoch=stop), [nn.Parameter(torch.zeros(1))])
        found.append([step[1]["lr"] for step in steps])
    assert len(found[0]) == 30 and found[1] == found[0][:12]
    with pytest.raises(CaptError, match="stop_epoch: expected 0 to epochs=30, found 31"):
        replace(options, stop_epoch=31)


def test_26_groups_scale_the_schedule_and_decay_matrices_alone():
    weights = {rate: [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))] for rate in (1.0, 0.1)}
    every = [weight for group in weights.values() for weight in group]
    options = TrainingOptions(epochs=20, batch_size=4, lr=0.5, weight_decay=0.3, schedule="one-cycle", clip_norm=0)
    with watched() as steps:
        train(
            weights, lambda batch, _: {"loss": sum(weight.sum() for weight in every)}, 4, options,
            generator=torch.Generator(),
        )  # fmt: skip
    for groups in steps:
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, every))
        for group in groups:
            assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})
        assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
        for rate, group in zip((1.0, 1.0, 0.1, 0.1), groups, strict=True):
            assert group["lr"] == pytest.approx(rate * groups[0]["lr"]) and group["params"][0] is not None
            assert all(any(p is own for own in weights[rate]) for p in group["params"])


def test_what_is_frozen_for_an_epoch_is_not_even_decayed():
    frozen, free = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    seen: list[float] = []

    def before_epoch(epoch: int) -> None:
        frozen.requires_grad_(epoch != 1)
        seen.append(frozen[0, 0].item())

    train(
        [frozen, free], lambda batch, _: {"loss": (frozen + free).sum()}, 4,
        TrainingOptions(epochs=4, batch_size=2, lr=0.1, weight_decay=0.5), generator=torch.Generator(),
        before_epoch=before_epoch,
    )  # fmt: skip
    assert len(seen) == 4 and seen[0] == 1.0 != seen[1] and seen[2] == seen[1] != seen[3]


# ---- moving average --------------------------------------------------------------------------------------------------


def test_27_the_average_after_constant_updates_in_closed_form():
    weight = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    start, step, decay = weight.detach().clone(), torch.tensor([0.5, 3.0], dtype=torch.float64), 0.998
    average = WeightAverage({"weight": weight}, decay)
    for _ in range(50):
        with torch.no_grad():
            weight += step
        average.update()
    # e_k = w_k - step * decay * (1 - decay^k) / (1 - decay), as w grows by one step an update
    want = start + 50 * step - step * decay * (1 - decay**50) / (1 - decay)
    live = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight.detach(), live) and torch.equal(live, start + 50 * step)


def test_27_the_average_of_what_stays_is_that_and_starts_without_a_correction():
    weight = nn.Parameter(torch.ones(3))
    average = WeightAverage({"weight": weight}, 0.9)
    with torch.no_grad():
        weight.fill_(2.0)
    for k in range(1, 6):
        average.update()
        with average.applied():
            torch.testing.assert_close(weight.detach(), torch.full((3,), 2 - 0.9**k))


def test_weights_come_back_when_something_fails_under_their_averages():
    weight = nn.Parameter(torch.ones(3))
    average = WeightAverage({"weight": weight}, 0.5)
    with torch.no_grad():
        weight.fill_(5.0)
    with pytest.raises(RuntimeError, match="stop"), average.applied():
        assert weight[0] == 1.0
        raise RuntimeError("stop")
    assert torch.equal(weight.detach(), torch.full((3,), 5.0))


def test_the_average_is_taken_after_every_step():
    weight, seen = nn.Parameter(torch.zeros(1)), []
    train(
        [weight], lambda batch, _: {"loss": weight.sum()}, 5, TrainingOptions(epochs=2, batch_size=2, lr=0.1),
        generator=torch.Generator(), after_step=lambda: seen.append(weight.item()),
    )  # fmt: skip
    assert len(seen) == 6 and seen == sorted(set(seen), reverse=True) and seen[-1] == weight.item()
