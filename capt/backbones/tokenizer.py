"""Tokenising without silent truncation, and without a tokenizer that belongs to another model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from capt.backbones.base import TextTower
from capt.errors import CaptError

PROBES = ("a photo of a cat.", "Zürich, 12 naïve owls & one café!")


class PromptTokenizer:
    """A tokenizer bound to the text tower it feeds.

    Takes open_clip's tokenizers, those of transformers, and any callable from a list of strings to ids.

    Args:
        tokenizer: what turns strings into ids.
        tower: the text tower; context length and vocabulary have to agree with it.
        truncate: ``"error"`` refuses a text that does not fit, ``"warn"`` cuts it and says so.

    Raises:
        CaptError: the tokenizer cannot be the one this text tower was trained with.
    """

    def __init__(self, tokenizer: Callable[..., Any], tower: TextTower, truncate: str) -> None:
        if truncate not in ("error", "warn"):
            raise CaptError(f"truncate: expected 'error' or 'warn', found {truncate!r}.")
        self.raw = tokenizer
        self.truncate = truncate
        self.transformers = hasattr(tokenizer, "convert_ids_to_tokens")
        self.resizable = self.transformers or _takes(tokenizer, "context_length")
        own = getattr(tokenizer, "context_length", None)
        self.context_length = tower.context_length
        if own is not None and own < tower.context_length and not tower.fixed_length:
            self.context_length = own
        elif own is not None and own != tower.context_length:
            raise CaptError(
                f"tokenizer: makes texts of {own} tokens, but the text tower takes {tower.context_length}. Build it "
                f"with context_length={tower.context_length}, e.g. open_clip.get_tokenizer(name, "
                f"context_length={tower.context_length})."
            )
        probe = self._ids(list(PROBES), self.context_length)
        if probe.shape[1] != self.context_length:
            raise CaptError(
                f"tokenizer: returned texts of {probe.shape[1]} tokens, the text tower takes {self.context_length}."
            )
        self.pad = int(probe[0, -1])
        self._check_vocabulary(tower, probe)

    def _check_vocabulary(self, tower: TextTower, probe: Tensor) -> None:
        size = getattr(self.raw, "vocab_size", 0)
        largest = max(int(probe.max()), size - 1 if isinstance(size, int) else 0)
        if largest >= tower.vocab_size:
            raise CaptError(
                f"tokenizer: knows ids up to {largest}, but the embedding table has {tower.vocab_size} rows: it "
                "belongs to another model. Use the tokenizer that came with these weights."
            )
        filled = (probe != self.pad).sum(dim=1)
        end = tower.eot_index(probe)
        # With padding equal to the end token, the end token itself is not counted as filled.
        if not bool(((end == filled - 1) | (end == filled)).all()):
            raise CaptError(
                f"tokenizer: for {PROBES[0]!r} the text tower would read its feature at position {int(end[0])}, but "
                f"the text ends at {int(filled[0]) - 1}: the end token is not the one this model was trained with. "
                "Use the tokenizer that came with these weights."
            )

    def _ids(self, texts: list[str], length: int) -> Tensor:
        if self.transformers:
            encoded = self.raw(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return torch.as_tensor(encoded["input_ids"])
        ids = self.raw(texts) if length == self.context_length else self.raw(texts, context_length=length)
        return torch.as_tensor(ids, dtype=torch.long)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids, int64 [N, context_length].

        Raises:
            CaptError: a text does not fit and ``truncate`` is ``"error"``; the message says what would be lost.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.context_length, dtype=torch.long)
        for text in texts:
            if not isinstance(text, str):
                raise CaptError(f"texts: expected strings, found {type(text).__name__}: {text!r}.")
        tokens = self._ids(texts, self.context_length)
        # Two positions, because padding can be the end token itself.
        for index in (tokens[:, -2:] != self.pad).any(dim=1).nonzero().flatten().tolist():
            if not self._fits(texts[index]):
                self._complain(texts[index])
        return tokens

    def _fits(self, text: str) -> bool:
        short = self._ids([text], self.context_length)[0]
        if not self.resizable:
            # A text that reads the same without its last word has lost it already.
            shorter = text.rsplit(maxsplit=1)[0] if len(text.split()) > 1 else text[: len(text) // 2]
            return not torch.equal(short, self._ids([shorter], self.context_length)[0])
        room = self.context_length + 4 * len(text.encode()) + 8
        whole = self._ids([text], room)[0]
        return torch.equal(whole[: self.context_length], short) and bool(
            (whole[self.context_length :] == self.pad).all()
        )

    def _complain(self, text: str) -> None:
        words = text.split()
        kept, too_many = 0, len(words)
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            kept, too_many = (middle, too_many) if self._fits(" ".join(words[:middle])) else (kept, middle)
        lost = " ".join(words[kept:])
        name = text if len(text) <= 120 else text[:117] + "..."
        message = (
            f"texts: {name!r} does not fit into {self.context_length} tokens; from {lost[:200]!r} on it would be cut "
            "off. Shorten it, or pass truncate='warn' to cut it knowingly."
        )
        if self.truncate == "error":
            raise CaptError(message)
        warnings.warn(message, stacklevel=4)

    def probe(self) -> list[list[int]]:
        """Ids of two fixed texts: what tells one tokenizer from another."""
        return self._ids(list(PROBES), self.context_length).tolist()


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters
