"""Everything a CUDA machine is needed for, in one run: ``python -m benchmarks.gpu`` (or ``make gpu``).

Builds nothing itself: install capt first (``pip install --no-build-isolation .``). Then: machine card, parity of the
CUDA and Triton kernels with float64, torch integration, compute-sanitizer if installed, timings against the rivals.
Writes benchmarks/results/gpu.json. Exit code 0: passed, or skipped because there is no GPU; 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import grid_adapter
from benchmarks.machine import machine_card
from benchmarks.parity import grid_adapter as parity
from capt import ops
from capt.errors import CaptError

RESULT = Path(__file__).parent / "results" / "gpu.json"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def why_not() -> str:
    """Why no GPU run is possible here; empty if it is."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no CUDA device"


def usable_backends() -> dict[str, str]:
    """cuda and triton, each with the reason why it cannot run (empty: it can)."""
    reasons = {}
    for backend in ("cuda", "triton"):
        try:
            ops.explain("grid_adapter", batch=1, grid=(2, 2), dim=8, device="cuda", backend=backend)
            reasons[backend] = ""
        except CaptError as error:
            reasons[backend] = str(error)
    return reasons


def sanitize() -> dict[str, str]:
    """The parity run under each compute-sanitizer tool."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    outcome = {}
    for tool in SANITIZER_TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--parity"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            outcome[tool] = "ok" if done.returncode == 0 else done.stdout[-2000:]
        except subprocess.TimeoutExpired:
            outcome[tool] = "skipped: no result within 300 s"
    return outcome


def run(device: str, backends: dict[str, str], shapes: list[str]) -> dict[str, Any]:
    """Parity, integration and timings of every backend that can run."""
    report: dict[str, Any] = {"parity": [], "integration": {}, "timings": [], "unusable": {}}
    for backend, reason in backends.items():
        if reason:
            report["unusable"][backend] = reason
            continue
        report["parity"] += parity.check_backend(backend, device)
        report["integration"][backend] = parity.check_integration(backend, device)
        for shape in shapes:
            for dtype in grid_adapter.DTYPES:
                for direction in ("forward", "both"):
                    report["timings"].append(grid_adapter.compare(shape, dtype, direction, device, backend))
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """One line for each thing that is wrong."""
    lines = [
        f"parity {row['backend']} {row['shape']} {row['dtype']}: {row}" for row in report["parity"] if not row["ok"]
    ]
    for tool, outcome in report.get("sanitizer", {}).items():
        if tool != "skipped" and outcome != "ok" and not outcome.startswith("skipped"):
            lines.append(f"compute-sanitizer {tool}: {outcome}")
    if not report["parity"]:
        lines.append(f"no kernel ran on the GPU: {report['unusable']}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run on the GPU, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parity", action="store_true", help="only compare numbers (what the sanitizer runs)")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        print(f"GPU run skipped: {reason}")
        return 0
    backends = usable_backends()
    report = run("cuda", backends, [] if options.parity else list(grid_adapter.SHAPES))
    if not options.parity:
        report["machine"] = machine_card("cuda")
        report["sanitizer"] = sanitize()
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for row in report["timings"]:
            print(f"{row['backend']:7} {row['shape']:16} {row['dtype']:9} {row['direction']:8} {row['ms']:8.4f} ms "
                  f"{row['ratio']:6.2f}x vs {row['best_rival']}")  # fmt: skip
        print("written: benchmarks/results/gpu.json")
    wrong = failures(report)
    print("\n".join(wrong) if wrong else f"GPU run passed: {len(report['parity'])} parity cases")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
