"""The benchmark code itself: timing, floors, rivals that compute the same thing, and the GPU run's logic on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, grid_adapter
from benchmarks.machine import machine_card
from benchmarks.parity import grid_adapter as parity
from benchmarks.rivals.grid_adapter import RIVALS
from benchmarks.roofline import bandwidth, copy_function, share_of_floor
from benchmarks.timer import interleaved
from capt import reference

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_compute_the_same_and_leave_their_input_alone(rival):
    tokens, weight = torch.randn(2, 1 + 12 + 2, 8), torch.randn(8, 3, 3)
    before = tokens.clone()
    found = RIVALS[rival](tokens, weight, 0.5, (3, 4), 1)
    torch.testing.assert_close(found, reference.grid_adapter(tokens, weight, 0.5, (3, 4), 1))
    assert torch.equal(tokens, before)


def test_interleaved_times_take_turns_and_order_functions_by_cost():
    calls = []
    times = interleaved(
        {
            "slow": lambda: (calls.append("slow"), time.sleep(0.01)),
            "fast": lambda: calls.append("fast"),
        },
        rounds=3,
        warmup=1,
    )
    assert calls == ["slow", "fast"] * 4
    assert times["slow"].median >= 10 > times["fast"].median
    assert times["slow"].low <= times["slow"].median <= times["slow"].high


def test_floor_arithmetic():
    assert bandwidth(2_000_000, 1.0) == 2.0
    assert share_of_floor(100, 2.0, 200, 2.0) == 0.5
    assert copy_function(800, "cpu")().numel() == 100


def test_a_row_holds_ratio_floor_and_backend():
    row = grid_adapter.compare("small x4", "float32", "forward")
    assert row["backend"] == "cpu" and row["best_rival"] in RIVALS
    assert row["ratio"] == pytest.approx(row["best_rival_ms"] / row["ms"], rel=0.05)
    assert row["share_of_floor"] > 0 and row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert "share_of_floor" not in grid_adapter.compare("small x4", "bfloat16", "both")


def test_machine_card_names_hardware_and_nothing_private():
    text = json.dumps(machine_card())
    card = json.loads(text)
    assert card["torch"] == torch.__version__ and card["cpus"] >= 1 and card["cpu"]
    assert str(Path.home()) not in text and str(RESULTS.parent) not in text


def test_recorded_results_are_complete():
    recorded = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    rows = recorded["ops"]["grid_adapter"]
    assert {(row["shape"], row["dtype"], row["direction"]) for row in rows} == {
        (shape, dtype, direction)
        for shape in grid_adapter.SHAPES
        for dtype in grid_adapter.DTYPES
        for direction in ("forward", "both")
    }
    # The plan always takes the kernel on a CPU: that needs every measured shape to be no slower than the best rival.
    assert min(row["ratio"] for row in rows) >= 1.0
    assert recorded["machine"]["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: 'python -m benchmarks.gpu' is the test")
def test_without_a_gpu_the_run_is_skipped_with_a_reason(capsys):
    assert gpu.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("GPU run skipped: torch") and gpu.why_not() in said


def test_the_gpu_run_works_on_the_cpu_backend():
    report = gpu.run("cpu", {"cpu": "", "cuda": "no device"}, ["small x4"])
    assert all(row["ok"] for row in report["parity"]) and len(report["parity"]) == 12
    assert report["integration"]["cpu"] == {"opcheck": "ok", "compile": "ok"}
    assert len(report["timings"]) == 4 and report["unusable"] == {"cuda": "no device"}
    assert gpu.failures(report) == []


def test_gpu_failures_are_reported():
    bad = {"backend": "cuda", "shape": "s", "dtype": "float32", "ok": False}
    report = {"parity": [bad], "unusable": {}, "sanitizer": {"memcheck": "1 error", "initcheck": "ok"}}
    assert [line.split(":")[0] for line in gpu.failures(report)] == [
        "parity cuda s float32",
        "compute-sanitizer memcheck",
    ]
    assert gpu.failures({"parity": [], "unusable": {"cuda": "none"}}) == ["no kernel ran on the GPU: {'cuda': 'none'}"]


def test_parity_notices_a_wrong_kernel(monkeypatch):
    right = parity.ops.grid_adapter
    monkeypatch.setattr(parity.ops, "grid_adapter", lambda *a, **k: right(*a, **k) * 1.001)
    assert not any(row["ok"] for row in parity.check_backend("cpu", "cpu") if row["dtype"] == "float32")
