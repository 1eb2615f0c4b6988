"""Distillation of the student's last blocks on stored tokens."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from .vit_student import block

SCALE = 25.0  # temperature of the similarity tables, the shipped model's logit scale


class Tail(torch.nn.Module):
    """The blocks after the frozen ones, the last norm, the projection: tokens [B, 1 + P, D] to features [B, DIM]."""

    def __init__(self, visual: torch.nn.Module, frozen: int):
        super().__init__()
        self.blocks = copy.deepcopy(visual.transformer.resblocks[frozen:])
        self.norm = copy.deepcopy(visual.ln_post)
        self.proj = torch.nn.Parameter(visual.proj.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.blocks[:-1]:
            x = block(layer, x)
        return self.norm(last_block(self.blocks[-1], x)).float() @ self.proj.float()

    def put_back(self, visual: torch.nn.Module, frozen: int) -> None:
        """Copy the weights into a whole tower."""
        visual.transformer.resblocks[frozen:].load_state_dict(self.blocks.state_dict())
        visual.ln_post.load_state_dict(self.norm.state_dict())
        visual.proj.data.copy_(self.proj)


def last_block(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The class token [B, D] after the last block: nothing else of that block is read."""
    batch, count, width = x.shape
    heads = layer.attn.num_heads
    y = layer.ln_1(x)
    weight, bias = layer.attn.in_proj_weight, layer.attn.in_proj_bias
    q = F.linear(y[:, :1], weight[:width], bias[:width]).view(batch, 1, heads, -1).transpose(1, 2)
    k, v = F.linear(y, weight[width:], bias[width:]).view(batch, count, 2, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = (q * (width // heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    first = x[:, 0] + layer.attn.out_proj(mixed.transpose(1, 2).reshape(batch, width))
    return first + layer.mlp(layer.ln_2(first))


def distil_loss(out: torch.Tensor, target: torch.Tensor, bank: torch.Tensor, share: float) -> torch.Tensor:
    """Cosine distance to the teacher plus `share` times the divergence of the similarities to a bank of texts."""
    unit = F.normalize(out, dim=-1)
    loss = (1 - (unit * F.normalize(target, dim=-1)).sum(-1)).mean()
    if share:
        wanted = F.log_softmax(SCALE * F.normalize(target, dim=-1) @ bank.T, dim=-1)
        found = F.log_softmax(SCALE * unit @ bank.T, dim=-1)
        loss = loss + share * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return loss


@torch.inference_mode()
def run_tail(tail: Tail, tokens: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Features float32 [N, DIM] of stored tokens [N, 1 + P, D], computed in bfloat16."""
    fast = copy.deepcopy(tail).bfloat16()
    device = fast.proj.device
    return torch.cat([fast(part.to(device)) for part in tokens.split(batch)])


@torch.inference_mode()
def linear_start(tail: Tail, tokens: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, ridge: float) -> None:
    """Set the projection to the ridge regression of the targets on the normed class token.

    open_clip's projection has no bias: the mean goes into the bias of the norm, as far as the projection reaches it.
    """
    width = tail.proj.shape[0]
    whole, tail.proj.data = tail.proj.data, torch.eye(width)
    x = run_tail(tail, tokens[rows])
    y = targets[rows].float()
    tail.proj.data = whole
    mean, centre = x.mean(0), y.mean(0)
    x = x - mean
    weight = torch.linalg.solve(x.T @ x + ridge * x.pow(2).sum() / width * torch.eye(width), x.T @ (y - centre))
    tail.proj.data.copy_(weight)
    tail.norm.bias.data += (centre - mean @ weight) @ torch.linalg.pinv(weight, rtol=1e-2)


def best_scale(cosines: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The logit scale from 4 to 60 that minimises the negative log-likelihood, and that minimum."""
    losses = {scale: F.cross_entropy(scale * cosines, labels).item() for scale in range(4, 61)}
    best = min(losses, key=losses.get)
    return float(best), losses[best]


def train_tail(tail: Tail, tokens: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, bank: torch.Tensor,
               seconds: float, file: Path, *, rate: float = 3e-4, keep: float = 0.5, share: float = 0.5,
               mix: float = 0.5, batch: int = 64, decay: float = 0.05, average: float = 0.99, seed: int = 0,
               flat: bool = False, watch: Callable[[Tail], str] | None = None) -> Tail:  # fmt: skip
    """AdamW with a cosine rate over wall-clock time; returns the running average of the weights.

    Args:
        tokens: [N, 1 + P, D] as they enter the first trained block.
        targets: the teacher's features [N, DIM].
        rows: the pictures that are trained on.
        bank: unit text features [T, DIM] for the divergence of similarities.
        seconds: how long.
        file: the average is written there once a minute and in the end.
        keep: share of the patch tokens, drawn anew for each step, that a step looks at.
        share: weight of the divergence beside the cosine distance.
        mix: share of the steps whose pictures are mixed in pairs, up to half and half, tokens and targets alike.
        flat: leave the rate at its peak (to be followed by a second call).
        watch: makes a text of the average, to be printed once a minute.
    """
    draw = torch.Generator().manual_seed(seed)
    device = tail.proj.device
    fast, best = copy.deepcopy(tail).bfloat16(), copy.deepcopy(tail)
    optimiser = torch.optim.AdamW(
        [{"params": [p for p in tail.parameters() if p.dim() > 1], "weight_decay": decay},
         {"params": [p for p in tail.parameters() if p.dim() == 1], "weight_decay": 0.0}], lr=rate)  # fmt: skip
    start, step, order, losses, shown = time.time(), 0, rows[:0], [], time.time()
    while (done := (time.time() - start) / seconds) < 1:
        factor = 1.0 if flat else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor * min(1.0, (step + 1) / 50)
        if len(order) < batch:
            order = rows[torch.randperm(len(rows), generator=draw)]
        chosen, order = order[:batch], order[batch:]
        x, y = tokens[chosen], targets[chosen].float()
        if keep < 1:
            patches = torch.randperm(x.shape[1] - 1, generator=draw)[: round(keep * (x.shape[1] - 1))]
            x = torch.cat([x[:, :1], x[:, 1 + patches]], 1)
        if float(torch.rand(1, generator=draw)) < mix:
            part, other = float(torch.rand(1, generator=draw)) / 2, torch.randperm(batch, generator=draw)
            x, y = torch.lerp(x, x[other], part), torch.lerp(y, y[other], part)
        loss = distil_loss(fast(x.to(device)), y.to(device), bank, share)
        loss.backward()
        for slow, quick in zip(tail.parameters(), fast.parameters(), strict=True):
            slow.grad, quick.grad = quick.grad.float(), None
        torch.nn.utils.clip_grad_norm_(tail.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            pull = max(1 - average, 1 / (step + 1))
            for slow, quick, mean in zip(tail.parameters(), fast.parameters(), best.parameters(), strict=True):
                quick.copy_(slow)
                mean.lerp_(slow, pull)
        losses.append(loss.item())
        if time.time() - shown > 60:
            text = f", {watch(best)}" if watch else ""
            print(f"{time.time() - start:.0f} s, step {step}, {step * batch / len(rows):.2f} epochs, "
                  f"loss {sum(losses) / len(losses):.4f}{text}", flush=True)  # fmt: skip
            _save(best, file)
            losses, shown = [], time.time()
    _save(best, file)
    return best


def _save(tail: Tail, file: Path) -> None:
    torch.save({name: value.cpu() for name, value in tail.state_dict().items()}, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
