"""Frozen inputs of the images of a data set, computed once for all models that have the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from capt.methods.runs.options import Progress
from capt.training import TokenStore

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data.image_set import Images


class HasInputs(Protocol):
    """What the cache asks of a model; models with equal kinds of inputs have equal inputs."""

    kind: ClassVar[str]
    config: Any

    @property
    def input_kind(self) -> Hashable:
        """Kind of its inputs."""

    def inputs(self, images: Tensor) -> Tensor:
        """Frozen inputs of transformed images float [B, 3, H, W]."""


class InputCache:
    """One :class:`TokenStore` for each kind of inputs, split and view."""

    def __init__(
        self, backbone: Backbone, limit: int, progress: Progress, transform: Callable[..., Tensor] | None = None
    ) -> None:
        """Prepare; nothing is computed before it is asked for.

        Args:
            limit: bytes to keep for each kind of inputs and split, all views together.
            transform: of plain images; default: that of the backbone.
        """
        self.backbone, self.limit, self.progress = backbone, limit, progress
        self.transform = transform or backbone.preprocess
        self._stores: dict[tuple[Hashable, ...], TokenStore] = {}

    def __call__(self, model: HasInputs, images: Images, split: str, view: int | None = None) -> TokenStore:
        """Inputs by position in ``images``; ``view``: number of an augmented view, None for the plain one."""
        # Under autocast they have other values; what a model is given must not depend on those before it.
        key = model.input_kind, model.config.training.amp, split, view
        if key not in self._stores:
            done, what = 0, f"encoding {split} images for {model.kind}"
            if view is not None:
                what += f" (view {view + 1})"

            def report(count: int) -> None:
                nonlocal done
                done += count
                self.progress(what, min(done, len(images)), len(images))

            transform = self.transform if view is None else self.backbone.train_transform
            self._stores[key] = TokenStore(
                images, transform, model.inputs, seed=view, device=self.backbone.device, progress=report,
                limit=self.limit // (1 + model.config.views if split == "train" else 1),
            )  # fmt: skip
        # What was not kept is computed again, by a model that is still there.
        self._stores[key].encode = model.inputs
        return self._stores[key]
