"""A long-tailed training set out of any multi-label set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from capt.data.multi_label import MultiLabelImages, by_hash, rarest_first
from capt.errors import DataError


def pareto_targets(n_classes: int, largest: int, smallest: int, power: float = 6.0) -> NDArray[np.int64]:
    """Images wanted for the classes of a long-tailed set, most frequent first: int64 [C], never growing.

    The r-th gets ``largest * (1 + r / s) ** -power``, a Pareto density, rounded, where s is such that the last one
    gets ``smallest``. A larger ``power`` only bends the curve closer to an exponential. Source: ours; COCO-LT and
    VOC-LT were drawn after a Pareto-shaped target, whose numbers are not published.
    """
    if n_classes < 1 or not largest >= smallest >= 1 or not power > 0:
        raise DataError(
            f"long tail: found {n_classes} classes, largest {largest}, smallest {smallest}, power {power}; expected "
            "at least one class, largest >= smallest >= 1 and power > 0"
        )
    growth = (largest / smallest) ** (1 / power) - 1
    rank = np.arange(n_classes) / max(1, n_classes - 1)
    wanted: NDArray[np.int64] = np.rint(largest * (1 + growth * rank) ** -power).astype(np.int64)
    return wanted


def long_tail(
    images: MultiLabelImages, *, largest: int, smallest: int = 1, power: float = 6.0, seed: int = 0
) -> MultiLabelImages:
    """A subset whose class frequencies follow a Pareto-shaped target.

    The classes keep their order: the most frequent one of ``images`` gets the largest of :func:`pareto_targets`, and
    no class wants more than it has. Classes choose in turn, the rarest first (equal ones by name); each goes through
    its images in the order of a hash of (seed, image name) and takes those that push no class beyond its target,
    until it has its own. So no class is ever above its target. A class can stay below it if its images show other
    classes that are full; one that would be left without any image takes its first, whatever the others say. Images
    without a label are left out. The choice depends on nothing but names, labels and arguments. Source: ours.

    Args:
        images: images to choose from, normally a training split.
        largest, smallest: images wanted for the most and the least frequent class.
        power: shape of the target.
        seed: any whole number.

    Returns:
        the chosen images, in the order of ``images``, with their ids. ``meta["long_tail"]`` has the arguments, and by
        how much classes are below their target (``short``) or above it (``over``), by name.
    """
    order, rarest = by_hash(images, seed, "long-tail"), rarest_first(images)
    wanted = np.zeros(len(images.classes), dtype=np.int64)
    wanted[rarest[::-1]] = pareto_targets(len(images.classes), largest, smallest, power)
    wanted = np.minimum(wanted, images.counts)
    targets = images.targets.astype(np.int64)
    have, chosen = np.zeros_like(wanted), np.zeros(len(images), dtype=np.bool_)
    for label in rarest:
        mine = order[targets[order, label] == 1]
        for place in mine:
            if have[label] >= wanted[label]:
                break
            if not chosen[place] and (have < wanted).all(where=targets[place] == 1):
                chosen[place] = True
                have += targets[place]
        if not have[label] and len(mine):
            chosen[mine[0]] = True
            have += targets[mine[0]]
    record = {
        "largest": int(largest), "smallest": int(smallest), "power": float(power), "seed": int(seed),
        "short": {images.classes[c]: int(wanted[c] - have[c]) for c in np.flatnonzero(have < wanted)},
        "over": {images.classes[c]: int(have[c] - wanted[c]) for c in np.flatnonzero(have > wanted)},
    }  # fmt: skip
    return images.subset(chosen, meta={"long_tail": record})
