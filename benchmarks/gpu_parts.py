"""The parts of the GPU run, each a process of its own: ``python -m benchmarks.gpu_parts PART --out FILE``.

Every part writes what it knows to its file after each step, so that a part that is stopped or dies leaves the rest.
With ``--device cpu`` the same code runs on a machine without a GPU, on the CPU kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import suite
from benchmarks.integration import check_integration
from benchmarks.machine import machine_card
from capt.errors import CaptError

PARITY = Path(__file__).parent / "parity"
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
SEEDS = 500
REPEATS = 100
#: Problems of the large band that a sanitizer sees: each of them takes it seconds.
SANITIZED_LARGE = 3
#: How an op says that a kernel of this kind does not exist, as opposed to one that should be there and is not.
NO_SUCH_KERNEL = "this op has no such kernel"
#: Failures kept word for word; more of the same do not help.
KEPT = 5


def parity_ops() -> list[str]:
    """Ops that have seeded problems."""
    return [path.stem for path in sorted(PARITY.glob("[!_]*.py"))]


class Part:
    """A part at work: its deadline, and the file its findings go to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.seeds, self.ops, self.out = options.device, options.seeds, options.ops, options.out
        self.stop = time.monotonic() + (options.seconds if options.until is None else options.until - time.time())
        self.data: dict[str, Any] = {"problems": []}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.stop - time.monotonic()

    def save(self) -> None:
        """Write the findings so far, all or nothing."""
        scratch = self.out.with_suffix(".part")
        scratch.write_text(json.dumps(self.data), encoding="utf-8")
        scratch.replace(self.out)

    def wrong(self, what: str) -> None:
        """Something that fails the run."""
        self.data["problems"].append(what)
        self.save()


def on_cpu(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results where the reference can be compared with them."""
    return tuple(value.cpu() if isinstance(value, Tensor) else value for value in results)


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Equal shapes, dtypes and bits."""

    def raw(value: Tensor) -> Tensor:
        return value.contiguous().flatten().view(torch.uint8)

    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True)
    )


def parity_of(module: Any, backend: str, device: str, seeds: int, seconds: float) -> dict[str, Any]:
    """At least ``seeds`` problems and the large band on one backend against the reference, and repeated runs of one."""
    stop = time.monotonic() + seconds
    row: dict[str, Any] = {"backend": backend, "cases": 0, "failed": 0, "refused": 0, "failures": [], "note": ""}
    row["repeats"] = 0
    large = iter(large_seeds(module))
    small = iter(range(2 * seeds))
    while (number := next(large if row["cases"] >= seeds else small, None)) is not None:
        if time.monotonic() > stop:
            row["note"] = f"stopped after {seconds:.0f} s"
            break
        problem = module.problem(number)
        try:
            wrong = module.complaint(problem, on_cpu(module.run(problem.to(device), backend=backend)))
        except CaptError as error:
            if "cannot run" not in str(error):
                wrong = f"CaptError: {error}"
            else:  # the op has no kernel of this kind, or none for this dtype
                row["refused"] += 1
                row["note"] = str(error)
                if row["refused"] == 20 and not row["cases"]:
                    break
                continue
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:500]}"
        row["cases"] += 1
        if wrong:
            row["failed"] += 1
            row["failures"] += [f"seed {number}, {problem.label}: {wrong}"][: KEPT - len(row["failures"])]
            if "CUDA error" in wrong:  # the context is lost: nothing after it can be trusted
                row["note"] = "stopped after a CUDA error"
                return row
    row["repeats"] = repeats_of(module, backend, device, max(2, min(REPEATS, seeds)), stop) if row["cases"] else 0
    if row["repeats"] is None:
        row["failures"].append("repeated runs differ in their bits")
        row["failed"] += 1
    return row


def large_seeds(module: Any) -> range:
    """Seeds of the problems that reach what small ones never do; a module may have none."""
    found: range = getattr(module, "LARGE_SEEDS", range(0))
    return found


def missing(row: dict[str, Any], device: str, seeds: int) -> list[str]:
    """What a row of the table did not do that it should have."""
    cases, repeats, found = row["cases"], row["repeats"], []
    if not cases and device == "cuda" and NO_SUCH_KERNEL not in row["note"]:
        found.append(f"no case ran ({row['note'] or 'no reason given'})")
    if cases and (cases < seeds or row["note"].startswith("stopped")):
        found.append(f"only {cases} of {seeds} cases and the large ones ({row['note']})")
    if cases and repeats is not None and repeats < min(REPEATS, seeds):
        found.append(f"only {repeats} of {min(REPEATS, seeds)} repeated runs")
    return found


def repeats_of(module: Any, backend: str, device: str, repeats: int, stop: float) -> int | None:
    """How often one problem gave the same bits; None if it once did not."""
    for seed in range(0, SEEDS, 11):  # spread: some problems change slowly with the seed, and the first are empty
        problem = module.problem(seed).to(device)
        try:
            first = module.run(problem, backend=backend)
        except CaptError:
            continue
        if not first[0].numel():
            continue
        for turn in range(1, repeats):
            if not same_bits(first, module.run(problem, backend=backend)):
                return None
            if time.monotonic() > stop + 10:
                return turn + 1
        return repeats
    return 0


def parity(part: Part) -> None:
    """Every op and backend against the reference."""
    part.data["parity"] = rows = []
    pairs = [(op, backend) for op in part.ops or parity_ops() for backend in BACKENDS[part.device]]
    for number, (op, backend) in enumerate(pairs):
        module = importlib.import_module(f"benchmarks.parity.{op}")
        row = {"op": op, **parity_of(module, backend, part.device, part.seeds, part.left() / (len(pairs) - number))}
        rows.append(row)
        for failure in row["failures"]:
            part.wrong(f"parity of {op} on {backend}: {failure}")
        for lack in missing(row, part.device, part.seeds):
            part.wrong(f"parity of {op} on {backend}: {lack}")
        part.save()


def integration(part: Part) -> None:
    """opcheck, torch.compile, side stream and CUDA graph of every op and backend."""
    part.data["integration"] = rows = []
    for op in part.ops or parity_ops():
        module = importlib.import_module(f"benchmarks.parity.{op}")
        for backend in BACKENDS[part.device]:
            outcome = check_integration(op, module, backend, part.device)
            rows.append({"op": op, "backend": backend, "outcome": outcome})
            for check, text in outcome.items():
                if not text.startswith(("ok", "none")):
                    part.wrong(f"integration of {op} on {backend}: {check}: {text}")
            part.save()


def sanitized(part: Part) -> None:
    """Small problems, then a few large ones, through the CUDA kernels alone: what compute-sanitizer watches."""
    part.data["runs"] = runs = {}
    backend = BACKENDS[part.device][0]
    for number in range(part.seeds + SANITIZED_LARGE):  # ops in turn, so that a short run has seen all of them
        for op in part.ops or parity_ops():
            if part.left() < 0:
                return
            module = importlib.import_module(f"benchmarks.parity.{op}")
            seeds = [small * 47 % SEEDS for small in range(part.seeds)] + list(large_seeds(module)[:SANITIZED_LARGE])
            if number >= len(seeds):
                continue
            try:
                on_cpu(module.run(module.problem(seeds[number]).to(part.device), backend=backend))
            except CaptError:
                continue
            runs[op] = runs.get(op, 0) + 1
            part.save()


def bench(part: Part) -> None:
    """The quick cases of every op, on the backend the plan chooses and then on Triton."""
    part.data["rows"] = rows = []
    part.data["left_out"] = left_out = []
    suite.set_up()
    turns = [(None, file) for file in suite.modules()]
    if part.device == "cuda":
        turns += [("triton", file) for file in suite.modules()]
    turns = [(backend, file) for backend, file in turns if not part.ops or file in part.ops]
    for number, (backend, file) in enumerate(turns):
        deadline = time.monotonic() + part.left() / (len(turns) - number)
        for case in _listed(part, file):
            label = f"{case.op} {case.shape} {case.dtype} {case.direction} {backend or ''}".strip()
            if time.monotonic() > deadline:
                left_out.append(label)
                continue
            try:
                row = suite.measure(case, part.device, backend, min(suite.CASE_SECONDS, part.left()))
                rows.append({"file": file, "device": part.device, **row})
            except CaptError as error:
                left_out.append(f"{label}: {error}")
            except Exception as error:
                part.wrong(f"benchmark {label}: {type(error).__name__}: {str(error)[:500]}")
            part.save()


def _listed(part: Part, file: str) -> Iterator[Any]:
    try:
        yield from suite.cases_of(file, part.device)
    except Exception as error:
        part.wrong(f"benchmark {file}: {type(error).__name__}: {str(error)[:500]}")


def card(part: Part) -> None:
    """The machine, as built."""
    part.data["machine"] = machine_card(part.device)


PARTS: dict[str, Callable[[Part], None]] = {
    "card": card,
    "parity": parity,
    "integration": integration,
    "sanitized": sanitized,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one part; the exit code says whether it found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the findings")
    parser.add_argument("--device", default="cuda", choices=BACKENDS)
    parser.add_argument("--seconds", type=float, default=120.0, help="the part stops by itself after about this long")
    parser.add_argument("--until", type=float, help="the same as a time of day, which imports count against")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--ops", nargs="*", default=[], help="only these; default: all that are found")
    options = parser.parse_args(arguments)
    part = Part(options)
    try:
        PARTS[options.part](part)
    except Exception:
        part.wrong(traceback.format_exc()[-2000:])
    part.save()
    return 1 if part.data["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
