"""CoOp: what learns, what is stored, and that nothing of it reaches the plain text tower. Numbers: docs/fidelity.md."""

from __future__ import annotations

import pytest
import torch

from capt.errors import CaptError
from capt.methods.base.coop import CoOp, CoOpConfig
from capt.methods.base.registry import load_base, make_base
from capt.training import TokenStore, TrainingOptions, train
from tests.tiny import CLASSES, backbone, data_set

BASE = CLASSES[:5]


def fitted(model, epochs=4, lr=0.05):
    """Train on the tiny images of the base classes; losses by epoch."""
    images = data_set().train
    images = images.subset([i for i, label in enumerate(images.labels) if label < len(BASE)])
    labels = torch.tensor(images.labels)
    store = TokenStore(images, model.backbone.preprocess, model.inputs)
    model.train()
    options = TrainingOptions(epochs, 8, "sgd", lr, 5e-4, clip_norm=0.0)
    history = train(
        model.trainable().values(),
        lambda batch, _: model.losses(store(batch), labels[batch]),
        len(images),
        options,
        generator=torch.Generator().manual_seed(0),
    )
    model.finish()
    return history


def test_training_lowers_the_loss_and_touches_the_context_only():
    wrapped = backbone()
    before = wrapped.fingerprint()
    model = make_base("coop", wrapped, BASE)
    assert isinstance(model, CoOp) and list(model.trainable()) == ["text.context"]
    assert model.text.context.shape == (4, 32) and model.text.deep is None
    history = fitted(model)
    assert history[-1] < 0.9 * history[0]
    assert wrapped.fingerprint() == before != model.fingerprint()
    assert not model.trainable() and all(not parameter.requires_grad for parameter in model.parameters())


def test_learned_on_five_classes_used_on_nine(tmp_path):
    model = make_base("coop", backbone(), BASE, CoOpConfig(n_ctx=16, chunk=2))
    fitted(model, epochs=1)
    assert {name: value.shape for name, value in model.state().items()} == {"text.context": (16, 32)}
    model.save(tmp_path)
    loaded = load_base(tmp_path, backbone())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = model(images, CLASSES)
        assert logits.shape == (3, len(CLASSES)) and torch.equal(loaded(images, CLASSES), logits)
        torch.testing.assert_close(loaded(images), logits[:, :5])
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint()


def test_14_prompts_never_reach_the_plain_text_tower():
    wrapped = backbone()
    texts = ["both are small animals", "one barks, the other does not"]
    plain = wrapped.text_features(texts)
    model = make_base("coop", wrapped, BASE)
    model.class_text_features(CLASSES).sum().backward()
    wrapped.text_cache.__init__()  # what is encoded now is encoded anew
    assert torch.equal(wrapped.text_features(texts), plain)
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(2))
    assert torch.equal(model.text_backbone.text_features(texts), plain)


def test_a_class_name_too_long_for_the_context_is_named():
    model = make_base("coop", backbone(), BASE, CoOpConfig(n_ctx=16))
    with pytest.raises(CaptError, match="'a cat in a very small box'"):
        model.class_text_features(["cat", "a cat in a very small box"])
