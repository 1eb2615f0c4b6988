"""Fit the ViT image tower that shares the shipped model's text tower and write it to `capt/assets/vit`.

    python scripts/fit_vit_tower.py --work build/model-work --seconds 1800

Stages, each resumed from what it left in `WORK/vit`: the pictures as the frozen blocks and the teacher see them, a
linear start of the projection, distillation of the last blocks, assembly. `--assemble-only` packs the last checkpoint
at any time. `--held-out` writes nothing: every fifth emoji concept is kept from teacher and student, and the drawings
of these are classified among their names. See docs/model.md for the packages it needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from fit_embedded_model import anchors, write_checksums
from model import vit_export, vit_pictures, vit_start, vit_student, vit_train
from model.encoders import allow_torchvision
from model.pictures import picture_features
from model.teacher import Fit, Settings, fit_teacher

from capt.backbones import load
from capt.backbones.embedded import embedded_vit_folder, load_folder

LAYERS, FROZEN = 10, 7
RIDGE = 3e-3  # of the linear start, relative to the mean variance of the features


def teacher_features(seen: dict) -> torch.Tensor:
    """What the shipped image tower makes of the pictures, unit rows [N, 512]."""
    head = load_folder().model.visual.head
    with torch.inference_mode():
        return F.normalize(head(seen["pooled"]), dim=-1)


def text_bank(seen: dict) -> torch.Tensor:
    """Unit features of ImageNet's names, the names of the fit's emoji and every second clip-art title."""
    allow_torchvision()
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    emoji = sorted({name.replace("-", " ") for kind, _, name in seen["jobs"] if kind == "emoji"})
    titles = sorted({seen["art"][name]["title"].lower() for kind, _, name in seen["jobs"] if kind == "art"})
    return load("embedded").class_text_features(list(dict.fromkeys([*IMAGENET_CLASSNAMES, *emoji, *titles[::2]])))


def held_out(work: Path, seen: dict) -> dict:
    """A teacher without every fifth emoji concept, and what is needed to score a student on those.

    Returns `targets` [N, 512], `rows` (what may be trained on), `bank`, `held` (pictures to classify), their `labels`
    and the `names` [C, 512] as the teacher's text side has them.
    """
    found = picture_features(work)
    data = anchors(work, found)
    held = torch.arange(len(data.emoji_text)) % 5 == 0
    number = torch.cumsum(~held, 0) - 1
    rows = ~held[data.emoji_concept]
    rest = Fit(data.emoji_features[rows], number[data.emoji_concept[rows]], data.emoji_text[~held],
               data.tags_text[~held], data.art_features, data.art_text, data.class_text, data.class_weight)  # fmt: skip
    blind = fit_teacher(rest, Settings())
    keys = sorted({key for _, key in found["emoji"]})
    place = {key: i for i, key in enumerate(keys)}
    concept = torch.tensor([place.get(name, -1) if kind == "emoji" else -1 for kind, _, name in seen["jobs"]])
    test = (concept >= 0) & held[concept.clamp_min(0)]
    column = torch.cumsum(held, 0) - 1
    bank = blind.text(torch.cat([data.class_text, data.emoji_text[~held], data.art_text[::2]]))
    return {"targets": blind.image(seen["pooled"]), "rows": (~test).nonzero()[:, 0], "bank": bank,
            "held": test.nonzero()[:, 0], "labels": column[concept[test]],
            "names": blind.text(data.emoji_text[held])}  # fmt: skip


def watcher(seen: dict, study: dict) -> Callable[[vit_train.Tail], str]:
    """Scores a student on the held-out concepts, beside the teacher."""
    targets = study["targets"][study["held"]]

    def score(rows: torch.Tensor) -> float:
        right = (rows @ study["names"].T).argmax(1) == study["labels"]
        return 100 * right.float().mean().item()

    def watch(tail: vit_train.Tail) -> str:
        rows = F.normalize(vit_train.run_tail(tail, seen["tokens"][study["held"]]).cpu(), dim=-1)
        scale, loss = vit_train.best_scale(rows @ study["names"].T, study["labels"])
        return (f"held out top-1 {score(rows):.1f} % (teacher {score(targets):.1f} %), "
                f"cosine {(rows * targets).sum(-1).mean():.3f}, best scale {scale:.0f} (loss {loss:.3f})")  # fmt: skip

    return watch


def manifest(seen: dict, seconds: float, scale: float | None) -> dict:
    """The record of what the fit saw, beyond what the shipped model's own manifest lists."""
    drawings: dict[str, list[str]] = {}
    for kind, vendor, name in seen["jobs"]:
        if kind == "drawing":
            drawings.setdefault(vendor, []).append(name)
    counts = {kind: sum(job[0] == kind for job in seen["jobs"]) for kind in ("emoji", "art", "drawing")}
    return {
        "version": 1, "model": vit_export.NAME, "layers": LAYERS, "frozen_layers": FROZEN, "pictures": counts,
        "seconds": seconds, "logit_scale": scale,
        "start": f"{vit_start.PACKAGE} {vit_start.VERSION}",
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "pillow", "numpy")},
        "sources": {v.name: f"{v.package} {v.version} ({v.license}), {v.authors}" for v in vit_pictures.DRAWINGS},
        "emoji_and_clip_art": "as in capt/assets/model/fit_manifest.json",
        "drawings": drawings,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and caches")
    parser.add_argument("--out", type=Path, default=embedded_vit_folder())
    parser.add_argument("--seconds", type=float, default=1800, help="time for the distillation")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the patch tokens that a step looks at")
    parser.add_argument("--scale", type=float, help="logit scale of its own; by default the shipped model's")
    parser.add_argument("--held-out", action="store_true", help="measure on held-out concepts, write no tower")
    parser.add_argument("--assemble-only", action="store_true", help="skip the distillation, use its last checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    visual = vit_student.new_visual(LAYERS)
    vit_start.start_from(visual, vit_start.pretrained())
    seen = vit_pictures.seen_pictures(args.work, visual, FROZEN, load_folder().model.visual.trunk, args.device)
    tail, file = vit_train.Tail(visual, FROZEN), args.work / "vit" / f"tail{'-held-out' * args.held_out}.pt"
    if args.assemble_only:
        tail.load_state_dict(torch.load(file))
    else:
        study = held_out(args.work, seen) if args.held_out else None
        targets = study["targets"] if study else teacher_features(seen)
        rows, bank = (study["rows"], study["bank"]) if study else (torch.arange(len(targets)), text_bank(seen))
        vit_train.linear_start(tail, seen["tokens"], targets, rows, RIDGE)
        watch = watcher(seen, study) if study else None
        if watch:
            print(f"linear start: {watch(tail)}", flush=True)
        tail = vit_train.train_tail(tail.to(args.device), seen["tokens"], targets, rows, bank.to(args.device),
                                    args.seconds, file, rate=args.rate, keep=args.keep, watch=watch)  # fmt: skip
        if watch:
            print(f"in the end: {watch(tail)}", flush=True)
            return
    tail.cpu().put_back(visual, FROZEN)
    vit_export.write_tower(args.out, visual, args.scale, manifest(seen, args.seconds, args.scale))
    write_checksums(args.out)


if __name__ == "__main__":
    main()
