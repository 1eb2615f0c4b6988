"""From a model object or a model name to a :class:`Backbone`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capt.backbones._optional import import_optional
from capt.backbones.backbone import DEFAULT_TEMPLATES, Backbone
from capt.backbones.base import TextTower, TokenTower
from capt.backbones.embedded import FolderModel, load_folder, load_vit
from capt.backbones.guards import check_activation, check_transformers_activation
from capt.backbones.transforms import EvalTransform, from_open_clip, from_transformers
from capt.errors import CaptError, DataError
from capt.files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

SHIPPED: dict[str, Callable[[], FolderModel]] = {"embedded": load_folder, "embedded-vit": load_vit}
_CLIP_VOCABULARY = 49408


def wrap(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    preprocess: Callable[[Image], Tensor] | None = None,
    *,
    name: str | None = None,
    pretrained: str | None = None,
    allow_activation_mismatch: bool = False,
    truncate: str = "error",
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Backbone:
    """Put an open_clip or transformers model behind the one interface of this library.

    The model itself is kept, frozen and put in evaluation mode; nothing is copied.

    Args:
        model: ``open_clip`` CLIP, CustomTextCLIP or CoCa; ``transformers`` CLIPModel or SiglipModel.
        tokenizer: the one that belongs to the model. CLIP's own is taken when the vocabulary has CLIP's size.
        preprocess: evaluation transform; by default the one that the model's configuration describes.
        name: architecture name, for records and for the activation check.
        pretrained: which weights were loaded (an open_clip tag or a file), for the activation check.
        allow_activation_mismatch: go on with a warning if the weights were trained with another activation.
        truncate: ``"error"`` refuses texts longer than the context, ``"warn"`` cuts them with a warning.
        templates: prompt templates with ``{}`` for the class name.

    Raises:
        CaptError: unknown kind of model, activation mismatch, or a tokenizer of another model.
    """
    model.eval()  # before anything is run: batch norms would learn from it
    library = next((c.__module__.split(".")[0] for c in type(model).__mro__ if _library(c)), None)
    if library == "open_clip":
        tower, text_tower = _open_clip_towers(model)
        check_activation([tower.activation, text_tower.activation], name, pretrained, allow_activation_mismatch)
        tokenizer = tokenizer or _default_tokenizer(text_tower)
        config = getattr(model.visual, "preprocess_cfg", None)
        preprocess = preprocess or from_open_clip(config, tower.image_hw)
    elif library == "transformers":
        tower, text_tower = _transformers_towers(model)
        name = name or getattr(model.config, "_name_or_path", "") or None
        check_transformers_activation(model, allow_activation_mismatch)
        check_activation([tower.activation, text_tower.activation], name, pretrained, allow_activation_mismatch)
        siglip = not hasattr(model, "visual_projection")
        half = (0.5, 0.5, 0.5)
        plain = EvalTransform(tower.image_hw, half, half, resize_mode="squash")
        preprocess = preprocess or (plain if siglip else EvalTransform(tower.image_hw))
    else:
        raise CaptError(
            f"model: {type(model).__module__}.{type(model).__name__} is not a model of open_clip (CLIP, "
            "CustomTextCLIP, CoCa) or transformers (CLIPModel, SiglipModel). Pass the plain model, "
            "not a compiled, scripted or data-parallel one."
        )
    return Backbone(
        model,
        tower,
        text_tower,
        name=name or type(model).__name__,
        tokenizer=tokenizer,
        preprocess=preprocess,
        truncate=truncate,
        templates=templates,
    )


def load(
    model: str,
    pretrained: str | None = None,
    *,
    allow_activation_mismatch: bool = False,
    truncate: str = "error",
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a model by name.

    Args:
        model: ``"embedded"`` or ``"embedded-vit"`` (both ship with this library and need no network: one text tower,
            an EfficientNet or a ViT as image tower); an open_clip architecture such as ``"ViT-B-16"``; a folder with
            ``open_clip_config.json`` and safetensors weights; ``"hf:"`` and a folder or an already downloaded hub
            id of a transformers model, or such a folder itself.
        pretrained: open_clip's weight tag or a file; None makes random weights, with a warning.
        allow_activation_mismatch: see :func:`wrap`.
        truncate: see :func:`wrap`.
        device: where to put it.

    Raises:
        CaptError: no such model, or the checks of :func:`wrap`.
        DataError, DamagedFileError: files missing or changed.
    """
    options: dict[str, Any] = {"allow_activation_mismatch": allow_activation_mismatch, "truncate": truncate}
    folder = Path(model)
    if model in SHIPPED or (folder / "open_clip_config.json").is_file():
        made = SHIPPED[model]() if model in SHIPPED else load_folder(folder)
        backbone = wrap(
            made.model, made.tokenizer, made.preprocess, name=folder.name, templates=made.templates, **options
        )
    elif model.startswith("hf:") or (folder / "config.json").is_file():
        backbone = _load_transformers(model.removeprefix("hf:"), options)
    elif folder.is_dir():
        raise DataError(f"'{folder}': expected open_clip_config.json or config.json in this folder, found neither.")
    else:
        backbone = _load_open_clip(model, pretrained, options)
    return backbone.to(device)


def _library(cls: type) -> bool:
    return cls.__module__.startswith(("open_clip.", "transformers."))


def _open_clip_towers(model: Any) -> tuple[TokenTower, TextTower]:
    from capt.backbones.text_open_clip import OpenClipText, OpenClipTransformersText
    from capt.backbones.towers_open_clip import OpenClipResNet, OpenClipViT
    from capt.backbones.towers_timm import TimmFeatures, TimmViT

    text = getattr(model, "text", None)
    is_transformers = type(text).__name__ == "HFTextEncoder"
    text_tower = OpenClipTransformersText(model) if is_transformers else OpenClipText(model)
    visual, kind = model.visual, type(model.visual).__name__
    dim = _joint_width(model)
    if kind == "VisionTransformer":
        return OpenClipViT(visual, dim), text_tower
    if kind == "ModifiedResNet":
        return OpenClipResNet(visual), text_tower
    if kind == "TimmModel":
        return (TimmViT if TimmViT.fits(visual.trunk) else TimmFeatures)(visual, dim), text_tower
    raise CaptError(f"model: image tower {kind} is not known; expected VisionTransformer, ModifiedResNet or TimmModel.")


def _joint_width(model: Any) -> int:
    """Width of the image feature, from the last layer that makes it."""
    visual = model.visual
    if hasattr(visual, "output_dim"):
        return int(visual.output_dim)
    for layer in reversed(list(visual.head.modules())):
        if isinstance(layer, nn.Linear):
            return layer.out_features
    classifier = visual.trunk.get_classifier()
    return classifier.out_features if isinstance(classifier, nn.Linear) else visual.trunk.num_features


def _transformers_towers(model: Any) -> tuple[TokenTower, TextTower]:
    from capt.backbones.towers_transformers import TransformersText, TransformersViT

    if not (hasattr(model, "vision_model") and hasattr(model, "text_model") and hasattr(model, "logit_scale")):
        raise CaptError(f"model: {type(model).__name__} is not an image-text model; expected CLIPModel or SiglipModel.")
    return TransformersViT(model), TransformersText(model)


def _default_tokenizer(text_tower: TextTower) -> Callable[..., Any] | None:
    if text_tower.vocab_size != _CLIP_VOCABULARY:
        return None
    return _clip_tokenizer(text_tower.context_length)


@cache
def _clip_tokenizer(context_length: int) -> Callable[..., Any]:
    open_clip = import_optional("open_clip", "CLIP's tokenizer")
    tokenizer: Callable[..., Any] = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


def _load_open_clip(model: str, pretrained: str | None, options: dict[str, Any]) -> Backbone:
    open_clip = import_optional("open_clip", f"loading {model!r}")
    if model not in open_clip.list_models() and not model.startswith("hf-hub:"):
        raise CaptError(
            f"model: {model!r} is neither 'embedded' or 'embedded-vit', nor a folder, nor an open_clip architecture. "
            "open_clip.list_models() has the names."
        )
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config and not options["allow_activation_mismatch"]:  # asked before anything large is downloaded
        check_activation(["quick_gelu" if config.get("quick_gelu") else "gelu"], model, pretrained, allow=False)
    if pretrained is None and config:
        warnings.warn(f"{model}: no pretrained weights were asked for, so the weights are random.", stacklevel=3)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # ours is an error, further down
            made = open_clip.create_model(model, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError) as error:
        raise CaptError(f"model: open_clip could not load {model!r} with pretrained={pretrained!r}: {error}") from error
    return wrap(made, tokenizer, name=model, pretrained=pretrained, **options)


def _load_transformers(source: str, options: dict[str, Any]) -> Backbone:
    transformers = import_optional("transformers", f"loading {source!r}")
    try:
        model = transformers.AutoModel.from_pretrained(source, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CaptError(
            f"model: no transformers model with tokenizer was found at {source!r} ({error}). Give a folder made by "
            "save_pretrained, or download the model first: nothing is fetched here."
        ) from error
    tower, _ = _transformers_towers(model)
    config = Path(source) / "preprocessor_config.json"
    preprocess = from_transformers(read_json(config), tower.image_hw) if config.is_file() else None
    return wrap(model, tokenizer, preprocess, name=source, **options)
