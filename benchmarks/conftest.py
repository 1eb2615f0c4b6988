"""Options of the benchmark run, its time budget, and what it prints and writes at the end."""

from __future__ import annotations

import json
import os
import time
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch: waiting threads must not take a core from the others

import pytest

from benchmarks import tables

#: Seconds of the whole run without --all-shapes, imports included.
BUDGET = 170.0


class Run:
    """State of one run: rows so far, what was left out, and until when each op may start cases."""

    def __init__(self, budget: float | None) -> None:
        self.start = time.monotonic()
        self.budget = budget
        self.cases: dict[str, int] = {}  # benchmark file -> cases not started yet
        self.files: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def seconds_for(self, file: str, label: str, usual: float) -> float | None:
        """Seconds of timing for the next case of a file; None: its share of the budget is used up."""
        self.cases[file] -= 1
        if self.budget is None:
            return usual
        # What an op does not use is left to the ones after it.
        deadline = self.start + self.budget * (self.files.index(file) + 1) / len(self.files)
        left = deadline - time.monotonic()
        if left <= 0:
            self.left_out.append(label)
            return None
        # Building inputs, checking results and the last slow rival take about as long as the timing itself.
        return min(usual, 0.5 * left / (self.cases[file] + 1))


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The default result is overwritten by every run; a name keeps it."""
    parser.addoption("--results-name", default="latest", help="stem of the JSON file under benchmarks/results")
    parser.addoption("--all-shapes", action="store_true", help="every case instead of the quick ones, without a budget")
    parser.addoption("--budget-s", type=float, default=None, help=f"seconds of the whole run, default {BUDGET:.0f}")


def pytest_configure(config: pytest.Config) -> None:
    """Start empty; our table replaces the one of pytest-benchmark."""
    budget = config.getoption("--budget-s")
    config.stash[RUN] = Run(budget or (None if config.getoption("--all-shapes") else BUDGET))
    config.option.benchmark_quiet = True


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Any:
    """Functions named bench_* are benchmarks."""
    if name.startswith("bench_") and callable(obj) and isinstance(collector, pytest.Module):
        return list(collector._genfunctions(name, obj))
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the cases of every benchmark file: the time budget is shared by them."""
    run = session.config.stash[RUN]
    for item in session.items:
        file = item.callspec.params.get("file") if hasattr(item, "callspec") else None
        if isinstance(file, str):
            run.cases[file] = run.cases.get(file, 0) + 1
    run.files = list(run.cases)


@pytest.fixture
def bench_run(request: pytest.FixtureRequest) -> Run:
    """The state of this run."""
    return request.config.stash[RUN]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables and write the file, if anything was measured."""
    run = config.stash[RUN]
    say = terminalreporter.write_line
    for op in dict.fromkeys(row["op"] for row in run.rows):
        say("")
        say(f"{op}: milliseconds; ratio = rival / ours")
        for line in tables.plain(tables.ROW_HEADER, [tables.row_cells(row) for row in run.rows if row["op"] == op]):
            say(f"  {line}")
    found = tables.goals(run.rows)
    if found:
        say("")
        say(f"goals: the mean reaches the goal and no shape is below {tables.LEAST_RATIO}")
        for line in tables.plain(tables.GOAL_HEADER, [tables.goal_cells(goal) for goal in found]):
            say(f"  {line}")
    if run.left_out:
        say("")
        say(f"left out, the time budget of {run.budget:.0f} s was used up (--budget-s, --all-shapes):")
        for label in run.left_out:
            say(f"  {label}")
    if run.rows:
        from benchmarks.machine import machine_card
        from benchmarks.suite import RESULTS

        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{config.getoption('--results-name')}.json"
        content = {"machine": machine_card(), "rows": run.rows, "goals": found, "left_out": run.left_out}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"written: benchmarks/results/{path.name}, {time.monotonic() - run.start:.0f} s")
