"""Photographs of objects without their ground, for ``capt bias --objects FOLDER``, out of the stamps of Tux Paint.

    python scripts/build_cutouts.py --work build/cutouts-work --out cutouts
    capt bias measure --objects cutouts

Needs `apt-get` (Debian package `tuxpaint-stamps-default`, 161 MB, GPL-2: nothing of it is shipped) or `--stamps`, the
folder of an installed one. A stamp is taken if its caption is a short name, its ground is transparent, its object is
large enough and it is a photograph: next to a pixel of a drawing there is often the same colour again.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import clip_art
import numpy as np
from PIL import Image, ImageOps

PACKAGE, VERSION = "tuxpaint-stamps-default", "2022.06.04-1"
SIDE = 256  # at most, of the picture that is written
SMALLEST = 64  # pixels of the longer side
MOST_WORDS = 3
GROUND, OBJECT = 0.10, 0.15  # least parts of the picture that are transparent and opaque
FLAT = 0.20  # part of neighbours with the same colour, from which on it is a drawing


def name_of(stamp: Path) -> str | None:
    """The object's name by the English caption beside a picture; None without a short one."""
    caption = stamp.with_suffix(".txt")
    if not caption.is_file():
        return None
    first = (caption.read_text("utf8", "replace").splitlines() or [""])[0].strip().rstrip(".!")
    name = re.sub(r"^(an?|the|some) ", "", first.lower())
    return name if re.fullmatch(r"[a-z][a-z'-]*( [a-z'-]+)*", name) and len(name.split()) <= MOST_WORDS else None


def is_photograph(pixels: np.ndarray) -> bool:
    """Whether opaque neighbours of a picture uint8 [H, W, 4] mostly differ."""
    solid = pixels[..., 3] > 250
    both = solid[:, 1:] & solid[:, :-1]
    same = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1)
    return bool(both.any()) and float(same[both].mean()) < FLAT


def cut_out(stamp: Path) -> Image.Image | None:
    """The object of a stamp, cut to what is visible and a pixel around it; None if it is none of a photograph."""
    with Image.open(stamp) as opened:
        if max(opened.size) > 4000:
            return None
        picture = opened.convert("RGBA")
    opacity = np.asarray(picture)[..., 3]
    box = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < SMALLEST:
        return None
    if (opacity < 8).mean() < GROUND or (opacity > 250).mean() < OBJECT or not is_photograph(np.asarray(picture)):
        return None
    picture = picture.crop(box)
    picture.thumbnail((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS)
    return ImageOps.expand(picture, 1)  # an object with straight edges is to be seen as cut out, too


def build(stamps: Path, out: Path) -> dict[str, int]:
    """Write one folder an object, and where each picture comes from; number of pictures by name."""
    found: dict[str, list[tuple[Path, Image.Image]]] = defaultdict(list)
    for stamp in sorted(stamps.rglob("*.png")):
        name = name_of(stamp)
        if name and (picture := cut_out(stamp)):
            found[name].append((stamp, picture))
    lines = []
    for name, pictures in sorted(found.items()):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, (stamp, picture) in enumerate(pictures):
            picture.save(folder / f"{number}.png")
            lines.append(f"{name}/{number}.png\t{stamp.relative_to(stamps).as_posix()}\n")
    if not found:
        raise SystemExit(f"{stamps}: no photograph of an object with a transparent ground and a caption beside it")
    out.with_suffix(".tsv").write_text("".join(lines))
    return {name: len(pictures) for name, pictures in found.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/cutouts-work"), help="the package is unpacked here")
    parser.add_argument("--stamps", type=Path, help="folder of stamps; no package is downloaded")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; OUT.tsv says where pictures come from"
    )
    chosen = parser.parse_args()
    stamps = chosen.stamps or clip_art.unpack(chosen.work, PACKAGE, VERSION) / "usr/share/tuxpaint/stamps"
    counts = build(stamps, chosen.out)
    print(f"{len(counts)} objects, {sum(counts.values())} pictures in {chosen.out}")


if __name__ == "__main__":
    main()
