"""Everything a report shows, gathered from a run folder into one JSON-able value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from capt.errors import CaptError, DataError
from capt.files import read_json
from capt.report.summary import (
    CORRECTIONS,
    method_name,
    metric_help,
    metric_name,
    metrics_of,
    read_summary,
    table_rows,
    verdict,
)

if TYPE_CHECKING:
    from capt.bank import ConfusionBank
    from capt.data import CompositionalSet, DataSet, MultiLabelSet
    from capt.data.image_set import Images

AnyData: TypeAlias = "DataSet | CompositionalSet | MultiLabelSet"
NO_IMAGES = "No images: the data set of this run was not found (give it with --data)."
THUMBNAIL = 160  # pixels, longer side


def gather(run: Path, data: DataSet | None, *, n_pairs: int, images_per_pair: int, thumbs: Path) -> dict[str, Any]:
    """Read a run folder; writes thumbnails of misclassified training images into ``thumbs``.

    Args:
        run: folder of a finished run.
        data: the data set of the run, for the images; without it the report has none and says so.
        n_pairs: confusion pairs to show at most.
        images_per_pair: images per direction of a pair at most.
        thumbs: folder for the images.
    """
    summary = read_summary(run)
    record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    confusions = summary.get("top_confusions", [])[: 2 * n_pairs]
    pairs, notice = _pairs(run, summary, data, n_pairs, images_per_pair, thumbs)
    _add_counts(pairs, confusions)
    return {
        **results(summary),
        "figure": seed_figure(summary),
        "confusions": confusions,
        "pairs": pairs,
        "notice": notice,
        "record": flatten(record),
        "summary": summary,
    }


def tables(shown: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows of the files that only this kind of report has: none."""
    return {}


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What every report shows of a summary: title, verdict, and the rows of the table."""
    return {
        "title": f"{summary.get('dataset', 'data set')} with {summary.get('model', 'a CLIP model')}",
        "seeds": [str(seed) for seed in summary.get("seeds", [])],
        "verdict": verdict(summary),
        "metrics": [{"key": m, "name": metric_name(m), "help": metric_help(m)} for m in metrics_of(summary)],
        "methods": [{"key": m, "name": method_name(m)} for m in summary["methods"]],
        "rows": [
            {"method": method_name(row.method), "key": row.method, "label": row.label, "cells": list(row.cells)}
            for row in table_rows(summary)
        ],
    }


def seed_figure(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates of the dot plot: accuracy of every method, one dot a seed and a tick at the mean."""
    width, left, row_height, top = 640, 150, 26, 28
    shown = [metric for metric in metrics_of(summary) if metric not in CORRECTIONS]
    values = [
        record[m] for method in summary["methods"].values() for record in method["per_seed"].values() for m in shown
    ]
    low = max(0.0, (min(values) * 10 // 1) / 10)
    high = min(1.0, -((-max(values) * 10) // 1) / 10)
    high = high if high > low else low + 0.1

    def x(value: float) -> float:
        return float(round(left + (width - left - 20) * (value - low) / (high - low), 1))

    rows: list[dict[str, Any]] = []
    y = top + 14.0
    for metric in shown:
        for number, (method, results) in enumerate(summary["methods"].items()):
            rows.append(
                {
                    "y": y,
                    "metric": metric_name(metric) if number == 0 else "",
                    "method": method_name(method),
                    "series": number % 4,
                    "dots": [
                        {"x": x(record[metric]), "label": f"seed {seed}: {100 * record[metric]:.1f} %"}
                        for seed, record in results["per_seed"].items()
                    ],
                    "mean": x(results["mean"][metric]),
                    "value": f"{100 * results['mean'][metric]:.1f}",
                }
            )
            y += row_height
        y += row_height / 2
    steps = round((high - low) * 10)
    ticks = [{"x": x(low + i / 10), "label": f"{100 * low + 10 * i:.0f} %"} for i in range(steps + 1)]
    return {"width": width, "height": y + 4, "top": top, "ticks": ticks, "rows": rows}


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested record as (dotted key, text) lines; long lists are shortened to their length."""
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in flatten(item, f"{prefix}{key}.")]
    name = prefix.rstrip(".") or "value"
    if isinstance(value, list) and len(value) > 8:
        return [(name, f"{len(value)} entries")]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


# ---- confusion pairs with images ---------------------------------------------------------------------------------


def seed_folder(run: Path, seed: int | None = None) -> Path:
    """Folder of one seed of a run, by default of its lowest.

    Raises:
        DataError: the run has no such seed.
    """
    matches = ((re.fullmatch(r"seed-(\d+)", folder.name), folder) for folder in run.glob("seed-*"))
    numbered = {int(match[1]): folder for match, folder in matches if match}
    if not numbered:
        raise DataError(f"'{run}': no seed folder there; expected the folder of a run, the --out of 'capt fit'")
    chosen = min(numbered) if seed is None else seed
    if chosen not in numbered:
        known = ", ".join(map(str, sorted(numbered)))
        raise DataError(f"'{run}': holds the seeds {known}, not {seed}")
    return numbered[chosen]


def _pairs(
    run: Path,
    summary: Mapping[str, Any],
    data: DataSet | None,
    n_pairs: int,
    images_per_pair: int,
    thumbs: Path,
) -> tuple[list[dict[str, Any]], str]:
    """Cards of the most frequent unordered pairs in the bank of the first seed, and what is missing, if anything."""
    from capt.bank import ConfusionBank

    seed = seed_folder(run)
    if not (seed / "bank" / "bank.json").is_file():
        return [], "The run folder holds no confusion bank."
    bank = ConfusionBank.load(seed / "bank")
    cells: dict[tuple[int, int], list[int]] = {}
    for row, (label, prediction) in enumerate(zip(bank.labels.tolist(), bank.predictions.tolist(), strict=True)):
        cells.setdefault((label, prediction), []).append(row)
    together: dict[tuple[int, int], int] = {}
    for (label, prediction), rows in cells.items():
        pair = (min(label, prediction), max(label, prediction))
        together[pair] = together.get(pair, 0) + len(rows)
    notice = "" if data is not None else NO_IMAGES
    finder = ImageFinder(data.train, thumbs) if data is not None else None
    cards = []
    for first, second in sorted(together, key=lambda pair: (-together[pair], pair))[:n_pairs]:
        directions = []
        for label, prediction in ((first, second), (second, first)):
            rows = sorted(cells.get((label, prediction), []), key=lambda row: -float(bank.confidences[row]))
            directions.append(
                {
                    "true": bank.class_names[label],
                    "predicted": bank.class_names[prediction],
                    "in_bank": len(rows),
                    "images": [_image(bank, row, finder) for row in rows[:images_per_pair]],
                }
            )
        cards.append({"directions": directions, "in_bank": together[first, second]})
    if not cards:
        notice = f"The bank of {seed.name} is empty: the base model made no mistake on the training images."
    return cards, notice


def _image(bank: ConfusionBank, row: int, finder: ImageFinder | None) -> dict[str, Any]:
    sample_id = int(bank.sample_ids[row])
    return {
        "id": sample_id,
        "name": bank.names[row],
        "confidence": round(float(bank.confidences[row]), 4),
        "thumbnail": finder.thumbnail(sample_id) if finder is not None else None,
    }


def _add_counts(pairs: list[dict[str, Any]], confusions: list[dict[str, Any]]) -> None:
    counts = {(entry["true"], entry["predicted"]): entry["counts"] for entry in confusions}
    for pair in pairs:
        for direction in pair["directions"]:
            direction["on_test"] = counts.get((direction["true"], direction["predicted"]))


class ImageFinder:
    """Finds images by sample id and writes small copies of them."""

    def __init__(self, images: Images, folder: Path) -> None:
        self._images, self._folder = images, folder
        self._position = {int(sample_id): index for index, sample_id in enumerate(images.ids)}

    def thumbnail(self, sample_id: int) -> str | None:
        """File name of the thumbnail, None when the image is not in the data set or cannot be read."""
        from PIL import Image

        index = self._position.get(sample_id)
        if index is None:
            return None
        name = f"{sample_id}.webp"  # never a name that came with the data
        try:
            image = self._images.image(index).copy()
        except CaptError:
            return None
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        self._folder.mkdir(parents=True, exist_ok=True)
        image.save(self._folder / name, "WEBP", quality=80)
        return name


def add_images(entries: Sequence[dict[str, Any]], images: Images | None, limit: int, thumbs: Path) -> None:
    """Replace ``positions`` of images by names and thumbnails of the first ``limit``; by none without the images."""
    finder = None if images is None else ImageFinder(images, thumbs)
    for entry in entries:
        positions = entry.pop("positions")
        entry["images"] = [] if images is None or finder is None else [
            {"name": images.names[position], "thumbnail": finder.thumbnail(int(images.ids[position]))}
            for position in positions[:limit]
        ]  # fmt: skip


def data_of_run(run: Path, data: AnyData | None = None) -> AnyData | None:
    """The data set for a run's pictures: the one given, checked against the record, or the shipped one.

    Raises:
        DataError: the data set is not the one that the run was made on.
    """
    try:
        of_run = read_json(run / "run.json")
        record = of_run["data"]
    except (DataError, KeyError, TypeError):
        return data
    if data is None:
        from capt.data import load, load_compositional, load_multi_label

        shipped: dict[str, Callable[[str], AnyData]] = {
            "emoji": load, "emoji-pairs": load_compositional, "clipart": load_multi_label
        }  # fmt: skip
        if record.get("name") not in shipped:
            return None
        data = shipped[record["name"]](record["name"])
    data = _as_trained(data, of_run)
    found, expected = data.fingerprint(), record.get("fingerprint")
    if expected is not None and found != expected:
        raise DataError(
            f"data set '{data.name}': fingerprint {found[:12]}, but the run in '{run}' was made on "
            f"'{record.get('name')}' with fingerprint {expected[:12]}: give the data set of the run"
        )
    return data


def _as_trained(data: AnyData, record: Mapping[str, Any]) -> AnyData:
    """The data set with the validation images that a multi-label run held out, where it has none."""
    from capt.data import MultiLabelSet

    fraction = record.get("options", {}).get("val_fraction")
    if isinstance(data, MultiLabelSet) and data.val is None and fraction is not None:
        return data.hold_out(fraction)
    return data
