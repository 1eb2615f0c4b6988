"""grid_adapter on the CPU: definition, every instruction-set level, gradients, layouts, torch integration, plan."""

from __future__ import annotations

import sys

import pytest
import torch

from capt import ops, reference
from capt._build import NativeBuild, native
from capt.errors import CaptError
from capt.ops import _plan
from tests.accuracy import ADAPTER_SHAPES, DTYPES, assert_as_accurate_as_torch, relative_l2

MODULE = sys.modules["capt.ops.grid_adapter"]  # the attribute of capt.ops with this name is the function
GRAPH_BREAK_FREE = {"fullgraph": True, "backend": "aot_eager"}


def native_module():
    """capt._C, or a failure that says why it is missing: the suite is run on an installed build."""
    assert native().loaded, native().reason
    from capt import _C

    return _C


def make(batch, grid, dim, n_prefix, n_suffix, dtype=torch.float32):
    tokens = torch.randn(batch, n_prefix + grid[0] * grid[1] + n_suffix, dim).to(dtype)
    return tokens, torch.randn(dim, 3, 3)


def nested_loops(tokens, weight, alpha, grid, n_prefix):
    """The definition, one multiplication at a time."""
    height, width = grid
    out = tokens.clone()
    for b in range(tokens.shape[0]):
        for y in range(height):
            for x in range(width):
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= y + i < height and 0 <= x + j < width:
                            neighbour = tokens[b, n_prefix + (y + i) * width + x + j]
                            out[b, n_prefix + y * width + x] += alpha[b] * weight[:, i + 1, j + 1] * neighbour
    return out


def test_20_reference_is_the_definition():
    tokens, weight = make(2, (3, 4), 5, 2, 1)
    tokens, weight, alpha = tokens.double(), weight.double(), torch.tensor([0.5, -2.0]).double()
    expected = nested_loops(tokens, weight, alpha, (3, 4), 2)
    torch.testing.assert_close(reference.grid_adapter(tokens, weight, alpha, (3, 4), 2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADAPTER_SHAPES)
@pytest.mark.parametrize("alpha_kind", ["number", "scalar", "image"])
def test_cpu_kernel_is_as_accurate_as_torch(shape, dtype, alpha_kind):
    batch, grid, _, n_prefix, _ = shape
    tokens, weight = make(*shape, dtype)
    alpha = {"number": 0.7, "scalar": torch.tensor(0.7), "image": torch.rand(batch)}[alpha_kind]
    out = ops.grid_adapter(tokens, weight, alpha=alpha, grid=grid, n_prefix=n_prefix, backend="cpu")
    exact_alpha = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    oracle = reference.grid_adapter(tokens.double(), weight.double(), exact_alpha, grid, n_prefix)
    torch_own = reference.grid_adapter(tokens, weight, alpha, grid, n_prefix)
    assert out.dtype == dtype and out.shape == tokens.shape
    assert_as_accurate_as_torch(out, torch_own, oracle, tokens)
    cells = slice(n_prefix, n_prefix + grid[0] * grid[1])
    untouched = torch.ones(tokens.shape[1], dtype=torch.bool)
    untouched[cells] = False
    assert torch.equal(out[:, untouched], tokens[:, untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_every_instruction_set_level_writes_exactly_its_output(dtype, transpose):
    module = native_module()
    code = DTYPES.index(dtype)
    for level, name in enumerate(module.cpu_levels()):
        for batch, grid, dim, n_prefix, n_suffix in ADAPTER_SHAPES:
            tokens, weight = make(batch, grid, dim, n_prefix, n_suffix, dtype)
            length = tokens.shape[1]
            sizes = (batch, length, dim, *grid, n_prefix)
            guard = 64
            buffer = torch.full((tokens.numel() + 2 * guard,), float("nan"), dtype=dtype)
            out = buffer[guard:-guard].view(tokens.shape)
            module.grid_adapter(
                level, code, tokens.data_ptr(), weight.data_ptr(), 0.5, out.data_ptr(), sizes, transpose
            )
            used = weight.flip(1, 2) if transpose else weight
            oracle = reference.grid_adapter(tokens.double(), used.double(), 0.5, grid, n_prefix)
            own = reference.grid_adapter(tokens, used, 0.5, grid, n_prefix)
            assert_as_accurate_as_torch(out, own, oracle, tokens)
            assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all(), name

            grad = torch.randn(tokens.shape).to(dtype)
            sums = torch.full((batch * 9 * dim + 2 * guard,), float("nan"))
            partial = sums[guard:-guard].view(batch, 9, dim)
            module.grid_correlate(level, code, tokens.data_ptr(), grad.data_ptr(), partial.data_ptr(), sizes)
            probe = torch.zeros(batch, dim, 3, 3, dtype=torch.float64, requires_grad=True)
            total = sum(
                (
                    reference.grid_adapter(tokens[b : b + 1].double(), probe[b], 1.0, grid, n_prefix)
                    * grad[b : b + 1].double()
                ).sum()
                for b in range(batch)
            )
            (want,) = torch.autograd.grad(total, probe)
            assert relative_l2(partial, want.reshape(batch, dim, 9).transpose(1, 2)) < 1e-5
            assert sums[:guard].isnan().all() and sums[-guard:].isnan().all(), name


def test_a_level_this_cpu_lacks_is_refused():
    module = native_module()
    tokens, weight = make(1, (1, 1), 1, 0, 0)
    with pytest.raises(ValueError, match="instruction-set level"):
        module.grid_adapter(
            9, 0, tokens.data_ptr(), weight.data_ptr(), 1.0, tokens.data_ptr(), (1, 1, 1, 1, 1, 0), False
        )


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_every_level_rounds_16_bit_storage_like_torch(storage):
    """Subnormals, halfway cases, overflow, infinities and NaN pass through load, sum and store."""
    module = native_module()
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    tokens = bits.view(storage).reshape(1, 16, 4096)
    middle = torch.zeros(4096, 3, 3)
    middle[:, 1, 1] = 1.0
    for level, _ in enumerate(module.cpu_levels()):
        for alpha in (0.0, 1 / 3, 1.0):
            out = torch.empty_like(tokens)
            code = DTYPES.index(storage)
            sizes = (1, 16, 4096, 16, 1, 0)
            module.grid_adapter(level, code, tokens.data_ptr(), middle.data_ptr(), alpha, out.data_ptr(), sizes, False)
            finite = tokens.isfinite() & tokens.roll(1, 1).isfinite() & tokens.roll(-1, 1).isfinite()
            value = tokens.double()
            exact = (value + float(torch.tensor(alpha)) * value).float().to(storage)
            assert torch.equal(out[finite], exact[finite])
            assert out[tokens.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [(t, w, a) for t in (0, 1) for w in (0, 1) for a in (0, 1) if t + w + a])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_match_float64_autograd(dtype, wanted, per_image):
    tokens, weight = make(3, (4, 5), 21, 1, 1, dtype)
    alpha = torch.rand(3) if per_image else torch.tensor(0.4)
    given = [
        value.clone().requires_grad_(bool(flag)) for value, flag in zip((tokens, weight, alpha), wanted, strict=True)
    ]
    exact = [value.detach().double().requires_grad_(value.requires_grad) for value in given]
    out = ops.grid_adapter(given[0], given[1], alpha=given[2], grid=(4, 5), n_prefix=1, backend="cpu")
    upstream = torch.randn(out.shape).to(dtype)
    out.backward(upstream)
    reference.grid_adapter(*exact, (4, 5), 1).backward(upstream.double())
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for value, want in zip(given, exact, strict=True):
        if value.requires_grad:
            assert value.grad.dtype == value.dtype and value.grad.shape == value.shape
            assert relative_l2(value.grad, want.grad) < limit
            assert torch.equal(value.grad == 0, want.grad == 0) or dtype != torch.float32
        else:
            assert value.grad is None


def test_gradient_of_an_expanded_upstream_and_a_constant_number():
    tokens, weight = make(2, (3, 3), 8, 1, 0)
    tokens.requires_grad_()
    ops.grid_adapter(tokens, weight, alpha=0.25, grid=(3, 3), n_prefix=1, backend="cpu").sum().backward()
    want = tokens.detach().clone().requires_grad_()
    reference.grid_adapter(want, weight, 0.25, (3, 3), 1).sum().backward()
    torch.testing.assert_close(tokens.grad, want.grad)


def test_layouts_sliced_transposed_expanded_and_offset():
    tokens, weight = make(4, (3, 4), 16, 1, 0)
    big = torch.randn(4, 20, 48)
    layouts = {
        "channel slice": big[:, :13, 5:21],
        "token slice": big[:, 3:16, :16],
        "every second image": torch.cat([tokens, tokens])[::2],
        "transposed": torch.randn(13, 4, 16).transpose(0, 1),
        "channels apart": torch.randn(4, 16, 13).transpose(1, 2),
        "expanded": tokens[:1].expand(4, -1, -1),
    }
    for name, view in layouts.items():
        out = ops.grid_adapter(view, weight, alpha=0.5, grid=(3, 4), n_prefix=1, backend="cpu")
        torch.testing.assert_close(out, reference.grid_adapter(view, weight, 0.5, (3, 4), 1), msg=name)


def test_identity_cases_are_bitwise_and_bad_values_stay_local():
    tokens, weight = make(2, (4, 4), 33, 2, 1)
    zero = torch.zeros_like(weight)
    assert torch.equal(ops.grid_adapter(tokens, zero, grid=(4, 4), n_prefix=2, backend="cpu"), tokens)
    assert torch.equal(ops.grid_adapter(tokens, weight, alpha=0.0, grid=(4, 4), n_prefix=2, backend="cpu"), tokens)
    tokens[:, 0] = float("inf")
    tokens[:, 2] = float("nan")  # first cell of the grid
    out = ops.grid_adapter(tokens, weight, grid=(4, 4), n_prefix=2, backend="cpu")
    assert out[:, 0].isinf().all() and out[:, [2, 3, 6, 7]].isnan().all()
    assert out[:, [1, 4, 5, *range(8, 19)]].isfinite().all()


def test_empty_batch_has_a_valid_backward():
    tokens = torch.empty(0, 5, 8, requires_grad=True)
    weight = torch.randn(8, 3, 3, requires_grad=True)
    out = ops.grid_adapter(tokens, weight, grid=(2, 2), n_prefix=1, backend="cpu")
    out.sum().backward()
    assert out.shape == (0, 5, 8) and weight.grad.eq(0).all()


def test_result_does_not_depend_on_threads_or_repetition():
    tokens, weight = make(5, (7, 7), 70, 1, 0)
    weight.requires_grad_()
    results = []
    try:
        for threads in (*[1] * 34, *[2] * 33, *[3] * 33):  # 100 runs
            torch.set_num_threads(threads)
            out = ops.grid_adapter(tokens, weight, grid=(7, 7), n_prefix=1, backend="cpu")
            (grad,) = torch.autograd.grad(out.square().sum(), weight)
            results.append((out.detach(), grad))
    finally:
        torch.set_num_threads(1)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("alpha", [None, torch.tensor([0.5]), torch.tensor([0.5, 2.0])])
def test_opcheck(alpha):
    native_module()
    tokens, weight = make(2, (3, 2), 10, 1, 0)
    for needs in (False, True):
        args = (tokens.requires_grad_(needs), weight.requires_grad_(needs), alpha, 1.0, 3, 2, 1, needs)
        torch.library.opcheck(torch.ops.capt.grid_adapter, args)
    torch.library.opcheck(torch.ops.capt.grid_adapter_correlate, (tokens.detach(), tokens.detach(), 3, 2, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    def step(tokens, weight, alpha):
        return ops.grid_adapter(tokens, weight, alpha=alpha, grid=(3, 3), n_prefix=1).tanh()

    compiled = torch.compile(step, dynamic=dynamic, **GRAPH_BREAK_FREE)
    for batch in (2, 5):
        tokens, weight = make(batch, (3, 3), 12, 1, 0)
        alpha = torch.rand(batch)
        leaves = [value.requires_grad_() for value in (tokens, weight, alpha)]
        out = compiled(*leaves)
        torch.testing.assert_close(out, step(*leaves))
        upstream = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, upstream)
        torch.testing.assert_close(got, torch.autograd.grad(step(*leaves), leaves, upstream))


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    plan = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768)
    assert plan.backend == "cpu" and plan.rejected.keys() == {"cuda", "triton"}
    assert plan.bytes == 2 * 2 * 197 * 768 * 4 + 9 * 768 * 4 and plan.flops == 2 * 196 * 768 * 20
    half = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768, dtype=torch.bfloat16)
    assert half.bytes == 2 * 2 * 197 * 768 * 2 + 9 * 768 * 4
    double = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768, dtype=torch.float64)
    assert double.backend == "reference" and "float64" in double.rejected["cpu"]
    assert "cpu" in str(plan) and "not cuda: the tensors are on cpu" in str(plan)
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    slow = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768, dtype=torch.float16)
    assert slow.backend == "reference" and "in software" in slow.rejected["cpu"]
    assert ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768).backend == "cpu"
    forced = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768, dtype=torch.float16, backend="cpu")
    assert forced.backend == "cpu"
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(False, "the native library was not built"))
    bare = ops.explain("grid_adapter", batch=2, grid=(14, 14), dim=768)
    assert bare.backend == "reference" and "was not built" in bare.rejected["cpu"]
    tokens, weight = make(1, (2, 2), 4, 0, 0)
    assert torch.equal(
        ops.grid_adapter(tokens, weight, grid=(2, 2)), reference.grid_adapter(tokens, weight, 1.0, (2, 2), 0)
    )
    with pytest.raises(CaptError, match="was not built"):
        ops.grid_adapter(tokens, weight, grid=(2, 2), backend="cpu")


def test_plan_on_a_gpu_prefers_cuda_then_triton(monkeypatch):
    size = {"batch": 2, "grid": (14, 14), "dim": 768, "device": "cuda"}
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    monkeypatch.setattr(_plan, "HAS_TRITON", True)
    assert ops.explain("grid_adapter", **size).backend == "cuda"
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", None))
    plan = ops.explain("grid_adapter", **size)
    assert plan.backend == "triton" and "built without CUDA" in plan.rejected["cuda"]
    monkeypatch.setattr(_plan, "HAS_TRITON", False)
    assert ops.explain("grid_adapter", **size).backend == "reference"
    assert ops.explain("grid_adapter", **size, backend="reference").reason == "forced"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_backend_that_cannot_run_raises(backend):
    tokens, weight = make(1, (2, 2), 4, 0, 0)
    with pytest.raises(CaptError, match=f"backend='{backend}' was forced and cannot run: the tensors are on cpu"):
        ops.grid_adapter(tokens, weight, grid=(2, 2), backend=backend)


def adapter(tokens=(1, 5, 4), weight=(4, 3, 3), **options):
    return lambda: ops.grid_adapter(
        torch.ones(tokens), torch.ones(weight), **{"grid": (2, 2), "n_prefix": 1, **options}
    )


BAD_CALLS = {
    r"tokens must have shape \[B, L, D\], found \[5, 4\]": adapter(tokens=(5, 4)),
    r"weight must have shape \[4, 3, 3\], found \[4, 5, 5\]": adapter(weight=(4, 5, 5)),
    "tokens has 5 tokens, but 1 prefix tokens and a 3x2 grid need at least 7": adapter(grid=(3, 2)),
    "grid height must be an integer of at least 1, found 0": adapter(grid=(0, 2)),
    "n_prefix must be an integer of at least 0": adapter(n_prefix=-1),
    r"one entry or \[1\], found \[2\]": adapter(alpha=torch.ones(2)),
    "alpha must be float16, bfloat16": adapter(alpha=torch.ones(1, dtype=torch.int64)),
    "backend='gpu' is unknown": adapter(backend="gpu"),
    "all tensors must be on one device": lambda: ops.grid_adapter(
        torch.ones(1, 5, 4), torch.ones(4, 3, 3, device="meta"), grid=(2, 2)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()


def test_plan_prints_in_one_screen():
    text = str(_plan.Plan("x", "cpu", "because", 10, 20, {"cuda": "none"}))
    assert text.splitlines() == ["x: cpu (because)", "  not cuda: none", "  10 bytes, 20 FLOP"]
