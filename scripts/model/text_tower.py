"""Distil the teacher's text side into a small open_clip text transformer.

Only the tokens that occur in the corpus are trained (a compact table during the fit); the others keep their start
value, the PCA of their MiniLM embedding. Batches hold texts of similar length, so little of them is padding.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .corpus import token_embeddings
from .encoders import allow_torchvision

MODEL_CFG = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "tf_efficientnet_lite2", "timm_model_pretrained": False, "timm_pool": "",
                   "timm_proj": "linear", "timm_proj_bias": True, "image_size": 224},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}  # fmt: skip
CONTEXT, WIDTH = MODEL_CFG["text_cfg"]["context_length"], MODEL_CFG["text_cfg"]["width"]
TOKEN_STD = 0.02


def new_clip() -> torch.nn.Module:
    """The whole model with fresh weights."""
    allow_torchvision()
    from open_clip.model import CLIP

    return CLIP(**MODEL_CFG)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Token ids int64 [N, CONTEXT]."""
    allow_torchvision()
    import open_clip

    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=CONTEXT)
    return torch.cat([tokenizer(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])


def _vocabulary() -> list[str]:
    allow_torchvision()
    import open_clip

    decoder = open_clip.tokenizer.SimpleTokenizer().decoder
    return [decoder[i] for i in range(len(decoder))]


def encode(model: torch.nn.Module, table: torch.nn.Parameter, ids: torch.Tensor) -> torch.Tensor:
    """Unit text embeddings of compact ids [B, L], where the end-of-text token is the largest id. Same as open_clip."""
    length = ids.shape[1]
    x = F.embedding(ids, table) + model.positional_embedding[:length]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is four times slower for texts of ten tokens
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize((x[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection).float(), dim=-1)


def distil(work: Path, texts: list[str], targets: torch.Tensor, steps: int, batch: int = 256, rate: float = 2e-3,
           seed: int = 0, start: Path | None = None) -> Path:  # fmt: skip
    """Train the text tower on (texts, teacher targets [N, 512]); returns the checkpoint, written every 100 steps.

    A run that was interrupted goes on from its last checkpoint; a new run begins with the tower in `start`, if given.
    """
    torch.manual_seed(seed)
    model = new_clip()
    ids = tokenize(texts)
    used, compact = torch.unique(ids, return_inverse=True)  # sorted, so the end-of-text id stays the largest
    if start:
        tower = torch.load(start)
        full_table = tower.pop("token_embedding.weight")
        model.load_state_dict(tower, strict=False)
    else:
        full_table = token_embeddings(work, WIDTH, _vocabulary())
        full_table *= TOKEN_STD / full_table.std()
    table = torch.nn.Parameter(full_table[used].clone())
    names = [n for n, _ in model.named_parameters()
             if not n.startswith("visual") and n not in ("logit_scale", "token_embedding.weight")]  # fmt: skip
    parameters = dict(model.named_parameters())
    weights = [parameters[n] for n in names]
    optimiser = torch.optim.AdamW([{"params": weights, "rate": rate}, {"params": [table], "rate": 2 * rate / 3,
                                   "weight_decay": 0.0}], weight_decay=0.02, betas=(0.9, 0.98), fused=True)  # fmt: skip
    lengths = (ids != 0).sum(1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator)
    held, train = order[:1500], order[1500:]
    path, first = work / "fit" / "text_tower.pt", 0
    state_path = work / "fit" / "distil_state.pt"
    if state_path.exists():
        state = torch.load(state_path)
        if state["steps"] == steps and state["texts"] == len(texts):
            first = state["done"]
            for parameter, value in zip([*weights, table], state["weights"], strict=True):
                parameter.data.copy_(value)
            optimiser.load_state_dict(state["optimiser"])
            generator.set_state(state["generator"])
    began = time.time()
    for step in range(first, steps):
        factor = min((step + 1) / (0.06 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * factor
        pool = train[torch.randint(len(train), (batch * 8,), generator=generator)]
        pool = pool[lengths[pool].argsort()]
        part = int(torch.randint(8, (1,), generator=generator))
        chosen = pool[part * batch : (part + 1) * batch]
        rows, wanted = compact[chosen, : int(lengths[chosen].max())], targets[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            got = encode(model, table, rows)
        distance = (1 - (got * wanted).sum(1)).mean()
        alike = F.kl_div(F.log_softmax(20 * got @ wanted.T, 1), F.softmax(20 * wanted @ wanted.T, 1),
                         reduction="batchmean")  # fmt: skip
        optimiser.zero_grad(set_to_none=True)
        (3 * distance + alike).backward()
        torch.nn.utils.clip_grad_norm_([*weights, table], 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            with torch.no_grad():
                seen = torch.cat([encode(model, table, compact[h, : int(lengths[h].max())]) for h in held.split(300)])
            cosine = (seen * targets[held]).sum(1).mean()
            found = ((seen @ targets[held].T).argmax(1) == torch.arange(len(held))).float().mean()
            print(f"step {step + 1} of {steps}: loss {distance:.3f} {alike:.3f}, held-out cosine {cosine:.3f}, "
                  f"held-out top-1 {found:.3f}, {time.time() - began:.0f} s", flush=True)  # fmt: skip
            full_table[used] = table.detach()
            tower = {n: parameters[n].detach().clone() for n in names} | {"token_embedding.weight": full_table.clone()}
            torch.save(tower, path)
            torch.save({"steps": steps, "texts": len(texts), "done": step + 1, "optimiser": optimiser.state_dict(),
                        "weights": [p.detach() for p in [*weights, table]], "generator": generator.get_state()},
                       state_path)  # fmt: skip
    return path
