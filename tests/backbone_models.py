"""Tiny random models of every kind that can be wrapped, built from configurations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capt.backbones import import_torchvision

import_torchvision()

import open_clip  # noqa: E402
import timm  # noqa: E402
import transformers  # noqa: E402

DIM, CONTEXT = 24, 16
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "bird",
    "red",
    "blue",
    "small",
    "big",
    "in",
    "on",
    "at",
    "an",
    "old",
    "new",
    "car",
    "tree",
)
TEXT = 24, 16
WORDS = tuple(
    [
        "a",
        "photo",
        "of",
        "the",
        "cat",
        "dog",
        "bird",
        "red",
        "blue",
        "small",
        "big",
        "in",
        "on",
        "at",
        "an",
        "old",
        "new",
        "car",
        "tree",
    ]
)
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """Random values in every parameter and statistic, so that no norm, scale or bias is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "mask" not in name and name != "logit_scale":
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.1 * (noise.abs() if "var" in name else noise))
    return model.eval().requires_grad_(False)


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any) -> Any:
    return shaken(open_clip.CLIP(DIM, {**VIT, **(vision or {})}, {**TEXT, **(text or {})}, **options))


def custom_text(text: dict[str, Any]) -> Any:
    return shaken(open_clip.CustomTextCLIP(DIM, VIT, {**TEXT, **text}, init_logit_bias=-10.0))


def coca() -> Any:
    vision = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    return shaken(open_clip.CoCa(DIM, {"context_length": CONTEXT, "layers": 1, "width": 32, "heads": 2}, text, vision))


def resnet() -> Any:
    return clip({"layers": (1, 1, 1, 1), "width": 8, "head_width": 16, "image_size": 64})


def timm_model(trunk: nn.Module | None = None, name: str = "resnet10t", image_size: int = 64, **options: Any) -> Any:
    vision = {"timm_model_name": name, "image_size": image_size, **options}
    model = open_clip.CLIP(DIM, vision, TEXT)
    if trunk is not None:
        model.visual.trunk = trunk
        model.visual.head = nn.Sequential(nn.Linear(trunk.num_features, DIM))
    return shaken(model)


def timm_vit(**options: Any) -> Any:
    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, init_values=0.5, **options
    )
    return timm_model(trunk, image_size=32)


def timm_swin() -> Any:
    trunk = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=0
    )
    return timm_model(trunk, image_size=32)


def timm_convnext() -> Any:
    """Its final map is channels-last in memory, which pooling has to reproduce."""
    return timm_model(timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0))


def timm_eva() -> Any:
    trunk = timm.models.eva.Eva(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return timm_model(trunk, image_size=32)


def hf_clip(vocab_size: int = 49408, eos: int = 49407, **vision: Any) -> Any:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.CLIPConfig(
        text_config={
            **shared,
            "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT,
            "eos_token_id": eos,
            "pad_token_id": 0,
            "projection_dim": DIM,
        },
        vision_config={**shared, "image_size": 32, "patch_size": 8, "projection_dim": DIM, **vision},
        projection_dim=DIM,
    )
    return shaken(transformers.CLIPModel(config))


def hf_siglip(vocab_size: int = 64) -> Any:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.SiglipConfig(
        text_config={**shared, "vocab_size": vocab_size, "max_position_embeddings": CONTEXT, "pad_token_id": 1},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
    )
    return shaken(transformers.SiglipModel(config))


def hf_text(folder: Path) -> Any:
    """open_clip with a transformers text tower, configured from a local folder."""
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT + 2,
    )
    config.save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shaken(open_clip.CustomTextCLIP(DIM, VIT, {**text, "context_length": CONTEXT}))


def word_tokenizer(vocab_size: int = 64, pad_is_end: bool = False) -> Any:
    """A transformers tokenizer over a handful of words, made without any file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"<s>": 0, "<pad>": 1, "<unk>": 3}
    vocabulary = {**special, **{word: 4 + i for i, word in enumerate(WORDS)}}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary) + 1, vocab_size - 1)}
    vocabulary["</s>"] = vocab_size - 1
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", vocab_size - 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if pad_is_end else "<pad>",
    )


TOWERS: dict[str, Callable[[], Any]] = {
    "open_clip ViT, class token": clip,
    "open_clip ViT, average, norm after pooling": lambda: clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "open_clip ViT, attention pooling": lambda: clip({"attentional_pool": True, "attn_pooler_heads": 2}),
    "open_clip ViT, layer scale, QuickGELU": lambda: clip({"ls_init_value": 0.5}, quick_gelu=True),
    "open_clip ViT, custom blocks": lambda: clip({"qk_norm": True, "scale_attn": True, "scale_fc": True}),
    "open_clip CoCa": coca,
    "open_clip ResNet": resnet,
    "timm ResNet": timm_model,
    "timm ResNet, rotary attention pool": lambda: timm_model(timm_pool="rot_attn", timm_proj=""),
    "timm EfficientNet-Lite": lambda: timm_model(name="tf_efficientnet_lite0", timm_pool=""),
    "timm ConvNeXt": timm_convnext,
    "timm ViT, class token": timm_vit,
    "timm ViT, SigLIP map pooling": lambda: timm_vit(global_pool="map", class_token=False),
    "timm ViT, registers, average": lambda: timm_vit(global_pool="avg", reg_tokens=2),
    "timm ViT, post-norm blocks": lambda: timm_vit(block_fn=timm.models.vision_transformer.ResPostBlock),
    "timm Swin": timm_swin,
    "timm EVA": timm_eva,
    "transformers CLIP": hf_clip,
    "transformers CLIP, eager attention": lambda: with_eager(hf_clip()),
    "transformers SigLIP": hf_siglip,
}


def with_eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model
