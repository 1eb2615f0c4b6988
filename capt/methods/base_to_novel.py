"""Base-to-novel runs: train on few images of the base classes, then open the test split once, for every seed.

A run folder holds ``run.json`` (what was run), ``summary.json`` (metrics), and a ``seed-S`` folder each with the
model, its bank, ``few_shot.json``, ``metrics.jsonl`` and ``predictions.safetensors``.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import capt
from capt.bank import ConfusionBank
from capt.data import DataSet, ImageSet, base_novel, few_shot, save_few_shot
from capt.errors import CaptError, DataError
from capt.evaluation.protocols import aggregate_seeds, base_to_novel_metrics, confusion_changes
from capt.files import load_tensors, read_json, save_tensors, write_json
from capt.methods.baselines import LinearAdapter, adapter_loss, zero_shot_logits
from capt.methods.capt import CAPT
from capt.methods.capt_config import CAPTConfig, config_from_dict
from capt.methods.capt_records import ClassSet
from capt.training import TokenStore, TrainingOptions, train

if TYPE_CHECKING:
    from capt.backbones import Backbone

METHODS = ("zero_shot", "linear_adapter", "capt")
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


@dataclass(frozen=True)
class BaseToNovelOptions:
    """What a run does beside CAPT itself.

    Attributes:
        shots: training images a base class.
        seeds: one model each; 0 is a seed like any other.
        linear: training of the linear residual adapter that CAPT is compared with.
        token_memory: bytes of frozen tokens to keep for the training and for the test images; above it they are
            computed again when needed.
    """

    shots: int = 4
    seeds: tuple[int, ...] = (1, 2, 3)
    linear: TrainingOptions = field(default_factory=TrainingOptions)
    token_memory: int = 2 << 30


def _positions(images: ImageSet, ids: np.ndarray) -> Tensor:
    """Positions int64 in ``images`` of sample ids, all of which must be there."""
    order = np.argsort(images.ids)
    found = order[np.searchsorted(images.ids[order], ids).clip(max=len(order) - 1)]
    if not np.array_equal(images.ids[found], ids):
        raise DataError("some stored sample ids are not in this data set: it is not the data the run was made with")
    return torch.from_numpy(np.ascontiguousarray(found))


class BaseToNovelRun:
    """One data set, one backbone, one configuration, several seeds."""

    def __init__(
        self, data: DataSet, backbone: Backbone, config: CAPTConfig | None = None,
        options: BaseToNovelOptions | None = None, *, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Split the classes; no image is opened yet.

        Raises:
            DataError: fewer than four classes, or no test split.
        """
        self.config, self.options = config or CAPTConfig(), options or BaseToNovelOptions()
        if len(data.classes) < 4:
            raise DataError(
                f"data set '{data.name}': base-to-novel needs at least 4 classes, found {len(data.classes)}"
            )
        if data.test is None or not len(data.test):
            raise DataError(
                f"data set '{data.name}': there is no test split to evaluate on; give one (test/ folder, split column)"
            )
        if not self.options.seeds or len(set(self.options.seeds)) != len(self.options.seeds):
            raise CaptError(f"seeds must be distinct and at least one, found {list(self.options.seeds)}")
        self.data, self.backbone = data, backbone
        self.base, self.novel = base_novel(data)
        for half, split in (("base", self.base), ("novel", self.novel)):
            if split.test is None or not len(split.test):
                raise DataError(
                    f"data set '{data.name}': the {half} classes have no test image; give some, or split otherwise"
                )
        if not len(self.base.train):
            raise DataError(f"data set '{data.name}': the base classes have no training image")
        self.progress = progress or (lambda what, done, total: None)
        self.device = backbone.logit_scale.device
        self.text = backbone.class_text_features(self.base.classes)
        self.novel_text = backbone.class_text_features(self.novel.classes)

    # ---- training -----------------------------------------------------------------------------------

    def _store(
        self, what: str, images: ImageSet, model: CAPT, *, seed: int | None = None, share: int = 1
    ) -> TokenStore:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            self.progress(what, done, len(images))

        transform = self.backbone.preprocess if seed is None else self.backbone.train_transform
        return TokenStore(
            images, transform, model.tokens, seed=seed, device=self.device, progress=report,
            limit=self.options.token_memory // share,
        )  # fmt: skip

    def fit(self, out: str | Path) -> dict[str, Any]:
        """Train every seed, evaluate all methods, write the run folder; returns the summary."""
        out = Path(out)
        started = time.perf_counter()
        forbidden = {int(i) for split in (self.base.val, self.base.test) if split is not None for i in split.ids}
        shots = {seed: few_shot(self.base.train, self.options.shots, seed) for seed in self.options.seeds}
        if any(forbidden.intersection(map(int, images.ids)) for images in shots.values()):
            raise DataError(f"data set '{self.data.name}': training images also occur in the validation or test split")
        union = self.base.train.subset(
            np.sort(_positions(self.base.train, np.unique(np.concatenate([s.ids for s in shots.values()]))).numpy())
        )
        with torch.random.fork_rng(devices=[]):
            probe = CAPT(self.backbone, self.base.classes, config=self.config, text_features=self.text)
        views = [self._store("encoding training images", union, probe, share=self.config.views + 1)] + [
            self._store(f"encoding augmented view {v + 1}", union, probe, seed=v, share=self.config.views + 1)
            for v in range(self.config.views)
        ]
        models: dict[int, tuple[CAPT, LinearAdapter]] = {}
        # What an earlier run left in the same folder would be taken for a part of this one.
        (out / "summary.json").unlink(missing_ok=True)
        for folder in out.glob("seed-*"):
            if folder.name.removeprefix("seed-") not in map(str, self.options.seeds):
                shutil.rmtree(folder)
        self._record(out)
        for seed, images in shots.items():
            folder = out / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            save_few_shot(folder / "few_shot.json", images)
            models[seed] = self._fit_seed(seed, images, views, _positions(union, images.ids), folder)
        trained = time.perf_counter()
        del views
        predictions = self._predict(models)
        for seed, tensors in predictions.items():
            save_tensors(out / f"seed-{seed}" / "predictions.safetensors", tensors)
        summary = self._summarise(predictions, out)
        summary["timing"] = {
            "training_seconds": round(trained - started, 1),
            "evaluation_seconds": round(time.perf_counter() - trained, 1),
        }
        write_json(out / "summary.json", summary)
        return summary

    def _fit_seed(
        self, seed: int, images: ImageSet, views: Sequence[TokenStore], positions: Tensor, folder: Path
    ) -> tuple[CAPT, LinearAdapter]:
        plain, tower = views[0], self.backbone.tower
        labels, ids = torch.from_numpy(images.labels.copy()), torch.from_numpy(images.ids.copy())
        generator = torch.Generator().manual_seed(seed)
        metrics = folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        # The dropout layers draw from torch's global generator: seed it here, and leave the caller's state alone.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = CAPT(self.backbone, self.base.classes, config=self.config, text_features=self.text)
            with torch.inference_mode():
                raw = torch.cat([model.adapter.encode_frozen(tower, plain(p)) for p in positions.split(256)])
                logits = zero_shot_logits(raw, self.text, self.backbone.logit_scale)
            bank = ConfusionBank.from_logits(
                F.normalize(raw, dim=-1).clone().cpu(), logits.clone().cpu(), labels, ids, self.base.classes,
                names=images.names, backbone=self.backbone.fingerprint(),
            )  # fmt: skip
            torch.manual_seed(seed)
            model = CAPT(self.backbone, self.base.classes, config=self.config, bank=bank, text_features=self.text)
            model.evidence.remember(raw.clone(), labels.to(self.device))
            bank_positions = positions[_positions(images, bank.sample_ids.numpy())]

            def tokens(batch: Tensor, generator: torch.Generator) -> Tensor:
                if len(views) == 1:
                    return plain(positions[batch])
                choice = torch.randint(len(views), (len(batch),), generator=generator)
                parts = [
                    view(positions[batch[choice == v]]) for v, view in enumerate(views) if bool((choice == v).any())
                ]
                order = torch.cat([(choice == v).nonzero().squeeze(1) for v in range(len(views))])
                return torch.cat(parts)[torch.argsort(order).to(self.device)]

            def step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
                return model.losses(
                    tokens(batch, generator), labels[batch].to(self.device),
                    bank_tokens=lambda rows: plain(bank_positions[rows.cpu()]), sample_ids=ids[batch].to(self.device),
                )  # fmt: skip

            model.train()
            train(
                model.learning_rates(), step, len(images), self.config.training, generator=generator,
                metrics_path=metrics,
                progress=lambda e, n, loss: self.progress(f"seed {seed}: CAPT, loss {loss:.3f}", e, n),
            )  # fmt: skip
            model.eval().save(folder)

            linear = LinearAdapter(self.backbone.dim).to(self.device)

            def linear_step(batch: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
                with torch.no_grad():
                    raw = model.adapter.encode_frozen(tower, tokens(batch, generator))
                return {
                    "loss": adapter_loss(
                        linear, raw, self.text, labels[batch].to(self.device), self.backbone.logit_scale
                    )
                }

            train(
                linear.parameters(), linear_step, len(images), self.options.linear,
                generator=torch.Generator().manual_seed(seed),
                progress=lambda e, n, loss: self.progress(f"seed {seed}: linear adapter, loss {loss:.3f}", e, n),
            )  # fmt: skip
            save_tensors(folder / "linear_adapter.safetensors", {"weight": linear.linear.weight})
        return model, linear.eval()

    # ---- evaluation ---------------------------------------------------------------------------------

    def _predict(self, models: Mapping[int, tuple[CAPT, LinearAdapter]]) -> dict[int, dict[str, Tensor]]:
        """Labels, ids and the predicted classes of every method on the base and novel test images, by seed."""
        any_model = next(iter(models.values()))[0]
        predictions: dict[int, dict[str, Tensor]] = {seed: {} for seed in models}
        for half, data, text in (("base", self.base, self.text), ("novel", self.novel, self.novel_text)):
            assert data.test is not None
            store = self._store(f"encoding {half} test images", data.test, any_model)
            shared = {
                f"{half}_labels": torch.from_numpy(data.test.labels.copy()),
                f"{half}_ids": torch.from_numpy(data.test.ids.copy()),
            }
            sets = {
                seed: model.class_set() if half == "base" else ClassSet(tuple(data.classes), text)
                for seed, (model, _) in models.items()
            }
            found: dict[tuple[int, str], list[Tensor]] = {(seed, method): [] for seed in models for method in METHODS}
            stored = {
                seed: self._bank_tokens(model) if self.config.bank_at_inference else None
                for seed, (model, _) in models.items()
            }
            with torch.inference_mode():
                for chunk in torch.arange(len(data.test)).split(64):
                    tokens = store(chunk)
                    for seed, (model, linear) in models.items():
                        output = model(tokens, sets[seed], bank_tokens=stored[seed])
                        raw = model.adapter.encode_frozen(self.backbone.tower, tokens)
                        scores = {
                            "zero_shot": output.base_logits,
                            "linear_adapter": linear(raw) @ text.T,
                            "capt": output.logits,
                        }
                        for method, logits in scores.items():
                            found[seed, method].append(logits.argmax(-1).cpu())
            for seed in models:
                predictions[seed] |= shared | {f"{half}_{method}": torch.cat(found[seed, method]) for method in METHODS}
        return predictions

    def _bank_tokens(self, model: CAPT) -> Callable[[Tensor], Tensor]:
        bank = model.bank
        assert bank is not None
        images = self.base.train.subset(_positions(self.base.train, bank.sample_ids.numpy()).numpy())
        store = self._store("encoding stored mistakes", images, model)
        return lambda rows: store(rows.cpu())

    def _summarise(self, predictions: Mapping[int, Mapping[str, Tensor]], out: Path) -> dict[str, Any]:
        methods: dict[str, Any] = {}
        for method in METHODS:
            per_seed = {
                str(seed): base_to_novel_metrics(
                    p["base_labels"].numpy(), p[f"base_{method}"].numpy(),
                    p["novel_labels"].numpy(), p[f"novel_{method}"].numpy(),
                    reference_base_predictions=p["base_zero_shot"].numpy(), n_base_classes=len(self.base.classes),
                )
                for seed, p in predictions.items()
            }  # fmt: skip
            methods[method] = aggregate_seeds(per_seed)
        first = next(iter(predictions.values()))
        record = read_json(out / "run.json")
        return {
            "schema": 1,
            "dataset": self.data.name,
            "model": self.backbone.name,
            "shots": self.options.shots,
            "seeds": list(self.options.seeds),
            "n_base_classes": len(self.base.classes),
            "n_novel_classes": len(self.novel.classes),
            "methods": methods,
            "top_confusions": confusion_changes(
                first["base_labels"].numpy(),
                {method: first[f"base_{method}"].numpy() for method in METHODS},
                self.base.classes,
            ),
            "versions": record["versions"],
            "hashes": {**record["hashes"], "data": self.data.fingerprint()},
        }

    def _record(self, out: Path) -> None:
        """Write ``run.json``: everything needed to say what a number was measured on."""
        write_json(
            out / "run.json",
            {
                "schema": 1,
                "method": "capt",
                "protocol": "base-to-novel",
                "config": asdict(self.config),
                "options": asdict(self.options),
                "backbone": {"name": self.backbone.name, "templates": list(self.backbone.templates)},
                "classes": {"base": list(self.base.classes), "novel": list(self.novel.classes)},
                "data": self.data.record(),
                "versions": {"capt": capt.__version__, "torch": torch.__version__, "python": platform.python_version()},
                "hashes": {"backbone": self.backbone.fingerprint(), "data": self.data.fingerprint()},
            },
        )


def evaluate(run: str | Path, data: DataSet, backbone: Backbone, *, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate the stored models of a run folder on the test split of ``data``; writes nothing.

    Raises:
        DataError: the classes are not those of the run, or it holds no seed folder.
        CaptError: the backbone is not the run's.
    """
    run = Path(run)
    record = read_json(run / "run.json")
    seeds = tuple(record["options"]["seeds"])
    options = BaseToNovelOptions(
        shots=record["options"]["shots"], seeds=seeds, token_memory=record["options"]["token_memory"],
        linear=TrainingOptions(**record["options"]["linear"]),
    )  # fmt: skip
    repeat = BaseToNovelRun(data, backbone, config_from_dict(record["config"]), options, progress=progress)
    for half, split in (("base", repeat.base), ("novel", repeat.novel)):
        trained, given = record["classes"][half], list(split.classes)
        if trained != given:
            missing = sorted(set(trained) - set(given))[:3]
            added = sorted(set(given) - set(trained))[:3]
            raise DataError(
                f"'{run}' was trained with {len(trained)} {half} classes, '{data.name}' has {len(given)}, others "
                f"(only in the run: {missing or 'none'}; only in the data: {added or 'none'}). "
                "Evaluate it on the data it was trained for, or fit a new run."
            )
    assert data.test is not None
    models = {}
    for seed in seeds:
        trained_on = {image["name"] for image in read_json(run / f"seed-{seed}" / "few_shot.json")["images"]}
        if leaked := sorted(trained_on & set(data.test.names)):
            raise DataError(
                f"'{run}': seed {seed} was trained on {len(leaked)} of the test images of '{data.name}', such as "
                f"'{leaked[0]}'; evaluate with the same split options as the run"
            )
        model = CAPT.load(run / f"seed-{seed}", backbone)
        linear = LinearAdapter(backbone.dim).to(repeat.device)
        with torch.no_grad():
            linear.linear.weight.copy_(load_tensors(run / f"seed-{seed}" / "linear_adapter.safetensors")["weight"])
        models[seed] = (model, linear.eval())
    return repeat._summarise(repeat._predict(models), run)
