"""Training steps as they are published, restated in eager PyTorch; every cost can be switched off.

``port``: the loops of a third-party port of the method: one visit of Python for every (image, pair), each reading
values on the host, and one for every image in the contrastive loss. What can be cached is.

``released``: the step of the released trainer. Per step: class texts through the text tower, twice (a student's with
gradient, a teacher's without); per image: the index file parsed as JSON, the hardest classes picked by comparing
entries of a tensor with a list; for every such class one image read, prepared and encoded; a symmetric InfoNCE.
Its image prompts are left out, since a convolutional tower has none: the image tower runs forward only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt import CAPT, ConfusionBank
from capt.backbones import Backbone
from capt.data import ImageSet


def port_retrieval(
    bank: ConfusionBank, features: Tensor, pseudo: Tensor, confusing: Tensor, exclude: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities and rows [B, k, 1] as ``ConfusionBank.search`` with m = 1, pair by pair."""
    scores, rows = torch.full((*confusing.shape, 1), float("-inf")), torch.full((*confusing.shape, 1), -1)
    for b in range(len(features)):
        for j in range(confusing.shape[1]):
            p, i, own = int(pseudo[b]), int(confusing[b, j]), int(exclude[b])
            other = bank.sample_ids != own
            here = ((bank.predictions == p) & (bank.labels == i)) | ((bank.predictions == i) & (bank.labels == p))
            cell = torch.nonzero(here & other).squeeze(1)
            if not len(cell):
                cell = torch.nonzero((bank.predictions == p) & other).squeeze(1)
            if len(cell):
                similarity = bank.features[cell] @ features[b]
                best = int(similarity.argmax())
                scores[b, j, 0], rows[b, j, 0] = similarity[best], cell[best]
    return scores, rows


def port_text_to_image(logits: Tensor, labels: Tensor) -> Tensor:
    """The text-to-image InfoNCE, image by image."""
    losses = []
    for b in range(len(labels)):
        y = int(labels[b])
        rivals = [n for n in range(len(labels)) if n == b or int(labels[n]) != y]
        losses.append(torch.logsumexp(logits[rivals, y], 0) - logits[b, y])
    return torch.stack(losses).mean()


class Port:
    """CAPT's step with the loops in place of the bank's search and of the contrastive loss; the same value."""

    def __init__(self, model: CAPT) -> None:
        self.model = model
        self.search, self.contrast = model.sample.retrieve, model.loss.forward

    def __enter__(self) -> None:
        def retrieve(bank: ConfusionBank, features: Tensor, semantic: object, ids: Tensor) -> tuple[Tensor, Tensor]:
            found = port_retrieval(bank, features.detach(), semantic.pseudo, semantic.confusing, ids)  # type: ignore[attr-defined]
            return found[0].flatten(1), found[1].flatten(1)

        def contrast(features: Tensor, text: Tensor, labels: Tensor, confusing: Tensor, scale: Tensor, **rest: Tensor):
            parts = self.contrast(features, text, labels, confusing, scale, **rest)
            looped = port_text_to_image(scale * features @ text.T, labels)
            total = parts.total + self.model.loss.weight * self.model.loss.parts[1] * (looped - parts.text_to_image)
            return type(parts)(total, parts.cross_entropy, parts.image_to_text, looped, parts.representatives)

        self.model.sample.retrieve = retrieve  # type: ignore[method-assign,assignment]
        self.model.loss.forward = contrast  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self.model.sample.retrieve, self.model.loss.forward = self.search, self.contrast  # type: ignore[method-assign]


@dataclass(frozen=True)
class Costs:
    """What the released step pays for; False: it is cached or left out.

    Attributes:
        index_file: parse the index file once for every image.
        text_tower: class texts anew, student's and teacher's.
        read_images: read and prepare the images of the hard classes (else they are kept as pixels).
        encode_images: batch and hard images through the image tower (else their features are kept).
    """

    index_file: bool = True
    text_tower: bool = True
    read_images: bool = True
    encode_images: bool = True


def index_text(images: ImageSet) -> str:
    """An index file as released: for every class its label and image paths; both lists of it, train and val."""
    entries: dict[str, list[object]] = {name: [label, []] for label, name in enumerate(images.classes)}
    for name, label in zip(images.names, images.labels, strict=True):
        entries[images.classes[label]][1].append(name)  # type: ignore[attr-defined]
    wrapped = {name: [value] for name, value in entries.items()}
    objects = [{"impath": n, "label": int(y)} for n, y in zip(images.names, images.labels, strict=True)]
    return json.dumps({"train": wrapped, "val": wrapped, "train_obj_list": objects, "val_obj_list": []})


class Released:
    """The released step over a wrapped CLIP; ``step`` runs forward, backward and the update."""

    def __init__(
        self, backbone: Backbone, images: ImageSet, index: Path, costs: Costs,
        read: Callable[[Sequence[int]], Tensor], kept_pixels: Tensor, kept_features: Tensor,
    ) -> None:  # fmt: skip
        """``read``: positions to pixels, from the files; ``kept_pixels``, ``kept_features``: all that it would give."""
        self.backbone, self.images, self.index, self.costs, self.read = backbone, images, index, costs, read
        prompts = backbone.embed_prompts([f"a photo of a {name}." for name in images.classes])
        self.embeddings, self.ends = prompts.embeddings.detach(), prompts.eot_index
        self.context = nn.Parameter(self.embeddings[0, 1:5].clone())
        d = backbone.dim
        self.projector = nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, d))
        self.optimizer = torch.optim.SGD([self.context, *self.projector.parameters()], lr=2e-3, momentum=0.9)
        self.random = random.Random(0)
        self.by_class = [[n for n, y in enumerate(images.labels) if y == c] for c in range(len(images.classes))]
        self.kept_text = backbone.text_features(prompts).detach()
        self.kept_index = json.loads(index.read_text(encoding="utf-8"))
        self.kept_pixels, self.kept_features = kept_pixels, kept_features

    def hard_classes(self, batch: Tensor) -> list[int]:
        """2 to 8 further classes an image, none twice in a batch while there are others."""
        with torch.no_grad():
            scores = 100 * F.normalize(self.kept_features[batch], dim=-1) @ self.kept_text.T
        used, found = [int(y) for y in self.images.labels[batch.numpy()]], []
        for b in range(len(batch)):
            index = self.kept_index
            if self.costs.index_file:
                index = json.loads(self.index.read_text(encoding="utf-8"))
            names = list(index["train"])
            mine = [c for c in scores[b].softmax(-1).topk(8).indices if c not in used]
            while len(mine) < 2:
                mine.append(torch.tensor(self.random.randrange(1, len(names))))
            used += [int(c) for c in mine]
            found += [int(c) for c in mine]
        return found

    def step(self, batch: Tensor) -> None:
        """One step on positions int64 [B]."""
        classes = self.hard_classes(batch)
        positions = [*batch.tolist(), *(self.random.choice(self.by_class[c]) for c in classes)]
        with torch.no_grad():
            if self.costs.encode_images:
                extra = positions[len(batch) :]
                hard = self.read(extra) if self.costs.read_images else self.kept_pixels[extra]
                raw = self.backbone.image_features(torch.cat([self.kept_pixels[batch], hard]))
            else:
                raw = self.kept_features[positions]
        text = self.kept_text
        if self.costs.text_tower:
            with torch.no_grad():
                self.backbone.encode_embedded(self.embeddings, self.ends)
            embedded = self.embeddings.clone()
            embedded[:, 1:5] = self.context
            text = F.normalize(self.backbone.encode_embedded(embedded, self.ends), dim=-1)
        labels = torch.tensor([int(self.images.labels[p]) for p in positions])
        logits = 100 * F.normalize(self.projector(raw), dim=-1) @ text[labels].T
        target = torch.arange(len(labels))
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
