"""Protocols: which images a method learns from, and which images, among which class names, it is tested on.

Source: base-to-novel, cross-dataset and domain generalisation as in CoCoOp, few-shot as in CoOp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from capt.data import DataSet, ImageSet, base_novel
from capt.data.lock import TestLock, lock_images, lock_test
from capt.data.names import class_key
from capt.errors import DataError
from capt.evaluation.protocols import METRICS, base_to_novel_metrics, target_metrics

PROTOCOLS = ("base-to-novel", "few-shot", "cross-dataset", "domain-generalisation")
CORRECTIONS = tuple(metric for metric in METRICS if metric not in ("base", "novel", "hm"))


@dataclass(frozen=True)
class Target:
    """Test images and the class names they are told apart by.

    Attributes:
        name: "base", "novel", or the name of a data set.
        images: locked until an evaluation; labels are positions in ``classes``.
        classes: class names, [C].
    """

    name: str
    images: ImageSet
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """What is trained on and what is tested.

    Attributes:
        name: "base-to-novel", "few-shot", "cross-dataset" or "domain-generalisation".
        data: the data set trained on, as it was given.
        train: its training images of the trained classes.
        classes: the trained classes, [C].
        targets: tests; the first has the trained classes, corrections are counted there.
        unlabelled: training images of classes that are not trained on, for methods that may see them.
        forbidden: ids that no training image may have: validation and test images.
        lock: shut until the evaluation.
    """

    name: str
    data: DataSet
    train: ImageSet
    classes: tuple[str, ...]
    targets: tuple[Target, ...]
    forbidden: frozenset[int]
    lock: TestLock
    unlabelled: ImageSet | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of the result table, in order."""
        if self.name == "base-to-novel":
            return METRICS
        if len(self.targets) == 1:
            return ("accuracy", *CORRECTIONS)
        return ("source", *(target.name for target in self.targets[1:]), "average", *CORRECTIONS)

    def class_lists(self) -> dict[str, list[str]]:
        """Class names of every target, by its name."""
        return {target.name: list(target.classes) for target in self.targets}

    def measure(self, found: Mapping[str, Tensor], method: str, reference: str) -> dict[str, float]:
        """Metrics of one seed.

        Args:
            found: ``<target>_labels`` and ``<target>_<method>``, int64 [N] each.
            method: whose predictions are judged.
            reference: the method whose mistakes on the first target are to be corrected.
        """
        first = self.targets[0]
        if self.name == "base-to-novel":
            return base_to_novel_metrics(
                found["base_labels"].numpy(), found[f"base_{method}"].numpy(),
                found["novel_labels"].numpy(), found[f"novel_{method}"].numpy(),
                reference_base_predictions=found[f"base_{reference}"].numpy(), n_base_classes=len(first.classes),
            )  # fmt: skip
        return target_metrics(
            {
                target.name: (found[f"{target.name}_labels"].numpy(), found[f"{target.name}_{method}"].numpy())
                for target in self.targets
            },
            found[f"{first.name}_{reference}"].numpy(),
            len(first.classes),
        )

    def record(self) -> dict[str, Any]:
        """What belongs into a run record."""
        return {
            "name": self.name,
            "targets": {
                target.name: {"images": len(target.images), "fingerprint": target.images.fingerprint()}
                for target in self.targets
            },
        }


def base_to_novel(data: DataSet) -> Protocol:
    """Train on the first half of the classes; test each half among its own class names.

    Raises:
        DataError: fewer than four classes, no test split, or a half without images.
    """
    if len(data.classes) < 4:
        raise DataError(
            f"data set '{data.name}': base-to-novel needs at least 4 classes, found {len(data.classes)}; use the "
            "protocol few-shot"
        )
    _require_test(data)
    lock = TestLock()
    base, novel = base_novel(lock_test(data, lock))
    targets = []
    for half, split in (("base", base), ("novel", novel)):
        if split.test is None or not len(split.test):
            raise DataError(
                f"data set '{data.name}': the {half} classes have no test image; give some, or split otherwise"
            )
        targets.append(Target(half, split.test, split.classes))
    if not len(base.train):
        raise DataError(f"data set '{data.name}': the base classes have no training image")
    return Protocol(
        "base-to-novel", data, base.train, base.classes, tuple(targets), _forbidden(data), lock, novel.train
    )


def few_shot_all(data: DataSet) -> Protocol:
    """Train and test on all classes."""
    return _all_classes("few-shot", data, [])


def cross_dataset(source: DataSet, targets: Sequence[DataSet]) -> Protocol:
    """Train on all classes of one data set, test on others, each among its own class names."""
    return _all_classes("cross-dataset", source, targets)


def domain_generalisation(source: DataSet, variants: Sequence[DataSet]) -> Protocol:
    """Train on all classes of one data set, test on other pictures of the same classes (or of some of them).

    Raises:
        DataError: a variant has a class that the source has not.
    """
    known = {class_key(name): name for name in source.classes}
    renamed = []
    for variant in variants:
        unknown = [name for name in variant.classes if class_key(name) not in known]
        if unknown:
            raise DataError(
                f"data set '{variant.name}': domain generalisation needs classes of '{source.name}', but "
                f"{unknown[0]!r} is none; use the protocol cross-dataset for other classes"
            )
        # The source's spelling, so that trained classes are recognised.
        renamed.append(replace(variant, classes=tuple(known[class_key(name)] for name in variant.classes)))
    return _all_classes("domain-generalisation", source, renamed)


def make_protocol(name: str, data: DataSet, targets: Sequence[DataSet] = ()) -> Protocol:
    """The protocol called ``name``.

    Raises:
        DataError: no such protocol, or one that needs targets without any, or the other way round.
    """
    if name in ("base-to-novel", "few-shot"):
        if targets:
            raise DataError(
                f"protocol '{name}': takes no further data sets; use cross-dataset or domain-generalisation"
            )
        return base_to_novel(data) if name == "base-to-novel" else few_shot_all(data)
    if name in ("cross-dataset", "domain-generalisation"):
        if not targets:
            raise DataError(f"protocol '{name}': needs data sets to test on (--targets)")
        return (cross_dataset if name == "cross-dataset" else domain_generalisation)(data, targets)
    raise DataError(f"protocol: found {name!r}, expected one of {', '.join(PROTOCOLS)}")


def _all_classes(name: str, data: DataSet, others: Sequence[DataSet]) -> Protocol:
    if len(data.classes) < 2:
        raise DataError(f"data set '{data.name}': needs at least 2 classes, found {len(data.classes)}")
    if not len(data.train):
        raise DataError(f"data set '{data.name}': there is no training image")
    lock = TestLock()
    targets = []
    for one in (data, *others):
        _require_test(one)
        assert one.test is not None
        targets.append(Target(one.name, lock_images(one.test, lock), tuple(one.classes)))
    names = [target.name for target in targets]
    if len(set(names)) != len(names) or {"source", "average"} & set(names):
        raise DataError(
            f"targets: found the data sets {names}; they need distinct names, other than source and average"
        )
    return Protocol(name, data, data.train, tuple(data.classes), tuple(targets), _forbidden(data), lock)


def _require_test(data: DataSet) -> None:
    if data.test is None or not len(data.test):
        raise DataError(
            f"data set '{data.name}': there is no test split to evaluate on; give one (test/ folder, "
            "split column), or hold out training images (--test-fraction 0.3)"
        )


def _forbidden(data: DataSet) -> frozenset[int]:
    return frozenset(int(i) for split in (data.val, data.test) if split is not None for i in np.asarray(split.ids))
