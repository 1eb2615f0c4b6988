"""Runs the cases of ``benchmarks/<op>.py``: finds them, checks the results, times op, rivals and floor in turn."""

from __future__ import annotations

import gc
import importlib
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.comparison import Case
from benchmarks.timer import cache_flush, interleaved, replayed_where_possible

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
#: Rounds of a case, and seconds it may take when nobody says otherwise.
ROUNDS = {"cpu": 21, "cuda": 60}
CASE_SECONDS = 1.5


class WrongResultError(AssertionError):
    """The functions of a comparison do not agree: their times mean nothing."""


def modules(folder: Path = FOLDER) -> list[str]:
    """Names of the files that define cases, in order."""
    defines = re.compile(r"^def cases\(", re.MULTILINE)
    return [path.stem for path in sorted(folder.glob("*.py")) if defines.search(path.read_text(encoding="utf-8"))]


def cases_of(module: str, device: str, all_shapes: bool = False) -> list[Case]:
    """Cases of one file, the quick ones unless all are asked for."""
    found = importlib.import_module(f"benchmarks.{module}").cases(device)
    return [case for case in found if all_shapes or case.quick]


def measure(
    case: Case, device: str = "cpu", backend: str | None = None, budget_s: float = CASE_SECONDS
) -> dict[str, Any]:
    """One row of the table: times, rates, share of the floor, ratios. Raises WrongResultError before timing."""
    comparison = case.build(backend)
    wrong = comparison.verify()
    if wrong:
        raise WrongResultError(f"{case.op} {case.shape} {case.dtype} {case.direction}: {wrong}")
    functions, plain, flush = dict(comparison.functions), [], None
    if device == "cuda":
        functions, plain = replayed_where_possible(functions)
        flush = cache_flush()
    amount = comparison.flops if comparison.floor == "gemm" else comparison.bytes
    floor = None
    if amount > 0:
        floor = roofline.floor(comparison.floor, comparison.bytes, roofline.dtype_named(case.dtype), device)
        functions["(floor)"] = floor.run
    times = interleaved(functions, device=device, rounds=ROUNDS[device], budget_s=budget_s, before=flush)
    ours = times["ours"]
    rivals = {name: time.median for name, time in times.items() if name not in ("ours", "(floor)")}
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "backend": backend or "chosen by the plan",
        "ms": _rounded(ours.median),
        "ms_p20": _rounded(ours.low),
        "ms_p80": _rounded(ours.high),
        "samples": ours.samples,
        "rivals_ms": {name: _rounded(value) for name, value in rivals.items()},
        "ratios": {name: _rounded(value / ours.median) for name, value in rivals.items()},
        "goals": [_goal(names, least, rivals, ours.median) for names, least in comparison.goals.items()],
    }
    if floor is not None:
        floor_ms = floor.milliseconds(amount, times["(floor)"].median)
        rate, unit = (comparison.flops, "GFLOP/s") if floor.kind == "gemm" else (comparison.bytes, "GB/s")
        row |= {
            "rate": _rounded(rate / ours.median / 1e6),
            "unit": unit,
            "floor": floor.kind,
            "floor_ms": _rounded(floor_ms),
            "share_of_floor": _rounded(floor_ms / ours.median),
        }
    if plain:
        row["not_graphed"] = plain
    del comparison, functions, floor
    gc.collect()
    return row


def _goal(names: tuple[str, ...], least: float, rivals: dict[str, float], ours: float) -> dict[str, Any]:
    present = {name: rivals[name] for name in names if name in rivals}
    if not present:
        return {"rivals": list(names), "goal": least, "best": None, "ratio": None, "met": None}
    best = min(present, key=lambda name: present[name])
    ratio = present[best] / ours
    return {"rivals": list(names), "goal": least, "best": best, "ratio": _rounded(ratio), "met": ratio >= least}


def _rounded(value: float) -> float:
    """Four digits are more than a shared machine can justify."""
    return float(f"{value:.4g}")


def set_up(threads: int = 2) -> None:
    """What every benchmark run fixes: the number of CPU threads and the random numbers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
