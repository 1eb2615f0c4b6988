"""Models trained on several seeds and compared with zero-shot CLIP on test images that stay locked until the end."""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

import capt
from capt.data.lock import TestLock
from capt.errors import CaptError
from capt.evaluation.protocols import aggregate_seeds
from capt.files import read_json, save_tensors, write_json
from capt.methods.runs.options import Progress
from capt.methods.runs.seeds import clear_folder, row_name
from capt.methods.tuned_model import TunedModel

if TYPE_CHECKING:
    from capt.backbones import Backbone

_SCHEMA = 1
TRAINED_ON = "training_images.json"
Model = TypeVar("Model", bound=TunedModel)


@dataclass(frozen=True)
class Outcome:
    """What one model did on the test images.

    Attributes:
        metrics: numbers of the summary, by name.
        tensors: file name and tensors from which all metrics and figures follow.
        files: further records by file name.
    """

    metrics: dict[str, float]
    tensors: tuple[str, dict[str, Tensor]]
    files: Mapping[str, Any]


class ComparedRun(ABC, Generic[Model]):
    """One data set, one backbone, several seeds; models by row name, and zero-shot CLIP beside them.

    A run folder holds ``run.json`` (what was run, and how often the test split was opened), ``training_images.json``,
    ``summary.json`` (metrics), and a ``seed-S/MODEL`` folder each with the trained model, its logs and its outcome.
    """

    protocol: ClassVar[str]
    data: Any

    def __init__(
        self, backbone: Backbone, models: Mapping[str, Any], options: Any, progress: Progress | None = None
    ) -> None:
        if row_name("zero-shot") in models or not models:
            raise CaptError(f"models: expected at least one, none called 'zero_shot', found {list(models)}")
        self.lock = TestLock()
        self.backbone, self.models, self.options = backbone, dict(models), options
        self.progress = progress or (lambda what, done, total: None)

    # ---- what a kind of run is made of ---------------------------------------------------------------

    @abstractmethod
    def _check(self) -> None:
        """Refuse settings and names that do not fit before anything is removed or trained."""

    @abstractmethod
    def _kind(self, config: Any) -> str:
        """Kind of the model that these are the settings of."""

    @abstractmethod
    def _details(self) -> dict[str, Any]:
        """Further entries of ``run.json``."""

    @abstractmethod
    def _trained_on(self) -> Iterable[str]:
        """Names of the images that decide on the models."""

    @abstractmethod
    def _fit_one(self, name: str, config: Any, seed: int, folder: Path) -> Model:
        """Train one model."""

    @abstractmethod
    def _zero_shot(self) -> Model:
        """The model that nothing was trained for."""

    @abstractmethod
    def _evaluate_one(self, what: str, model: Model) -> Outcome:
        """Score one model on the test images."""

    @abstractmethod
    def _shown(self, metrics: Mapping[str, float]) -> list[str]:
        """Names of the metrics of the result table, among those there are."""

    @abstractmethod
    def _sizes(self) -> dict[str, Any]:
        """Sizes of the data, for the summary."""

    # ---- training ------------------------------------------------------------------------------------

    def fit(self, out: str | Path, **record: Any) -> dict[int, dict[str, Model]]:
        """Train every model of every seed and write its folder; the test split stays shut.

        ``record``: further entries of ``run.json``, such as how the backbone was opened.
        """
        out, started = Path(out), time.perf_counter()
        self._check()
        clear_folder(out)
        self._record(out, record)
        trained: dict[int, dict[str, Model]] = {}
        for seed in self.options.seeds:
            trained[seed] = {}
            for name, config in self.models.items():
                folder = out / f"seed-{seed}" / name
                model = self._fit_one(name, config, seed, folder)
                model.save(folder)
                trained[seed][name] = model
        self._update(out, training_seconds=round(time.perf_counter() - started, 1))
        return trained

    def _record(self, out: Path, further: Mapping[str, Any]) -> None:
        write_json(
            out / "run.json",
            {
                "schema": _SCHEMA,
                "method": self.protocol,
                "protocol": self.protocol,
                "models": {name: {"kind": self._kind(c), **asdict(c)} for name, c in self.models.items()},
                "options": asdict(self.options),
                "backbone": {"name": self.backbone.name, "templates": list(self.backbone.templates)},
                "data": self.data.record(),
                **self._details(),
                "versions": {"capt": capt.__version__, "torch": torch.__version__, "python": platform.python_version()},
                "hashes": {"backbone": self.backbone.fingerprint(), "data": self.data.fingerprint()},
                "test_opened": 0,
                **further,
            },
        )
        write_json(out / TRAINED_ON, sorted(self._trained_on()))

    def _update(self, out: Path, **values: Any) -> None:
        write_json(out / "run.json", {**read_json(out / "run.json"), **values})

    # ---- evaluation ----------------------------------------------------------------------------------

    def evaluate(
        self, out: str | Path, models: Mapping[int, Mapping[str, Model]], *, write: bool = True
    ) -> dict[str, Any]:
        """Open the test split and score every model; ``run.json`` counts how often this was done."""
        out, started = Path(out), time.perf_counter()
        self._update(out, test_opened=read_json(out / "run.json").get("test_opened", 0) + 1)
        zero_shot = self._zero_shot()
        records: dict[str, dict[str, dict[str, float]]] = {}
        with self.lock.opened():
            alone = self._evaluate_one("zero-shot", zero_shot)
            for seed, of_seed in models.items():
                found = {"zero_shot": alone} | {
                    name: self._evaluate_one(f"seed {seed}: {name}", model) for name, model in of_seed.items()
                }
                for name, outcome in found.items():
                    records.setdefault(name, {})[str(seed)] = outcome.metrics
                    if write:
                        _store(outcome, out / f"seed-{seed}" / name)
        summary = self._summarise(read_json(out / "run.json"), records)
        summary["timing"]["evaluation_seconds"] = round(time.perf_counter() - started, 1)
        if write:
            write_json(out / "summary.json", summary)
        return summary

    def _summarise(
        self, record: Mapping[str, Any], records: Mapping[str, Mapping[str, Mapping[str, float]]]
    ) -> dict[str, Any]:
        first = next(iter(records.values()))
        return {
            "schema": _SCHEMA,
            "protocol": self.protocol,
            "metrics": self._shown(next(iter(first.values()))),
            "dataset": self.data.name,
            "model": self.backbone.name,
            "pretrained": record.get("opened_with", {}).get("pretrained"),
            "seeds": list(self.options.seeds),
            "sizes": self._sizes(),
            "test_opened": record["test_opened"],
            "methods": {name: aggregate_seeds(per_seed) for name, per_seed in records.items()},
            "versions": record["versions"],
            "hashes": {**record["hashes"], "data": self.data.fingerprint()},
            "timing": {"training_seconds": record.get("training_seconds", 0.0)},
        }


def _store(outcome: Outcome, folder: Path) -> None:
    name, tensors = outcome.tensors
    save_tensors(folder / name, tensors)
    for file, content in outcome.files.items():
        write_json(folder / file, content)
