"""Timing of several functions against each other on a machine that is not quiet.

The functions take turns, so that a slow spell hits all of them alike; ratios of medians are then far more stable than
the times themselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile over the rounds."""

    median: float
    low: float
    high: float


def _once_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _once_cuda(function: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def interleaved(
    functions: dict[str, Callable[[], object]], *, device: str = "cpu", rounds: int = 15, warmup: int = 2
) -> dict[str, Timing]:
    """Time every function once per round, in turn. CUDA functions are timed by events on the current stream."""
    once = _once_cuda if torch.device(device).type == "cuda" else _once_cpu
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            elapsed = once(function)
            if turn >= warmup:
                samples[name].append(elapsed)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])
