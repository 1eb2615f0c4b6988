"""Pair prompts: tables, lookup, fallback, and SEM with them. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from capt import ConfusionBank, SemanticConfusionMiner
from capt.data.pair_texts import PairText, PairTexts
from capt.errors import CaptError, DataError
from capt.modules import pair_prompts
from capt.modules.pair_prompts import PairPrompts, class_prompts, selectable_pairs
from capt.ops import prompt_attention
from tests import tiny

CLASSES = ("cat", "dog", "fox", "wolf", "tram")
PAIRS = {
    ("cat", "fox"): PairText(("pointed ears", "fur", "a tail"), ("whiskers",), ("a red coat", "a bushy tail")),
    ("dog", "wolf"): PairText(("a snout",), ("a collar", "hanging ears"), ("grey fur",)),
}
B, K = 6, 3


def toy(pairs: dict[tuple[str, str], PairText] = PAIRS, classes: tuple[str, ...] = CLASSES) -> PairTexts:
    return PairTexts("toy", "base", classes, pairs)


@functools.cache
def prompts(n_pairs: int = 2) -> PairPrompts:
    return PairPrompts(toy(dict(list(PAIRS.items())[:n_pairs])), tiny.backbone())


def every_pair() -> dict[tuple[str, str], PairText]:
    return {
        (a, b): PairText((f"{a} and {b}", "both"), (f"only {a}",), (f"only {b}",))
        for a, b in itertools.combinations(CLASSES, 2)
    }


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and text features of the toy classes."""
    text = tiny.backbone().class_text_features(CLASSES)
    features = normalize(torch.randn(B, text.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)
    return features, 10 * features @ text.T, text


def all_ids() -> tuple[Tensor, Tensor]:
    """Every class with every other."""
    return torch.arange(5), torch.tensor([[i for i in range(5) if i != p] for p in range(5)])


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_14_rows_are_the_plain_tower_s_unit_norm_features_of_the_texts() -> None:
    backbone, made = tiny.backbone(), prompts()
    assert made.commonality.shape == (2, 3, 48) and made.difference.shape == (4, 2, 48) and len(made) == 2

    def plain(*sentences: str) -> Tensor:
        with torch.no_grad():
            return normalize(backbone.model.encode_text(backbone.tokenize(list(sentences))).float(), dim=-1)

    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    close(made.commonality[0], plain("pointed ears", "fur", "a tail"))
    close(made.difference[0], plain("whiskers", "whiskers"))  # the view of the cat
    close(made.difference[1], plain("a red coat", "a bushy tail"))  # of the fox
    close(made.commonality[1], plain("a snout", "a snout", "a snout"))
    for rows in (made.commonality, made.difference):
        close(rows.norm(dim=-1), torch.ones(rows.shape[:2]))
        assert not rows.requires_grad
    assert not made.state_dict() and not list(made.parameters())


def test_texts_are_encoded_once_and_cached() -> None:
    backbone = tiny.backbone()
    PairPrompts(toy(), backbone)
    before = backbone.text_cache.misses
    PairPrompts(toy(), backbone)
    assert backbone.text_cache.misses == before


def test_shorter_lists_repeat_in_turn() -> None:
    five = PairText(tuple("abcde"), ("f",), ("g",))
    made = PairPrompts(
        toy({("cat", "dog"): five, ("cat", "fox"): PairText(("h", "i"), ("j",), ("k",))}), tiny.backbone()
    )
    distinct, counts = torch.unique(made.commonality[1], dim=0, return_counts=True)
    assert len(distinct) == 2 and sorted(counts.tolist()) == [2, 3]
    assert torch.equal(made.commonality[1, :2], made.commonality[1, 2:4])


def test_a_text_that_does_not_fit_is_named_with_its_pair() -> None:
    long = toy({("dog", "wolf"): PAIRS["dog", "wolf"]._replace(difference_ab=("fine", "hanging ears " * 20))})
    with pytest.raises(DataError, match=r"'dog\|wolf': difference_ab, text 2: .*does not fit"):
        PairPrompts(long, tiny.backbone())
    with pytest.raises(DataError, match="reversed"):
        PairPrompts(toy({("wolf", "dog"): PAIRS["dog", "wolf"]}), tiny.backbone())


# ---- lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_12_commonality_is_symmetric_and_difference_is_not(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_prompts, "DENSE_CLASSES", 4096 if dense else 4)
    made = PairPrompts(toy(), tiny.backbone())
    assert made._pairs.ndim == (2 if dense else 1)
    pseudo, confusing = all_ids()
    common, differ = made.lookup(pseudo, confusing)
    assert common.dtype == differ.dtype == torch.int64 and common.shape == confusing.shape
    found = {
        (int(p), int(i)): (int(common[p, j]), int(differ[p, j])) for p in pseudo for j, i in enumerate(confusing[p])
    }
    known = {(0, 2): (0, 0), (2, 0): (0, 1), (1, 3): (1, 2), (3, 1): (1, 3)}
    assert found == {pair: known.get(pair, (-1, -1)) for pair in found} and len(found) == 20


def test_class_order_of_the_candidates_decides_the_ids_and_others_are_left_out() -> None:
    made = PairPrompts(toy(), tiny.backbone(), ("wolf", "cat", "dog", "dog"))  # one name, two classes
    common, differ = made.lookup(torch.tensor([0, 2, 3]), torch.tensor([[2, 3, 1], [0, 3, 1], [0, 2, 1]]))
    assert len(made) == 2
    assert common.tolist() == [[0, 1, -1], [0, -1, -1], [1, -1, -1]]
    assert differ.tolist() == [[0, 2, -1], [1, -1, -1], [3, -1, -1]]
    grey = prompts().difference[3, 0]  # what a wolf has that a dog has not, now the lower id
    assert torch.equal(made.difference[0, 0], grey) and torch.equal(made.difference[2, 0], grey)


def test_sparse_and_dense_lookup_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pseudo, confusing = all_ids()
    for pairs in ({}, PAIRS, every_pair()):
        dense = PairPrompts(toy(pairs), tiny.backbone())
        with monkeypatch.context() as patch:
            patch.setattr(pair_prompts, "DENSE_CLASSES", 1)
            sparse = PairPrompts(toy(pairs), tiny.backbone())
        for one, other in zip(dense.lookup(pseudo, confusing), sparse.lookup(pseudo, confusing), strict=True):
            assert torch.equal(one, other)


# ---- gather ----------------------------------------------------------------------------------------------------------


def test_12_every_pair_has_its_texts_or_the_class_texts() -> None:
    made, (_, _, text) = prompts(), batch()
    pseudo, confusing = all_ids()
    commonality, difference, of_commonality, of_difference = made.gather(pseudo, confusing, text)
    assert commonality.shape == (20, 3, 48) and difference.shape == (20, 2, 48)
    own, other = text[pseudo].unsqueeze(1), text[confusing]
    where, which = made.lookup(pseudo, confusing)
    for p, j in itertools.product(range(5), range(4)):
        rows, views = commonality[of_commonality[p, j]], difference[of_difference[p, j]]
        if where[p, j] < 0:
            torch.testing.assert_close(rows, normalize(own[p] + other[p, j], dim=-1).expand(3, -1))
            torch.testing.assert_close(views, normalize(own[p] - other[p, j], dim=-1).expand(2, -1))
        else:
            assert torch.equal(rows, made.commonality[where[p, j]])
            assert torch.equal(views, made.difference[which[p, j]])


def test_12_without_texts_sem_gives_what_it_gave_before() -> None:
    features, logits, text = batch()
    nothing = PairPrompts(toy({}), tiny.backbone())
    plain = SemanticConfusionMiner(K)(features, logits, text)
    mined = SemanticConfusionMiner(K)(features, logits, text, None, nothing)
    own, other = text[plain.pseudo].unsqueeze(1), text[plain.confusing]
    weight = torch.softmax(
        torch.einsum("bd,bkd->bk", features, normalize(own + other, dim=-1)) * 48**-0.5 + plain.scores.log(), 1
    )
    expected = torch.einsum("bk,bkd->bd", weight, normalize(own + other, dim=-1))
    torch.testing.assert_close(plain.commonality, expected, rtol=1e-4, atol=1e-5)
    for name in ("pseudo", "confusing", "scores", "commonality", "difference"):
        assert torch.equal(getattr(plain, name), getattr(mined, name)), name


def test_12_sem_with_texts_attends_to_the_rows_of_its_pairs() -> None:
    features, logits, text = batch()
    for pairs in (PAIRS, every_pair()):
        made = PairPrompts(toy(pairs), tiny.backbone())
        mined = SemanticConfusionMiner(K)(features, logits, text, pair_prompts=made)
        common, differ = made.lookup(mined.pseudo, mined.confusing)
        prior = torch.log(mined.scores / mined.scores.sum(1, keepdim=True))
        fallback = class_prompts(mined.pseudo, mined.confusing, text)
        for table, index, instead, found in (
            (made.commonality, common, fallback[0], mined.commonality),
            (made.difference, differ, fallback[1], mined.difference),
        ):
            rows = torch.where((index < 0)[..., None, None], instead.unflatten(0, index.shape), table[index])
            scores = torch.einsum("bd,bksd->bks", features, rows) * 48**-0.5 + prior[..., None]
            weights = scores.flatten(1).softmax(1).view_as(scores)
            torch.testing.assert_close(found, torch.einsum("bks,bksd->bd", weights, rows), rtol=1e-4, atol=1e-5)


def test_tables_are_handed_over_uncopied_where_every_pair_has_texts() -> None:
    made = PairPrompts(toy(every_pair()), tiny.backbone())
    _, _, text = batch()
    commonality, difference, *_ = made.gather(*all_ids(), text)
    assert made.complete and commonality is made.commonality and difference is made.difference
    assert not prompts().complete and not PairPrompts(toy({}, ("cat",)), tiny.backbone()).complete


def test_text_features_of_other_classes_are_refused() -> None:
    _, _, text = batch()
    with pytest.raises(CaptError, match="made for 5 classes, found 4"):
        prompts().gather(*all_ids(), text[:4])


@pytest.mark.parametrize(("n_pairs", "sparse"), [(0, False), (2, False), (2, True)])
def test_gather_compiles_without_graph_breaks(n_pairs: int, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_prompts, "DENSE_CLASSES", 1 if sparse else 4096)
    made = PairPrompts(toy(dict(list(PAIRS.items())[:n_pairs])), tiny.backbone())
    features, logits, text = batch()
    pseudo, confusing = logits.argmax(1), logits.topk(K + 1).indices[:, 1:]

    def step(features: Tensor, pseudo: Tensor, confusing: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        commonality, difference, of_commonality, of_difference = made.gather(pseudo, confusing, text)
        return prompt_attention(
            features, commonality, difference, commonality_index=of_commonality, difference_index=of_difference
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (B, 4):
        arguments = (features[:size], pseudo[:size], confusing[:size], text)
        for one, other in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(one, other)


def test_gather_needs_no_values() -> None:
    made = prompts()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pseudo, confusing = torch.empty(7, dtype=torch.long), torch.empty(7, 2, dtype=torch.long)
        commonality, difference, index, _ = made.gather(pseudo, confusing, torch.empty(5, 48))
        assert commonality.shape == (14, 3, 48) and difference.shape == (14, 2, 48) and index.shape == (7, 2)


def test_gradient_reaches_the_class_texts_of_pairs_without_texts_only() -> None:
    _, _, text = batch()
    text = text.clone().requires_grad_()
    commonality, difference, *_ = prompts().gather(torch.tensor([0]), torch.tensor([[2, 1]]), text)
    (commonality.sum() + difference[..., 0].sum()).backward()
    assert text.grad is not None and text.grad[[0, 1]].abs().sum() > 0
    assert not text.grad[[2, 3, 4]].any()


# ---- which pairs can occur -------------------------------------------------------------------------------------------


def test_12_selectable_pairs_are_the_cells_of_the_bank_and_the_nearest_classes() -> None:
    text = normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, 0]]), dim=-1)
    labels, predictions = torch.tensor([4, 0, 1]), torch.tensor([0, 4, 3])
    bank = ConfusionBank(torch.randn(3, 2), labels, predictions, torch.ones(3), torch.arange(3), CLASSES)
    nearest = selectable_pairs(text, neighbours=1)
    assert nearest.tolist() == [[0, 1], [2, 3], [2, 4]] and nearest.dtype == torch.int64
    assert selectable_pairs(text, bank, 1).tolist() == [[0, 1], [0, 4], [1, 3], [2, 3], [2, 4]]
    assert selectable_pairs(text, bank, 0).tolist() == [[0, 4], [1, 3]]
    assert len(selectable_pairs(text)) == 10
    assert selectable_pairs(text[:1]).shape == selectable_pairs(text[:0]).shape == (0, 2)
    with pytest.raises(CaptError, match="5 classes"):
        selectable_pairs(text[:4], bank)
