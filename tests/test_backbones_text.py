"""Text towers: strings, ids and embedded prompts give one and the same feature; nothing is stale or cut silently."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from capt.backbones import PromptEmbeddings, TextCache, wrap
from capt.errors import CaptError
from tests import backbone_models as models
from tests.backbone_models import (
    CONTEXT,
    DIM,
    clip,
    coca,
    custom_text,
    hf_clip,
    hf_siglip,
    hf_text,
    open_clip,
    word_tokenizer,
)

TEXTS = ["a photo of the cat", "dog", "the big red bird in an old tree"]


def siglip_like() -> Any:
    """open_clip's SigLIP text tower: both directions, last position, no end-token lookup."""
    return custom_text({"no_causal_mask": True, "pool_type": "last", "proj_bias": True})


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "open_clip CLIP": lambda: (clip(), None),
    "open_clip CustomTextCLIP": lambda: (custom_text({}), None),
    "open_clip, end-token pooling": lambda: (custom_text({"pool_type": "eos", "eos_id": 49407}), None),
    "open_clip, SigLIP-like": lambda: (siglip_like(), None),
    "open_clip CoCa": lambda: (coca(), None),
    "transformers CLIP": lambda: (hf_clip(64, eos=63), word_tokenizer()),
    "transformers CLIP, old end-token id": lambda: (hf_clip(64, eos=2), word_tokenizer()),
    "transformers CLIP, padded with the end token": lambda: (hf_clip(64, eos=63), word_tokenizer(pad_is_end=True)),
    "transformers SigLIP": lambda: (hf_siglip(), word_tokenizer()),
}


def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "encode_text"):
        return model.encode_text(tokens, normalize=False)
    return model.get_text_features(input_ids=tokens).pooler_output


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, tokenizer = KINDS[request.param]()
    return model, wrap(model, tokenizer)


def test_strings_ids_and_embeddings_agree_with_the_wrapped_model(kind: tuple[Any, Any]) -> None:
    model, backbone = kind
    tokens = backbone.tokenize(TEXTS)
    expected = reference(model, tokens)
    assert tokens.shape == (3, CONTEXT)
    assert torch.equal(backbone.encode_text(tokens), expected)
    assert torch.equal(backbone.encode_text(tokens, normalize=True), F.normalize(expected, dim=-1))
    unit = F.normalize(expected, dim=-1)
    torch.testing.assert_close(backbone.text_features(TEXTS), unit, rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.text_features(tokens), unit, rtol=0, atol=1e-6)
    prompts = backbone.embed_prompts(TEXTS)
    assert prompts.embeddings.shape == (3, CONTEXT, backbone.text_tower.width)
    torch.testing.assert_close(backbone.encode_embedded(*prompts), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.text_features(prompts), unit, rtol=0, atol=1e-6)
    assert unit.std(dim=0).max() > 1e-3  # the texts do differ
    misses = backbone.text_cache.misses
    backbone.text_features(TEXTS)
    assert backbone.text_cache.misses == misses


def test_gradient_reaches_embedded_prompts(kind: tuple[Any, Any]) -> None:
    _, backbone = kind
    embeddings, eot = backbone.embed_prompts(TEXTS)
    embeddings = embeddings.detach().requires_grad_()
    backbone.text_features(PromptEmbeddings(embeddings, eot))[:, 0].sum().backward()
    assert all(embeddings.grad[i, : eot[i]].abs().sum() > 0 for i in range(3))


def test_a_transformers_text_tower_inside_open_clip(tmp_path: Path) -> None:
    model = hf_text(tmp_path)
    tokenizer = word_tokenizer(63)
    backbone = wrap(model, tokenizer)
    tokens = torch.full((3, backbone.context_length), 1)
    for row, length in zip(tokens, (5, 7, 9), strict=True):
        row[:length] = torch.arange(4, 4 + length)
    expected = model.encode_text(tokens)
    assert torch.equal(backbone.encode_text(tokens), expected)
    embedded = backbone.encode_embedded(backbone.embed_text(tokens), backbone.text_tower.eot_index(tokens))
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)
    assert backbone.context_length == CONTEXT
    torch.testing.assert_close(
        backbone.text_features(TEXTS), F.normalize(model.encode_text(backbone.tokenize(TEXTS)), dim=-1)
    )


def test_short_embedded_prompts_do_for_causal_towers_only() -> None:
    backbone = wrap(clip())
    embeddings, eot = backbone.embed_prompts(["a cat", "a dog"])
    short = backbone.encode_embedded(embeddings[:, :6], eot)
    torch.testing.assert_close(short, backbone.encode_embedded(embeddings, eot), rtol=1e-5, atol=1e-5)
    with pytest.raises(CaptError, match="at most 16"):
        backbone.encode_embedded(torch.zeros(1, CONTEXT + 1, 32), torch.tensor([3]))
    with pytest.raises(CaptError, match="exactly 16"):
        wrap(siglip_like()).encode_embedded(torch.zeros(1, CONTEXT - 1, 32), torch.tensor([3]))


def test_class_features_are_those_of_open_clips_zero_shot_classifier() -> None:
    backbone = wrap(clip(), templates=["a photo of a {}.", "a drawing of the {}."])
    classes = ["cat", "dog", "fire truck"]
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    theirs = open_clip.build_zero_shot_classifier(backbone.model, tokenizer, classes, backbone.templates).T
    torch.testing.assert_close(backbone.class_text_features(classes), theirs, rtol=0, atol=1e-6)
    with pytest.raises(CaptError, match=r"no '\{\}'"):
        backbone.class_text_features(classes, ["a photo"])
    with pytest.raises(CaptError, match="at least one"):
        backbone.class_text_features(classes, [])


def test_many_texts_go_in_chunks_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = wrap(clip())
    texts = [f"{i} cats" for i in range(12)]
    whole = backbone.text_features(texts)
    monkeypatch.setattr("capt.backbones.backbone.TEXT_BATCH", 5)
    backbone.text_cache = TextCache()
    torch.testing.assert_close(backbone.text_features([*texts, texts[0]]), torch.cat([whole, whole[:1]]))
    tokens = backbone.tokenize(texts)
    torch.testing.assert_close(backbone.text_features(tokens), whole)
    assert backbone.text_features([]).shape == (0, DIM)


# --- cache -------------------------------------------------------------------------------------------


def test_a_text_is_encoded_once() -> None:
    backbone = wrap(clip())
    first = backbone.text_features(["a cat", "a dog", "a cat"])
    assert (backbone.text_cache.hits, backbone.text_cache.misses) == (0, 2)
    assert torch.equal(backbone.text_features(["a dog", "a cat"]), first[[1, 0]])
    assert (backbone.text_cache.hits, backbone.text_cache.misses) == (2, 2)


def test_composed_and_decomposed_letters_are_one_text() -> None:
    backbone = wrap(clip())
    assert torch.equal(backbone.text_features("a caf\u00e9"), backbone.text_features("a cafe\u0301"))
    assert backbone.text_cache.misses == 1


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.ln_final.weight.add_(torch.arange(32.0))


def _through_data(model: Any) -> None:
    model.token_embedding.weight.data.mul_(3.0)  # leaves no trace in the version counter


def _one_element(model: Any) -> None:
    model.text_projection.data[3, 5] += 1.0


def _replaced(model: Any) -> None:
    model.text_projection = torch.nn.Parameter(model.text_projection.detach().flip(1))


def _activation(model: Any) -> None:
    model.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()


def _hook(model: Any) -> None:
    model.ln_final.register_forward_hook(lambda module, args, output: output * torch.arange(32.0))


@pytest.mark.parametrize("change", [_in_place, _through_data, _one_element, _replaced, _activation, _hook])
def test_the_cache_never_answers_for_a_changed_model(change: Callable[[Any], None]) -> None:
    backbone = wrap(clip())
    old = backbone.text_features(TEXTS)
    change(backbone.model)
    new = backbone.text_features(TEXTS)
    tokens = backbone.tokenize(TEXTS)
    assert not torch.allclose(new, old, atol=1e-4)
    torch.testing.assert_close(new, F.normalize(backbone.model.encode_text(tokens), dim=-1), rtol=0, atol=1e-6)


def test_image_weights_do_not_empty_the_text_cache() -> None:
    backbone = wrap(clip())
    backbone.text_features(TEXTS)
    backbone.model.visual.proj.data.mul_(2)
    backbone.text_features(TEXTS)
    assert backbone.text_cache.hits == 3


def test_features_cached_in_inference_mode_can_take_part_in_training() -> None:
    backbone = wrap(clip())
    with torch.inference_mode():
        backbone.text_features(TEXTS)
    weight = torch.ones(DIM, requires_grad=True)
    (backbone.text_features(TEXTS) * weight).sum().backward()
    assert weight.grad is not None


def test_changing_a_result_does_not_change_the_cache() -> None:
    backbone = wrap(clip())
    first = backbone.text_features(TEXTS)
    kept = first.clone()
    first.zero_()
    assert torch.equal(backbone.text_features(TEXTS), kept)


def test_the_oldest_texts_leave_a_full_cache() -> None:
    cache = TextCache(capacity=2)
    cache.put("s", {"a": torch.zeros(1), "b": torch.ones(1)})
    cache.get("s", ["a"])
    cache.put("s", {"c": torch.ones(1)})
    assert set(cache.get("s", ["a", "b", "c"])) == {"a", "c"}
    assert cache.get("other state", ["a"]) == {}


def test_a_folder_keeps_features_and_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    backbone = wrap(clip())
    backbone.text_cache = TextCache(folder=tmp_path)
    features = backbone.text_features(TEXTS)
    again = wrap(copy.deepcopy(backbone.model))
    again.text_cache = TextCache(folder=tmp_path)
    assert torch.equal(again.text_features(TEXTS), features) and again.text_cache.misses == 0
    (file,) = tmp_path.glob("*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again.text_cache = TextCache(folder=tmp_path)
    with pytest.warns(UserWarning, match="encoded again"):
        assert torch.equal(again.text_features(TEXTS), features)
    assert again.text_cache.misses == 3


# --- what does not fit -------------------------------------------------------------------------------

LONG = "a photo of " + " ".join(models.WORDS[4:]) + " zebra"
TOKENIZERS: dict[str, Callable[[str], Any]] = {
    "open_clip": lambda truncate: wrap(clip(), truncate=truncate),
    "transformers": lambda truncate: wrap(hf_clip(64, eos=63), word_tokenizer(), truncate=truncate),
    "transformers, padded with the end token": lambda truncate: wrap(
        hf_clip(64, eos=63), word_tokenizer(pad_is_end=True), truncate=truncate
    ),
    "a plain function": lambda truncate: wrap(clip(), _plain, truncate=truncate),
}


def _plain(texts: list[str]) -> torch.Tensor:
    return open_clip.tokenize(texts, CONTEXT)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_text_that_would_be_cut_is_named_with_what_it_would_lose(name: str) -> None:
    backbone = TOKENIZERS[name]("error")
    with pytest.raises(CaptError, match=r"a photo of .* does not fit into 16 tokens; from '.*zebra'"):
        backbone.text_features(["a cat", LONG])
    with pytest.raises(CaptError, match="does not fit"):
        backbone.class_text_features([LONG])


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_text_that_just_fits_is_taken_and_one_word_more_is_not(name: str) -> None:
    backbone = TOKENIZERS[name]("error")
    fitting = " ".join(["cat"] * (CONTEXT - 2))
    assert backbone.tokenize([fitting]).shape == (1, CONTEXT)
    with pytest.raises(CaptError, match=r"from 'cat' on"):
        backbone.tokenize([fitting + " cat"])


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_cutting_knowingly_warns_and_goes_on(name: str) -> None:
    backbone = TOKENIZERS[name]("warn")
    with pytest.warns(UserWarning, match="zebra"):
        tokens = backbone.tokenize([LONG])
    assert tokens.shape == (1, CONTEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.tokenize(TEXTS)


def test_learned_context_may_not_push_the_class_name_out() -> None:
    backbone = wrap(clip())
    backbone.check_prompt_fits(12, 4, "fire truck")
    with pytest.raises(CaptError, match=r"13 tokens of 'fire truck' make 17.*at most 3"):
        backbone.check_prompt_fits(13, 4, "fire truck")


# --- whose tokenizer ---------------------------------------------------------------------------------


def test_a_tokenizer_for_another_context_length_is_refused_with_the_fix() -> None:
    with pytest.raises(CaptError, match=r"77 tokens.*context_length=16"):
        wrap(clip(), open_clip.SimpleTokenizer())


def test_a_tokenizer_with_too_many_words_is_refused() -> None:
    with pytest.raises(CaptError, match="64 rows"):
        wrap(clip(text={"vocab_size": 64}), open_clip.SimpleTokenizer(context_length=CONTEXT))


def test_a_tokenizer_with_another_end_token_is_refused() -> None:
    def headless(texts: list[str]) -> torch.Tensor:
        tokens = open_clip.tokenize(texts, CONTEXT)
        return tokens.masked_fill(tokens == 49407, 7)

    with pytest.raises(CaptError, match="end token is not"):
        wrap(clip(), headless)
    with pytest.raises(CaptError, match="end token is not"):
        wrap(hf_clip(64, eos=40), word_tokenizer())


def test_without_a_tokenizer_only_strings_are_refused() -> None:
    backbone = wrap(hf_siglip())
    assert backbone.text_features(torch.zeros(2, CONTEXT, dtype=torch.long)).shape == (2, backbone.dim)
    with pytest.raises(CaptError, match="wrapped without one"):
        backbone.text_features(["a cat"])


def test_texts_have_to_be_strings() -> None:
    with pytest.raises(CaptError, match="expected strings, found int"):
        wrap(clip()).text_features([3])  # type: ignore[list-item]
    with pytest.raises(CaptError, match="'error' or 'warn'"):
        wrap(clip(), truncate="silently")
