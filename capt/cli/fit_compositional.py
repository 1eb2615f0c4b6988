"""``capt fit msci`` and ``capt fit csp``: compositional zero-shot learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from capt.cli.common import Data, DataOptions, Model, ModelOptions, Spec, check_out
from capt.cli.fit import fit_models
from capt.methods.compositional.csp import CSPConfig
from capt.methods.compositional.run import CompositionalOptions, CompositionalRun
from capt.methods.msci_config import MSCIConfig

Options = Annotated[CompositionalOptions, tyro.conf.arg(name="")]


def fit_msci(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/msci"),
    options: Options = CompositionalOptions(),  # noqa: B008 - frozen
    config: Annotated[MSCIConfig, tyro.conf.arg(name="")] = MSCIConfig(),  # noqa: B008 - frozen
    rivals: tuple[Literal["csp"], ...] = ("csp",),
    csp: CSPConfig = CSPConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train MSCI on images of (state, object) pairs and test it on pairs seen and never seen, beside zero-shot and CSP.

    Args:
        data: emoji-pairs, a list with the columns path, state, object and split, or czsl:<name> with --root.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for trained models, logs and summary.
        options: seeds, closed and open world, feasibility.
        config: settings of the method.
        rivals: trained beside it for comparison; '--rivals' alone leaves CSP out.
        csp: settings of CSP; its profile is that of MSCI.
        json: print summary.json instead of a table.
    """
    # Rows of one table are measured in one way.
    beside = {"csp": replace(csp, profile=config.profile)} if rivals else {}
    models = {**beside, "msci": config}
    return fit_models(CompositionalRun, where.open_pairs(data), model, check_out(out), options, models, json)


def fit_csp(
    data: Spec,
    /,
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/csp"),
    options: Options = CompositionalOptions(),  # noqa: B008 - frozen
    config: Annotated[CSPConfig, tyro.conf.arg(name="")] = CSPConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train CSP on images of (state, object) pairs and test it on pairs seen and never seen, beside zero-shot.

    Args:
        data: emoji-pairs, a list with the columns path, state, object and split, or czsl:<name> with --root.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for trained models, logs and summary.
        options: seeds, closed and open world, feasibility.
        config: settings of the method.
        json: print summary.json instead of a table.
    """
    models = {"csp": config}
    return fit_models(CompositionalRun, where.open_pairs(data), model, check_out(out), options, models, json)
