"""The pictures of the fit: emoji outside the evaluation set, and public-domain clip art; and their features."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import clip_art
import numpy as np
import torch
from emoji_sources import Emoji, read_concepts

from .leak import EvaluationRule
from .trunk import drawn_statistics, load_trunk, normalise

SKIPPED_FOLDERS = ("computer/icons", "shapes/stars", "special", "unsorted/flags", "signs_and_symbols/flags")
META_KEYWORDS = {"hash", "unsorted", "clip art", "clipart", "image", "png", "svg", "public domain", "externalsource"}
SKIPPED_EMOJI = re.compile(
    r"skin-tone|^flag-|^keycap|oclock|-thirty$|-moon|^japanese-.*-button$|^input-|^regional|"
    r"^(man|men|woman|women|boy|girl|person|people|family|kiss|couple)-|^[a-z0-9]$|-tone\d|^cricket$|^letter-"
)
_emoji: Emoji | None = None


def fit_emoji(emoji: Emoji) -> list[str]:
    """Keys of the emoji that may enter the fit: drawn by two vendors at least, no evaluation class or variant of one.

    A key under which some vendor files the drawing of an evaluation class (an alias) is out too, and so is a second
    key for a drawing that is already in.
    """
    concepts = read_concepts()
    rule = EvaluationRule(concepts)
    taken = {(vendor, emoji.drawing(vendor, c.key)) for c in concepts for vendor in emoji.styles(c.key)}
    kept = []
    for key in emoji.keys:
        drawings = {(vendor, emoji.drawing(vendor, key)) for vendor in emoji.styles(key)}
        if len(drawings) < 2 or SKIPPED_EMOJI.search(key) or rule.emoji(key) or drawings & taken:
            continue
        kept.append(key)
        taken |= drawings
    return kept


def read_clip_art(root: Path) -> list[dict]:
    """Path, title and keywords of the clip-art files that are pictures of things; keywords without meta words."""
    records = []
    for record in clip_art.read_records(root):
        if not record["path"].startswith(SKIPPED_FOLDERS):
            keywords = [k.lower().replace("_", " ") for k in record["keywords"] if k and k.lower() not in META_KEYWORDS]
            records.append({"path": record["path"], "title": record["title"], "keywords": keywords})
    return records


def fit_clip_art(root: Path) -> list[dict]:
    """The clip art that may enter the fit."""
    rule = EvaluationRule(read_concepts())
    return [record for record in read_clip_art(root) if not rule.picture(record["title"], record["keywords"])]


def _start(work: Path) -> None:
    global _emoji
    _emoji = Emoji(work)


def _pixels(job: tuple[str, str, str]) -> np.ndarray | None:
    """Render one picture to uint8 [SIZE, SIZE, 3] (runs in a worker process); None if it cannot be read."""
    kind, first, second = job
    if kind == "emoji":
        return np.asarray(_emoji.render(first, second))
    try:
        return np.asarray(clip_art.render(Path(first) / second))
    except Exception:  # a broken file among thousands only leaves the fit
        return None


def render_jobs(work: Path, jobs: list[tuple[str, str, str]], workers: int) -> Iterator[np.ndarray | None]:
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(work,)) as pool:
        yield from pool.map(_pixels, jobs, chunksize=8)


def features(work: Path, model: torch.nn.Module, jobs: list[tuple[str, str, str]], workers: int = 1
             ) -> tuple[torch.Tensor, list[int]]:  # fmt: skip
    """Pooled trunk features float32 [N, 1280] of the readable jobs, and the numbers of those jobs."""
    model.reset_classifier(0)
    rows, kept, batch, numbers, start = [], [], [], [], time.time()
    with torch.inference_mode():
        for number, pixels in enumerate(render_jobs(work, jobs, workers)):
            if pixels is not None:
                batch.append(pixels)
                numbers.append(number)
            if batch and (len(batch) == 64 or number == len(jobs) - 1):
                rows.append(model(normalise(batch)))
                kept += numbers
                batch, numbers = [], []
                if len(rows) % 10 == 0:
                    print(f"features {len(kept)} of {len(jobs)} in {time.time() - start:.0f} s", flush=True)
    return torch.cat(rows), kept


def fit_jobs(work: Path) -> tuple[list[tuple[str, str, str]], dict[str, dict]]:
    """What is to be rendered for the fit, and the clip-art records by path."""
    emoji, root = Emoji(work), clip_art.fetch(work)
    art = {record["path"]: record for record in fit_clip_art(root)}
    jobs = [("emoji", vendor, key) for key in fit_emoji(emoji) for vendor in emoji.styles(key)]
    return jobs + [("art", str(root), path) for path in art], art


def trunk_statistics(work: Path, jobs: list[tuple[str, str, str]], count: int = 512, seed: int = 0) -> dict:
    """Batch-norm statistics of a sample of the fit's pictures, cached in `work/fit/statistics.pt`."""
    cache = work / "fit" / "statistics.pt"
    if not cache.exists():
        sample = random.Random(seed).sample(jobs, count)
        torch.save(drawn_statistics([p for p in render_jobs(work, sample, 1) if p is not None]), cache)
    return torch.load(cache)


def picture_features(work: Path, part: tuple[int, int] = (0, 1)) -> dict:
    """Features of everything that may enter the fit, cached in `work/fit`.

    `part` = (i, n) computes only the i-th of n shares, so that several processes can split the work.
    """
    (work / "fit").mkdir(parents=True, exist_ok=True)
    jobs, art = fit_jobs(work)
    model = load_trunk(trunk_statistics(work, jobs))
    known: dict[tuple, torch.Tensor | None] = {}
    for cache in sorted((work / "fit").glob("features-*.pt")):
        known |= torch.load(cache, weights_only=False)
    todo = [job for job in jobs[part[0] :: part[1]] if job not in known]
    if todo:
        print(f"{len(jobs)} pictures, {len(todo)} to be read", flush=True)
        values, kept = features(work, model, todo)
        new = dict.fromkeys(todo) | {todo[number]: row.clone() for number, row in zip(kept, values, strict=True)}
        torch.save(new, work / "fit" / f"features-{part[0]}-{part[1]}.pt")
        known |= new
    drawings = [job for job in jobs if job[0] == "emoji" and known.get(job) is not None]
    clip_art = [job for job in jobs if job[0] == "art" and known.get(job) is not None]
    return {"emoji": [(vendor, key) for _, vendor, key in drawings], "art": [art[path] for _, _, path in clip_art],
            "emoji_features": torch.stack([known[job] for job in drawings]),
            "art_features": torch.stack([known[job] for job in clip_art])}  # fmt: skip
