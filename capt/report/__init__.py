"""Static HTML report of a run: a folder that opens from disk, without a network and without any script."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capt.errors import CaptError, MissingDependencyError
from capt.files import write_bytes, write_json
from capt.report import bias, compositional, content, multi_label
from capt.report.content import AnyData, data_of_run
from capt.report.summary import markdown_table, read_summary, table_rows, verdict

__all__ = [
    "data_of_run",
    "markdown_table",
    "read_summary",
    "table_rows",
    "verdict",
    "write_bias_report",
    "write_report",
]

_HERE = Path(__file__).parent
#: By protocol of the run, what gathers its report, and the page; every other protocol has those of ``content``.
_KINDS: dict[Any, tuple[Any, str]] = {
    "compositional": (compositional, "compositional.html"),
    "multi-label": (multi_label, "multi_label.html"),
}


def write_report(
    run: str | Path,
    *,
    data: AnyData | None = None,
    out: str | Path | None = None,
    n_pairs: int = 20,
    images_per_pair: int = 8,
) -> Path:
    """Write ``index.html``, ``data.json``, ``summary.csv``, ``confusions.csv`` and ``thumbs/``; of a compositional run
    also ``pairs.csv``, of a multi-label run ``classes.csv``.

    Args:
        run: folder of a finished run (``summary.json`` in it).
        data: the data set of the run; needed for the pictures of misclassified images.
        out: folder of the report, default ``<run>/report``.
        n_pairs: confusions shown at most.
        images_per_pair: images of each (of CAPT: for each direction of a pair) at most.

    Returns:
        Path of ``index.html``.

    Raises:
        DataError: no finished run there.
        DamagedFileError: a file of the run is not what was written.
        MissingDependencyError: jinja2 is not installed.
        CaptError: a number is negative.
    """
    for name, count in (("n_pairs (--pairs)", n_pairs), ("images_per_pair (--images)", images_per_pair)):
        if count < 0:
            raise CaptError(f"{name}: expected 0 or more, found {count}")
    run = Path(run)
    folder = Path(out) if out is not None else run / "report"
    kind, template = _KINDS.get(read_summary(run).get("protocol"), (content, "page.html"))
    shown = kind.gather(run, data, n_pairs=n_pairs, images_per_pair=images_per_pair, thumbs=folder / "thumbs")
    html = render(template, shown)
    write_json(folder / "data.json", shown)
    _write_csv(
        folder / "summary.csv",
        ["method", "seed", *(metric["key"] for metric in shown["metrics"])],
        ([row["key"], row["label"], *row["cells"]] for row in shown["rows"]),
    )
    methods = [method["key"] for method in shown["methods"]]
    _write_csv(
        folder / "confusions.csv",
        ["true", "predicted", *methods],
        ([c["true"], c["predicted"], *(c["counts"].get(m, "") for m in methods)] for c in shown["confusions"]),
    )
    for name, (header, rows) in kind.tables(shown).items():
        _write_csv(folder / name, header, rows)
    index = folder / "index.html"
    write_bytes(index, html)
    return index


def write_bias_report(run: str | Path) -> Path:
    """Write ``report/index.html`` and ``report/data.json`` of a folder made by ``capt bias``; returns the page's path.

    Raises:
        DataError: no ``bias.json`` there.
        DamagedFileError: it is not what was written.
        MissingDependencyError: jinja2 is not installed.
    """
    folder = Path(run) / "report"
    shown = bias.gather(Path(run))
    html = render("bias.html", shown)
    write_json(folder / "data.json", shown)
    write_bytes(folder / "index.html", html)
    return folder / "index.html"


def render(template: str, shown: Mapping[str, Any]) -> bytes:
    """A page that may load nothing but its own pictures and one style sheet, whatever the data contain; UTF-8.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "the HTML report", "report") from error
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page: str = environment.get_template(template).render(style=style, style_hash=style_hash, **shown)
    return page.encode("utf-8", "replace")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    def guarded(cell: Any) -> str:
        text = str(cell)
        return "'" + text if text[:1] in ("=", "+", "-", "@", "\t") else text  # spreadsheets would run it as a formula

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows([guarded(cell) for cell in row] for row in rows)
    write_bytes(path, text.getvalue().encode("utf-8", "replace"))
