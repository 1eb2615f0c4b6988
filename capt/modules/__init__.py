"""The parts of the methods as plain ``nn.Module``s, usable alone in somebody's own CLIP code."""

from capt.modules.attention_rollout import attention_map, attention_rollout, rollout_matrix
from capt.modules.attention_statistics import (
    AttentionRows,
    attention_rows,
    center_mass,
    center_ratio,
    entropy,
    mean_radius,
    object_gain,
    position_share,
    radial_profile,
    ring_members,
)
from capt.modules.bottleneck_adapter import BottleneckAdapter
from capt.modules.composition_prompts import CompositionPrompts
from capt.modules.confusion_loss import ConfusionLoss
from capt.modules.crop_pooling import CropPooling, cropped
from capt.modules.diff_manner_adapter import DiffMannerAdapter
from capt.modules.direct_effects import DirectEffects, direct_effects, first_order_shares, mean_ablated, object_share
from capt.modules.disentangler import Disentangler
from capt.modules.key_bias import KeyBias, biased_attention, key_bias
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
from capt.modules.patch_pooling import PatchPooling, repooled
from capt.modules.pooling_replacements import (
    blended,
    by_confidence,
    crop_features,
    generalised_mean,
    late_interaction,
    mean_of_tokens,
    mean_of_values,
    region_features,
    top_mean,
)
from capt.modules.pooling_stages import (
    PoolingStages,
    oracle,
    patch_mask,
    pooling_stages,
    row_by_block,
    single_patch,
    value_tokens,
)
from capt.modules.pooling_sweep import PoolingSweep
from capt.modules.prompt_initialiser import PromptInitialiser
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
from capt.modules.sparse_concepts import SparseConcepts, nonnegative_lasso
from capt.modules.stage_interaction import StageFusion, StageInteraction
from capt.modules.text_span import TextSpan, text_span
from capt.modules.visual_prompts import MARKERS, marked, marked_normalised
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction

__all__ = [
    "MARKERS",
    "AsymmetricLoss",
    "AttentionRows",
    "BinaryCrossEntropy",
    "BottleneckAdapter",
    "CenterGroups",
    "ClassBalancedLoss",
    "CompositionPrompts",
    "ConfusionLoss",
    "CropPooling",
    "DiffMannerAdapter",
    "DirectEffects",
    "Disentangler",
    "DistributionBalancedLoss",
    "FocalLoss",
    "KeyBias",
    "KeyGroups",
    "LayerAggregator",
    "MassTransfer",
    "MultiGranularityDifferenceExpert",
    "PairPrompts",
    "PatchPooling",
    "PatchPositions",
    "PoolingStages",
    "PoolingSweep",
    "PriorCancellation",
    "PromptInitialiser",
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
    "SparseConcepts",
    "StageFusion",
    "StageInteraction",
    "Temperature",
    "TextSpan",
    "UniformMixture",
    "VisualSemanticInteraction",
    "attention_map",
    "attention_prior",
    "attention_rollout",
    "attention_rows",
    "biased_attention",
    "blended",
    "by_confidence",
    "center_mass",
    "center_ratio",
    "crop_features",
    "cropped",
    "direct_effects",
    "entropy",
    "first_order_shares",
    "generalised_mean",
    "key_bias",
    "late_interaction",
    "long_tail_loss",
    "marked",
    "marked_normalised",
    "mean_ablated",
    "mean_of_tokens",
    "mean_of_values",
    "mean_radius",
    "mixed_values",
    "nonnegative_lasso",
    "object_gain",
    "object_share",
    "oracle",
    "patch_mask",
    "patch_positions",
    "pooling_stages",
    "position_share",
    "radial_profile",
    "redistributed",
    "redistributed_rows",
    "region_features",
    "repooled",
    "ring_members",
    "rollout_matrix",
    "row_by_block",
    "selectable_pairs",
    "single_patch",
    "sink_mask",
    "text_span",
    "top_mean",
    "value_tokens",
]
