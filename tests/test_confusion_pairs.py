"""confusion_pairs on the CPU: parity with the reference at every level, accuracy, order, torch integration, plan."""

from __future__ import annotations

import pytest
import torch

from benchmarks.parity import confusion_pairs as parity
from capt import ops
from capt._build import NativeBuild
from capt.errors import CaptError
from capt.ops import _plan
from tests.conftest import CPU_LEVELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def statistics(n_classes: int) -> dict[str, torch.Tensor]:
    """Three classes a row, in any order."""
    classes = ((torch.randint(n_classes, (n_classes, 1)) + torch.tensor([5, 0, 2])) % n_classes).flatten()
    return {
        "offsets": torch.arange(0, 3 * n_classes + 1, 3),
        "classes": classes,
        "counts": torch.randint(0, 9, (3 * n_classes,)),
    }


@pytest.mark.parametrize("part", range(5))
def test_parity_with_the_reference(part):
    for seed in range(part, 500, 5):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend="cpu"))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_parity_at_every_instruction_set_level(level, limit_cpu_level):
    limit_cpu_level(level)
    for seed in range(level, 500, 5):
        problem = parity.problem(seed)
        assert not parity.complaint(problem, parity.run(problem, backend="cpu"))


def test_parity_notices_wrong_answers():
    for seed in range(0, 500, 11):
        problem = parity.problem(seed)
        pseudo, index, score = parity.run(problem, backend="cpu")
        if not index.numel():
            continue
        assert parity.complaint(problem, ((pseudo + 1) % problem.arguments[0].shape[1], index, score))
        if not bool(score.isnan().any()):
            assert parity.complaint(problem, (pseudo, index, score * 1.001 + 1e-30))
            if index.shape[1] > 1 and bool((score[:, 0] > 1.01 * score[:, -1]).any()):
                assert parity.complaint(problem, (pseudo, index.flip(1), score))


@pytest.mark.parametrize("level", range(len(CPU_LEVELS)), ids=CPU_LEVELS)
def test_exponential_is_accurate_and_reaches_zero(level, limit_cpu_level):
    limit_cpu_level(level)
    exponent = torch.cat([-torch.logspace(-9, 2, 4000), torch.linspace(-87, 0, 4001), torch.tensor([-103.0, -110.0])])
    logits = torch.stack([torch.zeros_like(exponent), exponent], 1)
    _, _, score = ops.confusion_pairs(logits, k=1, backend="cpu")
    want = logits.double().softmax(1)[:, 1]
    normal = want > 2.0**-126
    assert float(((score[:, 0].double() - want) / want)[normal].abs().max()) < 3.5e-7
    assert float((score[:, 0].double() - want)[~normal].abs().max()) <= 2.0**-148


def test_large_rows_cross_every_block_of_the_kernel():
    for n_classes in (1023, 1024, 1025, 5000, 20011):
        for place in (0, 1, n_classes // 2, n_classes - 1):
            logits = torch.randn(2, n_classes)
            logits[0, place] = 9.0
            logits[1, place:] = 9.0  # ties: the first is the arg-max
            pseudo, index, score = ops.confusion_pairs(logits, k=7, backend="cpu")
            expected = ops.confusion_pairs(logits, k=7, backend="reference")
            assert pseudo.tolist() == [place, place]
            assert torch.equal(index, expected[1])
            torch.testing.assert_close(score, expected[2], rtol=1e-5, atol=0)


def test_adversarial_orders():
    ramp = torch.arange(3000) / 100
    for logits in (ramp, ramp.flip(0), torch.zeros(3000), torch.cat([ramp, ramp])):
        for k in (1, 5, 63, 64, 500, 2999):
            found = ops.confusion_pairs(logits[None], k=k, **statistics(len(logits)), backend="cpu")
            unique = found[1].unique()
            assert len(unique) == k and int(found[0]) not in unique
            assert (found[2].diff() <= 0).all()
    order = ops.confusion_pairs(torch.zeros(1, 50), k=49, backend="cpu")[1]
    assert order.tolist() == [list(range(1, 50))]


def test_a_boosted_class_that_ties_with_a_lower_one_comes_second():
    # Class 3 is boosted by count / total = 0: it keeps the score of class 1 and must stay behind it, but before 4.
    offsets = torch.tensor([0, 2, 2, 2, 2, 2, 2])
    options = {"offsets": offsets, "classes": torch.tensor([3, 5]), "counts": torch.tensor([0, 4])}
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    for k in (1, 2, 3, 4, 5):
        assert ops.confusion_pairs(logits, k=k, **options, backend="cpu")[1].tolist() == [[5, 1, 3, 4, 2][:k]]


def test_output_is_written_completely_and_only_once():
    for seed in range(60):
        problem = parity.problem(seed)
        first = parity.run(problem, backend="cpu")
        for _ in range(3):
            again = parity.run(problem, backend="cpu")
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7))


def test_bits_do_not_depend_on_repetition_or_threads():
    logits, options = torch.randn(131, 777) * 4, statistics(777)
    first = ops.confusion_pairs(logits, k=9, **options, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for repeat in range(100):
            torch.set_num_threads(1 + repeat % 3)
            again = ops.confusion_pairs(logits, k=9, **options, backend="cpu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
    for b in (0, 64, 130):  # nor on the other rows
        alone = ops.confusion_pairs(logits[b : b + 1], k=9, **options, backend="cpu")
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(first, alone, strict=True))


def test_inputs_are_left_alone_and_carry_no_gradient():
    logits = torch.randn(4, 9, requires_grad=True)
    before = logits.detach().clone()
    found = ops.confusion_pairs(logits, k=3, backend="cpu")
    assert torch.equal(logits.detach(), before) and not any(value.requires_grad for value in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck(dtype, counted):
    table = statistics(12) if counted else {}
    arguments = [table.get(name) for name in ("offsets", "classes")]
    counts = table["counts"].float() if counted else None
    torch.library.opcheck(torch.ops.capt.confusion_pairs, (torch.randn(3, 12).to(dtype), 4, *arguments, counts))
    torch.library.opcheck(torch.ops.capt.confusion_pairs, (torch.randn(3, 12).to(dtype), 40, *arguments, counts))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    table = statistics(20)

    def step(logits):
        pseudo, index, score = ops.confusion_pairs(logits * 2, k=4, **table)
        return pseudo + 1, index, score.exp()

    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        logits = torch.randn(batch, 20)
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits), step(logits), strict=True))


def test_plan_names_backend_reason_and_traffic(monkeypatch):
    plan = ops.explain("confusion_pairs", batch=8, n_classes=100, k=5)
    assert plan.backend == "cpu" and plan.bytes == 8 * (400 + 8 + 60) and plan.flops > 0
    assert "no such kernel" in plan.rejected["cuda"] and "triton" in plan.rejected
    double = ops.explain("confusion_pairs", batch=8, n_classes=100, dtype=torch.float64)
    assert double.backend == "reference" and "float64" in double.rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, cpu_level="baseline"))
    half = ops.explain("confusion_pairs", batch=8, n_classes=100, dtype=torch.float16)
    assert half.backend == "reference" and "in software" in half.rejected["cpu"]
    monkeypatch.setattr(_plan, "NATIVE", NativeBuild(True, "", "13.0"))
    monkeypatch.setattr(_plan, "HAS_TRITON", True)
    assert ops.explain("confusion_pairs", batch=8, n_classes=100, device="cuda").backend == "triton"
    monkeypatch.setattr(_plan, "HAS_TRITON", False)
    assert ops.explain("confusion_pairs", batch=8, n_classes=100, device="cuda").backend == "reference"


TABLE = {"offsets": torch.tensor([0, 1, 2, 2]), "classes": torch.tensor([1, 0]), "counts": torch.tensor([1, 2])}


def call(logits=None, **options):
    """A call with one thing wrong."""
    logits = torch.zeros(2, 3) if logits is None else logits
    return lambda: ops.confusion_pairs(logits, **{"k": 1, **TABLE, **options})


BAD_CALLS = {
    r"logits must have shape \[B, C\], found \[3\]": call(torch.zeros(3)),
    "logits must be float16, bfloat16, float32 or float64, found torch.int64": call(torch.zeros(2, 3).long()),
    "logits must have at least 2 classes, found 1": call(torch.zeros(2, 1)),
    "k must be an integer of at least 1, found 0": call(k=0),
    "k must be an integer of at least 1, found 1.5": call(k=1.5),
    "give all three or none": call(counts=None),
    r"offsets must have shape \[4\], found \[3\]": call(offsets=torch.tensor([0, 1, 2])),
    r"counts must have shape \[2\], found \[3\]": call(counts=torch.ones(3)),
    "offsets must be an integer tensor, found torch.float32": call(offsets=torch.tensor([0.0, 1.0, 2.0, 2.0])),
    r"offsets must lie in \[0, 3\), found values from 0 to 9": call(offsets=torch.tensor([0, 1, 9, 2])),
    r"classes must lie in \[0, 3\), found values from -1 to 1": call(classes=torch.tensor([1, -1])),
    "all tensors must be on one device": call(counts=torch.ones(2, device="meta")),
    "backend='gpu' is unknown": call(backend="gpu"),
    "backend='cuda' was forced and cannot run: this op has no such kernel": call(backend="cuda"),
    "backend='triton' was forced and cannot run: the tensors are on cpu": call(backend="triton"),
    "float64 has no kernel": call(torch.zeros(2, 3).double(), backend="cpu"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()


def test_the_op_itself_refuses_statistics_that_point_outside():
    good = (torch.zeros(2, 3), 1, TABLE["offsets"], TABLE["classes"], TABLE["counts"].float())
    torch.ops.capt.confusion_pairs(*good)
    for place, value in ((2, torch.tensor([0, 9, 9, 9])), (2, torch.tensor([-4, 1, 2, 2])), (3, torch.tensor([7, 0]))):
        bad = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match="offsets must lie in"):
            torch.ops.capt.confusion_pairs(*bad)
