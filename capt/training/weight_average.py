"""Exponential moving average of trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """``average <- decay * average + (1 - decay) * parameter`` after every step, from a copy of the start.

    No warm-up and no correction of the start. Source: CPRFL (0.998).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """``parameters``: what is averaged; they stay the caller's."""
        self.decay = decay
        self._live = list(parameters.values())
        self._average = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._live], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters have their averages as values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self._live):
            # Values change place, tensors stay: optimisers and views keep what they hold.
            parameter.data, self._average[index] = self._average[index], parameter.data
