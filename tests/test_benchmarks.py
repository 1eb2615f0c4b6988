"""The benchmark code itself: timing, floors, cases, goals, rivals that compute the same thing, parity problems."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import roofline, suite, tables
from benchmarks.comparison import Case, Comparison
from benchmarks.conftest import Run
from benchmarks.machine import machine_card, source_commit
from benchmarks.parity import grid_adapter as parity
from benchmarks.rivals.grid_adapter import RIVALS
from benchmarks.timer import interleaved
from capt import reference

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = 500


@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_compute_the_same_and_leave_their_input_alone(rival):
    tokens, weight = torch.randn(2, 1 + 12 + 2, 8), torch.randn(8, 3, 3)
    before = tokens.clone()
    found = RIVALS[rival](tokens, weight, 0.5, (3, 4), 1)
    torch.testing.assert_close(found, reference.grid_adapter(tokens, weight, 0.5, (3, 4), 1))
    assert torch.equal(tokens, before)


# ---- timer -------------------------------------------------------------------------------------------------------


def test_interleaved_times_take_turns_and_order_functions_by_cost():
    calls = []

    def call(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    times = interleaved({"slow": call("slow", 0.01), "fast": call("fast", 0.001)}, rounds=4, warmup=1)
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["fast", "slow"]] * 5
    assert times["slow"].median >= 10 > times["fast"].median and times["slow"].samples == 4
    assert times["slow"].low <= times["slow"].median <= times["slow"].high


def test_slow_functions_take_fewer_rounds_and_short_ones_several_calls_a_sample():
    calls = {"slow": 0, "quick": 0}

    def slow():
        calls["slow"] += 1
        time.sleep(0.02)

    def quick():
        calls["quick"] += 1

    times = interleaved({"slow": slow, "quick": quick}, rounds=50, warmup=1, budget_s=0.2)
    assert 3 <= times["slow"].samples <= 6 and times["quick"].samples == 50
    assert calls["quick"] > 500 and times["quick"].median < 0.1


def test_a_call_before_every_sample_is_outside_the_clock():
    times = interleaved({"a": lambda: None}, rounds=3, warmup=1, before=lambda: time.sleep(0.01))
    assert times["a"].median < 5


# ---- floors ------------------------------------------------------------------------------------------------------


def test_floors_move_what_they_say():
    copy, read = roofline.floor("copy", 80_000, torch.float32), roofline.floor("read", 81_920, torch.float32)
    assert copy.amount == 80_000 and copy.run().numel() == 10_000
    assert read.amount == 81_920 and read.run().shape == (20,)
    assert copy.milliseconds(160_000, 2.0) == 4.0
    assert roofline.copy_floor(1 << 40).amount == roofline.LARGEST["cpu"]
    assert roofline.read_floor(1).amount == 4096


def test_gemm_floor_takes_the_dtype_of_the_row(monkeypatch):
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 8)
    floor = roofline.floor("gemm", 0, torch.bfloat16)
    assert floor.amount == 2 * 8**3 and floor.run().dtype == torch.bfloat16
    assert roofline.gemm_floor(torch.float16).run().dtype == torch.bfloat16
    assert roofline.dtype_named("bf16 rows") == torch.bfloat16 and roofline.dtype_named("float16") == torch.float16
    assert roofline.dtype_named("") == torch.float32 and roofline.dtype_named("nonsense") == torch.float32


# ---- cases -------------------------------------------------------------------------------------------------------


def made_up(wrong="", goals=None, op="toy", shape="s", quick=True):
    """A case whose rivals sleep longer than ours."""
    functions = {name: lambda s=s: time.sleep(s) for name, s in {"ours": 0.002, "near": 0.004, "far": 0.02}.items()}
    comparison = Comparison(functions, lambda: wrong, 1 << 20, 1 << 20, "copy", goals or {})
    return Case(op, shape, "float32", "forward", quick, lambda backend: comparison)


def test_a_row_holds_ratios_of_every_rival_goals_and_floor():
    goals = {("near", "far"): 1.5, ("far",): 20.0, ("absent",): 2.0}
    row = suite.measure(made_up(goals=goals), budget_s=0.5)
    assert row["ratios"]["near"] == pytest.approx(2, rel=0.4) and row["ratios"]["far"] == pytest.approx(10, rel=0.4)
    best, far, absent = row["goals"]
    assert best["best"] == "near" and best["met"] and not far["met"] and absent["met"] is None
    assert row["floor"] == "copy" and row["unit"] == "GB/s" and row["share_of_floor"] > 0
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and json.dumps(row)


def test_a_comparison_that_does_not_agree_is_not_timed():
    with pytest.raises(suite.WrongResultError, match="toy s float32 forward: rows differ"):
        suite.measure(made_up(wrong="rows differ"))


def test_cases_are_found_by_what_a_file_defines(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("def cases(device='cpu'):\n    pass\n")
    (tmp_path / "helper.py").write_text("def other():\n    pass\n")
    assert suite.modules(tmp_path) == ["one"] and "grid_adapter" in suite.modules() and "suite" not in suite.modules()
    module = type(sys)("benchmarks.toy")
    module.cases = lambda device: [made_up(), made_up(quick=False)]
    monkeypatch.setitem(sys.modules, "benchmarks.toy", module)
    assert [len(suite.cases_of("toy", "cpu", every)) for every in (False, True)] == [1, 2]


@pytest.mark.parametrize("file", suite.modules())
def test_cases_are_well_formed_and_their_labels_unique(file):
    listed = suite.cases_of(file, "cpu", all_shapes=True)
    assert all(isinstance(case, Case) and case.direction in ("forward", "both") for case in listed)
    labels = [(case.op, case.shape, case.dtype, case.direction) for case in listed]
    assert len(set(labels)) == len(labels) and any(case.quick for case in listed)


def test_the_comparison_of_grid_adapter_verifies_and_names_its_goal():
    module = importlib.import_module("benchmarks.grid_adapter")
    small = {(c.shape, c.dtype, c.direction): c for c in suite.cases_of("grid_adapter", "cpu", all_shapes=True)}
    for direction in ("forward", "both"):
        for dtype in module.DTYPES:
            comparison = small["small x4", dtype, direction].build(None)
            assert comparison.verify() == "" and comparison.functions.keys() == {"ours", "permute", "channels_last"}
            assert comparison.goals == {}
    wrong = small["small x4", "float32", "forward"].build(None)
    wrong.functions["permute"] = lambda: (torch.zeros(4, 17, 64),)
    assert wrong.verify().startswith("permute: error")
    goal = small["ViT-B/16 x8", "bfloat16", "both"].build(None)
    assert goal.goals == {("permute",): 3.0} and goal.floor == "copy" and goal.bytes > 0


# ---- goals and tables --------------------------------------------------------------------------------------------


def a_row(shape, ratio, goal=2.0, **changes):
    goals = [{"rivals": ["near"], "goal": goal, "best": "near", "ratio": ratio, "met": ratio >= goal}]
    row = {"op": "toy", "shape": shape, "dtype": "float32", "direction": "forward", "ms": 0.0123, "ms_p20": 0.01,
           "ms_p80": 0.02, "rivals_ms": {"near": 1.0}, "ratios": {"near": ratio}, "goals": goals}  # fmt: skip
    return {**row, **changes}


def test_goals_are_geometric_means_and_one_slow_shape_spoils_them():
    met, spoilt = tables.goals([a_row("a", 2.0), a_row("b", 8.0), a_row("c", 0.8, 1.0), a_row("d", 8.0, 1.0)])
    assert met["geometric_mean"] == 4.0 and met["met"] and met["shapes"] == ["a", "b"]
    assert spoilt["geometric_mean"] > 1 and spoilt["lowest"] == 0.8 and not spoilt["met"]
    apart = tables.goals([a_row("a", 2.0), a_row("b", 2.0, direction="both")])
    assert [goal["direction"] for goal in apart] == ["forward", "both"]
    nothing = a_row("a", 1.0)
    nothing["goals"][0].update(ratio=None, met=None)
    assert tables.goals([nothing]) == [] and tables.verdict(nothing["goals"]) == "2: not run"


def test_tables_are_readable():
    text = tables.rows_table([a_row("a", 2.0, rate=12.3, unit="GB/s", floor="copy", share_of_floor=0.5)])
    assert "| a | float32 | forward | 0.0123 | 0.0100 to 0.0200 | 12.3 GB/s | 50% of copy | 2.00 (near) |" in text
    assert tables.number(1234.5) == "1234" and tables.number(0) == "0" and tables.number(1.0) == "1.00"
    assert "no" in tables.goals_table(tables.goals([a_row("a", 0.5)]))
    assert tables.shape_range(["a", "b", "c"]) == "a ... c (3)"
    assert tables.plain(["x", "y"], [["long", "z"]]) == ["x     y", "long  z"]


def test_machine_card_names_hardware_and_nothing_private(tmp_path):
    text = json.dumps(machine_card())
    card = json.loads(text)
    assert card["torch"] == torch.__version__ and card["cpus"] >= 1 and card["cpu"]
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert source_commit(tmp_path) == (None, False)
    assert "commit unknown" in tables.measured_on({**card, "commit": None})


# ---- the run -----------------------------------------------------------------------------------------------------

TOY = """
import time
from benchmarks.comparison import Case, Comparison
from benchmarks.conftest import Run

def cases(device="cpu"):
    for name, wrong in (("right", ""), ("wrong", "no match"), ("later", ""), ("large", "")):
        functions = {"ours": lambda: time.sleep(0.001), "rival": lambda: time.sleep(0.003)}
        comparison = Comparison(functions, lambda wrong=wrong: wrong, 1 << 20, 0, "copy", {("rival",): 1.5})
        yield Case("toy", name, "float32", "forward", name != "large", lambda backend, c=comparison: c)
"""


def test_the_run_measures_reports_and_fails_where_results_are_wrong(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__", "bench_ops", "comparison", "conftest", "machine", "roofline", "suite", "tables", "timer"):
        (folder / f"{name}.py").write_bytes((ROOT / "benchmarks" / f"{name}.py").read_bytes())
    (folder / "toy.py").write_text(TOY, encoding="utf-8")
    (folder / "broken.py").write_text("import nowhere\n\ndef cases(device):\n    pass\n", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "benchmarks", "--benchmark-only", "--results-name", "kept"]
    # The inner run is one process, also where this test is run by a worker of pytest-xdist.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "_PYTEST_"))}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert "WrongResultError: toy wrong float32 forward: no match" in said and "No module named 'nowhere'" in said
    assert "GPU cases of toy: torch sees no CUDA device" in said or torch.cuda.is_available()
    assert "toy: milliseconds; ratio = rival / ours" in said
    written = json.loads((folder / "results" / "kept.json").read_text(encoding="utf-8"))
    assert [row["shape"] for row in written["rows"]] == ["right", "later"] and written["left_out"] == []
    assert written["goals"][0]["met"] and written["machine"]["commit"] is None


def test_the_time_budget_is_shared_and_what_it_leaves_out_is_named():
    run = Run(budget=100.0)
    run.files, run.cases = ["a", "b"], {"a": 2, "b": 2}
    assert run.seconds_for("a", "a1", 2.0) == 2.0
    run.start -= 48  # of the 50 seconds of a
    assert run.seconds_for("a", "a2", 2.0) == pytest.approx(1.0, abs=0.1)
    run.start -= 10
    assert run.seconds_for("b", "b1", 30.0) == pytest.approx(10.5, abs=0.1)
    run.start -= 60
    assert run.seconds_for("b", "b2", 2.0) is None and run.left_out == ["b2"]
    free = Run(budget=None)
    free.files, free.cases = ["a"], {"a": 1}
    assert free.seconds_for("a", "a1", 2.0) == 2.0


def test_recorded_results_are_complete():
    recorded = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    assert recorded["machine"]["device"] == "cpu" and recorded["goals"] == tables.goals(recorded["rows"])
    rows = [row for row in recorded["rows"] if row["op"] == "grid_adapter"]
    assert {(row["dtype"], row["direction"]) for row in rows} >= {
        (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "both")
    }
    # The plan always takes the kernel on a CPU: that needs every measured shape to be no slower than the best rival.
    assert min(min(row["ratios"].values()) for row in rows) >= 1.0


# ---- parity problems ---------------------------------------------------------------------------------------------


def test_parity_on_the_cpu():
    failed = []
    for seed in range(SEEDS):
        problem = parity.problem(seed)
        if wrong := parity.complaint(problem, parity.run(problem, backend="cpu")):
            failed.append(f"seed {seed}, {problem.label}: {wrong}")
    assert not failed, "\n".join(failed[:5])


def test_parity_at_every_instruction_set_level(limit_cpu_level):
    from capt import _C

    for level in range(len(_C.cpu_levels()) - 1):
        limit_cpu_level(level)
        for seed in range(level, 60, 2):
            problem = parity.problem(seed)
            assert parity.complaint(problem, parity.run(problem, backend="cpu")) == "", (level, seed)


def test_problems_are_the_same_for_the_same_seed_and_cover_what_they_promise():
    first, again = parity.problem(7), parity.problem(7)
    assert first.label == again.label and torch.equal(first.arguments[0], again.arguments[0])
    labels = " ".join(parity.problem(seed).label for seed in range(100))
    for word in (*parity.LAYOUTS, *parity.VALUES, "0x"):
        assert word in labels
    assert {parity.problem(seed).arguments[0].dtype for seed in range(3)} == set(parity.DTYPES)


def test_parity_notices_a_wrong_kernel(monkeypatch):
    right = parity.ops.grid_adapter
    monkeypatch.setattr(parity.ops, "grid_adapter", lambda *a, **k: right(*a, **k) * 1.01)
    complaints = []
    for seed in range(60):
        problem = parity.problem(seed)
        if problem.arguments[0].numel() and "special" not in problem.label:
            complaints.append(parity.complaint(problem, parity.run(problem, backend="cpu")))
    assert sum(map(bool, complaints)) > 0.8 * len(complaints)
