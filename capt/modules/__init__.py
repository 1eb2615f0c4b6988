"""The parts of the methods as plain ``nn.Module``s, usable alone in somebody's own CLIP code."""

from capt.modules.bottleneck_adapter import BottleneckAdapter
from capt.modules.composition_prompts import CompositionPrompts
from capt.modules.confusion_loss import ConfusionLoss
from capt.modules.diff_manner_adapter import DiffMannerAdapter
from capt.modules.disentangler import Disentangler
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
from capt.modules.prompt_initialiser import PromptInitialiser
from capt.modules.sample_confusion_miner import SampleConfusion, SampleConfusionMiner
from capt.modules.sample_evidence import SampleEvidence
from capt.modules.semantic_confusion_miner import SemanticConfusion, SemanticConfusionMiner
from capt.modules.semantic_evidence import SemanticEvidence
from capt.modules.stage_interaction import StageFusion, StageInteraction
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction

__all__ = [
    "AsymmetricLoss",
    "BinaryCrossEntropy",
    "BottleneckAdapter",
    "ClassBalancedLoss",
    "CompositionPrompts",
    "ConfusionLoss",
    "DiffMannerAdapter",
    "Disentangler",
    "DistributionBalancedLoss",
    "FocalLoss",
    "LayerAggregator",
    "MultiGranularityDifferenceExpert",
    "PairPrompts",
    "PromptInitialiser",
    "SampleConfusion",
    "SampleConfusionMiner",
    "SampleEvidence",
    "SemanticConfusion",
    "SemanticConfusionMiner",
    "SemanticEvidence",
    "StageFusion",
    "StageInteraction",
    "VisualSemanticInteraction",
    "long_tail_loss",
    "selectable_pairs",
]
