"""IVLP and PromptSRC: cached inputs, both sides' prompts, consistency losses, Gaussian average."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import capt
from capt import DiffMannerAdapter
from capt.errors import CaptError
from capt.methods.base.ivlp import IVLPConfig
from capt.methods.base.promptsrc import PromptSRCConfig
from capt.methods.base.registry import load_base, make_base
from tests import backbone_models as models
from tests.test_base_coop import BASE, fitted
from tests.tiny import CLASSES, backbone

SMALL = {"n_ctx_text": 3, "n_ctx_visual": 2, "text_depth": 1, "visual_depth": 2, "chunk": 4}


def pixels(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32)


@pytest.mark.parametrize("kind", ["ivlp", "promptsrc"])
def test_training_lowers_the_loss_and_touches_prompts_only(kind, tmp_path):
    wrapped = backbone()
    before = wrapped.fingerprint()
    model = make_base(kind, wrapped, BASE)
    # Depth 9 by default, but this image tower has three blocks and the text tower one.
    assert {name: value.shape for name, value in model.trainable().items()} == {
        "visual": (3, 4, 48),
        "text.context": (4, 32),
    }
    history = fitted(model, lr=0.02)
    assert history[-1] < 0.95 * history[0]
    assert wrapped.fingerprint() == before != model.fingerprint() and not model.trainable()
    model.save(tmp_path)
    loaded, images = load_base(tmp_path, wrapped), pixels()
    with torch.no_grad():
        assert torch.equal(loaded(images, CLASSES), model(images, CLASSES))
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint()


def test_deep_text_prompts_are_stored_and_learn(tmp_path):
    tokenizer = models.open_clip.SimpleTokenizer(context_length=models.CONTEXT)
    wrapped, images = capt.wrap(models.clip(), tokenizer), pixels()
    model = make_base("ivlp", wrapped, BASE)
    assert {name: tuple(value.shape) for name, value in model.trainable().items()} == {
        "visual": (3, 4, 32),
        "text.context": (4, 32),
        "text.deep": (1, 4, 32),
    }
    model.losses(model.inputs(images), torch.tensor([0, 3, 1, 4]))["loss"].backward()
    assert all(value.grad.abs().sum() > 0 for value in model.trainable().values())
    model.finish().save(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_base(tmp_path, wrapped)(images, CLASSES), model(images, CLASSES))


def test_inputs_are_what_the_plain_tower_embeds():
    wrapped = backbone()
    model = make_base("ivlp", wrapped, BASE, IVLPConfig(**SMALL))
    images = pixels()
    inputs = model.inputs(images)
    assert torch.equal(inputs, wrapped.tower.embed(images)) and not inputs.requires_grad
    assert torch.equal(model.features(inputs), model.tower.project(model.tower.run(images)))
    assert torch.equal(model.frozen_features(inputs), wrapped.image_features(images))
    assert not torch.allclose(model.features(inputs), wrapped.image_features(images), atol=1e-3)


def test_without_visual_prompts_image_features_are_the_inputs():
    model = make_base("ivlp", backbone("cnn"), BASE, IVLPConfig(visual_depth=0, text_depth=1))
    assert list(model.trainable()) == ["text.context"] and model.tower is model.backbone.tower
    inputs = model.inputs(torch.randn(2, 3, 64, 64))
    assert inputs.shape == (2, model.dim) and model.features(inputs) is inputs
    model.losses(inputs, torch.tensor([0, 1]))["loss"].backward()
    assert model.text.context.grad.abs().sum() > 0


def test_convolutional_towers_are_refused_with_the_alternatives():
    with pytest.raises(CaptError, match=r"embedded-vit.*visual_depth=0"):
        make_base("ivlp", backbone("cnn"), BASE)


def test_the_adapter_works_on_a_fitted_model():
    model = make_base("ivlp", backbone(), BASE, IVLPConfig(**SMALL)).finish()
    adapter = DiffMannerAdapter.for_tower(model.tower)
    images = pixels()
    tokens = adapter.frozen_tokens(model.tower, images)
    with torch.no_grad():
        assert torch.equal(adapter.encode(model.tower, tokens), model.features(model.inputs(images)))
    adapter.encode(model.tower, tokens).square().sum().backward()
    assert adapter.weight.grad.abs().sum() > 0 and model.visual.grad is None


def test_promptsrc_losses_by_their_equations():
    wrapped = backbone()
    config = PromptSRCConfig(**SMALL, image_weight=2.0, text_weight=3.0, logit_weight=5.0)
    model = make_base("promptsrc", wrapped, BASE, config)
    images, labels = pixels(), torch.tensor([0, 3, 1, 4])
    f, f0 = (F.normalize(x, dim=-1).detach() for x in (model.tower.project(model.tower.run(images)), wrapped(images)))
    g, g0 = model.class_text_features(BASE).detach(), wrapped.class_text_features(BASE)
    p, p0 = ((wrapped.logit_scale * a @ b.T).softmax(-1).detach() for a, b in ((f, g), (f0, g0)))
    expected = {
        "ce": -p[range(4), labels].log().mean(),
        "image": 2 * (f - f0).abs().sum() / f.numel(),
        "text": 3 * (g - g0).abs().sum() / g.numel(),
        "logits": 5 * sum(p0[b, c] * math.log(p0[b, c] / p[b, c]) for b in range(4) for c in range(5)) / 20,
    }
    found = {name: value.detach() for name, value in model.losses(model.inputs(images), labels).items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss"], sum(expected.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reached", [4, 2])
def test_promptsrc_averages_the_prompts_of_its_epochs(reached):
    model = make_base("promptsrc", backbone(), BASE, PromptSRCConfig(**SMALL, mean=0.5, deviation=0.25))
    seen, weights = [], [math.exp(-0.5 * ((epoch - 2) / 1) ** 2) for epoch in range(1, reached + 1)]
    for epoch in range(1, reached + 1):
        with torch.no_grad():
            model.visual.normal_()
            model.text.context.normal_()
        seen.append({name: value.detach().clone() for name, value in model.trainable().items()})
        model.end_epoch(epoch, 4)
    assert not any("average" in name for name in model.state())
    model.finish()
    for name, value in model.state().items():
        expected = sum(w * prompts[name] for w, prompts in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(value, expected)


def test_promptsrc_can_keep_the_last_epoch():
    model = make_base("promptsrc", backbone(), BASE, PromptSRCConfig(**SMALL, deviation=0.0))
    before = model.visual.detach().clone()
    model.end_epoch(1, 2)
    assert torch.equal(model.finish().state()["visual"], before)
    with pytest.raises(CaptError, match="deviation"):
        PromptSRCConfig(deviation=-1.0)
