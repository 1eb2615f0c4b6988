"""The GPU run without a GPU: the same parts on the CPU kernels, and parts that fail, hang, or have nothing to do."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_parts, integration
from benchmarks.parity import Problem
from benchmarks.parity import grid_adapter as parity
from capt.errors import CaptError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_run_is_skipped_with_a_reason(capsys, no_gpu):
    assert gpu.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("GPU run skipped: torch") and gpu.why_not() in said


def test_the_run_works_on_the_cpu_and_writes_json_and_summary(tmp_path, capsys):
    options = ["--device", "cpu", "--parts", "parity", "--ops", "grid_adapter", "--seeds", "9", "--seconds", "100"]
    assert gpu.main([*options, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    report = json.loads(next(tmp_path.glob("cpu-rehearsal-*.json")).read_text(encoding="utf-8"))
    assert report["parity"][0]["cases"] == 9 + len(parity.LARGE_SEEDS) and report["parity"][0]["repeats"] == 9
    assert report["machine"]["device"] == "cpu" and report["parts"]["card"]["status"] == "ok"
    text = next(tmp_path.glob("cpu-rehearsal-*.md")).read_text(encoding="utf-8")
    assert text in said and "**Passed.**" in text and "| grid_adapter | cpu | 49 | 0 | 0 | 9 | - |" in text
    assert "compute-sanitizer: not run" in text


def test_the_plan_builds_first_and_times_last(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"tools/{name}")
    plan = gpu.groups("cuda", ["a", "b"], 500, build=True, only=set())
    names = [[part.name for part in group.parts] for group in plan]
    assert names == [["build"], ["card"], ["parity a", "parity b", "integration a", "integration b"],
                     list(gpu.SANITIZER_TOOLS), ["bench"]]  # fmt: skip
    assert sum(group.weight for group in plan) <= gpu.TOTAL_SECONDS < 600
    build, sanitizer = plan[0].parts[0], plan[3].parts[0]
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(build.command)
    assert sanitizer.command[:3] == ["tools/compute-sanitizer", "--tool", "memcheck"]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert len(gpu.groups("cuda", ["a"], 500, build=False, only=set())) == 3
    assert [g.parts[0].name for g in gpu.groups("cuda", ["a"], 5, False, {"bench"})] == ["bench"]


def script(name, code, writes=True):
    return gpu.Part(name, [sys.executable, "-c", code], writes=writes)


FINDS = "import sys, json; out = sys.argv[sys.argv.index('--out') + 1]; json.dump({}, open(out, 'w'))"


def test_parts_that_fail_hang_or_die_leave_the_others_alone():
    bad = FINDS.replace("{}", "{'parity': [], 'problems': ['two kernels differ']}") + "; sys.exit(1)"
    slow = FINDS.replace("{}", "{'rows': [], 'done': 3}") + "; import time; time.sleep(60)"
    plan = [
        gpu.Group(1, [script("dies", "import os; print('last words'); os.abort()", writes=False)]),
        gpu.Group(1, [script("finds", bad), script("hangs", slow)]),
        gpu.Group(1, [script("works", FINDS)]),
    ]
    started = time.monotonic()
    parts = gpu.run(plan, 9.0)
    assert time.monotonic() - started < 15
    assert {name: part["status"] for name, part in parts.items()} == {
        "dies": "failed", "finds": "failed", "hangs": "stopped", "works": "ok"
    }  # fmt: skip
    assert "last words" in parts["dies"]["output"] and parts["hangs"]["data"]["done"] == 3
    report = gpu.report_of(parts)
    wrong = gpu.problems(report)
    assert len(wrong) == 3 and "finds: two kernels differ" in wrong and report["parts"]["hangs"]["done"] == 3
    text = gpu.summary(report)
    assert "**3 problems:**" in text and "The machine is unknown." in text
    assert gpu.run([gpu.Group(1, [script("late", FINDS)])], 1.0)["late"]["status"] == "not run"


@pytest.mark.parametrize(
    ("said", "code", "status", "n_problems"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "ok", 0),
        ("ERROR SUMMARY: 2 errors", 9, "failed", 1),
        ("cannot attach to this process", 1, "unusable", 0),
    ],
)
def test_a_sanitizer_that_does_not_work_here_is_not_an_error_of_ours(said, code, status, n_problems):
    parts = gpu.run_group([script("memcheck", f"import sys; print({said!r}); sys.exit({code})")], 20.0)
    assert parts["memcheck"]["status"] == status and len(parts["memcheck"]["problems"]) == n_problems


def a_part(tmp_path, **changes):
    options = {
        "device": "cpu",
        "seeds": 5,
        "ops": [],
        "out": tmp_path / "part.json",
        "seconds": 60.0,
        "until": None,
        **changes,
    }
    return gpu_parts.Part(SimpleNamespace(**options))


def toy_module(run):
    return SimpleNamespace(
        problem=lambda seed: Problem(f"p{seed}", (torch.full((2,), float(seed)),)),
        run=lambda problem, backend: run(problem),
        complaint=lambda problem, found: "" if torch.equal(found[0], problem.arguments[0]) else "differs",
    )


def test_parity_counts_failures_refusals_and_unequal_repeats():
    noise = iter(range(10**6))

    def refuses(problem):
        raise CaptError("toy: backend='cuda' was forced and cannot run: this op has no such kernel")

    right = gpu_parts.parity_of(toy_module(lambda p: p.arguments), "cpu", "cpu", 30, 60)
    assert (right["cases"], right["failed"], right["repeats"]) == (30, 0, 30)
    wrong = gpu_parts.parity_of(toy_module(lambda p: (p.arguments[0] + 1,)), "cpu", "cpu", 30, 60)
    assert wrong["failed"] == 30 and len(wrong["failures"]) == gpu_parts.KEPT
    absent = gpu_parts.parity_of(toy_module(refuses), "cuda", "cpu", 30, 60)
    assert absent["cases"] == 0 and absent["failed"] == 0 and "no such kernel" in absent["note"]
    late = gpu_parts.parity_of(toy_module(lambda p: p.arguments), "cpu", "cpu", 30, -1)
    assert late["cases"] == 0 and "stopped after" in late["note"]
    unequal = gpu_parts.parity_of(toy_module(lambda p: (torch.tensor(float(next(noise))),)), "cpu", "cpu", 3, 60)
    assert unequal["repeats"] is None and "differ in their bits" in unequal["failures"][-1]


def test_kernels_that_should_run_and_do_not_are_problems():
    row = {"cases": 500, "repeats": 100, "note": ""}
    assert gpu_parts.missing(row, "cuda", 500) == []
    assert "no case ran (library is gone)" in gpu_parts.missing(
        {"cases": 0, "repeats": 0, "note": "library is gone"}, "cuda", 500
    )
    absent = {"cases": 0, "repeats": 0, "note": f"toy: {gpu_parts.NO_SUCH_KERNEL}"}
    assert gpu_parts.missing(absent, "cuda", 500) == []
    assert "only 3 of 100 repeated runs" in gpu_parts.missing({**row, "repeats": 3}, "cuda", 500)
    assert gpu_parts.missing({**row, "repeats": 3}, "cuda", 3) == []
    assert "only 500 of 500 cases and the large" in gpu_parts.missing({**row, "note": "stopped"}, "cuda", 500)[0]


def test_the_large_band_runs_after_the_seeds():
    seen = []
    module = toy_module(lambda p: seen.append(p.label) or p.arguments)
    module.LARGE_SEEDS = range(1000, 1003)
    row = gpu_parts.parity_of(module, "cpu", "cpu", 4, 60)
    assert row["cases"] == 7 and seen[:7] == ["p0", "p1", "p2", "p3", "p1000", "p1001", "p1002"]


def test_nan_payloads_and_signs_count_as_bits():
    zero = torch.tensor([0.0])
    assert gpu_parts.same_bits((zero,), (zero.clone(),)) and not gpu_parts.same_bits((zero,), (-zero,))
    assert not gpu_parts.same_bits((zero,), (zero.double(),))
    nan = torch.tensor(float("nan"), dtype=torch.float16)
    assert gpu_parts.same_bits((nan,), (nan.clone(),))


def test_integration_records_every_op_and_checks_it():
    calls, _ = integration.recorded(parity, "cpu", "cpu")
    assert set(calls) == {"capt::grid_adapter", "capt::grid_adapter_correlate"}
    assert any(value.requires_grad for value in calls["capt::grid_adapter"][1] if isinstance(value, torch.Tensor))
    outcome = integration.check_integration("grid_adapter", parity, "cpu", "cpu")
    assert set(outcome) == {"opcheck", "compile", "compile public"}
    assert all(text.startswith("ok") for text in outcome.values()), outcome
    assert "grid_adapter_correlate" in outcome["opcheck"]
    absent = integration.check_integration("grid_adapter", parity, "cuda", "cpu")
    assert list(absent) == ["ops"] and absent["ops"].startswith("none: grid_adapter: backend='cuda' was forced")


def test_integration_reports_what_is_wrong(monkeypatch):
    monkeypatch.setattr(integration, "check_opcheck", lambda func, args: 1 / 0)
    outcome = integration.check_integration("grid_adapter", parity, "cpu", "cpu")
    assert "ZeroDivisionError" in outcome["opcheck"]


def test_the_bench_part_reports_rows_and_wrong_results(tmp_path, monkeypatch):
    from tests.test_benchmarks import made_up

    good, bad = made_up(goals={("near",): 1.5}), made_up(wrong="no match", shape="bad")
    monkeypatch.setattr(gpu_parts.suite, "modules", lambda: ["toy"])
    monkeypatch.setattr(gpu_parts.suite, "cases_of", lambda file, device: [good, bad])
    monkeypatch.setattr(gpu_parts.suite, "set_up", lambda: None)
    part = a_part(tmp_path)
    gpu_parts.bench(part)
    assert [row["shape"] for row in part.data["rows"]] == ["s"] and "no match" in part.data["problems"][0]
    late = a_part(tmp_path, seconds=-1.0)
    gpu_parts.bench(late)
    assert late.data["rows"] == [] and len(late.data["left_out"]) == 2
    text = gpu.summary(gpu.report_of({"bench": {"status": "ok", "seconds": 1.0, "problems": [], "data": part.data}}))
    assert "## Timings" in text and "| toy | forward | s |" in text


def test_the_sanitized_part_runs_every_op(tmp_path):
    part = a_part(tmp_path, ops=["grid_adapter"], seeds=3)
    gpu_parts.sanitized(part)
    assert part.data["runs"] == {"grid_adapter": 3 + gpu_parts.SANITIZED_LARGE}
    assert gpu_parts.main(["sanitized", "--out", str(tmp_path / "x.json"), "--device", "cpu", "--ops", "nowhere"]) == 1
    assert "No module named" in json.loads((tmp_path / "x.json").read_text())["problems"][0]
