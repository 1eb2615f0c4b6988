"""Training of everything that one seed needs: base model, bank, CAPT (or several variants of it), and its rivals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from capt.bank import ConfusionBank
from capt.data import ImageSet, load_few_shot
from capt.errors import CaptError, DataError
from capt.files import read_json
from capt.methods.base.model import BaseConfig, BaseModel
from capt.methods.base.registry import BASES, base_type, load_base, make_base
from capt.methods.base.tip_adapter import TipAdapter
from capt.methods.capt import CAPT
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs.options import Progress, RunOptions
from capt.methods.runs.protocol import Protocol
from capt.methods.runs.rivals import Adapter, fit_rivals, load_rivals
from capt.methods.runs.unlabelled import unlabelled_images
from capt.methods.runs.views import Views, rows_of
from capt.modules import PairPrompts
from capt.training import TokenStore, train

if TYPE_CHECKING:
    from capt.backbones import Backbone

CHUNK = 256
# What tells a seed's folder of any kind of run, finished or not, from one of somebody's own.
_WRITTEN = ("few_shot.json", "*/state.json", "*/metrics.jsonl")


@dataclass
class SeedModels:
    """What one seed trained.

    Attributes:
        base: the base model f0, frozen.
        capt: CAPT by variant name; empty for a run of the base model alone.
        adapters: residual adapters on f0's features, by row name.
        tip: cache of f0's training features.
    """

    base: BaseModel
    capt: dict[str, CAPT] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    tip: TipAdapter | None = None

    @property
    def rows(self) -> list[str]:
        """Names of the result rows, zero-shot first."""
        base = [] if self.base.kind == "zero-shot" else [row_name(self.base.kind)]
        tip = [] if self.tip is None else ["tip_adapter"]
        return ["zero_shot", *base, *self.adapters, *tip, *self.capt]


def same_training(first: CAPTConfig, second: CAPTConfig) -> bool:
    """Whether two configurations train alike, that is, differ in what is used at prediction only."""
    at_prediction = {"evidence": 0.0, "semantic_evidence": 0.0, "unseen_strength": 1.0, "bank_at_inference": False}
    return replace(first, **at_prediction) == replace(second, **at_prediction)  # type: ignore[arg-type]


def row_name(kind: str) -> str:
    """Name of a base model's row."""
    return kind.replace("-", "_")


def stored_base_run(base: str) -> Path | None:
    """The run folder that ``base`` names; None if it is the name of a base model.

    Raises:
        CaptError: it is neither.
    """
    if base not in BASES and Path(base).is_dir():
        return Path(base)
    base_type(base)
    return None


def positions_of(images: ImageSet, ids: np.ndarray) -> Tensor:
    """Positions int64 in ``images`` of sample ids, all of which must be there."""
    order = np.argsort(images.ids)
    found = order[np.searchsorted(images.ids[order], ids).clip(max=len(order) - 1)]
    if not np.array_equal(images.ids[found], ids):
        raise DataError("some stored sample ids are not in this data set: it is not the data the run was made with")
    return torch.from_numpy(np.ascontiguousarray(found))


def listed_shots(options: RunOptions, train: ImageSet, seed: int) -> ImageSet:
    """The training images that the list of ``few_shot_lists`` for ``seed`` names.

    Raises:
        CaptError: the name has other fields than ``{shots}`` and ``{seed}``.
        DataError: the list is longer than ``shots`` says, or of other data.
    """
    try:
        path = options.few_shot_lists.format(shots=options.shots, seed=seed)
    except (LookupError, ValueError, AttributeError) as error:
        raise CaptError(
            f"few_shot_lists: only {{shots}} and {{seed}} may stand in the name, found '{options.few_shot_lists}'"
        ) from error
    images = load_few_shot(path, train)
    if len(images) and (most := int(images.counts.max())) > options.shots:
        raise DataError(
            f"'{path}': lists up to {most} images of a class, but shots is {options.shots}; make them equal"
        )
    return images


class SeedTrainer:
    """Trains the seeds of a run one after the other, sharing whatever does not depend on the seed."""

    def __init__(
        self, protocol: Protocol, backbone: Backbone, options: RunOptions, variants: Mapping[str, CAPTConfig],
        base_config: BaseConfig | None, shots: Mapping[int, ImageSet], progress: Progress,
    ) -> None:  # fmt: skip
        """``shots``: training images of every seed; ``variants``: CAPT configurations by row name."""
        self.protocol, self.backbone, self.options, self.variants = protocol, backbone, options, dict(variants)
        self.base_config, self.shots, self.progress = base_config, dict(shots), progress
        self.device = backbone.device
        ids = np.unique(np.concatenate([images.ids for images in shots.values()]))
        self.union = protocol.train.subset(np.sort(positions_of(protocol.train, ids).numpy()))
        self._stores: dict[tuple[tuple[Hashable, ...], int | None], TokenStore] = {}

    # ---- cached inputs ------------------------------------------------------------------------------

    def _store(
        self, key: tuple[Hashable, ...], what: str, images: ImageSet, encode: Callable[[Tensor], Tensor],
        view: int | None,
        n_views: int = 1,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        """Frozen inputs of ``images`` in one of ``n_views`` views; made once for each key."""
        if (key, view) in self._stores:
            # What was not kept is made again, by the present model: the one before may be finished, or another seed's.
            self._stores[key, view].encode = encode
        else:
            done = 0

            def report(count: int) -> None:
                nonlocal done
                done += count
                self.progress(name, done, len(images))

            name = what if view is None else f"{what} (augmented view {view + 1})"
            transform = self.backbone.preprocess if view is None else self.backbone.train_transform
            self._stores[key, view] = TokenStore(
                images, transform, encode, seed=view, device=self.device, progress=report,
                limit=self.options.token_memory // n_views,
            )  # fmt: skip
        return self._stores[key, view]

    def _views(
        self, key: tuple[Hashable, ...], what: str, images: ImageSet, encode: Callable[[Tensor], Tensor], n: int
    ) -> list[Callable[[Tensor], Tensor]]:
        return [self._store(key, what, images, encode, v, n + 1) for v in (None, *range(n))]

    # ---- base model ---------------------------------------------------------------------------------

    def base(self, kind: str, seed: int, config: BaseConfig | None = None) -> BaseModel:
        """The base model of one seed: read from the folder of an earlier run, or trained.

        Raises:
            CaptError: the folder was made with other training images or classes.
        """
        if (run := stored_base_run(kind)) is not None:
            return self._stored_base(run, seed)
        type_ = base_type(kind)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            images, names, labels = self.shots[seed], self.protocol.classes, None
            if not type_.uses_labels:
                images, names = unlabelled_images(self.protocol, self.options)
                labels = torch.full((len(images),), -1)
            base = make_base(kind, self.backbone, names, config).to(self.device)
            if labels is None:
                labels = torch.from_numpy(images.labels.copy())
            pool = self.union if type_.uses_labels else images
            views = Views(
                self._views(("inputs", kind), f"encoding images for {kind}", pool, base.inputs, base.config.views),
                positions_of(pool, images.ids),
            ) if kind != "zero-shot" else None  # fmt: skip
            if views is None:
                return base.finish()
            base.prepare(views.plain, labels)

            def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
                return base.losses(views.take(batch, views.choose(batch, generator)), labels[batch].to(self.device))

            def after(epoch: int, epochs: int, loss: float) -> None:
                base.end_epoch(epoch, epochs)
                self.progress(f"seed {seed}: {kind}, loss {loss:.3f}", epoch, epochs)

            base.train()
            train(
                base.trainable().values(), step, len(images), base.config.training,
                generator=torch.Generator().manual_seed(seed), progress=after,
            )  # fmt: skip
            return base.finish()

    def _stored_base(self, run: Path, seed: int) -> BaseModel:
        folder = run / f"seed-{seed}"
        if not (folder / "base" / "base.json").is_file():
            raise CaptError(
                f"base '{run}': holds no base model for seed {seed}; give the folder of a 'capt fit NAME' run with the "
                f"same seeds, or the name of a base model ({', '.join(BASES)})"
            )
        base = load_base(folder / "base", self.backbone)
        used = {image["name"] for image in read_json(folder / "few_shot.json")["images"]}
        if used != set(self.shots[seed].names):
            raise CaptError(
                f"base '{run}': seed {seed} was trained on other images than this run's {self.options.shots} shots; "
                "use the same data, shots and seeds"
            )
        return base

    # ---- one seed -----------------------------------------------------------------------------------

    def fit(self, seed: int, folder: Path, pair_prompts: Callable[[BaseModel], PairPrompts | None]) -> SeedModels:
        """Train one seed and write its models into ``folder``.

        ``pair_prompts``: written pair texts of the trained classes for a base model, or None.
        """
        images = self.shots[seed]
        base = self.base(self.options.base, seed, self.base_config)
        models = SeedModels(base)
        if not self.variants:
            base.save(folder / "base")
            return models
        labels, ids = torch.from_numpy(images.labels.copy()), torch.from_numpy(images.ids.copy())
        with torch.no_grad():
            text = base.class_text_features(self.protocol.classes).detach().clone()
        shared = None if base.tower is self.backbone.tower else seed
        prompts = pair_prompts(base)
        if shared is not None:  # tokens of another seed's prompts are of no use
            self._stores = {key: store for key, store in self._stores.items() if key[0][0] != "tokens"}
        for name, config in self.variants.items():
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                probe = CAPT(base, self.protocol.classes, config=config, text_features=text)
                views = Views(
                    self._views(
                        ("tokens", len(probe.adapter.weight), shared), "encoding training images", self.union,
                        probe.tokens, config.views,
                    ),
                    positions_of(self.union, images.ids).to(self.device),
                )  # fmt: skip
                raw = [self._features(probe, view, views.positions) for view in views.views]
                bank = self._bank(base, config, seed, raw[0], labels, ids, images, text)
                torch.manual_seed(seed)
                model = CAPT(
                    base, self.protocol.classes, config=config, bank=bank, text_features=text, pair_prompts=prompts
                )
                model.evidence.remember(raw[0], labels.to(self.device))
                place = folder if len(self.variants) == 1 else folder / name
                like = next((other for other in models.capt.values() if same_training(other.config, config)), None)
                if like is None:
                    self._train_capt(model, views, raw, images, seed, name, place)
                else:  # only prediction differs
                    if like.bank is not None:  # it may have been collected anew on the way
                        model.use_bank(like.bank)
                    model.load_state_dict(like.state_dict())
                model.eval().save(place)
                models.capt[name] = model
            if len(models.capt) == 1:
                models.adapters, models.tip = fit_rivals(
                    base, raw, labels, text, model, self.options, seed, folder, self.progress
                )
        return models

    def _features(self, model: CAPT, view: Callable[[Tensor], Tensor], positions: Tensor) -> Tensor:
        """Base features [N, d], un-normalised, of the training images in one view."""
        with torch.no_grad():
            chunks = [model.base_features(view(part)) for part in positions.split(CHUNK)]
        return torch.cat(chunks)

    def _bank(
        self, base: BaseModel, config: CAPTConfig, seed: int, raw: Tensor, labels: Tensor, ids: Tensor,
        images: ImageSet, text: Tensor,
    ) -> ConfusionBank:  # fmt: skip
        """Mistakes on the training images of f0, or of the model that ``bank_source`` names."""
        classes, own = self.protocol.classes, config.bank_source in ("own", base.kind)
        source = base if own else self.base(config.bank_source, seed)  # may be trained here, so with gradients
        with torch.no_grad():
            if own:
                logits = base.logits(raw, classes, text)
            else:
                # Not the inputs it was trained on: those may be of other images, and carry more than images.
                store = self._store(
                    ("bank", config.bank_source), "encoding for the bank", self.union, source.inputs, None
                )
                parts = positions_of(self.union, images.ids).split(CHUNK)
                logits = source.logits(torch.cat([source.features(store(part)) for part in parts]), classes)
        return ConfusionBank.from_logits(
            F.normalize(raw, dim=-1).cpu(), logits.cpu(), labels, ids, classes, names=images.names,
            backbone=source.fingerprint(),
        )  # fmt: skip

    def _train_capt(
        self, model: CAPT, views: Views, raw: Sequence[Tensor], images: ImageSet, seed: int, name: str, folder: Path
    ) -> None:
        labels = torch.from_numpy(images.labels.copy()).to(self.device)
        ids = torch.from_numpy(images.ids.copy()).to(self.device)
        config = model.config
        features = rows_of(raw)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        assert model.bank is not None
        stored = positions_of(images, model.bank.sample_ids.numpy()).to(self.device)

        def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
            choice = views.choose(batch, generator)
            return model.losses(
                views.take(batch, choice), labels[batch], base_features=features.take(batch, choice),
                bank_tokens=bank_tokens, sample_ids=ids[batch],
            )  # fmt: skip

        def bank_tokens(rows: Tensor) -> Tensor:
            return views.plain(stored[rows])

        def after(epoch: int, epochs: int, loss: float) -> None:
            nonlocal stored
            self.progress(f"seed {seed}: {name}, loss {loss:.3f}", epoch, epochs)
            if config.bank_refresh and epoch % config.bank_refresh == 0 and epoch < epochs:
                bank = model.refresh_bank(views.plain, labels.cpu(), ids.cpu(), images.names)
                stored = positions_of(images, bank.sample_ids.numpy()).to(self.device)

        model.train()
        train(
            model.learning_rates(), step, len(images), config.training,
            generator=torch.Generator().manual_seed(seed), metrics_path=metrics, progress=after,
        )  # fmt: skip


def load_seed(folder: Path, backbone: Backbone, variants: Sequence[str], rivals: Sequence[str]) -> SeedModels:
    """The models that :meth:`SeedTrainer.fit` wrote."""
    if not variants:
        return SeedModels(load_base(folder / "base", backbone))
    capt = {name: CAPT.load(folder if len(variants) == 1 else folder / name, backbone) for name in variants}
    models = SeedModels(next(iter(capt.values())).base, capt)
    models.adapters, models.tip = load_rivals(folder, models.base, rivals)
    return models


def clear_folder(out: Path) -> None:
    """Remove what an earlier run left in the same folder: it would be taken for a part of this one."""
    (out / "summary.json").unlink(missing_ok=True)
    for folder in out.glob("seed-*"):
        # Only what a run wrote: somebody's own "seed-pictures" may lie beside it.
        made = any(next(folder.glob(pattern), None) for pattern in _WRITTEN)
        if re.fullmatch(r"seed--?\d+", folder.name) and made:
            shutil.rmtree(folder)
