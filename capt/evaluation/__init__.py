"""What is measured: metrics on predictions, and the protocols that combine them over seeds."""

from __future__ import annotations

from capt.evaluation.metrics import (
    ConfusionCounts,
    accuracy,
    confusion_counts,
    correction_metrics,
    harmonic_mean,
    mean_std,
    top_confused_pairs,
)
from capt.evaluation.protocols import (
    aggregate_seeds,
    base_to_novel_metrics,
    base_to_novel_table,
    confusion_changes,
)

__all__ = [
    "ConfusionCounts",
    "accuracy",
    "aggregate_seeds",
    "base_to_novel_metrics",
    "base_to_novel_table",
    "confusion_changes",
    "confusion_counts",
    "correction_metrics",
    "harmonic_mean",
    "mean_std",
    "top_confused_pairs",
]
