"""Fetch, read and render the permissively licensed emoji drawings that the project uses.

Every vendor is one npm package with a pinned version. `npm pack` brings a tarball and runs nothing of it. The SVG
sets are rendered with resvg; the one raster set is scaled. All pictures come out as `SIZE` x `SIZE` RGB on white with
a small margin.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

SIZE = 224
MARGIN = 12
SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Vendor:
    """One drawing style: where it comes from, under which licence, and on which side of the split it stands."""

    name: str
    package: str
    version: str
    license: str
    split: str
    authors: str
    link: str

    @property
    def folder(self) -> str:
        """Folder name under the working directory, the same stem that `npm pack` uses."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}"


_ICONIFY = "@iconify-json/"
VENDORS = (
    Vendor("noto", _ICONIFY + "noto", "1.2.9", "Apache-2.0", "test", "Google", "github.com/googlefonts/noto-emoji"),
    Vendor("noto-v1", _ICONIFY + "noto-v1", "1.2.5", "Apache-2.0", "test", "Google",
           "github.com/googlefonts/noto-emoji"),
    Vendor("fluent-flat", _ICONIFY + "fluent-emoji-flat", "1.2.6", "MIT", "train", "Microsoft Corporation",
           "github.com/microsoft/fluentui-emoji"),
    Vendor("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "train",
           "Microsoft Corporation (drawings), LobeHub (package)", "github.com/microsoft/fluentui-emoji"),
    Vendor("twemoji", _ICONIFY + "twemoji", "1.2.5", "CC-BY-4.0", "train", "Twitter, Inc and other contributors",
           "github.com/jdecked/twemoji"),
    Vendor("emojione", _ICONIFY + "emojione", "1.2.3", "CC-BY-4.0", "train", "EmojiOne and the EmojiTwo contributors",
           "github.com/EmojiTwo/emojitwo"),
)  # fmt: skip
LABELS = Vendor("labels", "emojibase-data", "17.0.0", "MIT", "", "Miles Johnson", "github.com/milesj/emojibase")


def fetch(work: Path, vendor: Vendor) -> Path:
    """Bring one package under `work/npm` (once) and return the folder it was unpacked into."""
    target = work / "npm" / vendor.folder
    if (target / "package.json").exists():
        return target
    downloads = work / "npm" / "tarballs"
    downloads.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", f"{vendor.package}@{vendor.version}"], cwd=downloads, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    with tarfile.open(downloads / f"{vendor.folder}.tgz") as tar:
        for member in tar.getmembers():
            if member.isfile():
                path = target / Path(*Path(member.name).parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    return target


def _plain(code: str) -> str:
    """Code points of an emoji without the presentation selector, lower case: the form in which sets agree."""
    return code.lower().replace("-fe0f", "")


class Emoji:
    """All vendors' drawings under one set of keys, the names that the Noto package gives them."""

    def __init__(self, work: Path):
        self.work = Path(work)
        self.folders = {vendor.name: fetch(self.work, vendor) for vendor in VENDORS}
        self._icons = {v.name: json.loads((self.folders[v.name] / "icons.json").read_text())
                       for v in VENDORS if v.name != "fluent-3d"}  # fmt: skip
        self._keys = {name: self._svg_keys(name) for name in self._icons}
        chars = json.loads((self.folders["noto"] / "chars.json").read_text())
        self._codes: dict[str, list[str]] = {}
        for code, key in chars.items():
            self._codes.setdefault(key, []).append(_plain(code))
        files = {_plain(path.stem): path for path in (self.folders["fluent-3d"] / "assets").glob("*.webp")}
        self._keys["fluent-3d"] = {key: str(files[code]) for key, codes in self._codes.items()
                                   for code in codes if code in files}  # fmt: skip

    def _svg_keys(self, vendor: str) -> dict[str, str]:
        """Key -> drawing for one SVG set; an alias that only renames counts, one that turns or mirrors does not."""
        icons = self._icons[vendor]
        keys = {key: key for key, icon in icons["icons"].items() if not icon.get("hidden")}
        for alias, entry in icons.get("aliases", {}).items():
            if entry["parent"] in keys and not {"rotate", "hFlip", "vFlip"} & set(entry):
                keys.setdefault(alias, entry["parent"])
        return keys

    @property
    def keys(self) -> list[str]:
        """Every key of the Noto set, sorted."""
        return sorted(self._keys["noto"])

    def drawing(self, vendor: str, key: str) -> str | None:
        """The vendor's own name for a concept's drawing, or None where the vendor has none."""
        return self._keys[vendor].get(key)

    def styles(self, key: str) -> list[str]:
        """Names of the vendors that draw this concept, in the order of `VENDORS`."""
        return [vendor.name for vendor in VENDORS if key in self._keys[vendor.name]]

    def render(self, vendor: str, key: str, size: int = SIZE) -> Image.Image:
        """One drawing as size x size RGB on white."""
        inner = size - 2 * round(size * MARGIN / SIZE)
        if vendor == "fluent-3d":
            image = Image.open(self._keys[vendor][key]).convert("RGBA")
            image.thumbnail((inner, inner), Image.Resampling.LANCZOS)
        else:
            image = self._render_svg(vendor, self._keys[vendor][key], inner)
        canvas = Image.new("RGBA", (size, size), "white")
        canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
        return canvas.convert("RGB")

    def _render_svg(self, vendor: str, drawing: str, inner: int) -> Image.Image:
        icons = self._icons[vendor]
        icon = icons["icons"][drawing]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>')  # fmt: skip
        return render_svg(svg, width, height, inner)

    @lru_cache(maxsize=1)  # noqa: B019 - one instance lives for the whole run
    def labels(self) -> dict[str, dict]:
        """Key -> entry of emojibase (label, tags, group, subgroup), for the keys that have one."""
        folder = fetch(self.work, LABELS) / "en"
        names = {sub["order"]: sub["key"] for sub in json.loads((folder / "messages.json").read_text())["subgroups"]}
        entries = {_plain(entry["hexcode"]): entry for entry in json.loads((folder / "data.json").read_text())}
        return {key: {**entries[code], "subgroup": names.get(entries[code].get("subgroup"))}
                for key, codes in self._codes.items() for code in codes if code in entries}  # fmt: skip


def render_svg(svg: str, width: float, height: float, inner: int) -> Image.Image:
    """Rasterise an SVG text so that its longer side is `inner` pixels, keeping alpha."""
    import resvg_py

    scale = inner / max(width, height)
    data = resvg_py.svg_to_bytes(svg_string=svg, width=max(1, round(width * scale)),
                                 height=max(1, round(height * scale)), skip_system_fonts=True)  # fmt: skip
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


@dataclass(frozen=True)
class Concept:
    """One class of the shipped set."""

    name: str
    key: str
    group: str


def read_concepts(path: Path = SCRIPTS / "data" / "emoji_concepts.txt") -> list[Concept]:
    """The hand-picked classes in the order of their class numbers (alphabetical by name)."""
    group, concepts = "", []
    for line in path.read_text().splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            group = line.strip("[]")
            continue
        key, _, name = (part.strip() for part in line.partition(":"))
        concepts.append(Concept(name or key.replace("-", " "), key, group))
    concepts.sort(key=lambda concept: concept.name)
    for field in ("name", "key"):
        values = [getattr(concept, field) for concept in concepts]
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{path.name}: {field}s given twice: {', '.join(repeated)}")
    return concepts
