"""Seeded problems for every op and the rule their answers must meet, for the tests and for a GPU run alike.

One module per op with three functions:
    problem(seed)                 a Problem on the CPU, the same for the same seed; sizes stay small
    run(problem, **options)       a tuple of results: outputs, then gradients if the op has any; options go to the op
    complaint(problem, found)     what is wrong with results, empty if nothing is
and, where it can be one, a fourth:
    call(problem, **options)      the op on the problem's arguments without gradients, for torch.compile
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of one call.

    label: for a person. arguments: positional ones. options: keyword ones. exact: results must be bitwise equal to the
    reference (integer-valued data), otherwise as accurate as the reference in the same precision.
    """

    label: str
    arguments: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False

    def to(self, device: str) -> Problem:
        """The same problem with its tensors on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        options = {name: move(value) for name, value in self.options.items()}
        return replace(self, arguments=tuple(move(value) for value in self.arguments), options=options)


def excess(found: Tensor, own: Tensor, oracle: Tensor, inputs: float) -> str:
    """Empty if ``found`` errs at most twice as much against float64 as torch in the same precision does.

    found: result under test. own: the reference in the precision of found. oracle: the reference in float64. inputs:
    largest magnitude of the terms that were summed: one rounding quantum of it is allowed on top, at least the smallest
    subnormal number. Places where the oracle is not finite must hold the same value.
    """
    if found.shape != oracle.shape:
        return f"shape {list(found.shape)} instead of {list(oracle.shape)}"
    exact, mine, theirs = (value.detach().double() for value in (oracle, found, own))
    odd = ~exact.isfinite()
    if not torch.equal(mine[odd].nan_to_num(nan=7e77), exact[odd].nan_to_num(nan=7e77)):
        return "NaN or infinity at other places than in the reference"
    if odd.all():
        return ""
    kind = torch.finfo(found.dtype)
    quantum = kind.eps * max(float(exact[~odd].abs().max()), inputs, kind.smallest_normal)
    limit = 2 * float((theirs - exact)[~odd].abs().nan_to_num(nan=0.0).max()) + quantum
    error = float((mine - exact)[~odd].abs().nan_to_num(nan=float("inf")).max())
    return "" if error <= limit else f"error {error:.3g}, allowed {limit:.3g}"


def gradients(outs: Sequence[Tensor], upstream: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``wanted``; zeros where no result depends on one, as in a problem without rows."""
    pairs = [(out, up.to(out.dtype)) for out, up in zip(outs, upstream, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(leaf) for leaf in wanted)
    used, ups = zip(*pairs, strict=True)
    return torch.autograd.grad(used, wanted, ups, materialize_grads=True)
