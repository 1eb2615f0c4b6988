"""The parts of the methods as plain ``nn.Module``s, usable alone in somebody's own CLIP code."""

from capt.modules.confusion_loss import ConfusionLoss
from capt.modules.diff_manner_adapter import DiffMannerAdapter
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
from capt.modules.sample_confusion_miner import SampleConfusion, SampleConfusionMiner
from capt.modules.sample_evidence import SampleEvidence
from capt.modules.semantic_confusion_miner import SemanticConfusion, SemanticConfusionMiner
from capt.modules.semantic_evidence import SemanticEvidence

__all__ = [
    "AsymmetricLoss",
    "BinaryCrossEntropy",
    "ClassBalancedLoss",
    "ConfusionLoss",
    "DiffMannerAdapter",
    "DistributionBalancedLoss",
    "FocalLoss",
    "MultiGranularityDifferenceExpert",
    "PairPrompts",
    "SampleConfusion",
    "SampleConfusionMiner",
    "SampleEvidence",
    "SemanticConfusion",
    "SemanticConfusionMiner",
    "SemanticEvidence",
    "long_tail_loss",
    "selectable_pairs",
]
