"""Prompts in frozen towers against plain loops over the models' own blocks. Numbers: docs/fidelity.md."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import capt
from capt import DiffMannerAdapter
from capt.errors import CaptError
from capt.modules.prompts import PromptedTower, TextPrompts, text_memory
from tests import backbone_models as models

NAMES = ("cat", "small red car", "tree", "big old dog", "bird", "new blue car")
VITS = {
    "class token": models.clip,
    "average": lambda: models.clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "attention pooling": lambda: models.clip({"attentional_pool": True, "attn_pooler_heads": 2}),
    "registers": lambda: models.timm_vit(global_pool="avg", reg_tokens=2),
    "transformers": models.hf_clip,
    "SigLIP": models.hf_siglip,
}


def time_first():
    """open_clip's layout before 2.24: tokens go through the text blocks as [L, N, W]."""
    model = models.clip()
    model.transformer.batch_first = False
    for block in model.transformer.resblocks:
        block.attn.batch_first = False
    return model


TEXTS = {"open_clip": models.clip, "open_clip, time first": time_first, "transformers": models.hf_clip}


@functools.cache
def wrapped(name: str) -> capt.backbones.Backbone:
    tokenizer = (
        models.word_tokenizer() if name == "SigLIP" else models.open_clip.SimpleTokenizer(context_length=models.CONTEXT)
    )
    return capt.wrap((VITS | TEXTS)[name](), tokenizer)


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32)


def library_block(block, x):
    """One whole block by the library's own forward."""
    inner = getattr(block, "block", None)
    return inner(x) if inner is not None else block.layer(x, attention_mask=None)


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("name", VITS)
def test_visual_prompts_equal_the_published_layout(name, depth):
    """Prompts at the end of the sequence, a fresh set at each of the first blocks, pooled without them."""
    inner = wrapped(name).tower
    tower = PromptedTower(inner, n_ctx=3, depth=depth)
    torch.nn.init.normal_(tower.prompts)
    assert len(tower.prompts) == min(depth, len(inner.blocks))
    images = pixels()
    x = inner.embed(images)
    n = x.shape[1]
    for index, block in enumerate(inner.blocks):
        if index < depth:
            x = torch.cat([x[:, :n], tower.prompts[index].expand(len(x), -1, -1)], dim=1)
        x = library_block(block, x)
    expected = inner.project(x[:, :n])
    torch.testing.assert_close(tower.project(tower.run(images)), expected, rtol=1e-4, atol=1e-5)
    cached = tower.begin(inner.embed(images))
    assert torch.equal(tower.project(tower.advance(cached)), tower.project(tower.run(images)))
    assert not torch.allclose(expected, inner.project(inner.run(images)), atol=1e-3)


def test_prompted_tower_is_a_tower():
    inner = wrapped("class token").tower
    tower = PromptedTower(inner, n_ctx=3, depth=2)
    tokens = tower.embed(pixels())
    assert tower.n_prefix == inner.n_prefix + 3
    assert torch.equal(tower.patches(tokens), inner.patches(tower.stripped(tokens)))
    assert tower.feed_forward_weights(1).w_in is inner.feed_forward_weights(1).w_in
    assert [stage.tokens.shape for stage in tower.stages(pixels())] == [(3, 16, 32)] * 3
    assert torch.equal(tower.stripped(tower.prompted(tokens[:, 3:], 1)), tokens[:, 3:])


@pytest.mark.parametrize("layers", ["all", "last"])
def test_adapter_on_a_prompted_tower(layers):
    tower = PromptedTower(wrapped("class token").tower, n_ctx=3)
    adapter = DiffMannerAdapter.for_tower(tower, layers=layers)
    images = pixels()
    tokens = adapter.frozen_tokens(tower, images)
    expected = tower.project(tower.run(images))
    assert torch.equal(adapter.encode(tower, tokens), expected)
    assert torch.equal(adapter.encode_frozen(tower, tokens), expected)
    torch.nn.init.normal_(adapter.weight)
    assert not torch.allclose(adapter.encode(tower, tokens), expected, atol=1e-3)


def test_towers_without_blocks_are_refused_by_name():
    tower = capt.wrap(models.resnet(), models.open_clip.SimpleTokenizer(context_length=models.CONTEXT)).tower
    with pytest.raises(CaptError, match=r"OpenClipResNet has no transformer blocks.*embedded-vit.*visual_depth=0"):
        PromptedTower(tower)
    for sizes in ({"depth": 0}, {"n_ctx": 0}):
        with pytest.raises(CaptError, match="at least 1"):
            PromptedTower(wrapped("class token").tower, **sizes)


def naive_text(backbone, prompts, name):
    """One class by hand: full context length, the library's own blocks, context replaced before each of the first."""
    n = len(prompts.context)
    tokens = backbone.tokenize("a " * n + name + ".")
    end = int(backbone.text_tower.eot_index(tokens))
    sets = [prompts.context, *(() if prompts.deep is None else prompts.deep)]
    x = backbone.text_tower.embed(tokens)
    hf = hasattr(backbone.model, "text_model")
    source = backbone.model.text_model if hf else backbone.model
    positions = source.embeddings.position_embedding.weight if hf else source.positional_embedding
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    for index, block in enumerate(backbone.text_tower.blocks):
        if index < len(sets):
            x = torch.cat([x[:, :1], sets[index][None], x[:, 1 + n :]], dim=1)
        x = x + positions if index == 0 else x
        if hf:
            x = block(x, attention_mask=mask[None, None])
        elif backbone.text_tower.batch_first:
            x = block(x, attn_mask=mask)
        else:
            x = block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)
    pooled = (source.final_layer_norm if hf else source.ln_final)(x)[0, end]
    feature = backbone.model.text_projection(pooled) if hf else pooled @ source.text_projection
    return F.normalize(feature, dim=-1)


def random_prompts(backbone, depth, n_ctx=3, chunk=64):
    prompts = TextPrompts(backbone, n_ctx, depth, chunk=chunk)
    for parameter in prompts.parameters():
        torch.nn.init.normal_(parameter)
    return prompts


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("name", TEXTS)
def test_text_prompts_equal_a_loop_over_the_blocks(name, depth):
    backbone = wrapped(name)
    prompts = random_prompts(backbone, depth)
    expected = torch.stack([naive_text(backbone, prompts, word) for word in NAMES])
    for chunk in (1, 4, 64):
        prompts.chunk = chunk
        torch.testing.assert_close(prompts(backbone, NAMES), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(prompts(backbone, NAMES), expected, rtol=1e-4, atol=1e-5)
        backbone.text_cache = capt.backbones.TextCache()
    assert not any(block._forward_pre_hooks for block in backbone.text_tower.blocks)


@pytest.mark.parametrize("name", TEXTS)
def test_chunks_computed_again_give_the_same_gradients(name):
    backbone = wrapped(name)
    prompts = random_prompts(backbone, depth=3)
    target = F.normalize(torch.randn(len(NAMES), backbone.dim), dim=-1)
    gradients = []
    for prompts.chunk in (64, 2):
        prompts.zero_grad()
        (prompts(backbone, NAMES) * target).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in prompts.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        assert whole.abs().flatten(1).sum(1).min() > 0  # every prompt takes part
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_first_words_make_the_template():
    backbone = wrapped("open_clip")
    prompts = TextPrompts(backbone)
    with torch.no_grad():
        expected = backbone.class_text_features(NAMES, ["a photo of a {}."])
        torch.testing.assert_close(prompts(backbone, NAMES), expected, rtol=1e-5, atol=1e-6)
    assert TextPrompts(backbone, n_ctx=5).context.std() < 0.05


def test_features_are_remembered_until_the_prompts_change():
    backbone = wrapped("transformers")
    prompts = random_prompts(backbone, depth=2).requires_grad_(False)
    plain = backbone.text_features(list(NAMES))
    before = prompts(backbone, NAMES)
    hits = backbone.text_cache.hits
    assert torch.equal(prompts(backbone, NAMES[::-1]), before.flip(0)) and backbone.text_cache.hits == hits + len(NAMES)
    prompts.deep[0, 0, 0] += 1.0
    changed = prompts(backbone, NAMES)
    assert backbone.text_cache.hits == hits + len(NAMES) and not torch.allclose(changed, before, atol=1e-4)
    assert torch.equal(backbone.text_features(list(NAMES)), plain)
    assert prompts(backbone, []).shape == (0, backbone.dim)


def test_texts_without_a_start_token_get_the_context_first():
    class NoStart:
        """open_clip's tokenizer without its first token."""

        vocab_size, context_length = 49408, models.CONTEXT

        def __call__(self, texts, context_length=models.CONTEXT):
            return models.open_clip.SimpleTokenizer(context_length=context_length + 1)(texts)[:, 1:]

    backbone = capt.wrap(models.clip(), NoStart())
    prompts = random_prompts(backbone, depth=1)
    words = backbone.embed_prompts("cat.")
    by_hand = torch.cat([prompts.context[None], words.embeddings[:, :-3]], dim=1)
    expected = F.normalize(backbone.encode_embedded(by_hand, words.eot_index + 3), dim=-1)
    torch.testing.assert_close(prompts(backbone, ["cat"]), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    backbone = wrapped("open_clip")
    long = "small red car in the tree on the old blue"  # 13 tokens with full stop, start and end
    with pytest.raises(CaptError, match=f"n_ctx: 8 learned tokens.*{long}"):
        TextPrompts(backbone, n_ctx=8)(backbone, ["cat", long])
    for wrong in ({"n_ctx": 0}, {"depth": 0}, {"chunk": 0}):
        with pytest.raises(CaptError, match="at least 1"):
            TextPrompts(backbone, **wrong)
    other = capt.wrap(models.hf_text(tmp_path), models.word_tokenizer())
    with pytest.raises(CaptError, match="OpenClipTransformersText; use depth 1"):
        TextPrompts(other, depth=2)
    assert TextPrompts(other)(other, ["cat", "dog"]).shape == (2, models.DIM)
    with pytest.raises(CaptError, match="2 blocks"), backbone.text_tower.deep_prompts(torch.zeros(2, 3, 32), 1):
        pass


def test_announced_memory_bounds_what_a_thousand_classes_take():
    run = subprocess.run(
        [sys.executable, "-m", "tests.text_memory", "250", "gelu"], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["measured"] <= found["announced"] <= 3 * found["measured"], found


def test_announced_memory_grows_with_the_chunk_not_with_the_classes():
    backbone = wrapped("open_clip")
    small, chunked, many, whole = (text_memory(backbone, c, k) for c, k in ((10, 10), (100, 10), (1000, 10), (100, 99)))
    assert small < chunked < many < 5 * small and whole > 5 * chunked
    assert text_memory(backbone, 10, 10, n_ctx=4, length=5) < text_memory(backbone, 10, 10, n_ctx=8, length=5) < small
