"""Measure the center bias of a model on synthetic position grids and write everything to a JSON file.

python scripts/center_bias.py embedded --out bias.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from capt.backbones import load
from capt.data.cutouts import drawn_shapes, emoji_cutouts, read_cutouts
from capt.data.position_grid import PositionGrid
from capt.evaluation.center_bias import CenterBiasResult, measure_center_bias, recognised_objects
from capt.files import write_json


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--objects", default="emoji", help="'emoji', 'shapes', or a folder of cut-outs")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--fill", type=float, default=0.8)
    parser.add_argument("--known-of", type=int, help="keep the N best recognised of so many objects")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--backgrounds", nargs="+", default=["grey", "noise"])
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", default=["single", "pair", "full"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    chosen = parser.parse_args()
    makers = {"emoji": emoji_cutouts, "shapes": drawn_shapes}
    make = makers.get(chosen.objects)
    n = chosen.known_of or chosen.n
    model, cutouts = load(chosen.model), make(n, seed=chosen.seed) if make else read_cutouts(chosen.objects)
    grid = PositionGrid.for_backbone(
        model, cutouts, cells=chosen.cells, fill=chosen.fill, placement=chosen.placement,
        backgrounds=chosen.backgrounds, replicates=chosen.replicates, seed=chosen.seed,
    )  # fmt: skip
    if chosen.known_of:
        grid = replace(grid, cutouts=recognised_objects(model, grid, chosen.n))
    result = measure_center_bias(model, grid, layouts=chosen.layouts)
    if chosen.out:
        write_json(chosen.out, result.record())
    show(result)


def show(result: CenterBiasResult) -> None:
    """Print the verdict, what it rests on, and the maps."""
    print(result.verdict)
    for warning in result.warnings:
        print("  but:", warning)
    for name, finding in result.findings.items():
        effect = finding.effect
        print(
            f"  {name}: {effect.estimate:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}], p {finding.p_adjusted:.4f}, "
            f"{finding.units} {finding.unit}s: {finding.verdict}"
        )
    record = result.record()
    for layout, maps in (
        ("single", ("accuracy_map", "lift_map")),
        ("pair", ("preference_map",)),
        ("full", ("auc_map",)),
    ):
        for name in maps if record[layout] else ():
            print(f"{layout} {name}:")
            table(record[layout][name])
    if record["pair"]:
        for kind, maps in record["pair"]["choice_maps"].items():
            print(f"pair {kind}:")
            table(maps)
    print(record["cost"])


def table(rows: Sequence[Sequence[float | None]]) -> None:
    """Print a map."""
    for row in rows:
        print("   " + " ".join("   .  " if value is None else f"{value:6.3f}" for value in row))


if __name__ == "__main__":
    main()
