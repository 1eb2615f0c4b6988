"""The student: an open_clip `VisionTransformer`, and a forward pass of it that is fast on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .encoders import allow_torchvision

DIM, WIDTH, HEADS, PATCH, SIZE = 512, 384, 6, 14, 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vision_cfg(layers: int) -> dict:
    """open_clip's `vision_cfg` of this tower: pre-norm ViT, no norm before the first block, CLS pooling."""
    return {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": layers, "head_width": WIDTH // HEADS,
            "no_ln_pre": True, "pool_type": "tok"}  # fmt: skip


def new_visual(layers: int) -> torch.nn.Module:
    """An open_clip `VisionTransformer` with random weights."""
    allow_torchvision()
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=SIZE, patch_size=PATCH, width=WIDTH, layers=layers, heads=HEADS, mlp_ratio=4,
                             no_ln_pre=True, pool_type="tok", output_dim=DIM)  # fmt: skip


def embed(visual: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 1 + P, D] of normalised images [B, 3, H, W] as they enter the first block."""
    weight = visual.conv1.weight
    patch = weight.shape[-1]
    batch, _, high, wide = images.shape
    cells = images.view(batch, 3, high // patch, patch, wide // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3)
    tokens = F.linear(cells.flatten(1, 2), weight.flatten(1)) + visual.positional_embedding[1:]
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
