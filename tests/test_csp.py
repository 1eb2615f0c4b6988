"""CSP: learned primitives in the pair prompt, everything else frozen."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError
from capt.methods.compositional.csp import CSP, CSPConfig
from capt.methods.compositional.model import ZeroShotPairs, spoken
from capt.methods.compositional.registry import model_type
from capt.methods.msci_config import MSCIConfig
from capt.training import TrainingOptions
from tests.tiny import OBJECTS, STATES, backbone

TRAIN = torch.tensor([[0, 0], [2, 1], [1, 2]])
EVERY = torch.cartesian_prod(torch.arange(3), torch.arange(3))


def csp(**settings) -> CSP:
    return CSP(backbone(), STATES, OBJECTS, TRAIN, CSPConfig(**settings)).eval()


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_only_the_primitives_learn():
    one = csp(text_chunk=2).train()
    assert one.trainable().keys() == {"prompts.table"}
    one.losses(one.inputs(images(3)), torch.tensor([0, 1, 2]), torch.Generator())["loss"].backward()
    assert one.prompts.table.grad.abs().amax(1).min() > 0 and one.prompts.contexts.grad is None
    assert all(parameter.grad is None for parameter in one.backbone.parameters())


def test_a_fresh_model_scores_a_photo_of_state_object():
    one = csp()
    view, texts = one.look(one.inputs(images(3))), one.texts(EVERY)
    words = backbone().text_features([f"a photo of {STATES[s]} {OBJECTS[o]}" for s, o in EVERY.tolist()])
    torch.testing.assert_close(texts.pair, words, rtol=1e-4, atol=1e-5)
    expected = backbone().logit_scale * F.normalize(backbone().image_features(images(3)), dim=-1) @ words.T
    ((start, found),) = one.pair_scores(view, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert start == 0 and one.primitives(view, texts) is None  # no branch of primitives, so nothing is added


def test_the_loss_is_the_cross_entropy_over_training_pairs():
    one, labels = csp(), torch.tensor([2, 0, 2])
    inputs = one.inputs(images(3))
    view = one.look(inputs)
    logits = one.branch_logits(view, view.pair, one.texts(TRAIN).pair)
    found = one.losses(inputs, labels, torch.Generator())
    torch.testing.assert_close(found["loss"], -logits.log_softmax(1)[torch.arange(3), labels].mean())


def test_scores_are_in_single_precision_under_autocast():
    one = csp(training=TrainingOptions(amp=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        view, texts = one.look(one.inputs(images(3))), one.texts(EVERY)
        found = one.branch_logits(view, view.pair, texts.pair)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, backbone().logit_scale * view.pair @ texts.pair.float().T)


def test_zero_shot_reads_joined_names_as_words():
    states, objects = ("dark_blue", "Faux.Fur"), ("Boots.Ankle",)
    one = ZeroShotPairs(backbone(), states, objects, TRAIN[:1])
    expected = backbone().class_text_features(["dark blue Boots Ankle", "Faux Fur Boots Ankle"])
    assert torch.equal(one.texts(torch.tensor([[0, 0], [1, 0]])).pair, expected)
    assert spoken(objects) == ["Boots Ankle"] and not one.trainable()


def test_settings_name_their_model():
    assert [model_type(one).kind for one in (CSPConfig(), MSCIConfig())] == ["csp", "msci"]
    with pytest.raises(CaptError, match=r"expected settings of a compositional model .*MSCIConfig"):
        model_type(TrainingOptions())
    with pytest.raises(CaptError, match="prompt_dropout: expected at least 0"):
        CSPConfig(prompt_dropout=1.5)
    with pytest.raises(CaptError, match="CSP scores pairs alone, so the first weight must be above 0"):
        CSPConfig(score_weights=(0, 1, 1))
