"""The model that ships with the library, and folders laid out like it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from capt.backbones._optional import import_optional
from capt.backbones.backbone import DEFAULT_TEMPLATES
from capt.backbones.transforms import from_open_clip
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors, read_json, sha256

if TYPE_CHECKING:
    from PIL.Image import Image


_ROW_SCALE = ".int8_scale"


class FolderModel(NamedTuple):
    """An open_clip model read from a folder, and what belongs to it."""

    model: nn.Module
    tokenizer: Callable[..., Any]
    preprocess: Callable[[Image], Tensor]
    templates: list[str]


def embedded_folder() -> Path:
    """Where the shipped model lies."""
    return Path(str(files("capt"))) / "assets" / "model"


def embedded_vit_folder() -> Path:
    """Where the shipped ViT image tower lies."""
    return Path(str(files("capt"))) / "assets" / "vit"


def load_folder(folder: str | Path | None = None, *, fold: bool | None = None) -> FolderModel:
    """Read a model from ``open_clip_config.json`` and one safetensors file; no network.

    ``templates.json`` (``{"templates": [...]}``) and ``checksums.json`` (``{file name: {"sha256": ...}}``) are used
    when present; the shipped model must have its checksums.

    Args:
        folder: None for the shipped model.
        fold: see :func:`fold_batch_norm`; by default only for the shipped model.

    Raises:
        DataError: a file is missing.
        DamagedFileError: a checksum is wrong or the weights do not fit the configuration.
    """
    shipped = folder is None
    root = embedded_folder() if folder is None else Path(folder)
    config, tensors = _read(root, check=shipped)
    made = _assembled(root, config, tensors, _templates(root))
    if shipped if fold is None else fold:
        visual: Any = made.model.visual
        fold_batch_norm(visual.trunk)
        visual.to(memory_format=torch.channels_last)
    return made


def load_vit(folder: str | Path | None = None) -> FolderModel:
    """Put an image tower's folder together with the text tower, logit scale and templates of the shipped model.

    Args:
        folder: ``open_clip_config.json`` without ``text_cfg``, ``checksums.json`` and one safetensors file with the
            ``visual.*`` weights, and a ``logit_scale`` where the tower has its own; None for the shipped ViT.

    Raises:
        DataError: a file is missing.
        DamagedFileError: a checksum is wrong or the weights do not fit the configuration.
    """
    root = embedded_vit_folder() if folder is None else Path(folder)
    base_config, base = _read(embedded_folder(), check=True)
    config, tensors = _read(root, check=True)
    config["model_cfg"]["text_cfg"] = base_config["model_cfg"]["text_cfg"]
    text = {name: tensor for name, tensor in base.items() if not name.startswith("visual.")}
    return _assembled(root, config, text | tensors, _templates(embedded_folder()))


def _read(root: Path, *, check: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a folder, the weights in single precision."""
    if check or (root / "checksums.json").is_file():
        _check_sums(root)
    return read_json(root / "open_clip_config.json"), _unpacked(load_tensors(_weights(root)))


def _unpacked(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what is for the disk only: half precision, and int8 matrices with a scale for each row."""
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_ROW_SCALE):
            continue
        scale = stored.get(name + _ROW_SCALE)
        if scale is not None:
            tensor = tensor.float() * scale.float()[:, None]
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _weights(root: Path) -> Path:
    weights = sorted(root.glob("*.safetensors"))
    if len(weights) != 1:
        raise DataError(f"'{root}': expected one .safetensors file, found {len(weights)}.")
    return weights[0]


def _assembled(root: Path, config: dict[str, Any], tensors: dict[str, Tensor], templates: list[str]) -> FolderModel:
    open_clip = import_optional("open_clip", f"the model in '{root.name}'")
    model = _built(open_clip, config["model_cfg"])
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise DamagedFileError(f"'{_weights(root)}': the weights do not fit open_clip_config.json: {error}") from error
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    text_config = config["model_cfg"]["text_cfg"]
    if text_config.get("hf_tokenizer_name"):
        tokenizer = open_clip.get_tokenizer(f"local-dir:{root}")  # its files lie beside the weights
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=text_config.get("context_length", 77))
    return FolderModel(model, tokenizer, from_open_clip(config.get("preprocess_cfg"), size), templates)


def _built(open_clip: Any, config: dict[str, Any]) -> Any:
    if "multimodal_cfg" in config:
        kind = open_clip.CoCa
    elif config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        kind = open_clip.CustomTextCLIP
    else:
        kind = open_clip.CLIP
    return kind(**{k: v for k, v in config.items() if k != "custom_text"})


@torch.no_grad()
def fold_batch_norm(trunk: nn.Module) -> None:
    """Merge each batch norm of a timm EfficientNet into the convolution before it, in place.

    Frozen statistics make the pair one affine map, so results change by rounding only, and the tower becomes
    markedly faster on a CPU (see ``docs/backbones.md``).

    Raises:
        CaptError: the trunk is of another family, where registration order does not tell what follows what.
    """
    if type(trunk).__name__ != "EfficientNet":
        raise CaptError(f"trunk: {type(trunk).__name__} is not an EfficientNet, whose layout is the one known here.")
    trunk.eval()
    for module in list(trunk.modules()):
        children = list(module.named_children())
        for (name, convolution), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, norm.act)  # timm's norm layers carry the activation


def _templates(root: Path) -> list[str]:
    path = root / "templates.json"
    return list(read_json(path)["templates"] if path.is_file() else DEFAULT_TEMPLATES)


def _check_sums(root: Path) -> None:
    for name, expected in read_json(root / "checksums.json").items():
        if not (root / name).is_file():
            raise DataError(f"'{root / name}': listed in checksums.json, but there is no such file.")
        if sha256(root / name) != expected["sha256"]:
            raise DamagedFileError(
                f"'{root / name}': its SHA-256 is not the one in checksums.json: the file was changed or damaged. "
                "Restore it or install the package again."
            )
