"""The parts of the methods as plain ``nn.Module``s, usable alone in somebody's own CLIP code."""

from capt.modules.confusion_loss import ConfusionLoss
from capt.modules.diff_manner_adapter import DiffMannerAdapter
from capt.modules.mgde import MultiGranularityDifferenceExpert
from capt.modules.pair_prompts import PairPrompts, selectable_pairs
from capt.modules.sample_confusion_miner import SampleConfusion, SampleConfusionMiner
from capt.modules.sample_evidence import SampleEvidence
from capt.modules.semantic_confusion_miner import SemanticConfusion, SemanticConfusionMiner
from capt.modules.semantic_evidence import SemanticEvidence

__all__ = [
    "ConfusionLoss",
    "DiffMannerAdapter",
    "MultiGranularityDifferenceExpert",
    "PairPrompts",
    "SampleConfusion",
    "SampleConfusionMiner",
    "SampleEvidence",
    "SemanticConfusion",
    "SemanticConfusionMiner",
    "SemanticEvidence",
    "selectable_pairs",
]
