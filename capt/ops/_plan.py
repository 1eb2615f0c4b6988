"""Which backend runs an op, and why: one immutable record per decision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch

from capt._build import native
from capt.errors import CaptError

#: Facts of this process, read once: a look-up inside torch.compile would be traced.
NATIVE = native()
HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Plan:
    """The decision for one call.

    op: name of the op. backend: one of ``BACKENDS``. reason: one sentence for a person.
    bytes: compulsory memory traffic (inputs read once, outputs written once), 0 when unknown.
    flops: multiply and add counted separately, 0 when unknown.
    rejected: every faster-sounding backend that cannot or should not run, with the reason.
    """

    op: str
    backend: str
    reason: str
    bytes: int = 0
    flops: int = 0
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        if self.bytes:
            lines.append(f"  {self.bytes:,} bytes, {self.flops:,} FLOP")
        return "\n".join(lines)


def check_backend_name(op: str, backend: str | None) -> None:
    """Raise unless ``backend`` is None or a known name."""
    if backend is not None and backend not in BACKENDS:
        raise CaptError(
            f"{op}: backend='{backend}' is unknown; use one of {', '.join(BACKENDS)}, or None to let the plan choose"
        )


def forced_impossible(op: str, backend: str, why: str) -> CaptError:
    """The error of a forced backend that cannot run."""
    return CaptError(
        f"{op}: backend='{backend}' was forced and cannot run: {why}. Use backend=None to let the plan choose"
    )


@dataclass(frozen=True)
class Dispatch:
    """How an op chooses its backend.

    op: name of the op. reasons: backends that have a kernel, in order of preference, each with the reason to take it.
    dtypes: what the kernels store and load.
    """

    op: str
    reasons: dict[str, str]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def obstacle(self, backend: str, device: str, dtype: torch.dtype) -> str:
        """Why ``backend`` cannot run on this device and dtype; empty if it can."""
        if backend not in self.reasons:
            return "this op has no such kernel"
        if device != ("cpu" if backend == "cpu" else "cuda"):
            return f"the tensors are on {device}"
        if dtype not in self.dtypes:
            known = ", ".join(str(known).removeprefix("torch.") for known in self.dtypes)
            return f"{str(dtype).removeprefix('torch.')} has no kernel ({known} have)"
        if backend == "triton":
            return "" if HAS_TRITON else "triton is not installed"
        if not NATIVE.loaded:
            return NATIVE.reason
        if backend == "cuda" and NATIVE.cuda is None:
            return "capt was built without CUDA (no nvcc, or CAPT_CUDA=OFF)"
        return ""

    def choose(
        self,
        device: str,
        dtype: torch.dtype,
        backend: str | None,
        disadvantages: dict[str, str] | None = None,
        obstacles: dict[str, str] | None = None,
    ) -> tuple[str, str]:
        """(backend, reason). disadvantages: why a backend that can run is not taken unless forced; empty: no reason.

        obstacles: why a backend cannot run in this call, beside what ``obstacle`` knows; empty: it can.
        Raises CaptError when a forced backend cannot run.
        """
        check_backend_name(self.op, backend)
        if backend == "reference":
            return "reference", "forced"
        if backend is not None:
            why = self.obstacle(backend, device, dtype) or (obstacles or {}).get(backend, "")
            if why:
                raise forced_impossible(self.op, backend, why)
            return backend, "forced"
        against = (disadvantages or {}), (obstacles or {})
        for name, reason in self.reasons.items():
            if not self.obstacle(name, device, dtype) and not any(known.get(name) for known in against):
                return name, reason
        return "reference", "no kernel can run here, or none would be faster"

    def rejected(self, device: str, dtype: torch.dtype, disadvantages: dict[str, str] | None = None) -> dict[str, str]:
        """Every kernel that cannot or should not run, with the reason."""
        found = {
            name: self.obstacle(name, device, dtype) or (disadvantages or {}).get(name, "") for name in BACKENDS[1:]
        }
        return {name: why for name, why in found.items() if why}


def slow_half(dtype: torch.dtype) -> str:
    """Why a CPU kernel should not take this dtype here; empty if nothing speaks against it."""
    if dtype == torch.float16 and NATIVE.cpu_level == "baseline":
        return "this CPU converts float16 in software, which is slower than the reference"
    return ""
