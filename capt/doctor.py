"""Examination of the machine: what is there, what is missing, what that means, without changing anything."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from capt.errors import CaptError
from capt.files import read_json, sha256

Status = Literal["ok", "missing", "broken"]

# package on the index -> (module, what it is for, extra of ours that installs it)
OPTIONAL = {
    "pillow": ("PIL", "reading images", "images"),
    "open_clip_torch": ("open_clip", "open_clip models, the shipped one among them", "open-clip"),
    "transformers": ("transformers", "transformers CLIP and SigLIP models", "hf"),
    "jinja2": ("jinja2", "the HTML report", "report"),
    "triton": ("triton", "Triton kernels", "triton"),
}
# Ops with native kernels, and sizes for which the choice of backend is shown: one training batch with ViT-B/16.
EXAMPLE_SHAPES: dict[str, dict[str, Any]] = {
    "asymmetric_loss": {"batch": 32, "n_classes": 1000},
    "attention_readout": {"batch": 32, "length": 197, "n_heads": 12, "head_dim": 64, "n_groups": 3, "n_biases": 50},
    "bank_topk": {"n_queries": 32, "n_rows": 100_000, "dim": 512, "k": 10},
    "confusion_pairs": {"batch": 32, "n_classes": 1000, "k": 5},
    "expert_gating": {"tokens": 32, "dim": 768, "n_experts": 3, "top_k": 2},
    "grid_adapter": {"batch": 32, "grid": (14, 14), "dim": 768},
    "pair_frontier": {"batch": 32, "n_pairs": 8192, "n_states": 413, "n_objects": 674},
    "prompt_attention": {"batch": 32, "k": 3, "rows": (5, 5), "dim": 512},
    "prompt_attention_shared": {"batch": 32, "rows": (400, 400), "n_keys": 197, "dim": 512},
}
# How much faster than the best alternative the CPU kernels were; written by scripts/docs.py.
SPEED = Path(__file__).parent / "assets" / "kernel_speed.json"
BUILD_TOOLS = {"cmake": ("cmake",), "ninja": ("ninja",), "a C++ compiler": ("c++", "g++", "clang++")}
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what it belongs to: python, torch, gpu, kernels, packages, model, machine.
        name: the thing itself.
        status: ``ok``; ``missing``: works without it, the text says what is lost; ``broken``: needs a fix.
        text: what was found.
    """

    topic: str
    name: str
    status: Status
    text: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Everything, in the order it is shown. A check that fails becomes a ``broken`` finding, never an exception."""
    findings: list[Finding] = []
    for topic, check in (
        ("python", _python),
        ("torch", _torch),
        ("gpu", _gpu),
        ("kernels", _kernels),
        ("packages", _packages),
        ("model", _model),
        ("machine", _machine),
    ):
        findings.extend(_guarded(topic, check))
    return findings


def _guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # whatever is wrong with the machine is a finding
        yield Finding(topic, topic, "broken", f"{type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    yield Finding("python", "Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        yield Finding("python", "capt", "ok", importlib.metadata.version("capt"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("python", "capt", "missing", "runs from its source folder; 'pip install .' installs it")


def _torch() -> Iterator[Finding]:
    import torch

    cuda = torch.version.cuda
    yield Finding("torch", "torch", "ok", f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'CPU build'})")
    spin = os.environ.get("GOMP_SPINCOUNT", "unset")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores, GOMP_SPINCOUNT={spin}"
    yield Finding("torch", "threads", "ok", threads)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "GPU", "missing", "none visible to torch; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
        yield Finding("gpu", f"GPU {index}", "ok", text)


def _kernels() -> Iterator[Finding]:
    import torch

    from capt import ops
    from capt._build import native

    build = native()
    if build.loaded:
        kernels = f"CUDA {build.cuda} for {build.cuda_archs}" if build.cuda else "no CUDA kernels"
        text = f"CPU kernels at {build.cpu_level}, {kernels}, {build.compiler}"
        yield Finding("kernels", "native library", "ok", text)
    else:
        yield Finding("kernels", "native library", "missing", f"{build.reason}; the PyTorch reference runs instead")
    yield from _build_tools()
    for op in (name for name in ops.__all__ if name.islower() and name != "explain"):
        yield _op(op, "cuda" if torch.cuda.is_available() else "cpu")


def _build_tools() -> Iterator[Finding]:
    lacking = [name for name, tools in BUILD_TOOLS.items() if not any(map(shutil.which, tools))]
    if importlib.util.find_spec("pybind11") is None:
        lacking.append("pybind11")
    if lacking:
        text = f"not found: {', '.join(lacking)}; 'pip install .' from here would leave the native kernels out"
        yield Finding("kernels", "build tools", "missing", text)
    else:
        yield Finding("kernels", "build tools", "ok", "cmake, ninja, pybind11 and a C++ compiler")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        yield Finding("kernels", "nvcc", "missing", "not on PATH; a build here has no CUDA kernels")
    else:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
        release = next((line.strip() for line in output.splitlines() if "release" in line), "found")
        yield Finding("kernels", "nvcc", "ok", release)


def _op(op: str, device: str) -> Finding:
    """Backend of an op, why, and what it costs where a kernel is missing."""
    from capt import ops

    if op not in EXAMPLE_SHAPES:
        plan = ops.explain(op)
        return Finding("kernels", op, "ok", f"{plan.backend}: {plan.reason}")
    plan = ops.explain(op, **EXAMPLE_SHAPES[op], device=device)
    if plan.backend != "reference":
        return Finding("kernels", op, "ok", f"{plan.backend}: {plan.reason}")
    kernel = "cuda" if device == "cuda" else "cpu"
    why = plan.rejected.get(kernel, plan.reason)
    return Finding("kernels", op, "missing", f"reference, slower than a kernel: {why}{_cost(op)}")


def _cost(op: str) -> str:
    """What running without the kernel costs, as measured on a CPU; empty if it was not."""
    try:
        measured = read_json(SPEED)["ops"][op]
    except (CaptError, KeyError):
        return ""
    share = f"{1 / measured['ratio']:.0%} of the time of the best alternative"
    return f"; its CPU kernel took {share} ({measured['rows']} measured cases)"


def _packages() -> Iterator[Finding]:
    for package, (module, purpose, extra) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            advice = f"pip install 'capt[{extra}]'"
            yield Finding("packages", package, "missing", f"needed for {purpose}: {advice}")
        else:
            yield Finding("packages", package, "ok", importlib.metadata.version(package))


def _model() -> Iterator[Finding]:
    from capt.backbones.embedded import embedded_folder, embedded_vit_folder

    for name, folder in (("shipped model", embedded_folder()), ("shipped ViT tower", embedded_vit_folder())):
        sums = read_json(folder / "checksums.json")
        wrong = [file for file, entry in sums.items() if sha256(folder / file) != entry["sha256"]]
        size = sum((folder / file).stat().st_size for file in sums)
        if wrong:
            yield Finding("model", name, "broken", f"{', '.join(wrong)}: not what was shipped; install capt again")
        else:
            yield Finding("model", name, "ok", f"{len(sums)} checksums are right, {size / 2**20:.0f} MiB")


def _machine() -> Iterator[Finding]:
    disk = shutil.disk_usage(".")
    yield Finding("machine", "disk", "ok", f"{disk.free / _GIB:.1f} GiB free here of {disk.total / _GIB:.0f} GiB")
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        yield Finding("machine", "memory", "ok", f"{free / _GIB:.1f} GiB free of {total / _GIB:.0f} GiB")
    except (ValueError, OSError):
        yield Finding("machine", "memory", "missing", "this system does not tell")


def show(findings: list[Finding]) -> None:
    """Print findings as a table."""
    from rich.console import Console
    from rich.table import Table

    marks: dict[str, Any] = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "broken": "[red]broken[/]"}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "", "", ""):
        table.add_column(name, overflow="fold")
    previous = None
    for finding in findings:
        topic = finding.topic if finding.topic != previous else ""
        table.add_row(topic, finding.name, marks[finding.status], finding.text.replace("[", "\\["))
        previous = finding.topic
    Console(highlight=False).print(table)
