"""A run: train every seed with the test split locked, then open it once, in the closed and in the open world.

Beside what every run folder holds, ``best_pairs.safetensors``: best seen and unseen pair of every test image, from
which all metrics and figures follow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from capt.data.lock import lock_test
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation import BestPairs, FrontierMeter, PairSpace, feasibility_thresholds
from capt.files import read_json
from capt.methods.compositional.model import CompositionalConfig, CompositionalModel, PairTexts, Profile
from capt.methods.compositional.registry import config_from_dict, load_model, model_type
from capt.methods.compositional.scoring import closed_world, encode_pairs, labels_of, open_world, rows, score
from capt.methods.compositional.training import fit_model, make_model
from capt.methods.runs.compared import TRAINED_ON, ComparedRun, Outcome
from capt.methods.runs.inputs import InputCache
from capt.methods.runs.options import Progress

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import CompositionalSet

World = Literal["closed", "open"]
METRICS = ("best_seen", "best_unseen", "best_hm", "auc")
# What follows from a split with images of one kind alone.
_EMPTY = {
    "val": "the epoch is chosen by accuracy instead of AUC, and the feasibility threshold not at all",
    "test": "that accuracy, HM and AUC are 0",
}


@dataclass(frozen=True)
class CompositionalOptions:
    """What a run does beside the methods themselves.

    Attributes:
        seeds: one model each.
        worlds: ``closed``: candidates are the training pairs and those of the split; ``open``: every state with every
            object.
        threshold: feasibility below which an unseen pair of the open world is dropped; default: the best of
            ``n_thresholds`` on validation images, for each model.
        n_thresholds: evenly spaced values that are tried; 0: nothing is dropped.
        token_memory: bytes of frozen inputs to keep for each split; above it they are computed again when needed.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    worlds: tuple[World, ...] = ("closed", "open")
    threshold: float | None = None
    n_thresholds: int = 50
    token_memory: int = 2 << 30

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise CaptError(f"seeds must be distinct and at least one, found {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise CaptError(f"seeds must be 0 or more, found {list(self.seeds)}")
        if not self.worlds or not set(self.worlds) <= {"closed", "open"} or len(set(self.worlds)) != len(self.worlds):
            raise CaptError(f"worlds: expected 'closed', 'open' or both, found {list(self.worlds)}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise CaptError(f"threshold: expected a finite number, found {self.threshold}")
        if self.threshold is not None and "open" not in self.worlds:
            raise CaptError("threshold: only the open world has one; add 'open' to the worlds or leave it out")
        for name in ("n_thresholds", "token_memory"):
            if (value := getattr(self, name)) < 0:
                raise CaptError(f"{name}: expected 0 or more, found {value}")


class CompositionalRun(ComparedRun[CompositionalModel]):
    """A :class:`ComparedRun` in the closed and in the open world."""

    protocol = "compositional"
    data: CompositionalSet
    options: CompositionalOptions

    def __init__(
        self, data: CompositionalSet, backbone: Backbone, models: Mapping[str, CompositionalConfig],
        options: CompositionalOptions | None = None, *, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Prepare; no image is opened yet. ``models``: settings by row name."""
        super().__init__(backbone, models, options or CompositionalOptions(), progress)
        profiles = {name: config.profile for name, config in models.items()}
        if len(set(profiles.values())) > 1:
            found = ", ".join(f"{name} {profile!r}" for name, profile in profiles.items())
            raise CaptError(f"profile: models of one run are compared, so all need the same one, found {found}")
        self.data = replace(data, data=lock_test(data.data, self.lock))
        self.cache = InputCache(backbone, self.options.token_memory, self.progress)

    # ---- training ------------------------------------------------------------------------------------

    def _check(self) -> None:
        with torch.random.fork_rng(devices=[]):
            for config in self.models.values():
                make_model(config, self.data, self.backbone)
        longest = max(self.data.data.classes, key=len)
        if "open" in self.options.worlds:
            longest = " ".join(max(names, key=len) for names in (self.data.states, self.data.objects))
        self.backbone.class_text_features([longest])
        for split, counts in self.data.counts().items():
            for kind in ("seen", "unseen"):
                if split != "train" and not counts[f"{kind}_images"]:
                    warnings.warn(
                        f"{self.data.name}: no {split} image shows {'a seen' if kind == 'seen' else 'an unseen'} pair, "
                        f"so {_EMPTY[split]}",
                        stacklevel=3,
                    )

    def _kind(self, config: CompositionalConfig) -> str:
        return model_type(config).kind

    def _details(self) -> dict[str, Any]:
        return {"pairs": self.data.pairs.tolist()}  # 'predict' chooses among these

    def _trained_on(self) -> Iterable[str]:
        return self.data.train.names

    def _fit_one(self, name: str, config: CompositionalConfig, seed: int, folder: Path) -> CompositionalModel:
        return fit_model(name, config, self.data, self.cache, seed, folder, self.progress)

    # ---- evaluation ----------------------------------------------------------------------------------

    def _zero_shot(self) -> CompositionalModel:
        # Measured like the models that it stands beside.
        profile = next(iter(self.models.values())).profile
        return make_model(CompositionalConfig(profile=profile), self.data, self.backbone).eval()

    def _evaluate_one(self, what: str, model: CompositionalModel) -> Outcome:
        metrics: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for world, best in self._best_pairs(what, model, metrics):
            metrics |= {f"{world}_{name}": value for name, value in _metrics(best, model.config.profile).items()}
            tensors |= {f"{world}_{name}": value for name, value in _tensors(best).items()}
        return Outcome(metrics, ("best_pairs.safetensors", tensors), {})

    def _best_pairs(
        self, what: str, model: CompositionalModel, metrics: dict[str, float]
    ) -> Iterator[tuple[World, BestPairs]]:
        """Best pairs of the test images in each world; thresholds go into ``metrics``. No prompt is encoded twice."""
        closed = whole = encoded = closed_world(self.data, "test")
        if "open" in self.options.worlds:
            whole = open_world(self.data, self.backbone)
            # A threshold that is known beforehand spares the prompts of what it drops.
            encoded = whole if self.options.threshold is None else whole.pruned(self.options.threshold)
        texts = encode_pairs(model, encoded)._replace(world=len(whole))
        if "closed" in self.options.worlds:
            inside = bool((encoded.position(closed.pairs) >= 0).all())
            own = rows(texts, encoded, closed) if inside else encode_pairs(model, closed)
            own = own._replace(world=len(closed))
            yield "closed", self._score(f"{what}, closed world", model, own, closed, "test").best_pairs()
        if "open" in self.options.worlds:
            threshold = self._threshold(what, model, texts, whole)
            space = whole if threshold is None else whole.pruned(threshold)
            own = rows(texts, encoded, space)
            best = self._score(f"{what}, open world", model, own, space, "test").best_pairs()
            if threshold is not None:
                metrics |= {"open_threshold": threshold, "open_kept": len(space) / len(whole)}
                if model.config.profile == "released":
                    best = best.infeasible_at_zero(whole, threshold)
            yield "open", best

    def _threshold(self, what: str, model: CompositionalModel, texts: PairTexts, whole: PairSpace) -> float | None:
        if self.options.threshold is not None or not self.options.n_thresholds or whole.seen.all():
            return self.options.threshold
        thresholds = feasibility_thresholds(whole, self.options.n_thresholds)
        meter = self._score(f"{what}, thresholds", model, texts, whole, "val", thresholds)
        return meter.search(model.config.profile).threshold

    def _score(
        self, what: str, model: CompositionalModel, texts: PairTexts, space: PairSpace, split: str,
        thresholds: Tensor | None = None,
    ) -> FrontierMeter:  # fmt: skip
        return score(
            model, texts, space, self.cache(model, self.data.data.splits()[split], split), labels_of(self.data, split),
            thresholds=thresholds, progress=lambda done, total: self.progress(f"evaluating {what}", done, total),
        )  # fmt: skip

    def _shown(self, metrics: Mapping[str, float]) -> list[str]:
        return [f"{world}_{name}" for world in self.options.worlds for name in METRICS]

    def _sizes(self) -> dict[str, Any]:
        return {"states": len(self.data.states), "objects": len(self.data.objects), "pairs": self.data.counts()}


def _metrics(best: BestPairs, profile: Profile) -> dict[str, float]:
    """All numbers of one world; the main ones from the exact curve, or from the published grid (``released``)."""
    exact, grid = best.curve(), best.grid_curve()
    main = exact if profile == "clean" else grid
    return {
        **{name: getattr(main, name) for name in METRICS},
        "auc_grid": grid.auc,
        "best_hm_grid": grid.best_hm,
        **{f"accuracy_{name}": value for name, value in best.accuracy().items()},
    }


def _tensors(best: BestPairs) -> dict[str, Tensor]:
    """Best seen and unseen pair of each image as (state, object), with its score (-inf: none)."""
    pairs = best.space.pairs
    return {
        "labels": best.labels,
        "label_seen": best.label_seen,
        "seen_pairs": pairs[best.seen.pair[:, 0]],
        "unseen_pairs": pairs[best.unseen.pair[:, 0]],
        "seen_scores": best.seen.score[:, 0].float(),
        "unseen_scores": best.unseen.score[:, 0].float(),
    }


def evaluate(
    run: str | Path, data: CompositionalSet, backbone: Backbone, *, options: CompositionalOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a finished run's models on a data set again; the run's record counts it, its files stay as they are.

    Args:
        data: with the states, objects and training pairs of the run.
        options: other worlds or another threshold than the run's; seeds are the run's.

    Raises:
        DataError: the data set has other states, objects or training pairs, or a test image was trained on.
        DamagedFileError: ``run.json`` is not the record of a compositional run.
        CaptError: the backbone is not the run's.
    """
    run = Path(run)
    record = read_json(run / "run.json")
    try:
        own = options_from_dict(record["options"])
        configs = {
            name: config_from_dict(values["kind"], {k: v for k, v in values.items() if k != "kind"})
            for name, values in record["models"].items()
        }
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"'{run / 'run.json'}': not the record of a compositional run ({error!r}); fit it again"
        ) from error
    chosen = own if options is None else replace(options, seeds=own.seeds)
    models = {
        seed: {name: load_model(run / f"seed-{seed}" / name, backbone) for name in configs} for seed in chosen.seeds
    }
    one = next(iter(models[chosen.seeds[0]].values()))
    trained = torch.from_numpy(data.pairs[data.split_pairs["train"]])
    for what, found, expected in (
        ("states", list(data.states), list(one.states)),
        ("objects", list(data.objects), list(one.objects)),
        ("training pairs", trained.tolist(), one.train_pairs.tolist()),
    ):
        if found != expected:
            raise DataError(
                f"'{run}' was trained with {len(expected)} {what}, '{data.name}' has {len(found)}, others or in "
                "another order; evaluate it on the data it was trained for, or fit a new run"
            )
    if leaked := sorted(set(read_json(run / TRAINED_ON)) & set(data.test.names)):
        raise DataError(
            f"'{run}' was trained on {len(leaked)} of the test images of '{data.name}', such as '{leaked[0]}'; "
            "evaluate it on the splits it was trained with"
        )
    return CompositionalRun(data, backbone, configs, chosen, progress=progress).evaluate(run, models, write=False)


def options_from_dict(values: Mapping[str, Any]) -> CompositionalOptions:
    """Options as ``run.json`` holds them."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return CompositionalOptions(**plain)
