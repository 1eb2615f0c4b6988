"""Timing of several functions against each other on a machine that is not quiet.

The functions take turns in an order that changes every round, so that a slow spell hits all of them alike; ratios of
medians are then far more stable than the times themselves.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_ROUNDS = 3
#: A CPU sample shorter than this holds several calls: the clock and the interpreter would be most of it otherwise.
SAMPLE_MS = 0.2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile over the rounds; samples: how many rounds."""

    median: float
    low: float
    high: float
    samples: int = 0


def _once_cpu(
    function: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) * 1e3 / repeats


def _once_cuda(function: Callable[[], object], repeats: int = 1) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    rounds: int = 15,
    warmup: int = 2,
    budget_s: float | None = None,
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every function up to once per round, in turn. CUDA functions are timed by events on the current stream.

    budget_s: about how long all of it may take; each function gets an equal share, hence fewer rounds when it is slow,
    but at least three. before: called before every sample, outside the clock (to empty a cache).
    clock: of CPU functions; ``time.process_time`` of one thread ignores what else the machine does.
    """
    on_gpu = torch.device(device).type == "cuda"
    once = _once_cuda if on_gpu else functools.partial(_once_cpu, clock=clock)
    cost = dict.fromkeys(functions, math.inf)
    for turn in range(warmup):
        if turn and budget_s is not None and sum(cost.values()) > 250 * budget_s / warmup:
            break
        for name, function in functions.items():
            cost[name] = min(cost[name], once(function))
    share = math.inf if budget_s is None else 1e3 * budget_s / len(functions)
    wanted, repeats = {}, {}
    for name, milliseconds in cost.items():
        few = on_gpu or before is not None or not milliseconds < SAMPLE_MS
        repeats[name] = 1 if few else min(100, math.ceil(SAMPLE_MS / max(milliseconds, 1e-4)))
        affordable = share / max(milliseconds, 1e-4)
        wanted[name] = rounds if affordable >= rounds else max(min(LEAST_ROUNDS, rounds), int(affordable))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            # Few samples are spread over all rounds.
            if (turn + 1) * wanted[name] // rounds > turn * wanted[name] // rounds:
                if before is not None:
                    before()
                samples[name].append(once(functions[name], repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


# ---- CUDA --------------------------------------------------------------------------------------------------------


def replayed(function: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
    """The kernels of ``function`` as a CUDA graph: its replay costs no Python, dispatcher or launch time.

    Raises RuntimeError when the function cannot be captured (it waits for the device, or uses other streams).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def replayed_where_possible(
    functions: dict[str, Callable[[], object]],
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Every function as a graph, and the names of those that had to stay as they are."""
    found, plain = {}, []
    for name, function in functions.items():
        try:
            found[name] = replayed(function)
        except Exception:  # whatever a library raises under capture: it is then timed as its users call it
            torch.cuda.synchronize()
            found[name] = function
            plain.append(name)
    return found, plain


def cache_flush() -> Callable[[], object]:
    """A write of twice the second-level cache, so that the next kernel finds none of its inputs there."""
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda").zero_
