"""``capt ablate``: one command for the table of parts and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from capt.cli.common import Data, DataOptions, Model, ModelOptions, ProgressLine, Spec, check_out, print_json
from capt.cli.fit import ProtocolOptions, Protocols
from capt.methods.ablation import ablate as run_ablation
from capt.methods.ablation import as_markdown, chosen_variants, configurations
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions
from capt.methods.runs.protocol import make_protocol


def ablate(
    data: Spec,
    /,
    groups: tuple[str, ...] = (),
    variants: tuple[str, ...] = (),
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    out: Path = Path("runs/ablation"),
    protocol: Protocols = ProtocolOptions(),  # noqa: B008 - frozen
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = RunOptions(  # noqa: B008 - frozen
        rivals=("linear_adapter", "tip_adapter", "plain_adapter")
    ),
    config: Annotated[CAPTConfig, tyro.conf.arg(name="")] = CAPTConfig(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Train variants of CAPT side by side: with parts left out, and with controls that should do worse.

    Writes the table as CSV, Markdown, LaTeX and JSON, and its figure.

    Args:
        data: data set, as for 'capt fit capt'.
        groups: parts, ours, texts, retrieval, bank, adapter, losses; default: all.
        variants: single variants instead, or in addition.
        model: which CLIP model is used.
        where: where the data set lies.
        out: folder for the run and its table.
        protocol: what is trained on and what is tested.
        options: shots, seeds, base model, and what to compare with.
        config: settings of the full method, which the variants change.
        json: print ablation.json instead of the table.
    """
    check_out(out)
    names = chosen_variants(groups, variants)
    targets = [where.open(target) for target in protocol.targets]
    chosen = make_protocol(protocol.protocol, where.open(data), targets)
    with ProgressLine(json) as progress:
        run = Run(chosen, model.open(), configurations(config, names), options, progress=progress)
        table = run_ablation(run, out)
    if json:
        print_json(table)
    else:
        print(as_markdown(table))
        print(f"\ntables and figure: {out}")
    return 0
