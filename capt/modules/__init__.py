"""The parts of the methods as plain ``nn.Module``s, usable alone in somebody's own CLIP code."""

from capt.modules.bottleneck_adapter import BottleneckAdapter
from capt.modules.composition_prompts import CompositionPrompts
from capt.modules.confusion_loss import ConfusionLoss
from capt.modules.diff_manner_adapter import DiffMannerAdapter
from capt.modules.disentangler import Disentangler
from capt.modules.key_groups import CenterGroups, KeyGroups, PatchPositions, RegionGroups, patch_positions, sink_mask
from capt.modules.layer_aggregator import LayerAggregator
from capt.modules.long_tail_losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    ClassBalancedLoss,
    DistributionBalancedLoss,
    FocalLoss,
    long_tail_loss,
)
from capt.modules.mgde import MultiGranularityDifferenceExpert
from capt.modules.pair_prompts import PairPrompts, selectable_pairs
from capt.modules.redistributed_pooling import redistributed
from capt.modules.redistributed_row import attention_prior, mixed_values, redistributed_rows
from capt.modules.redistribution import (
    MassTransfer,
    PriorCancellation,
    RadialBias,
    Redistribution,
    RegionBoost,
    Temperature,
    UniformMixture,
)
from capt.modules.sample_confusion_miner import SampleConfusion, SampleConfusionMiner
from capt.modules.sample_evidence import SampleEvidence
from capt.modules.semantic_confusion_miner import SemanticConfusion, SemanticConfusionMiner
from capt.modules.semantic_evidence import SemanticEvidence
from capt.modules.stage_interaction import StageFusion, StageInteraction

__all__ = [
    "AsymmetricLoss",
    "BinaryCrossEntropy",
    "BottleneckAdapter",
    "CenterGroups",
    "ClassBalancedLoss",
    "CompositionPrompts",
    "ConfusionLoss",
    "DiffMannerAdapter",
    "Disentangler",
    "DistributionBalancedLoss",
    "FocalLoss",
    "KeyGroups",
    "LayerAggregator",
    "MassTransfer",
    "MultiGranularityDifferenceExpert",
    "PairPrompts",
    "PatchPositions",
    "PriorCancellation",
    "RadialBias",
    "Redistribution",
    "RegionBoost",
    "RegionGroups",
    "SampleConfusion",
    "SampleConfusionMiner",
    "SampleEvidence",
    "SemanticConfusion",
    "SemanticConfusionMiner",
    "SemanticEvidence",
    "StageFusion",
    "StageInteraction",
    "Temperature",
    "UniformMixture",
    "attention_prior",
    "long_tail_loss",
    "mixed_values",
    "patch_positions",
    "redistributed",
    "redistributed_rows",
    "selectable_pairs",
    "sink_mask",
]
