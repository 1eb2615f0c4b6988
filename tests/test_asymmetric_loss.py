"""asymmetric_loss on the CPU: behaviours 20 to 23, accuracy at every level, cut-offs, bits, sanitizers, torch, plan."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.parity import asymmetric_loss as parity
from capt import ops, reference
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.conftest import CPU_LEVELS
from tests.native_build import CSRC, LEVEL_FLAGS, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference")


def value_and_gradient(logits, targets, **options):
    leaf = logits.detach().requires_grad_()
    loss = ops.asymmetric_loss(leaf, targets, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def closed_form(s, y, gamma_pos, gamma_neg, margin, eps):
    """Loss and slope of one entry, float64."""
    p = 1 / (1 + math.exp(-s))
    if y:
        return -((1 - p) ** gamma_pos) * math.log(max(p, eps)), -((1 - p) ** gamma_pos) * (1 - p) if p >= eps else 0.0
    over = max(p - margin, 0.0)
    value = -(over**gamma_neg) * math.log(max(min(1 - p + margin, 1.0), eps))
    return value, over**gamma_neg * p * (1 - p) / (1 - p + margin) if p > margin else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 2.0), (0.5, 1.5)])
def test_20_value_and_gradient_are_the_closed_form(backend, gammas):
    logits, targets = torch.linspace(-15, 12, 60).reshape(5, 12), torch.rand(5, 12) < 0.4
    loss, gradient = value_and_gradient(
        logits, targets, gamma_pos=gammas[0], gamma_neg=gammas[1], reduction="none", backend=backend
    )
    for s, y, found, slope in zip(
        logits.flatten().tolist(), targets.flatten().tolist(), loss.flatten().tolist(), gradient.flatten().tolist(),
        strict=True,
    ):  # fmt: skip
        want = closed_form(s, y, *gammas, 0.05, 1e-8)
        assert found == pytest.approx(want[0], rel=3e-6, abs=1e-7) and slope == pytest.approx(want[1], rel=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_20_finite_differences_agree_when_the_focus_is_held_constant(backend):
    logits, targets, h = torch.tensor([[1.5, -1.0, 2.5, 0.3]]), torch.tensor([[0, 1, 0, 1]]), 1e-4
    options = {"gamma_pos": 1.0, "reduction": "none"}
    _, gradient = value_and_gradient(logits, targets, backend=backend, **options)
    p = logits.double().sigmoid()
    focus = torch.where(targets > 0, 1 - p, (p - 0.05).clamp_min(0) ** 4)

    def plain(x):
        return ops.asymmetric_loss(x, targets, gamma_neg=0.0, reduction="none")

    def whole(x):
        return ops.asymmetric_loss(x, targets, **options)

    x = logits.double()
    held = focus * (plain(x + h) - plain(x - h)) / (2 * h)
    free = (whole(x + h) - whole(x - h)) / (2 * h)
    torch.testing.assert_close(gradient.double(), held, rtol=1e-5, atol=1e-7)
    assert (gradient - free).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_21_easy_negatives_and_hopeless_positives_have_no_gradient(backend):
    edge = math.log(0.05 / 0.95)
    logits = torch.tensor([[edge - 1e-5, edge + 1e-5, -18.5, -18.3]])
    loss, gradient = value_and_gradient(
        logits, torch.tensor([[False, False, True, True]]), gamma_neg=0.0, backend=backend
    )
    assert gradient[0, 0] == 0 and gradient[0, 1] > 0.01 and gradient[0, 2] == 0
    torch.testing.assert_close(gradient[0, 3], torch.tensor(-1 / 4))
    alone, slope = value_and_gradient(logits[:, :1], torch.zeros(1, 1).bool(), gamma_neg=0.0, backend=backend)
    assert alone == 0 and slope == 0 and loss > 0


def test_21_negative_gradient_peaks_where_the_specification_says():
    logits = torch.linspace(0, 8, 4001)[None]
    _, gradient = value_and_gradient(logits, torch.zeros_like(logits).bool(), reduction="none")
    best = int(gradient.argmax())
    assert gradient[0, best].item() == pytest.approx(0.325, abs=1e-3)
    assert logits[0, best].sigmoid().item() == pytest.approx(0.928, abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_22_without_focus_and_margin_it_is_binary_cross_entropy(backend, dtype):
    logits, targets = (torch.randn(6, 9) * 4).to(dtype), torch.rand(6, 9) < 0.3
    found = ops.asymmetric_loss(logits, targets, gamma_neg=0.0, margin=0.0, backend=backend)
    want = F.binary_cross_entropy_with_logits(logits.double(), targets.double())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(want.item(), rel=1e-6)
    extreme = torch.tensor([[100.0, -100.0, 100.0, -100.0]]).to(dtype)
    for options in ({}, {"gamma_neg": 0.0, "margin": 0.0}):
        loss, gradient = value_and_gradient(extreme, torch.tensor([[0, 0, 1, 1]]), backend=backend, **options)
        assert loss.isfinite() and gradient.isfinite().all()
    each = ops.asymmetric_loss(logits, targets, reduction="none", backend=backend)
    for reduction, value in (("mean", each.mean()), ("sum", each.sum())):
        torch.testing.assert_close(ops.asymmetric_loss(logits, targets, reduction=reduction, backend=backend), value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_23_gradient_mode_and_inputs_are_left_alone(backend):
    logits, targets = torch.randn(3, 40), torch.rand(3, 40) < 0.5
    before = logits.clone(), targets.clone()
    with torch.no_grad():
        loss = ops.asymmetric_loss(logits.requires_grad_(), targets, backend=backend)
        assert not torch.is_grad_enabled() and not loss.requires_grad
    assert torch.is_grad_enabled()
    value_and_gradient(logits, targets, backend=backend)
    assert torch.equal(logits, before[0]) and torch.equal(targets, before[1])


# ---- accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_against_float64_autograd(backend):
    for seed in (*range(540), *parity.LARGE_SEEDS):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend=backend))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_every_instruction_set_level(level, limit_cpu_level):
    limit_cpu_level(level)
    for seed in (*range(level, 540, 5), *parity.LARGE_SEEDS[level::8]):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend="cpu"))


def test_parity_notices_wrong_answers():
    seen = 0
    for seed in range(0, 540, 7):
        problem = parity.problem(seed)
        loss, gradient = parity.run(problem, backend="cpu")
        finite = bool(gradient.isfinite().all() and loss.isfinite().all())
        if gradient.numel() and finite and gradient.abs().max() > 1e-3:
            seen += 1
            assert parity.complaint(problem, (loss, gradient * 1.02))
            assert parity.complaint(problem, (loss + 0.1 * loss.abs().max() + 1e-3, gradient))
            assert parity.complaint(problem, (loss, torch.full_like(gradient, math.nan)))
    assert seen > 10


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_errors_of_single_entries_are_as_documented(level, limit_cpu_level):
    """The exponential and the logarithm inside, seen through the loss: docs/kernels/asymmetric_loss.md."""
    limit_cpu_level(level)
    logits = torch.cat([torch.linspace(-17, 88, 40_001), torch.randn(20_000) * 3])[None]
    ones = torch.ones_like(logits).bool()
    loss, gradient = value_and_gradient(logits, ones, reduction="none", backend="cpu")
    exact = F.softplus(-logits.double(), threshold=1e9)
    assert ((loss - exact).abs() / exact).max() < 5e-7
    assert ((gradient + (-logits.double()).sigmoid()).abs() / (-logits.double()).sigmoid()).max() < 5e-7
    loss, gradient = value_and_gradient(logits, ~ones, reduction="none", backend="cpu")
    want = parity._expected(
        parity.Problem("", (logits, ~ones, torch.ones_like(logits)), {**PLAIN, "reduction": "none"}), torch.float64
    )
    hard = logits > 0
    assert ((loss - want[0]).abs() / want[0])[hard].max() < 3e-6
    assert ((gradient - want[1]).abs() / want[1])[hard].max() < 3e-6


PLAIN = {"gamma_pos": 0.0, "gamma_neg": 4.0, "margin": 0.05, "eps": 1e-8}


def test_without_a_cut_off_hopeless_positives_keep_their_gradient():
    logits, targets = torch.tensor([[-40.0, -300.0, 60.0, -math.inf]]), torch.tensor([[1, 1, 0, 1]])
    for backend in BACKENDS:
        loss, gradient = value_and_gradient(
            logits, targets, eps=0.0, gamma_neg=0.0, margin=0.0, reduction="none", backend=backend
        )
        torch.testing.assert_close(loss, torch.tensor([[40.0, 300.0, 60.0, math.inf]]))
        torch.testing.assert_close(gradient, torch.tensor([[-1.0, -1.0, 1.0, -1.0]]))


def test_small_gradients_of_half_precision_survive_until_the_loss_scale_is_applied():
    logits = torch.full((64, 500), -2.0).half().requires_grad_()
    loss = ops.asymmetric_loss(logits, torch.zeros(64, 500).bool(), backend="cpu")
    (found,) = torch.autograd.grad(loss * 65536, logits)
    wide = logits.detach().double().requires_grad_()
    exact = ops.asymmetric_loss(wide, torch.zeros(64, 500).bool())
    (want,) = torch.autograd.grad(exact * 65536, wide)
    assert 0 < want.max() / 65536 < 1e-8  # nothing of it would be left in float16
    torch.testing.assert_close(found.double(), want, rtol=2e-3, atol=6e-8)


def test_bits_do_not_depend_on_repetition_threads_or_the_dtype_of_targets():
    logits, targets = torch.randn(70, 777), torch.rand(70, 777) < 0.1
    first = value_and_gradient(logits, targets, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for repeat in range(100):
            torch.set_num_threads(1 + repeat % 3)
            kind = (torch.bool, torch.uint8, torch.float32)[repeat // 3 % 3]
            again = value_and_gradient(logits, targets.to(kind), backend="cpu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_the_kernel_is_clean_under_sanitizers(tmp_path, level):
    """tests/native/asymmetric_loss_check.cpp, and that it would see logits that are too short."""
    if CPU_LEVELS.index(level) > CPU_LEVELS.index(_plan.NATIVE.cpu_level):
        return
    program, check = tmp_path / level, Path(__file__).with_name("native") / "asymmetric_loss_check.cpp"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++20", "-O1", "-w", *sanitize, *LEVEL_FLAGS[level], f"-I{CSRC}", "-DCAPT_LEVEL_NAME=baseline"]
    run(
        [
            shutil.which("g++") or "c++", *flags, check, CSRC / "asymmetric_loss.cpp", CSRC / "cpu_level.cpp",
            "-o", program,
        ]
    )  # fmt: skip
    assert run([program]).stdout == "asymmetric_loss: 72 cases\n"
    done = subprocess.run([program, "overrun"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


# ---- torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(dtype, reduction):
    logits, targets = torch.randn(3, 12).to(dtype), torch.rand(3, 12) < 0.5
    arguments = (targets, 1.0, 2.0, 0.05, 1e-8, reduction)
    torch.library.opcheck(torch.ops.capt.asymmetric_loss, (logits, *arguments))
    # The slope is a result for the backward alone: a gradient through it is refused, which the fourth utility asks for.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.capt.asymmetric_loss, (logits.requires_grad_(), *arguments), test_utils=utilities)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", parity.REDUCTIONS)
def test_compiles_without_graph_breaks(dynamic, reduction):
    def step(logits, targets):
        return ops.asymmetric_loss(logits * 2, targets, reduction=reduction).exp()

    torch.compiler.reset()
    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        logits, targets = torch.randn(batch, 12, requires_grad=True), torch.rand(batch, 12) < 0.5
        found, own = compiled(logits, targets), step(logits, targets)
        torch.testing.assert_close(found, own)
        upstream = torch.randn_like(own)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits, upstream)[0] for loss in (found, own)))


def test_the_gradient_of_a_gradient_is_refused_and_the_reference_has_it():
    def twice(backend):
        logits = torch.randn(2, 6, requires_grad=True)
        loss = ops.asymmetric_loss(logits, torch.ones(2, 6), backend=backend)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(first.square().sum(), logits)[0]

    assert twice("reference").abs().sum() > 0
    with pytest.raises(CaptError, match="asymmetric_loss: the kernels are differentiable once"):
        twice("cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradient_every_time(reduction):
    targets = torch.rand(3, 40) < 0.5
    logits = torch.randn(3, 40, requires_grad=True)
    loss = ops.asymmetric_loss(logits, targets, reduction=reduction)
    for upstream in (1.0, 1.0, -3.0):
        weights = torch.full_like(loss, upstream)
        (first,) = torch.autograd.grad(loss, logits, weights, retain_graph=True)
        fresh = ops.asymmetric_loss(logits, targets, reduction=reduction)
        again = upstream * torch.autograd.grad(fresh, logits, torch.ones_like(loss))[0]
        torch.testing.assert_close(first, again, rtol=1e-6, atol=0)
        first.zero_()  # belongs to the caller
    for _ in range(3):
        loss.backward(retain_graph=True) if reduction == "mean" else loss.sum().backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 3 * again / -3.0)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits, weights)


def test_a_graph_that_was_not_kept_is_refused_the_second_time():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = ops.asymmetric_loss(logits, torch.ones(3, 4))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_op_itself_refuses_what_does_not_fit():
    logits, targets = torch.randn(2, 3), torch.ones(2, 3)
    for change, message in (
        ({0: torch.randn(3)}, "must be"),
        ({1: torch.ones(3, 2)}, "must be"),
        ({1: torch.ones(2, 3).long()}, "targets must be bool"),
        ({0: torch.randn(2, 3).double()}, "logits must be float32"),
        ({2: -1.0}, "gammas must be"),
        ({6: 3}, "reduction must be"),
    ):
        arguments = [logits, targets, 0.0, 4.0, 0.05, 1e-8, 1]
        for place, value in change.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.capt.asymmetric_loss(*arguments)


def test_float64_logits_take_the_reference():
    logits, targets = torch.randn(3, 9).double(), torch.rand(3, 9) < 0.5
    assert ops.asymmetric_loss(logits, targets).dtype == torch.float64
    with pytest.raises(CaptError, match="float64 has no kernel"):
        ops.asymmetric_loss(logits, targets, backend="cpu")


def test_autocast_does_not_change_the_result():
    logits, targets = torch.randn(3, 9), torch.rand(3, 9) < 0.5
    for backend in BACKENDS:
        alone = ops.asymmetric_loss(logits, targets, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.asymmetric_loss(logits, targets, backend=backend), alone)


def test_the_mean_of_nothing_is_not_a_number_and_its_sum_is_zero():
    for backend in BACKENDS:
        for shape in ((0, 4), (3, 0)):
            empty = torch.empty(shape)
            assert ops.asymmetric_loss(empty, empty, backend=backend).isnan()
            assert ops.asymmetric_loss(empty, empty, reduction="sum", backend=backend) == 0


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    plan = ops.explain("asymmetric_loss", batch=16, n_classes=80)
    assert plan.backend == "cpu" and plan.bytes == 1280 * 9 and plan.flops == 1280 * 75
    assert "no such kernel" in plan.rejected["cuda"] and "triton" in plan.rejected
    half = {"batch": 16, "n_classes": 80, "dtype": torch.float16}
    assert ops.explain("asymmetric_loss", reduction="none", **half).bytes == 1280 * 11
    double = ops.explain("asymmetric_loss", batch=16, n_classes=80, dtype=torch.float64)
    assert double.backend == "reference" and "float64" in double.rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    assert "in software" in ops.explain("asymmetric_loss", **half).rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    for has_triton, backend in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(_plan, "HAS_TRITON", has_triton)
        assert ops.explain("asymmetric_loss", batch=8, n_classes=10, device="cuda").backend == backend


def test_reference_gradient_is_autograd_of_its_own_value():
    leaf = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 5) < 0.5

    def function(x):
        return reference.asymmetric_loss(x, targets, 0.0, 0.0, 0.0, 1e-8, "mean")  # no focus: nothing is held constant

    assert torch.autograd.gradcheck(function, (leaf,))
