"""What every base model offers, and the simplest of them: zero-shot CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError, DamagedFileError
from capt.files import load_tensors, read_json, save_tensors, write_json
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone, TokenTower

_SCHEMA = 1


@dataclass(frozen=True)
class BaseConfig:
    """Settings of a base model; each model derives its own.

    Attributes:
        views: augmented views a training image, beside the plain one; all are encoded once and kept.
        training: optimiser, schedule, batch size.
    """

    views: int = 2
    training: TrainingOptions = field(default_factory=TrainingOptions)


class BaseModel(nn.Module):
    """A CLIP model, tuned or not, seen as: frozen inputs, image features, class texts, logits.

    ``logits = scale * normalize(features(inputs(images))) @ class_text_features(names).T + extra_logits(...)``.
    Nothing that is stored depends on the number of classes unless the model says so (``class_bound``).

    Attributes:
        kind: name of the model in commands and records.
        class_bound: what was learned belongs to the training classes; other classes get zero-shot treatment.
        uses_labels: False for models that learn from unlabelled images.
        backbone: the wrapped, frozen CLIP.
        class_names: classes it is trained on.
        config: its settings.
    """

    kind: ClassVar[str] = ""
    class_bound: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = True
    config_type: ClassVar[type[BaseConfig]] = BaseConfig

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: BaseConfig | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_names = tuple(class_names)
        self.config = config or self.config_type()

    # ---- the model -----------------------------------------------------------------------------------

    @property
    def tower(self) -> TokenTower:
        """Image tower, with visual prompts where the model has any; its output width is :attr:`dim`."""
        return self.backbone.tower

    @property
    def text_backbone(self) -> Backbone:
        """The backbone whose plain text tower lives in the joint space (a student borrows its teacher's)."""
        return self.backbone

    @property
    def dim(self) -> int:
        """d, width of the joint space."""
        return self.tower.dim

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosines, float32 scalar tensor."""
        return self.text_backbone.logit_scale

    def inputs(self, images: Tensor) -> Tensor:
        """What :meth:`features` takes, of transformed images float [B, 3, H, W]: frozen, so it may be cached.

        Default: un-normalised image features [B, d] of the backbone.
        """
        with torch.no_grad():
            return self.backbone.image_features(images)

    def features(self, inputs: Tensor) -> Tensor:
        """Un-normalised image features [B, d] of :meth:`inputs`, with gradients to what is trained."""
        return inputs

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """Unit-norm class texts [C, d] of any class names; with gradients to what is trained."""
        return self.backbone.class_text_features(class_names)

    def for_classes(self, class_names: Sequence[str]) -> BaseModel:
        """The model that judges images among these classes: itself, unless new classes are left to another."""
        return self

    def extra_logits(self, features: Tensor, class_names: Sequence[str]) -> Tensor | None:
        """Logits [B, C] that are added to the scaled cosines, such as a cache's; None: nothing.

        ``features``: float [B, d], un-normalised.
        """
        return None

    def logits(self, features: Tensor, class_names: Sequence[str], text_features: Tensor | None = None) -> Tensor:
        """Logits [B, C] of un-normalised features [B, d].

        ``text_features``: those of ``class_names``, where they are known already.
        """
        text = self.class_text_features(class_names) if text_features is None else text_features
        cosines = self.logit_scale * F.normalize(features, dim=-1) @ text.T
        extra = self.extra_logits(features, class_names)
        return cosines if extra is None else cosines + extra

    def forward(self, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
        """Logits [B, C] of transformed images [B, 3, H, W]; default: the training classes."""
        return self.logits(self.features(self.inputs(images)), class_names or self.class_names)

    # ---- training ------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def prepare(self, inputs: Callable[[Tensor], Tensor], labels: Tensor) -> None:
        """Called once before training.

        Args:
            inputs: positions int64 [n] -> :meth:`inputs` of those training images, evaluation transform.
            labels: int64 [N], all training labels.
        """

    def losses(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses of a batch: ``loss`` is minimised, the others are its parts. Default: cross-entropy."""
        return {"loss": F.cross_entropy(self.logits(self.features(inputs), self.class_names), labels)}

    def end_epoch(self, epoch: int, epochs: int) -> None:
        """Called after epoch 1, 2, ... ``epochs``."""

    def finish(self) -> BaseModel:
        """Called after the last epoch: nothing learns from here on."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BaseModel:
        """Training mode of the trained parts; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    # ---- storage -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What was learned, by name: everything but the frozen backbones."""
        return {
            name: value for name, value in self.state_dict().items() if not name.startswith(("backbone.", "teacher."))
        }

    def fingerprint(self) -> str:
        """Hexadecimal digest of the backbone and of what was learned; the backbone's own if that is nothing."""
        state = self.state()
        if not state:
            return self.backbone.fingerprint()
        digest = hashlib.blake2b(f"{self.kind}|{self.backbone.fingerprint()}".encode(), digest_size=32)
        for name in sorted(state):
            digest.update(name.encode())
            digest.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``base.json`` and ``base.safetensors`` into ``folder``."""
        folder = Path(folder)
        state = self.state()
        record: dict[str, Any] = {
            "schema": _SCHEMA, "kind": self.kind, "config": asdict(self.config), "class_names": list(self.class_names),
            "backbone": self.backbone.fingerprint(),
        }  # fmt: skip
        if state:
            record["sha256"] = save_tensors(folder / "base.safetensors", state)
        write_json(folder / "base.json", record)

    @classmethod
    def stored(cls, folder: Path, backbone: Backbone, class_names: Sequence[str], config: BaseConfig) -> BaseModel:
        """The model that is about to :meth:`restore` from ``folder``, freshly made."""
        return cls(backbone, class_names, config)

    def restore(self, folder: Path, record: dict[str, Any]) -> None:
        """Read what :meth:`save` wrote into this freshly made model.

        Raises:
            DamagedFileError: the tensors were changed or are not this model's.
        """
        state = load_tensors(folder / "base.safetensors", record["sha256"]) if "sha256" in record else {}
        own = self.state()
        if state.keys() != own.keys() or any(state[name].shape != value.shape for name, value in own.items()):
            raise DamagedFileError(
                f"'{folder / 'base.safetensors'}': its tensors are not those of a '{self.kind}' model with the "
                "recorded configuration; fit it again"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])


class ZeroShot(BaseModel):
    """The backbone as it is, with the prompt ensemble of its templates. Nothing learns."""

    kind = "zero-shot"


def read_record(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """``base.json`` of a stored base model.

    Raises:
        DataError: there is none.
        DamagedFileError: it is of another format.
        CaptError: ``backbone`` is not the one it was made with.
    """
    record = read_json(folder / "base.json")
    if not isinstance(record, dict) or record.get("schema") != _SCHEMA or "kind" not in record:
        raise DamagedFileError(f"'{folder / 'base.json'}': not a base model of schema {_SCHEMA}; fit it again")
    if record.get("backbone") != backbone.fingerprint():
        raise CaptError(
            f"'{folder}': made with another backbone (fingerprint {str(record.get('backbone'))[:16]}..., this one has "
            f"{backbone.fingerprint()[:16]}...); give the same --model and --pretrained as in run.json"
        )
    return record
