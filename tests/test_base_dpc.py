"""DPC-style baseline: its choice of negatives against a loop, loss, decoupled evaluation, storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError
from capt.methods.base.dpc import DPCConfig, DPCStyle
from capt.methods.base.model import ZeroShot
from capt.methods.base.registry import load_base, make_base
from capt.training import TrainingOptions, train
from tests.tiny import CLASSES, backbone

NEW = ("zebra", "train")
MIXED = ("fox", "zebra", "cat")
LABELS = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7])  # no image of "apple"


def pixels(n: int = len(LABELS), kind: str = "vit", seed: int = 0) -> torch.Tensor:
    size = backbone(kind).image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def dpc(kind: str = "vit", labels: torch.Tensor = LABELS, classes=CLASSES, **options) -> tuple[DPCStyle, torch.Tensor]:
    """A model and the inputs of its training images."""
    model = DPCStyle(backbone(kind), classes, DPCConfig(**{"text_depth": 1, "visual_depth": 2} | options))
    inputs = model.inputs(pixels(len(labels), kind))
    model.prepare(lambda positions: inputs[positions], labels)
    return model, inputs


def confident(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, top: int) -> list[list[int]]:
    """The classes of each image that need no drawing, by a loop."""
    used, found = set(labels.tolist()), []
    for row in logits:
        order = [c for c in row.argsort(descending=True).tolist() if counts[c] > 0][:top]
        found.append([c for c in order if c not in used])
        used |= set(found[-1])
    return found


@pytest.mark.parametrize(
    ("n_classes", "batch", "top", "least"), [(30, 4, 8, 2), (9, 6, 8, 3), (40, 1, 5, 1), (4, 3, 8, 2)]
)
def test_negatives_are_those_of_a_loop_filled_up_at_random(n_classes, batch, top, least):
    names = [f"thing {i}" for i in range(n_classes)]
    labels = torch.randint(n_classes, (3 * n_classes,))
    labels[labels == 2] = 3  # one class is empty
    model, _ = dpc(labels=labels, classes=names, top=top, least=least)
    counts = labels.bincount(minlength=n_classes)
    drawn_classes = set()
    for _ in range(30):
        own = labels[torch.randint(len(labels), (batch,))]
        logits = torch.randn(batch, n_classes)
        chosen = model.negatives(logits, own).tolist()
        expected = confident(logits, own, counts, top)
        for label, kept in zip(own.tolist(), expected, strict=True):
            assert chosen[: len(kept)] == kept
            others = int((counts > 0).sum()) - 1
            missing = max(0, min(least, others) - len(kept))
            drawn, chosen = chosen[len(kept) : len(kept) + missing], chosen[len(kept) + missing :]
            assert len(set(drawn)) == missing and label not in drawn and not set(drawn) & set(kept)
            assert all(counts[c] > 0 for c in drawn)
            drawn_classes |= set(drawn)
            free = set(counts.nonzero().flatten().tolist()) - set(own.tolist()) - {c for row in expected for c in row}
            assert len(free & set(drawn)) == min(len(free), missing)  # unused classes go first
        assert chosen == []
    assert len(drawn_classes) > 1 or n_classes == 40


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_the_loss_is_symmetric_over_images_and_one_of_each_negative_class(kind, monkeypatch):
    model, inputs = dpc(kind)
    seen: list[torch.Tensor] = []
    stored = model._stored
    monkeypatch.setattr(model, "_stored", lambda positions: (seen.append(positions), stored(positions))[1])
    batch = torch.tensor([0, 4, 9])
    losses = model.losses(inputs[batch], LABELS[batch])
    everything = torch.cat([batch, seen[0]])
    assert len(seen) == 1 and len(seen[0]) >= 4  # two a picture while classes last
    labels = LABELS[everything]
    with torch.no_grad():
        x = F.normalize(model.features(inputs[everything]), dim=-1).double()
        texts = model.class_text_features(CLASSES).double()
    logits = float(model.logit_scale) * x @ torch.stack([texts[label] for label in labels]).T
    rows = -sum(float(logits[i].log_softmax(0)[i]) for i in range(len(labels))) / len(labels)
    columns = -sum(float(logits[:, i].log_softmax(0)[i]) for i in range(len(labels))) / len(labels)
    found = {name: float(value.detach()) for name, value in losses.items()}
    assert found["loss"] == pytest.approx((rows + columns) / 2, rel=1e-4)
    assert (found["image_to_text"], found["text_to_image"]) == pytest.approx((rows, columns), rel=1e-4)


def test_every_image_of_a_class_can_be_its_negative():
    model, inputs = dpc(top=1, least=1)
    seen: set[int] = set()
    model._stored = lambda positions: (seen.update(positions.tolist()), inputs[positions])[1]
    for _ in range(60):
        model.losses(inputs[2:4], LABELS[2:4])
    assert {9, 10} <= seen and seen <= set(range(len(LABELS))) - {2, 3}


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_training_moves_prompts_alone(kind):
    model, inputs = dpc(kind)
    assert set(model.trainable()) == ({"visual", "text.context"} if kind == "vit" else {"text.context"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    history = train(
        model.trainable().values(), lambda batch, _: model.losses(inputs[batch], LABELS[batch]), len(LABELS),
        TrainingOptions(epochs=12, batch_size=4, lr=5e-3, warmup_epochs=0.0),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert sum(history[-3:]) < 0.95 * sum(history[:3])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is (name not in model.trainable())


def test_deep_prompts_in_both_towers_where_they_fit():
    kept = DPCStyle(backbone(), CLASSES, DPCConfig())
    assert kept.config.visual_depth == 9 and len(kept.visual) == 3
    cut = DPCStyle(backbone("resnet"), CLASSES, DPCConfig())
    assert cut.visual is None and cut.config.visual_depth == 0 and cut.config.text_depth == 9


def test_released_noise_drowns_the_texts():
    model = DPCStyle(backbone("vit", 768), CLASSES, DPCConfig(random_text_noise=True, visual_depth=1, text_depth=1))
    inputs = model.inputs(pixels())
    model.prepare(lambda positions: inputs[positions], LABELS)
    noise = model.noise(2000)
    assert model._centres.shape == (5, 768) and noise.shape == (2000, 768)
    assert 6.0 < float(noise.norm(dim=-1).mean()) < 7.0
    # Affine in five centres: six directions and no more.
    assert torch.linalg.matrix_rank(noise, rtol=1e-4) == 6
    assert not torch.equal(noise, model.noise(2000))


def test_noise_is_added_to_the_texts_of_a_step_and_to_nothing_else(monkeypatch):
    model, inputs = dpc(random_text_noise=True)

    def loss() -> float:
        torch.manual_seed(0)
        return float(model.losses(inputs[:3], LABELS[:3])["loss"].detach())

    loud = loss()
    assert loud == loss()
    monkeypatch.setattr(model, "noise", lambda rows: torch.zeros(rows, 48))
    without = loss()
    model.config = replace(model.config, random_text_noise=False)
    assert without == loss() != pytest.approx(loud, rel=1e-2)


def test_new_classes_are_judged_by_the_untuned_model(tmp_path):
    model, images = dpc()[0], pixels(3, seed=1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn_like(parameter))
        model.finish()
        zero_shot = make_base("zero-shot", backbone(), CLASSES)
        # Two models hold two copies of their texts: products may differ in the last bit.
        torch.testing.assert_close(model(images, NEW), zero_shot(images, NEW), rtol=1e-6, atol=1e-6)
        assert isinstance(model.for_classes(NEW), ZeroShot) and model.for_classes(MIXED) is model
        torch.testing.assert_close(
            model.class_text_features(NEW),
            backbone().class_text_features(NEW),
            rtol=1e-6,
            atol=1e-6,
        )
        for names in (CLASSES, MIXED):
            tuned = F.normalize(model.features(model.inputs(images)), dim=-1)
            expected = model.logit_scale * tuned @ model.text(backbone(), names).T
            torch.testing.assert_close(model(images, names), expected)
            assert (model(images, names) - zero_shot(images, names)).abs().max() > 0.1
        model.save(tmp_path)
        again = load_base(tmp_path, backbone())
        assert isinstance(again, DPCStyle) and again.config == model.config and again.trainable() == {}
        assert again.fingerprint() == model.fingerprint() != zero_shot.fingerprint()
        for names in (CLASSES, MIXED, NEW):
            assert torch.equal(again(images, names), model(images, names))


def test_what_cannot_be_is_refused_and_a_lone_class_is_no_error():
    with pytest.raises(CaptError, match="dpc: top, least and centres must be at least 1, found 8, 0, 5"):
        DPCConfig(least=0)
    model = DPCStyle(backbone(), CLASSES, DPCConfig(text_depth=1))
    with pytest.raises(CaptError, match="losses: call prepare"):
        model.losses(model.inputs(pixels(2)), LABELS[:2])
    alone, inputs = dpc(labels=torch.zeros(4, dtype=torch.int64))
    assert torch.isfinite(alone.losses(inputs[:2], torch.zeros(2, dtype=torch.int64))["loss"])
