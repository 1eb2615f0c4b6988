"""Evaluation under the protocols: one record per seed, and how records are combined.

Source: the protocol is CoCoOp's (base classes = first half, trained on; novel classes = the rest, never seen;
each half is tested against its own class names). Two harmonic means are in use, and both are given by name:
the harmonic mean of the seed means (``hm_of_means``, what printed tables hold) and the mean of the seeds'
harmonic means (``mean["hm"]``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from capt.errors import DataError
from capt.evaluation.metrics import accuracy, confusion_counts, correction_metrics, harmonic_mean, mean_std

METRICS = (
    "base",
    "novel",
    "hm",
    "sample_correction_rate",
    "pair_resolution_rate",
    "net_reduction",
    "new_error_rate",
)
"""Keys that every record has; all are fractions in [0, 1] except ``net_reduction``, which may be negative."""


def base_to_novel_metrics(
    base_labels: Any,
    base_predictions: Any,
    novel_labels: Any,
    novel_predictions: Any,
    *,
    reference_base_predictions: Any,
    n_base_classes: int,
) -> dict[str, float]:
    """One seed's record.

    Args:
        base_labels: class ids [N] of the base test images.
        base_predictions: class ids [N] predicted for them against the base class names.
        novel_labels: class ids [M] of the novel test images, numbered from 0.
        novel_predictions: class ids [M] predicted for them against the novel class names.
        reference_base_predictions: class ids [N] of the model whose confusions were to be repaired; the
            correction metrics are taken against it, on base test.
        n_base_classes: number of base classes.

    Returns:
        ``base``, ``novel``, ``hm`` and everything :func:`capt.evaluation.correction_metrics` gives.
    """
    base = accuracy(base_labels, base_predictions)
    novel = accuracy(novel_labels, novel_predictions)
    return {
        "base": base,
        "novel": novel,
        "hm": harmonic_mean(base, novel),
        **correction_metrics(base_labels, reference_base_predictions, base_predictions, n_base_classes),
    }


def aggregate_seeds(per_seed: Mapping[int, Mapping[str, float]] | Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Combine the records of several seeds.

    Returns:
        ``per_seed`` (keys are strings, as JSON wants), ``mean``, ``std`` (population, what published tables
        use), ``std_sample`` (divided by n - 1), and ``hm_of_means`` where there is a harmonic mean.

    Raises:
        DataError: no seeds, or the seeds do not have the same metrics.
    """
    if not per_seed:
        raise DataError("no seeds to combine: fit at least one")
    records = {str(seed): dict(record) for seed, record in per_seed.items()}
    names = list(next(iter(records.values())))
    for seed, record in records.items():
        if set(record) != set(names):
            different = ", ".join(sorted(set(record) ^ set(names)))
            raise DataError(f"seed {seed} has other metrics than the first seed ({different}): evaluate them alike")
    combined = {name: mean_std([record[name] for record in records.values()]) for name in names}
    result = {
        "per_seed": records,
        "mean": {name: mean for name, (mean, _, _) in combined.items()},
        "std": {name: population for name, (_, population, _) in combined.items()},
        "std_sample": {name: sample for name, (_, _, sample) in combined.items()},
    }
    if "hm" in combined:
        result["hm_of_means"] = harmonic_mean(combined["base"][0], combined["novel"][0])
    return result


def base_to_novel_table(rows: Iterable[Sequence[float]]) -> dict[str, float]:
    """The average row of a table with one (base, novel) pair per data set, in any one unit.

    Returns:
        ``base`` and ``novel`` (means over the rows), ``hm_of_means`` and ``mean_of_hms``.
    """
    pairs = [(float(row[0]), float(row[1])) for row in rows]
    if not pairs:
        raise DataError("the table has no rows")
    base = sum(pair[0] for pair in pairs) / len(pairs)
    novel = sum(pair[1] for pair in pairs) / len(pairs)
    return {
        "base": base,
        "novel": novel,
        "hm_of_means": harmonic_mean(base, novel),
        "mean_of_hms": sum(harmonic_mean(*pair) for pair in pairs) / len(pairs),
    }


def confusion_changes(
    labels: Any,
    predictions: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    reference: str = "zero_shot",
    n: int = 20,
) -> list[dict[str, Any]]:
    """The ``n`` most frequent mistakes of a reference method, and what is left of each under every method.

    Args:
        labels: class ids [N].
        predictions: class ids [N] for every method; must hold ``reference``.
        class_names: the C names.
        reference: the method whose mistakes are ranked.
        n: entries at most; ties go to the lower (true, predicted) ids.

    Returns:
        ``{"true", "predicted", "counts": {method: count}}``, most frequent first.
    """
    cells = {name: confusion_counts(labels, values, len(class_names)) for name, values in predictions.items()}
    before = cells[reference].mistakes()
    order = np.argsort(-before.counts, kind="stable")[:n]
    true, predicted = before.labels[order], before.predictions[order]
    counts = {name: found.lookup(true, predicted) for name, found in cells.items()}
    return [
        {
            "true": class_names[t],
            "predicted": class_names[q],
            "counts": {name: int(values[i]) for name, values in counts.items()},
        }
        for i, (t, q) in enumerate(zip(true, predicted, strict=True))
    ]


def target_metrics(
    targets: Mapping[str, tuple[Any, Any]], reference_predictions: Any, n_classes: int
) -> dict[str, float]:
    """One seed's record where everything is trained on and several test sets are scored.

    Args:
        targets: (labels [N], predictions [N]) by name of the test set; the first is that of the trained classes.
        reference_predictions: class ids [N] of the model whose confusions were to be repaired, on the first one.
        n_classes: classes of the first one.

    Returns:
        ``accuracy`` of a single test set; of several, ``source`` (the first), every other by its name, and their
        ``average``; and what :func:`capt.evaluation.correction_metrics` gives on the first.
    """
    scores = {name: accuracy(labels, predictions) for name, (labels, predictions) in targets.items()}
    (first, source), *others = scores.items()
    record = {"accuracy": source}
    if others:
        average = sum(score for _, score in others) / len(others)
        record = {"source": source, **dict(others), "average": average}
    labels, predictions = targets[first]
    return {**record, **correction_metrics(labels, reference_predictions, predictions, n_classes)}
