"""The parts of MSCI alone: prompts, stages, fusion, disentangler, and their published sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import capt
from capt.backbones import Backbone
from capt.errors import CaptError
from capt.modules import stage_interaction
from capt.modules.bottleneck_adapter import BottleneckAdapter
from capt.modules.composition_prompts import CompositionPrompts
from capt.modules.disentangler import Disentangler
from capt.modules.layer_aggregator import LayerAggregator
from capt.modules.stage_interaction import CrossAttentionLayer, StageFusion, StageInteraction
from capt.ops import prompt_attention_shared
from tests import tiny
from tests.backbone_models import CONTEXT, WORDS, clip, hf_clip, hf_siglip, hf_text, word_tokenizer

STATES, OBJECTS = ("red", "old"), ("cat", "car", "tree")
PAIRS = torch.tensor([[0, 0], [1, 0], [0, 2], [1, 1]])


def siglip_tokenizer(texts: list[str]) -> Tensor:
    """As SigLIP's: no start token, and padding is the end token."""
    words = [[word for word in text.replace(".", " ").split() if word.strip()] for text in texts]
    ids = [[4 + WORDS.index(word) if word in WORDS else 3 for word in row][: CONTEXT - 1] for row in words]
    return torch.tensor([row + [1] * (CONTEXT - len(row)) for row in ids])


def text_backbone(kind: str, folder: Path) -> Backbone:
    if kind == "open_clip":
        import open_clip

        return capt.wrap(clip(), open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT))
    if kind == "transformers CLIP":
        return capt.wrap(hf_clip(64, eos=63), word_tokenizer(64, pad_is_end=True))
    if kind == "open_clip with RoBERTa":
        return capt.wrap(hf_text(folder), word_tokenizer(64))
    return capt.wrap(hf_siglip(), word_tokenizer(64) if kind == "SigLIP, start token" else siglip_tokenizer)


KINDS = ("open_clip", "transformers CLIP", "SigLIP", "SigLIP, start token", "open_clip with RoBERTa")


# ---- prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_04_fresh_prompts_of_one_piece_names_are_the_texts_themselves(kind, tmp_path):
    """So every position holds what it should, start and end tokens and padding included."""
    backbone = text_backbone(kind, tmp_path)
    prompts = CompositionPrompts(backbone, STATES, OBJECTS).eval()
    names = [f"{STATES[s]} {OBJECTS[o]}" for s, o in PAIRS.tolist()]
    with torch.no_grad():
        for found, texts in (
            (prompts.pairs(backbone, PAIRS), names), (prompts.states(backbone), STATES),
            (prompts.objects(backbone), OBJECTS),
        ):  # fmt: skip
            expected = backbone.text_features([f"a photo of {text}" for text in texts])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_04_contexts_and_table_stand_where_the_template_has_its_words(monkeypatch):
    backbone, seen = tiny.backbone(), []
    prompts = CompositionPrompts(backbone, STATES, OBJECTS).eval()
    encode = backbone.text_tower.encode_embedded
    monkeypatch.setattr(
        backbone.text_tower, "encode_embedded", lambda x, ends: seen.append((x, ends)) or encode(x, ends)
    )
    prompts.pairs(backbone, PAIRS), prompts.states(backbone), prompts.objects(backbone)
    (pairs, pair_ends), (states, state_ends), (objects, _) = seen
    assert pairs.shape[1] == 7 and states.shape[1] == objects.shape[1] == 6  # the padding is cut: it is never attended
    assert set(pair_ends.tolist()) == {6} and set(state_ends.tolist()) == {5}
    for x, branch in ((pairs, 0), (states, 1), (objects, 2)):
        assert torch.equal(x[:, 1:4], prompts.contexts[branch].expand(len(x), -1, -1))
    assert torch.equal(pairs[:, 4], prompts.table[PAIRS[:, 0]]) and torch.equal(states[:, 4], prompts.table[:2])
    assert torch.equal(pairs[:, 5], prompts.table[2 + PAIRS[:, 1]]) and torch.equal(objects[:, 4], prompts.table[2:])


def test_04_padding_matters_to_no_text_of_a_causal_tower_and_stays_in_others(tmp_path):
    changes = {}
    for kind in ("open_clip", "SigLIP"):
        backbone = text_backbone(kind, tmp_path)
        prompts = CompositionPrompts(backbone, STATES, OBJECTS).eval()
        before = prompts.pairs(backbone, PAIRS)
        prompts.words[:, 8:] += torch.randn(backbone.text_tower.width)  # a constant would be normalised away
        changes[kind] = (prompts.pairs(backbone, PAIRS) - before).abs().max().item()
    assert changes["open_clip"] == 0 and changes["SigLIP"] > 1e-3


def test_04_a_row_of_the_table_changes_the_texts_that_name_it_and_no_other():
    backbone = tiny.backbone()
    prompts = CompositionPrompts(backbone, STATES, OBJECTS).eval()

    def texts() -> list[Tensor]:
        with torch.no_grad():
            return [prompts.pairs(backbone, PAIRS), prompts.states(backbone), prompts.objects(backbone)]

    before = texts()
    with torch.no_grad():
        prompts.table[1] += torch.randn(prompts.table.shape[1])
    changed = [(one - other).abs().amax(1) > 1e-4 for one, other in zip(before, texts(), strict=True)]
    assert [one.tolist() for one in changed] == [(PAIRS[:, 0] == 1).tolist(), [False, True], [False] * 3]


@pytest.mark.parametrize("kind", KINDS)
def test_05_a_primitive_starts_as_the_mean_of_its_word_pieces(kind, tmp_path):
    backbone = text_backbone(kind, tmp_path)
    prompts = CompositionPrompts(backbone, ("Red", "old.tree"), ("small big car", "dog"))
    one = {word: CompositionPrompts(backbone, (word,), ("cat",)).table[0] for word in
           ("red", "old", "tree", "small", "big", "car", "dog")}  # fmt: skip
    expected = [
        one["red"], (one["old"] + one["tree"]) / 2, (one["small"] + one["big"] + one["car"]) / 3, one["dog"],
    ]  # fmt: skip
    torch.testing.assert_close(prompts.table, torch.stack(expected))
    ids = backbone.tokenize(["red", "cat"])
    place = int((ids[0] != ids[1]).nonzero()[0])
    torch.testing.assert_close(one["red"], backbone.embed_text(ids)[0, place].float())


def test_names_without_a_word_are_refused():
    with pytest.raises(CaptError, match=r"no word in ' '.*give the state or object a name"):
        CompositionPrompts(tiny.backbone(), ("red", "."), ("cat",))


def test_tokenizers_that_cut_words_into_pieces_are_refused():
    def pieces(texts: list[str]) -> Tensor:
        ids = [[part for word in text.split() for part in (5, 6 + len(word) + ord(word[0]))] for text in texts]
        return torch.tensor([[49406, *row, 49407] + [0] * (22 - len(row)) for row in ids])

    with pytest.raises(CaptError, match="expected one token a word"):
        CompositionPrompts(capt.wrap(tiny.backbone().model, pieces), ("red",), ("cat",))


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_17_texts_and_their_gradients_do_not_depend_on_the_chunk(chunk):
    backbone = tiny.backbone()
    found = []
    for size in (256, chunk):
        prompts = CompositionPrompts(backbone, STATES, OBJECTS, dropout=0.0, chunk=size)
        texts = torch.cat([prompts.pairs(backbone, PAIRS), prompts.states(backbone), prompts.objects(backbone)])
        (texts * torch.arange(texts.numel()).view_as(texts).sin()).sum().backward()
        found.append((texts.detach(), prompts.table.grad, prompts.contexts.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_table_drops_elements_in_training_only_and_alike_in_all_branches(monkeypatch):
    prompts = CompositionPrompts(tiny.backbone(), STATES, OBJECTS, dropout=0.5)
    dropped = prompts.dropped()
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * prompts.table[kept])
    assert torch.equal(prompts.eval().dropped(), prompts.table)


def test_contexts_are_parameters_wherever_they_live():
    """In the published code they are trained only if they were made on the GPU (its item 21)."""
    prompts = CompositionPrompts(tiny.backbone(), STATES, OBJECTS)
    assert {name for name, one in prompts.named_parameters() if one.requires_grad} == {"table", "contexts"}
    moved = prompts.to("meta")
    assert {one.device.type for one in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    assert dict(moved.named_parameters()).keys() == {"table", "contexts"} and "words" not in moved.state_dict()


# ---- stages ----------------------------------------------------------------------------------------------


def layer_by_hand(layer: CrossAttentionLayer, query: Tensor, tokens: Tensor) -> Tensor:
    """One image: query [R, d], tokens [L, d]."""
    q, k, v = (part.weight @ x.T for part, x in ((layer.query, query), (layer.key, tokens), (layer.value, tokens)))
    heads = []
    for one, other, third in zip(*(x.chunk(layer.n_heads) for x in (q, k, v)), strict=True):
        weights = (one.T @ other * len(one) ** -0.5).softmax(-1)
        heads.append(weights @ third.T)
    y = query + layer.out(torch.cat(heads, -1))
    hidden = layer.w_in(layer.norm(y))
    return y + layer.w_out(hidden * torch.sigmoid(1.702 * hidden))


def stage(n_layers: int = 1, n_heads: int = 4) -> StageInteraction:
    made = StageInteraction(32, n_heads=n_heads, n_layers=n_layers).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("n_layers", [1, 2])
def test_07_a_stage_is_the_formula(n_layers):
    one, query, maps = stage(n_layers), torch.randn(5, 32), torch.randn(3, 7, 32)
    found = one(query, one.keys(maps))
    for image, own in enumerate(maps):
        expected, tokens = query, one.norm(own)
        for layer in one.layers:
            expected = layer_by_hand(layer, expected, tokens)
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one(query.expand(3, -1, -1), one.keys(maps)), found, rtol=1e-4, atol=1e-5)


def test_07_tokens_are_normalised_and_queries_are_not():
    one, query, maps = stage(), torch.randn(5, 32), torch.randn(3, 7, 32)
    for same, other in zip(one.keys(maps)[0], one.keys(3 * maps + 1)[0], strict=True):
        torch.testing.assert_close(same, other, rtol=1e-3, atol=1e-4)
    layer = one.layers[0]
    assert all(part.bias is None for part in (layer.query, layer.key, layer.value))
    with torch.no_grad():  # attention alone
        layer.w_out.weight.zero_(), layer.w_out.bias.zero_()
    moved = [one(scale * query, one.keys(maps)) - scale * query for scale in (1.0, 3.0)]
    assert (moved[0] - moved[1]).abs().max() > 1e-3


def test_07_the_number_of_heads_changes_the_result_and_no_weight():
    few, many = stage(n_heads=2), StageInteraction(32, n_heads=4).eval()
    many.load_state_dict(few.state_dict())
    query, maps = torch.randn(5, 32), torch.randn(3, 7, 32)
    assert (few(query, few.keys(maps)) - many(query, many.keys(maps))).abs().max() > 1e-3
    with pytest.raises(CaptError, match="n_heads must divide the width, found 5 heads for width 32"):
        StageInteraction(32, n_heads=5)


@pytest.mark.parametrize("n_prompts, n_images, factor", [(1, 1, 1.0), (7, 3, 1.0), (301, 2, 1.0), (7, 3, 100.0)])
@pytest.mark.parametrize("chained", [False, True])
def test_11_kernels_and_reference_agree_in_both_stages(monkeypatch, n_prompts, n_images, factor, chained):
    """Outputs, and gradients of prompts, maps and every weight; ``factor`` makes the softmax extreme."""
    one, maps = stage(), torch.randn(n_images, 7, 32, requires_grad=True)
    with torch.no_grad():
        one.layers[0].query.weight.mul_(factor)
    prompts = torch.randn(n_images, n_prompts, 32) if chained else torch.randn(n_prompts, 32)
    prompts.requires_grad_()
    learned = [prompts, maps, *one.parameters()]
    found = []
    for backend in (None, "reference"):
        monkeypatch.setattr(
            stage_interaction, "prompt_attention_shared", partial(prompt_attention_shared, backend=backend)
        )
        out = one(prompts, one.keys(maps))
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), learned)])
    for kernel, plain in zip(*found, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=2e-3, atol=2e-3 * float(plain.detach().abs().max()))


def test_11_a_hundred_thousand_prompts_are_rows_like_any_other():
    one, maps, many = StageInteraction(8, n_heads=2).eval(), torch.randn(1, 3, 8), torch.randn(100_003, 8)
    with torch.no_grad():
        keys = one.keys(maps)
        torch.testing.assert_close(one(many, keys)[:, -5:], one(many[-5:], keys), rtol=1e-4, atol=1e-5)


def test_06_a_stage_that_adds_nothing_gives_back_what_it_was_given():
    one, query, maps = stage(), torch.randn(3, 5, 32), torch.randn(3, 7, 32)
    with torch.no_grad():
        for part in (one.layers[0].out, one.layers[0].w_out):
            part.weight.zero_(), part.bias.zero_()
    assert torch.equal(one(query, one.keys(maps)), query)


# ---- fusion and disentangler -----------------------------------------------------------------------------


def test_08_fusion_without_lambdas_is_the_text_and_leaves_out_what_is_not_there():
    text, low, high = torch.randn(5, 32), torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    assert torch.equal(StageFusion(32, init=0.0)(text, low, high), text.expand(3, -1, -1))
    torch.testing.assert_close(StageFusion(32, init=0.5)(text, low, high), text + 0.5 * low + 0.5 * high)
    torch.testing.assert_close(StageFusion(32, init=0.5, high=False)(text, low, None), text + 0.5 * low)
    assert list(dict(StageFusion(32, low=False).named_parameters())) == ["high"]


def test_the_dynamic_gate_starts_as_the_static_fusion_and_weighs_every_element_of_every_prompt():
    text, low, high = torch.randn(5, 32), torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    fusion = StageFusion(32, fusion="dynamic")
    torch.testing.assert_close(fusion(text, low, high), StageFusion(32)(text, low, high))
    torch.nn.init.normal_(fusion.gate.weight)
    g = torch.sigmoid(fusion.gate(torch.cat([low, high], -1)))
    assert g.shape == (3, 5, 32)
    torch.testing.assert_close(fusion(text, low, high), text + 0.2 * g * low + 0.2 * (1 - g) * high)
    with pytest.raises(CaptError, match="two stages"):
        StageFusion(32, fusion="dynamic", low=False)


def test_12_a_zero_vector_stays_finite():
    disentangle = Disentangler(8).eval()
    with torch.no_grad():
        disentangle.norm.bias.fill_(-100.0)
    vectors = disentangle(torch.randn(3, 8))
    assert not vectors.any() and F.normalize(vectors, dim=-1).isfinite().all()


def test_a_disentangler_is_the_published_stack_and_takes_a_batch_of_one():
    made = Disentangler(8, dropout=0.0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    plain[0].load_state_dict(made.linear.state_dict())
    for _ in range(3):
        features = torch.randn(6, 8)
        torch.testing.assert_close(made(features), plain(features))
    for name, value in plain[1].state_dict().items():
        torch.testing.assert_close(made.norm.state_dict()[name], value)
    before = made.norm.running_mean.clone()
    assert made(torch.randn(1, 8)).isfinite().all() and torch.equal(made.norm.running_mean, before)
    torch.testing.assert_close(made.eval()(features), plain.eval()(features))


def test_10_parts_of_the_published_sizes_have_the_published_numbers_of_parameters():
    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        adapters = 48 * count(BottleneckAdapter(1024))
        stages = 2 * count(StageInteraction(768, n_heads=12))
        disentanglers = 2 * count(Disentangler(768))
        fusion, aggregators = count(StageFusion(768)), {n: 2 * count(LayerAggregator(n * 768, 768)) for n in (3, 4)}
    assert (adapters, stages, disentanglers, fusion) == (6_343_680, 14_171_136, 1_184_256, 1_536)
    assert aggregators == {3: 3_543_552, 4: 4_723_200}
