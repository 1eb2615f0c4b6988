"""MSCI as a model: logits, losses, scores, what learns and what does not, on a tiny tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError
from capt.evaluation import pair_scores
from capt.methods.compositional.model import PairTexts, View
from capt.methods.compositional.scoring import IMAGES, closed_world, encode_pairs, open_world, rows, score
from capt.methods.msci import MSCI
from capt.methods.msci_config import MSCIConfig
from tests.tiny import OBJECTS, STATES, backbone, compositional_set

DATA = compositional_set()
TRAIN = torch.from_numpy(DATA.pairs[DATA.split_pairs["train"]])
EVERY = torch.cartesian_prod(torch.arange(3), torch.arange(3))


def model(kind: str = "vit", **settings: Any) -> MSCI:
    """A model whose zero-initialised parts are not zero."""
    torch.manual_seed(3)
    dim = 48 if kind == "vit" else 24
    made = MSCI(
        backbone(kind, dim), STATES, OBJECTS, TRAIN, MSCIConfig(**{"n_heads": 4, "n_low": 1, "n_high": 1} | settings)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and name.endswith(("up.weight", "gate.weight")):
                parameter.normal_(std=0.3)
    return made.eval()


def pixels(n: int, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def branches(one: MSCI, inputs: Tensor, pairs: Tensor = EVERY) -> tuple[View, PairTexts, list[Tensor]]:
    with torch.no_grad():
        view, texts = one.look(inputs), one.texts(pairs)
        return (
            view,
            texts,
            [one.branch_logits(view, vector, prompts) for vector, prompts in zip(view[:3], texts[:3], strict=True)],
        )


# ---- logits ----------------------------------------------------------------------------------------------


def test_01_the_image_side_of_a_fresh_model_is_plain_clip():
    fresh = MSCI(backbone(), STATES, OBJECTS, TRAIN).eval()
    expected = F.normalize(backbone().image_features(pixels(3)), dim=-1)
    torch.testing.assert_close(fresh.look(fresh.inputs(pixels(3))).pair, expected, rtol=1e-5, atol=1e-5)


def test_02_one_layer_goes_to_the_stage_as_it_is_and_several_through_an_aggregator():
    assert not list(model(n_low=1).stage_low.aggregator.parameters())
    assert model(n_low=2).stage_low.aggregator.linear.in_features == 2 * backbone().dim
    assert model("cnn", n_low=2).stage_low.aggregator.linear.out_features == 24


def test_06_stage_chaining_the_high_stage_reads_what_the_low_stage_gave():
    serial, parallel = model(), model(stages="parallel")
    parallel.load_state_dict(serial.state_dict())
    keys, texts = serial.look(serial.inputs(pixels(2))).keys, F.normalize(torch.randn(5, 48), dim=-1)
    low = serial.stage_low(texts, keys.low)
    weights = serial.fusion.low, serial.fusion.high
    expected = [texts + weights[0] * low + weights[1] * serial.stage_high(query, keys.high) for query in (low, texts)]
    torch.testing.assert_close(serial.interact(texts, keys), expected[0])
    torch.testing.assert_close(parallel.interact(texts, keys), expected[1])
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    with torch.no_grad():
        for part in (serial.stage_high.layers[0].out, serial.stage_high.layers[0].w_out):
            part.weight.zero_(), part.bias.zero_()
    torch.testing.assert_close(serial.stage_high(low, keys.high), low)  # q2 = q1


@pytest.mark.parametrize("stages", ["low", "high", "none"])
def test_a_stage_left_out_leaves_its_layers_keys_and_lambda_out(stages):
    one = model(stages=stages)
    view, texts, logits = branches(one, one.inputs(pixels(2)))
    used = {"low": stages == "low", "high": stages == "high"}
    for name, there in used.items():
        parts = getattr(one, f"stage_{name}"), getattr(one.fusion, name), getattr(view.keys, name)
        assert [part is not None for part in parts] == [there] * 3
    assert [tuple(part.shape) for part in logits] == [(2, 9), (2, 3), (2, 3)]
    if stages == "none":
        torch.testing.assert_close(logits[0], backbone().logit_scale * view.pair @ texts.pair.T)


def test_08_without_lambdas_logits_are_plain_scaled_cosines():
    one = model(fusion_init=0.0)
    view, texts, logits = branches(one, one.inputs(pixels(3)))
    for vector, prompts, found in zip(view[:3], texts[:3], logits, strict=True):
        torch.testing.assert_close(found, backbone().logit_scale * vector @ prompts.T, rtol=1e-4, atol=1e-4)


def test_08_the_length_of_the_fused_prompt_does_not_matter(monkeypatch):
    one = model()
    inputs = one.inputs(pixels(3))
    expected = branches(one, inputs)[2]
    interact = one.interact
    monkeypatch.setattr(one, "interact", lambda texts, keys: 7.5 * interact(texts, keys))
    for found, wanted in zip(branches(one, inputs)[2], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, size", [("vit", 32), ("resnet", 64), ("cnn", 64)])
def test_09_images_one_by_one_score_as_they_do_together(kind, size):
    one = model(kind)
    images = pixels(3, size)
    together = branches(one, one.inputs(images))[2]
    for index in range(len(images)):
        alone = branches(one, one.inputs(images[index : index + 1]))[2]
        for found, wanted in zip(alone, together, strict=True):
            torch.testing.assert_close(found[0], wanted[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 100])
def test_09_pairs_in_chunks_of_any_size_score_as_they_do_at_once(chunk):
    one = model(pair_chunk=chunk, text_chunk=chunk)
    view, texts, logits = branches(one, one.inputs(pixels(3)))
    spans = list(one.pair_scores(view, texts))
    assert [start for start, _ in spans] == list(range(0, 9, chunk))
    assert max(part.shape[1] for _, part in spans) <= chunk
    torch.testing.assert_close(torch.cat([part for _, part in spans], 1), logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], branches(model(), one.inputs(pixels(3)))[2][0], rtol=1e-4, atol=1e-4)


def test_12_a_zero_visual_vector_gives_finite_logits_and_gradients():
    """The published code divides by the norm alone (its item 20)."""
    one = model().train()
    with torch.no_grad():
        one.disentangle_state.norm.bias.fill_(-100.0)
    loss = one.losses(one.inputs(pixels(4)), torch.tensor([0, 1, 2, 3]), torch.Generator())["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in one.trainable().values())
    view = one.eval().look(one.inputs(pixels(2)))
    assert not view.state.any() and one.branch_logits(view, view.state, one.texts(EVERY).state).isfinite().all()


def test_a_single_candidate_pair_is_scored_like_among_others():
    """The published code squeezes it away (its item 20)."""
    one = model()
    inputs = one.inputs(pixels(2))
    alone = branches(one, inputs, EVERY[4:5])[2]
    assert alone[0].shape == (2, 1)
    torch.testing.assert_close(alone[0], branches(one, inputs)[2][0][:, 4:5], rtol=1e-4, atol=1e-4)


# ---- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("vit", {}), ("cnn", {}), ("resnet", {"stages": "parallel"}), ("vit", {"fusion": "dynamic", "stage_layers": 2}),
        ("vit", {"stages": "low"}), ("vit", {"stages": "high"}), ("vit", {"stages": "none"}),
        ("vit", {"n_low": 2, "text_chunk": 2, "pairs_per_step": 2}),
    ],
)  # fmt: skip
def test_10_gradients_reach_everything_that_learns_and_nothing_that_is_frozen(kind, settings):
    one = model(kind, **settings).train()
    before = {name: value.clone() for name, value in one.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(one.trainable().values(), lr=0.1)
    one.losses(one.inputs(pixels(6, 32 if kind == "vit" else 64)), torch.arange(6) % 5, torch.Generator())[
        "loss"
    ].backward()
    names = {name for name, parameter in one.trainable().items() if parameter.grad is None or not parameter.grad.any()}
    assert not names
    assert {"prompts.table", "prompts.contexts"} < one.trainable().keys()
    assert not any(name.startswith("backbone") for name in one.trainable())
    if settings.get("stages") is None:
        assert {"fusion.low", "fusion.high"} < one.trainable().keys()
    optimizer.step()
    for name, value in one.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in one.backbone.parameters())


def test_10_the_trained_tensors_are_those_of_the_specification():
    one = model(n_low=2, n_high=1)
    dim, width, low, hidden = 48, 32, 2 * 48, 4 * 48
    stage = 2 * dim + 4 * dim * dim + dim + 2 * dim + 2 * dim * hidden + hidden + dim
    expected = {
        "tap": 2 * 3 * (2 * 64 * 48 + 64 + 48),
        "prompts": 6 * width + 3 * 3 * width,
        "disentangle_state": dim * dim + dim + 2 * dim,
        "disentangle_object": dim * dim + dim + 2 * dim,
        "stage_low": stage + low * dim + dim + 2 * dim,
        "stage_high": stage,
        "fusion": 2 * dim,
    }
    found: dict[str, int] = {}
    for name, parameter in one.trainable().items():
        part = name.split(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    assert found == expected


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.1, 0.1), (0.0, 2.0, 0.0)])
def test_13_the_loss_is_the_weighted_sum_of_three_cross_entropies(weights):
    one, labels = model(loss_weights=weights), torch.tensor([4, 0, 2, 2])
    inputs = one.inputs(pixels(4))
    found = one.losses(inputs, labels, torch.Generator())
    logits = branches(one, inputs, TRAIN)[2]
    answers = labels, TRAIN[labels, 0], TRAIN[labels, 1]
    expected = [
        -part.log_softmax(1)[torch.arange(4), answer].mean() for part, answer in zip(logits, answers, strict=True)
    ]
    for name, part in zip(("pair", "state", "object"), expected, strict=True):
        torch.testing.assert_close(found[name], part, rtol=1e-4, atol=1e-4)
    total = sum(weight * part for weight, part in zip(weights, expected, strict=True))
    torch.testing.assert_close(found["loss"], total, rtol=1e-4, atol=1e-4)


def test_a_step_can_compare_with_some_of_the_training_pairs_and_always_with_its_own():
    one, generator = model(pairs_per_step=2), torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(20):
        chosen, places = one._candidates(labels := torch.tensor([4, 1, 4]), generator)
        assert torch.equal(chosen[places], labels) and torch.equal(chosen, chosen.unique())
        sizes.add(len(chosen))
    assert sizes == {2, 3, 4}
    chosen, places = model(pairs_per_step=5)._candidates(labels, generator)
    assert chosen.tolist() == [0, 1, 2, 3, 4] and torch.equal(places, labels)


def test_an_autocast_step_learns_and_keeps_logits_in_single_precision():
    one = model().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = one.losses(one.inputs(pixels(4)), torch.arange(4), torch.Generator())["loss"]
        view, texts = one.look(one.inputs(pixels(2))), one.texts(EVERY)
        assert {part.dtype for _, part in one.pair_scores(view, texts)} == {torch.float32}
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in one.trainable().values())


def test_the_backbone_stays_in_evaluation_mode_while_the_rest_trains():
    one = model().train()
    assert one.training and one.disentangle_state.training and not one.backbone.model.training
    assert not one.eval().tap.training


def test_every_tensor_of_the_model_moves_with_it():
    def loose(value: Any) -> bool:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return isinstance(value, Tensor) or any(loose(part) for part in parts)

    for kind in ("vit", "cnn"):
        one = model(kind)
        own = [module for name, module in one.named_modules() if not name.startswith("backbone")]
        registered = {"_parameters", "_buffers", "_modules"}
        assert not [
            (type(module).__name__, name) for module in own for name, value in vars(module).items()
            if name not in registered and loose(value)
        ]  # fmt: skip


# ---- scores ----------------------------------------------------------------------------------------------


def by_loop(logits: list[Tensor], weights: tuple[float, float, float], copies: int = 1) -> Tensor:
    """Scores pair after pair, over a softmax in which every primitive stands ``copies`` times."""
    pair, state, thing = logits
    found = torch.zeros_like(pair)
    state, thing = (part.repeat(1, copies).softmax(1) for part in (state, thing))
    for column, (s, o) in enumerate(EVERY.tolist()):
        first = weights[1] * state[:, s] if weights[1] else 1.0
        second = weights[2] * thing[:, o] if weights[2] else 1.0
        found[:, column] = weights[0] * pair[:, column] + first * second
    return found


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.9, 0.9), (0.3, 0, 0.7), (1, 0.5, 0), (1, 0, 0)])
def test_16_scores_equal_a_loop_over_pairs_and_a_weight_of_zero_is_a_factor_of_one(weights):
    one = model(score_weights=weights, pair_chunk=4)
    view, texts, logits = branches(one, one.inputs(pixels(3)))
    factors = one.primitives(view, texts)
    weighted = torch.cat([part for _, part in one.pair_scores(view, texts)], 1)
    torch.testing.assert_close(pair_scores(weighted, EVERY, factors), by_loop(logits, weights), rtol=1e-4, atol=1e-4)


def test_17_the_released_profile_divides_primitives_by_the_square_of_the_chunks(monkeypatch):
    """The published test script repeats every primitive for each chunk of 1024 pairs (its item 2)."""
    clean, released = model(), model(profile="released")
    view, texts, logits = branches(clean, clean.inputs(pixels(2)))
    for n_pairs, copies in ((9, 1), (1024, 1), (1025, 2), (2049, 3)):
        factors = released.primitives(view, texts._replace(world=n_pairs))
        found = pair_scores(logits[0], EVERY, factors)
        torch.testing.assert_close(found, by_loop(logits, (1, 1, 1), copies), rtol=1e-5, atol=1e-5)
        term = factors.state[:, EVERY[:, 0]] * factors.object[:, EVERY[:, 1]]
        plain = clean.primitives(view, texts._replace(world=n_pairs))
        torch.testing.assert_close(term * copies**2, plain.state[:, EVERY[:, 0]] * plain.object[:, EVERY[:, 1]])


def test_17_a_part_of_a_world_remembers_how_large_the_whole_was():
    one, whole = model(), open_world(DATA, backbone())
    part = rows(encode_pairs(one, whole), whole, closed_world(DATA, "val"))
    assert part.world == 9 and len(part.pair) == 7
    torch.testing.assert_close(part.pair, encode_pairs(one, closed_world(DATA, "val")).pair, rtol=1e-4, atol=1e-5)


def test_18_scoring_changes_neither_logits_nor_texts():
    """In the published code scores overwrite the logits that the loss is computed of (its item 10)."""
    one = model(score_weights=(0.5, 2.0, 2.0))
    view, texts, logits = branches(one, one.inputs(pixels(3)))
    before = [part.clone() for part in (*logits, *texts[:3], *view[:3])]
    list(one.pair_scores(view, texts)), one.primitives(view, texts)
    score(one, texts, open_world(DATA, backbone()), lambda batch: one.inputs(pixels(3))[batch], EVERY[:3])
    assert all(torch.equal(a, b) for a, b in zip((*logits, *texts[:3], *view[:3]), before, strict=True))
    for found, wanted in zip(branches(one, one.inputs(pixels(3)))[2], logits, strict=True):
        assert torch.equal(found, wanted)


def test_32_scoring_holds_a_batch_of_images_and_a_chunk_of_pairs_at_a_time(monkeypatch):
    one, shapes = model(pair_chunk=2), []
    plain = one.branch_logits
    monkeypatch.setattr(
        one, "branch_logits", lambda *given: shapes.append(tuple((found := plain(*given)).shape)) or found
    )
    n, space = 2 * IMAGES + 3, open_world(DATA, backbone())
    inputs = one.inputs(pixels(n))
    meter = score(one, encode_pairs(one, space), space, lambda batch: inputs[batch], EVERY[torch.arange(n) % 9])
    assert max(shape[0] for shape in shapes) == IMAGES and max(shape[1] for shape in shapes) == 3
    kept = [part for batch in meter._batches for part in batch]
    assert sum(part.numel() for part in kept) == n * (2 + 2 + 2)  # score and pair of either kind, and the label


# ---- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stages": "serail"}, "stages: expected one of serial, parallel, low, high, none, found 'serail'"),
        ({"fusion": "sum"}, "fusion: expected one of static, dynamic, found 'sum'"),
        ({"fusion": "dynamic", "stages": "low"}, "weighs two stages, but stages is 'low'; use 'static'"),
        ({"profile": "published"}, "profile: expected one of clean, released"),
        ({"n_low": 0}, "n_low: expected at least 1, found 0; leave a stage out with 'stages'"),
        ({"stage_layers": 0}, "stage_layers: expected at least 1"),
        ({"adapter_width": -1}, "adapter_width: expected at least 0"),
        ({"stage_dropout": 1.0}, "stage_dropout: expected at least 0 and less than 1"),
        ({"prompt_dropout": -0.1}, "prompt_dropout: expected at least 0"),
        ({"n_heads": 0}, "n_heads: expected at least 1, found 0"),
        ({"stage_mlp": -1.0}, "stage_mlp: expected a finite number above 0"),
        ({"fusion_init": float("inf")}, "fusion_init: expected a finite number"),
        ({"loss_weights": (0, 0, 0)}, "loss_weights: expected three finite weights"),
        ({"loss_weights": (1, 1)}, "loss_weights: expected three finite weights"),
        ({"loss_weights": (1, float("nan"), 1)}, "loss_weights: expected three finite weights"),
        ({"score_weights": (0, 0, 0)}, "score_weights: expected three finite numbers >= 0, not all of them 0"),
        ({"score_weights": (1, float("nan"), 1)}, "score_weights: expected three finite numbers"),
        ({"pair_chunk": 0}, "pair_chunk: expected at least 1"),
        ({"views": -1}, "views: expected at least 0"),
        ({"pairs_per_step": -1}, "pairs_per_step: expected 0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        MSCIConfig(**values)


def test_layers_that_the_tower_does_not_have_are_refused():
    with pytest.raises(
        CaptError, match="n_low=2 and n_high=2 are 4 different layers, but this image tower has 3 blocks"
    ):
        model(n_low=2, n_high=2)
    with pytest.raises(CaptError, match="n_heads must divide the width, found 5 heads"):
        model(n_heads=5)
