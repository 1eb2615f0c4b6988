"""Fetch, read and render the public-domain pictures of Open Clip Art 0.18 that the project uses.

The Debian package is unpacked, never installed. What a picture shows, who drew it and under which terms it may be used
stands in the RDF of its own SVG file; only files that declare the public domain are taken.
"""

from __future__ import annotations

import gzip
import html
import re
import subprocess
from pathlib import Path

from emoji_sources import MARGIN, SIZE, render_svg
from PIL import Image

PACKAGE, VERSION = "openclipart-svg", "1:0.18+dfsg-19"
UNITS = {"pt": 4 / 3, "pc": 16.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4}


def fetch(work: Path) -> Path:
    """Unpack the package (once) and return the folder of its SVG files."""
    return unpack(work, PACKAGE, VERSION) / "usr" / "share" / "openclipart" / "svg"


def unpack(work: Path, package: str, version: str) -> Path:
    """Download a Debian package and unpack it, both once, and return the folder of its files."""
    downloads, root = work / "deb", work / "deb" / "x" / package
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=downloads, check=True)
        subprocess.run(["dpkg-deb", "-x", str(next(downloads.glob(f"{package}_*.deb"))), str(root)], check=True)
    return root


def read_svg(path: Path) -> str:
    """Text of an SVG file, compressed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf8", "replace")


def read_records(root: Path) -> list[dict]:
    """Every file that is marked public domain and titled, in the order of its path.

    A record has the relative path, the title without digits, the keywords as they are, and who drew it ("" if the
    file does not say).
    """
    records = []
    for path in sorted(root.rglob("*.svg*")):
        metadata = re.search(r"<metadata.*?</metadata>", read_svg(path), re.S)
        if not metadata:
            continue
        licences = re.findall(r'license rdf:resource="([^"]+)"', metadata[0])
        titles = _tags(r"<dc:title[^>]*>(.*?)</dc:title>", metadata[0])
        creator = re.search(r"<dc:creator>(.*?)</dc:creator>", metadata[0], re.S)
        subject = re.search(r"<dc:subject>(.*?)</dc:subject>", metadata[0], re.S)
        title = re.sub(r"[_\d#]+", " ", titles[0]).strip() if titles else ""
        if title and licences and all("publicdomain" in licence.lower() for licence in licences):
            records.append({"path": path.relative_to(root).as_posix(), "title": title,
                            "keywords": _tags(r"<rdf:li[^>]*>(.*?)</rdf:li>", subject[1]) if subject else [],
                            "author": " ".join(_tags(r"(.*)", creator[1])).strip() if creator else ""})  # fmt: skip
    return records


def render(path: Path, size: int = SIZE, margin: int = MARGIN) -> Image.Image:
    """One picture as size x size RGB on white, cropped to what is drawn (many are full pages)."""
    svg, width, height = _resized(read_svg(path))
    inner = size - 2 * margin
    image = render_svg(svg, width, height, inner)
    left, top, right, bottom = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    share = max(right - left, bottom - top) / inner
    if share < 0.9:
        image = render_svg(svg, width, height, min(int(inner / share), 5 * inner))
        image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
        image.thumbnail((inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas.convert("RGB")


def _tags(pattern: str, text: str) -> list[str]:
    return [html.unescape(re.sub(r"<[^>]+>", "", item)).strip() for item in re.findall(pattern, text, re.S)]


def _resized(svg: str) -> tuple[str, float, float]:
    """The SVG with a plain size and a view box in its root tag (many old files have neither), and that size."""
    root = re.search(r"<svg\b[^>]*>", svg, re.S)
    side = r'(?<![\w:-]){}\s*=\s*["\']\s*([\d.]+)\s*(\w*)[^"\']*["\']'
    found = [re.search(side.format(name), root[0]) for name in ("width", "height")]
    box = re.search(r'viewBox\s*=\s*["\']([^"\']+)["\']', root[0])
    numbers = [float(n) for n in re.split(r"[\s,]+", box[1].strip())] if box else []
    if len(numbers) != 4 or min(numbers[2:]) <= 0:
        numbers = [0.0, 0.0, *(float(m[1]) * UNITS.get(m[2], 1.0) for m in found)]
    tag = re.sub(r'(?<![\w:-])(width|height|viewBox)\s*=\s*("[^"]*"|\'[^\']*\')', "", root[0], flags=re.S)
    width, height = numbers[2:]
    tag = f'<svg width="{width}" height="{height}" viewBox="{" ".join(map(str, numbers))}" {tag[4:]}'
    return svg[: root.start()] + tag + svg[root.end() :], width, height
