"""What is measured: metrics on predictions, and the protocols that combine them over seeds."""

from __future__ import annotations

from capt.evaluation.center_bias import CenterBiasResult, measure_center_bias, recognised_objects
from capt.evaluation.compositional import BestPairs, FrontierMeter, PairCounts, ThresholdSearch
from capt.evaluation.feasibility import feasibility, feasibility_thresholds
from capt.evaluation.metrics import (
    ConfusionCounts,
    accuracy,
    confusion_counts,
    correction_metrics,
    harmonic_mean,
    mean_std,
    top_confused_pairs,
)
from capt.evaluation.multi_label import (
    MultiLabelResult,
    average_precision,
    best_thresholds,
    label_metrics,
    predicted_labels,
)
from capt.evaluation.pair_scores import PrimitiveFactors, pair_scores, primitive_factors, released_copies
from capt.evaluation.pair_space import PairSpace
from capt.evaluation.planted_bias import PlantedBias
from capt.evaluation.protocols import (
    aggregate_seeds,
    base_to_novel_metrics,
    base_to_novel_table,
    confusion_changes,
)
from capt.evaluation.seen_unseen_curve import SeenUnseenCurve
from capt.evaluation.whats_up import WhatsUpResult, score_photographs

__all__ = [
    "BestPairs",
    "CenterBiasResult",
    "ConfusionCounts",
    "FrontierMeter",
    "MultiLabelResult",
    "PairCounts",
    "PairSpace",
    "PlantedBias",
    "PrimitiveFactors",
    "SeenUnseenCurve",
    "ThresholdSearch",
    "WhatsUpResult",
    "accuracy",
    "aggregate_seeds",
    "average_precision",
    "base_to_novel_metrics",
    "base_to_novel_table",
    "best_thresholds",
    "confusion_changes",
    "confusion_counts",
    "correction_metrics",
    "feasibility",
    "feasibility_thresholds",
    "harmonic_mean",
    "label_metrics",
    "mean_std",
    "measure_center_bias",
    "pair_scores",
    "predicted_labels",
    "primitive_factors",
    "recognised_objects",
    "released_copies",
    "score_photographs",
    "top_confused_pairs",
]
