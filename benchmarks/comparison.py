"""What a benchmark compares: our op and its rivals on the same inputs, checked before they are timed.

``benchmarks/<op>.py`` has ``cases(device)``, which yields a Case for each row of the table; ``case.build(backend)``
makes the inputs and returns a Comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Comparison:
    """Functions that take turns under the clock.

    functions: name -> call without arguments; "ours" and one or more rivals. verify: returns what is wrong with the
    results, empty if all agree; called once, before timing. bytes, flops: compulsory traffic and arithmetic of the op.
    floor: what bounds the op: "copy" (read and write), "read" or "gemm" of the row's dtype. goal: rivals -> least ratio
    (best of the named rivals / ours); several goals may name different rivals.
    """

    functions: dict[str, Callable[[], object]]
    verify: Callable[[], str]
    bytes: int
    flops: int
    floor: str
    goals: dict[tuple[str, ...], float] = field(default_factory=dict)


def without_failing(functions: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The functions that run here, each called once. A rival that raises is left out with a note; ours must not."""
    found = {}
    for name, function in functions.items():
        try:
            if name != "ours":
                function()
            found[name] = function
        except Exception as error:
            print(f"rival left out: {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Case:
    """One row of the table.

    shape, dtype: labels. direction: "forward" or "both" (forward and backward). quick: belongs to the three-minute run,
    the others need --all-shapes. build(backend) makes the Comparison.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    quick: bool
    build: Callable[[str | None], Comparison]
