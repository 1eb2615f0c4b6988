"""Does a backend's op behave under torch: schema, compile, streams, CUDA graphs? One check for all ops.

The calls to check are those that the op's own seeded problems make: whatever reaches ``torch.ops`` is recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from capt import ops
from capt.errors import CaptError

NAMESPACES = ("capt", "capt_triton")
#: Seeds that are searched for a call of every op with no empty tensor; spread, as some problems change slowly.
SEEDS = range(0, 500, 11)
#: Inputs of a captured graph are multiplied by these before it is replayed.
FACTORS = (1.0, -3.0, 0.5)


Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def note_call(calls: Calls, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Keep a call of every op of ours whose tensors all hold something: the first finite one, else the first."""
    name = str(func).removesuffix(".default").replace(".", "::")
    if name.split("::")[0] not in NAMESPACES or kwargs:
        return
    if name in calls and tame(calls[name][1]):
        return
    tensors = [value for value in args if isinstance(value, Tensor)]
    if tensors and all(value.numel() for value in tensors) and (name not in calls or tame(args)):
        calls[name] = (func, tuple(leaf(value) if isinstance(value, Tensor) else value for value in args))


def tame(args: tuple[Any, ...]) -> bool:
    """All numbers are finite: opcheck does not take NaN for equal to NaN."""
    return all(bool(value.detach().isfinite().all()) for value in args if isinstance(value, Tensor))


def leaf(value: Tensor) -> Tensor:
    """The tensor without its history; it asks for a gradient if it did."""
    return value.detach().requires_grad_(value.requires_grad)


class Recorder(TorchFunctionMode):
    """Sees calls above autograd: their tensors still ask for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note_call(self.calls, func, args, kwargs)
        return func(*args, **(kwargs or {}))


class LowRecorder(TorchDispatchMode):
    """Sees calls below autograd: those of a backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note_call(self.calls, func, args, kwargs)
        return func(*args, **(kwargs or {}))


def recorded(module: Any, backend: str, device: str) -> tuple[Calls, str]:
    """Calls of ops that the problems of a parity module lead to; and why there are none."""
    recorder, low, why = Recorder(), LowRecorder(), "its problems call no op of ours"
    for seed in SEEDS:
        problem = module.problem(seed).to(device)
        try:
            with recorder, low:
                module.run(problem, backend=backend)
        except CaptError as error:
            why = str(error)
    return {**low.calls, **recorder.calls}, why


def tensors_of(result: Any) -> list[Tensor]:
    """A result as a list of tensors."""
    return list(result) if isinstance(result, tuple | list) else [result]


def same(found: Any, wanted: Any) -> None:
    """Bitwise, NaN included."""
    torch.testing.assert_close(tensors_of(found), tensors_of(wanted), rtol=0, atol=0, equal_nan=True)


def detached(args: tuple[Any, ...], change: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[Any, ...]:
    """Arguments without history, each tensor changed."""
    return tuple(tree_map(lambda v: change(v.detach()) if isinstance(v, Tensor) else v, list(args)))


def check_opcheck(func: Any, args: tuple[Any, ...]) -> None:
    """Schema, fake kernel and, where inputs ask for gradients, their registration."""
    try:
        torch.library.opcheck(func, args)
    except Exception as error:
        if "differentiable once" not in str(error):
            raise
        torch.library.opcheck(func, detached(args))  # the backward of an op: it has no gradient of its own


def check_compile(func: Any, args: tuple[Any, ...]) -> None:
    """One graph, the same bits."""
    plain = detached(args)
    compiled = torch.compile(lambda *values: func(*values), fullgraph=True, backend="aot_eager")
    same(compiled(*plain), func(*plain))


def check_side_stream(func: Any, args: tuple[Any, ...]) -> None:
    """A late producer on another stream: a kernel on the wrong stream would read the zeros that were there before."""
    plain = detached(args)
    wanted = func(*plain)
    waiting = detached(args, lambda v: torch.zeros_like(v) if v.is_floating_point() else v.clone())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for target, source in zip(waiting, plain, strict=True):
            if isinstance(target, Tensor) and target.is_floating_point():
                target.copy_(source)
        found = func(*waiting)
    stream.synchronize()
    same(found, wanted)


def check_cuda_graph(func: Any, args: tuple[Any, ...]) -> None:
    """Captured once, replayed with other inputs in place."""
    source, static = detached(args), detached(args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        func(*static)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = func(*static)
    for factor in FACTORS:
        for target, value in zip(static, source, strict=True):
            if isinstance(target, Tensor) and target.is_floating_point():
                target.copy_(value * factor)
        graph.replay()
        torch.cuda.synchronize()
        same(out, func(*detached(static)))


def public_call(op: str, module: Any) -> Callable[..., Any] | None:
    """The public function on a problem: the module's ``call``, or the op if a problem is exactly its arguments."""
    if hasattr(module, "call"):
        found: Callable[..., Any] = module.call
        return found
    function = getattr(ops, op, None)
    if function is None:
        return None
    problem = module.problem(0)
    try:
        inspect.signature(function).bind(*problem.arguments, **problem.options)
    except TypeError:
        return None
    return lambda problem, **options: function(*problem.arguments, **problem.options, **options)


def check_public_compile(op: str, module: Any, backend: str, device: str) -> str:
    """The public function in one graph, arguments checked inside it."""
    call = public_call(op, module)
    if call is None:
        return "none: the parity module has no call()"
    for seed in SEEDS:
        problem = module.problem(seed).to(device)
        try:
            wanted = call(problem, backend=backend)
        except CaptError:
            continue
        if all(value.numel() for value in tensors_of(wanted)):
            compiled = torch.compile(
                lambda problem=problem: call(problem, backend=backend), fullgraph=True, backend="aot_eager"
            )
            same(compiled(), wanted)
            return "ok"
    return "none: no problem could run"


def check_integration(op: str, module: Any, backend: str, device: str) -> dict[str, str]:
    """Outcome of every check: "ok (...)", "none: why it does not apply", or what went wrong."""
    calls, why = recorded(module, backend, device)
    if not calls:
        return {"ops": f"none: {why}"}
    checks = {"opcheck": check_opcheck, "compile": check_compile}
    if device == "cuda":
        checks |= {"side stream": check_side_stream, "cuda graph": check_cuda_graph}
    outcome = {}
    for name, check in checks.items():
        passed, failed = [], []
        for call, (func, args) in calls.items():
            try:
                check(func, args)
                passed.append(call.split("::")[1])
            except Exception as error:
                failed.append(f"{call}: {type(error).__name__}: {str(error)[:500]}")
        outcome[name] = "; ".join(failed) if failed else f"ok ({', '.join(passed)})"
    try:
        outcome["compile public"] = check_public_compile(op, module, backend, device)
    except Exception as error:
        outcome["compile public"] = f"{type(error).__name__}: {str(error)[:500]}"
    return outcome
