"""PromptKD: a student image tower learns a teacher's answers to unlabelled images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.backbones import TokenGrid, TokenTower, load
from capt.errors import CaptError
from capt.files import read_json
from capt.methods.base.model import BaseConfig, BaseModel, ZeroShot
from capt.methods.base.registry import load_base
from capt.modules.prompts import PromptedTower
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone


@dataclass(frozen=True)
class PromptKDConfig(BaseConfig):
    """Settings of PromptKD, as published for most data sets.

    Attributes:
        teacher: what teaches: empty for the student's own backbone as it is, a model name of
            :func:`capt.backbones.load`, or the folder of a fitted base model.
        teacher_model: name of a fitted teacher's backbone; empty: the student's own.
        teacher_pretrained: weights of the teacher's backbone.
        n_ctx: learned tokens of a set in the student's image tower; towers without blocks have none.
        depth: sets: one at the input, then one at each block; 0: none.
        weight: of the divergence; published: 200 for FGVCAircraft, Flowers102 and DTD, else 1000.
        temperature: softens both answers.
    """

    teacher: str = ""
    teacher_model: str = ""
    teacher_pretrained: str | None = None
    n_ctx: int = 4
    depth: int = 9
    weight: float = 1000.0
    temperature: float = 1.0
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=8, optimizer="sgd", lr=5e-3, weight_decay=5e-4, warmup_epochs=1.0, clip_norm=0.0
        )
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise CaptError(f"temperature: expected more than 0, found {self.temperature}")


class Projector(nn.Module):
    """Linear, batch norm, ReLU, linear: pooled features [B, d_s] into another joint space, float32 [B, d_t]."""

    def __init__(self, width: int, dim: int) -> None:
        """``width``: d_s. ``dim``: d_t."""
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        x = self.into(features.float())
        if self.training and len(x) == 1:  # has no statistics of its own: the last batch of an epoch may be one image
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = self.norm(x)
        projected: Tensor = self.out(F.relu(x))
        return projected


class ProjectedTower(TokenTower):
    """A tower whose pooled feature goes through a projector, so that :attr:`dim` is the projector's."""

    def __init__(self, inner: TokenTower, projector: Projector) -> None:
        self.inner, self.projector, self.dim = inner, projector, projector.out.out_features
        self.image_hw, self.grid, self.width = inner.image_hw, inner.grid, inner.width
        self.n_prefix, self.blocks, self.activation = inner.n_prefix, inner.blocks, inner.activation

    def _embed(self, images: Tensor) -> Tensor:
        return self.inner.embed(images)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens after all blocks [B, n_prefix + H*W, D] to un-normalised features [B, d_t]."""
        projected: Tensor = self.projector(self.inner.project(tokens))
        return projected

    def stages(self, images: Tensor, depths: Sequence[int] | None = None) -> list[TokenGrid]:
        """Those of the wrapped tower."""
        return self.inner.stages(images, depths)


class PromptKD(BaseModel):
    """Student image tower with visual prompts and a projector; class texts, scale and joint space are the teacher's.

    The loss is ``weight * T^2 * sum KL(softmax(z_t / T) || softmax(z_s / T)) / (B C)`` over the classes it is made for.
    No label is read. Those classes and images may therefore include novel ones (transductive; whoever does so has to
    say it), and the teacher may be any base model.

    While it learns, the frozen inputs carry the teacher's image feature along, so the teacher sees each view once.

    Attributes:
        teacher: frozen base model; its learned state is stored in ``teacher`` beside the student's.
        projector: :class:`Projector` from d_s to d_t.
        visual: prompts, float32 [depth, n_ctx, D], or None.

    Source: PromptKD (arXiv 2403.03093); its first epoch at a constant rate of 1e-5 is a linear warm-up here.
    """

    kind = "promptkd"
    uses_labels = False
    config_type = PromptKDConfig
    config: PromptKDConfig

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], config: PromptKDConfig | None = None, *,
        teacher: BaseModel | None = None,
    ) -> None:  # fmt: skip
        """A student that knows nothing yet.

        Args:
            teacher: in place of the one that ``config`` names; several students may share it.

        Raises:
            CaptError: the given teacher has another backbone that ``config`` does not name.
            DataError, DamagedFileError, CaptError: the named teacher cannot be opened.
        """
        super().__init__(backbone, class_names, config)
        named = self.config.teacher_model or self.config.teacher
        if teacher is not None and not named and teacher.backbone.fingerprint() != backbone.fingerprint():
            raise CaptError(
                f"teacher: its backbone '{teacher.backbone.name}' is not the student's; name it in teacher_model and "
                "teacher_pretrained, or a stored student could not be opened again"
            )
        self.teacher = (teacher or _opened(self.config, backbone, self.class_names)).finish()
        self._prompted: PromptedTower | None = None
        if backbone.tower.blocks and self.config.depth:
            self._prompted = PromptedTower(backbone.tower, self.config.n_ctx, self.config.depth, device=backbone.device)
        self.visual = None if self._prompted is None else self._prompted.prompts
        self.projector = Projector(backbone.dim, self.teacher.dim).to(backbone.device)
        self._tower = ProjectedTower(self._prompted or backbone.tower, self.projector)
        inner = backbone.tower
        self._length = backbone.dim if self._prompted is None else inner.n_prefix + inner.grid[0] * inner.grid[1]

    @classmethod
    def stored(cls, folder: Path, backbone: Backbone, class_names: Sequence[str], config: BaseConfig) -> PromptKD:
        """With the teacher that was stored beside it, over the student's backbone or the one that ``config`` names."""
        assert isinstance(config, PromptKDConfig)
        name = config.teacher_model or config.teacher
        known = read_json(folder / "teacher" / "base.json").get("backbone") == backbone.fingerprint()
        opened = backbone if known or not name else load(name, config.teacher_pretrained, device=backbone.device)
        return cls(backbone, class_names, config, teacher=load_base(folder / "teacher", opened))

    # ---- the model -----------------------------------------------------------------------------------

    @property
    def tower(self) -> TokenTower:
        """The student's image tower with prompts and projector, d_t wide."""
        return self._tower

    @property
    def text_backbone(self) -> Backbone:
        """The teacher's."""
        return self.teacher.text_backbone

    @property
    def logit_scale(self) -> Tensor:
        """The teacher's, float32 scalar tensor."""
        return self.teacher.logit_scale

    @property
    def learns(self) -> bool:
        """Not finished yet."""
        return self.projector.out.weight.requires_grad

    def inputs(self, images: Tensor) -> Tensor:
        """Tokens [B, L, D] in front of the first block; image features [B, d_s] of a tower without prompts.

        While the student learns, the teacher's un-normalised features follow along dimension 1: as d_t numbers behind
        features, as ceil(d_t / D) rows (filled up with zeros) behind tokens.
        """
        with torch.no_grad():
            images = images.to(self.backbone.device, self.backbone.dtype)
            own = super().inputs(images) if self._prompted is None else self._prompted.inner.embed(images)
            if not self.learns:
                return own
            taught = self.teacher.features(self.teacher.inputs(self._for_teacher(images)))
            if own.ndim == 3:
                width = own.shape[2]
                taught = F.pad(taught, (0, -taught.shape[1] % width)).unflatten(1, (-1, width))
            return torch.cat([own, taught.to(own.dtype)], dim=1)

    def _for_teacher(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] of the student's transform with the teacher's normalisation and size."""
        own, its = self.backbone.train_transform, self.teacher.backbone.train_transform
        if (own.size, own.mean, own.std) == (its.size, its.mean, its.std):
            return images
        mean, std, its_mean, its_std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (own.mean, own.std, its.mean, its.std)
        )
        images = images.float() * std + mean
        if own.size != its.size:
            images = F.interpolate(images, its.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - its_mean) / its_std

    def features(self, inputs: Tensor) -> Tensor:
        """Un-normalised features [B, d_t] of :meth:`inputs`, with gradients to prompts and projector."""
        own = inputs[:, : self._length]
        if self._prompted is not None:
            own = self._prompted.project(self._prompted.advance(self._prompted.begin(own)))
        projected: Tensor = self.projector(own)
        return projected

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """The teacher's class texts [C, d_t] of any class names."""
        with torch.no_grad():
            return self.teacher.class_text_features(class_names)

    # ---- training ------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """``loss`` and ``divergence``, the mean over the images of what the student's answer lacks of the teacher's.

        Args:
            inputs: made while the student learns.
            labels: not looked at.
        """
        taught = inputs[:, self._length :].flatten(1)[:, : self.teacher.dim]
        if taught.shape[1] != self.teacher.dim:
            raise CaptError("losses: these inputs were made by a finished student; make them by one that still learns")
        text = self.class_text_features(self.class_names)
        temperature = self.config.temperature
        with torch.no_grad():
            answer = F.log_softmax(self.teacher.logits(taught.float(), self.class_names, text) / temperature, dim=-1)
        own = F.log_softmax(self.logits(self.features(inputs), self.class_names, text) / temperature, dim=-1)
        divergence = F.kl_div(own, answer, log_target=True, reduction="batchmean")
        return {
            "loss": self.config.weight * temperature**2 / len(self.class_names) * divergence,
            "divergence": divergence.detach(),
        }

    def train(self, mode: bool = True) -> PromptKD:
        """Training mode until the student is finished; then its batch norm must not move either."""
        super().train(mode and self.learns)
        self.teacher.eval()
        return self

    # ---- storage -------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hexadecimal digest of student and teacher."""
        both = f"{super().fingerprint()}|{self.teacher.fingerprint()}"
        return hashlib.blake2b(both.encode(), digest_size=32).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the student into ``folder`` and the teacher into ``folder/teacher``."""
        self.teacher.save(Path(folder) / "teacher")
        super().save(folder)


def _opened(config: PromptKDConfig, backbone: Backbone, class_names: Sequence[str]) -> BaseModel:
    """The teacher that ``config`` names."""
    if not config.teacher:
        return ZeroShot(backbone, class_names)
    name, folder, device = config.teacher_model, Path(config.teacher), backbone.device
    if (folder / "base.json").is_file():
        return load_base(folder, load(name, config.teacher_pretrained, device=device) if name else backbone)
    return ZeroShot(load(config.teacher, config.teacher_pretrained, device=device), class_names)
