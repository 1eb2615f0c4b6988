"""Tiny models and data for tests: random weights, real code paths."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import capt
from capt.backbones import Backbone
from capt.data import CompositionalSet, DataSet, ImageSet, MultiLabelSet
from capt.data.compositional import build_compositional
from capt.data.multi_label import build_multi_label
from capt.data.sources import MemorySource
from capt.training import TrainingOptions

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    "cnn": {
        "timm_model_name": "mobilenetv2_035",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
}


@functools.cache
def backbone(kind: str = "vit", dim: int = 48, seed: int = 0) -> Backbone:
    """A wrapped open_clip model of a few thousand to a few hundred thousand parameters."""
    from capt.backbones._torchvision import import_torchvision

    import_torchvision()
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(embed_dim=dim, vision_cfg=VISION[kind], text_cfg=TEXT)
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=TEXT["context_length"])
    size = VISION[kind]["image_size"]
    preprocess = open_clip.image_transform(size, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    return capt.wrap(model.eval(), tokenizer, preprocess, name=f"tiny-{kind}")


CLASSES = ("cat", "dog", "fox", "wolf", "red car", "blue car", "tram", "bus", "apple")


def data_set(per_class: int = 6, size: int = 40, seed: int = 0) -> DataSet:
    """Nine classes of noisy two-colour images that a random tower confuses and that can be learned."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (len(CLASSES), 2, 3))

    images, labels = [], []
    for label in np.tile(np.repeat(np.arange(len(CLASSES)), per_class), 2):
        pixels = np.empty((size, size, 3))
        pixels[: size // 2], pixels[size // 2 :] = colours[label, 0], colours[label, 1]
        pixels += rng.normal(0, 40, pixels.shape)
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        labels.append(int(label))
    both = ImageSet.from_images(images, labels, CLASSES)
    half = len(images) // 2
    return DataSet("tiny", both.subset(np.arange(half)), None, both.subset(np.arange(half, 2 * half)), CLASSES)


STATES, OBJECTS = ("blue", "green", "red"), ("cat", "dog", "fox")
SEEN = (("blue", "cat"), ("red", "dog"), ("green", "fox"), ("red", "cat"), ("blue", "dog"))
UNSEEN = {"val": (("green", "cat"), ("blue", "fox")), "test": (("green", "dog"), ("red", "fox"))}


def compositional_set(per_pair: int = 3, size: int = 40, seed: int = 0) -> CompositionalSet:
    """Three states (colour of the upper half) times three objects (of the lower half); five of the pairs are seen."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (2, 3, 3))
    images: dict[str, bytes | Image.Image] = {}
    members: dict[str, list[tuple[str, tuple[str, str]]]] = {}
    lists = {"train": SEEN, **{split: (*SEEN[:3], *unseen) for split, unseen in UNSEEN.items()}}
    for split, pairs in lists.items():
        members[split] = []
        for state, thing in pairs:
            for number in range(per_pair):
                pixels = rng.normal(0, 30, (size, size, 3))
                pixels[: size // 2] += colours[0, STATES.index(state)]
                pixels[size // 2 :] += colours[1, OBJECTS.index(thing)]
                name = f"{split}/{state}-{thing}-{number}.png"
                images[name] = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                members[split].append((name, (state, thing)))
    return build_compositional("tiny-pairs", lists, members, MemorySource(images))


SHAPES = ("red circle", "blue square", "green triangle", "gold square", "pink_circle", "gray triangle")


def shape_set(n_train: int = 60, n_other: int = 20, size: int = 40, seed: int = 0) -> MultiLabelSet:
    """Coloured shapes, the later in ``SHAPES`` the rarer; up to four a picture, some pictures show none."""
    rng = np.random.default_rng(seed)
    images: dict[str, bytes | Image.Image] = {}
    members: dict[str, list[tuple[str, list[int]]]] = {}
    half = size // 2
    for split, number in (("train", n_train), ("val", n_other), ("test", n_other)):
        members[split] = []
        for place in range(number):
            shown = np.flatnonzero(rng.random(len(SHAPES)) < 0.6 * 0.75 ** np.arange(len(SHAPES)))[:4]
            picture = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(picture)
            for label, corner in zip(shown, rng.permutation(4).tolist(), strict=False):
                colour, shape = SHAPES[label].replace("_", " ").split()
                draw.regular_polygon(
                    (half // 2 + half * (corner % 2), half // 2 + half * (corner // 2), half // 2 - 1),
                    {"circle": 16, "square": 4, "triangle": 3}[shape],
                    fill=colour,
                )
            name = f"{split}/{place}.png"
            images[name] = picture
            members[split].append((name, shown.tolist()))
    return build_multi_label("tiny-shapes", SHAPES, members, MemorySource(images))


def one_cycle(epochs: int, batch_size: int = 16, lr: float = 5e-3, **options: Any) -> TrainingOptions:
    """CPRFL's schedule for tiny models."""
    return TrainingOptions(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=1e-4, schedule="one-cycle", clip_norm=0.0, **options
    )
