"""Every case of every op: ``pytest benchmarks --benchmark-only``. The cases are in ``benchmarks/<op>.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import suite
from benchmarks.comparison import Case

NO_GPU = "torch sees no CUDA device"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per case; one that skips for each file's GPU cases where there is no GPU."""
    all_shapes = metafunc.config.getoption("--all-shapes")
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        for file in suite.modules():
            if device == "cuda" and not torch.cuda.is_available():
                found.append(pytest.param(file, device, None, id=f"{file}-cuda"))
                continue
            try:
                listed = suite.cases_of(file, device, all_shapes)
            except Exception as error:  # one broken file must not hide the results of the others
                found.append(pytest.param(file, device, error, id=f"{file}-{device}-broken"))
                continue
            found += [pytest.param(file, device, case, id=f"{device} {label(case)}") for case in listed]
    metafunc.parametrize(("file", "device", "case"), found)


def label(case: Case) -> str:
    """What a person calls a case."""
    return f"{case.op} {case.shape} {case.dtype} {case.direction}"


def bench_case(benchmark: Any, bench_run: Any, file: str, device: str, case: Case | Exception | None) -> None:
    """Check, then time op, rivals and floor in turn."""
    if case is None:
        pytest.skip(f"GPU cases of {file}: {NO_GPU}")
    if isinstance(case, Exception):
        raise case
    seconds = bench_run.seconds_for(file, f"{device} {label(case)}", suite.CASE_SECONDS)
    if seconds is None:
        pytest.skip("the time budget is used up")
    suite.set_up()
    row = benchmark.pedantic(suite.measure, (case, device), {"budget_s": seconds}, rounds=1)
    benchmark.extra_info.update(row)
    bench_run.rows.append({"file": file, "device": device, **row})
