"""CAPT objective. Number in test names: docs/fidelity.md."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from capt.modules import ConfusionLoss

B, C, D, R = 6, 5, 12, 3


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape, D, generator=generator, dtype=dtype), dim=-1)

    labels = torch.tensor([0, 1, 2, 2, 4, 0])
    return {
        "features": unit(B),
        "text_features": unit(C),
        "labels": labels,
        "confusing": torch.randint(C, (B, 3), generator=generator),
        "logit_scale": torch.tensor(5.0, dtype=dtype),
        "representatives": unit(B, R),
        "representative_labels": torch.randint(C, (B, R), generator=generator),
        "representative_predictions": torch.randint(C, (B, R), generator=generator),
        "mask": torch.rand(B, R, generator=generator) < 0.6,
    }


def test_29_equals_a_loop_over_the_definition():
    x = inputs()
    parts = ConfusionLoss(0.7)(**x)
    logits = x["logit_scale"] * x["features"] @ x["text_features"].T
    i2t, t2i, rep = [], [], []
    for b, y in enumerate(x["labels"].tolist()):
        candidates = {y, *x["confusing"][b].tolist()}
        i2t.append(-logits[b, y] + torch.logsumexp(torch.stack([logits[b, c] for c in candidates]), 0))
        rivals = [n for n in range(B) if n == b or x["labels"][n] != y]
        t2i.append(-logits[b, y] + torch.logsumexp(logits[rivals, y], 0))
        for r in range(R):
            if x["mask"][b, r]:
                s = x["logit_scale"] * x["representatives"][b, r] @ x["text_features"].T
                t, q = x["representative_labels"][b, r], x["representative_predictions"][b, r]
                rep.append(-s[t] + torch.logaddexp(s[t], s[q]))
    means = [torch.stack(values).mean() for values in (i2t, t2i, rep)]
    for found, expected in zip((parts.image_to_text, parts.text_to_image, parts.representatives), means, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)
    confusion = 0.5 * (means[0] + means[1]) + 0.5 * means[2]
    assert torch.allclose(parts.total, parts.cross_entropy + 0.7 * confusion, atol=1e-12)


def test_29_vanishes_when_the_true_class_dominates():
    x = inputs()
    x["text_features"] = torch.eye(D, dtype=torch.float64)[:C]
    x["features"] = x["text_features"][x["labels"]]
    x["representatives"] = x["text_features"][x["representative_labels"]]
    x["mask"] &= x["representative_labels"] != x["representative_predictions"]
    x["logit_scale"] = torch.tensor(100.0, dtype=torch.float64)
    assert ConfusionLoss()(**x).total < 1e-12


def test_29_images_of_the_same_class_are_not_negatives():
    x = inputs()
    same = dict(x, labels=torch.full((B,), 2))
    assert ConfusionLoss()(**same).text_to_image == 0


def test_29_gradient_matches_finite_differences():
    x = inputs()
    features, representatives = x.pop("features").requires_grad_(), x.pop("representatives").requires_grad_()

    def total(f: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return ConfusionLoss()(f, representatives=r, **x).total

    assert torch.autograd.gradcheck(total, (features, representatives))


def test_without_representatives():
    x = inputs()
    x["mask"] = torch.zeros(B, R, dtype=torch.bool)
    parts = ConfusionLoss()(**x)
    assert parts.representatives == 0 and torch.isfinite(parts.total)
