"""What the ViT tower is fitted on: the pictures of the shipped model's fit, and further drawings."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from emoji_sources import MARGIN, SIZE, Vendor, fetch, read_concepts, render_svg
from PIL import Image

from .leak import EvaluationRule
from .pictures import fit_jobs, render_jobs
from .vit_student import MEAN, STD, block, embed
from .vit_student import SIZE as SEEN

_ICONIFY, _STREAMLINE = "@iconify-json/", "github.com/webalys-hq/streamline-vectors"
DRAWINGS = (
    Vendor("flat-color-icons", _ICONIFY + "flat-color-icons", "1.2.3", "MIT", "", "Icons8",
           "github.com/icons8/flat-Color-icons"),
    Vendor("streamline-plump", _ICONIFY + "streamline-plump-color", "1.2.2", "CC-BY-4.0", "", "Streamline",
           _STREAMLINE),
    Vendor("streamline-ultimate", _ICONIFY + "streamline-ultimate-color", "1.2.2", "CC-BY-4.0", "", "Streamline",
           _STREAMLINE),
    Vendor("streamline-kameleon", _ICONIFY + "streamline-kameleon-color", "1.2.2", "CC-BY-4.0", "", "Streamline",
           _STREAMLINE),
    Vendor("streamline-freehand", _ICONIFY + "streamline-freehand-color", "1.2.2", "CC-BY-4.0", "", "Streamline",
           _STREAMLINE),
    Vendor("icon-park", _ICONIFY + "icon-park", "1.2.4", "Apache-2.0", "", "ByteDance",
           "github.com/bytedance/IconPark"),
    Vendor("game-icons", _ICONIFY + "game-icons", "1.2.4", "CC-BY-3.0", "", "game-icons.net contributors",
           "github.com/game-icons/icons"),
)  # fmt: skip
LIMITS = {"icon-park": 900, "game-icons": 2000}  # drawings taken of the large sets
CHUNK = 640

Job = tuple[str, str, str]  # (kind, set or folder, name), kind one of emoji, art, drawing


def drawing_jobs(work: Path) -> list[Job]:
    """The further drawings: every name that holds no class of the evaluation set and no synonym of one."""
    rule = EvaluationRule(read_concepts())
    jobs = []
    for vendor in DRAWINGS:
        icons = json.loads((fetch(work, vendor) / "icons.json").read_text())["icons"]
        names = [name for name, icon in sorted(icons.items()) if not icon.get("hidden") and not _taken(rule, name)]
        if vendor.name in LIMITS:
            random.Random(0).shuffle(names)
            names = names[: LIMITS[vendor.name]]
        jobs += [("drawing", vendor.name, name) for name in names]
    return jobs


def _taken(rule: EvaluationRule, name: str) -> bool:
    title = name.replace("-", " ")
    return rule.emoji(name) or rule.picture(title, [title, *title.split()])


def all_jobs(work: Path) -> tuple[list[Job], dict[str, dict]]:
    """Everything that may be seen, and the clip-art records by path."""
    jobs, art = fit_jobs(work)
    return jobs + drawing_jobs(work), art


def _rendered(work: Path, jobs: list[Job]) -> Iterator[np.ndarray | None]:
    """Pixels uint8 [SIZE, SIZE, 3] of each job, None where a file cannot be read; all of one kind at a time."""
    if jobs and jobs[0][0] != "drawing":
        yield from render_jobs(work, jobs, 1)
        return
    sets = {vendor.name: json.loads((fetch(work, vendor) / "icons.json").read_text()) for vendor in DRAWINGS}
    for _, vendor, name in jobs:
        try:
            yield np.asarray(_drawing(sets[vendor], name))
        except ValueError:
            yield None


def _drawing(icons: dict, name: str) -> Image.Image:
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>')  # fmt: skip
    image = render_svg(svg, width, height, SIZE - 2 * MARGIN)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")


def student_input(pixels: list[np.ndarray]) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] to what the tower's own evaluation transform gives, [B, 3, SEEN, SEEN]."""
    small = [np.asarray(Image.fromarray(p).resize((SEEN, SEEN), Image.Resampling.BICUBIC)) for p in pixels]
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
def seen_pictures(work: Path, visual: torch.nn.Module, frozen: int, trunk: torch.nn.Module, device: str) -> dict:
    """Run every picture through the frozen blocks and the teacher's trunk, in chunks that are kept in `work/vit`.

    Returns `jobs` (the readable ones), `tokens` bfloat16 [N, 1 + P, WIDTH] as they enter the first trained block, and
    `pooled` float32 [N, 1280], the trunk's pooled features.
    """
    folder = work / "vit"
    folder.mkdir(parents=True, exist_ok=True)
    jobs, art = all_jobs(work)
    kinds = [[job for job in jobs if (job[0] == "drawing") == late] for late in (False, True)]
    chunks = [part[i : i + CHUNK] for part in kinds for i in range(0, len(part), CHUNK)]
    visual, trunk = copy.deepcopy(visual).to(device, torch.bfloat16), trunk.to(device)
    results = []
    for number, chunk in enumerate(chunks):
        cache = folder / f"seen-{frozen}-{number}.pt"
        if not cache.exists():
            pairs = [(job, p) for job, p in zip(chunk, _rendered(work, chunk), strict=True) if p is not None]
            tokens, pooled = [], []
            for start in range(0, len(pairs), 32):
                pixels = [p for _, p in pairs[start : start + 32]]
                x = embed(visual, student_input(pixels).to(device, torch.bfloat16))
                for layer in visual.transformer.resblocks[:frozen]:
                    x = block(layer, x)
                tokens.append(x.cpu())
                batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device)
                pooled.append(trunk((batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)).cpu())
            torch.save(([job for job, _ in pairs], torch.cat(tokens), torch.cat(pooled)), cache.with_suffix(".part"))
            cache.with_suffix(".part").replace(cache)
            print(f"seen {number + 1} of {len(chunks)} chunks", flush=True)
        results.append(torch.load(cache))
    jobs = [job for part in results for job in part[0]]
    tokens, pooled = (torch.cat([part[i] for part in results]) for i in (1, 2))
    return {"jobs": jobs, "art": art, "tokens": tokens, "pooled": pooled}
