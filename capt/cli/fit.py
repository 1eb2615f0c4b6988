"""``capt fit capt``, ``capt fit`` of a base model, and ``capt demo``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from capt.methods.base.registry import base_type
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions
from capt.methods.runs.protocol import make_protocol
from capt.training import TrainingOptions

if TYPE_CHECKING:
    from capt.data import CompositionalSet, MultiLabelSet
    from capt.methods.base.model import BaseConfig
    from capt.methods.compositional.run import CompositionalOptions, CompositionalRun
    from capt.methods.multi_label.run import MultiLabelOptions, MultiLabelRun


@dataclass(frozen=True)
class ProtocolOptions:
    """What is trained on and what is tested."""

    protocol: Literal["base-to-novel", "few-shot", "cross-dataset", "domain-generalisation"] = "base-to-novel"
    """base-to-novel: train on half of the classes; the others train on all, and test on these, on other data sets, or
    on other pictures of the same classes."""
    targets: tuple[str, ...] = ()
    """Data sets to test on, for cross-dataset and domain-generalisation."""


Protocols = Annotated[ProtocolOptions, tyro.conf.OmitArgPrefixes]


def fit_capt(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/capt"),
    protocol: Protocols = ProtocolOptions(),
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = RunOptions(),  # noqa: B008 - frozen
    config: Annotated[CAPTConfig, tyro.conf.arg(name="")] = CAPTConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train CAPT on a few images a class and evaluate it beside zero-shot, its base model and simple adapters.

    Args:
        data: data set: emoji, a folder with one sub-folder a class, a CSV or JSONL list, coop:<name>, or shards.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for checkpoints, banks, metrics and summary.
        protocol: what is trained on and what is tested.
        options: shots, seeds, base model, and what to compare with.
        config: settings of the method.
        json: print summary.json instead of a table.
    """
    summary = _fit(data, model, where, check_out(out), protocol, options, config, quiet=json)
    show(summary, out, json)
    return 0


def __getattr__(name: str) -> Callable[..., int]:
    """``fit_coop`` and so on: one verb a base model, made when it is asked for."""
    if not name.startswith("fit_"):
        raise AttributeError(name)
    return _fit_base_verb(name.removeprefix("fit_").replace("_", "-"))


def _fit_base_verb(kind: str) -> Callable[..., int]:
    settings = base_type(kind).config_type

    def fit_base(
        data: Spec,
        /,
        model: Model = ModelOptions(),  # noqa: B008 - frozen
        where: Data = DataOptions(),  # noqa: B008 - frozen
        out: Path = Path(f"runs/{kind}"),
        protocol: Protocols = ProtocolOptions(),
        options: Annotated[RunOptions, tyro.conf.arg(name="")] = RunOptions(),  # noqa: B008 - frozen
        config: BaseConfig = settings(),  # noqa: B008 - frozen
        json: bool = False,
    ) -> int:
        """Train a base model on a few images a class and evaluate it beside zero-shot.

        Args:
            data: data set: emoji, a folder with one sub-folder a class, a CSV or JSONL list, coop:<name>, or shards.
            model: which CLIP model is used.
            where: where the data set lies.
            out: folder for checkpoints and summary; give it to 'capt fit capt --base' to correct this model.
            protocol: what is trained on and what is tested.
            options: shots and seeds; base model and rivals are not used here.
            config: settings of the model.
            json: print summary.json instead of a table.
        """
        chosen = replace(options, base=kind)
        summary = _fit(data, model, where, check_out(out), protocol, chosen, {}, config, quiet=json)
        show(summary, out, json)
        return 0

    # Options of the settings are written without a prefix, like those of CAPT.
    fit_base.__annotations__["config"] = Annotated[settings, tyro.conf.arg(name="")]
    return fit_base


# Learning rates and evidence: each training style was held out in turn (scripts/tune_demo.py, docs/results.md).
DEMO_CONFIG = CAPTConfig(hidden=256, views=0, training=TrainingOptions(lr=1e-4))
DEMO_OPTIONS = RunOptions(linear=TrainingOptions(lr=5e-4))
TOWERS = {"lite2": "embedded", "vit": "embedded-vit"}


def demo(out: Path = Path("runs/demo"), tower: Literal["lite2", "vit"] = "lite2", json: bool = False) -> int:
    """Run CAPT on the shipped emoji images with a shipped model: three seeds, a table and an HTML report.

    Needs no download and no GPU; takes a few minutes on two CPU cores.

    Args:
        out: folder for the run and its report.
        tower: image tower: the convolutional one, or the smaller vision transformer.
        json: print summary.json instead of a table.
    """
    from capt.report import data_of_run, write_report

    model = ModelOptions(TOWERS[tower])
    summary = _fit(
        "emoji", model, DataOptions(), check_out(out), ProtocolOptions(), DEMO_OPTIONS, DEMO_CONFIG, quiet=json
    )
    page = write_report(out, data=data_of_run(out))
    if json:
        print_json(summary)
    else:
        print_summary(summary)
        print(f"\nreport: {page}")
    return 0


def show(summary: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """The result of a run, for a person or for a program."""
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
        print(f"\nrun folder: {out}")


def fit_models(
    run_type: type[CompositionalRun] | type[MultiLabelRun],
    data: CompositionalSet | MultiLabelSet,
    model: ModelOptions,
    out: Path,
    options: CompositionalOptions | MultiLabelOptions,
    models: Mapping[str, Any],
    json: bool,
) -> int:
    """Train models side by side, settings by row name, open the test images once, and show the result."""
    backbone = model.open()
    with ProgressLine(quiet=json) as progress:
        run: Any = run_type(data, backbone, models, options, progress=progress)  # type: ignore[arg-type]
        # 'evaluate' and 'predict' open the model in the same way.
        trained = run.fit(out, opened_with={"model": model.model, "pretrained": model.pretrained})
        summary = run.evaluate(out, trained)
    show(summary, out, json)
    return 0


def _fit(
    data: str,
    model: ModelOptions,
    where: DataOptions,
    out: Path,
    protocol: ProtocolOptions,
    options: RunOptions,
    config: CAPTConfig | Mapping[str, CAPTConfig],
    base_config: BaseConfig | None = None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    targets = [where.open(target) for target in protocol.targets]
    chosen = make_protocol(protocol.protocol, where.open(data), targets)
    backbone = model.open()
    with ProgressLine(quiet) as progress:
        run = Run(chosen, backbone, config, options, base_config=base_config, progress=progress)
        models = run.fit(out)
        # How the model was opened is known here alone; 'evaluate' and 'predict' open it again in the same way.
        record = read_json(out / "run.json")
        write_json(out / "run.json", {**record, "opened_with": {"model": model.model, "pretrained": model.pretrained}})
        return run.evaluate(out, models)
