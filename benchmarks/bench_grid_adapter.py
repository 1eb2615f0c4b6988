"""grid_adapter on the CPU: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import grid_adapter


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", grid_adapter.DTYPES)
@pytest.mark.parametrize("shape", grid_adapter.SHAPES)
def bench_grid_adapter(benchmark: Any, record_row: Any, shape: str, dtype: str, direction: str) -> None:
    """Our op under pytest-benchmark's clock, then against the rivals in turn."""
    run = grid_adapter.functions(shape, dtype, direction)["ours"]
    benchmark.group = f"grid_adapter {direction}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    row = grid_adapter.compare(shape, dtype, direction)
    benchmark.extra_info.update(row)
    record_row("grid_adapter", row)
