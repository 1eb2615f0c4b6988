"""What several verbs share: options with one meaning everywhere, opening models and data, printing."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from capt.errors import CaptError, DataError
from capt.files import read_json

MITIGATED = "bias:"

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from capt.backbones import Backbone
    from capt.data import CompositionalSet, DataSet, MultiLabelSet


@dataclass(frozen=True)
class ModelOptions:
    """Which CLIP model is used."""

    model: str = "embedded"
    """'embedded' or 'embedded-vit' (shipped), an open_clip model name, hf:FOLDER for a transformers CLIP or SigLIP, or
    bias:RUN for the model that 'capt bias mitigate' changed."""
    pretrained: str | None = None
    """open_clip weights: a tag or a checkpoint file; without it an open_clip model has random weights."""
    device: str | None = None
    """Such as cpu or cuda; default: a GPU where torch sees one."""

    def open(self) -> Backbone:
        """The wrapped, frozen model."""
        import torch

        from capt.backbones import load

        if self.model.startswith(MITIGATED):
            return self._open_mitigated(Path(self.model.removeprefix(MITIGATED)))
        return load(self.model, self.pretrained, device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _open_mitigated(self, run: Path) -> Backbone:
        """The model that a mitigation was made for, with its change."""
        from capt.methods.bias.members import load_member, read_stored

        opened = read_stored(run).get("opened_with")
        if not isinstance(opened, dict) or not isinstance(opened.get("model"), str):
            raise CaptError(f"--model {self.model}: its record does not say how the model was opened")
        if opened["model"].startswith(MITIGATED):
            raise CaptError(f"--model {self.model}: made for a changed model; run 'capt bias mitigate' on a plain one")
        plain = ModelOptions(opened["model"], self.pretrained or opened.get("pretrained"), self.device).open()
        return load_member(run, plain)


@dataclass(frozen=True)
class RunModelOptions:
    """Which CLIP model the run was made with."""

    model: str | None = None
    """Default: the one that the run's record names."""
    pretrained: str | None = None
    """Needed when the weights have been moved since."""

    def open(self, run: Path) -> Backbone:
        """The backbone of a run; its fingerprint is compared when the trained weights are loaded."""
        if self.model is not None:
            return ModelOptions(self.model, self.pretrained).open()
        recorded = read_json(run / "run.json").get("opened_with", {})
        if "model" not in recorded:
            raise CaptError(f"'{run}': its record does not say how the model was opened; give --model and --pretrained")
        return ModelOptions(recorded["model"], self.pretrained or recorded.get("pretrained")).open()


@dataclass(frozen=True)
class DataOptions:
    """Where a data set lies."""

    root: Path | None = None
    """'coop:' and 'czsl:' data sets, 'coco-lt', 'voc-lt': the folder that holds them; a list of images: where its paths
    start."""
    test_fraction: float | None = None
    """Data without a test split: hold out this part of every class, chosen by hash, as test images."""
    split_seed: int = 0
    """Seed of that choice."""

    def open(self, spec: str) -> DataSet:
        """Read the data set ``spec``."""
        from capt.data import load

        return load(spec, root=self.root, test_fraction=self.test_fraction, split_seed=self.split_seed)

    def open_pairs(self, spec: str, **options: Any) -> CompositionalSet:
        """Read the compositional data set ``spec``; ``options``: of its reader."""
        from capt.data import load_compositional

        if self.test_fraction is not None:
            raise DataError(f"--test-fraction: '{spec}' is compositional and has its splits; leave the option out")
        return load_compositional(spec, self.root, **options)

    def open_labels(self, spec: str, **options: Any) -> MultiLabelSet:
        """Read the multi-label data set ``spec``; ``options``: of its reader."""
        from capt.data import load_multi_label

        if self.test_fraction is not None:
            raise DataError(f"--test-fraction: '{spec}' is a multi-label set; its test images are those it lists")
        return load_multi_label(spec, self.root, **options)


Spec: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Folder: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
# Options of these groups are written without the group's name: --model, not --model-options.model.
Model: TypeAlias = Annotated[ModelOptions, tyro.conf.OmitArgPrefixes]
RunModel: TypeAlias = Annotated[RunModelOptions, tyro.conf.OmitArgPrefixes]
Data: TypeAlias = Annotated[DataOptions, tyro.conf.OmitArgPrefixes]


def print_json(value: Any) -> None:
    """One JSON value on stdout, for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_summary(summary: Mapping[str, Any]) -> None:
    """The result table and the verdict on the terminal."""
    from capt.report.summary import method_name, metric_name, metrics_of, table_rows, verdict

    # Names come from data, so no markup. The table needs less than 80 columns.
    console = Console(markup=False, highlight=False)
    table = Table(
        title=f"{summary.get('dataset', '')}, {summary.get('model', '')}: percent",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Method", no_wrap=True)
    table.add_column("Seed")
    for metric in metrics_of(summary):
        table.add_column(metric_name(metric), justify="right")
    previous = None
    for row in table_rows(summary, spread="below"):
        if previous not in (None, row.method):
            table.add_section()
        name = method_name(row.method) if row.method != previous else ""
        table.add_row(name, row.label, *row.cells, style="bold" if row.label == "mean" else None)
        previous = row.method
    console.print(table)
    for sentence in verdict(summary):
        console.print(sentence, soft_wrap=not console.is_terminal)


def print_rows(header: list[str], rows: list[list[Any]]) -> None:
    """A plain table on the terminal; numbers to the right."""
    table = Table()
    for position, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)


class ProgressLine:
    """What is being done and how far it is, on stderr: a bar on a terminal, a line for each step elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True, markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._lines = not quiet and not console.is_terminal
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``what`` may carry a changing part after a comma, such as the loss."""
        step = what.split(",")[0]
        if step not in self._tasks:
            self._tasks[step] = self._bar.add_task(what, total=total)
            if self._lines:
                print(f"{step} ...", file=sys.stderr, flush=True)
        self._bar.update(self._tasks[step], completed=done, description=what)


def check_out(out: Path) -> Path:
    """Refuse an output path that is a file or cannot be written, before hours are spent."""
    if out.exists() and not out.is_dir():
        raise CaptError(f"--out {out}: a file is there; give the name of a folder")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CaptError(f"--out {out}: '{there}' cannot be written; give another folder")
    return out


def open_image(path: Path) -> Image:
    """Decode one image file given on the command line."""
    from capt.data.decode import decode_image

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"image '{path}': cannot be read ({error.strerror or error})") from error
    return decode_image(content, str(path))
