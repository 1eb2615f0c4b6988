"""pair_frontier on the CPU: the reference's bits at every level, streaming, sanitizers, torch integration, plan."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.parity import pair_frontier as parity
from capt import ops
from capt._build import NativeBuild
from capt.ops import _plan
from capt.reference_frontier import pair_frontier as reference
from tests.conftest import CPU_LEVELS
from tests.native_build import CSRC, LEVEL_FLAGS, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def primitives(batch: int, n_pairs: int, n_states: int = 5, n_objects: int = 7) -> dict[str, torch.Tensor]:
    return {
        "state": torch.randn(batch, n_states).softmax(1),
        "object": torch.randn(batch, n_objects).softmax(1),
        "pairs": torch.stack([torch.randint(n_states, (n_pairs,)), torch.randint(n_objects, (n_pairs,))], 1),
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parity_with_the_reference_on_all_pairs_at_once(backend):
    for seed in (*range(540), *parity.LARGE_SEEDS):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend=backend))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_bits_are_those_of_the_reference_at_every_instruction_set_level(level, limit_cpu_level):
    limit_cpu_level(level)
    for seed in range(level, 540, 3):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend="cpu"))


def test_parity_notices_wrong_answers():
    for seed in range(0, 540, 11):
        problem = parity.problem(seed)
        score, pair = parity.run(problem, backend="cpu")
        if bool((pair >= 0).any()):
            assert parity.complaint(problem, (score, pair + 1))
            assert parity.complaint(problem, (-score, pair))
            assert parity.complaint(problem, (torch.full_like(score, 7.25), pair))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_product_and_sum_are_rounded_one_after_the_other(level, limit_cpu_level):
    limit_cpu_level(level)
    one = 1 + 2.0**-12
    scores = torch.full((1, 200), -1.0)
    found = ops.pair_frontier(
        scores, group=torch.zeros(200).long(), n_groups=1, backend="cpu",
        state=torch.tensor([[one]]), object=torch.tensor([[one]]), pairs=torch.zeros(200, 2).long(),
    )  # fmt: skip
    assert found.score.item() == 2.0**-11  # fused it would keep 2^-24


def test_terms_that_only_some_pairs_reach_are_bounded_rightly():
    """The kernel reads state and object of a pair only if the largest term could make it the best."""
    for large in (1.0, 1e30, float("inf"), float("nan")):
        scores, group = torch.randn(20, 300), torch.randint(2, (300,))
        term = primitives(20, 300)
        term["state"][:, 1], term["object"][:, 2:4] = large, torch.tensor([0.0, -3.0])
        found = ops.pair_frontier(scores, group=group, **term, backend="cpu")
        own = ops.pair_frontier(scores, group=group, **term, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))


def test_the_definition_in_plain_loops():
    scores, group, term = torch.randn(3, 40), torch.randint(-1, 3, (40,)), primitives(3, 40)
    found = ops.pair_frontier(scores, group=group, n_groups=3, start=100, **term, backend="cpu")
    for b in range(3):
        for g in range(3):
            exact = {
                k: float(scores[b, k]) + float(term["state"][b, s]) * float(term["object"][b, o])
                for k, (s, o) in enumerate(term["pairs"].tolist())
                if group[k] == g
            }
            best = max(exact, key=exact.__getitem__)
            assert found.pair[b, g] == 100 + best and abs(float(found.score[b, g]) - exact[best]) < 1e-6


def test_zeros_of_both_signs_are_equal_and_returned_as_zero():
    scores, group = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0], [-1.0, -0.0, -0.0]]), torch.zeros(3).long()
    for backend in ("cpu", "reference"):
        first = ops.pair_frontier(scores, group=group, n_groups=1, start=5, backend=backend)
        assert first.pair.flatten().tolist() == [5, 5, 6] and not first.score.signbit().any()
        later = ops.pair_frontier(scores, group=group, n_groups=1, previous=first, backend=backend)
        assert later.pair.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_float32_with_the_primitive_term_and_keeps_the_dtype_without(dtype):
    scores, group = torch.randn(2, 30).to(dtype), torch.randint(2, (30,))
    for backend in ("cpu", "reference"):
        assert ops.pair_frontier(scores, group=group, backend=backend).score.dtype == dtype
        assert ops.pair_frontier(scores, group=group, **primitives(2, 30), backend=backend).score.dtype == torch.float32
    double = ops.pair_frontier(scores.double(), group=group, **primitives(2, 30))
    assert double.score.dtype == torch.float64


def test_a_frontier_of_nothing_loses_against_anything_and_stays_without():
    nothing = ops.PairFrontier(torch.tensor([[float("nan"), float("-inf")]]), torch.tensor([[3, -1]]))
    for backend in ("cpu", "reference"):
        for value, pairs in ((-9e37, [7, 8]), (float("-inf"), [-1, -1]), (float("nan"), [-1, -1])):
            found = ops.pair_frontier(
                torch.full((1, 2), value), group=torch.tensor([0, 1]), start=7, previous=nothing, backend=backend
            )
            assert found.pair.tolist() == [pairs]


def test_bits_do_not_depend_on_repetition_threads_or_the_other_rows():
    scores, group, term = torch.randn(131, 777).half(), torch.randint(-1, 51, (777,)), primitives(131, 777)
    first = ops.pair_frontier(scores, group=group, n_groups=51, **term, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for repeat in range(100):
            torch.set_num_threads(1 + repeat % 3)
            again = ops.pair_frontier(scores, group=group, n_groups=51, **term, backend="cpu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
    for b in (0, 64, 130):
        own = {**term, "state": term["state"][b : b + 1], "object": term["object"][b : b + 1]}
        alone = ops.pair_frontier(scores[b : b + 1], group=group, n_groups=51, **own, backend="cpu")
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(first, alone, strict=True))


def test_inputs_are_left_alone():
    scores, group, term = torch.randn(4, 50), torch.randint(2, (50,)), primitives(4, 50)
    previous = ops.pair_frontier(scores + 1, group=group, start=50, backend="cpu")
    inputs = [scores, group, *term.values(), *previous]
    before = [value.clone() for value in inputs]
    ops.pair_frontier(scores, group=group, **term, previous=previous, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_the_kernel_is_clean_under_sanitizers(tmp_path, level):
    """tests/native/pair_frontier_check.cpp, and that it would see scores that are too short."""
    if CPU_LEVELS.index(level) > CPU_LEVELS.index(_plan.NATIVE.cpu_level):
        return
    program, check = tmp_path / level, Path(__file__).with_name("native") / "pair_frontier_check.cpp"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    flags = ["-std=c++20", "-O1", "-w", *sanitize, *LEVEL_FLAGS[level], f"-I{CSRC}", "-DCAPT_LEVEL_NAME=baseline"]
    run(
        [shutil.which("g++") or "c++", *flags, check, CSRC / "pair_frontier.cpp", CSRC / "cpu_level.cpp", "-o", program]
    )
    assert run([program]).stdout == "pair_frontier: 24 cases\n"
    done = subprocess.run([program, "overrun"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def arguments(dtype: torch.dtype, term: bool, earlier: bool) -> tuple[object, ...]:
    """Of the native op."""
    three = tuple(primitives(3, 12).values()) if term else (None, None, None)
    kind = torch.float32 if term else dtype
    two = (torch.randn(3, 2).to(kind), torch.randint(9, (3, 2))) if earlier else (None, None)
    return torch.randn(3, 12).to(dtype), torch.randint(-1, 2, (12,)), 2, 12, *three, *two


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("term", "earlier"), [(False, False), (False, True), (True, True)])
def test_opcheck(dtype, term, earlier):
    torch.library.opcheck(torch.ops.capt.pair_frontier, arguments(dtype, term, earlier))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    group, term = torch.randint(2, (20,)), primitives(1, 20)

    def step(scores):
        state, object = (term[name].expand(len(scores), -1) for name in ("state", "object"))
        first = ops.pair_frontier(scores * 2, group=group, start=20)
        later = ops.pair_frontier(scores, group=group, state=state, object=object, pairs=term["pairs"], previous=first)
        return later.pair + 1, later.score.exp()

    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        scores = torch.randn(batch, 20)
        assert all(torch.equal(a, b) for a, b in zip(compiled(scores), step(scores), strict=True))


def test_the_op_itself_refuses_what_points_outside():
    good = list(arguments(torch.float32, True, False))
    torch.ops.capt.pair_frontier(*good)
    for place, row, value in ((1, 0, 2), (1, 5, -2), (6, 11, 7), (6, 0, -1)):
        bad = [entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in good]
        bad[place][row] = value
        with pytest.raises(RuntimeError, match="group must lie in"):
            torch.ops.capt.pair_frontier(*bad)


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    plan = ops.explain("pair_frontier", batch=8, n_pairs=1000)
    assert plan.backend == "cpu" and plan.bytes == 8 * (4000 + 2 * 12) + 8000 and plan.flops == 8000
    assert "no such kernel" in plan.rejected["cuda"] and "triton" in plan.rejected
    half = {"batch": 8, "n_pairs": 1000, "n_groups": 51, "n_states": 10, "n_objects": 20, "dtype": torch.float16}
    plan = ops.explain("pair_frontier", **half)
    assert plan.bytes == 8 * (2000 + 120 + 51 * 12) + 24_000 and plan.flops == 24_000
    double = ops.explain("pair_frontier", batch=8, n_pairs=1000, dtype=torch.float64)
    assert double.backend == "reference" and "float64" in double.rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    assert "in software" in ops.explain("pair_frontier", **half).rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    for has_triton, backend in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(_plan, "HAS_TRITON", has_triton)
        assert ops.explain("pair_frontier", batch=8, n_pairs=1000, device="cuda").backend == backend


def test_float64_scores_take_the_term_in_float64():
    scores, group, term = torch.randn(3, 9).double(), torch.randint(2, (9,)), primitives(3, 9)
    found = ops.pair_frontier(scores, group=group, **term)
    s, o = term["pairs"].unbind(1)
    summed = scores + term["state"].double()[:, s] * term["object"].double()[:, o]
    assert torch.equal(found.score, reference(summed, group, 0, 2)[0])
