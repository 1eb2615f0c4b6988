"""Prepare a large, fully crossed compositional set, colour x emblem folder icons, for experiments (never shipped).

    apt-get download papirus-icon-theme
    python scripts/build_folder_icons.py papirus-icon-theme_*.deb --out build/folder-icons
    capt data check build/folder-icons/list.csv

The drawings are under the GPL-3, so nothing of them may go into the package. Takes the package file or a folder it was
unpacked into; needs `pip install resvg_py==0.5.0 pillow`. Every icon is drawn anew for each size, with fewer details
in the small ones. So the sizes serve as styles: 64, 48 and 32 train, 24 validates, 22 tests. A test image of a seen
pair is then a drawing that was never trained on, and seen and unseen images of a split have the same size, so that
they differ in nothing but the pair. All are rendered to one size. Unseen pairs are chosen as in `build_emoji_pairs.py`.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from build_emoji_pairs import Pair, choose_unseen
from emoji_sources import render_svg
from PIL import Image

SIZE, MARGIN = 128, 8
SPLIT_OF = {64: "train", 48: "train", 32: "train", 24: "val", 22: "test"}
PLACES = "usr/share/icons/Papirus/{0}x{0}/places"
WORDS = {"bluegrey": "blue grey", "darkcyan": "dark cyan", "deeporange": "deep orange", "palebrown": "pale brown",
         "paleorange": "pale orange"}  # fmt: skip


def crossed(folder: Path) -> tuple[list[str], list[str]]:
    """The colours, and the emblems that all of them have and that are no second name of another emblem."""
    stems = {path.stem for path in folder.glob("folder-*.svg")
             if not path.is_symlink() or not path.resolve().name.startswith("folder-")}  # fmt: skip
    colours = sorted(stem.removeprefix("folder-") for stem in stems if f"{stem}-documents" in stems)
    colours.remove("custom")  # takes the colour of the desktop
    emblems = [
        {stem.removeprefix(f"folder-{colour}-") for stem in stems if stem.startswith(f"folder-{colour}-")}
        for colour in colours
    ]
    return colours, sorted(set.intersection(*emblems))


def render(job: tuple[Path, Path]) -> None:
    """One SVG file as SIZE x SIZE RGB on white (runs in a worker process)."""
    source, target = job
    text = source.read_text(encoding="utf-8")
    width, height = (float(re.search(rf'<svg[^>]*\b{side}="([\d.]+)', text)[1]) for side in ("width", "height"))
    image = render_svg(text, width, height, SIZE - 2 * MARGIN)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.convert("RGB").save(target)


def build(root: Path, out: Path, workers: int) -> Counter:
    """Render the icons and write the list; returns images by split."""
    colours, emblems = crossed(root / PLACES.format(64))
    pairs = [Pair(WORDS.get(colour, colour), f"{emblem.replace('-', ' ')} folder", (f"{colour}-{emblem}",))
             for colour in colours for emblem in emblems]  # fmt: skip
    jobs, rows = [], []
    for pair, pair_split in zip(pairs, choose_unseen(pairs), strict=True):
        for size, split in SPLIT_OF.items():
            if pair_split not in ("train", split):
                continue
            source = (root / PLACES.format(size) / f"folder-{pair.keys[0]}.svg").resolve()
            if not source.is_relative_to(root.resolve()):
                raise SystemExit(f"{size}/{pair.keys[0]}: a link that leads out of the package")
            name = f"images/{size}/{pair.keys[0]}.png"
            jobs.append((source, out / name))
            rows.append((name, pair.state, pair.object, split))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(render, jobs, chunksize=32))
    with open(out / "list.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "state", "object", "split"), *rows])
    print(f"{len(colours)} colours x {len(emblems)} emblems")
    return Counter(split for *_, split in rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="papirus-icon-theme_*.deb, or the folder it was unpacked into")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        if args.package.is_file():
            subprocess.run(["dpkg-deb", "-x", str(args.package), unpacked], check=True)
        root = Path(unpacked) if args.package.is_file() else args.package
        if not (root / PLACES.format(64)).is_dir():
            parser.error(f"{args.package}: found no {PLACES.format(64)} in it; give the package papirus-icon-theme")
        print(dict(build(root, args.out, args.workers)))


if __name__ == "__main__":
    main()
