"""Everything a CUDA machine is needed for, in one run of at most ten minutes: ``python -m benchmarks.gpu``.

Needs no network. ``--build`` first compiles the native part for this machine in place (torch, a C++ compiler, cmake,
ninja, pybind11 and nvcc must be there). Then, each part in processes of its own that may fail or be stopped without
harm to the others: machine card; parity of every op on its CUDA and Triton kernels over 500 seeded problems; torch
integration; compute-sanitizer where installed; the benchmark cases. A part gets its share of the time that is left,
so what one does not use goes to those after it.

Writes benchmarks/results/<gpu>-<date>.json and a summary with the same name in Markdown. Exit code 0: passed, or
skipped because there is no GPU; 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Small problems of each op under a sanitizer.
SANITIZER_SEEDS = 10
TOTAL_SECONDS = 585.0
#: Seconds between asking a part to stop by itself and stopping it.
GRACE = 8.0
OUTPUT_KEPT = 3000


@dataclass(frozen=True)
class Part:
    """A process. writes: it takes --out and --until and writes findings. environment: added to ours."""

    name: str
    command: list[str]
    writes: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Parts that run side by side; weight: share of the time that is left, against the groups after it."""

    weight: float
    parts: list[Part]


def own(part: str, *arguments: str) -> list[str]:
    """Command of a part in benchmarks/gpu_parts.py."""
    return [sys.executable, "-m", "benchmarks.gpu_parts", part, *arguments]


def groups(device: str, ops: list[str], seeds: int, build: bool, only: set[str]) -> list[Group]:
    """The whole run, in order. Timings come last but alone: nothing else then uses the device."""
    from_cpu = ["--device", device]
    program = shutil.which("compute-sanitizer")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    found = [Group(15, [Part("card", own("card", *from_cpu))])]
    if build:
        found.insert(0, Group(170, [Part("build", pip, writes=False, environment={"CAPT_CUDA": "ON"})]))
    per_op = ["--seeds", str(seeds), *from_cpu]
    checks = [Part(f"parity {op}", own("parity", "--ops", op, *per_op)) for op in ops]
    checks += [Part(f"integration {op}", own("integration", "--ops", op, *from_cpu)) for op in ops]
    found.append(Group(140, checks))
    if program:
        watched = own("sanitized", "--seeds", str(SANITIZER_SEEDS), "--ops", *ops, "--device", device)
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(
            Group(
                110,
                [
                    Part(tool, [program, "--tool", tool, "--error-exitcode", "9", *watched], environment=environment)
                    for tool in SANITIZER_TOOLS
                ],
            )
        )
    found.append(Group(150, [Part("bench", own("bench", "--ops", *ops, *from_cpu))]))
    if only:
        found = [Group(g.weight, [part for part in g.parts if part.name.split()[0] in only]) for g in found]
    return [group for group in found if group.parts]


def run_group(parts: list[Part], seconds: float) -> dict[str, dict[str, Any]]:
    """Run parts side by side for at most ``seconds``; what each of them found, and how it ended."""
    outcome: dict[str, dict[str, Any]] = {}
    threads = str(max(1, (os.cpu_count() or 1) // len(parts)))
    with tempfile.TemporaryDirectory() as folder:
        started = []
        begin = time.monotonic()
        for number, part in enumerate(parts):
            out, log = Path(folder) / f"{number}.json", (Path(folder) / f"{number}.log").open("w+b")
            command = list(part.command)
            if part.writes:
                command += ["--out", str(out), "--until", f"{time.time() + max(1.0, seconds - GRACE):.0f}"]
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": "0", **part.environment}
            if len(parts) == 1:
                environment.pop("OMP_NUM_THREADS")
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            started.append((part, process, out, log))
        for part, process, out, log in started:
            record: dict[str, Any] = {}
            try:
                process.wait(timeout=max(0.1, begin + seconds - time.monotonic()))
                record["status"] = "ok" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                stop(process)
                record["status"] = "stopped"
            record["seconds"] = round(time.monotonic() - begin, 1)
            record["allowed"] = round(seconds, 1)
            record["exit_code"] = process.returncode
            log.seek(0)
            record["output"] = log.read().decode(errors="replace")
            log.close()
            record["data"] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
            outcome[part.name] = judged(part, record)
    return outcome


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and everything it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=3)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def judged(part: Part, record: dict[str, Any]) -> dict[str, Any]:
    """The record with its problems listed and without output that says nothing."""
    problems = list(record["data"].pop("problems", []))
    if part.name in SANITIZER_TOOLS:
        summary = re.findall(r"ERROR SUMMARY: (\d+) error", record["output"])
        if record["status"] == "stopped" and not any(map(int, summary)):
            record["status"] = "incomplete"  # slow, not wrong: the runs it did are in its data
        elif record["status"] != "stopped" and not summary:
            record["status"] = "unusable"  # the tool itself does not work on this machine
    if record["status"] == "stopped":
        problems.append(f"stopped after {record['allowed']:.0f} s")
    if record["status"] == "failed" and not problems:
        problems.append(f"exit code {record['exit_code']}")
    record["problems"] = problems
    if record["status"] == "ok" and not problems:
        record["output"] = ""
    record["output"] = record["output"].replace(str(ROOT), ".")[-OUTPUT_KEPT:]
    return record


def run(plan: list[Group], seconds: float) -> dict[str, dict[str, Any]]:
    """All groups one after another within ``seconds``."""
    end = time.monotonic() + seconds
    outcome: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(plan):
        left = end - time.monotonic()
        share = group.weight / sum(later.weight for later in plan[number:])
        if left < 2:
            outcome |= {
                part.name: {"status": "not run", "problems": ["no time was left"], "data": {}, "seconds": 0.0}
                for part in group.parts
            }
            continue
        # A part may use more than its share, as long as those after it keep half of theirs.
        outcome |= run_group(group.parts, left * 0.5 * (1 + share))
        for part in group.parts:
            print(f"{part.name}: {outcome[part.name]['status']}, {outcome[part.name]['seconds']} s", flush=True)
    return outcome


def report_of(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One record of the run: machine, findings by kind, how each part ended."""
    report: dict[str, Any] = {"machine": {}, "parity": [], "integration": [], "rows": [], "left_out": []}
    for record in parts.values():
        for name, found in record.pop("data").items():
            if isinstance(report.get(name), list):
                report[name] += found
            elif name == "machine":
                report[name] = found
            else:
                record[name] = found
    report["goals"] = tables.goals(report["rows"])
    report["parts"] = parts
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """One line for each thing that is wrong."""
    lines = [f"{name}: {text}" for name, record in report["parts"].items() for text in record["problems"]]
    if report["parity"] and not any(row["cases"] for row in report["parity"]):
        lines.append("no kernel of any op ran: " + report["parity"][0]["note"])
    return lines


def summary(report: dict[str, Any]) -> str:
    """The report for a person, in Markdown."""
    machine = report["machine"]
    lines = ["# GPU run", "", tables.measured_on(machine) if machine else "The machine is unknown.", ""]
    wrong = problems(report)
    lines += ["**Passed.**" if not wrong else f"**{len(wrong)} problems:**", ""]
    lines += [f"- {line}" for line in wrong] + ([""] if wrong else [])
    ended = [[name, record["status"], f"{record['seconds']:.0f}", f"{record.get('allowed', 0):.0f}"]
             for name, record in report["parts"].items()]  # fmt: skip
    lines += ["## Parts", "", tables.markdown(["part", "ended", "seconds", "allowed"], ended, left=2), ""]
    if report["parity"]:
        cells = [
            [row["op"], row["backend"], str(row["cases"]), str(row["failed"]), str(row["refused"]),
             str(row.get("repeats") or "-"), row["note"] or "-"]
            for row in report["parity"]
        ]  # fmt: skip
        header = ["op", "backend", "cases", "failed", "refused", "equal repeats", "note"]
        lines += ["## Parity with the reference", "", tables.markdown(header, cells, left=2), ""]
    if report["integration"]:
        lines += ["## Under torch", ""]
        lines += [f"- {row['op']}, {row['backend']}: " + "; ".join(f"{k}: {v}" for k, v in row["outcome"].items())
                  for row in report["integration"]] + [""]  # fmt: skip
    if not any(tool in report["parts"] for tool in SANITIZER_TOOLS):
        lines += ["compute-sanitizer: not run (not on PATH, or not asked for).", ""]
    if report["rows"]:
        lines += ["## Timings", "", "CUDA-graph replay, second-level cache emptied before every sample.", ""]
        lines += [tables.goals_table(report["goals"]), ""] if report["goals"] else []
        lines += [tables.rows_table(report["rows"]), ""]
    lines += ["Left out:", *(f"- {label}" for label in report["left_out"]), ""] if report["left_out"] else []
    return "\n".join(lines)


def why_not() -> str:
    """Why no GPU run is possible here; empty if it is."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no CUDA device"


def written(report: dict[str, Any], folder: Path) -> Path:
    """Write JSON and summary; the name says GPU and date."""
    machine = report["machine"]
    place = machine.get("gpu", {}).get("name") or "cpu-rehearsal"
    stem = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-") + "-" + machine.get("date", "undated")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(summary(report), encoding="utf-8")
    return folder / f"{stem}.json"


def discovered_ops() -> list[str]:
    """Ops with seeded problems, without importing any of them: they need the library that is yet to be built."""
    return [path.stem for path in sorted((ROOT / "benchmarks" / "parity").glob("[!_]*.py"))]


def main(arguments: list[str] | None = None) -> int:
    """Run on the GPU, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="compile the native part first, in place")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearse without a GPU")
    parser.add_argument("--ops", nargs="*", default=[], help="only these ops")
    parser.add_argument("--parts", nargs="*", default=[], help="only these parts: parity, integration, memcheck, ...")
    parser.add_argument("--seeds", type=int, default=500, help="parity problems of each op and backend")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="the whole run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the report")
    options = parser.parse_args(arguments)
    reason = why_not() if options.device == "cuda" else ""
    if reason:
        print(f"GPU run skipped: {reason}")
        return 0
    ops = options.ops or discovered_ops()
    only = {"card", *options.parts} if options.parts else set()
    plan = groups(options.device, ops, options.seeds, options.build, only)
    report = report_of(run(plan, options.seconds))
    print("\n" + summary(report))
    print(f"written: {written(report, options.results).name} and .md")
    return 1 if problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
