"""``capt evaluate``, ``capt predict`` and ``capt report``: what is done with a finished run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

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
from capt.errors import DataError
from capt.files import read_json
from capt.report.content import seed_folder


def evaluate(
    run: Folder,
    data: Spec,
    /,
    model: RunModel = RunModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    protocol: Literal["few-shot", "cross-dataset", "domain-generalisation"] | None = None,
    targets: tuple[str, ...] = (),
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
        json: print the summary as JSON.
    """
    from capt.methods import runs

    _require_run(run)
    data_set, backbone = where.open(data), model.open(run)
    with ProgressLine(quiet=json) as progress:
        others = [where.open(target) for target in targets]
        summary = runs.evaluate(run, data_set, backbone, targets=others, protocol=protocol, progress=progress)
    if json:
        print_json(summary)
    else:
        print_summary(summary)
    return 0


def predict(
    run: Folder,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")],
    /,
    classes: tuple[str, ...] | None = None,
    seed: int | None = None,
    model: RunModel = RunModelOptions(),  # noqa: B008 - frozen
    top: int = 5,
    json: bool = False,
) -> int:
    """Classify images with a finished run.

    Args:
        run: folder of the run.
        images: image files.
        classes: class names to choose from; default: all classes of the run, base and novel.
        seed: which seed's weights; default: the lowest.
        model: which CLIP model the run was made with.
        top: classes listed for an image.
        json: print the predictions as JSON.
    """
    from capt.methods.capt import CAPT

    _require_run(run)
    if not images:
        raise DataError("no images given: capt predict RUN IMAGE...")
    pictures = [open_image(path) for path in images]
    folder = seed_folder(run, seed)
    if not (folder / "state.json").is_file():
        raise DataError(f"'{folder}': no model of CAPT there; expected a finished run of 'capt fit capt'")
    classifier = CAPT.load(folder, model.open(run))
    recorded = read_json(run / "run.json")
    # The classes of the data set: both halves of base-to-novel, the trained ones otherwise.
    known = recorded["classes"].values()
    names = classes or [
        n for part in (known if recorded["protocol"] == "base-to-novel" else list(known)[:1]) for n in part
    ]
    predictions = classifier.predict(pictures, names, top=top)
    if json:
        print_json([{"image": str(path), **asdict(found)} for path, found in zip(images, predictions, strict=True)])
        return 0
    for path, found in zip(images, predictions, strict=True):
        ranked = zip(found.classes, found.probabilities, strict=True)
        print(f"{path}: " + " · ".join(f"{name} {100 * probability:.1f} %" for name, probability in ranked))
        print(f"    confusable with: {', '.join(found.confusable_with)}; zero-shot says {found.base_class}")
    return 0


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
    """Write the HTML report of a run: result table, top confusions, misclassified images.

    Args:
        run: folder of the run.
        data: the data set of the run, for its images; not needed when that was the shipped one.
        where: where the data set lies.
        out: folder of the report; default: RUN/report.
        pairs: confusion pairs shown.
        images: images shown per direction of a pair.
        markdown: print the result table as Markdown and write nothing.
    """
    from capt import report as pages

    _require_run(run)
    if markdown:
        print(pages.markdown_table(pages.read_summary(run)))
        return 0
    data_set = pages.data_of_run(run, where.open(data) if data is not None else None)
    print(pages.write_report(run, data=data_set, out=out, n_pairs=pairs, images_per_pair=images))
    return 0


def _require_run(run: Path) -> None:
    if not run.is_dir():
        raise DataError(f"'{run}': no such folder; expected the folder of a run, the --out of 'capt fit'")
