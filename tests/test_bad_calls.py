"""Wrong arguments of the ops with kernels: every one is a CaptError that names op and argument, before anything runs.

And right ones in unusual layouts: views with any strides give what a contiguous copy gives.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from capt import ops
from capt.errors import CaptError


def floats(*shape):
    return torch.ones(shape)


def integers(*values):
    return torch.tensor(values)


RIGHT = {
    "asymmetric_loss": lambda: {"logits": floats(3, 6), "targets": torch.eye(3, 6).bool()},
    "attention_readout": lambda: {
        "query": floats(2, 3, 8),
        "keys": floats(2, 5, 3, 8),
        "values": floats(2, 5, 3, 8),
        "groups": integers(0, 1, 1, 0, 1),
        "n_groups": 2,
        "bias": floats(4, 1, 5),
    },
    "bank_topk": lambda: {"queries": floats(3, 8), "rows": floats(5, 8), "k": 2},
    "confusion_pairs": lambda: {"logits": floats(3, 6), "k": 2},
    "prompt_attention": lambda: {
        "query": floats(2, 8),
        "commonality": floats(4, 3, 8),
        "difference": floats(5, 2, 8),
        "commonality_index": integers([0, 1], [3, -1]),
        "difference_index": integers([0, 1], [4, -1]),
    },
    "prompt_attention_shared": lambda: {
        "commonality_query": floats(3, 8),
        "difference_query": floats(3, 8),
        "keys": floats(2, 5, 8),
        "values": floats(2, 5, 8),
        "n_heads": 2,
    },
    "expert_gating": lambda: {
        "x": floats(4, 8),
        "gate": floats(3, 8),
        "w_in": floats(3, 6, 8),
        "b_in": floats(3, 6),
        "w_out": floats(3, 8, 6),
        "b_out": floats(3, 8),
        "top_k": 2,
    },
    "grid_adapter": lambda: {"tokens": floats(2, 5, 4), "weight": floats(4, 3, 3), "grid": (2, 2), "n_prefix": 1},
    "pair_frontier": lambda: {"scores": floats(2, 3), "group": integers(0, 1, -1)},
}
POSITIONAL = {
    "asymmetric_loss": ("logits",),
    "attention_readout": ("query", "keys", "values"),
    "bank_topk": ("queries", "rows"),
    "confusion_pairs": ("logits",),
    "prompt_attention": ("query", "commonality", "difference"),
    "prompt_attention_shared": ("commonality_query", "difference_query", "keys", "values"),
    "expert_gating": ("x", "gate", "w_in", "b_in", "w_out", "b_out"),
    "grid_adapter": ("tokens", "weight"),
    "pair_frontier": ("scores",),
}
META = {"device": "meta"}
WHOLE = {"dtype": torch.int64}
STATISTICS = {"offsets": integers(0, 1, 1, 1, 1, 1, 1), "classes": integers(2), "counts": integers(3)}

ROWS = {"offsets": integers(0, 1, 2, 2, 2, 2, 2), "classes": integers(2, 3), "counts": integers(3, 1)}
SPARSE = torch.eye(8)[:3].to_sparse()
PRIMITIVES = {"state": floats(2, 4), "object": floats(2, 5), "pairs": integers([0, 1], [3, 4], [2, 0])}
EARLIER = ops.PairFrontier(floats(2, 2), integers([0, 1], [2, 3]))
EMPTY_EXPERTS = {"w_in": floats(3, 0, 8), "b_in": floats(3, 0), "w_out": floats(3, 8, 0)}

# op, what is changed, the argument that the message must name
BAD = [
    ("asymmetric_loss", {"logits": [[1.0] * 6] * 3}, "logits"),
    ("asymmetric_loss", {"logits": floats(6)}, "logits"),
    ("asymmetric_loss", {"logits": torch.ones(3, 6, **WHOLE)}, "logits"),
    ("asymmetric_loss", {"targets": floats(3, 5)}, "targets"),
    ("asymmetric_loss", {"targets": floats(3, 6) / 2}, "targets"),
    ("asymmetric_loss", {"targets": floats(3, 6) * float("nan")}, "targets"),
    ("asymmetric_loss", {"targets": torch.full((3, 6), 2, dtype=torch.uint8)}, "targets"),
    ("asymmetric_loss", {"targets": -torch.ones(3, 6, **WHOLE)}, "targets"),
    ("asymmetric_loss", {"targets": torch.ones(3, 6, **META)}, "targets"),
    ("asymmetric_loss", {"gamma_pos": -0.5}, "gamma_pos"),
    ("asymmetric_loss", {"gamma_neg": float("inf")}, "gamma_neg"),
    ("asymmetric_loss", {"gamma_neg": "4"}, "gamma_neg"),
    ("asymmetric_loss", {"margin": 1.0}, "margin"),
    ("asymmetric_loss", {"margin": float("nan")}, "margin"),
    ("asymmetric_loss", {"eps": -1e-8}, "eps"),
    ("asymmetric_loss", {"reduction": "avg"}, "reduction"),
    ("asymmetric_loss", {"backend": "cuda"}, "backend"),
    ("attention_readout", {"keys": [[1.0]]}, "keys"),
    ("attention_readout", {"keys": floats(2, 5, 24)}, "keys"),
    ("attention_readout", {"values": floats(2, 4, 3, 8)}, "values"),
    ("attention_readout", {"query": floats(1, 3, 8)}, "query"),
    ("attention_readout", {"query": floats(8)}, "query"),
    ("attention_readout", {"query": torch.ones(3, 8, **WHOLE)}, "query"),
    ("attention_readout", {"values": torch.ones(2, 5, 3, 8, **META)}, "values"),
    ("attention_readout", {"groups": integers(0, 1)}, "groups"),
    ("attention_readout", {"groups": torch.zeros(1, 5, **WHOLE)}, "groups"),
    ("attention_readout", {"groups": floats(5)}, "groups"),
    ("attention_readout", {"groups": integers(0, 1, 2, 0, 0)}, "groups"),
    ("attention_readout", {"groups": integers(0, 1, -1, 0, 0)}, "groups"),
    ("attention_readout", {"n_groups": 0}, "n_groups"),
    ("attention_readout", {"bias": floats(4, 2, 5)}, "bias"),
    ("attention_readout", {"bias": floats(4, 1, 4)}, "bias"),
    ("attention_readout", {"bias": torch.ones(4, 1, 5, **WHOLE)}, "bias"),
    ("attention_readout", {"scale": "1"}, "scale"),
    ("attention_readout", {"backend": "cuda"}, "backend"),
    ("bank_topk", {"queries": [[1.0] * 8]}, "queries"),
    ("bank_topk", {"queries": floats(8)}, "queries"),
    ("bank_topk", {"queries": torch.ones(3, 8, **WHOLE), "rows": torch.ones(5, 8, **WHOLE)}, "queries"),
    ("bank_topk", {"rows": floats(5, 7)}, "rows"),
    ("bank_topk", {"rows": floats(5, 8).half()}, "rows"),
    ("bank_topk", {"rows": torch.ones(5, 8, **META)}, "rows"),
    ("bank_topk", {"k": 0}, "k"),
    ("bank_topk", {"k": -3}, "k"),
    ("bank_topk", {"k": 2.0}, "k"),
    ("bank_topk", {"k": True}, "k"),
    ("bank_topk", {"row_ids": torch.arange(5)}, "exclude"),
    ("bank_topk", {"exclude": torch.arange(3)}, "row_ids"),
    ("bank_topk", {"row_ids": torch.arange(4), "exclude": torch.arange(3)}, "row_ids"),
    ("bank_topk", {"row_ids": torch.arange(5), "exclude": torch.arange(2)}, "exclude"),
    ("bank_topk", {"row_ids": torch.arange(5).int(), "exclude": torch.arange(3)}, "row_ids"),
    ("bank_topk", {"ranges": torch.zeros(3, 1, 2, **WHOLE)}, "ranges"),
    ("bank_topk", {"ranges": torch.zeros(2, 1, 1, 2, **WHOLE)}, "ranges"),
    ("bank_topk", {"ranges": torch.zeros(3, 1, 1, 2)}, "ranges"),
    ("bank_topk", {"ranges": integers([[[0, 6]]], [[[0, 1]]], [[[0, 1]]])}, "ranges"),
    ("bank_topk", {"ranges": integers([[[-1, 2]]], [[[0, 1]]], [[[0, 1]]])}, "ranges"),
    ("bank_topk", {"backend": "gpu"}, "backend"),
    ("bank_topk", {"backend": "cuda"}, "backend"),
    ("confusion_pairs", {"logits": [[1.0, 2.0]]}, "logits"),
    ("confusion_pairs", {"logits": floats(6)}, "logits"),
    ("confusion_pairs", {"logits": torch.ones(3, 6, **WHOLE)}, "logits"),
    ("confusion_pairs", {"logits": floats(3, 1)}, "logits"),
    ("confusion_pairs", {"k": 0}, "k"),
    ("confusion_pairs", {"k": "2"}, "k"),
    ("confusion_pairs", {"offsets": STATISTICS["offsets"]}, "offsets"),
    ("confusion_pairs", {**STATISTICS, "offsets": integers(0, 1)}, "offsets"),
    ("confusion_pairs", {**STATISTICS, "offsets": integers(0, 2, 2, 2, 2, 2, 2)}, "offsets"),
    ("confusion_pairs", {**STATISTICS, "classes": integers(6)}, "classes"),
    ("confusion_pairs", {**STATISTICS, "counts": integers(3, 4)}, "counts"),
    ("confusion_pairs", {**STATISTICS, "counts": torch.ones(1, **META)}, "counts"),
    ("confusion_pairs", {"backend": "triton"}, "backend"),
    ("confusion_pairs", {**STATISTICS, "offsets": [0, 1, 1, 1, 1, 1, 1]}, "offsets"),
    ("confusion_pairs", {**ROWS, "offsets": integers(0, 2, 1, 2, 2, 2, 2)}, "offsets"),
    ("confusion_pairs", {**STATISTICS, "offsets": STATISTICS["offsets"].bool()}, "offsets"),
    ("confusion_pairs", {**ROWS, "counts": torch.ones(2, dtype=torch.complex64)}, "counts"),
    ("confusion_pairs", {**ROWS, "counts": integers(1, 0).bool()}, "counts"),
    ("confusion_pairs", {**ROWS, "counts": integers(1, -1)}, "counts"),
    ("confusion_pairs", {**ROWS, "counts": torch.tensor([1.0, float("nan")])}, "counts"),
    ("confusion_pairs", {**ROWS, "counts": torch.tensor([1.0, float("inf")])}, "counts"),
    ("bank_topk", {"queries": SPARSE}, "queries"),
    ("bank_topk", {"k": np.bool_(True)}, "k"),
    ("bank_topk", {"k": np.int64(0)}, "k"),
    ("prompt_attention", {"log_prior": [0.0]}, "log_prior"),
    ("prompt_attention", {"scale": "x"}, "scale"),
    ("prompt_attention", {"scale": 10**400}, "scale"),
    ("prompt_attention_shared", {"scale": "x"}, "scale"),
    ("prompt_attention_shared", {"n_heads": 2.0}, "n_heads"),
    ("expert_gating", {"dropout": "x"}, "dropout"),
    ("expert_gating", {"gate": SPARSE}, "gate"),
    ("expert_gating", EMPTY_EXPERTS, "w_in"),
    ("grid_adapter", {"alpha": 10**400}, "alpha"),
    ("grid_adapter", {"alpha": torch.ones(1).to_sparse()}, "alpha"),
    ("prompt_attention", {"query": floats(2, 1, 8)}, "query"),
    ("prompt_attention", {"commonality": floats(4, 3, 7)}, "commonality"),
    ("prompt_attention", {"difference": floats(5, 8)}, "difference"),
    ("prompt_attention", {"difference": torch.ones(5, 2, 8, **META)}, "difference"),
    ("prompt_attention", {"query": torch.ones(2, 8, **WHOLE)}, "query"),
    ("prompt_attention", {"commonality_index": integers([0, 1], [4, -1])}, "commonality_index"),
    ("prompt_attention", {"difference_index": integers([0, 1], [4, -2])}, "difference_index"),
    ("prompt_attention", {"commonality_index": integers([0, 1], [3, -1]).int()}, "commonality_index"),
    ("prompt_attention", {"difference_index": integers([0], [1])}, "difference_index"),
    ("prompt_attention", {"log_prior": floats(2, 3)}, "log_prior"),
    ("prompt_attention", {"log_prior": torch.ones(2, 2, **WHOLE)}, "log_prior"),
    ("prompt_attention", {"backend": "cuda"}, "backend"),
    ("prompt_attention_shared", {"keys": floats(5, 8)}, "keys"),
    ("prompt_attention_shared", {"keys": floats(2, 0, 8), "values": floats(2, 0, 8)}, "keys"),
    ("prompt_attention_shared", {"values": floats(2, 4, 8)}, "values"),
    ("prompt_attention_shared", {"commonality_query": floats(3, 7)}, "commonality_query"),
    ("prompt_attention_shared", {"difference_query": floats(3, 3, 8)}, "difference_query"),
    ("prompt_attention_shared", {"difference_query": floats(8)}, "difference_query"),
    ("prompt_attention_shared", {"values": torch.ones(2, 5, 8, **WHOLE)}, "values"),
    ("prompt_attention_shared", {"n_heads": 0}, "n_heads"),
    ("prompt_attention_shared", {"n_heads": 3}, "n_heads"),
    ("prompt_attention_shared", {"backend": "nvidia"}, "backend"),
    ("expert_gating", {"x": floats(8)}, "x"),
    ("expert_gating", {"x": torch.ones(4, 8, **WHOLE)}, "x"),
    ("expert_gating", {"gate": floats(3, 7)}, "gate"),
    ("expert_gating", {"gate": torch.ones(3, 8, **META)}, "gate"),
    ("expert_gating", {"w_in": floats(2, 6, 8)}, "w_in"),
    ("expert_gating", {"b_in": floats(3, 5)}, "b_in"),
    ("expert_gating", {"w_out": floats(3, 6, 8)}, "w_out"),
    ("expert_gating", {"b_out": floats(3, 6)}, "b_out"),
    ("expert_gating", {"b_out": None}, "b_out"),
    ("expert_gating", {"top_k": 0}, "top_k"),
    ("expert_gating", {"top_k": 4}, "top_k"),
    ("expert_gating", {"dropout": 1.0}, "dropout"),
    ("expert_gating", {"dropout": -0.1}, "dropout"),
    ("expert_gating", {"backend": "cuda"}, "backend"),
    ("grid_adapter", {"tokens": [1.0]}, "tokens"),
    ("grid_adapter", {"tokens": floats(5, 4)}, "tokens"),
    ("grid_adapter", {"tokens": torch.ones(2, 5, 4, **WHOLE)}, "tokens"),
    ("grid_adapter", {"weight": floats(4, 5, 5)}, "weight"),
    ("grid_adapter", {"weight": torch.ones(4, 3, 3, **META)}, "weight"),
    ("grid_adapter", {"alpha": floats(3)}, "alpha"),
    ("grid_adapter", {"alpha": "0.5"}, "alpha"),
    ("grid_adapter", {"grid": (3, 2)}, "grid"),
    ("grid_adapter", {"grid": 2}, "grid"),
    ("grid_adapter", {"grid": (0, 2)}, "grid"),
    ("grid_adapter", {"n_prefix": -1}, "n_prefix"),
    ("grid_adapter", {"backend": "triton"}, "backend"),
    ("pair_frontier", {"scores": [[1.0, 2.0, 3.0]]}, "scores"),
    ("pair_frontier", {"scores": floats(3)}, "scores"),
    ("pair_frontier", {"scores": torch.ones(2, 3, **WHOLE)}, "scores"),
    ("pair_frontier", {"group": integers(0, 1)}, "group"),
    ("pair_frontier", {"group": integers(0, 1, 0).int()}, "group"),
    ("pair_frontier", {"group": integers(0, 1, 2)}, "group"),
    ("pair_frontier", {"group": integers(0, -2, 1)}, "group"),
    ("pair_frontier", {"group": torch.zeros(3, **WHOLE, **META)}, "group"),
    ("pair_frontier", {"n_groups": 0}, "n_groups"),
    ("pair_frontier", {"start": -1}, "start"),
    ("pair_frontier", {"start": 2**31 - 3}, "start"),
    ("pair_frontier", {"state": PRIMITIVES["state"]}, "state"),
    ("pair_frontier", {**PRIMITIVES, "pairs": None}, "pairs"),
    ("pair_frontier", {**PRIMITIVES, "state": floats(1, 4)}, "state"),
    ("pair_frontier", {**PRIMITIVES, "state": floats(2, 3)}, "pairs"),
    ("pair_frontier", {**PRIMITIVES, "object": floats(2, 4)}, "pairs"),
    ("pair_frontier", {**PRIMITIVES, "object": torch.ones(2, 5, **WHOLE)}, "object"),
    ("pair_frontier", {**PRIMITIVES, "object": torch.ones(2, 5, **META)}, "object"),
    ("pair_frontier", {**PRIMITIVES, "pairs": integers([0, 1], [3, 4])}, "pairs"),
    ("pair_frontier", {**PRIMITIVES, "pairs": PRIMITIVES["pairs"].int()}, "pairs"),
    ("pair_frontier", {**PRIMITIVES, "pairs": integers([0, 1], [3, 4], [-1, 0])}, "pairs"),
    ("pair_frontier", {"previous": EARLIER.score}, "previous"),
    ("pair_frontier", {"previous": EARLIER, "n_groups": 3}, "previous"),
    ("pair_frontier", {"previous": (EARLIER.score.half(), EARLIER.pair)}, "previous"),
    ("pair_frontier", {"previous": (EARLIER.score, EARLIER.pair.int())}, "previous"),
    ("pair_frontier", {"backend": "cuda"}, "backend"),
]


def call(op, arguments):
    positional = [arguments.pop(name) for name in POSITIONAL[op]]
    return getattr(ops, op)(*positional, **arguments)


@pytest.mark.parametrize("op", RIGHT)
def test_the_unchanged_call_is_right(op):
    call(op, RIGHT[op]())


@pytest.mark.parametrize(
    ("op", "change", "name"), [pytest.param(*bad, id=f"{bad[0]}-{bad[2]}-{number}") for number, bad in enumerate(BAD)]
)
def test_a_bad_argument_is_named(op, change, name):
    with pytest.raises(CaptError) as caught:
        call(op, {**RIGHT[op](), **change})
    message = str(caught.value)
    assert message.startswith(f"{op}: ") and re.search(rf"\b{name}\b", message), message


def test_there_are_many_bad_calls_of_every_op():
    assert len(BAD) >= 40 and {op for op, _, _ in BAD} == set(RIGHT)


def test_integers_of_numpy_count():
    arguments = RIGHT["bank_topk"]()
    wanted = call("bank_topk", dict(arguments))
    assert torch.equal(call("bank_topk", arguments | {"k": np.int64(2)})[1], wanted[1])
    call("grid_adapter", RIGHT["grid_adapter"]() | {"grid": (np.int32(2), np.int64(2)), "n_prefix": np.int64(1)})


def test_a_width_of_zero_needs_no_scale():
    index = integers([0])
    out, _ = ops.prompt_attention(
        floats(1, 0), floats(1, 1, 0), floats(1, 1, 0), commonality_index=index, difference_index=index
    )
    assert out.shape == (1, 0)


@pytest.mark.parametrize(
    ("op", "shapes", "name"),
    [
        ("expert_gating", {"n_experts": 600, "backend": "cpu"}, "600 experts"),
        ("bank_topk", {"dtype": "float32"}, "dtype"),
        ("bank_topk", {"device": "nope"}, "device"),
        ("grid_adapter", {"batch": 1, "grid": (2,), "dim": 3}, "explain"),
    ],
)
def test_explain_refuses_what_a_call_refuses(op, shapes, name):
    with pytest.raises(CaptError, match=name):
        ops.explain(op, **shapes)
    assert ops.explain("expert_gating", n_experts=600).rejected["cpu"].startswith("600 experts")


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["bank_topk", "confusion_pairs", "pair_frontier"])
def test_gradients_do_not_flow_through_a_search(op):
    """Documented as "No gradient": inputs may ask for one, results do not carry it."""
    arguments = RIGHT[op]()
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    assert not any(value.requires_grad for value in call(op, arguments))
    assert "No gradient" in getattr(ops, op).__doc__


def test_the_gradient_of_a_gradient_of_a_kernel_is_refused_and_the_reference_has_it():
    def twice(backend):
        leaves = [value.requires_grad_() for value in (torch.randn(1, 5, 4), torch.randn(4, 3, 3))]
        out = ops.grid_adapter(*leaves, grid=(2, 2), n_prefix=1, backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves[1], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaves[0])[0]

    assert twice("reference").abs().sum() > 0
    with pytest.raises(CaptError, match="grid_adapter: the kernels are differentiable once"):
        twice("cpu")


KERNELS_WITH_GRADIENT = [
    "asymmetric_loss",
    "attention_readout",
    "grid_adapter",
    "prompt_attention",
    "prompt_attention_shared",
    "expert_gating",
]


@pytest.mark.parametrize("op", KERNELS_WITH_GRADIENT)
def test_a_forward_mode_tangent_goes_to_the_reference_and_is_refused_by_kernels(op):
    arguments = RIGHT[op]()
    arguments |= {n: torch.randn_like(arguments[n]) for n in POSITIONAL[op]}
    name = POSITIONAL[op][0]

    def tangent(backend):
        def function(value):
            result = call(op, arguments | {name: value, "backend": backend})
            return result if isinstance(result, torch.Tensor) else result[0]

        return torch.func.jvp(function, (arguments[name],), (torch.ones_like(arguments[name]),))[1]

    assert torch.equal(tangent(None), tangent("reference")) and tangent(None).abs().sum() > 0
    with pytest.raises(CaptError, match=f"{op}: backend='cpu' was forced and cannot run: .*forward-mode"):
        tangent("cpu")


# ---- tracing and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", None])
def test_sizes_may_be_arguments_of_a_compiled_function(backend):
    tokens, weight = torch.randn(2, 31, 4), torch.randn(4, 3, 3)

    def adapter(height, width):
        return ops.grid_adapter(tokens, weight, grid=(height, width), n_prefix=1, backend=backend)

    def shared(n_heads):
        return ops.prompt_attention_shared(query, query, keys, keys, n_heads=n_heads, backend=backend)[0]

    query, keys = torch.randn(3, 12), torch.randn(2, 5, 12)
    for function, sizes in ((adapter, [(2, 3), (4, 3), (5, 6)]), (shared, [(2,), (3,), (6,)])):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in sizes:
            torch.testing.assert_close(compiled(*size), function(*size))


@pytest.mark.parametrize("op", RIGHT)
def test_autocast_changes_nothing(op):
    arguments = RIGHT[op]()
    arguments |= {n: torch.randn_like(arguments[n]) for n in POSITIONAL[op]}
    for backend in ("reference", "cpu"):
        wanted = call(op, arguments | {"backend": backend})
        with torch.autocast("cpu", torch.bfloat16):
            found = call(op, arguments | {"backend": backend})
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, wanted)), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_tensors_without_entries_to_read_pass_the_index_checks():
    arguments = RIGHT["prompt_attention"]()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        assert call("prompt_attention", fake)[0].shape == (2, 8)
    many = arguments | {"backend": "reference"}
    stacked = torch.stack([arguments["commonality_index"]] * 3)
    found = torch.vmap(lambda index: call("prompt_attention", many | {"commonality_index": index})[0])(stacked)
    assert torch.equal(found[2], call("prompt_attention", dict(many))[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_prompt_attention_absent_pairs_read_no_row(backend):
    table = torch.full((2, 1, 4), float("nan"))
    table[1] = 1
    index = torch.tensor([[-1, 1]])
    found = ops.prompt_attention(
        torch.ones(1, 4), table, table, commonality_index=index, difference_index=index, backend=backend
    )
    assert all(out.tolist() == [[1.0] * 4] for out in found)


# ---- layouts -----------------------------------------------------------------------------------------------------


def apart(value):
    """The same numbers with no dimension contiguous."""
    spread = torch.zeros([2 * size for size in value.shape], dtype=value.dtype)
    view = spread[tuple(slice(None, None, 2) for _ in value.shape)]
    return view.copy_(value)


def turned(value):
    """The same numbers, last dimension outermost."""
    order = (value.dim() - 1, *range(value.dim() - 1))
    return value.permute(order).contiguous().permute(*range(1, value.dim()), 0)


@pytest.mark.parametrize("layout", [apart, turned])
@pytest.mark.parametrize("op", RIGHT)
def test_any_layout_gives_what_a_contiguous_copy_gives(op, layout):
    arguments = RIGHT[op]()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = torch.randn(value.shape)
    if op == "bank_topk":
        arguments |= {"ranges": torch.tensor([[[[0, 2], [3, 5]]]] * 3), "row_ids": torch.arange(5),
                      "exclude": torch.tensor([0, 4, -1])}  # fmt: skip
    strange = {name: layout(v) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    assert not all(v.is_contiguous() for v in strange.values() if isinstance(v, torch.Tensor))
    found, wanted = call(op, strange), call(op, arguments)
    for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)
