"""Batches of images: the same ones in the same order, however many threads decode them."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from capt.data.image_set import Images
from capt.errors import DataError

_LISTED = 50
_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Batch:
    """Images of one batch.

    Attributes:
        images: [B, 3, H, W], as the transform gives them.
        labels: int64 [B]; of images with several labels uint8 [B, C].
        ids: int64 [B], the images' ids in their data set.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.labels, self.ids)))


class _WrongTensor(DataError):
    """The transform is at fault, not the image: never skipped."""


class Batches(Iterator[Batch]):
    """Iterator made by :func:`batches`; ``skipped`` lists (image name, reason) of the images left out so far."""

    def __init__(self, stream: Iterator[Batch], skipped: list[tuple[str, str]]) -> None:
        self._stream = stream
        self.skipped = skipped

    def __next__(self) -> Batch:
        return next(self._stream)


def batches(
    image_set: Images,
    transform: Callable[..., Tensor],
    *,
    batch_size: int,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    workers: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
    drop_last: bool = False,
) -> Batches:
    """Decoded, transformed images in batches, once through the set.

    The order depends on ``generator`` alone, never on ``workers``. A transform with a parameter named
    ``generator`` gets a torch.Generator seeded from ``generator`` and the image's id, so its augmentation is
    repeatable too, image by image. A transform that draws from a global random state is repeatable with
    ``workers=0`` only.

    Args:
        image_set: the images.
        transform: PIL image (RGB) -> tensor [3, H, W], one size for all.
        batch_size: images in a batch; the last one may be smaller.
        shuffle: random order, drawn from ``generator`` (None: torch's global one).
        generator: CPU generator. All that is needed is drawn during the call, so its state does not change later.
        workers: threads that read and decode ahead; 0 works in the calling thread.
        on_bad_image: "error" raises at the first unusable image; "skip" leaves it out (later images move up, no
            id changes) and warns at the end with the list, which ``skipped`` of the result has at any time.
        drop_last: leave out a last, smaller batch.

    Raises:
        DataError: an unusable image or, under "skip", nothing but unusable images; an argument out of range; a
            transform whose result is not a [3, H, W] tensor of one size.
    """
    if batch_size < 1:
        raise DataError(f"batch_size: found {batch_size}, expected at least 1")
    if workers < 0:
        raise DataError(f"workers: found {workers}, expected 0 or more")
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"on_bad_image: found {on_bad_image!r}, expected 'error' or 'skip'")
    skipped: list[tuple[str, str]] = []
    order = _order(len(image_set), shuffle, generator)
    load = _loader(image_set, transform, generator)
    skip = on_bad_image == "skip"
    return Batches(_stream(image_set, order, load, batch_size, workers, skip, drop_last, skipped), skipped)


def _order(n_images: int, shuffle: bool, generator: torch.Generator | None) -> list[int]:
    order: list[int] = (torch.randperm(n_images, generator=generator) if shuffle else torch.arange(n_images)).tolist()
    return order


def _loader(
    image_set: Images, transform: Callable[..., Tensor], generator: torch.Generator | None
) -> Callable[[int], Tensor]:
    seeded = _takes_generator(transform)
    seed = int(torch.randint(_MASK, (), generator=generator)) if seeded else 0

    def load(index: int) -> Tensor:
        image = image_set.image(index)
        options: dict[str, Any] = {}
        if seeded:
            # Multiplying by a large odd number keeps the streams of neighbouring ids apart.
            own = (seed + int(image_set.ids[index]) * 0x9E3779B97F4A7C15) & _MASK
            options["generator"] = torch.Generator().manual_seed(own)
        tensor = transform(image, **options)
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or tensor.shape[0] != 3:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _WrongTensor(
                f"transform: found {found} for image {image_set.names[index]!r}, expected a [3, H, W] tensor"
            )
        return tensor

    return load


def _takes_generator(transform: Callable[..., Tensor]) -> bool:
    try:
        return "generator" in inspect.signature(transform).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return False


def _stream(
    image_set: Images,
    order: list[int],
    load: Callable[[int], Tensor],
    batch_size: int,
    workers: int,
    skip: bool,
    drop_last: bool,
    skipped: list[tuple[str, str]],
) -> Iterator[Batch]:
    tensors: list[Tensor] = []
    chosen: list[int] = []
    for index, result in _results(order, load, workers, ahead=2 * batch_size):
        try:
            tensor = result()
        except DataError as error:
            if not skip or isinstance(error, _WrongTensor):
                raise
            skipped.append((image_set.names[index], str(error)))
            continue
        if tensors and tensor.shape != tensors[0].shape:
            raise DataError(
                f"transform: gave {list(tensor.shape)} for image {image_set.names[index]!r} after "
                f"{list(tensors[0].shape)} for {image_set.names[chosen[0]]!r}; it must give one size for all images"
            )
        tensors.append(tensor)
        chosen.append(index)
        if len(chosen) == batch_size:
            yield _collate(image_set, tensors, chosen)
            tensors, chosen = [], []
    if chosen and not drop_last:
        yield _collate(image_set, tensors, chosen)
    if skipped:
        if len(skipped) == len(order):
            raise DataError(f"none of the {len(order)} images is usable; the first: {skipped[0][1]}")
        listed = "\n".join(f"  {reason}" for _, reason in skipped[:_LISTED])
        more = f"\n  and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        warnings.warn(f"{len(skipped)} of {len(order)} images were skipped:\n{listed}{more}", stacklevel=3)


def _results(
    order: list[int], load: Callable[[int], Tensor], workers: int, ahead: int
) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """(index, call that gives its tensor or raises), in order; with threads, up to ``ahead`` images in work."""
    if workers == 0:
        for index in order:
            yield index, partial(load, index)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="capt-data")
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    try:
        for index in order:
            waiting.append((index, pool.submit(load, index)))
            if len(waiting) >= max(ahead, workers):
                first, future = waiting.popleft()
                yield first, future.result
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collate(image_set: Images, tensors: list[Tensor], chosen: list[int]) -> Batch:
    return Batch(
        torch.stack(tensors),
        torch.from_numpy(image_set.labels[chosen]),
        torch.from_numpy(image_set.ids[chosen]),
    )
