"""Soft prompts of states, objects and their compositions, over one shared table of primitive embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError
from capt.modules.prompts import first_token, in_chunks

if TYPE_CHECKING:
    from capt.backbones import Backbone

FIRST_WORDS = "a photo of"
_PLACES = ("cat", "dog")  # words of one token, where a primitive's embedding goes


class _Branch(NamedTuple):
    """Positions in a text with places to be filled: learned tokens from start to stop, and the end token."""

    start: int
    stop: int
    end: int


class CompositionPrompts(nn.Module):
    """``[context] [state] [object]``, and with ``primitives`` also ``[context] [state]`` and ``[context] [object]``.

    Every state and object has one learned embedding, started as the mean of its word pieces and used by all prompts
    that name it, so pairs never seen together are made of parts that were learned apart. Each branch has a context
    of its own, started as the words "a photo of".

    Attributes:
        table: parameter, float32 [n_states + n_objects, W], states first.
        contexts: parameter, float32 [branches, 3, W]: pairs, states, objects; frozen where only primitives learn.

    Source: three branches: MSCI (from Troika); the pair branch alone with a frozen context: CSP (arXiv 2204.03574).
    """

    words: Tensor

    def __init__(
        self,
        backbone: Backbone,
        states: Sequence[str],
        objects: Sequence[str],
        *,
        primitives: bool = True,
        learn_context: bool = True,
        dropout: float = 0.3,
        chunk: int = 256,
    ) -> None:
        """Create the prompts.

        Args:
            states, objects: names; ``.`` counts as a space.
            primitives: also prompts of single states and objects.
            learn_context: False keeps the words "a photo of".
            dropout: of the table's elements, once a forward pass, in training only.
            chunk: prompts encoded together.

        Raises:
            CaptError: a name without any word, or a tokenizer that makes more than one token of the words' places.
        """
        super().__init__()
        self.n_states, self.dropout, self.chunk = len(states), dropout, chunk
        names = [name.replace(".", " ").lower() for name in (*states, *objects)]
        self.table = nn.Parameter(_name_embeddings(backbone, names))
        words, branches = zip(
            *(_branch(backbone, places) for places in ((2, 1, 1) if primitives else (2,))), strict=True
        )
        self._branches: tuple[_Branch, ...] = branches
        self.register_buffer("words", torch.stack(words), persistent=False)  # [branches, L, W], frozen
        start = branches[0].start
        context = self.words[:, start : start + len(FIRST_WORDS.split())]
        self.contexts = nn.Parameter(context.clone(), requires_grad=learn_context)

    def dropped(self) -> Tensor:
        """The table [n_states + n_objects, W] as one forward pass uses it."""
        return F.dropout(self.table, self.dropout, self.training)

    def pairs(self, backbone: Backbone, pairs: Tensor, table: Tensor | None = None) -> Tensor:
        """Unit-norm features float32 [K, d] of pairs int64 [K, 2] (state, object); ``table``: of :meth:`dropped`."""
        rows = pairs + torch.tensor([0, self.n_states], device=pairs.device)
        return self._encoded(backbone, 0, rows, table)

    def states(self, backbone: Backbone, table: Tensor | None = None) -> Tensor:
        """Unit-norm features float32 [n_states, d] of all states."""
        return self._encoded(backbone, 1, self._rows(0, self.n_states), table)

    def objects(self, backbone: Backbone, table: Tensor | None = None) -> Tensor:
        """Unit-norm features float32 [n_objects, d] of all objects."""
        return self._encoded(backbone, 2, self._rows(self.n_states, len(self.table)), table)

    def _rows(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.table.device)[:, None]

    def _encoded(self, backbone: Backbone, branch: int, rows: Tensor, table: Tensor | None) -> Tensor:
        """Features of prompts whose places hold rows [n, places] of the table."""
        start, stop, ends = self._branches[branch]
        tower = backbone.text_tower
        frozen = self.words[branch, : ends + 1 if tower.causal else None]

        def encode(chunk: slice, table: Tensor, contexts: Tensor) -> Tensor:
            filled = table[rows[chunk]]
            context = contexts[branch].expand(len(filled), -1, -1)
            before, after = (part.expand(len(filled), -1, -1) for part in (frozen[:start], frozen[stop:]))
            embeddings = torch.cat([before, context, filled, after], dim=1)
            end = torch.full((len(filled),), ends, device=embeddings.device)
            return tower.encode_embedded(embeddings.to(backbone.dtype), end)

        return in_chunks(encode, len(rows), self.chunk, self.dropped() if table is None else table, self.contexts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.n_states} states, {len(self.table) - self.n_states} objects, branches={len(self.contexts)}"


def _name_embeddings(backbone: Backbone, names: Sequence[str]) -> Tensor:
    """Mean token embedding [N, W] of the word pieces of each name."""
    tokens = backbone.tokenize(names)
    start, ends = first_token(backbone), _words_end(backbone, tokens).tolist()
    for name, end in zip(names, ends, strict=True):
        if end <= start:
            raise CaptError(f"names: the tokenizer finds no word in {name!r}; give the state or object a name of words")
    pieces = (row[None, start:end] for row, end in zip(tokens, ends, strict=True))
    return torch.stack([backbone.embed_text(piece)[0].float().mean(0) for piece in pieces]).detach()


def _words_end(backbone: Backbone, tokens: Tensor) -> Tensor:
    """Position after the last word piece of each text, int64 [N]."""
    probes, rows = backbone.tokenize(_PLACES), torch.arange(len(_PLACES))
    # Where padding is the end token, the text tower's last position is a word, and differs from text to text.
    first, second = probes[rows, backbone.text_tower.eot_index(probes)]
    ends: Tensor = backbone.text_tower.eot_index(tokens) + int(first != second)
    return ends


def _branch(backbone: Backbone, n_places: int) -> tuple[Tensor, _Branch]:
    """Embeddings [L, W] of a text with ``n_places`` places, and where its parts stand."""
    n_words = len(FIRST_WORDS.split())
    # The places are where two texts that differ in nothing else differ.
    texts = [" ".join([FIRST_WORDS, *[word] * n_places]) for word in _PLACES]
    tokens = backbone.tokenize(texts)
    places = (tokens[0] != tokens[1]).nonzero().flatten().tolist()
    start = first_token(backbone)
    if places != list(range(start + n_words, start + n_words + n_places)):
        raise CaptError(
            f"tokenizer: '{texts[0]}' has its last words at positions {places}, expected one token a word; "
            "compositional prompts need such a tokenizer (CLIP's is one)"
        )
    embeddings = backbone.embed_text(tokens[:1])[0].detach().float()
    return embeddings, _Branch(start, places[-1] + 1, int(backbone.text_tower.eot_index(tokens[:1])))
