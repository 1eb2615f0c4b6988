"""Every choice of CAPT's configuration: what it changes, that the model stays neutral at the start, what is refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import normalize

from capt import CAPT, ConfusionBank, DiffMannerAdapter, MultiGranularityDifferenceExpert
from capt.data.pair_texts import PairText, PairTexts
from capt.errors import CaptError, DamagedFileError
from capt.methods.capt import CAPTConfig
from capt.methods.capt_config import config_from_dict
from capt.modules import PairPrompts
from tests.tiny import CLASSES, backbone, data_set

BASE = {"heads": 4, "hidden": 32, "views": 0}
#: One line each, as an ablation table has them.
ABLATIONS = [
    {"k": 1}, {"k": 8}, {"m": 3}, {"orientation": "row"}, {"orientation": "sum"}, {"key": "label"},
    {"semantic": "commonality"}, {"semantic": "difference"}, {"semantic": "none"}, {"pair_texts": "derived"},
    {"pair_texts": "random"}, {"retrieval": "random"}, {"sample": False}, {"bank_shuffle": True},
    {"adapter": "local"}, {"adapter": "global"}, {"adapter": "none"}, {"adapter_layers": "last"},
    {"placement": "before"}, {"adapter_mlp": True}, {"placement": "before", "adapter_mlp": True},
    {"dynamic_alpha": True}, {"mgde": False}, {"experts": 4, "top_k": 1}, {"centres": 0}, {"sample_expert_init": False},
    {"shared_expert": False}, {"semantic": "none", "sample": False},
    {"semantic": "none", "sample": False, "mgde": False}, {"representative_weight": 0.0},
    {"confusion_weight": 0.0, "balance_weight": 0.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    wrapped, images = backbone("vit"), data_set().train
    with torch.no_grad():
        pixels = torch.stack([wrapped.preprocess(images.image(i)) for i in range(0, 54, 3)])
    position = {int(i): n for n, i in enumerate(images.ids)}
    bank = ConfusionBank.build(wrapped, images)
    with torch.no_grad():
        everything = torch.stack([wrapped.preprocess(images.image(i)) for i in range(54)])
    return wrapped, bank, pixels, everything, [position[int(i)] for i in bank.sample_ids]


def texts() -> PairTexts:
    pairs = {
        (CLASSES[a], CLASSES[b]): PairText(
            (f"both have part {a} and part {b}",), (f"only part {a} is round",), (f"only part {b} is long",)
        )
        for a in range(9)
        for b in range(a + 1, 9)
        if (a + b) % 3
    }
    return PairTexts("tiny", "base", CLASSES, pairs)


def model_of(scene, **changes) -> CAPT:
    torch.manual_seed(0)
    wrapped, bank, *_ = scene
    prompts = PairPrompts(texts(), wrapped, CLASSES)
    return CAPT(wrapped, CLASSES, config=CAPTConfig(**{**BASE, **changes}), bank=bank, pair_prompts=prompts)


def step(scene, model: CAPT) -> dict[str, torch.Tensor]:
    _, _, pixels, everything, stored = scene
    torch.manual_seed(1)
    tokens, kept = model.train().tokens(pixels), model.tokens(everything)[stored]
    ids = torch.arange(0, 54, 3)
    labels = torch.from_numpy(data_set().train.labels.copy())[::3]
    return model.losses(tokens, labels, bank_tokens=lambda rows: kept[rows], sample_ids=ids)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_ablation_is_neutral_at_the_start_and_learns(scene, changes, tmp_path):
    model, pixels = model_of(scene, **changes), scene[2]
    with torch.no_grad():
        features = normalize(scene[0].image_features(pixels), dim=-1)
        expected = scene[0].logit_scale * features @ scene[0].class_text_features(CLASSES).T
    assert torch.equal(model.logits(pixels), expected)
    losses = step(scene, model)
    losses["loss"].backward()
    learning = {name for name, p in model.trainable().items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert torch.isfinite(losses["loss"]) and learning
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    moved = model.logits(pixels)
    assert torch.isfinite(moved).all()
    # With nothing but beta left there is nothing that can move the feature.
    assert torch.equal(moved, expected) == (set(model.trainable()) == {"mgde.beta"})
    model.save(tmp_path)
    assert torch.equal(CAPT.load(tmp_path, scene[0]).logits(pixels), moved)


def test_each_choice_changes_what_is_learned(scene):
    """After one step from the same start no two of these choices have the same losses."""
    seen = {}
    for changes in [{}, *ABLATIONS[:17]]:
        model = model_of(scene, **changes)
        with torch.no_grad():
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if name.startswith(("mgde.beta", "mgde.attention_gain")):
                    parameter.fill_(0.5)
                if name == "sample.adapter.weight":
                    parameter.normal_(std=0.05)
        seen[str(changes)] = round(float(step(scene, model)["loss"].detach()), 6)
    # 'global' is the frozen tower: the kernels that this test sets are not used, as with 'none'.
    assert seen.pop("{'adapter': 'none'}", None) in (None, seen["{'adapter': 'global'}"])
    # The random tower predicts so few classes that its counts are the same either way.
    same = {value for value in seen.values() if list(seen.values()).count(value) > 1}
    assert not {name for name, value in seen.items() if value in same} - {
        "{}", "{'orientation': 'row'}", "{'orientation': 'sum'}"
    }  # fmt: skip


def test_21_parameter_counts_with_the_second_convolution():
    assert sum(p.numel() for p in DiffMannerAdapter(768, 12, hidden=3072).parameters()) == 414_720
    assert sum(p.numel() for p in DiffMannerAdapter(768, 12).parameters()) == 82_944
    assert sum(p.numel() for p in DiffMannerAdapter(768, 1).parameters()) == 6_912


def test_placement_before_equals_the_formula(scene):
    """x + MHSA(u + alpha conv(u)) with u = LN(x), and the second convolution in front of the activation."""
    tower, pixels = scene[0].tower, scene[2]
    adapter = DiffMannerAdapter.for_tower(tower, placement="before", mlp=True, alpha=0.7)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        tokens = wanted = adapter.frozen_tokens(tower, pixels)
        for layer, block in enumerate(tower.blocks):
            inner, mlp = block.block, block.block.mlp
            u = adapter(inner.ln_1(wanted), layer, grid=tower.grid, n_prefix=1)
            wanted = wanted + inner.ls_1(inner.attention(q_x=u))
            hidden = mlp.c_fc(inner.ln_2(wanted))
            patches = hidden[:, 1:].transpose(1, 2).unflatten(2, tower.grid)
            conv = torch.nn.functional.conv2d(
                patches, adapter.hidden_weight[layer][:, None], padding=1, groups=hidden.shape[2]
            )
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:] + 0.7 * conv.flatten(2).transpose(1, 2)], 1)
            wanted = wanted + inner.ls_2(mlp.c_proj(mlp.gelu(hidden)))
        found = adapter.encode(tower, tokens)
        assert torch.allclose(found, tower.project(wanted), atol=1e-5)
        assert not torch.allclose(found, adapter.encode_frozen(tower, tokens), atol=1e-3)
        assert torch.equal(adapter.encode_frozen(tower, tokens), scene[0].image_features(pixels))  # no hook stays


def test_the_local_manner_has_no_attention_and_the_global_one_no_convolution(scene):
    tower, pixels = scene[0].tower, scene[2]
    local, whole = (DiffMannerAdapter.for_tower(tower, manner=manner) for manner in ("local", "global"))
    with torch.no_grad():
        tokens = wanted = local.frozen_tokens(tower, pixels)
        for block in tower.blocks:
            wanted = block.feed_forward(wanted)
        assert torch.equal(local.encode(tower, tokens), tower.project(wanted))
        torch.nn.init.normal_(whole.weight)
        assert torch.equal(whole.encode(tower, tokens), whole.encode_frozen(tower, tokens))


def test_towers_that_cannot_be_entered_say_so():
    for options in ({"placement": "before"}, {"mlp": True}):
        with pytest.raises(CaptError, match="no transformer blocks"):
            DiffMannerAdapter.for_tower(backbone("cnn").tower, **options)


def test_the_key_is_the_label_in_training_only(scene):
    model = model_of(scene, key="label")
    tokens, labels = model.tokens(scene[2]), torch.arange(18) % 9
    keyed = model.train()(tokens, labels=labels)
    assert torch.equal(keyed.semantic.pseudo, labels) and (keyed.semantic.confusing != labels[:, None]).all()
    free = model.eval()(tokens, labels=labels)
    assert torch.equal(free.semantic.pseudo, free.base_logits.argmax(1))
    other = model_of(scene).train()(tokens, labels=labels)
    assert torch.equal(other.semantic.pseudo, other.base_logits.argmax(1))


def test_pair_texts_written_derived_and_random(scene):
    tokens = model_of(scene).tokens(scene[2])
    found = {kind: model_of(scene, pair_texts=kind).eval()(tokens) for kind in ("written", "derived", "random")}
    for kind, output in found.items():
        others = [o.semantic.commonality for k, o in found.items() if k != kind]
        assert not any(torch.allclose(output.semantic.commonality, other, atol=1e-3) for other in others)
        assert torch.equal(output.semantic.confusing, found["derived"].semantic.confusing)
    again = model_of(scene, pair_texts="random").eval()(tokens)
    assert torch.equal(again.semantic.difference, found["random"].semantic.difference)
    moved = model_of(scene, pair_texts="random", control_seed=1).eval()(tokens)
    assert not torch.equal(moved.semantic.difference, found["random"].semantic.difference)


def test_pair_texts_of_candidates_only(scene):
    model = model_of(scene)
    assert model.class_set(["violin", "ship"]).pair_prompts is None
    some = model.class_set(CLASSES[3:0:-1])
    assert some.pair_prompts.class_names == CLASSES[3:0:-1] and 0 < len(some.pair_prompts) < len(model.pair_prompts)
    names = ("violin", "ship", "lamp")
    pair = {("violin", "ship"): PairText(("both are made of wood",), ("it has strings",), ("it floats",))}
    novel = PairPrompts(PairTexts("tiny", "novel", names, pair), scene[0], names)
    assert model.class_set(names, pair_prompts=novel).pair_prompts is novel
    with pytest.raises(CaptError, match="other classes"):
        model.class_set(CLASSES[:3], pair_prompts=novel)


def test_semantic_experts_start_from_the_written_texts(scene):
    written, derived = model_of(scene), model_of(scene, pair_texts="derived")
    assert not torch.equal(written.mgde.w_in[0, :5], derived.mgde.w_in[0, :5])
    rows = written.pair_prompts.commonality.flatten(0, 1)
    assert (written.mgde.w_in[0, :1] @ rows.T).max() > 0.5
    without = model_of(scene, centres=0).mgde.w_in[0]
    assert without.norm(dim=1).max() < 0.5 and written.mgde.w_in[0, 0].norm() > 0.99


def test_random_retrieval_draws_from_the_candidates(scene):
    bank = scene[1]
    pseudo = bank.predictions[:1].expand(4000)
    confusing = bank.labels[:1, None].expand(4000, 1)
    queries = normalize(torch.ones(4000, bank.features.shape[1]), dim=-1)
    generator = torch.Generator().manual_seed(0)
    (_, similar), (scores, drawn) = (
        bank.search(queries, pseudo, confusing, m=1, retrieval=kind, generator=generator)
        for kind in ("similar", "random")
    )
    candidates = bank.pair_ranges(pseudo[:1], confusing[:1])[0, 0]
    rows = torch.cat([torch.arange(*span.tolist()) for span in candidates])
    counts = torch.bincount(drawn.flatten(), minlength=len(bank))
    assert len(similar.unique()) == 1 and counts.sum() == counts[rows].sum() == 4000 and len(rows) > 2
    assert torch.allclose(scores.flatten(), (queries @ bank.features.T).gather(1, drawn[:, 0]).flatten(), atol=1e-5)
    assert (counts[rows] > 0).all()


def test_random_retrieval_is_even_over_draws(scene):
    bank = scene[1]
    pseudo, confusing = bank.predictions[:1], bank.labels[:1, None]
    query, generator = bank.features[:1], torch.Generator().manual_seed(0)
    drawn = [
        int(bank.search(query, pseudo, confusing, retrieval="random", generator=generator)[1]) for _ in range(1500)
    ]
    counts = torch.bincount(torch.tensor(drawn))
    counts = counts[counts > 0].float()
    expected = 1500 / len(counts)
    assert len(counts) > 2 and ((counts - expected).square() / expected).sum() < 3.5 * len(counts) + 15


def test_a_shuffled_bank_shows_other_mistakes_under_the_same_statistics(scene):
    bank = scene[1]
    other = bank.shuffled(0)
    assert torch.equal(other.labels, bank.labels) and torch.equal(other.counts(), bank.counts())
    labels, predictions, _ = bank.cells()
    mine, theirs = (b.pair_ranges(predictions, labels[:, None])[:, 0, 0] for b in (bank, other))
    assert not torch.equal(mine, theirs) and torch.equal(mine.sort(0).values, theirs.sort(0).values)
    assert torch.equal(bank.shuffled(0).pair_ranges(predictions, labels[:, None])[:, 0, 0], theirs)
    model = model_of(scene, bank_shuffle=True)
    assert model.bank is bank and model.class_set().bank is not bank


def test_a_refreshed_bank_holds_the_mistakes_of_the_current_model(scene):
    model = model_of(scene, shared_expert=True)
    labels = torch.from_numpy(data_set().train.labels.copy())
    ids = torch.from_numpy(data_set().train.ids.copy())
    tokens = model.tokens(scene[3])
    first = model.refresh_bank(lambda rows: tokens[rows], labels, ids)
    assert torch.equal(first.sample_ids, scene[1].sample_ids) and torch.equal(first.predictions, scene[1].predictions)
    torch.manual_seed(4)
    model.mgde.shared.weight.data.normal_(std=0.3)
    model.evidence.remember(model.base_features(tokens), labels)
    second = model.train().refresh_bank(lambda rows: tokens[rows], labels, ids)
    classes = model.eval().class_set()
    assert model.bank is second and classes.bank is second
    wrong = model(tokens, type(classes)(**{**vars(classes), "evidence": None})).logits.argmax(1) != labels
    assert set(second.sample_ids.tolist()) == set(ids[wrong].tolist()) != set(first.sample_ids.tolist())
    assert torch.equal(model._statistics.counts, second.statistics().counts)


def test_without_experts_the_mean_of_the_guidance_answers():
    module, guidance = MultiGranularityDifferenceExpert(48, n_heads=4), torch.randn(3, 5, 48)
    assert torch.allclose(module.without_experts(*guidance).correction, guidance.mean(0))
    assert torch.equal(module.without_experts(None, guidance[1], None).correction, guidance[1])
    assert module.without_experts(None, None, None).correction == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"k": 0}, "k must be at least 1"), ({"adapter": "all"}, "adapter is one of both"), ({"key": "gt"}, "key"),
     ({"top_k": 4}, "top_k"), ({"representative_weight": -1.0}, "representative_weight"),
     ({"adapter": "local", "placement": "before"}, "'after'"), ({"bank_source": ""}, "bank_source"),
     ({"bank_refresh": -1}, "bank_refresh"), ({"dropout": float("nan")}, "dropout")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(wrong, said):
    with pytest.raises(CaptError, match=said):
        CAPTConfig(**wrong)


def test_settings_survive_as_a_dictionary_and_unknown_ones_are_refused():
    config = CAPTConfig(key="label", retrieval="random", bank_refresh=2)
    assert config_from_dict(asdict(config)) == config
    old = {name: value for name, value in asdict(config).items() if name not in ("retrieval", "mgde")}
    assert config_from_dict(old).retrieval == "similar"
    with pytest.raises(DamagedFileError, match="nonsense"):
        config_from_dict({**asdict(config), "nonsense": 1})
