"""Problems of bank_topk: whole bank and row ranges, ties, exclusion, odd values, odd layouts, short and empty lists."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess
from capt import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERIES = (1, 1, 2, 3, 5, 8, 9, 16, 17, 33)
DIMS = (1, 2, 7, 16, 31, 32, 33, 64, 70, 130)
ROWS = (0, 1, 2, 5, 15, 16, 17, 33, 64, 100, 257)
#: Problems with more queries than one tile holds and lists in several parts; two have 64 queries and a bank beyond
#: 16 MiB, because smaller ones are searched 16 queries at a time.
LARGE_SEEDS = range(1000, 1040)
BEYOND_CACHE = (1001, 1021)


def problem(seed: int) -> Problem:
    """Exact (small integers, many ties) for two seeds of three, normal deviates for the third."""
    if seed in LARGE_SEEDS:
        return _large(seed)
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    exact = seed % 3 != 2
    dtype = choose.choice(DTYPES)
    n_query = 0 if choose.random() < 0.03 else choose.choice(QUERIES)
    n_rows, dim = choose.choice(ROWS), choose.choice(DIMS)
    queries = _values(n_query, dim, exact, generator)
    rows = _values(n_rows, dim, exact, generator)
    odd = choose.choice(("none", "none", "NaN", "infinity", "subnormal"))
    if n_rows and odd != "none":
        _make_odd(rows, odd, choose, generator)
    layout = choose.choice(("contiguous", "contiguous", "columns of a wider one", "every second row", "transposed"))
    k = choose.choice((1, 2, 5, 10, max(1, n_rows), n_rows + 3))
    options: dict[str, Any] = {"k": k}
    if choose.random() < 0.4:
        options["row_ids"] = torch.randint(-1, max(2, n_rows // 3), (n_rows,), generator=generator) + (1 << 40)
        options["exclude"] = torch.randint(-2, max(2, n_rows // 3), (n_query,), generator=generator)
        options["exclude"] += (options["exclude"] >= 0) * (1 << 40)
    if choose.random() < 0.4:
        options["ranges"] = _ranges(n_query, n_rows, choose, generator)
    label = (
        f"seed {seed}: Q {n_query}, N {n_rows}, d {dim}, k {k}, {str(dtype)[6:]}, {odd}, {layout}"
        f"{', ranges' if 'ranges' in options else ''}{', exclusion' if 'exclude' in options else ''}"
    )
    queries, rows = queries.to(dtype), rows.to(dtype)
    return Problem(label, (_laid_out(queries, layout), _laid_out(rows, layout)), options, exact and odd != "subnormal")


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """(scores, row numbers)."""
    return ops.bank_topk(*problem.arguments, **problem.options, **options)


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Exact problems: bitwise the reference. Others: scores accurate; rows distinct, allowed, in order.

    A score of zero must be +0: the reference orders -0 as +0, and which of the two its product returns is up to the
    BLAS.
    """
    (queries, rows), options = problem.arguments, problem.options
    score, index = (value.cpu() for value in found)
    own_score, own_index = reference.bank_topk(queries, rows, **options)
    if score.dtype != torch.float32 or index.dtype != torch.int64:
        return f"{problem.label}: dtypes {score.dtype}, {index.dtype}"
    if score.shape != own_score.shape or index.shape != own_index.shape:
        return f"{problem.label}: shapes {list(score.shape)}, {list(index.shape)} instead of {list(own_score.shape)}"
    if problem.exact:
        wrong = (score.view(torch.int32) != (own_score + 0.0).view(torch.int32)) | (index != own_index)
        return f"{problem.label}: {int(wrong.sum())} entries differ from the reference" if wrong.any() else ""
    exact_score, _ = reference.bank_topk(queries.double(), rows.double(), **options)
    exact = queries.double() @ rows.double().T
    terms = queries.double().abs() @ rows.double().abs().T
    # Two quanta: the reference is nearly exact where its BLAS sums in long registers, and a kernel has its own order.
    inputs = 2 * float(terms[terms.isfinite()].max()) if terms.isfinite().any() else 0.0
    why = excess(score, own_score, exact_score, inputs)
    why = why or _order(score, index, _candidates(queries, rows, options))
    if not why:
        of_rows = _scores_of(exact, index)
        why = excess(score, of_rows + (own_score - exact_score), of_rows, inputs)
    return f"{problem.label}: {why}" if why else ""


def _large(seed: int) -> Problem:
    """Dtypes in turn; d mostly a multiple of 8, as the kernel for Hopper needs it. The whole bank, no odd values."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    number = seed - LARGE_SEEDS.start
    dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
    exact = choose.random() < 0.7
    n_query, n_rows = (300, 257, 65)[number // 3 % 3], choose.choice((129, 1000, 3001, 5003))
    dim = choose.choice((8, 64, 72, 136, 200))
    if seed in BEYOND_CACHE:
        n_query, n_rows, dim = 64, 16_500, 512
    elif choose.random() < 0.3:
        dim += 3  # for the portable kernel
    queries, rows = _values(n_query, dim, exact, generator), _values(n_rows, dim, exact, generator)
    options: dict[str, Any] = {"k": choose.choice((1, 5, 16, 64, 100))}
    if choose.random() < 0.3:
        options["row_ids"] = torch.randint(n_rows // 3, (n_rows,), generator=generator)
        options["exclude"] = torch.randint(-2, n_rows // 3, (n_query,), generator=generator)
    label = f"seed {seed}: Q {n_query}, N {n_rows}, d {dim}, k {options['k']}, {str(dtype)[6:]}"
    return Problem(label, (queries.to(dtype), rows.to(dtype)), options, exact)


def _values(count: int, dim: int, exact: bool, generator: torch.Generator) -> Tensor:
    if exact:
        return torch.randint(-2, 3, (count, dim), generator=generator).float() * -1.0  # zeros become -0.0
    return torch.randn(count, dim, generator=generator)


def _make_odd(rows: Tensor, odd: str, choose: random.Random, generator: torch.Generator) -> None:
    """A third of the rows gets one odd value."""
    value = {"NaN": (float("nan"),), "infinity": (float("inf"), float("-inf")), "subnormal": (3e-39, 6e-8)}[odd]
    for row in torch.randperm(len(rows), generator=generator)[: max(1, len(rows) // 3)].tolist():
        rows[row, choose.randrange(rows.shape[1])] = choose.choice(value)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them is NaN."""
    count, dim = values.shape
    if layout == "columns of a wider one":
        view = values.new_full((count, dim + 5), float("nan"))[:, 3 : dim + 3]
    elif layout == "every second row":
        view = values.new_full((2 * count, dim), float("nan"))[::2]
    elif layout == "transposed":
        view = values.new_empty(dim, count).T
    else:
        return values
    return view.copy_(values)


def _ranges(n_query: int, n_rows: int, choose: random.Random, generator: torch.Generator) -> Tensor:
    """Random bounds: about half of the ranges are empty, some overlap, some empty ones lie outside the bank."""
    shape = (n_query, choose.choice((1, 2, 3)), choose.choice((1, 2, 4)), 2)
    ranges = torch.randint(0, n_rows + 1, shape, generator=generator)
    if choose.random() < 0.2:
        ranges[:, 0, 0] = torch.tensor([n_rows + 7, -3])
    if choose.random() < 0.2:
        ranges[:, -1] = torch.tensor([0, n_rows])
    return ranges


def _candidates(queries: Tensor, rows: Tensor, options: dict[str, Any]) -> Tensor:
    """Which rows each list may hold, bool [lists, N]."""
    n_query, n_rows = len(queries), len(rows)
    allowed = torch.ones(n_query, n_rows, dtype=torch.bool)
    if options.get("exclude") is not None:
        exclude = options["exclude"][:, None]
        allowed = (options["row_ids"] != exclude) | (exclude < 0)
    if options.get("ranges") is None:
        return allowed
    row = torch.arange(n_rows)
    inside = ((row >= options["ranges"][..., :1]) & (row < options["ranges"][..., 1:])).any(2)
    return (inside & allowed[:, None]).flatten(0, 1)


def _order(score: Tensor, index: Tensor, allowed: Tensor) -> str:
    """Filled entries first, descending, equal ones by row; every row once, allowed and with a score."""
    score, index = score.flatten(0, -2), index.flatten(0, -2)
    filled = index >= 0
    if not torch.equal(filled, score != float("-inf")):
        return "-inf and -1 at different places"
    if (index >= allowed.shape[1]).any():
        return "a row beyond the bank"
    before, after = score[:, :-1], score[:, 1:]
    ordered = (before > after) | ((before == after) & (index[:, :-1] < index[:, 1:])) | ~filled[:, 1:]
    if not ordered.all():
        return "a list is out of order"
    if allowed.shape[1] == 0:
        return ""
    if not (allowed.gather(1, index.clamp_min(0)) | ~filled).all():
        return "a row that was excluded or outside the ranges"
    times = torch.zeros(allowed.shape, dtype=torch.int64).scatter_add(1, index.clamp_min(0), filled.long())
    return "a row twice in one list" if (times > 1).any() else ""


def _scores_of(exact: Tensor, index: Tensor) -> Tensor:
    """float64 scores of the rows found, -inf where there is none."""
    if exact.shape[1] == 0:
        return torch.full(index.shape, float("-inf"), dtype=torch.float64)
    flat = exact.gather(1, index.clamp_min(0).flatten(1)).reshape(index.shape)
    return flat.masked_fill(index < 0, float("-inf"))
