"""Build the shipped compositional set: pairs of a state and an object, drawn by several vendors, some never trained on.

    python scripts/build_emoji_pairs.py --work build/model-work           # writes capt/assets/emoji_pairs

Needs what `build_emoji.py` needs. Two runs with the same versions write the same bytes. The list of pairs is
`scripts/data/emoji_pairs.txt`. Which pairs are unseen, and which drawings of seen pairs validate, is chosen by hash:

- test: the Noto drawings of seen pairs and of the unseen test pairs, so both kinds come from the same vendors;
- train: the other vendors' drawings of seen pairs, but of every second pair those of one style validate;
- val: these, and the other vendors' drawings of the unseen validation pairs.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_emoji import attribution, compact, encode, start, write_tar
from emoji_sources import SCRIPTS, VENDORS, Emoji

SIZE = 144
SEED = 0
UNSEEN = {"test": 0.25, "val": 0.15}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
STYLES = {"fluent-flat": "fluent", "fluent-3d": "fluent"}  # these two share their outlines, so they stay together


@dataclass(frozen=True)
class Pair:
    """One pair and the keys of its drawings."""

    state: str
    object: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """Class name."""
        return f"{self.state} {self.object}"


@dataclass(frozen=True)
class Drawing:
    """One picture: who drew which key, and the split it is in."""

    vendor: str
    key: str
    pair: int
    split: str


def read_pairs(path: Path = SCRIPTS / "data" / "emoji_pairs.txt") -> list[Pair]:
    """The hand-picked pairs, sorted."""
    group, pairs = "", []
    for line in filter(None, (line.partition("#")[0].strip() for line in path.read_text().splitlines())):
        if line.startswith("["):
            group = line.strip("[]")
            continue
        name, _, keys = (part.strip() for part in line.partition(":"))
        if group == "skin tones":
            pairs += [Pair(f"{tone}-skinned", name, (f"{keys}-{tone}-skin-tone",)) for tone in TONES]
        else:
            state, _, thing = name.partition(" ")
            pairs.append(Pair(state, thing, tuple(key.strip() for key in keys.split(","))))
    return sorted(pairs, key=lambda pair: (pair.state, pair.object))


def own_key(emoji: Emoji, vendor: str, key: str) -> str | None:
    """The key under which a vendor's set has what the Noto set calls ``key``."""
    other = key
    if vendor == "fluent-3d":  # the package stores these two tones under each other's code points
        swapped = {"-medium-light-skin-tone": "-medium-skin-tone", "-medium-skin-tone": "-medium-light-skin-tone"}
        end = next((end for end in swapped if key.endswith(end)), "")
        other = key.removesuffix(end) + swapped[end] if end else key
    elif vendor == "fluent-flat" and not emoji.drawing(vendor, key):
        other = key.removesuffix("-skin-tone").replace("-blond-", "-blonde-")
    return other if emoji.drawing(vendor, other) else None


def ranked(*parts: object) -> bytes:
    """Where something stands in an order that looks random and is the same everywhere."""
    return hashlib.sha256(repr((SEED, *parts)).encode()).digest()


def choose_unseen(pairs: list[Pair]) -> list[str]:
    """The split of each pair ("train" for seen ones); every state and object keeps a seen pair."""
    splits = ["train"] * len(pairs)
    left = Counter(part for pair in pairs for part in (("state", pair.state), ("object", pair.object)))
    wanted = {split: round(share * len(pairs)) for split, share in UNSEEN.items()}
    for number in sorted(range(len(pairs)), key=lambda number: ranked("unseen", pairs[number].name)):
        parts = ("state", pairs[number].state), ("object", pairs[number].object)
        split = next((split for split, count in wanted.items() if count), None)
        if split and min(left[part] for part in parts) > 1:
            splits[number] = split
            wanted[split] -= 1
            left.subtract(parts)
    return splits


def choose_drawings(emoji: Emoji, pairs: list[Pair], splits: list[str]) -> list[Drawing]:
    """Every picture of the set, with its split."""
    chosen = []
    seen = [number for number, split in enumerate(splits) if split == "train"]
    validates = set(sorted(seen, key=lambda number: ranked("validates", pairs[number].name))[::2])
    for number, (pair, split) in enumerate(zip(pairs, splits, strict=True)):
        drawn = [(v, key) for v in VENDORS for key in pair.keys if own_key(emoji, v.name, key)]
        styles = sorted({STYLES.get(v.name, v.name) for v, _ in drawn if v.split == "train"})
        if len(styles) < 2 or all(v.split == "train" for v, _ in drawn):
            raise SystemExit(f"{pair.name}: drawn by {', '.join(sorted({v.name for v, _ in drawn}))} only")
        held = min(styles, key=lambda style: ranked("val", pair.name, style)) if number in validates else None
        for v, key in drawn:
            if v.split == "test":
                part = "test" if split in ("train", "test") else None
            elif split == "train":
                part = "val" if STYLES.get(v.name, v.name) == held else "train"
            else:
                part = "val" if split == "val" else None
            if part:
                chosen.append(Drawing(v.name, key, number, part))
    return chosen


def build(emoji: Emoji, pairs: list[Pair], out: Path, workers: int) -> dict:
    """Render, pack and index; returns the index that was written."""
    out.mkdir(parents=True, exist_ok=True)
    splits = choose_unseen(pairs)
    drawings = choose_drawings(emoji, pairs, splits)
    vendors, images = [], []
    with ProcessPoolExecutor(workers, initializer=start, initargs=(emoji.work,)) as pool:
        for vendor in VENDORS:
            mine = sorted((d for d in drawings if d.vendor == vendor.name), key=lambda d: d.key)
            jobs = [(d.vendor, own_key(emoji, d.vendor, d.key), SIZE) for d in mine]
            members = []
            for d, data in zip(mine, pool.map(encode, jobs, chunksize=16), strict=True):
                members += [(f"{d.key}.cls", str(d.pair).encode()), (f"{d.key}.webp", data)]
            sha = write_tar(out / f"{vendor.name}.tar", sorted(members))
            vendors.append({"name": vendor.name, "package": vendor.package, "version": vendor.version,
                            "license": vendor.license, "images": len(mine), "sha256": sha})  # fmt: skip
            images += [{"vendor": d.vendor, "key": d.key, "class": d.pair, "split": d.split} for d in mine]
    index = {"version": 1, "name": "emoji-pairs",
             "classes": [{"state": pair.state, "object": pair.object, "split": split}
                         for pair, split in zip(pairs, splits, strict=True)],
             "vendors": vendors, "images": images}  # fmt: skip
    (out / "index.json").write_text(compact(index))
    (out / "ATTRIBUTION.md").write_text(attribution({v["name"]: v["images"] for v in vendors}, SIZE))
    return index


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, outside the repository")
    parser.add_argument("--out", type=Path, default=SCRIPTS.parent / "capt" / "assets" / "emoji_pairs")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    index = build(Emoji(args.work), read_pairs(), args.out, args.workers)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    pairs = Counter(entry["split"] for entry in index["classes"])
    images = Counter(entry["split"] for entry in index["images"])
    print(f"pairs {dict(pairs)}, images {dict(images)}, {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
