"""``capt evaluate``, ``capt predict`` and ``capt report``: what is done with a finished run of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from capt.cli.common import (
    Data,
    DataOptions,
    Folder,
    ProgressLine,
    RunModel,
    RunModelOptions,
    Spec,
    open_image,
    print_json,
    print_summary,
)
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import read_json
from capt.report.content import AnyData, seed_folder

if TYPE_CHECKING:
    from PIL.Image import Image

World = Literal["closed", "open"]
Kind = Literal["single-label", "compositional", "multi-label"]
#: Options that runs of some kinds alone have, by verb.
_OPTIONS: dict[str, dict[str, tuple[Kind, ...]]] = {
    "evaluate": {
        "protocol": ("single-label",),
        "targets": ("single-label",),
        "worlds": ("compositional",),
        "threshold": ("compositional",),
    },
    "predict": {
        "classes": ("single-label",),
        "world": ("compositional",),
        "method": ("compositional", "multi-label"),
        "threshold": ("multi-label",),
    },
}


def evaluate(
    run: Folder,
    data: Spec,
    /,
    model: RunModel = RunModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    protocol: Literal["few-shot", "cross-dataset", "domain-generalisation"] | None = None,
    targets: tuple[str, ...] = (),
    worlds: tuple[World, ...] = (),
    threshold: float | None = None,
    json: bool = False,
) -> int:
    """Evaluate every seed of a finished run on a test split; the run's record counts how often this was done.

    Args:
        run: folder of the run.
        data: the data set of the run.
        model: which CLIP model the run was made with.
        where: where the data sets lie.
        protocol: score a run that was trained on all classes under another protocol than its own.
        targets: further data sets, for cross-dataset and domain-generalisation.
        worlds: compositional runs: candidate pairs, closed, open or both; default: as in the run.
        threshold: compositional runs: feasibility below which an unseen pair of the open world is dropped.
        json: print the summary as JSON.
    """
    kind = _kind(_record(run))
    _refuse("evaluate", kind, protocol=protocol, targets=targets, worlds=worlds, threshold=threshold)
    if kind == "compositional":
        summary = _evaluate_pairs(run, data, model, where, worlds, threshold, quiet=json)
    elif kind == "multi-label":
        from capt.methods.multi_label.run import evaluate as evaluate_labels

        labelled, backbone = where.open_labels(data), model.open(run)
        with ProgressLine(quiet=json) as progress:
            summary = evaluate_labels(run, labelled, backbone, progress=progress)
    else:
        from capt.methods import runs

        data_set, backbone = where.open(data), model.open(run)
        with ProgressLine(quiet=json) as progress:
            others = [where.open(target) for target in targets]
            summary = runs.evaluate(run, data_set, backbone, targets=others, protocol=protocol, progress=progress)
    if json:
        print_json(summary)
    else:
        print_summary(summary)
    return 0


def _evaluate_pairs(
    run: Path,
    data: str,
    model: RunModelOptions,
    where: DataOptions,
    worlds: tuple[World, ...],
    threshold: float | None,
    quiet: bool,
) -> dict[str, Any]:
    from capt.methods.compositional.run import evaluate as evaluate_run
    from capt.methods.compositional.run import options_from_dict

    options = options_from_dict(read_json(run / "run.json")["options"])
    chosen = worlds or options.worlds
    recorded = options.threshold if "open" in chosen else None
    options = replace(options, worlds=chosen, threshold=recorded if threshold is None else threshold)
    data_set, backbone = where.open_pairs(data), model.open(run)
    with ProgressLine(quiet) as progress:
        return evaluate_run(run, data_set, backbone, options=options, progress=progress)


def predict(
    run: Folder,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")],
    /,
    classes: tuple[str, ...] | None = None,
    seed: int | None = None,
    model: RunModel = RunModelOptions(),  # noqa: B008 - frozen
    top: int = 5,
    world: World | None = None,
    method: str | None = None,
    threshold: float | None = None,
    json: bool = False,
) -> int:
    """Classify images with a finished run: a class; pair, state and object; or any number of labels.

    Args:
        run: folder of the run.
        images: image files.
        classes: class names to choose from; default: all classes of the run, base and novel.
        seed: which seed's weights; default: the lowest.
        model: which CLIP model the run was made with.
        top: classes listed for an image; of a compositional run pairs, states and objects each; of a multi-label run
            labels at least, predicted or not.
        world: compositional runs: choose among the pairs of the run's data (closed, the default) or all (open).
        method: compositional and multi-label runs: which of the run's models, such as csp or linear_bce; default: its
            last, MSCI or CPRFL.
        threshold: multi-label runs: least probability of a predicted label, in place of each class's own.
        json: print the predictions as JSON.
    """
    record = _record(run)
    kind = _kind(record)
    if not images:
        raise DataError("no images given: capt predict RUN IMAGE...")
    _refuse("predict", kind, classes=classes, world=world, method=method, threshold=threshold)
    pictures = [open_image(path) for path in images]
    folder = seed_folder(run, seed)
    if kind == "compositional":
        return _predict_pairs(run, folder, images, pictures, model, world or "closed", method, top, json)
    if kind == "multi-label":
        return _predict_labels(run, folder, images, pictures, model, method, top, threshold, json)
    from capt.methods.capt import CAPT

    if not (folder / "state.json").is_file():
        raise DataError(f"'{folder}': no model of CAPT there; expected a finished run of 'capt fit capt'")
    classifier = CAPT.load(folder, model.open(run))
    # The classes of the data set: both halves of base-to-novel, the trained ones otherwise.
    known = record["classes"].values()
    names = classes or [
        n for part in (known if record["protocol"] == "base-to-novel" else list(known)[:1]) for n in part
    ]
    predictions = classifier.predict(pictures, names, top=top)
    if json:
        print_json([{"image": str(path), **asdict(found)} for path, found in zip(images, predictions, strict=True)])
        return 0
    for path, found in zip(images, predictions, strict=True):
        ranked = zip(found.classes, found.probabilities, strict=True)
        print(f"{path}: " + " · ".join(f"{name} {_percent(probability)}" for name, probability in ranked))
        print(f"    confusable with: {', '.join(found.confusable_with)}; zero-shot says {found.base_class}")
    return 0


def _predict_pairs(
    run: Path,
    folder: Path,
    images: Sequence[Path],
    pictures: Sequence[Image],
    model: RunModelOptions,
    world: World,
    method: str | None,
    top: int,
    json: bool,
) -> int:
    from capt.methods.compositional import prediction
    from capt.methods.compositional.registry import load_model

    name = _method(_record(run), method)
    trained = load_model(folder / name, model.open(run))
    seed = int(folder.name.removeprefix("seed-"))
    space = prediction.candidates(run, trained, world, seed=seed, method=name)
    found = prediction.predict(trained, pictures, space, top=top)
    if json:
        print_json([{"image": str(path), **asdict(one)} for path, one in zip(images, found, strict=True)])
        return 0
    for path, one in zip(images, found, strict=True):
        pairs = (f"{p.state} {p.object}{'' if p.seen else ' (unseen)'} {_percent(p.probability)}" for p in one.pairs)
        print(f"{path}: " + " · ".join(pairs))
        for kind, ranked in (("state", one.states), ("object", one.objects)):
            print(f"    {kind}: " + " · ".join(f"{r.name} {_percent(r.probability)}" for r in ranked))
    return 0


def _predict_labels(
    run: Path,
    folder: Path,
    images: Sequence[Path],
    pictures: Sequence[Image],
    model: RunModelOptions,
    method: str | None,
    top: int,
    threshold: float | None,
    json: bool,
) -> int:
    from capt.methods.multi_label import prediction
    from capt.methods.multi_label.registry import load_model
    from capt.methods.multi_label.run import options_from_dict, picture_transform

    record = _record(run)
    trained = load_model(folder / _method(record, method), model.open(run))
    transform = picture_transform(trained.backbone, options_from_dict(record["options"]).resize)
    found = prediction.predict(trained, pictures, transform, top=top, threshold=threshold)
    if json:
        print_json(
            [{"image": str(path), "labels": [asdict(label) for label in labels]}
             for path, labels in zip(images, found, strict=True)]
        )  # fmt: skip
        return 0
    for path, labels in zip(images, found, strict=True):
        shown = (f"{label.name} {_percent(label.probability)}" for label in labels if label.predicted)
        print(f"{path}: " + (" · ".join(shown) or "no label"))
        below = [
            f"{label.name} {_percent(label.probability)} (of {_percent(label.threshold)})"
            for label in labels if not label.predicted
        ]  # fmt: skip
        if below:
            print("    below their thresholds: " + " · ".join(below))
    return 0


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def report(
    run: Folder,
    /,
    data: str | None = None,
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path | None = None,
    pairs: int = 20,
    images: int = 8,
    markdown: bool = False,
) -> int:
    """Write the HTML report of a run: result table, figures, top confusions, misclassified images.

    Args:
        run: folder of the run.
        data: the data set of the run, for its images; not needed when that was a shipped one.
        where: where the data set lies.
        out: folder of the report; default: RUN/report.
        pairs: confusions shown.
        images: images shown of each confusion.
        markdown: print the result table as Markdown and write nothing.
    """
    from capt import report as pages

    _folder(run)
    if (run / "bias.json").is_file():
        print(pages.write_bias_report(run))
        return 0
    summary = pages.read_summary(run)
    if markdown:
        print(pages.markdown_table(summary))
        return 0
    read: dict[Kind, Callable[[str], AnyData]] = {
        "single-label": where.open, "compositional": where.open_pairs, "multi-label": where.open_labels
    }  # fmt: skip
    data_set = pages.data_of_run(run, None if data is None else read[_kind(summary)](data))
    print(pages.write_report(run, data=data_set, out=out, n_pairs=pairs, images_per_pair=images))
    return 0


# ---- runs ----------------------------------------------------------------------------------------------------------


def _folder(run: Path) -> Path:
    if not run.is_dir():
        raise DataError(f"'{run}': no such folder; expected the folder of a run, the --out of 'capt fit'")
    return run


def _record(run: Path) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Raises:
        DataError: there is no such folder, or it is not that of a run.
        DamagedFileError: the file is no record.
    """
    file = _folder(run) / "run.json"
    if not file.is_file():
        raise DataError(f"'{run}': no run.json there; expected the folder of a run, the --out of 'capt fit'")
    record = read_json(file)
    if not isinstance(record, dict) or (_kind(record) != "single-label" and not {"models", "options"} <= record.keys()):
        raise DamagedFileError(f"'{file}': not the record of a run; fit it again")
    return record


def _kind(record: Mapping[str, Any]) -> Kind:
    """What a run is about, by its record or its summary."""
    others: tuple[Kind, ...] = ("compositional", "multi-label")
    return next((kind for kind in others if kind == record.get("protocol")), "single-label")


def _method(record: Mapping[str, Any], method: str | None) -> str:
    """Row name of the model that predicts: the one asked for, or the last that the run's record lists."""
    names = list(record["models"])
    if method is not None and method not in names:
        raise DataError(f"--method {method}: the run holds {', '.join(names)}")
    return method or names[-1]


def _refuse(verb: str, kind: Kind, **options: Any) -> None:
    """Raise if an option was given that this kind of run does not have."""
    for name, value in options.items():
        if value not in (None, ()) and kind not in _OPTIONS[verb][name]:
            raise CaptError(f"--{name}: 'capt {verb}' of a {kind} run does not take it; leave it out")
