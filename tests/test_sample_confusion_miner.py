"""Sample Confusion Miner. Numbers in test names: docs/fidelity.md. Retrieval itself: test_confusion_bank."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from capt import ConfusionBank, DiffMannerAdapter, SampleConfusionMiner, SemanticConfusionMiner
from tests.tiny import CLASSES, backbone, data_set


@pytest.fixture(scope="module", params=["vit", "cnn"])
def scene(request):
    wrapped, images = backbone(request.param), data_set().train
    miner = SampleConfusionMiner(DiffMannerAdapter.for_tower(wrapped.tower), m=2)
    with torch.no_grad():
        pixels = torch.stack([wrapped.preprocess(images.image(i)) for i in range(len(images))])
        tokens = miner.adapter.frozen_tokens(wrapped.tower, pixels)
        features = normalize(wrapped.image_features(pixels), dim=-1)
        text = wrapped.class_text_features(CLASSES)
        logits = wrapped.logit_scale * features @ text.T
    ids = torch.from_numpy(images.ids.copy())
    bank = ConfusionBank.from_logits(features, logits, torch.from_numpy(images.labels.copy()), ids, CLASSES)
    position = {int(i): n for n, i in enumerate(ids)}
    stored = tokens[[position[int(i)] for i in bank.sample_ids]]
    semantic = SemanticConfusionMiner(3)(features, logits, text, bank.statistics())
    return wrapped, miner, bank, stored, tokens, features, semantic, ids


def mine(scene, **changes):
    wrapped, miner, bank, stored, tokens, features, semantic, ids = scene
    options = {"bank": bank, "bank_tokens": lambda rows: stored[rows], "sample_ids": ids, **changes}
    return miner(features, tokens, wrapped.tower, semantic, **options)


def test_16_representatives_are_stored_mistakes_of_the_pair_and_never_the_query(scene):
    _, miner, bank, _, _, features, semantic, ids = scene
    assert len(bank) > 10
    mined = mine(scene)
    assert mined.rows.shape == (len(ids), 6) and mined.mask.any()
    own = torch.where(mined.mask, bank.sample_ids[mined.rows.clamp_min(0)], -1)
    assert (own != ids[:, None]).all()
    with_self = miner.retrieve(bank, features, semantic)[1]
    returned = torch.where(with_self >= 0, bank.sample_ids[with_self.clamp_min(0)], -1)
    assert (returned == ids[:, None]).any(), "without the exclusion a stored query finds itself"


def test_17_features_may_be_rescaled(scene):
    _, miner, bank, _, _, features, semantic, ids = scene
    scaled = ConfusionBank(
        3.0 * bank.features, bank.labels, bank.predictions, bank.confidences, bank.sample_ids, bank.class_names
    )
    one, other = miner.retrieve(bank, features, semantic, ids), miner.retrieve(scaled, features, semantic, ids)
    assert torch.equal(one[1], other[1])


def test_18_no_gradient_reaches_the_bank_but_the_adapter_learns_from_it(scene):
    _, miner, bank, *_ = scene
    miner.zero_grad()
    mined = mine(scene)
    assert not mined.similarities.requires_grad and not bank.features.requires_grad
    mined.representatives[mined.mask].sum().backward()
    assert miner.adapter.weight.grad.abs().sum() > 0


def test_28_weights_sum_to_one_and_masked_images_fall_back_to_themselves(scene):
    mined = mine(scene)
    missing = ~mined.mask.any(1)
    assert torch.equal(mined.guidance[missing], mined.own[missing])
    assert torch.isfinite(mined.guidance).all()
    constant = torch.ones_like(mined.representatives)
    _, miner, _, _, _, features, _, _ = scene
    pooled = miner._pool(features, mined.own, constant, mined.mask)
    assert torch.allclose(pooled[~missing], torch.ones_like(pooled[~missing]), atol=1e-5)


@pytest.mark.parametrize("missing", ["bank", "bank_tokens"])
def test_28_without_a_bank_the_query_guides_itself(scene, missing):
    mined = mine(scene, **{missing: None})
    assert torch.equal(mined.guidance, mined.own) and mined.mask.shape[1] == 0


def test_empty_bank(scene):
    bank = scene[2]
    nothing = ConfusionBank(
        bank.features[:0], bank.labels[:0], bank.predictions[:0], bank.confidences[:0], bank.sample_ids[:0], CLASSES
    )
    mined = mine(scene, bank=nothing)
    assert torch.equal(mined.guidance, mined.own)


def test_dynamic_alpha_depends_on_the_best_representative(scene):
    wrapped, _, bank, stored, tokens, features, semantic, ids = scene
    adapter = DiffMannerAdapter.for_tower(wrapped.tower, dynamic=True)
    torch.nn.init.normal_(adapter.weight, std=0.05)
    miner = SampleConfusionMiner(adapter)
    mined = miner(
        features, tokens, wrapped.tower, semantic, bank=bank, bank_tokens=lambda rows: stored[rows], sample_ids=ids
    )
    best = torch.where(mined.mask, mined.similarities, 0.0).amax(1)
    expected = normalize(adapter.encode(wrapped.tower, tokens, adapter.intensity(best)), dim=-1)
    assert torch.allclose(mined.own, expected, atol=1e-6) and torch.isfinite(mined.guidance).all()
