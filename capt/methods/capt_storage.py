"""Folders of trained CAPT models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capt.bank import ConfusionBank
from capt.data.pair_texts import load_pair_texts, save_pair_texts
from capt.errors import CaptError, DamagedFileError
from capt.files import load_tensors, read_json, save_tensors, write_json
from capt.methods.base.model import BaseModel, ZeroShot
from capt.methods.base.registry import load_base
from capt.methods.capt_config import config_from_dict
from capt.modules import PairPrompts

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.methods.capt import CAPT

_SCHEMA = 1


def save_capt(model: CAPT, folder: str | Path) -> None:
    """See :meth:`CAPT.save`."""
    folder = Path(folder)
    tensors = {**model.trainable(), "evidence.means": model.evidence.means, "text_features": model.text_features}
    digest = save_tensors(folder / "adapter.safetensors", tensors)
    if model.bank is not None:
        model.bank.save(folder / "bank")
    if model.base.kind != ZeroShot.kind:
        model.base.save(folder / "base")
    if model.pair_prompts is not None:
        save_pair_texts(folder / "pair_texts.json", model.pair_prompts.texts)
    write_json(
        folder / "state.json",
        {
            "schema": _SCHEMA,
            "method": "capt",
            "config": asdict(model.config),
            "class_names": list(model.class_names),
            "backbone": model.backbone.fingerprint(),
            "base": {"kind": model.base.kind, "fingerprint": model.base.fingerprint()},
            "bank_source": model.config.bank_source,
            "adapter_sha256": digest,
            "has_bank": model.bank is not None,
            "has_pair_texts": model.pair_prompts is not None,
        },
    )


def load_capt(kind: type[CAPT], folder: str | Path, given: BaseModel | Backbone) -> CAPT:
    """See :meth:`CAPT.load`."""
    folder = Path(folder)
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or state.get("schema") != _SCHEMA or state.get("method") != "capt":
        raise DamagedFileError(f"'{folder / 'state.json'}': not a CAPT model of schema {_SCHEMA}")
    backbone = given.backbone if isinstance(given, BaseModel) else given
    if state["backbone"] != backbone.fingerprint():
        raise CaptError(
            f"'{folder}': trained on another backbone (fingerprint {state['backbone'][:16]}..., "
            f"this one has {backbone.fingerprint()[:16]}...); give the same --model and --pretrained as in run.json"
        )
    base = _base(folder, state, given)
    bank = ConfusionBank.load(folder / "bank") if state["has_bank"] else None
    prompts = None
    if state.get("has_pair_texts"):
        texts = load_pair_texts(folder / "pair_texts.json")
        prompts = PairPrompts(texts, base.text_backbone, state["class_names"])
    tensors = load_tensors(folder / "adapter.safetensors", state["adapter_sha256"])
    # The class texts it was trained with, whatever templates the backbone has now.
    text = tensors.pop("text_features", None)
    if text is None:
        raise DamagedFileError(f"'{folder / 'adapter.safetensors'}': the class texts are missing; fit the model again")
    model = kind(
        base, state["class_names"], config=config_from_dict(state["config"]), bank=bank,
        text_features=text.to(base.logit_scale.device), pair_prompts=prompts,
    )  # fmt: skip
    expected: dict[str, Tensor] = {**model.trainable(), "evidence.means": model.evidence.means}
    if tensors.keys() != expected.keys() or any(tensors[n].shape != p.shape for n, p in expected.items()):
        raise DamagedFileError(f"'{folder / 'adapter.safetensors'}': its tensors do not fit the recorded configuration")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return model.eval()


def _base(folder: Path, state: dict[str, Any], given: BaseModel | Backbone) -> BaseModel:
    """The base model: the one given, else the stored one, else zero-shot."""
    recorded = state.get("base", {"kind": ZeroShot.kind, "fingerprint": state["backbone"]})
    if isinstance(given, BaseModel):
        base = given
    elif recorded["kind"] == ZeroShot.kind:
        base = ZeroShot(given, state["class_names"])
    else:
        base = load_base(folder / "base", given)
    if base.kind != recorded["kind"] or base.fingerprint() != recorded["fingerprint"]:
        raise CaptError(
            f"'{folder}': trained on a '{recorded['kind']}' base model (fingerprint {recorded['fingerprint'][:16]}...),"
            f" found a '{base.kind}' one ({base.fingerprint()[:16]}...); give its own base model, or the backbone alone"
        )
    return base
