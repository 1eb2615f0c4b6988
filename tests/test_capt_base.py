"""CAPT over base models other than plain CLIP: neutrality, whose mistakes the bank may hold, storage."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt import CAPT, ConfusionBank
from capt.errors import CaptError, DamagedFileError
from capt.methods.base import registry
from capt.methods.base.model import BaseModel, ZeroShot
from capt.methods.capt import CAPTConfig
from tests.tiny import CLASSES, backbone, data_set

CONFIG = CAPTConfig(heads=4, hidden=32, views=1)
NOVEL = ["violin", "ship", "lamp"]


class Cached(BaseModel):
    """A base model with learned texts and a cache: everything that plain CLIP has not."""

    kind = "cached"

    def __init__(self, backbone, class_names, config=None) -> None:
        super().__init__(backbone, class_names, config)
        drawn = torch.randn(2, backbone.dim, generator=torch.Generator().manual_seed(3))
        self.shift, self.key = nn.Parameter(0.2 * drawn[0]), nn.Parameter(drawn[1])

    def class_text_features(self, class_names) -> Tensor:
        return F.normalize(self.backbone.class_text_features(class_names) + self.shift, dim=-1)

    def extra_logits(self, features, class_names) -> Tensor:
        affinity = F.normalize(features, dim=-1) @ self.key
        return affinity.unsqueeze(1) * torch.arange(len(class_names), dtype=torch.float32)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(registry._PLACES, "cached", (__name__, "Cached"))


def pixels(n: int = 12) -> Tensor:
    images = data_set().train
    return torch.stack([backbone().preprocess(images.image(i)) for i in range(0, 4 * n, 4)])


def bank_of(base: BaseModel) -> ConfusionBank:
    images = data_set().train
    with torch.no_grad():
        raw = base.features(base.inputs(torch.stack([base.backbone.preprocess(images.image(i)) for i in range(54)])))
        logits = base.logits(raw, CLASSES)
    return ConfusionBank.from_logits(
        F.normalize(raw, dim=-1), logits, torch.from_numpy(images.labels.copy()), torch.from_numpy(images.ids.copy()),
        CLASSES, backbone=base.fingerprint(),
    )  # fmt: skip


def trained(base: BaseModel, bank: ConfusionBank | None = None, **changes) -> CAPT:
    """CAPT with every learned tensor moved away from rest."""
    torch.manual_seed(0)
    model = CAPT(base, CLASSES, config=CAPTConfig(**{**vars(CONFIG), **changes}), bank=bank)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("names", [None, NOVEL])
@pytest.mark.parametrize("with_bank", [False, True])
def test_step_0_equals_the_tuned_base_model_bit_for_bit(names, with_bank):
    base = Cached(backbone(), CLASSES).finish()
    model = CAPT(base, CLASSES, config=CONFIG, bank=bank_of(base) if with_bank else None)
    with torch.no_grad():
        expected = base(pixels(), names)
    assert torch.equal(model.logits(pixels(), names), expected)
    assert not torch.equal(expected, ZeroShot(backbone(), CLASSES)(pixels(), names))
    assert model.base is base and model.backbone is backbone()


def test_nothing_of_the_base_model_learns_and_it_stays_in_evaluation_mode():
    base = Cached(backbone(), CLASSES)
    model = CAPT(base, CLASSES, config=CONFIG, bank=bank_of(base))
    assert {name.split(".")[0] for name in model.trainable()} == {"sample", "mgde"}
    before = {name: value.clone() for name, value in base.state().items()}
    model.train()
    assert not base.training
    output = model.losses(model.tokens(pixels()), torch.arange(12) % 9, bank_tokens=None, sample_ids=torch.arange(12))
    output["loss"].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state().items())


def test_the_bank_must_hold_the_base_models_own_mistakes_unless_a_source_is_named(tmp_path):
    base = Cached(backbone(), CLASSES)
    others = bank_of(ZeroShot(backbone(), CLASSES))
    with pytest.raises(CaptError, match="bank_source"):
        CAPT(base, CLASSES, config=CONFIG, bank=others)
    config = CAPTConfig(**{**vars(CONFIG), "bank_source": "zero-shot"})
    CAPT(base, CLASSES, config=config, bank=others).save(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["bank_source"] == "zero-shot"
    assert len(CAPT.load(tmp_path, base).bank) == len(others)


def test_a_model_is_read_with_its_base_or_with_the_backbone_alone(tmp_path):
    base = Cached(backbone(), CLASSES)
    model = trained(base, bank_of(base))
    model.save(tmp_path)
    expected = model.logits(pixels())
    assert (tmp_path / "base" / "base.json").is_file()
    assert json.loads((tmp_path / "state.json").read_text())["base"]["kind"] == "cached"
    for given in (base, backbone()):
        found = CAPT.load(tmp_path, given)
        assert found.base.kind == "cached" and torch.equal(found.logits(pixels()), expected)
    changed = Cached(backbone(), CLASSES)
    changed.key.data.add_(1)
    for wrong in (changed, ZeroShot(backbone(), CLASSES)):
        with pytest.raises(CaptError, match="base model"):
            CAPT.load(tmp_path, wrong)
    (tmp_path / "base" / "base.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError):
        CAPT.load(tmp_path, backbone())


def test_a_backbone_is_zero_shot_and_leaves_no_base_folder(tmp_path):
    model = trained(backbone())
    assert model.base.kind == "zero-shot"
    model.save(tmp_path)
    assert not (tmp_path / "base").exists()
    assert torch.equal(CAPT.load(tmp_path, backbone()).logits(pixels()), model.logits(pixels()))


def test_kept_base_features_change_nothing():
    model = trained(Cached(backbone(), CLASSES))
    tokens = model.tokens(pixels())
    kept = model.base_features(tokens)
    assert torch.equal(model(tokens, base_features=kept).logits, model(tokens).logits)
