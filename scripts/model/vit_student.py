"""The student: an open_clip `VisionTransformer`, a forward pass of it that is fast on a CPU, and its start."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .encoders import allow_torchvision

DIM, WIDTH, HEADS, PATCH, SIZE = 512, 384, 6, 14, 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vision_cfg(layers: int) -> dict:
    """The `vision_cfg` of open_clip for this tower: pre-norm ViT without the norm before the first block, CLS pooling."""
    return {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": layers, "head_width": WIDTH // HEADS,
            "no_ln_pre": True, "pool_type": "tok"}  # fmt: skip


def new_visual(layers: int) -> torch.nn.Module:
    """An open_clip `VisionTransformer` with random weights."""
    allow_torchvision()
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=SIZE, patch_size=PATCH, width=WIDTH, layers=layers, heads=HEADS, mlp_ratio=4,
                             no_ln_pre=True, pool_type="tok", output_dim=DIM)  # fmt: skip


def embed(visual: torch.nn.Module, images: torch.Tensor, keep: float = 1.0) -> torch.Tensor:
    """Tokens [B, 1 + kept, D] of normalised images [B, 3, H, W]; a random part of the patches where keep < 1."""
    weight = visual.conv1.weight
    patch = weight.shape[-1]
    batch, _, high, wide = images.shape
    cells = images.view(batch, 3, high // patch, patch, wide // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3)
    tokens = F.linear(cells.flatten(1, 2), weight.flatten(1)) + visual.positional_embedding[1:]
    if keep < 1:
        count = max(1, round(keep * tokens.shape[1]))
        chosen = torch.rand(batch, tokens.shape[1], device=tokens.device).argsort(1)[:, :count, None]
        tokens = tokens.gather(1, chosen.expand(-1, -1, tokens.shape[-1]))
    first = (visual.class_embedding + visual.positional_embedding[0]).to(tokens.dtype)
    return torch.cat([first.expand(batch, 1, -1), tokens], 1)


def block(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One residual block; attention in plain matrix products, several times faster on a CPU than the fused one."""
    batch, count, width = x.shape
    heads = layer.attn.num_heads
    y = F.linear(layer.ln_1(x), layer.attn.in_proj_weight, layer.attn.in_proj_bias)
    q, k, v = y.view(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = (q * (width // heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    x = x + layer.attn.out_proj(mixed.transpose(1, 2).reshape(batch, count, width))
    return x + layer.mlp(layer.ln_2(x))


def forward(visual: torch.nn.Module, images: torch.Tensor, keep: float = 1.0) -> torch.Tensor:
    """Joint features [B, DIM], not normalised: what `visual(images)` gives where keep is 1."""
    x = embed(visual, images, keep)
    for layer in visual.transformer.resblocks:
        x = block(layer, x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def load_start(visual: torch.nn.Module, source: dict[str, torch.Tensor], layers: list[int]) -> None:
    """Copy the named layers of a DINOv2 ViT-S/14 into the student.

    Layer scale is multiplied into the layers it follows, the bias of the patch projection goes into the positions, and
    the positions are interpolated to the student's grid.
    """
    side, grid = math.isqrt(source["pos_patch"].shape[1]), SIZE // PATCH
    positions = source["pos_patch"].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (grid, grid), mode="bicubic", antialias=True).flatten(2)[0].T
    state = visual.state_dict()
    prefix = "embeddings.patch_embeddings.projection."
    state["conv1.weight"] = source[prefix + "weight"]
    state["class_embedding"] = source["embeddings.cls_token"].flatten()
    state["positional_embedding"] = torch.cat([source["pos_cls"][0], positions + source[prefix + "bias"]])
    for new, old in enumerate(layers):
        there, here = f"encoder.layer.{old}.", f"transformer.resblocks.{new}."
        parts = [f"{there}attention.attention.{name}." for name in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            state[f"{here}attn.in_proj_{kind}"] = torch.cat([source[part + kind] for part in parts])
            state[f"{here}ln_1.{kind}"] = source[f"{there}norm1.{kind}"]
            state[f"{here}ln_2.{kind}"] = source[f"{there}norm2.{kind}"]
            state[f"{here}mlp.c_fc.{kind}"] = source[f"{there}mlp.fc1.{kind}"]
            for name, scale, target in (("attention.output.dense.", "layer_scale1", "attn.out_proj."),
                                        ("mlp.fc2.", "layer_scale2", "mlp.c_proj.")):  # fmt: skip
                factor = source[f"{there}{scale}.lambda1"]
                value = source[there + name + kind]
                state[here + target + kind] = value * (factor[:, None] if value.dim() == 2 else factor)
    state["ln_post.weight"], state["ln_post.bias"] = source["layernorm.weight"], source["layernorm.bias"]
    visual.load_state_dict(state, strict=True)
