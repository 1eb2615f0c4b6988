"""What is there and what is missing below a folder of data sets in CoOp's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from capt.data.image_set import SPLITS, DataSet
from capt.data.names import natural_key
from capt.data.readers.coop import absent_images, differences, missing_parts, read_coop
from capt.data.readers.coop_few_shot import read_coop_few_shot
from capt.data.readers.coop_layouts import LAYOUTS, layout_of
from capt.errors import DataError

Status = Literal["ok", "missing", "incomplete", "different", "damaged"]


@dataclass(frozen=True)
class Finding:
    """State of one data set.

    Attributes:
        dataset: its name for ``coop:``.
        folder: where it was looked for, relative to the root.
        status: "ok"; "missing": no folder; "incomplete": files, folders or images are not there; "different": all
            there, but not the published classes, counts or folders; "damaged": a list cannot be read.
        problems: what is wrong, one sentence each.
        found: classes and images by split, if they could be counted.
        expected: the same of the published data set.
        sha256: hash of every split file, or of classnames.txt.
        few_shot: CoOp's few-shot lists below ``split_fewshot`` that can be used: their hash, images by split, and how
            often they repeat an image.
    """

    dataset: str
    folder: str
    status: Status
    problems: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    few_shot: dict[str, dict[str, Any]] = field(default_factory=dict)


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
            lists = f", {len(finding.few_shot)} few-shot lists" if finding.few_shot else ""
            lines.append(f"{finding.dataset:{width}}  {finding.status:10}  {finding.folder}/  ({which}{sizes}{lists})")
            lines.extend(f"{'':{width}}  - {problem}" for problem in finding.problems)
        if any(finding.status in ("missing", "incomplete") for finding in self.findings):
            lines.append("docs/datasets.md describes the layout of each data set and where its files come from.")
        return "\n".join(lines)


def check(root: str | Path, dataset: str | Sequence[str] | None = None) -> CheckReport:
    """Compare a folder with CoOp's layout of the eleven data sets and the four variants of ImageNet. Reads only.

    Args:
        root: folder that holds the data sets.
        dataset: one name or several; None checks all fifteen.

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
        if data is None:
            return Finding(layout.name, layout.folder, status, problems, {}, expected)
        lists, unusable = _few_shot_lists(root / layout.folder / "split_fewshot", data)
        if unusable and status == "ok":
            status = "damaged"
        found, hashes = _counts(data), data.meta["sha256"]
        return Finding(layout.name, layout.folder, status, problems + unusable, found, expected, hashes, lists)

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
    absent = [] if layout.from_folders else absent_images(root / layout.folder, listed)
    difference = differences(layout, data)
    if absent:
        first = f"{len(absent):,} listed images are not there, first {absent[0]!r}"
        return finding("incomplete", [first, *difference], data)
    return finding("different" if difference else "ok", difference, data)


def _few_shot_lists(folder: Path, data: DataSet) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Usable lists by file name, and what is wrong with the others."""
    usable: dict[str, dict[str, Any]] = {}
    unusable = []
    for path in sorted(folder.glob("*.pkl"), key=lambda path: natural_key(path.name)):
        try:
            listed = read_coop_few_shot(path, data)
        except DataError as error:
            unusable.append(str(error))
            continue
        record = listed.meta["few_shot"]
        images = {split: len(getattr(listed, split)) for split in record["repeated"]}
        usable[path.name] = {"sha256": record["sha256"], "images": images, "repeated": record["repeated"]}
    return usable, unusable


def _counts(data: DataSet) -> dict[str, int]:
    return {"classes": len(data.classes), **{split: len(images) for split, images in data.splits().items()}}
