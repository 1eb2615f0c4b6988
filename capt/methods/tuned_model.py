"""A frozen backbone with something learned on top: its mode, its trained parameters, its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from capt.backbones import Backbone

_SCHEMA = 1


class TunedModel(nn.Module):
    """A CLIP model with trained parts, stored without the backbone.

    Attributes:
        kind: name of the model in commands and records.
        backbone: the wrapped, frozen CLIP.
        config: its settings, a dataclass.
    """

    kind: ClassVar[str] = ""
    config: Any

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def train(self, mode: bool = True) -> Self:
        """Training mode of the trained parts; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def state(self) -> dict[str, Tensor]:
        """What was learned, by name: everything but the frozen backbone."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    def record(self) -> dict[str, Any]:
        """What else :meth:`save` notes, to make the model again."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write ``state.json`` and ``model.safetensors`` into ``folder``."""
        folder, state = Path(folder), self.state()
        record: dict[str, Any] = {
            "schema": _SCHEMA, "method": self.kind, "config": asdict(self.config), **self.record(),
            "backbone": self.backbone.fingerprint(),
        }  # fmt: skip
        if state:
            record["sha256"] = save_tensors(folder / "model.safetensors", state)
        write_json(folder / "state.json", record)

    def restore(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Read what :meth:`save` wrote into this freshly made model.

        Raises:
            DamagedFileError: the tensors were changed or are not this model's.
        """
        tensors = load_tensors(folder / "model.safetensors", record["sha256"]) if "sha256" in record else {}
        own = self.state()
        if tensors.keys() != own.keys() or any(tensors[name].shape != value.shape for name, value in own.items()):
            raise DamagedFileError(
                f"'{folder / 'model.safetensors'}': its tensors are not those of a '{self.kind}' model with the "
                "recorded configuration; fit it again"
            )
        self.load_state_dict(tensors, strict=False)


Model = TypeVar("Model", bound=TunedModel)


def read_state(folder: str | Path, backbone: Backbone, kinds: Mapping[str, type[Model]], what: str) -> dict[str, Any]:
    """The record that :meth:`TunedModel.save` wrote, of one of ``kinds`` and of this backbone.

    Args:
        what: such models, in messages.

    Raises:
        DataError: there is none.
        DamagedFileError: it is of another format.
        CaptError: ``backbone`` is not the one it was trained on.
    """
    file = Path(folder) / "state.json"
    if not file.is_file():
        raise DataError(f"'{file}': no trained model there; was the run interrupted? Fit it again")
    record = read_json(file)
    if not isinstance(record, dict) or record.get("schema") != _SCHEMA or record.get("method") not in kinds:
        raise DamagedFileError(f"'{file}': not a {what} of schema {_SCHEMA}; fit it again")
    if (trained_on := str(record.get("backbone"))) != backbone.fingerprint():
        raise CaptError(
            f"'{folder}': trained on another backbone (fingerprint {trained_on[:16]}..., this one has "
            f"{backbone.fingerprint()[:16]}...); give the same --model and --pretrained as in run.json"
        )
    return record
