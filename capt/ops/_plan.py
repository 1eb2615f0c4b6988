"""Which backend runs an op, and why: one immutable record per decision."""

from __future__ import annotations

from dataclasses import dataclass, field

from capt.errors import CaptError

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


def reference_only(op: str, backend: str | None = None) -> Plan:
    """The plan of an op that has only its reference so far; a forced other backend raises."""
    check_backend_name(op, backend)
    why = "no kernel yet for this op"
    if backend not in (None, "reference"):
        raise forced_impossible(op, str(backend), why)
    return Plan(op, "reference", "forced" if backend else why, rejected={name: why for name in BACKENDS[1:]})
