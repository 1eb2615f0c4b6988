"""Confusion Bank (CAPT, section "Confusion Bank"): the misclassified training samples of a base model.

Rows are sorted by predicted class, then true class, then sample id, so that the samples of one ordered
confusion pair, and of one predicted class, are contiguous: a retrieval is a row range, never a mask.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from capt.bank.search import BankIndex, Retrieval
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import ImageSet

Orientation = Literal["column", "row", "sum"]
_SCHEMA = 1


@dataclass(frozen=True)
class ConfusionStatistics:
    """Counts ``n_i`` of the confusing classes of each pseudo-GT class, in compressed rows.

    Row ``p`` holds ``classes[offsets[p]:offsets[p + 1]]`` (ascending) with ``counts`` beside them.

    Attributes:
        offsets: int64 [C + 1].
        classes: int64 [nnz].
        counts: int64 [nnz].
    """

    offsets: Tensor
    classes: Tensor
    counts: Tensor

    @staticmethod
    def from_pairs(keys: Tensor, others: Tensor, counts: Tensor, n_classes: int) -> ConfusionStatistics:
        """Sum ``counts`` over equal (key, other) pairs; all int64 of one length."""
        cells, inverse = torch.unique(keys * n_classes + others, return_inverse=True)
        summed = torch.zeros_like(cells).index_add_(0, inverse, counts)
        per_row = torch.bincount(cells // n_classes, minlength=n_classes)
        offsets = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
        return ConfusionStatistics(offsets, cells % n_classes, summed)

    def to(self, device: torch.device) -> ConfusionStatistics:
        """The same statistics on another device."""
        return ConfusionStatistics(self.offsets.to(device), self.classes.to(device), self.counts.to(device))


class ConfusionBank:
    """Misclassified samples of a base model, grouped by confusion pair. An empty bank is legal.

    Attributes:
        features: float32 [M, d], unit norm, image features of the base model.
        sample_ids: int64 [M], ids of the images in their data set.
        labels: int64 [M], true classes.
        predictions: int64 [M], classes the base model chose instead.
        confidences: float32 [M], its probability for that choice.
        names: image names (relative paths), one a row; empty strings where unknown.
        class_names: the C class names; labels index them.
        cell_keys: int64 [n_cells], ``prediction * C + label`` of the non-empty cells, ascending.
        cell_offsets: int64 [n_cells + 1], row ranges of the cells.
        column_offsets: int64 [C + 1], row ranges of the predicted classes.
        backbone: fingerprint of the model whose mistakes these are.

    Source: CAPT, Confusion Bank; the layout is ours.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        predictions: Tensor,
        confidences: Tensor,
        sample_ids: Tensor,
        class_names: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        backbone: str = "",
    ) -> None:
        """Sort and index records; all of them must be mistakes.

        Args:
            features: [M, d], any float dtype; normalised here.
            labels, predictions, sample_ids: int64 [M]; ids must be distinct.
            confidences: [M], in [0, 1].
            class_names: C names.
            names: M image names.
            backbone: fingerprint of the base model.

        Raises:
            CaptError: lengths differ, a class id is out of range, an id repeats, or a record is no mistake.
        """
        n_classes, n_rows = len(class_names), len(labels)
        lengths = {len(features), len(predictions), len(confidences), len(sample_ids), n_rows}
        if len(lengths) != 1 or features.ndim != 2:
            raise CaptError(
                f"ConfusionBank: features must be [M, d], all records of one length, found lengths {sorted(lengths)}"
            )
        for argument, values in (("labels", labels), ("predictions", predictions)):
            if n_rows and not (int(values.min()) >= 0 and int(values.max()) < n_classes):
                raise CaptError(
                    f"ConfusionBank: {argument} must be in [0, {n_classes}), found {values.min()}..{values.max()}"
                )
        if bool((labels == predictions).any()):
            raise CaptError(
                "ConfusionBank: a record whose prediction equals its label is not a mistake; filter them out"
            )
        if len(torch.unique(sample_ids)) != n_rows:
            raise CaptError("ConfusionBank: sample_ids repeat; every image may be stored once")
        keys = predictions.long() * n_classes + labels.long()
        # Two stable sorts make the order independent of the order in which samples arrived.
        order = torch.argsort(sample_ids, stable=True)
        order = order[torch.argsort(keys[order], stable=True)]
        self.class_names = tuple(class_names)
        self.backbone = backbone
        self.features = torch.nn.functional.normalize(features.float(), dim=-1)[order].contiguous()
        self.labels = labels.long()[order]
        self.predictions = predictions.long()[order]
        self.confidences = confidences.float()[order]
        self.sample_ids = sample_ids.long()[order]
        self.names = [names[i] for i in order.tolist()] if names is not None else [""] * n_rows
        self.cell_keys, cell_sizes = torch.unique_consecutive(keys[order], return_counts=True)
        self.cell_offsets = torch.cat([cell_sizes.new_zeros(1), cell_sizes.cumsum(0)])
        per_column = torch.bincount(self.predictions, minlength=n_classes)
        self.column_offsets = torch.cat([per_column.new_zeros(1), per_column.cumsum(0)])
        self._cells_shown, self._columns_shown = torch.arange(len(self.cell_keys)), torch.arange(n_classes)
        self._placed: dict[tuple[torch.device, torch.dtype], BankIndex] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ConfusionBank({len(self)} samples, {len(self.cell_keys)} pairs, {self.n_classes} classes)"

    @property
    def n_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    # ---- building -----------------------------------------------------------------------------------

    @classmethod
    def from_logits(
        cls,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        class_names: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        backbone: str = "",
    ) -> ConfusionBank:
        """Keep the samples whose arg-max class is not their label (ties go to the lower class id).

        Args:
            features: [N, d] image features.
            logits: [N, C], already multiplied by the logit scale: their softmax is the confidence.
            labels, sample_ids: int64 [N].
        """
        if logits.shape != (len(labels), len(class_names)):
            raise CaptError(
                f"ConfusionBank: logits must be [{len(labels)}, {len(class_names)}], found {list(logits.shape)}"
            )
        probabilities = logits.float().softmax(-1)
        confidences, predictions = probabilities.max(-1)
        wrong = predictions != labels
        kept = wrong.nonzero().squeeze(1).tolist()
        return cls(
            features[wrong], labels[wrong], predictions[wrong], confidences[wrong], sample_ids[wrong], class_names,
            names=None if names is None else [names[i] for i in kept], backbone=backbone,
        )  # fmt: skip

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        images: ImageSet,
        text_features: Tensor | None = None,
        *,
        batch_size: int = 32,
        forbidden_ids: Iterable[int] = (),
    ) -> ConfusionBank:
        """Run a zero-shot CLIP over labelled images and store its mistakes.

        Args:
            backbone: wrapped CLIP; its evaluation transform is used, never an augmentation.
            images: training images of the base classes, normally a few-shot subset.
            text_features: float [C, d], unit norm; default: the backbone's prompt ensemble of ``images.classes``.
            batch_size: images a forward pass.
            forbidden_ids: ids of validation and test images; meeting one raises.

        Raises:
            DataError: an id is forbidden.
        """
        from capt.data import batches

        leaked = set(map(int, forbidden_ids)).intersection(map(int, images.ids))
        if leaked:
            raise DataError(
                f"ConfusionBank.build: {len(leaked)} images (first id {min(leaked)}) are validation or test images; "
                "a bank is built from training images only"
            )
        if text_features is None:
            text_features = backbone.class_text_features(images.classes)
        features, labels, ids = [], [], []
        device = text_features.device
        with torch.inference_mode():
            for batch in batches(images, backbone.preprocess, batch_size=batch_size):
                features.append(torch.nn.functional.normalize(backbone.image_features(batch.images.to(device)), dim=-1))
                labels.append(batch.labels)
                ids.append(batch.ids)
        feature_matrix = torch.cat(features) if features else text_features.new_zeros(0, text_features.shape[1])
        logits = backbone.logit_scale * feature_matrix @ text_features.T
        return cls.from_logits(
            feature_matrix.cpu(), logits.cpu(),
            torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long),
            torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long),
            images.classes, names=images.names, backbone=backbone.fingerprint(),
        )  # fmt: skip

    # ---- statistics ---------------------------------------------------------------------------------

    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Non-empty cells as (labels, predictions, counts), int64 [n_cells] each, ordered by prediction."""
        return self.cell_keys % self.n_classes, self.cell_keys // self.n_classes, self.cell_offsets.diff()

    def counts(self) -> Tensor:
        """Dense confusion counts ``N[label, prediction]``, int64 [C, C], zero diagonal; for small C."""
        labels, predictions, counts = self.cells()
        dense = torch.zeros(self.n_classes, self.n_classes, dtype=torch.long)
        dense[labels, predictions] = counts
        return dense

    def statistics(self, orientation: Orientation = "column") -> ConfusionStatistics:
        """Counts ``n_i`` for a pseudo-GT class ``p``.

        Args:
            orientation: ``column``: ``N[i, p]``, how often class i was taken for p (the reading that makes sense
                when only the prediction is known); ``row``: ``N[p, i]``; ``sum``: both.
        """
        labels, predictions, counts = self.cells()
        if orientation == "column":
            return ConfusionStatistics.from_pairs(predictions, labels, counts, self.n_classes)
        if orientation == "row":
            return ConfusionStatistics.from_pairs(labels, predictions, counts, self.n_classes)
        if orientation == "sum":
            return ConfusionStatistics.from_pairs(
                torch.cat([predictions, labels]), torch.cat([labels, predictions]), counts.repeat(2), self.n_classes
            )
        raise CaptError(f"orientation must be 'column', 'row' or 'sum', found {orientation!r}")

    def top_pairs(self, n: int = 20) -> list[tuple[str, str, int]]:
        """The ``n`` most frequent mistakes as (true class, predicted class, count); ties in class order."""
        labels, predictions, counts = self.cells()
        order = sorted(range(len(counts)), key=lambda i: (-int(counts[i]), int(labels[i]), int(predictions[i])))[:n]
        return [(self.class_names[labels[i]], self.class_names[predictions[i]], int(counts[i])) for i in order]

    # ---- retrieval ----------------------------------------------------------------------------------

    def on(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BankIndex:
        """The bank's tensors on a device, moved once; features in ``dtype``."""
        place = (torch.device(device), dtype)
        if place not in self._placed:
            cells, columns = self._cells_shown, self._columns_shown
            tensors = [
                self.features.to(dtype), self.labels, self.predictions, self.sample_ids, self.cell_keys,
                self.cell_offsets[cells], self.cell_offsets[cells + 1],
                self.column_offsets[columns], self.column_offsets[columns + 1], *torch.sort(self.sample_ids),
            ]  # fmt: skip
            self._placed[place] = BankIndex(*(tensor.to(device) for tensor in tensors))
        return self._placed[place]

    def shuffled(self, seed: int = 0) -> ConfusionBank:
        """A control: the same rows and statistics, but each pair is shown the mistakes of another, drawn once.

        Cells trade their rows with cells, and predicted classes theirs with classes; row numbers stay what they are.
        """
        generator = torch.Generator().manual_seed(seed)
        other = copy.copy(self)
        other._cells_shown = torch.randperm(len(self.cell_keys), generator=generator)
        other._columns_shown = torch.randperm(self.n_classes, generator=generator)
        other._placed = {}
        return other

    def pair_ranges(self, pseudo: Tensor, confusing: Tensor, exclude: Tensor | None = None) -> Tensor:
        """Rows that illustrate each pair (p, i): both ordered cells, else everything that was taken for p.

        Args:
            pseudo: int64 [B], pseudo-GT classes p.
            confusing: int64 [B, k], confusing classes i.
            exclude: int64 [B], sample ids that may not be returned (-1: none); a pair whose only rows are
                excluded counts as empty and falls back too.

        Returns:
            int64 [B, k, 2, 2]: two (start, stop) row ranges a pair, for :func:`capt.ops.bank_topk`.
        """
        return self.on(pseudo.device).pair_ranges(pseudo, confusing, exclude)

    def search(
        self, queries: Tensor, pseudo: Tensor, confusing: Tensor, *, m: int = 1, exclude: Tensor | None = None,
        retrieval: Retrieval = "similar", generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Representative Confusion Samples: the m stored mistakes of each pair most similar to the query.

        Args:
            queries: float [B, d], unit norm.
            pseudo: int64 [B].
            confusing: int64 [B, k].
            m: representatives a pair.
            exclude: int64 [B], each query's own sample id (-1: not in any data set). Without it a training
                image that is in the bank returns itself with similarity 1 and nothing is learned.
            retrieval: ``random`` is a control: rows drawn evenly from the same candidates, with ``generator`` (of the
                device of ``queries``; None: torch's own).

        Returns:
            similarities float32 [B, k, m] and rows int64 [B, k, m]; -inf and -1 where the pair has too few rows.
        """
        index = self.on(queries.device, queries.dtype)
        return index.search(queries, pseudo, confusing, m, exclude, retrieval, generator)

    # ---- storage ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``rows.safetensors`` and ``bank.json`` (schema, classes, checksum) into ``folder``.

        Features are kept in float32, so that a saved bank retrieves exactly what the built one did.
        """
        folder = Path(folder)
        digest = save_tensors(
            folder / "rows.safetensors",
            {
                "features": self.features,
                "labels": self.labels.int(),
                "predictions": self.predictions.int(),
                "confidences": self.confidences,
                "sample_ids": self.sample_ids,
            },
        )
        # The manifest is written last: a reader either sees a complete bank or none.
        write_json(
            folder / "bank.json",
            {
                "schema": _SCHEMA,
                "n_rows": len(self),
                "dim": self.features.shape[1],
                "rows_sha256": digest,
                "backbone": self.backbone,
                "class_names": list(self.class_names),
                "names": self.names,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> ConfusionBank:
        """Read a bank written by :meth:`save`.

        Raises:
            DataError: there is no bank in the folder.
            DamagedFileError: manifest or rows were changed.
        """
        folder = Path(folder)
        manifest = read_json(folder / "bank.json")
        try:
            schema, digest = manifest["schema"], manifest["rows_sha256"]
            class_names, names, n_rows = manifest["class_names"], manifest["names"], manifest["n_rows"]
        except (KeyError, TypeError) as error:
            raise DamagedFileError(f"'{folder / 'bank.json'}': not a bank manifest, {error} is missing") from error
        if schema != _SCHEMA:
            raise DamagedFileError(
                f"'{folder / 'bank.json'}': schema {schema}, this version reads {_SCHEMA}; build the bank again"
            )
        rows = load_tensors(folder / "rows.safetensors", digest)
        if len(rows["labels"]) != n_rows or len(names) != n_rows:
            raise DamagedFileError(
                f"'{folder}': {n_rows} rows promised, {len(rows['labels'])} found; build the bank again"
            )
        bank = cls(
            rows["features"], rows["labels"].long(), rows["predictions"].long(), rows["confidences"],
            rows["sample_ids"], class_names, names=names, backbone=manifest.get("backbone", ""),
        )  # fmt: skip
        # Normalising twice may change the last bit; stored rows are already in order and of unit norm.
        bank.features = rows["features"]
        return bank
