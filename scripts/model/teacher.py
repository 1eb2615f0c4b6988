"""The closed-form teacher: a whitening on the image side, a kernel ridge regression on the text side.

Image side. x is the pooled EfficientNet-Lite2 feature of a picture, S a mix of the within-concept and the total
covariance of the fit's pictures: f(x) = normalise(S^-1/2 (x - mean)).

Text side. t is the MiniLM embedding of a text, k(t, s) = exp(gamma (cos(t, s) - 1)). Ridge regression maps t to the
picture space. Its targets are the mean f of an emoji over its styles, f of a clip-art picture, and for an ImageNet
class the prototype S^1/2 w read off the classifier's own weights, so no photo is used.

Both sides are cut to `dim` numbers by the SVD of the predicted targets, which leaves one linear layer on the image
side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    """Numbers of the fit, chosen on emoji concepts outside the evaluation set."""

    within: float = 0.8  # share of the within-concept covariance in S
    floor: float = 3e-3  # smallest eigenvalue of S relative to its largest
    gamma: float = 6.0
    ridge: float = 3.0
    weight_class: float = 4.0
    weight_emoji: float = 3.0
    weight_tags: float = 1.5
    weight_art: float = 1.0
    dim: int = 512


@dataclass
class Fit:
    """Everything the teacher is fitted on. Rows of `emoji_features` belong to concept `emoji_concept` (0..K-1)."""

    emoji_features: torch.Tensor  # [M, 1280]
    emoji_concept: torch.Tensor  # [M]
    emoji_text: torch.Tensor  # [K, 384]
    tags_text: torch.Tensor  # [K, 384]
    art_features: torch.Tensor  # [A, 1280]
    art_text: torch.Tensor  # [A, 384]
    class_text: torch.Tensor  # [C, 384]
    class_weight: torch.Tensor  # [C, 1280] rows of the ImageNet classifier


@dataclass
class Teacher:
    """Image side `normalise(project @ x + bias)`; text side `normalise(kernel(t) @ coefficients)`."""

    project: torch.Tensor  # [dim, 1280]
    bias: torch.Tensor  # [dim]
    anchors: torch.Tensor  # [N, 384]
    coefficients: torch.Tensor  # [N, dim]
    gamma: float

    def image(self, features: torch.Tensor) -> torch.Tensor:
        """Unit image embeddings [M, dim] of pooled features [M, 1280]."""
        return F.normalize(features @ self.project.T + self.bias, dim=-1)

    def text(self, embeddings: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
        """Unit text embeddings [M, dim] of MiniLM embeddings [M, 384]."""
        parts = [_kernel(F.normalize(part, dim=-1), self.anchors, self.gamma) @ self.coefficients
                 for part in embeddings.split(chunk)]  # fmt: skip
        return F.normalize(torch.cat(parts), dim=-1)

    def rotated_to(self, other: Teacher, embeddings: torch.Tensor) -> Teacher:
        """The same teacher in a basis as near as possible to another's on the texts `embeddings` [M, 384].

        A rotation of both sides changes no similarity; a text tower that has learnt `other` can go on with this one.
        """
        left, _, right = torch.linalg.svd(self.text(embeddings).T @ other.text(embeddings))
        turn = left @ right
        return Teacher(turn.T @ self.project, turn.T @ self.bias, self.anchors, self.coefficients @ turn, self.gamma)


def _kernel(a: torch.Tensor, b: torch.Tensor, gamma: float) -> torch.Tensor:
    return torch.exp(gamma * (a @ b.T - 1))


def _concept_means(rows: torch.Tensor, concept: torch.Tensor, count: int) -> torch.Tensor:
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, concept, rows)
    return sums / torch.bincount(concept, minlength=count).clamp_min(1)[:, None]


def fit_teacher(data: Fit, settings: Settings) -> Teacher:
    """Solve for the teacher."""
    count = len(data.emoji_text)
    pool = torch.cat([data.emoji_features, data.art_features])
    mean = pool.mean(0)
    residual = data.emoji_features - _concept_means(data.emoji_features, data.emoji_concept, count)[data.emoji_concept]
    within = residual.T @ residual / (len(residual) - count)
    spread = settings.within * within + (1 - settings.within) * torch.cov(pool.T)
    values, axes = torch.linalg.eigh(spread)
    whiten = axes * values.clamp_min(settings.floor * values.max()) ** -0.5

    def white(features: torch.Tensor) -> torch.Tensor:
        return F.normalize((features - mean) @ whiten, dim=-1)

    prototypes = F.normalize((data.class_weight - data.class_weight.mean(0)) @ spread @ whiten, dim=-1)
    concepts = _concept_means(white(data.emoji_features), data.emoji_concept, count)
    parts = [(data.class_text, prototypes, settings.weight_class), (data.emoji_text, concepts, settings.weight_emoji),
             (data.tags_text, concepts, settings.weight_tags),
             (data.art_text, white(data.art_features), settings.weight_art)]  # fmt: skip
    anchors = F.normalize(torch.cat([text for text, _, _ in parts]), dim=-1)
    targets = torch.cat([target for _, target, _ in parts])
    noise = torch.cat([torch.full((len(text),), settings.ridge / weight) for text, _, weight in parts])
    gram = _kernel(anchors, anchors, settings.gamma)
    coefficients = torch.cholesky_solve(targets, torch.linalg.cholesky(gram + torch.diag(noise)))
    predicted = gram @ coefficients
    _, directions = torch.linalg.eigh(predicted.T @ predicted)
    cut = directions.flip(1)[:, : settings.dim]
    coefficients = coefficients @ cut
    return Teacher((whiten @ cut).T.contiguous(), -(mean @ whiten @ cut), anchors, coefficients, settings.gamma)
