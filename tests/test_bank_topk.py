"""bank_topk on the CPU: parity at every instruction-set level, passes and chunks, repeatability, torch integration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import bank_topk as benchmark
from benchmarks.parity import bank_topk as parity
from capt import ops, reference
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.conftest import CPU_LEVELS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def integers(count, dim, dtype=torch.float32):
    """Few values, hence exact scores and many ties."""
    return torch.randint(-2, 3, (count, dim)).to(dtype)


def ranges_of(*lists):
    return torch.tensor(lists).reshape(1, len(lists), -1, 2)


def assert_same(found, expected):
    for own, want in zip(found, expected, strict=True):
        assert own.dtype == want.dtype and torch.equal(own, want)


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_parity(first):
    for seed in range(first, first + 100):
        problem = parity.problem(seed)
        complaint = parity.complaint(problem, parity.run(problem, backend="cpu"))
        assert not complaint, complaint


def test_parity_of_large_problems():
    for seed in parity.LARGE_SEEDS[::5]:
        problem = parity.problem(seed)
        complaint = parity.complaint(problem, parity.run(problem, backend="cpu"))
        assert not complaint, complaint


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)))
def test_parity_at_every_level(level, limit_cpu_level):
    if limit_cpu_level(level) != level:
        level = limit_cpu_level(level)  # this machine has less: its best level once more
    for seed in range(500, 620):
        problem = parity.problem(seed)
        complaint = parity.complaint(problem, parity.run(problem, backend="cpu"))
        assert not complaint, f"{CPU_LEVELS[level]}: {complaint}"


def test_parity_notices_a_wrong_answer():
    for seed in range(40):
        problem = parity.problem(seed)
        score, index = parity.run(problem, backend="reference")
        finite = score.flatten().isfinite().nonzero()
        if len(finite):
            place = int(finite[0])
            wrong = score.clone()
            wrong.view(-1)[place] += 0.01
            assert parity.complaint(problem, (wrong, index))
            other = index.clone()
            other.view(-1)[place] += 1
            assert parity.complaint(problem, (score, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_query", "n_rows", "dim", "k"),
    [(300, 700, 8, 4), (2, 9000, 40, 100), (40, 5000, 33, 900), (9, 3000, 64, 3000), (257, 90, 96, 200)],
)
def test_many_chunks_passes_and_long_lists(n_query, n_rows, dim, k, dtype):
    queries, rows = integers(n_query, dim, dtype), integers(n_rows, dim, dtype)
    assert_same(ops.bank_topk(queries, rows, k=k, backend="cpu"), reference.bank_topk(queries, rows, k))


def test_lists_so_long_that_a_pass_takes_fewer_queries():
    queries, rows = integers(34, 4), integers(50_000, 4)
    try:
        torch.set_num_threads(3)  # 3 threads, 50,000 keys of 8 bytes a list: 64 MiB hold fewer than 64 lists
        found = ops.bank_topk(queries, rows, k=50_000, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert_same(found, reference.bank_topk(queries, rows, 50_000))


def test_ascending_and_descending_scores():
    """The worst order, in which every row enters the list, and the best one."""
    value = torch.arange(5000.0)[:, None]
    for queries in (torch.ones(1, 1), torch.ones(20, 1), -torch.ones(20, 1)):
        assert_same(ops.bank_topk(queries, value, k=7, backend="cpu"), reference.bank_topk(queries, value, 7))


def test_segments_longer_than_a_piece_and_very_many():
    queries, rows = integers(3, 16), integers(10_000, 16)
    long = ranges_of([0, 9999, 5000, 10_000], [17, 8210, 3, 3]).expand(3, -1, -1, -1)
    assert_same(
        ops.bank_topk(queries, rows, k=12, ranges=long, backend="cpu"), reference.bank_topk(queries, rows, 12, long)
    )
    start = torch.randint(0, 9990, (3, 400, 2))
    short = torch.stack([start, start + torch.randint(-2, 10, start.shape)], dim=-1)
    assert_same(
        ops.bank_topk(queries, rows, k=4, ranges=short, backend="cpu"), reference.bank_topk(queries, rows, 4, short)
    )


def test_ranges_touch_only_the_rows_they_name():
    """Rows outside would make every score NaN; a view of the bank ends where its memory ends."""
    rows = torch.full((1000, 48), float("nan"))
    rows[300:340] = integers(40, 48)
    found = ops.bank_topk(integers(2, 48), rows, k=40, ranges=ranges_of([300, 340]).expand(2, -1, -1, -1))
    assert (found[1].sort().values == torch.arange(300, 340)).all()


@pytest.mark.parametrize("n_query", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads_or_repetition(n_query, dtype):
    queries, rows = torch.randn(n_query, 72).to(dtype), torch.randn(3000, 72).to(dtype)
    start = torch.randint(0, 1500, (n_query, 3, 2))
    ranges = torch.stack([start, start + 700], dim=-1)
    first = None
    try:
        for turn in range(100):
            torch.set_num_threads(1 + turn % 3)
            found = [*ops.bank_topk(queries, rows, k=30), *ops.bank_topk(queries, rows, k=30, ranges=ranges)]
            first = first or found
            assert_same(found, first)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_query", "n_rows", "k"), [(257, 20_000, 17_000), (33, 40_000, 17_000), (257, 3000, 5)])
def test_threads_change_the_passes_but_no_score(n_query, n_rows, k, dtype):
    """Lists of k * threads > 16384 shrink a pass, and the last pass may be left with a single query."""
    queries, rows = torch.randn(n_query, 40).to(dtype), torch.randn(n_rows, 40).to(dtype)
    try:
        first = ops.bank_topk(queries, rows, k=k, backend="cpu")
        torch.set_num_threads(4)
        assert_same(ops.bank_topk(queries, rows, k=k, backend="cpu"), first)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)))
def test_identical_queries_find_the_same(level, limit_cpu_level):
    limit_cpu_level(level)
    for dtype in DTYPES:
        rows = torch.randn(500, 70).to(dtype)
        for n_query in (2, 9, 40, 257):
            score, index = ops.bank_topk(torch.randn(1, 70).to(dtype).repeat(n_query, 1), rows, k=500, backend="cpu")
            assert (score == score[:1]).all() and (index == index[:1]).all()


def test_no_memory_for_the_lists_is_named():
    """In a process of its own, whose memory holds the results and not the lists, with one thread and with two."""
    script = """
import resource, torch
from capt import ops
for threads in (1, 2):
    torch.set_num_threads(threads)
    ops.bank_topk(torch.ones(1, 1), torch.ones(1, 1).expand(500_000, 1), k=3, backend="cpu")
pages = int(open("/proc/self/statm").read().split()[0])
size = pages * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for threads in (1, 2):
    torch.set_num_threads(threads)
    try:
        ops.bank_topk(torch.ones(1, 1), torch.ones(1, 1).expand(60_000_000, 1), k=30_000_000, backend="cpu")
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.count("bank_topk: no memory for lists of k=30000000") == 2, done


def test_a_row_scores_alike_wherever_it_stands():
    """Copies of a row tie whatever block or chunk they fall into, so the lower ones win."""
    for dtype in DTYPES:
        rows = torch.randn(1, 70).to(dtype).repeat(777, 1)
        for n_query in (1, 2, 5, 20):
            score, index = ops.bank_topk(torch.randn(n_query, 70).to(dtype), rows, k=700, backend="cpu")
            assert (score == score[:, :1]).all() and torch.equal(index[0], torch.arange(700))


def test_no_gradient_and_no_change_of_the_inputs():
    queries, rows = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    before = rows.detach().clone()
    score, index = ops.bank_topk(queries, rows, k=2)
    assert not score.requires_grad and not index.requires_grad and torch.equal(rows, before)


def test_no_channels_no_pairs_and_no_queries():
    assert ops.bank_topk(torch.ones(2, 0), torch.ones(3, 0), k=2, backend="cpu")[1].tolist() == [[0, 1], [0, 1]]
    none = torch.empty(2, 0, 1, 2, dtype=torch.int64)
    assert ops.bank_topk(torch.ones(2, 4), torch.ones(3, 4), k=2, ranges=none, backend="cpu")[0].shape == (2, 0, 2)
    assert ops.bank_topk(torch.ones(0, 4), torch.ones(3, 4), k=2, backend="cpu")[0].shape == (0, 2)


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)))
def test_no_channels_at_every_level(level, limit_cpu_level):
    limit_cpu_level(level)
    for dtype in DTYPES:
        for n_query in (1, 2, 9, 40):
            for n_rows in (3, 32, 70):
                queries, rows = torch.ones(n_query, 0, dtype=dtype), torch.ones(n_rows, 0, dtype=dtype)
                score, index = ops.bank_topk(queries, rows, k=3, backend="cpu")
                assert (score == 0).all() and (index == torch.arange(3)).all()
                ranges = ranges_of([1, 3]).expand(n_query, -1, -1, -1)
                score, index = ops.bank_topk(queries, rows, k=2, ranges=ranges, backend="cpu")
                assert (score == 0).all() and (index == torch.arange(1, 3)).all()


def test_opcheck():
    queries, rows, ids = torch.randn(3, 8), torch.randn(20, 8), torch.arange(20)
    exclude = torch.tensor([1, -1, 5])
    ranges = torch.tensor([[[[0, 5], [3, 9]]], [[[0, 20], [0, 0]]], [[[1, 2], [4, 5]]]])
    torch.library.opcheck(torch.ops.capt.bank_topk, (queries, rows, 4, None, None))
    torch.library.opcheck(torch.ops.capt.bank_topk, (queries.bfloat16(), rows.bfloat16(), 4, ids, exclude))
    torch.library.opcheck(torch.ops.capt.bank_topk_ranges, (queries, rows, ranges, 4, ids, exclude))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    def search(queries, rows, ranges):
        score, index = ops.bank_topk(queries, rows, k=3)
        return score + 1, index, ops.bank_topk(queries, rows, k=2, ranges=ranges)

    compiled = torch.compile(search, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for n_query in (2, 5):
        queries, rows = torch.randn(n_query, 12), torch.randn(30, 12)
        ranges = torch.tensor([0, 7, 5, 30]).reshape(1, 1, 2, 2).repeat(n_query, 1, 1, 1)
        torch.testing.assert_close(compiled(queries, rows, ranges), search(queries, rows, ranges))


def test_shapes_beyond_two_to_the_31():
    with FakeTensorMode():
        queries, rows = torch.empty(5, 1024), torch.empty((1 << 32) - 1, 1024)
        score, index = ops.bank_topk(queries, rows, k=10, backend="cpu")
        assert score.shape == index.shape == (5, 10) and index.dtype == torch.int64
        with pytest.raises(CaptError, match="at most 4294967295 are supported"):
            ops.bank_topk(queries, torch.empty(1 << 32, 1024), k=10)


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    size = {"n_queries": 16, "n_rows": 1000, "dim": 512, "k": 10}
    plan = ops.explain("bank_topk", **size, dtype=torch.bfloat16)
    assert plan.backend == "cpu" and plan.rejected.keys() == {"cuda", "triton"}
    assert plan.bytes == 1016 * 512 * 2 + 160 * 12 and plan.flops == 2 * 16 * 1000 * 512
    by_pair = ops.explain("bank_topk", **size, candidates=50)
    assert by_pair.flops == 2 * 50 * 512 and by_pair.bytes == 66 * 512 * 4 + 160 * 12
    assert ops.explain("bank_topk", **size, dtype=torch.float64).backend == "reference"
    monkeypatch.setattr(_plan, "HAS_TRITON", True)
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    assert ops.explain("bank_topk", **size, device="cuda").backend == "cuda"
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(False, "the native library was not built"))
    assert ops.explain("bank_topk", **size, device="cuda").backend == "triton"
    queries, rows = torch.randn(2, 4), torch.randn(9, 4)
    assert_same(ops.bank_topk(queries, rows, k=3), reference.bank_topk(queries, rows, 3))
    with pytest.raises(CaptError, match="was not built"):
        ops.bank_topk(queries, rows, k=3, backend="cpu")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_backend_that_cannot_run_raises(backend):
    with pytest.raises(CaptError, match=f"backend='{backend}' was forced and cannot run: the tensors are on cpu"):
        ops.bank_topk(torch.ones(1, 3), torch.ones(2, 3), k=1, backend=backend)


QUERIES, ROWS, IDS = torch.ones(2, 4), torch.ones(3, 4), torch.arange(3)
ONE_RANGE = torch.tensor([0, 3]).reshape(1, 1, 1, 2).repeat(2, 1, 1, 1)
BAD_CALLS = {
    r"queries must have shape \[Q, d\], found \[4\]": ((QUERIES[0], ROWS), {}),
    r"rows must have shape \[N, 4\], found \[3, 2\]": ((QUERIES, ROWS[:, :2]), {}),
    "queries must be float16, bfloat16": ((QUERIES.int(), ROWS.int()), {}),
    "rows must have the dtype of queries, torch.float32, found torch.bfloat16": ((QUERIES, ROWS.bfloat16()), {}),
    "queries must be a torch.Tensor, found list": (([1.0], ROWS), {}),
    "k must be an integer of at least 1, found 0": ((QUERIES, ROWS), {"k": 0}),
    "k must be an integer of at least 1, found True": ((QUERIES, ROWS), {"k": True}),
    "found only exclude": ((QUERIES, ROWS), {"exclude": torch.tensor([1, 2])}),
    "found only row_ids": ((QUERIES, ROWS), {"row_ids": IDS}),
    r"row_ids must have shape \[3\]": ((QUERIES, ROWS), {"row_ids": IDS[:2], "exclude": IDS[:2]}),
    r"exclude must have shape \[2\]": ((QUERIES, ROWS), {"row_ids": IDS, "exclude": IDS}),
    "row_ids must be int64": ((QUERIES, ROWS), {"row_ids": IDS.int(), "exclude": IDS[:2]}),
    r"ranges must have shape \[2, P, S, 2\]": ((QUERIES, ROWS), {"ranges": ONE_RANGE[:1]}),
    "ranges must be int64": ((QUERIES, ROWS), {"ranges": ONE_RANGE.float()}),
    r"bounds of ranges must lie in \[0, 4\)": ((QUERIES, ROWS), {"ranges": ONE_RANGE + 1}),
    "all tensors must be on one device": ((QUERIES, ROWS.to("meta")), {}),
    "backend='gpu' is unknown": ((QUERIES, ROWS), {"backend": "gpu"}),
    "float64 has no kernel": ((QUERIES.double(), ROWS.double()), {"backend": "cpu"}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    tensors, options = BAD_CALLS[message]
    with pytest.raises(CaptError, match=message):
        ops.bank_topk(*tensors, **{"k": 1, **options})


BAD_OP_CALLS = {
    r"queries must be \[Q, d\] and rows \[N, d\]": lambda op: op.bank_topk(QUERIES, ROWS[:, :2], 1, None, None),
    r"must be \[Q, d\]": lambda op: op.bank_topk(QUERIES[0], ROWS, 1, None, None),
    r"rows \[N, d\]": lambda op: op.bank_topk_ranges(QUERIES, ROWS[0, 0], ONE_RANGE, 1, None, None),
    r"ranges must be .* \[Q, P, S, 2\]": lambda op: op.bank_topk_ranges(QUERIES, ROWS, IDS, 1, None, None),
    "differ in dtype": lambda op: op.bank_topk(QUERIES, ROWS.half(), 1, None, None),
    "must be float32, float16 or bfloat16": lambda op: op.bank_topk(QUERIES.double(), ROWS.double(), 1, None, None),
    "k >= 1": lambda op: op.bank_topk(QUERIES, ROWS, 0, None, None),
    "belong together": lambda op: op.bank_topk(QUERIES, ROWS, 1, IDS, None),
    "row_ids must be contiguous int64 with 3": lambda op: op.bank_topk(QUERIES, ROWS, 1, IDS[:2], IDS[:2]),
    "ranges must be contiguous int64": lambda op: op.bank_topk_ranges(QUERIES, ROWS, ONE_RANGE.int(), 1, None, None),
    "the bounds of ranges must lie": lambda op: op.bank_topk_ranges(QUERIES, ROWS, ONE_RANGE + 1, 1, None, None),
}


@pytest.mark.parametrize("message", BAD_OP_CALLS)
def test_the_bare_op_checks_what_would_be_unsafe(message):
    with pytest.raises(RuntimeError, match=message):
        BAD_OP_CALLS[message](torch.ops.capt)


def test_benchmark_cases_verify_their_functions(monkeypatch):
    """The benchmark's own check passes on small cases and catches a function that finds other rows."""
    for name, sizes in {"WHOLE": [(500, 32, 16, 10, True)], "FEW": [(500, 32, 2, 10, True)],
                        "BY_PAIR": [(6000, 32, 3, 2, 4, True)]}.items():  # fmt: skip
        monkeypatch.setattr(benchmark, name, sizes)
    found = list(benchmark.cases())
    assert len(found) == 3 and all(case.quick for case in found)
    for case in found:
        comparison = case.build(None)
        assert comparison.verify() == "" and comparison.bytes and comparison.flops
        assert comparison.goals and comparison.functions.keys() >= {"ours"}
        wrong = comparison.functions["ours"]
        comparison.functions["ours"] = lambda wrong=wrong: (None, wrong()[1].flip(0) * 0 + 1)
        assert comparison.verify()
