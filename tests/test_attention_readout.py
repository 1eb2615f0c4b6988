"""attention_readout on the CPU: identities, accuracy at every level, bits, sanitizers, torch integration, plan."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.parity import attention_readout as parity
from benchmarks.rivals.attention_readout import RIVALS
from capt import ops
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.conftest import CPU_LEVELS
from tests.native_build import CSRC, LEVEL_FLAGS, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference")


def inputs(batch=2, length=9, heads=2, width=8, groups=3):
    """query, keys, values; groups as keywords."""
    tensors = (
        torch.randn(batch, heads, width),
        *(torch.randn(batch, length, heads, width) for _ in range(2)),
    )
    return tensors, {"groups": torch.arange(length) % groups, "n_groups": groups}


def attention(query, keys, values, bias):
    """Ordinary attention of one query, [M, B, H, dh], and its rows [M, B, H, L]."""
    score = torch.einsum("bhc,blhc->bhl", query, keys) * query.shape[-1] ** -0.5
    row = (score + bias[:, None]).softmax(-1)
    return torch.einsum("mbhl,blhc->mbhc", row, values), row


# ---- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_put_together_are_ordinary_attention(backend):
    tensors, groups = inputs()
    bias = torch.randn(4, 1, 9)
    mean, log_mass = ops.attention_readout(*tensors, **groups, bias=bias, backend=backend)
    whole, row = attention(*tensors, bias)
    share = log_mass.softmax(-1)
    torch.testing.assert_close((share[..., None] * mean).sum(-2), whole)
    for g in range(3):
        torch.testing.assert_close(share[..., g], row[..., groups["groups"] == g].sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_redistribution_from_one_group_to_another_is_a_weighted_sum_of_the_means(backend):
    """A share p of the centre's attention goes to the border, in proportion: the explicit row against the groups."""
    tensors, groups = inputs()
    none = torch.zeros(1, 1, 9)
    mean, log_mass = ops.attention_readout(*tensors, **groups, backend=backend)
    share = log_mass.softmax(-1)[0]
    _, row = attention(*tensors, none)
    for p in (0.0, 0.4, 1.0):
        moved = row[0].clone()
        centre, border = (groups["groups"] == g for g in (1, 2))
        moved[..., border] *= 1 + p * moved[..., centre].sum(-1, keepdim=True) / moved[..., border].sum(
            -1, keepdim=True
        )
        moved[..., centre] *= 1 - p
        want = torch.einsum("bhl,blhc->bhc", moved, tensors[2])
        weight = torch.stack([share[..., 0], (1 - p) * share[..., 1], share[..., 2] + p * share[..., 1]], -1)
        torch.testing.assert_close((weight[..., None] * mean[0]).sum(-2), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_a_bias_moves_the_masses_alone(backend):
    tensors, groups = inputs()
    bias = torch.randn(3, 2, 9)
    mean, log_mass = ops.attention_readout(*tensors, **groups, bias=bias, backend=backend)
    other = ops.attention_readout(*tensors, **groups, bias=bias + 7, backend=backend)
    torch.testing.assert_close(other.mean, mean)
    torch.testing.assert_close(other.log_mass, log_mass + 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_leaves_one_key_returns_its_value(backend):
    tensors, groups = inputs()
    bias = torch.full((9, 9), -torch.inf).fill_diagonal_(0.0)[:, None]
    mean, log_mass = ops.attention_readout(*tensors, **groups, bias=bias, backend=backend)
    for j in range(9):
        g = j % 3
        torch.testing.assert_close(mean[j, :, :, g], tensors[2][:, j])
        others = [other for other in range(3) if other != g]
        assert (log_mass[j, :, :, others] == -torch.inf).all() and (mean[j, :, :, others] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biases", [1, 4])
def test_undefined_and_infinite_logits_show_where_they_are_and_nowhere_else(backend, biases):
    tensors, groups = inputs()
    bias = torch.zeros(biases, 1, 9)
    wanted = ops.attention_readout(*tensors, **groups, bias=bias, backend=backend)
    for value, mass in ((math.nan, math.nan), (math.inf, math.inf)):
        bias[0, 0, 4] = value  # of group 1
        found = ops.attention_readout(*tensors, **groups, bias=bias, backend=backend)
        assert found.mean[0, :, :, 1].isnan().all()
        assert torch.equal(found.log_mass[0, :, :, 1].nan_to_num(nan=5.0), torch.full((2, 2), mass).nan_to_num(nan=5.0))
        for g in (0, 2):
            torch.testing.assert_close(found.mean[:, :, :, g], wanted.mean[:, :, :, g])
        torch.testing.assert_close(found.mean[1:], wanted.mean[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_every_group_is_empty(backend):
    tensors, _ = inputs(length=0)
    for bias in (None, torch.zeros(3, 1, 0)):
        found = ops.attention_readout(*tensors, groups=torch.zeros(0).long(), n_groups=2, bias=bias, backend=backend)
        assert (found.mean == 0).all() and (found.log_mass == -torch.inf).all()


# ---- accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_against_float64_autograd(backend):
    for seed in (*range(540), *parity.LARGE_SEEDS):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend=backend))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_every_instruction_set_level(level, limit_cpu_level):
    limit_cpu_level(level)
    for seed in (*range(level, 540, 5), *parity.LARGE_SEEDS[level::5]):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend="cpu"))


def test_parity_notices_wrong_answers():
    seen = 0
    for seed in range(0, 540, 7):
        problem = parity.problem(seed)
        found = parity.run(problem, backend="cpu")
        if problem.arguments[1].numel() == 0 or parity.KINDS[seed % 6] in ("huge", "opposed"):
            continue  # the logits of those are rounded by more than what is added here
        seen += 1
        mass = found[1].clone()
        mass[mass.isfinite()] += 1e-3
        assert parity.complaint(problem, (found[0] + 1e-3, *found[1:]))
        assert parity.complaint(problem, (found[0], mass, *found[2:]))
        for number in range(2, len(found)):
            if found[number].abs().max() > 1e-3:
                changed = found[number] * 1.1
                assert parity.complaint(problem, (*found[:number], changed, *found[number + 1 :]))
        assert parity.complaint(problem, (torch.full_like(found[0], math.nan), *found[1:]))
    assert seen > 20


@pytest.mark.parametrize("spread", [5.0, 40.0, 90.0, 1000.0])
def test_scores_and_biases_that_pull_apart_stay_accurate(spread):
    """Their exponentials are formed apart: beyond 27 or so the kernel must take its other way, and does."""
    length = 40
    ramp = torch.linspace(0, spread, length)
    keys = torch.zeros(1, length, 1, 16)
    keys[..., 0] = ramp[None, :, None] * 4
    query, values = torch.eye(16)[:1].expand(1, 1, 16), torch.randn(1, length, 1, 16)
    bias = torch.stack([ramp * 0, -ramp, -2 * ramp, -ramp - spread])[:, None]
    tensors, groups = (query, keys, values), {"groups": torch.arange(length) % 2, "n_groups": 2}
    found = ops.attention_readout(*tensors, **groups, bias=bias, backend="cpu")
    want = ops.attention_readout(*(value.double() for value in tensors), **groups, bias=bias.double())
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6 * max(1.0, spread / 16))


def test_rivals_of_the_benchmark_compute_the_same():
    (query, keys, values), groups = inputs(length=12)
    for bias in (torch.randn(5, 1, 12), torch.randn(5, 1, 12).round()):
        want = ops.attention_readout(query, keys, values, **groups, bias=bias)
        for rival in RIVALS.values():
            for one, other in zip(rival(query, keys, values, *groups.values(), bias, 8**-0.5), want, strict=True):
                torch.testing.assert_close(one, other)


def test_bits_do_not_depend_on_repetition_threads_or_the_other_images():
    tensors, groups = inputs(5, 50, 3, 64)
    for biases in (1, 7):
        bias = torch.randn(biases, 1, 50)
        first = ops.attention_readout(*tensors, **groups, bias=bias, backend="cpu")
        threads = torch.get_num_threads()
        try:
            for repeat in range(100):
                torch.set_num_threads(1 + repeat % 3)
                again = ops.attention_readout(*tensors, **groups, bias=bias, backend="cpu")
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        finally:
            torch.set_num_threads(threads)
        alone = ops.attention_readout(*(value[3:4] for value in tensors), **groups, bias=bias, backend="cpu")
        assert all(torch.equal(a[:, 3:4], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_the_kernel_is_clean_under_sanitizers(tmp_path, level):
    """tests/native/attention_readout_check.cpp, and that it would see values that are too short."""
    if CPU_LEVELS.index(level) > CPU_LEVELS.index(_plan.NATIVE.cpu_level):
        return
    program, check = tmp_path / level, Path(__file__).with_name("native") / "attention_readout_check.cpp"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++20", "-O1", "-w", *sanitize, *LEVEL_FLAGS[level], f"-I{CSRC}", "-DCAPT_LEVEL_NAME=baseline"]
    run(
        [
            shutil.which("g++") or "c++", *flags, check, CSRC / "attention_readout.cpp", CSRC / "cpu_level.cpp",
            "-o", program,
        ]
    )  # fmt: skip
    assert run([program]).stdout == "attention_readout: 36 cases\n"
    done = subprocess.run([program, "overrun"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


# ---- torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(dtype, biased):
    tensors, groups = inputs()
    bias = torch.randn(3, 1, 9) if biased else None
    arguments = (*(value.to(dtype) for value in tensors), *groups.values(), bias, 0.3)
    torch.library.opcheck(torch.ops.capt.attention_readout, arguments)
    leaves = (value.to(dtype).requires_grad_() for value in tensors)
    bias = None if bias is None else bias.requires_grad_()
    torch.library.opcheck(torch.ops.capt.attention_readout, (*leaves, *groups.values(), bias, 0.3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    groups, bias = {"groups": torch.arange(9) % 2, "n_groups": 2}, torch.randn(3, 1, 9)

    def step(query, keys, values):
        found = ops.attention_readout(query * 2, keys, values, **groups, bias=bias)
        return (found.log_mass.softmax(-1)[..., None] * found.mean).sum(-2)

    torch.compiler.reset()
    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        leaves = [value.requires_grad_() for value in inputs(batch)[0]]
        found, own = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(found, own)
        for one, other in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (found, own)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("needed", range(4))
def test_only_the_wanted_gradient_is_formed_and_it_is_the_reference_s(needed):
    tensors, groups = inputs()
    found = []
    for backend in BACKENDS:
        leaves = [value.clone() for value in (tensors[0][0], *tensors[1:], torch.linspace(-1, 1, 36).view(2, 2, 9))]
        leaves[needed].requires_grad_()
        out = ops.attention_readout(*leaves[:3], **groups, bias=leaves[3], backend=backend)
        (out.mean.square().sum() + out.log_mass.exp().sum()).backward()
        assert [leaf.grad is not None for leaf in leaves] == [number == needed for number in range(4)]
        found.append(leaves[needed].grad)
    torch.testing.assert_close(*found)


def test_the_gradient_of_a_gradient_is_that_of_the_reference():
    tensors, groups = inputs()
    found = []
    for backend in BACKENDS:
        leaves = [value.clone().requires_grad_() for value in (*tensors, torch.linspace(-1, 1, 18).view(2, 1, 9))]
        out = ops.attention_readout(*leaves[:3], **groups, bias=leaves[3], backend=backend)
        first = torch.autograd.grad(out.mean.square().sum() + out.log_mass.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(value.square().sum() for value in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_inputs_of_several_dtypes_are_computed_in_the_widest():
    (query, keys, values), groups = inputs()
    want = ops.attention_readout(query, keys.half().float(), values, **groups)
    found = ops.attention_readout(query, keys.half(), values, **groups, backend="cpu")
    assert torch.equal(found.mean, want.mean) and torch.equal(found.log_mass, want.log_mass)
    assert ops.attention_readout(query.double(), keys, values, **groups).mean.dtype == torch.float64
    with pytest.raises(CaptError, match="float64 has no kernel"):
        ops.attention_readout(query.double(), keys, values, **groups, backend="cpu")


def test_the_op_itself_refuses_what_does_not_fit():
    tensors, groups = inputs()
    right = [*tensors, *groups.values(), torch.zeros(2, 1, 9), 0.3]
    torch.ops.capt.attention_readout(*right)
    for place, value, message in (
        (0, torch.randn(2, 8), "query"),
        (0, torch.randn(2, 2, 7), "query"),
        (0, tensors[0].half(), "one dtype"),
        (1, torch.randn(2, 9, 16), "keys must be"),
        (2, torch.randn(2, 8, 2, 8), "values must be"),
        (3, torch.zeros(8).long(), "groups must be"),
        (3, torch.zeros(9).int(), "groups must be"),
        (3, torch.full((9,), 3), "groups must lie in"),
        (3, torch.full((2, 9), -1), "groups must lie in"),
        (4, 0, "n_groups"),
        (5, torch.zeros(2, 3, 9), "bias must be"),
        (5, torch.zeros(2, 1, 9).half(), "bias must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.capt.attention_readout(*right[:place], value, *right[place + 1 :])


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    shape = {"batch": 2, "length": 50, "n_heads": 3, "head_dim": 16, "n_groups": 4, "n_biases": 5}
    plan = ops.explain("attention_readout", **shape)
    assert plan.backend == "cpu" and plan.flops == 2 * 6 * 50 * 16 * 6
    assert plan.bytes == 2 * 6 * 50 * 16 * 4 + 4 * 5 * 6 * 4 * 17
    assert "no such kernel" in plan.rejected["cuda"] and "triton" in plan.rejected
    half = shape | {"dtype": torch.float16}
    assert ops.explain("attention_readout", **half).bytes == plan.bytes - 6 * 50 * 16 * 4
    double = ops.explain("attention_readout", **shape, dtype=torch.float64)
    assert double.backend == "reference" and "float64" in double.rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    assert "in software" in ops.explain("attention_readout", **half).rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    for has_triton, backend in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(_plan, "HAS_TRITON", has_triton)
        assert ops.explain("attention_readout", **shape, device="cuda").backend == backend
