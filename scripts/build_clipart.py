"""Build the shipped long-tailed multi-label set: public-domain clip art with what it shows.

    python scripts/build_clipart.py --work build/model-work           # writes capt/assets/clipart
    python scripts/build_clipart.py --work build/model-work --sheets build/sheets    # and a contact sheet a class

Needs `apt-get` (Debian package `openclipart-svg`) and `pip install resvg_py==0.5.0 pillow`. Two runs with the same
versions write the same bytes. What the pictures show is found by `scripts/data/clipart_categories.txt` in their titles,
file names, keywords and folders. Pictures that are the same to the pixel are one picture with all their labels. Those
that look nearly the same stay on one side of the split. The split is chosen by hash, class by class from the rarest to
the most frequent; test images are first taken among the pictures that the embedded models were not fitted on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import clip_art
import numpy as np
from build_emoji import write_tar
from emoji_sources import SCRIPTS
from model.leak import phrase
from PIL import Image, ImageDraw

SIZE, MARGIN = 192, 10
QUALITY = 80
SEED = 0
TEST, VAL = 0.28, 0.10
MIN_TEST, MIN_TRAIN = 5, 3
MAX_SVG = 1_500_000
LEFT_OUT = ("shapes/stars", "computer/icons", "special/gradients")
SERIES = 3  # a title that this many differently named files of one author share does not say what a picture shows
ALIKE = 0.88
CATEGORIES = SCRIPTS / "data" / "clipart_categories.txt"
ASSETS = SCRIPTS.parent / "capt" / "assets"


@dataclass(frozen=True)
class Category:
    """One line of the list: the name, what finds it, what rules it out, and the classes it implies."""

    name: str
    terms: tuple[str, ...]
    folders: tuple[str, ...]
    not_terms: tuple[str, ...]
    not_folders: tuple[str, ...]
    implied: tuple[str, ...]

    def shows(self, path: str, texts: list[str], keywords: set[str]) -> bool:
        """Whether a picture belongs to it, before what others imply."""

        def found(terms: tuple[str, ...], folders: tuple[str, ...]) -> bool:
            return path.startswith(folders) or any(
                term in keywords or any(f" {term} " in text for text in texts) for term in terms
            )

        return found(self.terms, self.folders) and not found(self.not_terms, self.not_folders)


@dataclass
class Picture:
    """One picture, possibly filed in several places."""

    data: bytes
    paths: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    labels: set[int] = field(default_factory=set)
    group: int = 0
    split: str = ""

    @property
    def key(self) -> str:
        """Name of the picture in its tar: its first place, without dots."""
        return re.sub(r"\.svgz?$", "", self.paths[0]).replace(".", "_")

    @cached_property
    def steps(self) -> np.ndarray:
        """512 bits: where brightness rises, and where it falls, between neighbours in a 17 x 16 grey copy."""
        image = Image.open(io.BytesIO(self.data)).convert("L").resize((17, 16), Image.Resampling.BOX)
        change = np.diff(np.asarray(image, np.int16), axis=1).ravel()
        return np.concatenate([change > 3, change < -3])


def read_categories(path: Path = CATEGORIES) -> tuple[list[Category], dict[str, set[str]]]:
    """The categories, sorted by name, and those that are taken from files by the beginning of a name or path."""
    categories: list[Category] = []
    taken: dict[str, set[str]] = {}
    section = ""
    for line in filter(None, (line.partition("#")[0].strip() for line in path.read_text().splitlines())):
        if line.startswith("["):
            section = line.strip("[]")
            continue
        name, _, rest = line.partition(":")
        if section == "not":
            taken[name] = {other.strip() for other in rest.split(",")}
            continue
        found, _, implied = rest.partition(">")
        parts = [part.strip() for part in found.split(",") if part.strip()]
        plus, minus = ([p.removeprefix("-") for p in parts if p.startswith("-") == out] for out in (False, True))
        categories.append(
            Category(
                name.strip(),
                tuple(p for p in plus if p[0] != "/"),
                tuple(p[1:] for p in plus if p[0] == "/"),
                tuple(p for p in minus if p[0] != "/"),
                tuple(p[1:] for p in minus if p[0] == "/"),
                tuple(p.strip() for p in implied.split(",") if p.strip()),
            )
        )
    names = {category.name for category in categories}
    unknown = {other for category in categories for other in category.implied}.union(*taken.values()) - names
    if unknown or len(names) != len(categories):
        raise SystemExit(f"{path.name}: a class is given twice, or not at all: {', '.join(sorted(unknown))}")
    return sorted(categories, key=lambda category: category.name.lower()), taken


def label(records: list[dict], categories: list[Category], taken: dict[str, set[str]]) -> dict[str, set[int]]:
    """Path -> positions of its categories, for the pictures that show any."""
    number = {category.name: place for place, category in enumerate(categories)}

    def stem(record: dict) -> str:
        return phrase(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", Path(record["path"]).stem).replace("_", " "))

    named: dict[tuple[str, str], set[str]] = {}
    for record in records:
        named.setdefault((record["author"], phrase(record["title"])), set()).add(stem(record))
    labels = {}
    for record in records:
        title = phrase(record["title"])
        texts = [f" {stem(record)} "]
        if len(named[record["author"], title]) < SERIES:
            texts.append(f" {title} ")
        keywords = {phrase(keyword) for keyword in record["keywords"]}
        places = f"/{record['path']}", Path(record["path"]).name
        never = {name for start, names in taken.items() if any(p.startswith(start) for p in places) for name in names}
        shown = (c.name for c in categories if c.shows(record["path"], texts, keywords))
        found = {number[name] for name in shown if name not in never}
        waiting = list(found)
        while waiting:
            for other in categories[waiting.pop()].implied:
                if number[other] not in found:
                    found.add(number[other])
                    waiting.append(number[other])
        if found:
            labels[record["path"]] = found
    return labels


def encode(path: Path) -> bytes:
    """One picture as WebP (runs in a worker process); empty if there is nothing to see or it cannot be drawn."""
    try:
        image = clip_art.render(path, SIZE, MARGIN)
    except Exception:  # a broken file among thousands is left out
        return b""
    pixels = np.asarray(image)
    if (pixels.min(2) < 250).mean() < 0.004 or (pixels.max(2) < 12).mean() > 0.6:
        return b""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def draw(root: Path, records: list[dict], labels: dict[str, set[int]], workers: int) -> list[Picture]:
    """The pictures, each once."""
    chosen = [r for r in records if r["path"] in labels and (root / r["path"]).stat().st_size <= MAX_SVG]
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(encode, [root / record["path"] for record in chosen], chunksize=8))
    pictures: dict[bytes, Picture] = {}
    for record, data in zip(chosen, drawn, strict=True):
        if data:
            picture = pictures.setdefault(data, Picture(data))
            picture.paths.append(record["path"])
            picture.titles.append(record["title"])
            picture.authors.append(record["author"])
            picture.labels |= labels[record["path"]]
    return list(pictures.values())


def group_alike(pictures: list[Picture]) -> None:
    """Give pictures that look nearly the same, whatever their colours, one group.

    Two pictures are alike if they share `ALIKE` of their steps (Dice coefficient), and so are all that follow each
    other in this way.
    """
    bits = np.stack([picture.steps for picture in pictures]).astype(np.float32)
    parent = list(range(len(pictures)))

    def top(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    for start in range(0, len(pictures), 256):
        rows = bits[start : start + 256]
        alike = 2 * rows @ bits.T >= ALIKE * (rows.sum(1)[:, None] + bits.sum(1)[None])
        for first, second in zip(*np.nonzero(alike), strict=True):
            a, b = top(start + int(first)), top(int(second))
            parent[max(a, b)] = min(a, b)
    for place, picture in enumerate(pictures):
        picture.group = top(place)


def keep_classes(pictures: list[Picture], categories: list[Category], kept: list[int]) -> tuple[list, list]:
    """Only these categories, and only the pictures that show one of them."""
    place = {number: position for position, number in enumerate(kept)}
    for picture in pictures:
        picture.labels = {place[number] for number in picture.labels if number in place}
    return [picture for picture in pictures if picture.labels], [categories[number] for number in kept]


def split(pictures: list[Picture], categories: list[Category]) -> tuple[list[Picture], list[Category]]:
    """Choose splits; without the categories that cannot have enough test and training pictures."""
    wanted = {"test": MIN_TEST, "train": MIN_TRAIN}
    while True:
        group_alike(pictures)
        choose_splits(pictures)
        have = {split: positives(pictures, split) for split in wanted}
        kept = [n for n in range(len(categories)) if all(have[split][n] >= least for split, least in wanted.items())]
        if len(kept) == len(categories):
            return pictures, categories
        pictures, categories = keep_classes(pictures, categories, kept)


def positives(pictures: list[Picture], split: str) -> Counter:
    """How many pictures of a split show each category."""
    return Counter(number for picture in pictures if picture.split == split for number in picture.labels)


def choose_splits(pictures: list[Picture]) -> None:
    """Set the split of every picture, group by group; rare classes choose first."""
    fitted = fitted_paths()
    groups: dict[int, list[Picture]] = {}
    for picture in pictures:
        picture.split = ""
        groups.setdefault(picture.group, []).append(picture)

    def place(members: list[Picture]) -> tuple[bool, bytes]:
        return any(fitted & set(p.paths) for p in members), min(ranked(p.key) for p in members)

    shown: dict[int, list[tuple[list[Picture], int]]] = {}
    for members in sorted(groups.values(), key=place):
        for number, count in Counter(number for picture in members for number in picture.labels).items():
            shown.setdefault(number, []).append((members, count))
    totals = {number: sum(count for _, count in mine) for number, mine in shown.items()}
    have: dict[str, Counter] = {"test": Counter(), "val": Counter()}

    def give(members: list[Picture], split: str) -> None:
        for picture in members:
            picture.split = split
            if split in have:
                have[split].update(picture.labels)

    for number in sorted(totals, key=lambda number: (totals[number], number)):
        total = totals[number]
        test = max(MIN_TEST, round(TEST * total))
        for split, wanted in (("test", test), ("val", min(max(1, round(VAL * total)), total - test - MIN_TRAIN))):
            for members, count in shown[number]:
                now = have[split][number]
                if not members[0].split and now < wanted and now + count <= wanted + max(1, wanted // 4):
                    give(members, split)
        for members, _ in shown[number]:
            if not members[0].split:
                give(members, "train")


def ranked(*parts: object) -> bytes:
    """Where something stands in an order that looks random and is the same everywhere."""
    return hashlib.sha256(repr((SEED, *parts)).encode()).digest()


def fitted_paths() -> set[str]:
    """Files of Open Clip Art that the embedded models were fitted on."""
    manifest = json.loads((ASSETS / "model" / "fit_manifest.json").read_text())
    return {entry["path"] for entry in manifest["clip_art"]}


def write(pictures: list[Picture], categories: list[Category], out: Path) -> None:
    """The tars, the index and the credits."""
    out.mkdir(parents=True, exist_ok=True)
    names = [category.name for category in categories]
    tars = []
    for split in ("train", "val", "test"):
        mine = sorted((picture for picture in pictures if picture.split == split), key=lambda picture: picture.key)
        sha = write_tar(out / f"{split}.tar", [(f"{picture.key}.webp", picture.data) for picture in mine])
        tars.append({"name": split, "images": len(mine), "sha256": sha})
    rows = [{"key": p.key, "split": p.split, "labels": sorted(p.labels), "files": p.paths}
            for p in sorted(pictures, key=lambda picture: picture.key)]  # fmt: skip
    package = {"package": clip_art.PACKAGE, "version": clip_art.VERSION, "license": "public domain"}
    index = {"version": 1, "name": "clipart", "package": package, "classes": names, "tars": tars, "images": rows}
    (out / "index.json").write_text(compact(index))
    (out / "ATTRIBUTION.md").write_text(attribution(pictures))


def compact(index: dict) -> str:
    """JSON with one tar or image a line."""
    parts = []
    for key, value in index.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if key in ("tars", "images") else ""
        parts.append(f'"{key}": [\n  {rows}\n ]' if rows else f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def attribution(pictures: list[Picture]) -> str:
    """Where the pictures come from, and who drew them."""
    authors = Counter(re.sub(r"\s*[<\[(].*", "", picture.authors[0]).strip() or "unnamed" for picture in pictures)
    lines = [
        "# Where these pictures come from",
        "",
        f"All {len(pictures)} pictures are from the Open Clip Art Library, release 0.18, as packaged by Debian "
        f"(`{clip_art.PACKAGE}` {clip_art.VERSION}).",
        "Each one's own RDF metadata dedicates it to the public domain (its licence is",
        "`http://web.resource.org/cc/PublicDomain` or `http://creativecommons.org/licenses/publicdomain/`); files",
        "without such a statement, or with another one, were left out. No credit is required; the authors are named",
        "all the same.",
        "",
        f"Changes: cropped to what is drawn, rasterised to {SIZE} x {SIZE} pixels on white, saved as WebP.",
        "`index.json` gives the file or files of the package that each picture was made from. Flags, emblems and brand",
        "names may be protected by other rights than copyright; no author or owner endorses this project.",
        "",
        "| author | pictures |",
        "| --- | --- |",
    ]
    ordered = sorted(authors.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(lines + [f"| {name.replace('|', ' ')} | {count} |" for name, count in ordered]) + "\n"


def sheets(pictures: list[Picture], categories: list[Category], folder: Path) -> None:
    """One contact sheet a class: training, validation and test pictures with a coloured bar."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"train": "grey", "val": "orange", "test": "red"}
    for number, category in enumerate(categories):
        mine = sorted((p for p in pictures if number in p.labels), key=lambda p: (p.split, ranked(p.key)))
        mine = mine[:: max(1, len(mine) // 120)]
        sheet = Image.new("RGB", (15 * 100, (len(mine) + 14) // 15 * 116), "white")
        pen = ImageDraw.Draw(sheet)
        for place, picture in enumerate(mine):
            x, y = place % 15 * 100, place // 15 * 116
            sheet.paste(Image.open(io.BytesIO(picture.data)).resize((98, 98)), (x, y))
            pen.rectangle((x, y + 98, x + 98, y + 101), fill=colours[picture.split])
            pen.text((x, y + 102), Path(picture.paths[0]).stem[:16], fill="black")
        sheet.save(folder / f"{category.name.replace(' ', '_')}.png")


def counts(pictures: list[Picture], categories: list[Category]) -> Iterator[str]:
    """What the set holds, for the terminal."""
    trained = positives(pictures, "train")
    groups = Counter("head" if n >= 100 else "medium" if n >= 20 else "tail" for n in trained.values())
    yield f"{len(categories)} classes {dict(groups)}, images {dict(Counter(p.split for p in pictures))}"
    yield f"labels an image {sum(len(p.labels) for p in pictures) / len(pictures):.2f}"
    fitted = fitted_paths()
    for split in ("train", "val", "test"):
        mine = [p for p in pictures if p.split == split]
        known = sum(bool(fitted & set(picture.paths)) for picture in mine)
        yield f"{split}: {known} of {len(mine)} in the fit of the embedded models"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, outside the repository")
    parser.add_argument("--out", type=Path, default=ASSETS / "clipart")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet for each class there")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    root = clip_art.fetch(args.work)
    records = [record for record in clip_art.read_records(root) if not record["path"].startswith(LEFT_OUT)]
    categories, taken = read_categories()
    pictures = draw(root, records, label(records, categories, taken), args.workers)
    pictures, categories = split(pictures, categories)
    write(pictures, categories, args.out)
    if args.sheets:
        sheets(pictures, categories, args.sheets)
    print("\n".join(counts(pictures, categories)))
    print(f"{sum(path.stat().st_size for path in args.out.iterdir()) / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
