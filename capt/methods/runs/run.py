"""A run: train every seed with the test split locked, then open it once and evaluate every method.

A run folder holds ``run.json`` (what was run, and how often the test split was opened), ``summary.json`` (metrics), and
a ``seed-S`` folder each with the models, the bank, ``few_shot.json``, ``metrics.jsonl``, ``predictions.safetensors`` and
``pairs.csv``.
"""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import capt
from capt.data import DataSet, ImageSet, batches, few_shot, load_few_shot, save_few_shot
from capt.errors import DamagedFileError, DataError
from capt.evaluation.expected import judge_run
from capt.evaluation.protocols import aggregate_seeds, confusion_changes
from capt.files import read_json, save_tensors, write_bytes, write_json
from capt.methods.base.model import BaseConfig
from capt.methods.baselines import zero_shot_logits
from capt.methods.capt import CAPT
from capt.methods.capt_config import CAPTConfig, config_from_dict
from capt.methods.runs.memory import announced_memory
from capt.methods.runs.options import Progress, RunOptions
from capt.methods.runs.pair_texts import PairTextChoice
from capt.methods.runs.protocol import Protocol, Target, make_protocol
from capt.methods.runs.seeds import SeedModels, SeedTrainer, clear_folder, load_seed, positions_of, row_name
from capt.methods.runs.unlabelled import beyond_shots, refuse_transductive
from capt.training import TokenStore, TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

_SCHEMA = 1
BATCH = 64


class Run:
    """One protocol, one backbone, several seeds; CAPT (one or more variants of it) or a base model alone."""

    def __init__(
        self, protocol: Protocol, backbone: Backbone, config: CAPTConfig | Mapping[str, CAPTConfig] | None = None,
        options: RunOptions | None = None, *, base_config: BaseConfig | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Prepare; no image is opened yet.

        Args:
            protocol: what is trained on and what is tested.
            config: CAPT's settings; several by row name are trained side by side; an empty mapping trains the base
                model alone.
            options: shots, seeds, base model, rivals.
            base_config: settings of the base model; default: its own.

        Raises:
            CaptError: ``transductive`` where no image of a new class could be learned from.
        """
        self.protocol, self.backbone, self.options = protocol, backbone, options or RunOptions()
        self.variants = dict(config) if isinstance(config, Mapping) else {"capt": config or CAPTConfig()}
        self.base_config = base_config
        self.progress = progress or (lambda what, done, total: None)
        self.pair_texts = PairTextChoice(self.options.pair_text_files, protocol)
        if self.options.transductive:
            refuse_transductive(protocol, self.options, self.variants)

    # ---- training -----------------------------------------------------------------------------------

    def shots(self, seed: int) -> ImageSet:
        """The training images of one seed.

        Raises:
            DataError: one of them is also a validation or test image.
        """
        options, train = self.options, self.protocol.train
        if options.few_shot_lists:
            images = load_few_shot(options.few_shot_lists.format(shots=options.shots, seed=seed), train)
        else:
            images = few_shot(train, options.shots, seed)
        if self.protocol.forbidden.intersection(map(int, images.ids)):
            raise DataError(
                f"data set '{self.protocol.data.name}': training images also occur in the validation or test split"
            )
        return images

    def fit(self, out: str | Path) -> dict[int, SeedModels]:
        """Train every seed and write its folder; the test split stays shut."""
        out, started = Path(out), time.perf_counter()
        shots = {seed: self.shots(seed) for seed in self.options.seeds}
        clear_folder(out, self.options.seeds)
        n_images = len({int(i) for images in shots.values() for i in images.ids})
        memory = announced_memory(self.protocol, self.backbone, self.options, self.variants, n_images)
        self.progress(f"memory: at most {sum(memory.values()) / 2**20:.0f} MiB beside the model", 1, 1)
        self._record(out)
        self._update(out, announced_memory=memory)
        trainer = SeedTrainer(
            self.protocol, self.backbone, self.options, self.variants, self.base_config, shots, self.progress
        )
        models = {}
        for seed, images in shots.items():
            folder = out / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            save_few_shot(folder / "few_shot.json", images)
            models[seed] = trainer.fit(seed, folder, self.pair_texts.trained)
        self._update(out, training_seconds=round(time.perf_counter() - started, 1))
        return models

    def _record(self, out: Path) -> None:
        """Write ``run.json``: everything needed to say what a number was measured on."""
        write_json(
            out / "run.json",
            {
                "schema": _SCHEMA,
                "method": "capt" if self.variants else row_name(self.options.base),
                "protocol": self.protocol.name,
                "targets": self.protocol.record()["targets"],
                "variants": {name: asdict(config) for name, config in self.variants.items()},
                "options": asdict(self.options),
                "base": {
                    "kind": self.options.base,
                    "config": None if self.base_config is None else asdict(self.base_config),
                },
                "pair_texts": self.pair_texts.record(),
                **beyond_shots(self.protocol, self.options, self.variants),
                "backbone": {"name": self.backbone.name, "templates": list(self.backbone.templates)},
                "classes": self.protocol.class_lists(),
                "data": self.protocol.data.record(),
                "versions": {"capt": capt.__version__, "torch": torch.__version__, "python": platform.python_version()},
                "hashes": {"backbone": self.backbone.fingerprint(), "data": self.protocol.data.fingerprint()},
                "test_opened": 0,
            },
        )

    def _update(self, out: Path, **values: Any) -> None:
        write_json(out / "run.json", {**read_json(out / "run.json"), **values})

    # ---- evaluation ---------------------------------------------------------------------------------

    def evaluate(self, out: str | Path, models: Mapping[int, SeedModels], *, write: bool = True) -> dict[str, Any]:
        """Open the test split and score every method; ``run.json`` counts how often this was done.

        Args:
            out: folder of the run.
            models: trained models by seed.
            write: keep predictions, pair tables and ``summary.json``; False only counts.
        """
        out, started = Path(out), time.perf_counter()
        self._update(out, test_opened=read_json(out / "run.json").get("test_opened", 0) + 1)
        with self.protocol.lock.opened():
            predictions = self._predict(models)
        summary = self._summarise(models, predictions, out)
        summary["timing"] = {
            "training_seconds": read_json(out / "run.json").get("training_seconds", 0.0),
            "evaluation_seconds": round(time.perf_counter() - started, 1),
        }
        if write:
            for seed, tensors in predictions.items():
                save_tensors(out / f"seed-{seed}" / "predictions.safetensors", tensors)
                self._write_pairs(out / f"seed-{seed}" / "pairs.csv", tensors, models[seed].rows)
            write_json(out / "summary.json", summary)
        return summary

    def _predict(self, models: Mapping[int, SeedModels]) -> dict[int, dict[str, Tensor]]:
        """Labels, ids and predicted classes of every method on every target, by seed."""
        found: dict[int, dict[str, Tensor]] = {seed: {} for seed in models}
        for target in self.protocol.targets:
            scorers = {seed: _Scorer(self, one, target) for seed, one in models.items()}
            guesses: dict[tuple[int, str], list[Tensor]] = {}
            done = 0
            with torch.inference_mode():
                for batch in batches(target.images, self.backbone.preprocess, batch_size=BATCH):
                    pixels = batch.images.to(self.backbone.device)
                    shared: dict[Any, Tensor] = {}
                    for seed, scorer in scorers.items():
                        for row, logits in scorer(pixels, shared).items():
                            guesses.setdefault((seed, row), []).append(logits.argmax(-1).cpu())
                    done += len(batch)
                    self.progress(f"evaluating {target.name} test images", done, len(target.images))
            for seed in models:
                found[seed][f"{target.name}_labels"] = torch.from_numpy(target.images.labels.copy())
                found[seed][f"{target.name}_ids"] = torch.from_numpy(target.images.ids.copy())
                found[seed] |= {
                    f"{target.name}_{row}": torch.cat(parts) for (s, row), parts in guesses.items() if s == seed
                }
        return found

    def bank_tokens(self, model: CAPT) -> Callable[[Tensor], Tensor]:
        """Tokens of stored mistakes, for evaluations that consult them."""
        assert model.bank is not None
        train = self.protocol.train
        images = train.subset(positions_of(train, model.bank.sample_ids.numpy()).numpy())
        return TokenStore(
            images, self.backbone.preprocess, model.tokens, device=self.backbone.device,
            limit=self.options.token_memory,
        )  # fmt: skip

    def _summarise(
        self, models: Mapping[int, SeedModels], predictions: Mapping[int, Mapping[str, Tensor]], out: Path
    ) -> dict[str, Any]:
        any_models = next(iter(models.values()))
        rows, base = any_models.rows, row_name(any_models.base.kind)
        methods: dict[str, Any] = {}
        for row in rows:
            per_seed = {}
            for seed, found in predictions.items():
                per_seed[str(seed)] = self.protocol.measure(found, row, "zero_shot")
                if base != "zero_shot" and row not in ("zero_shot", base):
                    against = self.protocol.measure(found, row, base)
                    per_seed[str(seed)] |= {
                        f"{name}_of_base_model": against[name]
                        for name in ("sample_correction_rate", "pair_resolution_rate", "net_reduction", "new_error_rate")
                    }
            methods[row] = aggregate_seeds(per_seed)
        first, target = next(iter(predictions.values())), self.protocol.targets[0]
        record = read_json(out / "run.json")
        summary = {
            "schema": _SCHEMA,
            "protocol": self.protocol.name,
            "metrics": list(self.protocol.metrics),
            "dataset": self.protocol.data.name,
            "model": self.backbone.name,
            "pretrained": record.get("opened_with", {}).get("pretrained"),
            "base_model": any_models.base.kind,
            "transductive": record.get("transductive", False),
            "shots": self.options.shots,
            "seeds": list(models),
            "n_classes": {name: len(classes) for name, classes in self.protocol.class_lists().items()},
            "test_opened": record["test_opened"],
            "methods": methods,
            "top_confusions": confusion_changes(
                first[f"{target.name}_labels"].numpy(),
                {row: first[f"{target.name}_{row}"].numpy() for row in rows},
                target.classes,
            ),
            "versions": record["versions"],
            "hashes": {**record["hashes"], "data": self.protocol.data.fingerprint()},
        }
        # Published data sets are judged by the published numbers.
        expected = judge_run(summary)
        return summary if expected is None else {**summary, "expected": expected}

    def _write_pairs(self, path: Path, found: Mapping[str, Tensor], rows: list[str]) -> None:
        """Every confused pair of the first target: what zero-shot got wrong, and what is left under each method."""
        target = self.protocol.targets[0]
        labels = found[f"{target.name}_labels"].numpy()
        changes = confusion_changes(
            labels, {row: found[f"{target.name}_{row}"].numpy() for row in rows}, target.classes, n=len(labels)
        )
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["true", "predicted", *rows])
        table.writerows([one["true"], one["predicted"], *(one["counts"][row] for row in rows)] for one in changes)
        write_bytes(path, stream.getvalue().encode())


class _Scorer:
    """Logits of every method of one seed on one target."""

    def __init__(self, run: Run, models: SeedModels, target: Target) -> None:
        self.models, self.backbone, self.names = models, run.backbone, target.classes
        self.trained = target.classes == run.protocol.classes
        self.base = models.base
        self.judge = self.base.for_classes(target.classes)
        with torch.inference_mode(False), torch.no_grad():
            self.zero_shot_text = run.backbone.class_text_features(target.classes)
            self.text = self.base.class_text_features(target.classes).detach()
            self.sets, self.stored = {}, {}
            prompts = run.pair_texts.of(self.base, target)
            for name, model in models.capt.items():
                self.sets[name] = model.class_set(None if self.trained else target.classes, pair_prompts=prompts)
                consult = model.config.bank_at_inference and self.trained and model.bank is not None
                self.stored[name] = run.bank_tokens(model) if consult else None

    def __call__(self, pixels: Tensor, shared: dict[Any, Tensor]) -> dict[str, Tensor]:
        """Logits [B, C] by row name; ``shared`` hands what does not depend on the seed to the other seeds."""
        base, models = self.base, self.models
        common = shared if base.tower is self.backbone.tower else {}
        tokens = {
            name: _once(common, len(model.adapter.weight), partial(model.tokens, pixels))
            for name, model in models.capt.items()
        }
        outputs = {
            name: model(tokens[name], self.sets[name], bank_tokens=self.stored[name])
            for name, model in models.capt.items()
        }
        raw = _once(common, "features", lambda: self._features(pixels, tokens))
        plain = raw if common is shared else _once(shared, "plain", lambda: self.backbone.image_features(pixels))
        extra, base_logits = base.extra_logits(raw, self.names), base.logits(raw, self.names, self.text)
        found = {"zero_shot": zero_shot_logits(plain, self.zero_shot_text, self.backbone.logit_scale)}
        if base.kind != "zero-shot":
            found[row_name(base.kind)] = base_logits if self.judge is base else self.judge(pixels, self.names)
        for name, adapter in models.adapters.items():
            cosines = base.logit_scale * adapter(raw) @ self.text.T
            found[name] = cosines if extra is None else cosines + extra
        if models.tip is not None:
            cached = models.tip.extra_logits(raw, self.names)
            found["tip_adapter"] = base_logits if cached is None else base_logits + cached
        return found | {name: output.logits for name, output in outputs.items()}

    def _features(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Base features [B, d], un-normalised; from CAPT's tokens where there are any."""
        for name, model in self.models.capt.items():
            return model.adapter.encode_frozen(self.base.tower, tokens[name])
        return self.base.features(self.base.inputs(pixels))


def _once(known: dict[Any, Tensor], key: Any, compute: Callable[[], Tensor]) -> Tensor:
    if key not in known:
        known[key] = compute()
    return known[key]


def evaluate(
    run: str | Path, data: DataSet, backbone: Backbone, *, targets: Sequence[DataSet] = (),
    protocol: str | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the stored models of a run folder; ``run.json`` counts it.

    Args:
        run: folder of the run.
        data: the data set the run was made on.
        targets: further data sets, for cross-dataset and domain generalisation.
        protocol: another protocol than the run's, on the same trained classes: a run trained on all classes may be
            scored as "few-shot", "cross-dataset" or "domain-generalisation".

    Raises:
        DataError: the classes are not those of the run, it holds no seed folder, or it was trained on test images.
        CaptError: the backbone is not the run's.
    """
    run = Path(run)
    record = read_json(run / "run.json")
    try:
        options = _options(record["options"])
        variants = {name: config_from_dict(values) for name, values in record["variants"].items()}
        trained, name = list(next(iter(record["classes"].values()))), record["protocol"]
    except (KeyError, TypeError, StopIteration) as error:
        raise DamagedFileError(f"'{run / 'run.json'}': not the record of a run ({error!r}); fit it again") from error
    chosen = make_protocol(protocol or name, data, targets)
    if list(chosen.classes) != trained or (protocol is None and not targets and chosen.class_lists() != record["classes"]):
        raise DataError(_other_classes(run, data, record["classes"], chosen.class_lists()))
    repeat = Run(chosen, backbone, variants, options, progress=progress)
    models = {}
    for seed in options.seeds:
        folder = run / f"seed-{seed}"
        used = {image["name"] for image in read_json(folder / "few_shot.json")["images"]}
        if data.test is not None and (leaked := sorted(used & set(data.test.names))):
            raise DataError(
                f"'{run}': seed {seed} was trained on {len(leaked)} of the test images of '{data.name}', such as "
                f"'{leaked[0]}'; evaluate with the same split options as the run"
            )
        models[seed] = load_seed(folder, backbone, list(variants), options.rivals)
    return repeat.evaluate(run, models, write=False)


def _options(values: Mapping[str, Any]) -> RunOptions:
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    plain["linear"] = TrainingOptions(**values["linear"])
    return RunOptions(**plain)


def _other_classes(
    run: Path, data: DataSet, trained: Mapping[str, list[str]], given: Mapping[str, list[str]]
) -> str:
    for name, classes in trained.items():
        found = given.get(name, [])
        if classes != found:
            missing, added = (sorted(set(a) - set(b))[:3] for a, b in ((classes, found), (found, classes)))
            return (
                f"'{run}' was trained with {len(classes)} {name} classes, '{data.name}' has {len(found)}, others "
                f"(only in the run: {missing or 'none'}; only in the data: {added or 'none'}). "
                "Evaluate it on the data it was trained for, or fit a new run."
            )
    return f"'{run}' was tested on {list(trained)}, not on {list(given)}; give the same targets or name a protocol"
