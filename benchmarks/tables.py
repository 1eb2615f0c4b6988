"""Tables and goals out of measured rows: for the terminal, the documentation and the GPU summary. No torch needed."""

from __future__ import annotations

import math
from typing import Any

#: No single shape of a goal may be slower than this, whatever the mean says.
LEAST_RATIO = 0.9


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per op, direction, rivals and goal: geometric mean of the ratios and whether it is met."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        for goal in row["goals"]:
            if goal["ratio"] is not None:
                key = (row["op"], row["direction"], tuple(goal["rivals"]), goal["goal"])
                groups.setdefault(key, []).append({**row, "ratio": goal["ratio"]})
    found = []
    for (op, direction, rivals, least), members in groups.items():
        ratios = [member["ratio"] for member in members]
        mean = geometric_mean(ratios)
        found.append(
            {
                "op": op,
                "direction": direction,
                "rivals": list(rivals),
                "shapes": list(dict.fromkeys(member["shape"] for member in members)),
                "dtypes": list(dict.fromkeys(member["dtype"] for member in members)),
                "rows": len(members),
                "geometric_mean": mean,
                "lowest": min(ratios),
                "goal": least,
                "met": mean >= least and min(ratios) >= LEAST_RATIO,
            }
        )
    return found


def speeds(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By op: geometric mean of the ratios against the best rival of each row, and how many rows that are."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["ratios"]:
            ratios.setdefault(row["op"], []).append(min(row["ratios"].values()))
    return {op: {"ratio": geometric_mean(found), "rows": len(found)} for op, found in sorted(ratios.items())}


def geometric_mean(values: list[float]) -> float:
    """To four digits."""
    return float(f"{math.exp(sum(map(math.log, values)) / len(values)):.4g}")


def markdown(header: list[str], lines: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text."""
    rule = ["---" if number < left else "---:" for number in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def direction_name(direction: str) -> str:
    """``both`` in words."""
    return "forward + backward" if direction == "both" else direction


def row_cells(row: dict[str, Any]) -> list[str]:
    """Cells of one row under ``ROW_HEADER``."""
    best = min(row["rivals_ms"], key=lambda name: row["rivals_ms"][name], default="")
    others = [f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items() if name != best]
    return [
        row["shape"],
        row["dtype"],
        direction_name(row["direction"]),
        number(row["ms"]),
        f"{number(row['ms_p20'])} to {number(row['ms_p80'])}",
        f"{number(row['rate'])} {row['unit']}" if "rate" in row else "-",
        f"{row['share_of_floor']:.0%} of {row['floor']}" if "share_of_floor" in row else "-",
        f"{row['ratios'][best]:.2f} ({best})" if best else "-",
        ", ".join(others) or "-",
        verdict(row["goals"]),
    ]


ROW_HEADER = ["shape", "dtype", "direction", "ms", "p20 to p80", "rate", "floor", "ratio (best rival)",
              "other ratios", "goal"]  # fmt: skip


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def verdict(row_goals: list[dict[str, Any]]) -> str:
    """Each goal of a row: least ratio, and the one that was reached if it was missed."""
    words = []
    for goal in row_goals:
        if goal["met"] is None:
            words.append(f"{goal['goal']:g}: not run")
        else:
            words.append(f"{goal['goal']:g}: met" if goal["met"] else f"{goal['goal']:g}: {goal['ratio']:.2f}")
    return ", ".join(words) or "-"


GOAL_HEADER = ["op", "direction", "shapes", "dtype", "against the best of", "ratio (geometric mean)", "lowest", "goal",
               "met"]  # fmt: skip


def goal_cells(goal: dict[str, Any]) -> list[str]:
    """Cells of one goal under ``GOAL_HEADER``."""
    return [
        goal["op"],
        direction_name(goal["direction"]),
        shape_range(goal["shapes"]),
        ", ".join(goal["dtypes"]),
        ", ".join(goal["rivals"]),
        f"{goal['geometric_mean']:.2f}",
        f"{goal['lowest']:.2f}",
        f"{goal['goal']:g}",
        "yes" if goal["met"] else "no",
    ]


def shape_range(shapes: list[str]) -> str:
    """All shapes if they are few, else the first and the last."""
    return "; ".join(shapes) if len(shapes) <= 2 else f"{shapes[0]} ... {shapes[-1]} ({len(shapes)})"


def rows_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    return markdown(ROW_HEADER, [row_cells(row) for row in rows], left=3)


def goals_table(found: list[dict[str, Any]]) -> str:
    """Markdown of all goals."""
    return markdown(GOAL_HEADER, [goal_cells(goal) for goal in found], left=5)


def plain(header: list[str], lines: list[list[str]]) -> list[str]:
    """The same cells as aligned text."""
    table = [header, *lines]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table]


def measured_on(machine: dict[str, Any]) -> str:
    """One sentence: commit, machine, versions."""
    commit = machine.get("commit")
    changed = " with local changes" if machine.get("changed") else ""
    level = machine.get("native", {}).get("cpu_level")
    place = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cpus']} cores"
    parts = [
        f"commit {commit}{changed}" if commit else "commit unknown",
        place,
        f"{machine['threads']} threads" + (f", kernels at {level}" if level else ""),
        f"torch {machine['torch']}",
        machine["date"],
    ]
    return "Measured: " + "; ".join(parts) + "."
