"""The reference ops against brute force: nested loops in float64 that follow the definitions word by word."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from capt import ops, reference
from capt.errors import CaptError


def brute_topk(queries, rows, candidates, k):
    """Lists of (score, row) for each query's candidate rows: by score, then by row."""
    score = (queries.double() @ rows.double().T).float()
    found = []
    for q, some in enumerate(candidates):
        ranked = sorted({r for r in some}, key=lambda r: (-float(score[q, r]), r))[:k]
        found.append([(float(score[q, r]), r) for r in ranked] + [(-math.inf, -1)] * (k - len(ranked)))
    return found


@pytest.mark.parametrize("n_rows", [0, 1, 7, 100])
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("chunk", [1 << 24, 40])
def test_bank_topk_whole_bank_with_ties_and_exclusion(n_rows, k, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    queries = torch.randint(-1, 2, (5, 4)).float()  # small integers: exact scores, many ties
    rows = torch.randint(-1, 2, (n_rows, 4)).float()
    ids = torch.arange(n_rows) // 2
    exclude = torch.tensor([-1, 0, 1, 2, 99])
    score, index = reference.bank_topk(queries, rows, k, None, ids, exclude)
    candidates = [[r for r in range(n_rows) if exclude[q] < 0 or ids[r] != exclude[q]] for q in range(5)]
    expected = brute_topk(queries, rows, candidates, k)
    assert index.tolist() == [[r for _, r in row] for row in expected]
    assert score.tolist() == [[s for s, _ in row] for row in expected]
    assert score.dtype == torch.float32 and index.dtype == torch.int64


@pytest.mark.parametrize("chunk", [1 << 24, 30])
def test_bank_topk_ranges_overlap_empty_and_long(chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    queries = torch.randint(-1, 2, (3, 4)).float()
    rows = torch.randint(-1, 2, (30, 4)).float()
    ranges = torch.tensor(
        [
            [[[0, 30], [0, 30]], [[5, 5], [9, 2]], [[3, 9], [7, 12]]],
            [[[0, 1], [29, 30]], [[10, 20], [0, 3]], [[0, 0], [0, 0]]],
            [[[2, 4], [3, 3]], [[0, 30], [4, 5]], [[29, 30], [28, 29]]],
        ]
    )
    ids, exclude = torch.arange(30), torch.tensor([4, -1, 29])
    score, index = reference.bank_topk(queries, rows, 5, ranges, ids, exclude)
    assert index.shape == (3, 3, 5)
    for q in range(3):
        candidates = [[r for a, b in ranges[q, p].tolist() for r in range(a, b) if r != exclude[q]] for p in range(3)]
        expected = brute_topk(queries[q].expand(3, -1), rows, candidates, 5)
        assert index[q].tolist() == [[r for _, r in row] for row in expected]
        assert score[q].tolist() == [[s for s, _ in row] for row in expected]


def test_bank_topk_skips_nan_and_treats_zeros_alike():
    rows = torch.tensor([[float("nan")], [-0.0], [0.0], [1.0]])
    _, index = reference.bank_topk(torch.ones(1, 1), rows, 4)
    assert index.tolist() == [[3, 1, 2, -1]]
    for ranges in (None, torch.tensor([[[[1, 2]]]])):
        assert not reference.bank_topk(torch.ones(1, 1), rows[:2], 1, ranges)[0].signbit().any()


def test_bank_topk_half_precision_and_empty_queries():
    queries, rows = torch.randn(4, 16), torch.randn(50, 16)
    exact = reference.bank_topk(queries.bfloat16().float(), rows.bfloat16().float(), 3)
    half = reference.bank_topk(queries.bfloat16(), rows.bfloat16(), 3)
    assert torch.equal(exact[1], half[1])
    assert reference.bank_topk(queries[:0], rows, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("with_counts", [False, True])
def test_confusion_pairs_follow_the_definition(with_counts):
    n_classes, batch, k = 6, 9, 4
    logits = torch.randint(-2, 3, (batch, n_classes)).float()  # ties in logits on purpose
    table = torch.randint(0, 4, (n_classes, n_classes)) * (torch.rand(n_classes, n_classes) < 0.5)
    table[2] = 0  # a class without statistics
    offsets, classes, counts = [0], [], []
    for p in range(n_classes):
        for i in range(n_classes):
            if table[p, i] and i != p:
                classes.append(i)
                counts.append(int(table[p, i]))
        offsets.append(len(classes))
    statistics = {}
    if with_counts:
        statistics = {
            "offsets": torch.tensor(offsets),
            "classes": torch.tensor(classes),
            "counts": torch.tensor(counts),
        }
    pseudo, index, score = ops.confusion_pairs(logits, k=k, **statistics)
    probability = logits.softmax(1)
    for b in range(batch):
        p = max(range(n_classes), key=lambda i: (float(logits[b, i]), -i))
        assert pseudo[b] == p
        total = sum(int(table[p, i]) for i in range(n_classes) if i != p)
        s = {
            i: float(probability[b, i] * (1 + (float(table[p, i]) / total if with_counts and total else 0.0)))
            for i in range(n_classes)
            if i != p
        }
        ranked = sorted(s, key=lambda i: (-s[i], i))[:k]
        assert [s[i] for i in index[b].tolist()] == pytest.approx([s[i] for i in ranked], rel=1e-6)
        assert score[b].tolist() == pytest.approx([s[i] for i in ranked], rel=1e-6)
        assert len(set(index[b].tolist())) == k and p not in index[b].tolist()


def test_confusion_pairs_scale_of_counts_and_extreme_logits():
    logits = torch.randn(5, 4)
    offsets, classes = torch.tensor([0, 2, 3, 3, 5]), torch.tensor([1, 3, 0, 0, 2])
    counts = torch.tensor([1, 2, 5, 3, 1])
    one = ops.confusion_pairs(logits, k=9, offsets=offsets, classes=classes, counts=counts)
    ten = ops.confusion_pairs(logits, k=9, offsets=offsets, classes=classes, counts=counts * 10)
    assert one[1].shape == (5, 3)  # k is cut to C - 1
    torch.testing.assert_close(one[2], ten[2])
    base = logits.softmax(1).gather(1, one[1])
    assert (one[2] >= base * (1 - 1e-6)).all() and (one[2] <= 2 * base * (1 + 1e-6)).all()
    extreme = ops.confusion_pairs(torch.tensor([[1e4, -1e4, 0.0]]), k=2)
    assert extreme[0].tolist() == [0] and extreme[2].isfinite().all()
    assert ops.confusion_pairs(torch.zeros(2, 3), k=2)[1].tolist() == [[1, 2], [1, 2]]  # ties to the lower class


def loop_attention(query, table, index, prior, scale):
    out = torch.zeros_like(query)
    for b in range(len(query)):
        rows, scores = [], []
        for j, pair in enumerate(index[b].tolist()):
            if pair >= 0:
                for row in table[pair]:
                    rows.append(row)
                    scores.append((query[b] * row).sum() * scale + (prior[b, j] if prior is not None else 0.0))
        if rows:
            out[b] = (torch.stack(scores).softmax(0)[:, None] * torch.stack(rows)).sum(0)
    return out


@pytest.mark.parametrize("with_prior", [False, True])
def test_prompt_attention_follows_the_definition(with_prior):
    query = torch.randn(4, 6, dtype=torch.float64)
    common, different = torch.randn(5, 2, 6, dtype=torch.float64), torch.randn(7, 3, 6, dtype=torch.float64)
    index = torch.tensor([[0, 4, -1], [2, 2, 1], [-1, -1, -1], [3, -1, 0]])
    other = torch.tensor([[6, -1, -1], [0, 1, 2], [5, 5, 5], [-1, -1, -1]])
    prior = torch.randn(4, 3, dtype=torch.float64) if with_prior else None
    com, diff = ops.prompt_attention(
        query, common, different, commonality_index=index, difference_index=other, log_prior=prior
    )
    torch.testing.assert_close(com, loop_attention(query, common, index, prior, 6**-0.5))
    torch.testing.assert_close(diff, loop_attention(query, different, other, prior, 6**-0.5))
    assert com[2].eq(0).all() and diff[3].eq(0).all()  # fully masked


def test_prompt_attention_masked_rows_have_zero_gradient_not_nan():
    query = torch.randn(2, 4, requires_grad=True)
    table = torch.randn(3, 2, 4, requires_grad=True)
    index = torch.tensor([[-1, -1], [0, -1]])
    com, diff = ops.prompt_attention(query, table, table, commonality_index=index, difference_index=index)
    (com.sum() + (diff**2).sum()).backward()
    assert query.grad.isfinite().all() and table.grad.isfinite().all()
    assert query.grad[0].eq(0).all() and query.grad[1].ne(0).any() and table.grad[1:].eq(0).all()


def test_prompt_attention_shared_equals_torch_attention_and_lse_merges_split_keys():
    batch, rows, length, dim, heads = 2, 3, 10, 8, 2
    shared, own = torch.randn(rows, dim).double(), torch.randn(batch, rows, dim).double()
    keys, values = torch.randn(batch, length, dim).double(), torch.randn(batch, length, dim).double()
    com, diff, lse_com, lse_diff = ops.prompt_attention_shared(shared, own, keys, values, n_heads=heads)

    def heads_first(x):
        return x.unflatten(-1, (heads, dim // heads)).transpose(1, 2)

    for query, out in ((shared.expand(batch, -1, -1), com), (own, diff)):
        want = torch.nn.functional.scaled_dot_product_attention(*map(heads_first, (query, keys, values)))
        torch.testing.assert_close(out, want.transpose(1, 2).flatten(-2))
    assert lse_com.shape == lse_diff.shape == (batch, heads, rows)
    parts = [
        ops.prompt_attention_shared(shared, own, keys[:, part], values[:, part], n_heads=heads)
        for part in (slice(0, 4), slice(4, None))
    ]
    lse = torch.stack([p[2] for p in parts])
    weight = lse.softmax(0).transpose(2, 3)[..., None]  # [2, B, R, H, 1]
    outs = torch.stack([p[0] for p in parts]).unflatten(-1, (heads, dim // heads))
    torch.testing.assert_close((weight * outs).sum(0).flatten(-2), com)
    torch.testing.assert_close(lse.logsumexp(0), lse_com)


def expert_parameters(n_experts=3, dim=5, hidden=7, dtype=torch.float64):
    shapes = [
        (n_experts, dim),
        (n_experts, hidden, dim),
        (n_experts, hidden),
        (n_experts, dim, hidden),
        (n_experts, dim),
    ]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_expert_gating_follows_the_definition(top_k):
    x = torch.randn(6, 5, dtype=torch.float64)
    gate, w_in, b_in, w_out, b_out = expert_parameters()
    y, weights, probs, load = ops.expert_gating(x, gate, w_in, b_in, w_out, b_out, top_k=top_k)
    for n in range(6):
        p = (gate @ x[n]).softmax(0)
        chosen = sorted(range(3), key=lambda e: (-float(p[e]), e))[:top_k]
        want = torch.zeros(5, dtype=torch.float64)
        for e in chosen:
            hidden = w_in[e] @ x[n] + b_in[e]
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            want += p[e] / sum(p[c] for c in chosen) * (w_out[e] @ hidden + b_out[e])
        torch.testing.assert_close(y[n], want)
        torch.testing.assert_close(probs[n], p)
    assert (weights > 0).sum(1).eq(top_k).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(load.sum(), torch.tensor(float(top_k), dtype=torch.float64))


def test_expert_gating_ties_empty_and_gradients():
    parameters = expert_parameters()
    parameters[0].zero_()  # equal probabilities: the lower experts win
    _, weights, _, _ = ops.expert_gating(torch.randn(2, 5).double(), *parameters, top_k=2)
    assert weights.tolist() == [[0.5, 0.5, 0.0]] * 2
    y, weights, _, load = ops.expert_gating(torch.zeros(0, 5).double(), *parameters, top_k=2)
    assert y.shape == (0, 5) and weights.shape == (0, 3) and load.tolist() == [0, 0, 0]
    parameters = [p.requires_grad_() for p in expert_parameters()]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *a: ops.expert_gating(*a, top_k=2)[:3], (x, *parameters))


def test_expert_gating_dropout_only_in_training():
    x, parameters = torch.randn(64, 5).double(), expert_parameters()
    quiet = ops.expert_gating(x, *parameters, top_k=2, dropout=0.5)[0]
    torch.testing.assert_close(quiet, ops.expert_gating(x, *parameters, top_k=2)[0])
    noisy = ops.expert_gating(x, *parameters, top_k=2, dropout=0.5, training=True)[0]
    assert not torch.allclose(noisy, quiet)


def test_asymmetric_loss_value_and_closed_form_gradient():
    logits = torch.linspace(-25, 25, 40, dtype=torch.float64).reshape(4, 10).requires_grad_()
    targets = torch.arange(40).reshape(4, 10) % 3 == 0
    loss = ops.asymmetric_loss(logits, targets, gamma_pos=1.0, gamma_neg=4.0)
    p = logits.detach().sigmoid()
    value = torch.where(
        targets,
        -(1 - p) * p.clamp_min(1e-8).log(),
        -((p - 0.05).clamp_min(0) ** 4) * (1 - p + 0.05).clamp(1e-8, 1).log(),
    )
    torch.testing.assert_close(loss, value.mean())
    (grad,) = torch.autograd.grad(loss, logits)
    want = torch.where(
        targets,
        torch.where(p >= 1e-8, -(1 - p) * (1 - p), 0.0),
        torch.where(p > 0.05, (p - 0.05).clamp_min(0) ** 4 * p * (1 - p) / (1 - p + 0.05), 0.0),
    )
    torch.testing.assert_close(grad, want / 40)
    torch.testing.assert_close(ops.asymmetric_loss(logits, targets, reduction="none").mean(),
                               ops.asymmetric_loss(logits, targets))  # fmt: skip
    torch.testing.assert_close(ops.asymmetric_loss(logits, targets, reduction="sum") / 40,
                               ops.asymmetric_loss(logits, targets))  # fmt: skip


def test_asymmetric_loss_without_focus_and_margin_is_binary_cross_entropy():
    logits, targets = torch.randn(3, 4), (torch.rand(3, 4) < 0.5).float()
    loss = ops.asymmetric_loss(logits, targets, gamma_neg=0.0, margin=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_pair_frontier_streams_in_any_order(order):
    scores = torch.randint(0, 4, (6, 12)).float()  # ties
    scores[0, 3] = float("nan")
    group = torch.tensor([0, 1, 2, -1, 0, 0, 1, 1, 2, 0, -1, 1])
    frontier = None
    for chunk in order:
        part = slice(chunk * 4, chunk * 4 + 4)
        frontier = ops.pair_frontier(scores[:, part], group=group[part], n_groups=4, start=chunk * 4, previous=frontier)
    for b in range(6):
        for g in range(4):
            members = [i for i in range(12) if group[i] == g and not scores[b, i].isnan()]
            best = max(members, key=lambda i: (float(scores[b, i]), -i)) if members else -1
            assert frontier.pair[b, g] == best
            assert frontier.score[b, g] == (scores[b, best] if members else -math.inf)


def test_pair_frontier_agrees_with_biased_argmax():
    scores, seen = torch.randn(20, 15), torch.arange(15) % 3 == 0
    frontier = ops.pair_frontier(scores, group=(~seen).long())
    for bias in (-1.0, 0.0, 0.7):
        full = (scores + bias * ~seen).argmax(1)
        reduced = torch.where(frontier.score[:, 0] > frontier.score[:, 1] + bias, *frontier.pair.unbind(1))
        assert torch.equal(full, reduced)


@pytest.mark.parametrize("learned_query", [False, True])
def test_attention_readout_groups_recombine_to_attention(learned_query):
    batch, length, heads, width, variants, n_groups = 2, 9, 3, 4, 2, 4
    query = torch.randn(*(() if learned_query else (batch,)), heads, width, dtype=torch.float64)
    keys, values = (torch.randn(batch, length, heads, width, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(variants, 1, length, dtype=torch.float64)
    groups = torch.randint(0, 3, (length,))  # group 3 stays empty
    readout = ops.attention_readout(query, keys, values, groups=groups, n_groups=n_groups, bias=bias)
    for m in range(variants):
        for b in range(batch):
            for h in range(heads):
                q = query[h] if learned_query else query[b, h]
                weight = (keys[b, :, h] @ q * width**-0.5 + bias[m, 0]).exp()
                for g in range(n_groups):
                    member = groups == g
                    mass = weight[member].sum()
                    mean = (
                        (weight[member, None] * values[b, member, h]).sum(0) / mass if member.any() else torch.zeros(4)
                    )
                    torch.testing.assert_close(readout.log_mass[m, b, h, g], mass.log())
                    torch.testing.assert_close(readout.mean[m, b, h, g], mean.double())
    share = readout.log_mass.softmax(-1)
    assert share[..., 3].eq(0).all()
    whole = ops.attention_readout(query, keys, values, groups=torch.zeros(length).long(), n_groups=1, bias=bias)
    torch.testing.assert_close((share[..., None] * readout.mean).sum(-2), whole.mean[..., 0, :])


def test_references_pass_gradcheck_in_float64():
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    index = torch.tensor([[0, 2], [1, -1]])
    assert gradcheck(
        lambda q, c, d, p: ops.prompt_attention(
            q, c, d, commonality_index=index, difference_index=index.flip(0), log_prior=p
        ),
        (leaf(2, 3), leaf(3, 2, 3), leaf(3, 1, 3), leaf(2, 2)),
    )
    assert gradcheck(
        lambda a, b, k, v: ops.prompt_attention_shared(a, b, k, v, n_heads=2),
        (leaf(2, 4), leaf(2, 3, 4), leaf(2, 5, 4), leaf(2, 5, 4)),
    )
    groups = torch.tensor([0, 1, 1, 0, 1])
    assert gradcheck(
        lambda q, k, v, b: tuple(ops.attention_readout(q, k, v, groups=groups, n_groups=2, bias=b)),
        (leaf(2, 3), leaf(2, 5, 2, 3), leaf(2, 5, 2, 3), leaf(2, 2, 5)),
    )
    adapter = (leaf(2, 7, 3), leaf(3, 3, 3), leaf(2))
    assert gradcheck(lambda t, w, a: ops.grid_adapter(t, w, alpha=a, grid=(2, 3), n_prefix=1), adapter)
    assert gradgradcheck(lambda t, w, a: ops.grid_adapter(t, w, alpha=a, grid=(2, 3), n_prefix=1), adapter)


BAD_CALLS = {
    "queries must have shape": lambda: ops.bank_topk(torch.ones(3), torch.ones(2, 3), k=1),
    "rows must have shape": lambda: ops.bank_topk(torch.ones(1, 3), torch.ones(2, 4), k=1),
    "dtype of queries": lambda: ops.bank_topk(torch.ones(1, 3), torch.ones(2, 3).double(), k=1),
    "k must be an integer of at least 1": lambda: ops.bank_topk(torch.ones(1, 3), torch.ones(2, 3), k=0),
    "belong together, found only exclude": lambda: ops.bank_topk(
        torch.ones(1, 3), torch.ones(2, 3), k=1, exclude=torch.tensor([0])
    ),
    "bounds of ranges": lambda: ops.bank_topk(
        torch.ones(1, 3), torch.ones(2, 3), k=1, ranges=torch.tensor([[[[0, 3]]]])
    ),
    "at least 2 classes": lambda: ops.confusion_pairs(torch.ones(2, 1), k=1),
    "give all three or none": lambda: ops.confusion_pairs(torch.ones(2, 3), k=1, offsets=torch.zeros(4).long()),
    "commonality_index must lie in": lambda: ops.prompt_attention(
        torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2),
        commonality_index=torch.tensor([[1]]), difference_index=torch.tensor([[0]]),
    ),
    "not divisible by n_heads": lambda: ops.prompt_attention_shared(
        torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), n_heads=3
    ),
    "exceeds the number of experts": lambda: ops.expert_gating(
        torch.ones(1, 5).double(), *expert_parameters(), top_k=4
    ),
    "reduction must be": lambda: ops.asymmetric_loss(torch.ones(1, 1), torch.ones(1, 1), reduction="avg"),
    "group must lie in": lambda: ops.pair_frontier(torch.ones(1, 2), group=torch.tensor([0, 2])),
    "bias must have": lambda: ops.attention_readout(
        torch.ones(2, 3), torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2, 3),
        groups=torch.zeros(4).long(), n_groups=1, bias=torch.ones(1, 3, 4),
    ),
    "backend='fast' is unknown": lambda: ops.asymmetric_loss(torch.ones(1, 1), torch.ones(1, 1), backend="fast"),
    "no such kernel": lambda: ops.asymmetric_loss(torch.ones(1, 1), torch.ones(1, 1), backend="cuda"),
    "there is no op": lambda: ops.explain("convolve"),
    "unexpected keyword": lambda: ops.explain("bank_topk", colour=3),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(CaptError, match=message):
        BAD_CALLS[message]()
