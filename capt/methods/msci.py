"""MSCI: multi-stage cross-modal interaction for compositional zero-shot learning."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.methods.compositional.model import CompositionalModel, PairTexts, View
from capt.methods.msci_config import MSCIConfig
from capt.modules.composition_prompts import CompositionPrompts
from capt.modules.disentangler import Disentangler
from capt.modules.layer_aggregator import LayerAggregator
from capt.modules.layer_maps import layer_tap
from capt.modules.stage_interaction import Keys, StageFusion, StageInteraction

if TYPE_CHECKING:
    from capt.backbones import Backbone


class StageKeys(NamedTuple):
    """Keys of the low-level and the high-level stage for a batch of images; None without that stage."""

    low: list[Keys] | None
    high: list[Keys] | None


class MSCI(CompositionalModel):
    """Three branches (pair, state, object) whose prompts look at an image twice: at its first layers, then its last.

    ``u = t + lambda_1 * q_1 + lambda_2 * q_2`` with ``q_1 = stage_low(t, F_low)``, ``q_2 = stage_high(q_1, F_high)``;
    logits are scaled cosines of u and the image vector of the branch. Stages and lambdas serve all branches; all
    rows of prompts of an image share its keys. Frozen: both CLIP towers; trained: adapters in the image tower,
    prompts, aggregators, disentanglers, stages, fusion.

    Source: MSCI, arXiv 2505.10289; what is followed where paper and code differ: docs/fidelity.md.
    """

    kind = "msci"
    config_type = MSCIConfig
    config: MSCIConfig

    def __init__(
        self,
        backbone: Backbone,
        states: Sequence[str],
        objects: Sequence[str],
        train_pairs: Tensor,
        config: MSCIConfig | None = None,
    ) -> None:
        super().__init__(backbone, states, objects, train_pairs, config)
        own, dim, (uses_low, uses_high) = self.config, backbone.dim, self.config.uses
        self.prompts = CompositionPrompts(backbone, states, objects, dropout=own.prompt_dropout, chunk=own.text_chunk)
        self.tap = layer_tap(
            backbone.tower, own.n_low if uses_low else 0, own.n_high if uses_high else 0,
            adapter_width=own.adapter_width, adapter_dropout=own.adapter_dropout,
        )  # fmt: skip
        self.disentangle_state = Disentangler(dim, dropout=own.disentangler_dropout)
        self.disentangle_object = Disentangler(dim, dropout=own.disentangler_dropout)

        def stage(n_layers: int, width: int) -> StageInteraction:
            # A single map that has the joint width already is used as it is.
            single = n_layers == 1 and width == dim
            aggregator = None if single else LayerAggregator(width, dim, dropout=own.aggregator_dropout)
            return StageInteraction(
                dim, aggregator=aggregator, n_heads=own.n_heads or max(1, dim // 64), n_layers=own.stage_layers,
                mlp_ratio=own.stage_mlp, dropout=own.stage_dropout,
            )  # fmt: skip

        self.stage_low = stage(self.tap.n_low, self.tap.low_width) if uses_low else None
        self.stage_high = stage(self.tap.n_high, self.tap.high_width) if uses_high else None
        self.fusion = StageFusion(dim, fusion=own.fusion, init=own.fusion_init, low=uses_low, high=uses_high)
        self.to(backbone.device)

    # ---- images --------------------------------------------------------------------------------------

    @property
    def input_kind(self) -> Hashable:
        """Where the maps are read."""
        return self.tap.input_kind

    def inputs(self, images: Tensor) -> Tensor:
        """Frozen inputs of the image side: tokens of a transformer, final tokens and stage maps of other towers."""
        return self.tap.inputs(images.to(self.backbone.device, self.backbone.dtype))

    def look(self, inputs: Tensor) -> View:
        """Image vectors of the three branches and the keys of both stages, once for any number of prompts."""
        feature, low, high = self.tap(inputs)
        vectors = feature, self.disentangle_state(feature), self.disentangle_object(feature)
        keys = StageKeys(
            None if self.stage_low is None else self.stage_low.keys(low),
            None if self.stage_high is None else self.stage_high.keys(high),
        )
        pair, state, object_ = (F.normalize(vector.float(), dim=-1) for vector in vectors)
        return View(pair, state, object_, keys)

    # ---- texts ---------------------------------------------------------------------------------------

    def texts(self, pairs: Tensor) -> PairTexts:
        """Prompts of pairs int64 [K, 2] and of all states and objects, each encoded once."""
        table = self.prompts.dropped()
        return PairTexts(
            self.prompts.pairs(self.backbone, pairs.to(self.train_pairs.device), table),
            self.prompts.states(self.backbone, table),
            self.prompts.objects(self.backbone, table),
        )

    # ---- both ----------------------------------------------------------------------------------------

    def interact(self, texts: Tensor, keys: StageKeys) -> Tensor:
        """Prompts float [R, d] as each image sees them, u float [B, R, d] ([1, R, d] without stages), un-normalised."""
        low: Tensor | None = None
        high: Tensor | None = None
        if self.stage_low is not None and keys.low is not None:
            low = self.stage_low(texts, keys.low)
        if self.stage_high is not None and keys.high is not None:
            serial = low is not None and self.config.stages == "serial"
            high = self.stage_high(low if serial else texts, keys.high)
        fused: Tensor = self.fusion(texts, low, high)
        return fused if fused.dim() == 3 else fused[None]

    def branch_logits(self, view: View, vector: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines [B, R] between image vectors [B, d] and what the images make of prompts [R, d]."""
        return self._cosines(vector, self.interact(texts, view.keys))

    def _cosines(self, vector: Tensor, fused: Tensor) -> Tensor:
        fused = fused.float()
        cosines: Tensor = (fused * vector[:, None]).sum(-1) / fused.norm(dim=-1).clamp_min(1e-12)
        return self.backbone.logit_scale * cosines

    # ---- training ------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted cross-entropies ``loss``, and each alone: over training pairs, all states, all objects."""
        view = self.look(inputs)
        chosen, targets = self._candidates(labels, generator)
        texts = self.texts(self.train_pairs[chosen])
        # One pass of all rows: the branches share stages and keys.
        branches = [part for part in texts[:3] if part is not None]
        seen = self.interact(torch.cat(branches), view.keys).split([len(part) for part in branches], dim=1)
        vectors = [vector for vector in view[:3] if vector is not None]
        answers = targets, self.train_pairs[labels, 0], self.train_pairs[labels, 1]
        parts = {
            name: F.cross_entropy(self._cosines(vector, prompts), answer)
            for name, vector, prompts, answer in zip(("pair", "state", "object"), vectors, seen, answers, strict=True)
        }
        total = sum(weight * part for weight, part in zip(self.config.loss_weights, parts.values(), strict=True))
        return {"loss": torch.as_tensor(total), **parts}

    def _candidates(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training pairs that a step compares with, int64 ascending, and the place of each label among them."""
        n, wanted = len(self.train_pairs), self.config.pairs_per_step
        if not wanted or wanted >= n:
            return torch.arange(n, device=labels.device), labels
        keep = torch.zeros(n, dtype=torch.bool, device=labels.device)
        keep[torch.randperm(n, generator=generator)[:wanted].to(labels.device)] = True
        keep[labels] = True
        return keep.nonzero().flatten(), keep.cumsum(0)[labels] - 1
