"""PromptKD: projector, tower, loss against loops, unread labels, teachers of all sorts, storage."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional as F

from capt import DiffMannerAdapter
from capt.errors import CaptError, DamagedFileError, DataError
from capt.methods.base.model import BaseModel, ZeroShot
from capt.methods.base.promptkd import Projector, PromptKD, PromptKDConfig
from capt.methods.base.registry import load_base, make_base
from capt.methods.base.tip_adapter import TipAdapter
from capt.training import TrainingOptions, train
from tests.tiny import CLASSES, backbone

NAMES = ("fox", "zebra", "cat")


def pixels(n: int = 6, kind: str = "vit", seed: int = 0) -> torch.Tensor:
    size = backbone(kind).image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wide_teacher() -> BaseModel:
    """Another backbone with another width and a cache on top."""
    teacher = TipAdapter(backbone("vit", 32, 5), CLASSES)
    data = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    teacher.prepare(lambda rows: data[rows], torch.arange(9))
    return teacher


def student(kind: str = "vit", teacher: BaseModel | None = None, **options) -> PromptKD:
    options |= {"depth": 2, "teacher_model": "tiny"}
    return PromptKD(backbone(kind), CLASSES, PromptKDConfig(**options), teacher=teacher or wide_teacher())


def fit(model: PromptKD, inputs: torch.Tensor, **options) -> list[float]:
    model.train()
    options = {"epochs": 10, "batch_size": 4, "lr": 3e-3, "warmup_epochs": 0.0, "clip_norm": 1.0} | options
    return train(
        model.trainable().values(), lambda batch, _: model.losses(inputs[batch], None), len(inputs),
        TrainingOptions(**options), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_the_projector_has_the_published_size():
    assert sum(p.numel() for p in Projector(512, 768).parameters()) == 986_112


@pytest.mark.parametrize("kind", ["vit", "resnet", "cnn"])
def test_tower_features_and_adapter_see_the_same_student(kind):
    model, images = student(kind), pixels(4, kind)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        packed = model.inputs(images)
        features = model.features(packed)
        assert model.dim == features.shape[1] == 32 and model.tower.dim == 32
        torch.testing.assert_close(model.tower.project(model.tower.run(images)), features, rtol=1e-5, atol=1e-6)
        adapter = DiffMannerAdapter.for_tower(model.tower)
        tokens = adapter.frozen_tokens(model.tower, images)
        torch.testing.assert_close(adapter.encode_frozen(model.tower, tokens), features, rtol=1e-5, atol=1e-6)
        model.finish()
        plain = model.inputs(images)
        assert plain.shape[1] < packed.shape[1]
        assert torch.equal(model.features(plain), features)
        text = model.class_text_features(NAMES)
        assert torch.equal(text, model.teacher.class_text_features(NAMES)) and text.shape == (3, 32)
        expected = model.logit_scale * F.normalize(features, dim=-1) @ text.T
        torch.testing.assert_close(model(images, NAMES), expected)
    assert (model.visual is None) == (kind != "vit") and model.text_backbone is model.teacher.backbone
    assert len(model.tower.stages(images, [1])) == len(backbone(kind).tower.stages(images, [1]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_loss_is_that_of_a_loop_and_reads_no_label(kind, temperature):
    model, images = student(kind, temperature=temperature, weight=200.0), pixels(5, kind)
    model.train()
    inputs = model.inputs(images)
    found = {name: value.detach() for name, value in model.losses(inputs, torch.arange(5)).items()}
    own = model.logits(model.features(inputs), CLASSES).double().detach() / temperature
    its = model.teacher(model._for_teacher(images), CLASSES).double() / temperature
    total = 0.0
    for b in range(5):
        p, q = its[b].softmax(-1), own[b].softmax(-1)
        total += sum(float(p[c] * (p[c] / q[c]).log()) for c in range(len(CLASSES)))
    assert float(found["loss"]) == pytest.approx(200 * temperature**2 * total / (5 * len(CLASSES)), rel=1e-4)
    assert float(found["divergence"]) == pytest.approx(total / 5, rel=1e-4) and total > 0.1
    for labels in (torch.arange(5).flip(0), torch.full((5,), -1), None):
        assert torch.equal(model.losses(inputs, labels)["loss"], found["loss"])
    assert not PromptKD.uses_labels


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_student_comes_to_agree_with_its_teacher(kind):
    teacher = wide_teacher()
    model, images = student(kind, teacher), pixels(9, kind)
    frozen = {n: p.clone() for n, p in [*model.backbone.named_parameters(), *teacher.named_parameters()]}
    with torch.no_grad():
        inputs, its = model.inputs(images), model.teacher(model._for_teacher(images), CLASSES).softmax(-1)
        apart = (model.eval()(images).softmax(-1) - its).abs().sum(-1).mean()
    history = fit(model, inputs, epochs=30)  # nine images by four: the last batch of an epoch is one image
    names = {n.split(".")[0] for n in model.trainable()}
    assert names == ({"visual", "projector"} if kind == "vit" else {"projector"})
    assert all(p.grad is not None for p in model.trainable().values())
    with torch.no_grad():
        nearer = (model.finish()(images).softmax(-1) - its).abs().sum(-1).mean()
    assert history[-1] < 0.5 * history[0] and nearer < 0.7 * apart
    for name, value in [*model.backbone.named_parameters(), *teacher.named_parameters()]:
        assert torch.equal(value, frozen[name]) and value.grad is None


def test_a_finished_student_stands_still():
    model, images = student(), pixels()
    inputs = model.inputs(images)
    fit(model, inputs, epochs=1)
    model.finish()
    before = {name: value.clone() for name, value in model.state().items()}
    model.train()  # as a surrounding module would
    assert not model.projector.training and not model.teacher.training
    model(images)
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())
    with pytest.raises(CaptError, match="inputs were made by a finished student"):
        model.losses(model.inputs(images))


@pytest.mark.parametrize("kind", ["zero-shot", "promptsrc", "linear-probe"])
def test_a_student_and_its_teacher_are_stored_together(tmp_path, kind):
    config = make_base(kind, backbone(), CLASSES).config
    if kind == "promptsrc":
        config = type(config)(text_depth=1, visual_depth=2)
    teacher = make_base(kind, backbone(), CLASSES, config)
    with torch.no_grad():
        for parameter in teacher.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.save(tmp_path / "fitted")
    model = PromptKD(backbone(), CLASSES, PromptKDConfig(teacher=str(tmp_path / "fitted"), depth=2))
    assert model.teacher.fingerprint() == teacher.fingerprint()
    fit(model, model.inputs(pixels()), epochs=2)
    model.finish().save(tmp_path / "student")
    shutil.rmtree(tmp_path / "fitted")
    again = load_base(tmp_path / "student", backbone())
    assert isinstance(again, PromptKD) and again.config == model.config and again.trainable() == {}
    assert again.teacher.kind == kind and again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert torch.equal(again(pixels(), NAMES), model(pixels(), NAMES))
    other = PromptKD(backbone(), CLASSES, PromptKDConfig(depth=2), teacher=make_base("coop", backbone(), CLASSES))
    other.load_state_dict(model.state(), strict=False)
    assert other.fingerprint() != model.fingerprint()
    shutil.rmtree(tmp_path / "student" / "teacher")
    with pytest.raises(DataError, match=r"teacher"):
        load_base(tmp_path / "student", backbone())


def test_a_teacher_named_by_its_model_sees_images_of_its_own_kind(tmp_path):
    model = PromptKD(backbone("cnn"), CLASSES, PromptKDConfig(teacher="embedded"))
    assert isinstance(model.teacher, ZeroShot) and model.dim == 512 and model.text_backbone.name == "embedded"
    grey = torch.zeros(2, 3, 64, 64)  # mean 0.5, deviation 0.5: the middle of the range
    its = model.teacher.backbone.train_transform
    expected = ((0.5 - torch.tensor(its.mean)) / torch.tensor(its.std))[:, None, None].expand(2, 3, 224, 224)
    torch.testing.assert_close(model._for_teacher(grey), expected)
    taught = model.inputs(grey)[:, -512:]
    torch.testing.assert_close(taught, model.teacher.backbone.image_features(expected), rtol=1e-4, atol=1e-5)
    model.finish().save(tmp_path)
    again = load_base(tmp_path, backbone("cnn"))
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again(pixels(2, "cnn")), model(pixels(2, "cnn")))


def test_what_cannot_be_opened_again_is_refused(tmp_path):
    with pytest.raises(CaptError, match="teacher: its backbone 'tiny-vit' is not the student's; name it"):
        PromptKD(backbone(), CLASSES, teacher=wide_teacher())
    with pytest.raises(CaptError, match="'no-such-model' is neither"):
        PromptKD(backbone(), CLASSES, PromptKDConfig(teacher="no-such-model"))
    with pytest.raises(CaptError, match="temperature: expected more than 0, found 0"):
        PromptKDConfig(temperature=0)
    student().save(tmp_path)
    with pytest.raises((CaptError, DamagedFileError), match="tiny"):
        load_base(tmp_path, backbone())
