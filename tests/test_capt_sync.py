"""One training step asks the device for nothing: no value is read on the host, no shape depends on values.

Run on the CPU, where such requests show as operators. Exempt is what looks at host tensors by design: argument checks
(which skip GPU tensors), the dropout seed, and AdamW's own step counters.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from capt import CAPT, ConfusionBank
from capt._build import native
from capt.errors import NumericError
from capt.methods.capt import CAPTConfig
from capt.training import TrainingOptions, train
from capt.training.loop import LOOK
from tests.tiny import CLASSES, backbone, data_set

BY_DESIGN = ("/torch/optim/", ":_check_arguments", ":_checked", ":_seed")
#: What becomes a wait on a GPU: values read on the host, and shapes that depend on values.
WAITS = (
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "bincount", "repeat_interleave",
)  # fmt: skip


class Waited(Exception):
    """An operator that a GPU would have to be waited for."""


class NoWaiting(TorchDispatchMode):
    """Refuse such operators, wherever they do not belong to the host by design."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        masks = [index for index in args[1] if index is not None] if name.startswith(("index", "_index")) else []
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in masks)
        if name in WAITS or by_mask:
            frames = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()]
            if not any(place in frame for frame in frames for place in BY_DESIGN):
                raise Waited(f"{name} in {[frame for frame in frames if '/capt/' in frame]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def scene():
    wrapped, images = backbone("vit"), data_set().train
    bank = ConfusionBank.build(wrapped, images)
    with torch.no_grad():
        pixels = torch.stack([wrapped.preprocess(images.image(i)) for i in range(len(images))])
    return wrapped, bank, pixels, torch.from_numpy(images.labels.copy()), torch.from_numpy(images.ids.copy())


def prepared(scene, **changes):
    wrapped, bank, pixels, labels, ids = scene
    torch.manual_seed(0)
    model = CAPT(wrapped, CLASSES, config=CAPTConfig(heads=4, hidden=32, **changes), bank=bank).train()
    tokens = model.tokens(pixels)
    rows = {int(i): n for n, i in enumerate(ids)}
    stored = tokens[[rows[int(i)] for i in bank.sample_ids]]
    bank.on("cpu")  # moved once, before training

    def step(batch, generator=None):
        return model.losses(tokens[batch], labels[batch], sample_ids=ids[batch], bank_tokens=lambda rows: stored[rows])

    return model, step


def test_the_guard_notices_what_it_is_for():
    x = torch.randn(4)
    for waiting in (lambda: bool((x > 0).any()), lambda: x[x > 0], lambda: torch.unique(x), lambda: x.nonzero()):
        with pytest.raises(Waited), NoWaiting():
            waiting()


@pytest.mark.skipif(not native().loaded, reason="the reference implementations read values on the host")
@pytest.mark.parametrize(
    "changes",
    [{}, {"dynamic_alpha": True}, {"m": 2, "retrieval": "random", "key": "label"}, {"bank_shuffle": True, "k": 8},
     {"placement": "before", "adapter_mlp": True}, {"pair_texts": "random", "mgde": False}],
    ids=str,
)  # fmt: skip
def test_a_step_waits_for_nothing(scene, changes):
    model, step = prepared(scene, **changes)
    batch = torch.arange(0, 54, 4)
    with NoWaiting():
        losses = step(batch)
        losses["loss"].backward()
    assert losses["representatives"] > 0
    assert any(parameter.grad is not None for parameter in model.trainable().values())


@pytest.mark.skipif(not native().loaded, reason="the reference implementations read values on the host")
def test_the_loop_waits_once_an_epoch(scene):
    model, step = prepared(scene)

    class Count(NoWaiting):
        looks = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except Waited:
                self.looks += 1
                return func(*args, **(kwargs or {}))

    with Count() as count:
        train(model.learning_rates(), step, 54, TrainingOptions(epochs=2, batch_size=9), generator=torch.Generator())
    # tolist() of the sums, of what was not finite, of the order in which host tensors are split
    assert count.looks <= 2 * (2 * 7 + 2)


def test_absent_representatives_change_nothing(scene):
    """Encoding row 0 in place of absent ones leaves losses and gradients as if they had been left out."""
    _, _, _, labels, ids = scene
    model, _ = prepared(scene, dropout=0.0, bank_dropout=0.0, m=4)
    torch.nn.init.normal_(model.adapter.weight, std=0.05)
    bank, kept = model.bank, torch.arange(0, len(model.bank), 6)  # few enough for pairs without any
    records = (bank.features, bank.labels, bank.predictions, bank.confidences, bank.sample_ids)
    model.use_bank(ConfusionBank(*(record[kept] for record in records), CLASSES))
    tokens = model.tokens(scene[2])
    position = {int(i): n for n, i in enumerate(ids)}
    stored = tokens[[position[int(i)] for i in model.bank.sample_ids]]

    def gradients(bank_tokens):
        model.zero_grad()
        losses = model.losses(tokens[:9], labels[:9], sample_ids=ids[:9], bank_tokens=bank_tokens)
        losses["loss"].backward()
        return losses, model.adapter.weight.grad.clone()

    output = model(tokens[:9], sample_ids=ids[:9], bank_tokens=lambda rows: stored[rows])
    assert not output.sample.mask.all() and output.sample.mask.any()
    used = output.sample.rows[output.sample.mask].unique()
    poisoned = stored.clone()
    unused = torch.ones(len(stored), dtype=torch.bool)
    unused[used] = False
    assert unused.any()
    poisoned[unused] = 1e3 * torch.randn_like(poisoned[unused])
    (first, wanted), (second, found) = (gradients(lambda rows, s=s: s[rows]) for s in (stored, poisoned))
    assert torch.equal(first["loss"], second["loss"]) and torch.allclose(found, wanted, atol=1e-6)
    masked = F.normalize(output.sample.representatives[output.sample.mask], dim=-1)
    assert torch.isfinite(masked).all() and (output.sample.representatives[~output.sample.mask] == 0).all()


@pytest.mark.parametrize("bad_step", [1, 3, LOOK + 2])
def test_a_loss_that_is_not_finite_is_named_and_ends_training(bad_step, tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    steps = 0

    def step(batch, generator):
        nonlocal steps
        steps += 1
        broken = weight.sum() * (float("nan") if steps == bad_step else 1.0)
        return {"loss": weight.square().sum() + broken, "fine": torch.zeros(()), "broken": broken}

    n = 2 * LOOK
    with pytest.raises(NumericError, match=rf"loss, broken, the gradient became .* in epoch 1, step {bad_step};"):
        train([weight], step, n, TrainingOptions(epochs=3, batch_size=1), generator=torch.Generator(),
              metrics_path=tmp_path / "metrics.jsonl")  # fmt: skip
    assert steps <= LOOK * (1 + (bad_step - 1) // LOOK)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_gradient_that_is_not_finite_ends_training_even_in_the_last_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(NumericError, match="the gradient became"):
        train(
            [weight],
            lambda *_: {"loss": weight.sqrt().sum()},
            1,
            TrainingOptions(epochs=1),
            generator=torch.Generator(),
        )
