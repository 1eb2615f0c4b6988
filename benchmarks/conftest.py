"""Collects benchmark rows, prints one table and writes benchmarks/results/<name>.json with a machine card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--results-name cpu`` keeps the result; the default is overwritten by every run."""
    parser.addoption("--results-name", default="latest", help="stem of the JSON file under benchmarks/results")


def pytest_configure(config: pytest.Config) -> None:
    """Start empty."""
    config.stash[ROWS] = {}


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Any:
    """Functions named bench_* are benchmarks."""
    if name.startswith("bench_") and callable(obj) and isinstance(collector, pytest.Module):
        return list(collector._genfunctions(name, obj))
    return None


@pytest.fixture
def record_row(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """``record_row(op, row)`` adds a row to the table of an op."""
    rows = request.config.stash[ROWS]
    return lambda op, row: rows.setdefault(op, []).append(row)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table and write the file, if anything was measured."""
    rows = config.stash[ROWS]
    if not rows:
        return
    from benchmarks.machine import machine_card

    for op, table in rows.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{op}: milliseconds, ratio = best rival / ours, floor = copy of the same bytes")
        for row in table:
            floor = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "-"
            terminalreporter.write_line(
                f"  {row['shape']:16} {row['dtype']:9} {row['direction']:8} {row['backend']:9} {row['ms']:9.3f} ms"
                f"   {row['ratio']:5.2f}x vs {row['best_rival']:13}   {row['ratio_to_permute']:5.2f}x vs permute"
                f"   {floor:>5} of floor"
            )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{config.getoption('--results-name')}.json"
    content = {"machine": machine_card(), "ops": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"written: benchmarks/results/{path.name}")
