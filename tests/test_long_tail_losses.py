"""Long-tail losses against their definitions, entry by entry (behaviour 24), and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from capt import ops
from capt.errors import CaptError
from capt.modules.long_tail_losses import LOSSES, AsymmetricLoss, BinaryCrossEntropy, FocalLoss, long_tail_loss

FREQUENCY, N_IMAGES = torch.tensor([60, 20, 4]), 100
LOGITS = torch.tensor([[0.4, -1.2, 2.0], [-0.3, 0.9, -2.5]])
TARGETS = torch.tensor([[1, 0, 1], [0, 0, 0]])  # the second image has no positive
COCO = {"name": "COCO-LT", "scale": 2.0, "mu": 0.2}
VOC = {"name": "VOC-LT", "scale": 5.0, "mu": 0.3}


def by_hand(name: str, scale: float, mu: float, scalar: bool = False) -> float:
    """The definitions for the 2x3 example, one entry at a time."""
    weighted, plain = [], []
    for s_row, y_row in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True):
        rarity = sum(y / n for y, n in zip(y_row, FREQUENCY.tolist(), strict=True))
        for s, y, n in zip(s_row, y_row, FREQUENCY.tolist(), strict=True):
            z = s - 0.05 / scale * math.log(N_IMAGES / n - 1)
            entropy = math.log1p(math.exp(-z)) if y else math.log1p(math.exp(scale * z))
            weight = 1.0 if y else 1 / scale
            if name == "class-balanced":
                weight *= (1 - 0.9) / (1 - 0.9**n)
            elif name.startswith("distribution-balanced"):
                r = 1 / n / rarity if rarity else math.inf
                weight *= 0.1 + (1 / (1 + math.exp(-10 * (r - mu))) if rarity else 1.0)
            factor = 1.0 if name.endswith("0fl") or scalar else 2 * (1 - math.exp(-entropy)) ** 2
            weighted.append(factor * weight * entropy)
            plain.append(entropy)
    mean = sum(weighted) / 6
    if scalar:
        mean *= 2 * (1 - math.exp(-sum(plain) / 6)) ** 2
    return {"class-balanced": 10.0, "distribution-balanced-0fl": 0.5}.get(name, 1.0) * mean


RE_WEIGHTED = ["focal", "class-balanced", "distribution-balanced", "distribution-balanced-0fl"]


@pytest.mark.parametrize("name", RE_WEIGHTED)
@pytest.mark.parametrize("preset", [COCO, VOC], ids=lambda preset: preset["name"])
def test_24_re_weighted_losses_by_hand(name, preset):
    options = {"negative_scale": preset["scale"]}
    if name.startswith("distribution"):
        options["mu"] = preset["mu"]
    loss = long_tail_loss(name, FREQUENCY, N_IMAGES, **options)
    want = by_hand(name, preset["scale"], preset["mu"])
    for targets in (TARGETS, TARGETS.bool(), TARGETS.to(torch.uint8), TARGETS.double()):
        assert loss(LOGITS, targets).item() == pytest.approx(want, rel=1e-6)
    assert loss(LOGITS.double(), TARGETS).item() == pytest.approx(want, rel=1e-12)
    assert loss(LOGITS.half(), TARGETS).dtype == torch.float32


def test_24_binary_cross_entropy_is_the_multi_label_soft_margin_loss():
    found = BinaryCrossEntropy()(LOGITS, TARGETS)
    torch.testing.assert_close(found, F.multilabel_soft_margin_loss(LOGITS, TARGETS))
    entries = zip(LOGITS.flatten().tolist(), TARGETS.flatten().tolist(), strict=True)
    by_entry = [math.log1p(math.exp(-s if y else s)) for s, y in entries]
    assert found.item() == pytest.approx(sum(by_entry) / 6, rel=1e-6)


def test_24_an_image_without_positives_has_weight_1_1_and_the_focal_factor_is_per_element():
    loss = long_tail_loss("distribution-balanced", FREQUENCY, N_IMAGES)
    weight = loss.weight(TARGETS.double())
    torch.testing.assert_close(weight[1], torch.full((3,), 1.1).double())
    assert weight[0, 2] > weight[0, 0]  # of two positives the rarer weighs more
    plain = FocalLoss(FREQUENCY, N_IMAGES)
    each = torch.stack([plain(LOGITS[:1, [c] * 3], TARGETS[:1, [c] * 3]) for c in range(3)])
    assert each.std() > 0.1


@pytest.mark.parametrize("name", ["focal", "class-balanced", "distribution-balanced"])
def test_24_one_focal_factor_a_batch_is_another_loss(name):
    options = {"batch_scalar_focal": True}
    found = long_tail_loss(name, FREQUENCY, N_IMAGES, **options)(LOGITS, TARGETS).item()
    assert found == pytest.approx(by_hand(name, 2.0, 0.2, scalar=True), rel=1e-6)
    assert abs(found / by_hand(name, 2.0, 0.2) - 1) > 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_logits_are_not_changed_and_gradients_are_finite(name):
    loss = long_tail_loss(name, FREQUENCY, N_IMAGES)
    logits = torch.tensor([[90.0, -90.0, 0.0], [-90.0, 90.0, 3.0]], requires_grad=True)
    before = logits.detach().clone()
    value = loss(logits, TARGETS)
    value.backward()
    assert value.shape == () and value.isfinite() and logits.grad.isfinite().all()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("name", RE_WEIGHTED)
def test_gradients_are_those_of_finite_differences(name):
    loss = long_tail_loss(name, FREQUENCY, N_IMAGES)
    assert torch.autograd.gradcheck(lambda x: loss(x, TARGETS), (LOGITS.double().requires_grad_(),))


def test_the_asymmetric_loss_takes_the_op():
    assert torch.equal(AsymmetricLoss()(LOGITS, TARGETS), ops.asymmetric_loss(LOGITS, TARGETS))
    changed = AsymmetricLoss(gamma_pos=1.0, gamma_neg=2.0, margin=0.0, eps=0.0)(LOGITS, TARGETS)
    want = ops.asymmetric_loss(LOGITS, TARGETS, gamma_pos=1.0, gamma_neg=2.0, margin=0.0, eps=0.0)
    assert torch.equal(changed, want)


def test_losses_follow_their_module_to_another_dtype_and_hold_no_state():
    loss = long_tail_loss("distribution-balanced", FREQUENCY, N_IMAGES).float()
    assert loss.get_buffer("offset").dtype == torch.float32 and not loss.state_dict()
    assert loss(LOGITS, TARGETS).item() == pytest.approx(by_hand("distribution-balanced", 2.0, 0.2), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_tail_loss("asymetric", FREQUENCY, N_IMAGES), "no loss 'asymetric'; known are asl, bce"),
        (lambda: long_tail_loss("bce", FREQUENCY, N_IMAGES, beta=0.9), "long_tail_loss.'bce'.*beta"),
        (lambda: FocalLoss(torch.tensor([3, 0, 5]), 10), "class 1 has frequency 0"),
        (lambda: FocalLoss(torch.tensor([3, 10]), 10), "class 1 has frequency 10"),
        (lambda: FocalLoss(torch.ones(2, 2), 10), r"frequency must have shape \[C\]"),
        (lambda: FocalLoss(FREQUENCY, 100.5), "n_images must be an integer"),
        (lambda: FocalLoss(FREQUENCY, 100, negative_scale=0.0), "negative_scale must be above 0"),
        (lambda: long_tail_loss("class-balanced", FREQUENCY, 100, beta=1.0), "beta must lie in"),
        (lambda: FocalLoss(FREQUENCY, 100)(LOGITS[:, :2], TARGETS[:, :2]), r"shape \[B, 3\], found \[2, 2\]"),
        (lambda: FocalLoss(FREQUENCY, 100)(LOGITS, TARGETS[:1]), r"found \[2, 3\] and \[1, 3\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(CaptError, match=message):
        call()
