"""Which written pair texts a run uses, for which classes: base texts in training, novel texts at novel evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt.data.pair_texts import PairTexts, load_pair_texts, refuse, validate_pair_texts
from capt.errors import DataError
from capt.files import sha256
from capt.modules.pair_prompts import PairPrompts

if TYPE_CHECKING:
    from capt.methods.base.model import BaseModel
    from capt.methods.runs.protocol import Protocol, Target


class PairTextChoice:
    """Written pair texts by the classes they are for.

    A file serves the trained classes only if its classes are exactly those, or all classes of the data set under a
    protocol that trains on all; a text of a base class that names a novel one is refused (leak L4 of docs/fidelity.md).
    """

    def __init__(self, paths: Sequence[str], protocol: Protocol) -> None:
        """``paths``: files; none: the shipped ones for the shipped images, else no written texts."""
        self._files: dict[str, PairTexts] = {}
        self._prompts: dict[tuple[str, tuple[str, ...]], PairPrompts] = {}
        self._digests: dict[str, str] = {}
        found = [Path(path) for path in paths] or _shipped(protocol)
        for path in found:
            texts = load_pair_texts(path)
            target = next((t for t in protocol.targets if t.classes == tuple(texts.classes)), None)
            if target is None:
                if paths:
                    raise DataError(
                        f"pair texts '{path}': written for {len(texts.classes)} other classes than those of "
                        f"'{protocol.data.name}' under {protocol.name}; see docs/pair-texts.md"
                    )
                continue
            others = [name for name in protocol.data.classes if name not in set(target.classes)]
            refuse(validate_pair_texts(texts, target.classes, forbidden_classes=others), str(path))
            self._files[target.name] = texts
            self._digests[path.name] = sha256(path)
        self._trained = protocol.targets[0].name

    def trained(self, base: BaseModel) -> PairPrompts | None:
        """Encoded texts of the trained classes."""
        return self._encoded(base, self._trained)

    def of(self, base: BaseModel, target: Target) -> PairPrompts | None:
        """Encoded texts of a target's classes."""
        return self._encoded(base, target.name)

    def record(self) -> dict[str, Any]:
        """SHA-256 of the files in use, for the run record."""
        return dict(self._digests)

    def _encoded(self, base: BaseModel, name: str) -> PairPrompts | None:
        texts = self._files.get(name)
        if texts is None:
            return None
        backbone = base.text_backbone
        key = (backbone.fingerprint(), tuple(texts.classes))
        if key not in self._prompts:
            self._prompts[key] = PairPrompts(texts, backbone)
        return self._prompts[key]


def _shipped(protocol: Protocol) -> list[Path]:
    if protocol.data.name != "emoji":
        return []
    folder = Path(str(files("capt"))) / "assets" / "emoji"
    return sorted(folder.glob("pair_texts_*.json"))
