"""Multi-Granularity Difference Expert (MGDE): a mixture of experts over semantic and sample guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError
from capt.ops import expert_gating


@dataclass(frozen=True)
class ExpertOutput:
    """Result of :class:`MultiGranularityDifferenceExpert`.

    Attributes:
        correction: float [B, d], y in ``f = normalize(v + beta * y)``.
        weights: float32 [B, E], router weights; at most top_k non-zero, each row sums to 1.
        balance: float32 [], load-balance loss ``E * sum_e fraction_e * mean_probability_e``.
    """

    correction: Tensor
    weights: Tensor
    balance: Tensor


class MultiGranularityDifferenceExpert(nn.Module):
    """Four tokens of one image (feature, commonality, difference, sample) attend to each other; a router sends the
    result to the best experts, which correct the image feature.

    Tokens of different images never meet, so the output of an image does not depend on its batch.

    Attributes:
        beta: float32 [], strength of the correction, 0 at the start: then the base model is reproduced exactly.
        attention_gain: float32 [], strength of the 4-token attention, 0 at the start.
        gate, w_in, b_in, w_out, b_out: router and experts; 0 commonality, 1 difference, 2 sample.
        shared: linear expert [d, d] that every image uses, zero at the start, or None.

    Source: CAPT, MGDE (three experts, top-2, hidden 4x, QuickGELU, dropout 0.3); 4-token attention, gains and the
    shared expert: ours.
    """

    def __init__(
        self, dim: int, *, width: int | None = None, n_heads: int = 12, n_experts: int = 3, top_k: int = 2,
        hidden: int | None = None, dropout: float = 0.3, shared_expert: bool = False,
    ) -> None:  # fmt: skip
        """Create the module.

        Args:
            dim: joint width d of the backbone.
            width: width of attention and experts; default d. Another width adds a shared linear map in and one out.
            n_heads: attention heads; must divide the width.
            n_experts, top_k: experts and how many each image uses.
            hidden: hidden width of an expert; default 4 * width.
            dropout: on the hidden layer, in training only.
            shared_expert: add a linear expert that every image uses; neutral at the start (ours).
        """
        super().__init__()
        width = width or dim
        hidden = hidden or 4 * width
        if width % n_heads:
            raise CaptError(f"MGDE: n_heads must divide the width, found {n_heads} heads for width {width}")
        if not 1 <= top_k <= n_experts:
            raise CaptError(f"MGDE: top_k must be in 1..{n_experts}, found {top_k}")
        self.dim, self.width, self.n_heads, self.top_k, self.dropout = dim, width, n_heads, top_k, dropout
        self.enter = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.leave = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.norm_in = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.empty(n_experts, width).normal_(std=0.02))
        self.w_in = nn.Parameter(torch.empty(n_experts, hidden, width).normal_(std=0.02))
        self.b_in = nn.Parameter(torch.zeros(n_experts, hidden))
        self.w_out = nn.Parameter(torch.empty(n_experts, width, hidden).normal_(std=0.02))
        self.b_out = nn.Parameter(torch.zeros(n_experts, width))
        self.shared = nn.Linear(dim, dim, bias=False) if shared_expert else None
        if self.shared is not None:
            nn.init.zeros_(self.shared.weight)
        self.attention_gain = nn.Parameter(torch.zeros(()))
        self.beta = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def initialise_experts(
        self, commonality: Tensor | None = None, difference: Tensor | None = None,
        feed_forward: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Give the experts the knowledge they are named after.

        Args:
            commonality, difference: unit-norm centres float [K, d] of that kind's prompts; they become the first
                K rows of the expert's first layer and the first K columns of its second. Skipped when the
                expert's width is not d.
            feed_forward: (w_in [H, W], b_in [H], w_out [W, H], b_out [W]) of the tower's last block, copied into
                the sample expert; skipped when its shapes are not the expert's.
        """
        for expert, centres in ((0, commonality), (1, difference)):
            if centres is not None and centres.shape[1] == self.width and expert < len(self.gate):
                n = min(len(centres), self.w_in.shape[1])
                self.w_in[expert, :n] = centres[:n].to(self.w_in)
                self.w_out[expert, :, :n] = centres[:n].to(self.w_out).T
        if feed_forward is not None and feed_forward[0].shape == self.w_in.shape[1:] and len(self.gate) > 2:
            for mine, theirs in zip((self.w_in, self.b_in, self.w_out, self.b_out), feed_forward, strict=True):
                mine[2] = theirs.to(mine)

    def forward(
        self, features: Tensor, commonality: Tensor | None, difference: Tensor | None, sample: Tensor | None
    ) -> ExpertOutput:
        """Correct a batch of image features; all arguments float [B, d]. None: the image has no such token."""
        guidance = [token for token in (commonality, difference, sample) if token is not None]
        tokens = self.enter(torch.stack([features, *guidance], 1))
        tokens = tokens + self.attention_gain * self._attend(self.norm_in(tokens))
        hidden = self.norm_out(tokens)[:, 0]
        output, weights, probabilities, load = expert_gating(
            hidden, self.gate, self.w_in, self.b_in, self.w_out, self.b_out,
            top_k=self.top_k, dropout=self.dropout, training=self.training,
        )  # fmt: skip
        # load counts an expert once per image that uses it; dividing by top_k makes the fractions sum to 1.
        balance = len(self.gate) * (load.detach() / self.top_k * probabilities.mean(0)).sum()
        return ExpertOutput(self.leave(output), weights, balance)

    def without_experts(self, *guidance: Tensor | None) -> ExpertOutput:
        """An ablation: the mean of the guidance, float [B, d] each, instead of the experts' answer. Source: ours."""
        given = [token for token in guidance if token is not None]
        correction = torch.stack(given).mean(0) if given else self.beta.new_zeros(())
        return ExpertOutput(correction, correction.new_zeros(0), correction.new_zeros(()))

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, n_tokens, _ = tokens.shape
        query, key, value = self.attention_in(tokens).view(batch, n_tokens, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.attention_out(attended.transpose(1, 2).reshape(batch, n_tokens, self.width))
        return mixed

    def share(self, own: Tensor) -> Tensor:
        """Unit-norm ``normalize(s + W s)`` of adapted features float [..., d]: the shared expert alone."""
        return own if self.shared is None else F.normalize(own + self.shared(own), dim=-1)

    def correct(
        self,
        raw_features: Tensor,
        correction: Tensor,
        own: Tensor | None = None,
        strength: float = 1.0,
        extra: Tensor | float = 0.0,
        *,
        own_change: bool = True,
    ) -> Tensor:
        """``normalize(v + strength * (beta * y + (own - v) + W own) + extra)``; W and own - v are the shared expert.

        Args:
            raw_features: float [B, d], base features before normalisation.
            correction: float [B, d], y of :meth:`forward`.
            own: float [B, d], unit norm, the image through the Diff-Manner Adapter; None leaves the shared expert out.
            strength: of the learned correction.
            extra: float [B, d], further change of v, see :class:`capt.modules.SampleEvidence`.
            own_change: False leaves ``own - v`` out, where an adapter at rest already changes the feature.

        Written on the raw feature so that a neutral correction gives the very bits of ``normalize(v)``.
        """
        change = self.beta * correction
        if own is not None and self.shared is not None:
            if own_change:
                change = change + (own - F.normalize(raw_features, dim=-1))
            change = change + self.shared(own)
        norm = raw_features.norm(dim=-1, keepdim=True)
        return F.normalize(raw_features + norm * (strength * change + extra), dim=-1)

    def extra_repr(self) -> str:
        n_experts, hidden, width = self.w_in.shape
        return f"dim={self.dim}, width={width}, experts={n_experts}, top_k={self.top_k}, hidden={hidden}"
