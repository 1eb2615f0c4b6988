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
_PLACES = ("x", "y")  # words of one token, where a primitive's embedding goes


class _Branch(NamedTuple):
    """A text with places to be filled: embeddings [L, W]; learned tokens stand at start to stop; the end token."""

    embeddings: Tensor
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
            CaptError: a tokenizer that makes more than one token of the words' places.
        """
        super().__init__()
        self.n_states, self.dropout, self.chunk = len(states), dropout, chunk
        names = [name.replace(".", " ").lower() for name in (*states, *objects)]
        self.table = nn.Parameter(_name_embeddings(backbone, names))
        self._branches = [_branch(backbone, places) for places in ((2, 1, 1) if primitives else (2,))]
        context = torch.stack([words.embeddings[words.start : words.start + 3] for words in self._branches])
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
        words = self._branches[branch]
        tower = backbone.text_tower
        length = words.end + 1 if tower.causal else len(words.embeddings)
        frozen = words.embeddings[:length].to(self.table.device)

        def encode(part: slice, table: Tensor, contexts: Tensor) -> Tensor:
            filled = table[rows[part]]
            context = contexts[branch].expand(len(filled), -1, -1)
            before, after = (half.expand(len(filled), -1, -1) for half in (frozen[: words.start], frozen[words.stop :]))
            embeddings = torch.cat([before, context, filled, after], dim=1)
            end = torch.full((len(filled),), words.end, device=embeddings.device)
            return tower.encode_embedded(embeddings.to(backbone.dtype), end)

        return in_chunks(encode, len(rows), self.chunk, self.dropped() if table is None else table, self.contexts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.n_states} states, {len(self.table) - self.n_states} objects, branches={len(self.contexts)}"


def _name_embeddings(backbone: Backbone, names: Sequence[str]) -> Tensor:
    """Mean token embedding [N, W] of the word pieces of each name."""
    tokens = backbone.tokenize(names)
    start, ends = first_token(backbone), backbone.text_tower.eot_index(tokens)
    pieces = (row[None, start : int(end)] for row, end in zip(tokens, ends, strict=True))
    return torch.stack([backbone.embed_text(piece)[0].float().mean(0) for piece in pieces]).detach()


def _branch(backbone: Backbone, n_places: int) -> _Branch:
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
    words = backbone.embed_text(tokens[:1])[0].detach().float()
    return _Branch(words, start, places[-1] + 1, int(backbone.text_tower.eot_index(tokens[:1])))
