"""FAISS beside the bank: approximate candidates, ranked exactly. Optional: ``pip install 'capt[faiss]'``.

FAISS proposes rows; their scores are then formed from the stored features and ranked by the rule of
:func:`capt.ops.bank_topk`, so that both give the same kind of answer and an approximate index can only miss a row,
never score or order one wrongly. faiss-cpu serves every kind but ``cagra``; faiss-gpu serves the others on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from capt.bank.confusion_bank import ConfusionBank
from capt.errors import CaptError, MissingDependencyError
from capt.ops import bank_topk
from capt.reference import CHUNK_ELEMENTS, ordered_keys

Kind = Literal["flat", "ivf", "hnsw", "cagra"]
#: From this many queries on, faiss-cpu's flat search is faster as a matrix product than row by row.
BLAS_QUERIES = 8


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError("faiss-cpu", "FaissIndex", "faiss") from error
    return faiss


class FaissIndex:
    """A FAISS index over the rows of a bank, with exact scores.

    Attributes:
        features: [N, d], the rows, as given; scores are formed from them.
        kind: ``flat`` (every row is compared), ``ivf`` (inverted lists), ``hnsw`` (graph, CPU) or ``cagra`` (graph,
            GPU).
        device: ``cpu`` or ``cuda``, where FAISS searches.
    """

    def __init__(
        self,
        features: Tensor,
        kind: Kind = "flat",
        *,
        device: Literal["cpu", "cuda"] | None = None,
        row_ids: Tensor | None = None,
        n_lists: int | None = None,
        n_probe: int | None = None,
        degree: int = 32,
    ) -> None:
        """Build the index; ``ivf`` trains its lists on the rows.

        Args:
            features: floating [N, d], finite.
            kind: see the attributes.
            device: None: ``cuda`` if faiss-gpu is installed and sees a GPU, else ``cpu``.
            row_ids: int64 [N], for ``exclude`` in :meth:`search`.
            n_lists: of ``ivf``; default 4 sqrt(N), fewer if that left under 39 rows a list.
            n_probe: lists of ``ivf`` that a query visits; default a sixteenth of them.
            degree: neighbours a row of ``hnsw`` and ``cagra``.

        Raises:
            MissingDependencyError: faiss is not installed.
            CaptError: unknown kind or device, a kind or GPU this faiss does not have, features that are not finite.
        """
        if kind not in get_args(Kind):
            raise CaptError(f"FaissIndex: kind must be one of {', '.join(get_args(Kind))}, found {kind!r}")
        if device not in (None, "cpu", "cuda"):
            raise CaptError(f"FaissIndex: device must be 'cpu', 'cuda' or None, found {device!r}")
        if features.ndim != 2 or not features.is_floating_point():
            raise CaptError(
                f"FaissIndex: features must be floating [N, d], found {features.dtype} {list(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise CaptError("FaissIndex: features must be finite, found NaN or infinity; normalise rows before storing")
        if row_ids is not None and (row_ids.dtype != torch.int64 or row_ids.shape != features.shape[:1]):
            raise CaptError(
                f"FaissIndex: row_ids must be int64 [{len(features)}], found {row_ids.dtype} {list(row_ids.shape)}"
            )
        self._faiss = _import_faiss()
        has_gpu = hasattr(self._faiss, "StandardGpuResources") and self._faiss.get_num_gpus() > 0
        if device == "cuda" and not has_gpu:
            raise CaptError(
                "FaissIndex: device='cuda' needs faiss-gpu and a GPU it sees; the faiss installed here has none: "
                "pip uninstall faiss-cpu, then pip install faiss-gpu, or use device='cpu'"
            )
        self.device = device or ("cuda" if has_gpu and kind != "hnsw" else "cpu")
        if kind == "cagra" and (self.device != "cuda" or not hasattr(self._faiss, "GpuIndexCagra")):
            raise CaptError(
                "FaissIndex: kind='cagra' needs a GPU and a faiss built with cuVS: pip install faiss-gpu-cuvs; "
                "kind='hnsw' is the graph index for the CPU"
            )
        if kind == "hnsw" and self.device == "cuda":
            raise CaptError("FaissIndex: kind='hnsw' runs on the CPU; use kind='cagra' on a GPU, or device='cpu'")
        self.features, self.kind = features.detach(), kind
        self._row_ids = row_ids
        self._copies = 0 if row_ids is None or not len(row_ids) else int(row_ids.unique(return_counts=True)[1].max())
        self._index = self._build(n_lists, n_probe, degree) if len(features) else None

    @classmethod
    def from_bank(cls, bank: ConfusionBank, kind: Kind = "flat", **options: Any) -> FaissIndex:
        """An index over all rows of a bank; ``exclude`` then takes sample ids."""
        return cls(bank.features, kind, row_ids=bank.sample_ids, **options)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.features)

    def _build(self, n_lists: int | None, n_probe: int | None, degree: int) -> Any:
        faiss, (n_rows, dim) = self._faiss, self.features.shape
        inner = faiss.METRIC_INNER_PRODUCT
        n_lists = n_lists or max(1, min(int(4 * n_rows**0.5), n_rows // 39))
        self._resources = faiss.StandardGpuResources() if self.device == "cuda" else None
        if self.kind == "flat":
            index = faiss.IndexFlatIP(dim) if not self._resources else faiss.GpuIndexFlatIP(self._resources, dim)
        elif self.kind == "ivf":
            if self._resources:
                index = faiss.GpuIndexIVFFlat(self._resources, dim, n_lists, inner)
            else:
                self._quantizer = faiss.IndexFlatIP(dim)
                index = faiss.IndexIVFFlat(self._quantizer, dim, n_lists, inner)
            index.nprobe = n_probe or max(1, n_lists // 16)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, degree, inner)
        else:
            config = faiss.GpuIndexCagraConfig()
            config.graph_degree, config.intermediate_graph_degree = degree, 2 * degree
            index = faiss.GpuIndexCagra(self._resources, dim, inner, config)
        rows = _as_numpy(self.features)
        with self._settings(n_rows):
            if not index.is_trained or self.kind == "cagra":  # CAGRA builds its graph, rows included, when trained
                index.train(rows)
            if self.kind != "cagra":
                index.add(rows)
        return index

    @contextmanager
    def _settings(self, n_queries: int) -> Iterator[None]:
        """As many FAISS threads as torch has, and matrix products for batches; FAISS's own settings come back."""
        faiss = self._faiss
        threads, blas = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
        faiss.omp_set_num_threads(torch.get_num_threads())
        if n_queries >= BLAS_QUERIES:
            faiss.cvar.distance_compute_blas_threshold = 1
        try:
            yield
        finally:
            faiss.omp_set_num_threads(threads)
            faiss.cvar.distance_compute_blas_threshold = blas

    def search(
        self, queries: Tensor, *, k: int, exclude: Tensor | None = None, candidates: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k most similar rows among the candidates that FAISS proposes, ranked by their exact scores.

        Args:
            queries: floating [Q, d].
            k: rows a query.
            exclude: int64 [Q], the id of row_ids a query must not return (-1: none).
            candidates: rows FAISS is asked for, at least k; default 2 k + 8. More raise the recall of approximate
                kinds, and the number of equal scores among which the lowest rows are found.

        Returns:
            scores float32 [Q, k] and rows int64 [Q, k] on the device of queries, descending, equal scores to the lower
            row; -inf and -1 where the index proposed too few.

        Raises:
            CaptError: shapes do not fit, or exclude without row_ids.
        """
        n_rows, dim = self.features.shape
        if queries.ndim != 2 or queries.shape[1] != dim or not queries.is_floating_point():
            raise CaptError(
                f"FaissIndex: queries must be floating [Q, {dim}], found {queries.dtype} {list(queries.shape)}"
            )
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise CaptError(f"FaissIndex: k must be an integer of at least 1, found {k!r}")
        if exclude is not None and (self._row_ids is None or exclude.shape != queries.shape[:1]):
            raise CaptError(
                f"FaissIndex: exclude must be int64 [{len(queries)}] and needs row_ids at construction, found "
                f"{list(exclude.shape)} {'without' if self._row_ids is None else 'with'} row_ids"
            )
        wanted = max(k, candidates or 2 * k + 8) + (self._copies if exclude is not None else 0)
        found = self._candidates(queries.detach(), min(wanted, n_rows))
        return self._rank(queries.detach(), found, k, exclude)

    def _candidates(self, queries: Tensor, wanted: int) -> Tensor:
        """Rows that FAISS proposes, int64 [Q, wanted], -1 where it found fewer."""
        if self._index is None or not len(queries):
            return torch.empty(len(queries), 0, dtype=torch.int64)
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(64, 2 * wanted)
        with self._settings(len(queries)):
            _, rows = self._index.search(_as_numpy(queries), wanted)
        return torch.from_numpy(rows).long()

    def _rank(self, queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = queries.new_full((len(queries), k), float("-inf"), dtype=torch.float32)
        index = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
        step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1] * queries.shape[1]))
        for start in range(0, len(queries) if rows.shape[1] else 0, step):
            part = slice(start, start + step)
            row = rows[part].to(self.features.device)
            taken = self.features[row.clamp_min(0)].to(queries.device).float()
            row = row.to(queries.device)
            score = torch.einsum("qd,qcd->qc", queries[part].float(), taken)
            hidden = (row < 0) | score.isnan()
            if exclude is not None and self._row_ids is not None:
                ids = self._row_ids.to(queries.device)[row.clamp_min(0)]
                unwanted = exclude[part, None].to(queries.device)
                hidden |= (ids == unwanted) & (unwanted >= 0)
            score = score.masked_fill(hidden, float("-inf"))
            kept = min(k, row.shape[1])
            order = ordered_keys(score, row.clamp_min(0)).topk(kept, dim=1).indices
            scores[part, :kept] = score.gather(1, order)
            index[part, :kept] = row.gather(1, order)
        return scores, index.masked_fill(scores == float("-inf"), -1)

    def recall(self, queries: Tensor, *, k: int, candidates: int | None = None) -> float:
        """Share of the exact k nearest rows (:func:`capt.ops.bank_topk`) that :meth:`search` returns; 1 if none."""
        _, found = self.search(queries, k=k, candidates=candidates)
        rows = self.features.to(device=queries.device, dtype=queries.dtype)
        _, exact = bank_topk(queries, rows, k=k)
        hit = (exact[:, :, None] == found[:, None, :]).any(2) & (exact >= 0)
        return float(hit.sum()) / max(1, int((exact >= 0).sum())) if bool((exact >= 0).any()) else 1.0


def _as_numpy(values: Tensor) -> Any:
    """float32, contiguous, on the CPU: what every FAISS index takes."""
    return values.float().contiguous().cpu().numpy()
