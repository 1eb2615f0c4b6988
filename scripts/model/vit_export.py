"""The student as the library reads it: eight-bit matrices, half precision for the rest, and the side files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from .vit_student import MEAN, STD, vision_cfg

NAME = "capt-vit"


def packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of the blocks as int8 with one half-precision scale a row, the others in half precision."""
    out = {}
    for name, value in state.items():
        if value.dim() == 2 and ".resblocks." in name:
            scale = (value.abs().amax(1) / 127).clamp_min(1e-6).half()
            out[name] = (value / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            out[f"{name}.int8_scale"] = scale
        else:
            out[name] = value.half()
    return {name: value.contiguous() for name, value in out.items()}


def write_tower(out: Path, visual: torch.nn.Module, scale: float | None, manifest: dict) -> None:
    """Write weights, configuration and manifest of a tower."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {f"visual.{name}": value.detach().float().cpu() for name, value in visual.state_dict().items()}
    if scale is not None:
        state["logit_scale"] = torch.tensor(math.log(scale))
    save_file(packed(state), out / f"{NAME}.safetensors", metadata={"format": "pt"})
    (out / f"{NAME}.safetensors").chmod(0o644)
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision_cfg(len(visual.transformer.resblocks))},
              "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic",
                                 "resize_mode": "shortest"}}  # fmt: skip
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "fit_manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
