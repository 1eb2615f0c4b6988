"""expert_gating on the CPU: parity at every instruction-set level, dropout, repetition, torch integration, plan."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.parity import expert_gating as parity
from capt import ops, reference
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.accuracy import DTYPES, relative_l2
from tests.conftest import CPU_LEVELS

MODULE = sys.modules["capt.ops.expert_gating"]
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def make(n_tokens=7, dim=12, hidden=20, n_experts=3, dtype=torch.float32):
    shapes = [(n_tokens, dim), (n_experts, dim), (n_experts, hidden, dim), (n_experts, hidden),
              (n_experts, dim, hidden), (n_experts, dim)]  # fmt: skip
    return [(torch.randn(shape) * shape[-1] ** -0.25).to(dtype) for shape in shapes]


def complaints(seeds):
    found = {}
    for seed in seeds:
        problem = parity.problem(seed)
        wrong = parity.complaint(problem, parity.run(problem, backend="cpu"))
        if wrong:
            found[problem.label] = wrong
    return found


@pytest.mark.parametrize("part", range(5))
def test_500_problems_at_this_machines_level(part):
    assert complaints(range(100 * part, 100 * part + 100)) == {}


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)))
def test_problems_at_every_level(limit_cpu_level, level):
    limit_cpu_level(level)
    assert complaints(range(1000 + 40 * level, 1040 + 40 * level)) == {}


# Tokens: several vectors an expert, more than one chunk. Sizes: whole tiles, pairs but no tiles, odd ones.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(300, 64, 96, 3, 2), (45, 70, 34, 2, 1), (60, 33, 67, 4, 3)])
def test_larger_sizes_at_every_level(limit_cpu_level, dtype, sizes):
    values, top_k = make(*sizes[:4], dtype=dtype), sizes[4]
    upstream = torch.randn(values[0].shape)
    exact = [value.double().requires_grad_() for value in values]
    want = ops.expert_gating(*exact, top_k=top_k)
    want_grads = torch.autograd.grad((want[0] * upstream).sum() + want[2].square().sum(), exact)
    for level in range(len(CPU_LEVELS)):
        limit_cpu_level(level)
        leaves = [value.clone().requires_grad_() for value in values]
        found = ops.expert_gating(*leaves, top_k=top_k, backend="cpu")
        grads = torch.autograd.grad((found[0].float() * upstream).sum() + found[2].square().sum(), leaves)
        for mine, theirs in zip((*found, *grads), (*want, *want_grads), strict=True):
            assert relative_l2(mine.detach(), theirs.detach()) < LIMITS[dtype], (level, mine.shape)


def test_an_absent_expert_gives_and_receives_exactly_zero():
    values = make(5)
    values[1].zero_()  # equal probabilities: expert 2 is never used at top_k 2
    values[2][2, 0, 0] = float("nan")
    leaves = [value.requires_grad_() for value in values]
    y, weights, _, load = ops.expert_gating(*leaves, top_k=2, backend="cpu")
    y.sum().backward()
    assert y.isfinite().all() and weights[:, 2].eq(0).all() and load.tolist() == [1, 1, 0]
    assert all(leaf.grad[2].eq(0).all() for leaf in leaves[2:]) and leaves[0].grad.isfinite().all()


def test_dropout_mask_is_fair_and_of_its_four_keys():
    mask = reference.dropout_mask(5, 40, 3, 256, 0.3)
    assert abs(float(mask.double().mean()) - 0.7) < 0.01
    assert torch.equal(mask[:7, :2, :100], reference.dropout_mask(5, 7, 2, 100, 0.3))
    assert not torch.equal(mask, reference.dropout_mask(5 + (1 << 40), 40, 3, 256, 0.3))
    flat = mask.reshape(120, 256).double() - 0.7
    similar = (flat @ flat.T / (256 * 0.21)).fill_diagonal_(0)
    assert similar.abs().max() < 0.35  # 7140 pairs of independent rows: 5.6 standard deviations


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_follows_torchs_seed_and_only_acts_in_training(backend):
    values = make(16)
    options = {"top_k": 2, "dropout": 0.5, "backend": backend}

    def draw(seed, training=True):
        torch.manual_seed(seed)
        return ops.expert_gating(*values, **options, training=training)[0]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    ops.expert_gating(*values, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(1, False), ops.expert_gating(*values, top_k=2, backend=backend)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads_or_repetition(dtype):
    values = make(70, 64, 96, dtype=dtype)
    upstream = torch.randn_like(values[0])

    def run():
        torch.manual_seed(0)
        leaves = [value.clone().requires_grad_() for value in values]
        found = ops.expert_gating(*leaves, top_k=2, dropout=0.2, training=True, backend="cpu")
        return *found, *torch.autograd.grad((found[0] * upstream).sum() + found[1].square().sum(), leaves)

    want = run()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(34):
                assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)), threads
    finally:
        torch.set_num_threads(1)


def test_a_row_does_not_depend_on_its_neighbours():
    values = make(50, 32, 64)
    together = ops.expert_gating(*values, top_k=2, backend="cpu")[:3]
    for i in (0, 17, 49):
        alone = ops.expert_gating(values[0][i : i + 1], *values[1:], top_k=2, backend="cpu")[:3]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_parameters_of_another_dtype_are_not_rounded():
    values = make()
    mixed = [values[0].bfloat16(), *values[1:]]
    y, *_ = ops.expert_gating(*mixed, top_k=2, backend="cpu")
    want = ops.expert_gating(mixed[0].float(), *values[1:], top_k=2, backend="cpu")[0]
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())


def test_all_sets_of_gradients():
    values = make(5, 6, 8)
    for wanted in range(1, 64):
        leaves = [v.detach().requires_grad_(bool(wanted >> i & 1)) for i, v in enumerate(values)]
        exact = [v.detach().double().requires_grad_(v.requires_grad) for v in leaves]
        ops.expert_gating(*leaves, top_k=2, backend="cpu")[0].square().sum().backward()
        ops.expert_gating(*exact, top_k=2)[0].square().sum().backward()
        for mine, theirs in zip(leaves, exact, strict=True):
            if mine.requires_grad:
                assert relative_l2(mine.grad, theirs.grad) < 2e-6
            else:
                assert mine.grad is None


def test_opcheck():
    x, gate, *experts = (value.requires_grad_() for value in make())
    torch.library.opcheck(torch.ops.capt.expert_router, (x, gate, 2))
    weights, probs, _ = (value.detach() for value in torch.ops.capt.expert_router(x, gate, 2))
    torch.library.opcheck(torch.ops.capt.expert_mix, (x, weights.requires_grad_(), *experts, 0.5, 1 << 40))
    x, gate, weights, *experts = (value.detach() for value in (x, gate, weights, *experts))
    for need in (True, False):
        args = (weights, probs, weights, probs, x, gate, need, not need)
        torch.library.opcheck(torch.ops.capt.expert_router_backward, args)
        needs = (need, not need) * 3
        torch.library.opcheck(torch.ops.capt.expert_mix_backward, (x, weights, *experts, 0.5, 3, x, *needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_draws_a_seed_each_run(dynamic):
    def step(*values):
        return ops.expert_gating(*values, top_k=2, dropout=0.5, training=True)[0].tanh()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n_tokens in (4, 9):
        leaves = [value.requires_grad_() for value in make(n_tokens)]
        torch.manual_seed(3)
        out, other = compiled(*leaves), compiled(*leaves)
        torch.manual_seed(3)
        want = step(*leaves)
        torch.testing.assert_close(out, want)
        assert not torch.allclose(other, out)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


def test_plan_names_backend_reason_and_cost(monkeypatch):
    plan = ops.explain("expert_gating", tokens=32, dim=768, dtype=torch.bfloat16)
    assert plan.backend == "cpu" and plan.rejected.keys() == {"cuda", "triton"}
    assert plan.flops == 32 * (2 * 3 * 768 + 2 * 4 * 3072 * 768)
    assert plan.bytes == (3 * (2 * 3072 * 768 + 3072 + 768) + 3 * 768 + 2 * 32 * 768) * 2 + 65 * 3 * 4
    one = ops.explain("expert_gating", tokens=1, top_k=1)
    assert one.bytes < plan.bytes
    assert ops.explain("expert_gating", dtype=torch.float64).backend == "reference"
    assert "more than 512" in ops.explain("expert_gating", n_experts=600).rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    assert ops.explain("expert_gating", device="cuda").backend == "cuda"
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(False, "the native library was not built"))
    monkeypatch.setattr(_plan, "HAS_TRITON", True)
    assert ops.explain("expert_gating", device="cuda").backend == "triton"
    values = make()
    assert torch.equal(ops.expert_gating(*values, top_k=1)[0], reference.expert_gating(*values, 1, 0.0, 0)[0])


def bad(position, value, **options):
    def call():
        values = make(7, 12, 20)
        if position is not None:
            values[position] = value
        return ops.expert_gating(*values, **{"top_k": 2, **options})

    return call


BAD_CALLS = {
    r"x must have shape \[N, D\], found \[12\]": bad(0, torch.ones(12)),
    r"gate must have shape \[E, 12\], found \[3, 11\]": bad(1, torch.ones(3, 11)),
    r"w_in must have shape \[3, H, 12\], found \[2, 20, 12\]": bad(2, torch.ones(2, 20, 12)),
    r"b_in must have shape \[3, 20\], found \[3, 21\]": bad(3, torch.ones(3, 21)),
    r"w_out must have shape \[3, 12, 20\], found \[3, 20, 12\]": bad(4, torch.ones(3, 20, 12)),
    r"b_out must have shape \[3, 12\], found \[12\]": bad(5, torch.ones(12)),
    "x must be float16, bfloat16, float32 or float64": bad(0, torch.ones(7, 12, dtype=torch.int64)),
    "all tensors must be on one device": bad(5, torch.ones(3, 12, device="meta")),
    "top_k must be an integer of at least 1, found 0": bad(None, None, top_k=0),
    "top_k=4 exceeds the number of experts, 3": bad(None, None, top_k=4),
    r"dropout must lie in \[0, 1\), found 1.0": bad(None, None, dropout=1.0),
    "backend='gpu' is unknown": bad(None, None, backend="gpu"),
    "backend='cuda' was forced and cannot run: the tensors are on cpu": bad(None, None, backend="cuda"),
    "backend='cpu' was forced and cannot run: 513 experts": lambda: ops.expert_gating(
        *make(1, 1, 1, 513), top_k=1, backend="cpu"
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()


def test_512_experts_and_zero_rows():
    values = make(3, 4, 2, 512)
    found, want = (ops.expert_gating(*values, top_k=500, backend=name) for name in ("cpu", "reference"))
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    leaves = [value.requires_grad_() for value in make(0)]
    y, weights, probs, load = ops.expert_gating(*leaves, top_k=2, backend="cpu")
    (y.sum() + weights.sum() + probs.sum()).backward()
    assert y.shape == (0, 12) and load.tolist() == [0, 0, 0]
    assert all(leaf.grad.eq(0).all() for leaf in leaves)
