"""Semantic evidence: margins of written differences, by hand and through CAPT."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from capt import CAPT
from capt.data.pair_texts import PairText, PairTexts
from capt.methods.capt_config import CAPTConfig
from capt.modules import PairPrompts, SemanticEvidence
from tests.tiny import CLASSES, backbone

TEXTS = PairTexts(
    "tiny", "all", CLASSES,
    {
        ("cat", "dog"): PairText(("a pet",), ("a cat that purrs", "a cat with whiskers"), ("a dog that barks",)),
        ("cat", "fox"): PairText(("pointed ears",), ("a cat on a sofa",), ("a red fox", "a fox in a forest")),
        ("tram", "bus"): PairText(("a vehicle",), ("a tram on rails",), ("a bus on tyres",)),
    },
)  # fmt: skip
NEW = ("violin", "ship", "lamp")
NEW_TEXTS = PairTexts(
    "tiny", "novel", NEW, {("violin", "ship"): PairText(("wood",), ("a violin with strings",), ("a ship at sea",))}
)


def naive(features, logits, prompts, scale, strength, k):
    """The definition as loops."""
    changed = logits.clone()
    for row, (v, z) in enumerate(zip(features, logits, strict=True)):
        order = sorted(range(len(z)), key=lambda c: (-float(z[c]), c))
        p, rivals = order[0], order[1 : k + 1]
        for i in rivals:
            pair, mine = prompts.lookup(torch.tensor([p]), torch.tensor([[i]]))
            _, other = prompts.lookup(torch.tensor([i]), torch.tensor([[p]]))
            if int(pair) < 0:
                continue
            own, theirs = prompts.difference[int(mine)].mean(0), prompts.difference[int(other)].mean(0)
            margin = strength * scale * float(v @ (own - theirs))
            changed[row, i] -= margin / 2
            changed[row, p] += margin / 2 / len(rivals)
    return changed


@pytest.mark.parametrize("k", [1, 3, 20])
def test_margins_equal_the_definition(k):
    wrapped = backbone()
    prompts = PairPrompts(TEXTS, wrapped)
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(16, wrapped.dim, generator=generator), dim=-1)
    logits = torch.randn(16, len(CLASSES), generator=generator)
    logits[:, :3] += 1.5  # the pairs with texts lead often
    found = SemanticEvidence(0.7, k)(features, logits, prompts, 20.0)
    torch.testing.assert_close(found, naive(features, logits, prompts, 20.0, 0.7, k), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, logits)


def test_without_strength_texts_or_rivals_nothing_changes():
    wrapped = backbone()
    prompts, none = PairPrompts(TEXTS, wrapped), PairPrompts(PairTexts("tiny", "all", CLASSES, {}), wrapped)
    features, logits = normalize(torch.ones(2, wrapped.dim), dim=-1), torch.randn(2, len(CLASSES))
    assert SemanticEvidence(0.0)(features, logits, prompts, 20.0) is logits
    assert SemanticEvidence(1.0)(features, logits, none, 20.0) is logits
    assert SemanticEvidence(1.0)(features, logits[:, :1], prompts, 20.0).shape == (2, 1)


def test_capt_uses_it_among_new_classes_only():
    wrapped = backbone()
    config = CAPTConfig(heads=4, hidden=16, views=0)
    model = CAPT(wrapped, CLASSES, config=config, pair_prompts=PairPrompts(TEXTS, wrapped)).eval()
    tokens = model.tokens(torch.randn(6, 3, *wrapped.image_hw, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        trained = model(tokens)
        assert torch.equal(trained.logits, trained.base_logits)
        new = model(tokens, model.class_set(NEW, pair_prompts=PairPrompts(NEW_TEXTS, wrapped)))
        assert not torch.equal(new.logits, new.base_logits)
        silent = model(tokens, model.class_set(NEW))
        assert torch.equal(silent.logits, silent.base_logits)
        model.semantic_evidence.strength = 0.0
        off = model(tokens, model.class_set(NEW, pair_prompts=PairPrompts(NEW_TEXTS, wrapped)))
        assert torch.equal(off.logits, off.base_logits)
