"""Build the shipped set of confusable emoji classes: one WebDataset tar per vendor, an index and the credits.

    python scripts/build_emoji.py --work build/model-work                      # writes capt/assets/emoji
    python scripts/build_emoji.py --work build/model-work --all --out big      # every concept, for larger experiments

Needs `npm` on the path and `pip install resvg_py==0.5.0 pillow`. Two runs with the same versions write the same bytes.
The list of classes is `scripts/data/emoji_concepts.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from emoji_sources import SCRIPTS, SIZE, VENDORS, Concept, Emoji, read_concepts

TRAIN_STYLES = 4
LEFT_OUT = re.compile(r"skin-tone|^flag-|^keycap|oclock|-thirty$|-moon|^japanese-.*-button$|^input-|zodiac")
GENDERED = re.compile(r"^(man|men|woman|women|boy|girl|person|people|family|kiss|couple)\b.*-.*")
_emoji: Emoji | None = None


def every_concept(emoji: Emoji) -> list[Concept]:
    """All concepts drawn in both test styles and enough training styles, grouped by emojibase's subgroups."""
    chosen = []
    for key in emoji.keys:
        if LEFT_OUT.search(key) or GENDERED.match(key) or missing(emoji, key):
            continue
        label = emoji.labels().get(key)
        if label:
            chosen.append(Concept(key.replace("-", " "), key, (label["subgroup"] or "other").replace("-", " ")))
    return sorted(chosen, key=lambda concept: concept.name)


def missing(emoji: Emoji, key: str) -> str:
    """What a concept lacks to be a class, or an empty string."""
    have = set(emoji.styles(key))
    absent = [v.name for v in VENDORS if v.split == "test" and v.name not in have]
    train = [v.name for v in VENDORS if v.split == "train" and v.name in have]
    if absent:
        return f"no drawing by {', '.join(absent)}"
    return "" if len(train) >= TRAIN_STYLES else f"only {len(train)} training styles"


def start(work: Path) -> None:
    """Open the packages in a worker process."""
    global _emoji
    _emoji = Emoji(work)


def encode(job: tuple[str, str, int]) -> bytes:
    """Render one drawing (vendor, key, size) and pack it as WebP (runs in a worker process)."""
    buffer = io.BytesIO()
    _emoji.render(*job).save(buffer, "WEBP", quality=90, method=4)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    """Write an uncompressed tar whose bytes depend on the members alone; returns its SHA-256."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            tar.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attribution(counts: dict[str, int], size: int) -> str:
    """The credits that stand beside the pictures."""
    changes = (
        "All pictures are emoji drawings by the vendors below. Change made to every one of them: rasterised (or "
        f"scaled) to {size} x {size} pixels on a white ground with a small margin, and saved as WebP. Nothing else "
        "was altered. No vendor endorses this project."
    )
    columns = "| vendor | images | authors | licence | package | drawings |"
    lines = ["# Where these pictures come from", "", changes, "", columns, "| --- | --- | --- | --- | --- | --- |"]
    for v in VENDORS:
        lines.append(f"| {v.name} | {counts[v.name]} | {v.authors} | {v.license} | `{v.package}` {v.version} "
                     f"| [{v.link}](https://{v.link}) |")  # fmt: skip
    notices = (SCRIPTS / "data" / "emoji_licenses.md").read_text()
    return "\n".join(lines) + "\n\n" + notices


def build(emoji: Emoji, concepts: list[Concept], out: Path, workers: int) -> dict:
    """Render, pack and index; returns the index that was written."""
    out.mkdir(parents=True, exist_ok=True)
    number = {concept.key: i for i, concept in enumerate(concepts)}
    vendors, images, counts = [], [], {}
    with ProcessPoolExecutor(workers, initializer=start, initargs=(emoji.work,)) as pool:
        for vendor in VENDORS:
            keys = sorted(key for key in number if emoji.drawing(vendor.name, key))
            members = []
            encoded = pool.map(encode, [(vendor.name, key, SIZE) for key in keys], chunksize=16)
            for key, data in zip(keys, encoded, strict=True):
                members += [(f"{key}.cls", str(number[key]).encode()), (f"{key}.webp", data)]
            sha = write_tar(out / f"{vendor.name}.tar", sorted(members))
            counts[vendor.name] = len(keys)
            vendors.append({"name": vendor.name, "split": vendor.split, "package": vendor.package,
                            "version": vendor.version, "license": vendor.license, "images": len(keys),
                            "sha256": sha})  # fmt: skip
            images += [{"vendor": vendor.name, "key": key, "class": number[key]} for key in keys]
    index = {"version": 1, "name": "emoji",
             "classes": [{"name": c.name, "key": c.key, "group": c.group} for c in concepts],
             "vendors": vendors, "images": images}  # fmt: skip
    (out / "index.json").write_text(compact(index))
    (out / "ATTRIBUTION.md").write_text(attribution(counts, SIZE))
    return index


def compact(index: dict) -> str:
    """JSON with one class, vendor or image a line: small, and readable in a diff."""
    parts = [f'"{key}": {json.dumps(index[key])}' for key in ("version", "name")]
    for key in ("classes", "vendors", "images"):
        rows = ",\n  ".join(json.dumps(row) for row in index[key])
        parts.append(f'"{key}": [\n  {rows}\n ]')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, outside the repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "capt" / "assets" / "emoji")
    parser.add_argument("--all", action="store_true", help="every concept with enough styles, not the chosen list")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    emoji = Emoji(args.work)
    concepts = every_concept(emoji) if args.all else read_concepts()
    lacking = {concept.key: missing(emoji, concept.key) for concept in concepts if missing(emoji, concept.key)}
    if lacking:
        parser.error("concepts that cannot be classes: " + "; ".join(f"{k} ({why})" for k, why in lacking.items()))
    index = build(emoji, concepts, args.out, args.workers)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{len(index['classes'])} classes, {len(index['images'])} images, {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
