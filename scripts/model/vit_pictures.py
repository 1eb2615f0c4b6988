"""Views of the fit's pictures and what the teacher makes of them: the training set of the ViT tower."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from emoji_sources import SIZE
from PIL import Image

from .pictures import fit_jobs, render_jobs

STORED = 128  # side of a stored view in pixels


def rendered(work: Path, workers: int = 1) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Every picture of the fit, rendered once: (kind, name) of each and pixels uint8 [N, SIZE, SIZE, 3] on disk."""
    folder = work / "vit"
    folder.mkdir(parents=True, exist_ok=True)
    names, pixels = folder / "pictures.json", folder / "pixels.npy"
    if not names.exists():
        jobs, _ = fit_jobs(work)
        store = np.lib.format.open_memmap(folder / "pixels.part.npy", "w+", np.uint8, (len(jobs), SIZE, SIZE, 3))
        kept = []
        for job, picture in zip(jobs, render_jobs(work, jobs, workers), strict=True):
            if picture is not None:
                store[len(kept)] = picture
                kept.append([job[0], f"{job[1]}/{job[2]}" if job[0] == "emoji" else job[2]])
        store.flush()
        (folder / "pixels.part.npy").rename(pixels)
        names.write_text(json.dumps(kept))
    kept = [tuple(item) for item in json.loads(names.read_text())]
    return kept, np.load(pixels, mmap_mode="r")[: len(kept)]


def view(pixels: np.ndarray, number: int, index: int) -> Image.Image:
    """The `number`-th view of picture `index` as SIZE x SIZE RGB; view 0 is the picture itself.

    Odd views turn, scale and move the whole drawing, even ones cut a part of it out; both may be mirrored.
    """
    image = Image.fromarray(pixels)
    if number == 0:
        return image
    draw = random.Random(1_000_003 * number + index)
    if number % 2:
        angle, zoom = draw.uniform(-18, 18), draw.uniform(0.8, 1.45)
        reach = SIZE * 0.12
        box = draw.uniform(-reach, reach), draw.uniform(-reach, reach)
        cos, sin = zoom * np.cos(np.radians(angle)), zoom * np.sin(np.radians(angle))
        half = SIZE / 2
        matrix = (cos, sin, half - half * (cos + sin) + box[0], -sin, cos, half - half * (cos - sin) + box[1])
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                                fillcolor="white")  # fmt: skip
    else:
        share = draw.uniform(0.35, 0.9) ** 0.5
        ratio = draw.uniform(0.8, 1.25) ** 0.5
        wide, high = min(SIZE, share * ratio * SIZE), min(SIZE, share / ratio * SIZE)
        left, top = draw.uniform(0, SIZE - wide), draw.uniform(0, SIZE - high)
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


@torch.inference_mode()
def write_view(work: Path, number: int, teacher: torch.nn.Module) -> None:
    """Store one view of every picture, uint8 [N, STORED, STORED, 3], and the teacher's unit features, float16."""
    folder = work / "vit"
    done = folder / f"targets-{number}.pt"
    if done.exists():
        return
    names, pixels = rendered(work)
    store = np.lib.format.open_memmap(folder / f"view-{number}.npy", "w+", np.uint8, (len(names), STORED, STORED, 3))
    rows, start = [], time.time()
    for first in range(0, len(names), 32):
        numbers = range(first, min(first + 32, len(names)))
        views = [view(pixels[i], number, i) for i in numbers]
        for i, image in zip(numbers, views, strict=True):
            store[i] = np.asarray(image.resize((STORED, STORED), Image.Resampling.BICUBIC))
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in views])).permute(0, 3, 1, 2)
        rows.append(torch.nn.functional.normalize(teacher(batch.float() / 127.5 - 1).float(), dim=-1).half())
        if first % 640 == 0:
            print(f"view {number}: {first} of {len(names)} in {time.time() - start:.0f} s", flush=True)
    store.flush()
    torch.save(torch.cat(rows), folder / "targets.part")
    (folder / "targets.part").rename(done)
