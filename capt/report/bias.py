"""What the report of a center bias shows: maps over positions, curves by distance, stages, attention, mitigations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capt.errors import DamagedFileError
from capt.files import read_json
from capt.report.content import flatten

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "bias.json"
_CELL = 46
#: (section, layout, map, title, values are shares), in the order of the page.
_MAPS = (
    ("single", "accuracy_map", "A lone object is named, %", True),
    ("single", "lift_map", "Lift of its name's score, x 1000", False),
    ("pair", "preference_map", "Middle object's score above the other's, x 1000", False),
    ("full", "auc_map", "One of many: above absent names, %", True),
)
_STAGES = {
    "tokens": "a patch token", "values": "a patch value", "single": "one patch pooled", "mean": "mean of tokens",
    "even": "equal weights", "oracle": "object's patches pooled", "final": "feature",
}  # fmt: skip
_VIEWS = {
    "raw": "weights", "value_weighted": "times length of values", "without_sinks": "without sinks",
    "rollout": "rollout through all blocks",
}  # fmt: skip
_MARGINS = {"whole": "all heads", "ablated": "without those above", "others": "without as many others"}
_ROWS = 14


def read_bias(run: Path) -> dict[str, Any]:
    """``bias.json`` of a folder.

    Raises:
        DataError: there is none.
        DamagedFileError: it is not one of ours.
    """
    found = read_json(run / FILE)
    if not isinstance(found, dict) or found.get("schema") != 1 or not isinstance(found.get("model"), dict):
        raise DamagedFileError(f"'{run / FILE}': not written by 'capt bias'; run it again into another folder")
    return found


def words(found: Mapping[str, Any]) -> list[str]:
    """Verdict, diagnosis and outcome in sentences, of what was done so far."""
    sentences = []
    if measured := found.get("measure"):
        sentences.append(f"{found['model']['name']}: {measured['verdict']} (tests at {measured['level']:g}).")
        sentences += [f"Mind: {warning}." for warning in measured["warnings"]]
        for finding in measured["findings"].values():
            effect = finding["effect"]
            question = finding["question"]
            sentences.append(
                f"{question[0].upper()}{question[1:]} {finding['verdict']}: {finding['compared']} "
                f"{effect['estimate']:+.4f} [{effect['low']:+.4f}, {effect['high']:+.4f}] over "
                f"{finding['units']} {finding['unit']}s, p {finding['p_adjusted']:.3g}."
            )
    if check := found.get("preprocessing"):
        sentences.append(check["words"])
    if explained := found.get("explain"):
        sentences += [f"Diagnosis: {explained['diagnosis']}.", *explained["words"]]
    if mitigated := found.get("mitigate"):
        sentences += mitigated["words"]
    return sentences


def gather(run: Path) -> dict[str, Any]:
    """Everything the page shows, JSON-able."""
    found = read_bias(run)
    try:
        measured, explained, mitigated = (found.get(part) for part in ("measure", "explain", "mitigate"))
        return {
            "title": f"Center bias of {found['model']['name']}",
            "seeds": [str(found["model"]["seed"])],
            "verdict": words(found),
            "maps": _maps(measured) if measured else [],
            "distance": _distance(measured, mitigated),
            "stages": _stages(explained) if explained else None,
            "attention": _attention(explained) if explained and explained.get("attention") else None,
            "carriers": _carriers(explained) if explained and explained.get("concepts") else None,
            "pictures": found.get("pictures", []),
            "confounds": _confounds(found),
            "mitigations": _mitigations(mitigated) if mitigated else None,
            "record": flatten({k: v for k, v in found.items() if k in ("model", "asked", "took")}),
        }
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise DamagedFileError(f"'{run / FILE}': lacks {error!r}; run 'capt bias' again into another folder") from error


# ---- figures ---------------------------------------------------------------------------------------------------------


def _maps(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _map(title, measured[layout][name], share)
        for layout, name, title, share in _MAPS
        if measured.get(layout)
    ]  # fmt: skip


def _map(title: str, rows: Sequence[Sequence[float | None]], share: bool) -> dict[str, Any]:
    """Cells with their shade, 0 to 1 between the lowest and the highest value, and what is written in them."""
    values = [value for row in rows for value in row if value is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    cells = []
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            shade = 0.0 if value is None else 0.1 + 0.75 * (value - low) / (high - low or 1.0)
            text = "" if value is None else f"{100 * value:.0f}" if share else f"{1000 * value:.0f}"
            cells.append({"x": j * _CELL, "y": i * _CELL, "shade": round(shade, 3), "text": text})
    return {"title": title, "cell": _CELL, "side": _CELL * len(rows), "cells": cells}


def _distance(measured: Mapping[str, Any] | None, mitigated: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Naming accuracy of lone objects against distance; before and after where a mitigation was tested."""
    if mitigated:
        named = {f"{name} (held-out objects)": rings for name, rings in mitigated["curve"].items()}
    elif measured and measured.get("single"):
        named = {"lone objects named": measured["single"]["accuracy_rings"]}
    else:
        return None
    return curves(named)


def _stages(explained: Mapping[str, Any]) -> dict[str, Any]:
    named = {_STAGES[stage]: found["survival"] for stage, found in explained["stages"].items()}
    return {
        "curves": curves(named),
        "chance": [
            {"stage": _STAGES[stage], "survival": _percents(found["survival"]), "chance": _percents(found["chance"])}
            for stage, found in explained["stages"].items()
        ],
        "vanish": _percents(explained["vanish"]),
        "rings": [f"{ring['distance']:.2f}" for ring in explained["vanish"]],
        "aggregation_loss": [f"{ring['mean']:+.4f}" for ring in explained["aggregation_loss"]],
    }


def _percents(rings: Sequence[Mapping[str, float]]) -> list[str]:
    return [f"{100 * ring['mean']:.1f}" for ring in rings]


def curves(named: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Coordinates of shares (0 to 1) against distance from the middle, one line a name."""
    width, height, left, right, bottom = 900, 360, 46, 14, 42
    top = 12 + 18 * len(named)

    def x(distance: float) -> float:
        return float(round(left + (width - left - right) * distance, 1))

    def y(value: float) -> float:
        return float(round(height - bottom - (height - bottom - top) * value, 1))

    lines = [
        {
            "name": name, "series": number % 4, "dashed": number >= 4, "legend": 14 + 18 * number,
            "points": " ".join(f"{x(ring['distance'])},{y(ring['mean'])}" for ring in rings),
            "dots": [
                {"x": x(ring["distance"]), "y": y(ring["mean"]),
                 "label": f"{name}, distance {ring['distance']:.2f}: {100 * ring['mean']:.1f} %"}
                for ring in rings
            ],
        }
        for number, (name, rings) in enumerate(named.items())
    ]  # fmt: skip
    return {
        "width": width, "height": height, "left": left, "top": top, "right": width - right, "bottom": height - bottom,
        "lines": lines,
        "x_ticks": [{"at": x(value / 5), "label": f"{value / 5:.1f}"} for value in range(6)],
        "y_ticks": [{"at": y(value / 5), "label": str(20 * value)} for value in range(6)],
    }  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def _attention(explained: Mapping[str, Any]) -> dict[str, Any]:
    found, effects = explained["attention"], explained["direct_effects"]
    return {
        "kind": found["kind"],
        "layers": [f"{value:.2f}" for value in found["center_ratio_by_layer"]],
        "blank": f"{found['center_ratio_of_blank_pictures']:.2f}",
        "sinks": f"{100 * found['sink_mass']:.1f}",
        "rings": [f"{ring['distance']:.2f}" for ring in found["views"]["raw"]["object_gain"]],
        "views": [
            {"name": label, "cells": [
                f"{view['center_ratio']:.2f}", *(f"{ring['mean']:.2f}" for ring in view["object_gain"]),
            ]}
            for name, label in _VIEWS.items()
            if not isinstance(view := found["views"][name], str)
        ],
        "no_rollout": found["views"]["rollout"] if isinstance(found["views"]["rollout"], str) else "",
        "effects": effects if isinstance(effects, str) else "",
        "by_layer": [] if isinstance(effects, str) else [
            {"layer": number, "cells": [f"{1000 * value:+.1f}" for value in pair]}
            for number, pair in enumerate(zip(effects["by_layer_center"], effects["by_layer_off"], strict=True), 1)
        ],
    }  # fmt: skip


def _carriers(explained: Mapping[str, Any]) -> dict[str, Any]:
    """Concepts, blocks and heads that carry an object."""
    concepts, layers, heads = (explained[part] for part in ("concepts", "layers", "heads"))
    named = {_STAGES[stage]: found["present"] for stage, found in concepts["stages"].items()}
    return {
        "curves": curves(named),
        "dictionary": concepts["dictionary"], "most": concepts["most"], "objects": concepts["objects"],
        "penalty": f"{concepts['penalty']:g}",
        "stages": [
            {"name": _STAGES[stage], "cells": [
                _percent(found["center"]), _percent(found["off"]), _percent(found["not_shown"]),
                f"{found['concepts']:.1f}", f"{found['quality']:.2f}",
            ]}
            for stage, found in concepts["stages"].items()
        ],
        "examples": [
            {"name": f"{one['object']} {one['where']}",
             "cells": [", ".join(f"{name} {weight:.2f}" for name, weight in one["concepts"]) or "none"]}
            for one in concepts["examples"]
        ],
        "layers": [] if isinstance(layers, str) else [
            {"name": "before block 1" if number == 0 else f"block {number}", "cells": [_percent(x) for x in cells]}
            for number, cells in enumerate(zip(layers["center"], layers["off"], layers["chance"], strict=True))
        ],
        "best": "" if isinstance(layers, str) else layers["best"],
        "no_heads": heads if isinstance(heads, str) else "",
        "heads": [] if isinstance(heads, str) else [
            {"name": one["name"], "cells": [
                f"{one['slope']:+.2f}", f"{one['objects_falling']} of {one['objects']}", _percent(one["center"]),
                _percent(one["off"]), ", ".join(one["texts"]), _percent(one["explained"]),
            ]}
            for one in heads["location"]
        ],
        "area": "" if isinstance(heads, str) else _percent(heads["area"]),
        "margins": [] if isinstance(heads, str) else [
            {"name": label, "cells": [f"{margins['center']:+.4f}", f"{margins['off']:+.4f}"]}
            for name, label in _MARGINS.items()
            if (margins := heads["margins"][name])
        ],
    }  # fmt: skip


def _confounds(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows native, squash, pad of objects on wide pictures and of photographs."""
    rows = []
    if check := found.get("preprocessing"):
        for mode, one in check["preprocessing"].items():
            rows.append({
                "what": "objects on 4:3 pictures", "mode": mode, "seen": _percent(one["visible_off"]),
                "center": _percent(one["accuracy_center"]), "off": _percent(one["accuracy_off"]),
                "gap": _gap(one["gap"]),
            })  # fmt: skip
    if photographs := found.get("photographs"):
        for mode, one in photographs["preprocessing"].items():
            of = one["file_order"]
            rows.append({
                "what": f"{photographs['n']} photographs", "mode": mode, "seen": _percent(one["surviving_share"]),
                "center": _percent(of["center"]), "off": _percent(of["off"]), "gap": _gap(one["gap"]),
            })  # fmt: skip
    return rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _gap(gap: Mapping[str, float] | None) -> str:
    if gap is None or gap["estimate"] is None:
        return "-"
    return f"{100 * gap['estimate']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"


def _mitigations(mitigated: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("calibration_off", "calibration_clean", "held_out_off", "held_out_clean")
    best = (mitigated["best"] or {}).get("name")
    rows = [
        {
            "name": row["name"] + ("" if row["usable"] else " (score only)"), "best": row["name"] == best,
            "cells": [_percent(row[key]) for key in keys],
            "entropy": "-" if row["entropy"] is None else f"{row['entropy']:.2f}",
        }
        for row in mitigated["table"]
    ]  # fmt: skip
    return {
        "first": rows[:_ROWS],
        "rest": rows[_ROWS:],
        "controls": [
            {"name": one["name"], "off": _gap(one["off"]["gain"]), "clean": _gap(one["clean"]["gain"])}
            for one in mitigated["controls"]
        ],
        "regions": [
            {"name": one["name"], "off": _percent(one.get("off")), "clean": _percent(one.get("clean")),
             "distance": "" if "distance" not in one else f"{one['distance']:.3f}"}
            for one in mitigated["regions"]
        ],
    }  # fmt: skip


# ---- pictures --------------------------------------------------------------------------------------------------------


def overlay(picture: Image, values: np.ndarray[Any, Any], grid: tuple[int, int], side: int = 224) -> Image:
    """A picture with non-negative values of its patches [N] laid over it, the highest brightest."""
    from PIL import Image as image_module

    heat = np.asarray(values, np.float64).reshape(grid)
    span = heat.max() - heat.min()
    heat = (heat - heat.min()) / span if span > 1e-9 * abs(heat.max()) else np.full(grid, 0.5)
    mask = image_module.fromarray((190 * heat).astype(np.uint8)).resize((side, side), image_module.Resampling.NEAREST)
    colour = image_module.new("RGB", (side, side), (230, 90, 20))
    return image_module.composite(colour, picture.convert("RGB").resize((side, side)), mask)
