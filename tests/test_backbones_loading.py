"""Loading by name or folder, fingerprints, and the guard against a wrong activation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from capt.backbones import EvalTransform, load, wrap
from capt.backbones.embedded import embedded_folder, fold_batch_norm, load_folder
from capt.backbones.guards import expected_quick_gelu
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import read_json, save_tensors, write_json
from tests.backbone_models import CONTEXT, DIM, TEXT, VIT, clip, hf_clip, hf_siglip, timm_model, word_tokenizer

# --- folders of open_clip models ---------------------------------------------------------------------


def write_folder(folder: Path, model: Any, **model_config: Any) -> None:
    half = {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()}
    digest = save_tensors(folder / "weights.safetensors", half)
    config = {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TEXT, **model_config}
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocessing})
    write_json(folder / "templates.json", {"templates": ["a drawing of a {}"]})
    write_json(folder / "checksums.json", {"weights.safetensors": {"sha256": digest}})


def test_a_folder_is_loaded_with_its_templates_and_preprocessing(tmp_path: Path) -> None:
    model = clip()
    write_folder(tmp_path, model)
    backbone = load(str(tmp_path))
    assert backbone.dtype == torch.float32 and backbone.templates == ["a drawing of a {}"]
    assert backbone.preprocess == EvalTransform((32, 32), (0.5,) * 3, (0.5,) * 3)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.image_features(images), model.encode_image(images), rtol=2e-2, atol=2e-2)
    assert backbone.class_text_features(["cat", "dog"]).shape == (2, DIM)


def test_a_changed_weights_file_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, clip())
    file = tmp_path / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"weights\.safetensors"):
        load(str(tmp_path))


def test_weights_of_another_shape_and_missing_files_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, clip(), embed_dim=DIM + 1)
    with pytest.raises(DamagedFileError, match=r"do not fit open_clip_config\.json"):
        load(str(tmp_path))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(DataError, match=r"listed in checksums\.json"):
        load(str(tmp_path))
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(DataError, match=r"one \.safetensors file, found 0"):
        load(str(tmp_path))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(DataError, match=r"neither"):
        load(str(tmp_path))


def test_folded_batch_norms_leave_the_features_as_they_were(tmp_path: Path) -> None:
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "", "image_size": 64}
    plain = timm_model(name="tf_efficientnet_lite0", timm_pool="")
    write_folder(tmp_path, plain, vision_cfg=vision)
    folded = wrap(load_folder(tmp_path, fold=True).model)
    kept = wrap(load_folder(tmp_path, fold=False).model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.model.modules())
    images = torch.randn(3, 3, 64, 64)
    a, b = folded.image_features(images), kept.image_features(images)
    # Random weights amplify rounding; double precision shows that the algebra is exact.
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert torch.equal(a, folded.model.encode_image(images))
    exact = copy.deepcopy(plain.visual).double()
    before = exact(images.double())
    fold_batch_norm(exact.trunk)
    torch.testing.assert_close(exact(images.double()), before, rtol=1e-9, atol=1e-9)
    # The folded tower keeps its maps channels-last, and any token memory order projects alike.
    tokens = folded.tower.run(images)
    assert folded.tower.channels_last
    assert torch.equal(folded.tower.project(tokens.transpose(1, 2).contiguous().transpose(1, 2)), a)


def test_folding_is_refused_where_the_order_is_not_known() -> None:
    with pytest.raises(CaptError, match="ResNet is not an EfficientNet"):
        fold_batch_norm(timm_model().visual.trunk)


def test_the_shipped_model_reads_images_and_texts() -> None:
    backbone = load("embedded")
    assert backbone.name == "embedded" and backbone.dim == 512 and backbone.context_length == 32
    assert all("{}" in template for template in backbone.templates)
    features = backbone.image_features(torch.zeros(1, 3, *backbone.image_hw))
    texts = backbone.class_text_features(["dog", "guitar"])
    assert torch.isfinite(features).all() and texts.shape == (2, 512)
    assert (texts[0] @ texts[1]) < 0.95
    unfolded = wrap(load_folder(fold=False).model)
    image = torch.rand(1, 3, *backbone.image_hw, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = backbone.image_features(image), unfolded.image_features(image)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert "capt-lite2.safetensors" in read_json(embedded_folder() / "checksums.json")


# --- open_clip by name -------------------------------------------------------------------------------


def test_a_real_open_clip_model_with_random_weights_is_loaded_and_says_so() -> None:
    with pytest.warns(UserWarning, match="weights are random"):
        backbone = load("ViT-B-32", pretrained=None)
    assert (backbone.dim, backbone.token_dim, backbone.tower.grid) == (512, 768, (7, 7))
    assert len(backbone.tower.blocks) == 12 and backbone.context_length == 77
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(backbone.image_features(images), backbone.model.encode_image(images))


def test_a_wrong_activation_is_noticed_before_any_download() -> None:
    with pytest.raises(CaptError, match=r"built with gelu.*'ViT-B-32/openai'.*ends in '-quickgelu'"):
        load("ViT-B-32", "openai")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CaptError, match="'ViT-B-33' is neither"):
        load("ViT-B-33")


# --- transformers folders ----------------------------------------------------------------------------


def test_a_transformers_folder_brings_model_tokenizer_and_preprocessing(tmp_path: Path) -> None:
    model = hf_clip(64, eos=63)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"do_center_crop": True, "image_mean": 0.1, "image_std": 0.2})
    for source in (str(tmp_path), f"hf:{tmp_path}"):
        backbone = load(source)
        images = torch.randn(2, 3, 32, 32)
        output = model(input_ids=backbone.tokenize(["a cat", "the dog"]), pixel_values=images)
        torch.testing.assert_close(backbone.encode_image(images, normalize=True), output.image_embeds)
        torch.testing.assert_close(backbone.text_features(["a cat", "the dog"]), output.text_embeds)
        assert backbone.preprocess == EvalTransform((32, 32), (0.1,) * 3, (0.2,) * 3)


def test_a_padded_batch_with_attention_mask_gives_the_same_text_features() -> None:
    model, tokenizer = hf_clip(64, eos=63), word_tokenizer()
    backbone = wrap(model, tokenizer)
    inputs = tokenizer(["a cat", "the big red dog"], padding=True, return_tensors="pt")
    masked = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    expected = F.normalize(masked.pooler_output, dim=-1)
    torch.testing.assert_close(backbone.text_features(["a cat", "the big red dog"]), expected, rtol=0, atol=1e-6)


def test_siglip_defaults_to_its_own_preprocessing() -> None:
    half = (0.5,) * 3
    assert wrap(hf_siglip()).preprocess == EvalTransform((32, 32), half, half, resize_mode="squash")


def test_a_transformers_model_that_is_not_there_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(CaptError, match="nothing is fetched here"):
        load(f"hf:{tmp_path / 'absent'}")


# --- activation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "/data/negclip.pth", True),
        ("RN50", "cc12m", True),
        ("ViT-B-32", "/data/mine.pt", None),
        ("ViT-B-32", None, None),
        ("openai/clip-vit-base-patch32", None, True),
        (None, None, None),
    ],
)
def test_what_names_say_about_the_activation(name: str | None, pretrained: str | None, expected: bool | None) -> None:
    assert expected_quick_gelu(name, pretrained) is expected


def test_weights_trained_with_quick_gelu_are_refused_in_a_gelu_model() -> None:
    with pytest.raises(CaptError, match=r"built with gelu.*ViT-B-32/openai.*quick_gelu.*-quickgelu"):
        wrap(clip(), name="ViT-B-32", pretrained="openai")
    with pytest.raises(CaptError, match=r"built with quick_gelu.*trained with gelu"):
        wrap(clip(quick_gelu=True), name="ViT-B-32", pretrained="laion2b_s34b_b79k")
    with pytest.warns(UserWarning, match="going on"):
        wrap(clip(), name="ViT-B-32", pretrained="openai", allow_activation_mismatch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(clip(quick_gelu=True), name="ViT-B-32", pretrained="openai")
        wrap(clip(quick_gelu=True), name="ViT-B-32-quickgelu")


def test_a_transformers_model_running_another_activation_than_configured_is_refused() -> None:
    model = hf_clip()
    wrap(model)
    for layer in model.vision_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()
    with pytest.raises(CaptError, match=r"vision tower runs GELU.*'quick_gelu'"):
        wrap(model)
    with pytest.raises(CaptError, match="trained with quick_gelu"):
        wrap(_gelu_clip(), name="openai/clip-vit-base-patch32")


def _gelu_clip() -> Any:
    model = hf_clip()
    model.config.vision_config.hidden_act = model.config.text_config.hidden_act = "gelu"
    from transformers import CLIPModel

    return CLIPModel(model.config)


# --- fingerprint -------------------------------------------------------------------------------------


def test_the_fingerprint_names_weights_activation_tokenizer_and_preprocessing() -> None:
    model = hf_clip(64, eos=63)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = wrap(model, word_tokenizer())
    prints = [backbone.fingerprint()]
    assert prints[0] == wrap(model, word_tokenizer()).fingerprint()
    prints.append(wrap(model, word_tokenizer(pad_is_end=True)).fingerprint())
    prints.append(wrap(model, word_tokenizer(), EvalTransform((32, 32), (0.5,) * 3)).fingerprint())
    model.vision_model.post_layernorm.bias.data[0] += 1e-3
    prints.append(backbone.fingerprint())
    model.load_state_dict(state)
    assert backbone.fingerprint() == prints[0]
    model.logit_scale.data.add_(1)
    prints.append(backbone.fingerprint())
    assert len(set(prints)) == len(prints)
    assert wrap(clip(quick_gelu=True)).fingerprint() != wrap(clip()).fingerprint()


def test_context_length_is_the_models() -> None:
    assert wrap(clip()).context_length == CONTEXT
