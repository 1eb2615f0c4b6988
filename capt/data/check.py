"""What is there and what is missing below a folder of data sets in CoOp's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from capt.data.image_set import SPLITS, DataSet
from capt.data.readers.coop import LAYOUTS, absent_images, differences, layout_of, missing_parts, read_coop
from capt.errors import DataError

Status = Literal["ok", "missing", "incomplete", "different", "damaged"]


@dataclass(frozen=True)
class Finding:
    """State of one data set.

    Attributes:
        dataset: its name for ``coop:``.
        folder: where it was looked for, relative to the root.
        status: "ok"; "missing": no folder; "incomplete": files, folders or images are not there; "different": all
            there, but not the published counts; "damaged": a list cannot be read.
        problems: what is wrong, one sentence each.
        found: classes and images by split, if they could be counted.
        expected: the same of the published data set.
    """

    dataset: str
    folder: str
    status: Status
    problems: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Findings for every data set asked for."""

    root: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether every data set that is there is the published one, and at least one is there."""
        present = [finding for finding in self.findings if finding.status != "missing"]
        return bool(present) and all(finding.status == "ok" for finding in present)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """One line per data set, and one per problem below it."""
        width = max(len(finding.dataset) for finding in self.findings)
        lines = [f"data sets in '{self.root}'"]
        for finding in self.findings:
            counts = finding.found or finding.expected
            sizes = ", ".join(f"{number:,} {what}" for what, number in counts.items())
            which = "" if finding.found else "expected: "
            lines.append(f"{finding.dataset:{width}}  {finding.status:10}  {finding.folder}/  ({which}{sizes})")
            lines.extend(f"{'':{width}}  - {problem}" for problem in finding.problems)
        if any(finding.status in ("missing", "incomplete") for finding in self.findings):
            lines.append("docs/datasets.md describes the layout of each data set and where its files come from.")
        return "\n".join(lines)


def check(root: str | Path, dataset: str | Sequence[str] | None = None) -> CheckReport:
    """Compare a folder with CoOp's layout of the eleven data sets. Reads only.

    Args:
        root: folder that holds the data sets.
        dataset: one name or several; None checks all eleven.

    Raises:
        DataError: no such folder, or an unknown data set.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"'{root}': no such folder; expected the one that holds the data sets")
    names = list(LAYOUTS) if dataset is None else [dataset] if isinstance(dataset, str) else list(dataset)
    return CheckReport(str(root), [_finding(root, name) for name in names])


def _finding(root: Path, name: str) -> Finding:
    layout = layout_of(name)
    sizes = zip(SPLITS, layout.counts, strict=True)
    expected = {"classes": layout.classes, **{split: count for split, count in sizes if count is not None}}

    def finding(status: Status, problems: list[str], data: DataSet | None = None) -> Finding:
        return Finding(layout.name, layout.folder, status, problems, {} if data is None else _counts(data), expected)

    if not (root / layout.folder).is_dir():
        return finding("missing", [])
    missing = missing_parts(layout, root)
    if missing:
        return finding("incomplete", [f"no {part}" for part in missing])
    try:
        data = read_coop(layout.name, root=root, check_files=False, warn=False)
    except DataError as error:
        return finding("damaged", [str(error)])
    listed = {split: [(image, 0) for image in images.names] for split, images in data.splits().items()}
    absent = [] if layout.name == "imagenet" else absent_images(root / layout.folder, listed)
    if absent:
        return finding("incomplete", [f"{len(absent):,} listed images are not there, first {absent[0]!r}"], data)
    difference = differences(layout, data)
    return finding("different" if difference else "ok", difference, data)


def _counts(data: DataSet) -> dict[str, int]:
    return {"classes": len(data.classes), **{split: len(images) for split, images in data.splits().items()}}
