"""Training-free changes of the last aggregation that a mitigation chooses from, their controls, their storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from capt.backbones import Backbone
from capt.backbones.pooling import Pooling
from capt.errors import CaptError, DamagedFileError
from capt.files import load_tensors, read_json, save_tensors, write_json
from capt.modules.crop_pooling import CropPooling, cropped
from capt.modules.key_groups import CenterGroups
from capt.modules.patch_pooling import PatchPooling, repooled
from capt.modules.redistributed_pooling import redistributed
from capt.modules.redistribution import (
    MassTransfer,
    PriorCancellation,
    RadialBias,
    Redistribution,
    Temperature,
    UniformMixture,
)

Change = Redistribution | PatchPooling | CropPooling
FILE, PRIOR = "mitigation.json", "mitigation.safetensors"
_SINKS = ("center sink", "off sink")
_RULES: dict[str, Any] = {
    one.__name__: one
    for one in (RadialBias, MassTransfer, Temperature, PriorCancellation, UniformMixture, PatchPooling, CropPooling)
}

# Source: the rules and grids are ours, see capt.modules.redistribution; no constant is taken from a paper.


@dataclass(frozen=True)
class Member:
    """One change and its name in tables.

    Attributes:
        name: family and constants.
        change: what is done.
        groups: what the rule calls center.
    """

    name: str
    change: Change
    groups: CenterGroups = field(default_factory=CenterGroups)

    def apply(self, backbone: Backbone) -> Backbone:
        """The same model with the change, for everything that takes a backbone."""
        if isinstance(self.change, PatchPooling):
            return repooled(backbone, self.change)
        if isinstance(self.change, CropPooling):
            return cropped(backbone, self.change)
        return redistributed(backbone, self.change, self.groups)

    @property
    def passes(self) -> int:
        """Through the tower, for one image."""
        return 1 + self.change.count if isinstance(self.change, CropPooling) else 1

    def record(self) -> dict[str, Any]:
        """For JSON; tensors are digests."""
        return {"name": self.name, **self.change.record(), "groups": self.groups.record()}


def family(pooling: Pooling, prior: Tensor, passes: int = 1) -> list[Member]:
    """All members that can do something on this kind of pooling; their center is a quarter of the area.

    Args:
        pooling: of the model.
        prior: [H, N], what each patch gets on blank pictures.
        passes: that one image may take; from 6 on, five overlapping crops are members, too, from 10 on nine.
    """
    radial = [
        Member(f"radial bias {shape} {x:g}", RadialBias(strength=x, shape=shape))
        for shape in ("r", "r2", "step") for x in (0.25, 0.5, 1, 2, 4)
    ]  # fmt: skip
    parts = (0.2, 0.4, 0.6, 0.8, 1.0)
    moved = [Member(f"mass transfer {x:g}", MassTransfer(moved_share=x)) for x in parts]
    spread = [Member(f"mixture with off-center {x:g}", UniformMixture(part=x)) for x in parts]
    pooled = [
        Member(f"{kind}, part {x:g}", PatchPooling(kind, x))
        for kind in ("mean token", "mean of tokens", "generalised mean") for x in (0.3, 1.0)
    ]  # fmt: skip
    counts: tuple[Literal[5, 9], ...] = (5, 9)
    crops = [
        Member(f"{count} crops, part {x:g}", CropPooling(count, part=x))
        for count in counts if count < passes for x in (0.3, 0.5, 0.8)
    ]  # fmt: skip
    if pooling.attention is None:  # all weights are equal: what acts on their differences would do nothing
        return [*radial, *moved, *spread, *(one for one in pooled if "generalised" in one.name), *crops]
    return [
        *radial,
        *moved,
        *(Member(f"mass transfer {x:g}, biased heads", MassTransfer(moved_share=x, heads="biased")) for x in parts),
        *(
            Member(f"mass transfer {x:g} from sinks", MassTransfer(x, donors=_SINKS), CenterGroups(sinks=True))
            for x in (0.6, 1.0)
        ),
        *(Member(f"temperature {x:g}", Temperature(alpha=x)) for x in (0.5, 0.8, 1.2, 1.5, 2.0)),
        *(Member(f"prior cancellation {x:g}", PriorCancellation(prior=prior, kappa=x)) for x in (0.25, 0.5, 0.75, 1.0)),
        *spread,
        *(
            Member(f"mixture with all {x:g}", UniformMixture(part=x, receivers=("center", "off")))
            for x in (0.3, 0.6, 1.0)
        ),
        *pooled,
        *crops,
    ]


# ---- controls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShuffledBias(Redistribution):
    """The biases of a rule on patches drawn at random: what they do apart from where they do it.

    ``rule``: whose; ``seed``: of the draw.
    """

    rule: RadialBias | PriorCancellation
    seed: int = 0

    @property
    def neutral(self) -> bool:
        """Whether the rule is."""
        return self.rule.neutral

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """[H or 1, N]."""
        bias = self.rule.bias(grid)
        return bias[:, torch.randperm(bias.shape[1], generator=torch.Generator().manual_seed(self.seed))]

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {"rule": type(self).__name__, "of": self.rule.record(), "seed": self.seed}


def inverted(member: Member) -> Member | None:
    """The same change in the other direction, which has to widen the gap; None where there is no other direction."""
    rule = member.change
    opposite: Change
    if isinstance(rule, RadialBias):
        opposite = replace(rule, strength=-rule.strength)
    elif isinstance(rule, PriorCancellation):
        opposite = replace(rule, kappa=-rule.kappa)
    elif isinstance(rule, Temperature):
        opposite = replace(rule, alpha=1 / rule.alpha)
    elif isinstance(rule, MassTransfer):
        opposite = replace(rule, donors=rule.receivers, receivers=("center",))
    elif isinstance(rule, UniformMixture) and rule.receivers == ("off",):
        opposite = replace(rule, receivers=("center",))
    elif isinstance(rule, CropPooling):
        opposite = replace(rule, count=1)
    else:
        return None
    return Member(f"inverted: {member.name}", opposite, member.groups)


def shuffled(member: Member, seed: int) -> Member | None:
    """The same change with random patches in the place of the center, which has to do less; None without a center."""
    rule, name = member.change, f"random patches {seed}: {member.name}"
    if isinstance(rule, RadialBias | PriorCancellation):
        return Member(name, ShuffledBias(rule, seed), member.groups)
    if isinstance(rule, MassTransfer) or (isinstance(rule, UniformMixture) and rule.receivers == ("off",)):
        return Member(name, rule, replace(member.groups, seed=seed))
    return None


# ---- storage ---------------------------------------------------------------------------------------------------------


def save_member(folder: Path, member: Member | None, backbone: Backbone, opened_with: Mapping[str, Any]) -> None:
    """Write what :func:`load_member` needs: the change (None: the model as it is) and which model it belongs to.

    Args:
        folder: of the run.
        member: the change.
        backbone: the plain model.
        opened_with: how the model is opened, for the command line ("model", "pretrained").
    """
    if member is not None and type(member.change).__name__ not in _RULES:
        raise CaptError(f"member: a {type(member.change).__name__} cannot be stored; use one of {', '.join(_RULES)}")
    (folder / PRIOR).unlink(missing_ok=True)
    stored: dict[str, Any] = {"schema": 1, "fingerprint": backbone.fingerprint(), "opened_with": dict(opened_with)}
    if member is None:
        write_json(folder / FILE, {**stored, "change": None})
        return
    options = {k: v for k, v in vars(member.change).items() if not isinstance(v, Tensor)}
    if isinstance(member.change, PriorCancellation):
        save_tensors(folder / PRIOR, {"prior": member.change.prior.float().cpu().contiguous()})
    change = {"name": member.name, "rule": type(member.change).__name__, "options": options}
    write_json(folder / FILE, {**stored, "change": change, "groups": asdict(member.groups)})


def read_stored(folder: Path) -> dict[str, Any]:
    """What a folder says about its mitigation.

    Raises:
        DataError: there is none.
        DamagedFileError: it is not one of ours.
    """
    stored = read_json(folder / FILE)
    if not isinstance(stored, dict) or stored.get("schema") != 1 or not {"fingerprint", "change"} <= stored.keys():
        raise DamagedFileError(f"'{folder / FILE}': not a stored mitigation; run 'capt bias mitigate' again")
    return stored


def load_member(folder: str | Path, backbone: Backbone) -> Backbone:
    """A model with the mitigation stored in a folder; the model itself where no member helped.

    Raises:
        CaptError: another model than the one that the mitigation was made for.
        DataError, DamagedFileError: no mitigation there, or a damaged one.
    """
    folder = Path(folder)
    stored = read_stored(folder)
    if stored["fingerprint"] != backbone.fingerprint():
        raise CaptError(
            f"'{folder}': the mitigation was made for a model with fingerprint {stored['fingerprint'][:12]}, this one "
            f"has {backbone.fingerprint()[:12]}; open the same model, or run 'capt bias mitigate' on this one"
        )
    if stored["change"] is None:
        return backbone
    try:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["change"]["options"].items()}
        if stored["change"]["rule"] == PriorCancellation.__name__:
            options["prior"] = load_tensors(folder / PRIOR)["prior"].to(backbone.device)
        change = _RULES[stored["change"]["rule"]](**options)
        member = Member(stored["change"]["name"], change, CenterGroups(**stored["groups"]))
    except (KeyError, TypeError, AttributeError, CaptError) as error:
        raise DamagedFileError(
            f"'{folder / FILE}': not a stored mitigation ({error!r}); run 'capt bias mitigate' again"
        ) from error
    return member.apply(backbone)
