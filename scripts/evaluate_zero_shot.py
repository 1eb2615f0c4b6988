"""Measure the shipped CLIP model zero-shot, through the plain open_clip API.

    python scripts/evaluate_zero_shot.py --work build/model-work          # emoji, emoji pairs and Tux Paint animals
    python scripts/evaluate_zero_shot.py --emoji-only                  # no download
    python scripts/evaluate_zero_shot.py --vit --emoji-only            # the ViT tower, loaded by this library
    python scripts/evaluate_zero_shot.py --clipart-only                # mean average precision on the clip art

Emoji: the classes of `capt/assets/emoji`, none of which entered the fit, in every style. Emoji pairs: test images of
`capt/assets/emoji_pairs`, among the training and the unseen test pairs (closed world). Tux Paint: 146 animal
pictures of the Debian package `tuxpaint-stamps-default` (unpacked, never shipped), each to be matched with its caption.
Clip art: test images of `capt/assets/clipart`, ranked for each class; mean average precision by training frequency.
What is printed is also written as JSON with `--json`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model.encoders import allow_torchvision
from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "capt" / "assets"
STAMPS, STAMPS_VERSION = "tuxpaint-stamps-default", "2022.06.04-1"
SUBSET, SEED = 239, 0


class Clip:
    """A checkpoint folder loaded by stock open_clip, with its default prompt templates."""

    def __init__(self, folder: Path):
        allow_torchvision()
        import open_clip

        config = json.loads((folder / "open_clip_config.json").read_text())
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "capt-lite2.json").write_text(json.dumps(config["model_cfg"]))
            open_clip.add_model_config(place)
            values = config["preprocess_cfg"]
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                "capt-lite2", pretrained=str(folder / "capt-lite2.safetensors"), image_mean=tuple(values["mean"]),
                image_std=tuple(values["std"]), image_interpolation=values["interpolation"],
                image_resize_mode=values["resize_mode"])  # fmt: skip
            self.tokenizer = open_clip.get_tokenizer("capt-lite2")
        self.model.eval()
        self.templates = json.loads((folder / "templates.json").read_text())["templates"]

    @torch.inference_mode()
    def texts(self, names: list[str], templates: list[str]) -> torch.Tensor:
        """Unit class embeddings [C, D], the mean over the templates."""
        rows = [F.normalize(self.model.encode_text(self.tokenizer([t.format(n) for n in names])), dim=-1)
                for t in templates]  # fmt: skip
        return F.normalize(torch.stack(rows).mean(0), dim=-1)

    @torch.inference_mode()
    def images(self, images: list[Image.Image], batch: int = 32) -> torch.Tensor:
        """Unit image embeddings [N, D]."""
        rows = [self.model.encode_image(torch.stack([self.preprocess(im) for im in images[i : i + batch]]))
                for i in range(0, len(images), batch)]  # fmt: skip
        return F.normalize(torch.cat(rows), dim=-1)


class VitClip(Clip):
    """The ViT image tower with the text tower of the shipped model, put together by this library."""

    def __init__(self, folder: Path):
        from capt.backbones.embedded import load_vit

        self.model, self.tokenizer, self.preprocess, self.templates = load_vit(folder)
        self.model.eval()


def on_white(image: Image.Image, margin: float = 0.06) -> Image.Image:
    """A picture with alpha on a white square with a small margin."""
    image = image.convert("RGBA")
    side = int(max(image.size) * (1 + 2 * margin))
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground.convert("RGB")


def accuracy(logits: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in per cent; `right` is a boolean [N, C] that marks every correct class."""
    hits = right.gather(1, logits.topk(5, dim=1).indices)
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


def emoji(clip: Clip, folder: Path) -> list[dict]:
    """The three emoji measurements."""
    index = json.loads((folder / "index.json").read_text())
    names = [entry["name"] for entry in index["classes"]]
    split = {vendor["name"]: vendor["split"] for vendor in index["vendors"]}
    pictures, labels, test = [], [], []
    for vendor in split:
        with tarfile.open(folder / f"{vendor}.tar") as tar:
            for entry in (entry for entry in index["images"] if entry["vendor"] == vendor):
                data = tar.extractfile(f"{entry['key']}.webp").read()
                pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
                labels.append(entry["class"])
                test.append(split[vendor] == "test")
    began = time.time()
    rows, heads = clip.images(pictures), clip.texts(names, clip.templates)
    print(f"{len(pictures)} emoji in {time.time() - began:.0f} s", flush=True)
    labels, test = torch.tensor(labels), torch.tensor(test)
    chosen = sorted(random.Random(SEED).sample(range(len(names)), SUBSET))
    results = []
    for title, mask, classes in (
        (f"emoji, all {len(names)} classes, test styles", test, list(range(len(names)))),
        (f"emoji, all {len(names)} classes, all styles", torch.ones_like(test), list(range(len(names)))),
        (f"emoji, {SUBSET} classes drawn with seed {SEED}, all styles",
         torch.isin(labels, torch.tensor(chosen)), chosen),
    ):  # fmt: skip
        columns = torch.tensor(classes)
        top1, top5 = accuracy(rows[mask] @ heads[columns].T, labels[mask][:, None] == columns[None])
        results.append({"test": title, "images": int(mask.sum()), "classes": len(classes), "top1": round(top1, 1),
                        "top5": round(top5, 1)})  # fmt: skip
    return results


def emoji_pairs(clip: Clip) -> list[dict]:
    """Test images of the shipped compositional set, zero-shot; seen and unseen pairs compete without a bias.

    Some drawings entered the fit of the shipped model, which left out only the classes of the emoji set.
    """
    from capt.data import load_compositional

    data = load_compositional("emoji-pairs")
    candidates = sorted({*data.split_pairs["train"].tolist(), *data.split_pairs["test"].tolist()})
    rows = clip.images([data.test.image(index) for index in range(len(data.test))])
    heads = clip.texts([data.data.classes[pair] for pair in candidates], ["a photo of a {}."])
    right = torch.tensor(data.test.labels)[:, None] == torch.tensor(candidates)[None]
    seen = torch.tensor(data.seen)[torch.tensor(data.test.labels)]
    drawn = json.loads((ASSETS / "model" / "fit_manifest.json").read_text())["emoji"]
    names = (name.removesuffix(".webp").split("/") for name in data.test.names)
    fitted = torch.tensor([vendor in drawn.get(key, ()) for vendor, key in names])
    results = []
    for title, mask in (("all images", fitted | ~fitted), ("images of seen pairs", seen),
                        ("images of unseen pairs", ~seen), ("images outside the fit", ~fitted)):  # fmt: skip
        top1, top5 = accuracy(rows[mask] @ heads.T, right[mask])
        results.append({"test": f"emoji pairs, closed world, {title}", "images": int(mask.sum()),
                        "classes": len(candidates), "top1": round(top1, 1), "top5": round(top5, 1)})  # fmt: skip
    return results


def clipart(clip: Clip) -> list[dict]:
    """Mean average precision over the classes of the clip art, on all test images and on those outside the fit."""
    from capt.data import load_multi_label
    from capt.evaluation.multi_label import MultiLabelResult

    data = load_multi_label("clipart")
    rows = clip.images([data.test.image(index) for index in range(len(data.test))])
    scores = (rows @ clip.texts(list(data.classes), clip.templates).T).numpy()
    fit = {entry["path"] for entry in json.loads((ASSETS / "model" / "fit_manifest.json").read_text())["clip_art"]}
    index = json.loads((ASSETS / "clipart" / "index.json").read_text())
    fitted = {f"{entry['split']}/{entry['key']}.webp" for entry in index["images"] if fit & set(entry["files"])}
    outside = np.array([name not in fitted for name in data.test.names])
    results = []
    for title, mask in (("all", np.ones_like(outside)), ("outside the fit", outside)):
        found = MultiLabelResult.of(scores[mask], data.test.targets[mask], data.frequency)
        means = {group: 100 * found.mean(group) for group in ("total", "head", "medium", "tail")}
        results.append({"test": f"clip art, {title}", "images": int(mask.sum()),
                        "classes": len(data.classes) - len(found.excluded), **means})  # fmt: skip
    return results


def fetch_stamps(work: Path) -> Path:
    """Unpack the Tux Paint stamps (nothing is installed) and return the folder of the animals."""
    root = work / "deb" / "x" / STAMPS
    if not root.exists():
        (work / "deb").mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", f"{STAMPS}={STAMPS_VERSION}"], cwd=work / "deb", check=True)
        package = next((work / "deb").glob(f"{STAMPS}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root / "usr" / "share" / "tuxpaint" / "stamps" / "animals"


def animals(clip: Clip, work: Path) -> list[dict]:
    """Tux Paint animals, picture to caption; equal captions count as equally right."""
    paths = [path for path in sorted(fetch_stamps(work).rglob("*.png"))
             if path.with_suffix(".txt").exists() and not path.stem.endswith(("_mirror", "_flip"))]  # fmt: skip
    captions = [path.with_suffix(".txt").read_text(encoding="utf8", errors="replace").splitlines()[0].strip().lower()
                for path in paths]  # fmt: skip
    rows = clip.images([on_white(Image.open(path)) for path in paths])
    right = torch.tensor([[a == b for b in captions] for a in captions])
    results = []
    for title, templates in (("caption as it is", ["{}"]), ("default templates", clip.templates)):
        top1, top5 = accuracy(rows @ clip.texts([c.rstrip(".!") for c in captions], templates).T, right)
        results.append({"test": f"Tux Paint animals, {title}", "images": len(paths), "classes": len(set(captions)),
                        "top1": round(top1, 1), "top5": round(top5, 1)})  # fmt: skip
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--vit", action="store_true", help="the folder is a ViT image tower without text tower")
    parser.add_argument("--emoji", type=Path, default=ASSETS / "emoji", help="folder of the emoji set")
    parser.add_argument("--work", type=Path, help="folder for downloads (needed for the Tux Paint animals)")
    parser.add_argument("--emoji-only", action="store_true")
    parser.add_argument("--clipart-only", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    args = parser.parse_args()
    if not args.emoji_only and not args.clipart_only and not args.work:
        parser.error("--work names the folder for the Tux Paint download; or give --emoji-only or --clipart-only")
    clip = VitClip(args.model or ASSETS / "vit") if args.vit else Clip(args.model or ASSETS / "model")
    if args.clipart_only:
        print("| test | images | classes | mAP % | head | medium | tail |\n| --- | --- | --- | --- | --- | --- | --- |")
        for r in clipart(clip):
            values = " | ".join(f"{r[key]:.1f}" for key in ("total", "head", "medium", "tail"))
            print(f"| {r['test']} | {r['images']} | {r['classes']} | {values} |")
        return
    results = emoji(clip, args.emoji) + emoji_pairs(clip) + ([] if args.emoji_only else animals(clip, args.work))
    print(f"templates: {clip.templates}")
    print("| test | images | classes | top-1 % | top-5 % |\n| --- | --- | --- | --- | --- |")
    for r in results:
        print(f"| {r['test']} | {r['images']} | {r['classes']} | {r['top1']:.1f} | {r['top5']:.1f} |")
    if args.json:
        record = {"templates": clip.templates, "seed": SEED, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
