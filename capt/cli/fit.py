"""``capt fit capt`` and ``capt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from capt.cli.common import (
    Data,
    DataOptions,
    Model,
    ModelOptions,
    ProgressLine,
    Spec,
    check_out,
    print_json,
    print_summary,
)
from capt.files import read_json, write_json
from capt.methods.base_to_novel import BaseToNovelOptions, BaseToNovelRun
from capt.methods.capt import CAPTConfig
from capt.training import TrainingOptions


def fit_capt(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/capt"),
    options: Annotated[BaseToNovelOptions, tyro.conf.arg(name="")] = BaseToNovelOptions(),  # noqa: B008 - frozen
    config: Annotated[CAPTConfig, tyro.conf.arg(name="")] = CAPTConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train CAPT on a few images of the base classes and evaluate it beside zero-shot and a linear adapter.

    Args:
        data: data set: emoji, a folder with one sub-folder a class, a CSV or JSONL list, coop:<name>, or shards.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for checkpoints, banks, metrics and summary.
        options: shots, seeds, and the linear adapter to compare with.
        config: settings of the method.
        json: print summary.json instead of a table.
    """
    summary = _fit(data, model, where, check_out(out), options, config, quiet=json)
    if json:
        print_json(summary)
    else:
        print_summary(summary)
        print(f"\nrun folder: {out}")
    return 0


# Learning rates and evidence: each training style was held out in turn (scripts/tune_demo.py, docs/results.md).
DEMO_CONFIG = CAPTConfig(hidden=256, views=0, training=TrainingOptions(lr=1e-4))
DEMO_OPTIONS = BaseToNovelOptions(linear=TrainingOptions(lr=5e-4))


def demo(out: Path = Path("runs/demo"), json: bool = False) -> int:
    """Run CAPT on the shipped emoji images with the shipped model: three seeds, a table and an HTML report.

    Needs no download and no GPU; takes a few minutes on two CPU cores.

    Args:
        out: folder for the run and its report.
        json: print summary.json instead of a table.
    """
    from capt.report import data_of_run, write_report

    summary = _fit("emoji", ModelOptions(), DataOptions(), check_out(out), DEMO_OPTIONS, DEMO_CONFIG, quiet=json)
    page = write_report(out, data=data_of_run(out))
    if json:
        print_json(summary)
    else:
        print_summary(summary)
        print(f"\nreport: {page}")
    return 0


def _fit(
    data: str,
    model: ModelOptions,
    where: DataOptions,
    out: Path,
    options: BaseToNovelOptions,
    config: CAPTConfig,
    *,
    quiet: bool,
) -> dict[str, Any]:
    data_set, backbone = where.open(data), model.open()
    with ProgressLine(quiet) as progress:
        summary = BaseToNovelRun(data_set, backbone, config, options, progress=progress).fit(out)
    # How the model was opened is known here alone; 'evaluate' and 'predict' open it again in the same way.
    record = read_json(out / "run.json")
    write_json(out / "run.json", {**record, "opened_with": {"model": model.model, "pretrained": model.pretrained}})
    return summary
