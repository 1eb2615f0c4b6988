"""Problems of confusion_pairs: odd sizes, every k, empty rows of statistics, ties, values without a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem
from capt import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (2, 3, 5, 15, 16, 17, 31, 64, 65, 127, 128, 130, 200, 257)
#: Rows of several steps with tails, lists of several walks, and more rows than most launches have.
LARGE_SIZES = ((1000, 64), (1025, 33), (2047, 9), (397, 300), (3, 70_000))
LARGE_SEEDS = range(1000, 1040)
KINDS = ("integers", "ties", "normal", "wide", "absorbed", "undefined")
STATISTICS = ("none", "sparse", "empty", "dense")


def problem(seed: int, *, n_classes: int | None = None, batch: int | None = None) -> Problem:
    """Logits and statistics of one seed; ``n_classes`` and ``batch`` replace the seed's choice."""
    random = torch.Generator().manual_seed(seed)
    kind, dtype = KINDS[seed % 6], DTYPES[seed // 6 % 3]
    statistics = STATISTICS[seed // 18 % 4]
    if seed in LARGE_SEEDS:
        own_classes, own_batch = LARGE_SIZES[int(torch.randint(len(LARGE_SIZES), (), generator=random))]
    else:
        own_classes, own_batch = SIZES[int(torch.randint(len(SIZES), (), generator=random))], seed // 72 % 6
    n_classes = n_classes or own_classes
    batch = own_batch if batch is None else batch
    k = (1, 2, 5, 10, n_classes - 1, n_classes + 3)[int(torch.randint(6, (), generator=random))]
    logits = _logits(kind, batch, n_classes, random).to(dtype)
    layout = seed % 5
    if layout == 1:
        logits = torch.cat([logits, logits], 1)[:, :n_classes]
    elif layout == 2:
        logits = logits.t().contiguous().t()
    elif layout == 3 and batch:
        logits = logits[:1].expand(batch, -1)
    options: dict[str, Any] = {"k": k, **_statistics(statistics, n_classes, random)}
    label = f"{seed}: {kind} {str(dtype)[6:]} {batch}x{n_classes} k={k} statistics={statistics} layout={layout}"
    # Equal logits score alike in every implementation, and a boost of at most 2 cannot overtake a logit larger by 1.
    return Problem(label, (logits,), options, exact=kind not in ("normal", "wide"))


def _logits(kind: str, batch: int, n_classes: int, random: torch.Generator) -> Tensor:
    shape = (batch, n_classes)
    if kind == "integers":
        return torch.randint(-32, 33, shape, generator=random).float()
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=random).float()
    normal = torch.randn(shape, generator=random)
    if kind == "normal":
        return normal * 3
    if kind == "wide":  # many probabilities are 0 or subnormal
        return normal * 60
    if kind == "absorbed":  # small differences are lost against the largest logit; -0.0 and subnormals
        values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-12, 1e-9, 16.0])
        return values[torch.randint(len(values), shape, generator=random)]
    values = torch.tensor([0.0, 1.0, -float("inf"), float("inf"), float("nan")])
    logits = values[torch.randint(2, shape, generator=random)]
    for b in range(batch):
        # each row gets one of: a NaN, an infinity, both, nothing but -infinity, some -infinity
        which = (b + int(torch.randint(5, (), generator=random))) % 5
        at = torch.randint(n_classes, (3,), generator=random)
        if which == 3:
            logits[b] = -float("inf")
        elif which == 4:
            logits[b, at] = -float("inf")
            logits[b, int(torch.randint(n_classes, (), generator=random))] = 1.0
        else:
            logits[b, at[0]] = values[4 if which != 1 else 3]
            logits[b, at[1]] = values[3 if which else 0]
    return logits


def _statistics(kind: str, n_classes: int, random: torch.Generator) -> dict[str, Tensor]:
    if kind == "none":
        return {}
    share = {"sparse": 0.1, "empty": 0.0, "dense": 1.0}[kind]
    named = torch.rand(n_classes, n_classes, generator=random) < share
    if kind == "sparse":
        named[torch.rand(n_classes, generator=random) < 0.3] = False
    rows, classes = named.nonzero(as_tuple=True)
    counts = torch.randint(0, 6, (len(rows),), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), named.sum(1).cumsum(0)])
    order = torch.rand(len(rows), generator=random)  # classes of a row in any order
    order = torch.argsort(rows + order)
    return {"offsets": offsets, "classes": classes[order], "counts": counts}


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """(pseudo, index, score) of the op."""
    return ops.confusion_pairs(*problem.arguments, **problem.options, **options)


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Empty if pseudo labels agree, every class is one that may stand at its place, and scores are close.

    On exact problems the classes must agree with the reference; scores are products of an exponential and never exact.
    Elsewhere classes whose scores differ by a few roundings may swap.
    """
    (logits,) = problem.arguments
    k = problem.options["k"]
    statistics = [problem.options.get(name) for name in ("offsets", "classes", "counts")]
    own = reference.confusion_pairs(logits, k, *statistics)
    pseudo, index, score = found
    if [(value.shape, value.dtype) for value in found] != [(value.shape, value.dtype) for value in own]:
        return f"{problem.label}: shapes or dtypes differ from the reference"
    if not torch.equal(pseudo, own[0]):
        return f"{problem.label}: pseudo labels {pseudo.tolist()} instead of {own[0].tolist()}"
    undefined = own[2].isnan()
    if not torch.equal(score.isnan(), undefined):
        return f"{problem.label}: NaN at other places than in the reference"
    if (problem.exact or bool(undefined.all())) and not torch.equal(index, own[1]):
        return f"{problem.label}: classes {index.tolist()} instead of {own[1].tolist()}"
    sound = ~undefined.any(1)
    if not bool(sound.any()):
        return ""
    exact = _all_scores(logits[sound].double(), statistics)
    index, score = index[sound], score[sound].double()
    # Relative to the score itself; x - max x, rounded to float32, is an exponent. Below 1e-37 scores are subnormal.
    limit = exact * (2e-6 + 1.2e-7 * exact.clamp_min(1e-45).log().abs()) + 1e-37
    want = exact.sort(dim=1, descending=True).values[:, : index.shape[1]]
    held = exact.gather(1, index)
    if bool(((score - held).abs() > limit.gather(1, index)).any()):
        worst = float(((score - held).abs() / held.clamp_min(1e-37)).max())
        return f"{problem.label}: relative error of a score {worst:.3g}"
    if bool(((held - want).abs() > 2 * limit.gather(1, index)).any()):
        return f"{problem.label}: a class is not among the best"
    if bool((index.sort(1).values.diff(dim=1) == 0).any()) or bool((index == pseudo[sound, None]).any()):
        return f"{problem.label}: a class is returned twice, or is the pseudo label"
    step = score.diff(dim=1)
    if bool(((step > 0) | ((step == 0) & (index.diff(dim=1) < 0))).any()):
        return f"{problem.label}: not in descending order, ties to the lower class"
    return ""


def _all_scores(logits: Tensor, statistics: list[Tensor | None]) -> Tensor:
    """Scores of every class, formed in float64; -1 for the pseudo label."""
    _, index, score = reference.confusion_pairs(logits, logits.shape[1], *statistics)
    return torch.full_like(logits, -1.0).scatter(1, index, score.double())
