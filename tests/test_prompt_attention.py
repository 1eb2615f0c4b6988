"""prompt_attention and prompt_attention_shared on the CPU: parity, levels, threads, gradients, integration, plans."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.parity import prompt_attention as gathered
from benchmarks.parity import prompt_attention_shared as shared
from capt import ops
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.conftest import CPU_LEVELS
from tests.native_build import CSRC, LEVEL_FLAGS, run

PARITY = {"gathered": gathered, "shared": shared}
EVERY = pytest.mark.parametrize("op", PARITY)


def complaints(parity, seeds):
    problems = map(parity.problem, seeds)
    found = [parity.complaint(problem, parity.run(problem, backend="cpu")) for problem in problems]
    return [complaint for complaint in found if complaint]


@EVERY
def test_five_hundred_problems(op):
    assert complaints(PARITY[op], range(500)) == []


@EVERY
def test_large_problems(op):
    assert complaints(PARITY[op], range(1000, 1016)) == []


@EVERY
@pytest.mark.parametrize("level", range(len(CPU_LEVELS) - 1), ids=CPU_LEVELS[:-1])
def test_lower_instruction_set_levels(limit_cpu_level, op, level):
    if limit_cpu_level(level) == level:
        assert complaints(PARITY[op], [*range(45), 1000, 1005]) == []


# Every dtype; several tasks in the forward, the backward and the reductions.
@pytest.mark.parametrize(("op", "seed"), [("gathered", s) for s in (1000, 1001, 1002)] + [("shared", 1014)])
def test_results_do_not_depend_on_threads_or_repetition(op, seed):
    parity = PARITY[op]
    problem = parity.problem(seed)
    if problem.options.get("log_prior", 0) is None:
        problem.options["log_prior"] = torch.zeros(problem.options["commonality_index"].shape)
    problem.options["needs"] = (True,) * len(problem.options["needs"])
    first = parity.run(problem, backend="cpu")
    try:
        for turn in range(6):
            torch.set_num_threads(turn % 3 + 1)
            for one, other in zip(first, parity.run(problem, backend="cpu"), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_repeats_are_bitwise_identical(dtype):
    query, keys, values = torch.randn(70, 64), torch.randn(3, 37, 64), torch.randn(3, 37, 64)
    query, keys, values = query.to(dtype).requires_grad_(), keys.to(dtype), values.to(dtype)
    index = torch.randint(-1, 5, (70, 3))
    table = torch.randn(5, 2, 64).to(dtype).requires_grad_()

    def step():
        outs = ops.prompt_attention_shared(query, query, keys, values, n_heads=2, backend="cpu")
        hs = ops.prompt_attention(
            query, table, table, commonality_index=index, difference_index=index.flip(0), backend="cpu"
        )
        grads = torch.autograd.grad(sum(out.float().square().sum() for out in (*outs, *hs)), (query, table))
        return (*outs, *hs, *grads)

    first = step()
    for _ in range(100):
        assert all(map(torch.equal, first, step()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("needs", range(1, 16))
def test_every_combination_of_gradients(dtype, needs):
    """Each wanted gradient has the bits it has when all are wanted (or nearly: frozen keys take another path)."""
    wanted = tuple(bool(needs >> bit & 1) for bit in range(4))
    for parity, seed in ((gathered, 40), (shared, 31)):
        problem = parity.problem(seed)
        leaves = [value.to(dtype) if value.is_floating_point() else value for value in problem.arguments]
        options = {**problem.options, "needs": wanted}
        if parity is gathered:
            options["log_prior"] = torch.randn(options["commonality_index"].shape)
        problem = type(problem)("combination", tuple(leaves), options)
        assert parity.complaint(problem, parity.run(problem, backend="cpu")) == ""


def gathered_arguments(dtype=torch.float32, prior=True):
    query, com, diff = torch.randn(4, 12), torch.randn(5, 2, 12), torch.randn(3, 1, 12)
    index = torch.randint(-1, 3, (2, 4, 3))
    return query.to(dtype), com.to(dtype), diff.to(dtype), index[0], index[1], torch.randn(4, 3) if prior else None


@pytest.mark.parametrize("prior", [False, True])
def test_opcheck_gathered(prior):
    arguments = gathered_arguments(prior=prior)
    op = torch.ops.capt.prompt_attention
    torch.library.opcheck(op, (*arguments, 0.3))
    leaves = [v.requires_grad_() if v is not None and v.is_floating_point() else v for v in arguments]
    torch.library.opcheck(op, (*leaves, 0.3))
    weights = [weight.detach() for weight in op(*leaves, 0.3)[2:]]
    plain = [v if v is None else v.detach() for v in arguments]
    grad = torch.randn(4, 12)
    for flags in ((True, True, prior), (True, False, False), (False, False, False)):
        torch.library.opcheck(torch.ops.capt.prompt_attention_backward, (grad, grad, *plain, 0.3, *weights, *flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_shared(dtype):
    inputs = [torch.randn(*shape).to(dtype) for shape in ((3, 8), (2, 4, 8), (2, 5, 8), (2, 5, 8))]
    op = torch.ops.capt.prompt_attention_shared
    torch.library.opcheck(op, (*inputs, 2, 0.5))
    results = op(*inputs, 2, 0.5)
    grads = [torch.randn_like(value) for value in results]
    for flags in ((True, True, True), (True, False, False), (False, True, False)):
        arguments = (*grads, *inputs, *results, 2, 0.5, *flags)
        torch.library.opcheck(torch.ops.capt.prompt_attention_shared_backward, arguments)
    torch.library.opcheck(op, (*(value.requires_grad_() for value in inputs), 2, 0.5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    table, index = torch.randn(5, 2, 12), torch.randint(-1, 5, (6, 3))

    def step(query, table, keys):
        com, diff = ops.prompt_attention(query, table, table, commonality_index=index[: len(query)],
                                         difference_index=index[: len(query)])  # fmt: skip
        out, _, lse, _ = ops.prompt_attention_shared(query, query, keys, keys, n_heads=2)
        return (com * diff).sum() + out.square().sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 6):
        leaves = [torch.randn(batch, 12), table.clone(), torch.randn(2, 7, 12)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        found, want = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves))


def test_mixed_dtypes_are_computed_in_float32():
    query, com, diff, index, other, prior = gathered_arguments()
    options = {"commonality_index": index, "difference_index": other, "log_prior": prior.double()}
    found = ops.prompt_attention(query.bfloat16(), com, diff.half(), **options, backend="cpu")
    want = ops.prompt_attention(query.bfloat16(), com, diff.half(), **options, backend="reference")
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
    keys = torch.randn(2, 5, 12)
    found = ops.prompt_attention_shared(query, query.half(), keys.bfloat16(), keys, n_heads=3, backend="cpu")
    want = ops.prompt_attention_shared(query, query.half(), keys.bfloat16(), keys, n_heads=3, backend="reference")
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
    assert ops.prompt_attention_shared(query.double(), query, keys, keys, n_heads=3)[0].dtype == torch.float32


def test_shared_reads_slices_and_expanded_tensors_in_place():
    wide = torch.randn(2, 9, 48)
    keys, values = wide[..., 16:32], wide[..., 32:]
    query, one = torch.randn(4, 32)[:, 8:24], torch.randn(1, 4, 16).expand(2, -1, -1)
    found = ops.prompt_attention_shared(query, one, keys, values, n_heads=2, backend="cpu")
    torch.testing.assert_close(
        found, ops.prompt_attention_shared(query, one, keys, values, n_heads=2, backend="reference")
    )


def test_an_absent_pair_never_reads_the_table():
    table = torch.full((1, 2, 8), float("nan"))
    index = torch.full((3, 2), -1)
    outs = ops.prompt_attention(
        torch.randn(3, 8), table, table, commonality_index=index, difference_index=index, backend="cpu"
    )
    assert all(out.eq(0).all() for out in outs)


def test_the_native_op_refuses_an_index_out_of_range():
    query, com, diff, index, other, _ = gathered_arguments()
    with pytest.raises(RuntimeError, match=r"difference_index must lie in \[-1, 3\)"):
        torch.ops.capt.prompt_attention(query, com, diff, index, other + 3, None, 1.0)


@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_exponential_errs_at_most_two_units_in_the_last_place(tmp_path, level):
    if CPU_LEVELS.index(level) > CPU_LEVELS.index(_plan.NATIVE.cpu_level):
        return
    program = tmp_path / level
    source = Path(__file__).with_name("native") / "exp2_check.cpp"
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-w", f"-I{CSRC}", *LEVEL_FLAGS[level]]
    run([shutil.which("g++") or "c++", *flags, source, "-o", program])
    error, verdict = run([program]).stdout.split(maxsplit=1)
    assert float(error) <= 2 and verdict.strip() == "special values hold"


def test_plans_name_backend_reason_and_traffic(monkeypatch):
    plan = ops.explain("prompt_attention", batch=100, k=3, rows=(5, 5), dim=512)
    assert plan.backend == "cpu" and plan.rejected.keys() == {"cuda", "triton"}
    assert plan.flops == 4 * 100 * 30 * 512 and plan.bytes == (3000 + 300) * 2048 + 600 * 8 + 3000 * 4
    size = {"batch": 32, "rows": (400, 400), "n_keys": 197, "dim": 512}
    plan = ops.explain("prompt_attention_shared", **size, dtype=torch.bfloat16)
    assert plan.backend == "cpu" and plan.flops == 4 * 32 * 800 * 197 * 512
    assert ops.explain("prompt_attention_shared", **size, dtype=torch.float64).backend == "reference"
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    for op, sizes in (("prompt_attention", {"batch": 1, "k": 1, "rows": (1, 1), "dim": 8}),
                      ("prompt_attention_shared", size)):  # fmt: skip
        assert "in software" in ops.explain(op, **sizes, dtype=torch.float16).rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(False, "the native library was not built"))
    assert ops.explain("prompt_attention_shared", **size).backend == "reference"
    with pytest.raises(CaptError, match="was not built"):
        ops.prompt_attention_shared(
            torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), n_heads=1, backend="cpu"
        )


def call(**changed):
    query, com, diff, index, other, prior = gathered_arguments()
    given = {"query": query, "commonality": com, "difference": diff, "commonality_index": index,
             "difference_index": other, "log_prior": prior, **changed}  # fmt: skip
    positional = [given.pop(name) for name in ("query", "commonality", "difference")]
    return lambda: ops.prompt_attention(*positional, **given)


def call_shared(query=(3, 8), keys=(2, 5, 8), values=None, **options):
    def make():
        q, k = torch.ones(query), torch.ones(keys)
        return ops.prompt_attention_shared(q, q, k, torch.ones(values or keys), **{"n_heads": 2, **options})

    return make


BAD_CALLS = {
    r"query must have shape \[B, d\]": lambda: call(query=torch.ones(4))(),
    r"commonality must have shape \[n, s, 12\]": lambda: call(commonality=torch.ones(5, 2, 11))(),
    r"difference must have shape \[n, s, 12\]": lambda: call(difference=torch.ones(5, 12))(),
    r"commonality_index must have shape \[4, k\]": lambda: call(commonality_index=torch.zeros(3, 3).long())(),
    r"difference_index must have shape \[4, 3\]": lambda: call(difference_index=torch.zeros(4, 2).long())(),
    r"log_prior must have shape \[4, 3\]": lambda: call(log_prior=torch.zeros(4, 2))(),
    "commonality_index must be int64": lambda: call(commonality_index=torch.zeros(4, 3).int())(),
    r"difference_index must lie in \[-1, 3\)": lambda: call(difference_index=torch.full((4, 3), 3))(),
    "query must be float16": lambda: call(query=torch.ones(4, 12).long())(),
    "query must be a torch.Tensor": lambda: call(query=[1.0])(),
    "all tensors must be on one device": lambda: call(commonality=torch.ones(5, 2, 12, device="meta"))(),
    "prompt_attention: backend='cuda' was forced and cannot run": lambda: call(backend="cuda")(),
    r"keys must have shape \[B, L, D\]": call_shared(keys=(5, 8)),
    r"values must have shape \[2, 5, 8\]": call_shared(values=(2, 4, 8)),
    "keys must hold at least one token": call_shared(keys=(2, 0, 8)),
    r"commonality_query must be a tensor \[R, D\] or \[B, R, D\]": call_shared(query=(8,)),
    r"commonality_query must have shape \[2, R, 8\]": call_shared(query=(3, 3, 8)),
    "width 8 is not divisible by n_heads=3": call_shared(n_heads=3),
    "n_heads must be an integer of at least 1": call_shared(n_heads=0),
    "prompt_attention_shared: backend='triton' was forced and cannot run": call_shared(backend="triton"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()


def test_modules_are_reachable_by_name():
    assert sys.modules["capt.ops.prompt_attention"].DISPATCH.reasons.keys() == {"cpu", "cuda", "triton"}
