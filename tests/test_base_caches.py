"""Tip-Adapter and linear probe: values against plain loops, class lists, training, storage, tuning."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors, save_tensors
from capt.methods.base.linear_probe import LinearProbe, LinearProbeConfig
from capt.methods.base.registry import load_base, make_base
from capt.methods.base.tip_adapter import TipAdapter, TipAdapterConfig
from capt.training import TrainingOptions, train
from tests.tiny import CLASSES, backbone

NEW = ("zebra", "train")
MIXED = ("fox", "zebra", "cat", "train", "bus")
LABELS = torch.tensor([0, 3, 0, 5, 2, 2, 7, 1, 6, 3, 4])  # no image of "apple"


def frozen(n: int = len(LABELS), seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 48, generator=torch.Generator().manual_seed(seed))


def tip(**options) -> TipAdapter:
    model = TipAdapter(backbone(), CLASSES, TipAdapterConfig(**options))
    data = frozen()
    model.prepare(lambda rows: data[rows], LABELS)
    return model


def zero_shot_model():
    return make_base("zero-shot", backbone(), CLASSES)


def naive_cache(features: torch.Tensor, names: tuple[str, ...], alpha: float, beta: float, keys=None) -> torch.Tensor:
    keys = F.normalize(frozen(), dim=-1) if keys is None else keys
    expected = torch.zeros(len(features), len(names), dtype=torch.float64)
    for b, feature in enumerate(F.normalize(features, dim=-1).double()):
        for key, label in zip(keys.double(), LABELS.tolist(), strict=True):
            if CLASSES[label] in names:
                vote = torch.exp(-beta * (1 - feature @ key))
                expected[b, names.index(CLASSES[label])] += alpha * vote
    return expected


@pytest.mark.parametrize("names", [CLASSES, MIXED, ("wolf", "cat")])
def test_cache_logits_are_those_of_a_loop(names):
    model, queries = tip(alpha=1.7, beta=3.0), frozen(4, seed=1)
    expected = naive_cache(queries, names, 1.7, 3.0)
    torch.testing.assert_close(model.extra_logits(queries, names).double(), expected, rtol=1e-5, atol=1e-6)
    zero_shot = backbone().logit_scale * F.normalize(queries, dim=-1) @ backbone().class_text_features(names).T
    torch.testing.assert_close(model.logits(queries, names), zero_shot + expected.float(), rtol=1e-5, atol=1e-5)


def test_wholly_new_classes_and_an_empty_cache_are_zero_shot():
    queries, zero_shot = frozen(4, seed=1), zero_shot_model()
    assert tip().extra_logits(queries, NEW) is None
    assert torch.equal(tip().logits(queries, NEW), zero_shot.logits(queries, NEW))
    empty = make_base("tip-adapter", backbone(), CLASSES)
    assert torch.equal(empty.logits(queries, CLASSES), zero_shot.logits(queries, CLASSES))
    assert torch.equal(empty.logits(queries, MIXED), zero_shot.logits(queries, MIXED))


def test_a_class_without_images_gets_no_vote():
    votes = tip().extra_logits(frozen(4, seed=1), CLASSES)
    assert (votes[:, CLASSES.index("apple")] == 0).all() and (votes[:, :8] > 0).all()


def test_a_cached_image_does_not_vote_for_itself_unless_asked_to():
    model, data, positions = tip(alpha=2.0), frozen(), torch.tensor([4, 0, 10])
    found = model.logits(3 * data[positions], CLASSES)  # the length of a feature does not matter
    for row, position in enumerate(positions.tolist()):
        kept = torch.arange(len(LABELS)) != position
        rest = TipAdapter(backbone(), CLASSES, TipAdapterConfig(alpha=2.0))
        rest.prepare(lambda rows, kept=kept: data[kept][rows], LABELS[kept])
        expected = rest.logits(data[position : position + 1], CLASSES)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
    for options in ({"own_votes": True}, {"finetune": True}):  # one full vote more, exp(0) = 1
        gain = tip(alpha=2.0, **options).logits(data[positions], CLASSES) - found
        expected = 2.0 * F.one_hot(LABELS[positions], len(CLASSES)).float()
        torch.testing.assert_close(gain, expected, rtol=1e-5, atol=1e-5)


def fit(model, inputs: torch.Tensor, labels: torch.Tensor, **options) -> list[float]:
    model.train()
    return train(
        model.trainable().values(), lambda batch, _: model.losses(inputs[batch], labels[batch]), len(labels),
        TrainingOptions(**{"epochs": 8, "batch_size": 4, "warmup_epochs": 0.0} | options),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_only_fine_tuning_learns_and_it_learns_the_keys():
    plain = tip()
    assert plain.trainable() == {} and fit(plain, frozen(), LABELS) == []
    model = tip(finetune=True)
    assert set(model.trainable()) == {"keys"}
    before, queries = model.keys.detach().clone(), frozen() + 0.5 * frozen(seed=2)
    history = fit(model, queries, LABELS, lr=1e-2)
    assert history[-1] < history[0] - 0.1
    assert not torch.equal(model.keys, before) and all(p.grad is None for p in model.backbone.parameters())
    expected = naive_cache(queries, MIXED, 1.0, 5.5, model.keys.detach())
    torch.testing.assert_close(model.finish().extra_logits(queries, MIXED).double(), expected, rtol=1e-5, atol=1e-6)
    assert model.trainable() == {}


def test_tuning_finds_the_best_of_the_grid_and_is_stored(tmp_path):
    model = tip()
    queries, labels = frozen() + 0.8 * frozen(seed=3), LABELS
    found = model.tune(queries, labels)
    assert (found["alpha"], found["beta"]) == (model.config.alpha, model.config.beta)

    def accuracy(**options: float) -> float:
        return float((tip(**options).logits(queries, CLASSES).argmax(-1) == labels).double().mean())

    accuracies = {(a, b): accuracy(alpha=a, beta=b) for a in TipAdapter.ALPHAS for b in TipAdapter.BETAS}
    assert found["accuracy"] == max(accuracies.values()) == accuracies[found["alpha"], found["beta"]]
    assert found["accuracy"] > accuracies[0.0, 1.0]  # zero-shot is one of them
    model.save(tmp_path)
    assert load_base(tmp_path, backbone()).config == model.config


@pytest.mark.parametrize("labels", [torch.tensor([0, 9]), torch.tensor([-1, 0]), torch.tensor([0])])
def test_tuning_refuses_labels_that_do_not_fit(labels):
    with pytest.raises(DataError, match=r"tune: expected .* found 2 features"):
        tip().tune(frozen(2), labels)


@pytest.mark.parametrize("finetune", [False, True])
def test_the_cache_is_stored(tmp_path, finetune):
    model = tip(finetune=finetune, alpha=2.0)
    if finetune:
        fit(model, frozen(seed=2), LABELS)
    model.save(tmp_path)
    again = load_base(tmp_path, backbone())
    assert isinstance(again, TipAdapter) and again.class_names == CLASSES and again.trainable() == {}
    assert torch.equal(again.keys, model.keys) and torch.equal(again.key_labels, LABELS)
    assert torch.equal(again.logits(frozen(3, seed=4), MIXED), model.logits(frozen(3, seed=4), MIXED))
    assert again.fingerprint() == model.fingerprint()
    assert again.fingerprint() != tip(finetune=finetune, alpha=1.0).fingerprint()
    assert (tip(alpha=2.0).fingerprint() == model.fingerprint()) is not finetune


@pytest.mark.parametrize(
    "changed",
    [
        {"keys": torch.zeros(11)}, {"keys": torch.zeros(10, 48)},
        {"key_labels": torch.full((11,), 9)}, {"key_labels": torch.zeros(11)}, {"extra": torch.zeros(1)},
    ],
)  # fmt: skip
def test_a_changed_cache_is_refused(tmp_path, changed):
    tip().save(tmp_path)
    tensors = load_tensors(tmp_path / "base.safetensors")
    record = json.loads((tmp_path / "base.json").read_text())
    record["sha256"] = save_tensors(tmp_path / "base.safetensors", tensors | changed)
    (tmp_path / "base.json").write_text(json.dumps(record))
    with pytest.raises(DamagedFileError, match=r"base\.safetensors"):
        load_base(tmp_path, backbone())


# ---- linear probe ---------------------------------------------------------------------------------


def test_a_probe_started_from_texts_is_zero_shot():
    probe, zero_shot, queries = LinearProbe(backbone(), CLASSES), zero_shot_model(), frozen(3)
    for names in (CLASSES, MIXED, NEW, ("bus", "cat")):
        torch.testing.assert_close(probe.logits(queries, names), zero_shot.logits(queries, names), rtol=1e-6, atol=1e-6)
    nothing = LinearProbe(backbone(), CLASSES, LinearProbeConfig(initial="zero"))
    assert not nothing.logits(queries, CLASSES).any()
    with pytest.raises(CaptError, match="initial: expected 'text' or 'zero', found 'random'"):
        LinearProbeConfig(initial="random")


@pytest.mark.parametrize("initial", ["text", "zero"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_probe_keeps_its_rows_for_known_classes_only(tmp_path, initial, bias):
    model = LinearProbe(backbone(), CLASSES, LinearProbeConfig(initial=initial, bias=bias))
    before = model.weight.detach().clone()
    history = fit(model, frozen(), LABELS, lr=1e-2, epochs=20)
    assert history[-1] < 0.5 * history[0]
    assert set(model.trainable()) == ({"weight", "bias"} if bias else {"weight"})
    assert all(p.grad is None for p in model.backbone.parameters())
    assert not torch.allclose(model.weight.norm(dim=-1), torch.ones(len(CLASSES)), atol=1e-3)
    assert (model.weight != before).any(1).all()  # the class without images learns what it is not
    queries, names = frozen(3, seed=1), (*MIXED, "cat")
    rows = torch.stack(
        [model.weight[CLASSES.index(n)] if n in CLASSES else backbone().class_text_features([n])[0] for n in names]
    )
    offset = torch.tensor(
        [float(model.bias.detach()[CLASSES.index(n)]) if bias and n in CLASSES else 0.0 for n in names]
    )
    torch.testing.assert_close(model.class_text_features(names), rows)
    scaled = backbone().logit_scale * F.normalize(queries, dim=-1)
    torch.testing.assert_close(model.logits(queries, names), scaled @ rows.T + offset, rtol=1e-5, atol=1e-5)
    zero_shot = zero_shot_model()
    assert torch.equal(model.logits(queries, NEW), zero_shot.logits(queries, NEW))
    model.finish().save(tmp_path)
    again = load_base(tmp_path, backbone())
    assert again.config == model.config and again.fingerprint() == model.fingerprint() != zero_shot.fingerprint()
    assert torch.equal(again.logits(queries, names), model.logits(queries, names)) and again.trainable() == {}


def test_gradients_reach_rows_of_a_mixed_list():
    model = LinearProbe(backbone(), CLASSES, LinearProbeConfig(bias=True))
    model.logits(frozen(3), MIXED)[:, 0].sum().backward()
    fox = CLASSES.index("fox")
    assert model.weight.grad[fox].any() and not model.weight.grad[CLASSES.index("dog")].any()
    assert model.bias.grad.tolist() == [3.0 if row == fox else 0.0 for row in range(len(CLASSES))]
