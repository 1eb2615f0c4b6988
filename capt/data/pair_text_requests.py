"""Asking a language model for pair texts, and reading what it answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from capt.data.pair_texts import MOST_TEXTS, Finding, Pair, PairText, pair_key, parse_pairs
from capt.errors import DataError

_FORMAT = "capt.pair_texts_request"
_VERSION = 1
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)

_INSTRUCTION = """\
Every key of "pairs" names two classes that an image classifier mixes up: "a|b". For each pair, think step by step \
before you write: compare (1) outline and shape, (2) colours and patterns, (3) parts, and which of them the other \
lacks, (4) pose and viewpoint, (5) context: what is usually around it. Use only what can be seen in a picture; leave \
out sound, taste, price and purpose. Then write {texts} short texts of each kind:
- commonality: what a picture of either class shows, the reason why they are mixed up;
- difference_ab: what a picture of an a shows and a picture of a b does not, told of the a;
- difference_ba: what a picture of a b shows and a picture of an a does not, told of the b.
Each text is one statement about one thing to look at, a different one in every text, in at most {words} words (it \
must fit into {tokens} tokens). Say what is there rather than what is missing. Name no class but the two of the pair. \
The names in "never_mention" must not occur in any text, in singular or plural, not even in a comparison; only as a \
part of one of the pair's own two names are they allowed.
Answer with your reasoning, if you wish, and then one JSON object in a ```json fence, in the form of "answer_format", \
with the keys copied from "pairs" exactly. If it gets too long, answer in several messages, each pair in one of them."""


def pair_text_request(
    dataset: str,
    split: str,
    pairs: Iterable[Pair],
    *,
    forbidden_classes: Sequence[str] = (),
    texts: int = 5,
    context_length: int = 77,
) -> dict[str, Any]:
    """What to give to a language model: instruction, form of the answer, and the pairs.

    Args:
        dataset: name of the data set.
        split: ``base``, ``novel`` or ``all``.
        pairs: class names (a, b), a before b in the data set.
        forbidden_classes: names that no text may mention.
        texts: texts of each kind, 1 to 16.
        context_length: tokens of the text tower, start and end included.

    Returns:
        a JSON object.

    Raises:
        DataError: ``texts`` is out of range.
    """
    if not 1 <= texts <= MOST_TEXTS:
        raise DataError(f"texts: found {texts}, expected 1 to {MOST_TEXTS} a kind")
    tokens = context_length - 2
    words = max(3, tokens * 3 // 5)  # rare words and punctuation take several tokens
    a, b = "a", "b"
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "dataset": dataset,
        "split": split,
        "instruction": _INSTRUCTION.format(texts=texts, words=words, tokens=tokens),
        "never_mention": list(forbidden_classes),
        "answer_format": {pair_key(a, b): {kind: [f"text {n + 1}" for n in range(texts)] for kind in PairText._fields}},
        "pairs": [pair_key(*pair) for pair in pairs],
    }


def read_answers(path: str | Path, classes: Sequence[str]) -> tuple[dict[Pair, PairText], list[Finding]]:
    """The pair texts in an answer: JSON, bare or in fences, with or without prose around it.

    Accepted are objects of pairs, and objects that hold one as ``pairs``, such as a whole file of pair texts. Several
    fences count together.

    Args:
        path: text file with the answer.
        classes: class names of the split.

    Returns:
        texts by pair, and what is wrong with the form.

    Raises:
        DataError: there is no such file, or no JSON in it.
    """
    try:
        answer = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}': cannot be read as text ({error})") from error
    twice: list[str] = []

    def distinct(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            twice.extend([key] if key in found else [])
            found[key] = value
        return found

    raw: dict[str, Any] = {}
    for block in _json_blocks(answer):
        try:
            value = json.loads(block, object_pairs_hook=distinct)
        except json.JSONDecodeError as error:
            raise DataError(
                f"'{path}': found no JSON ({error}); expected an object of pairs, alone or in a ```json fence"
            ) from error
        value = value.get("pairs", value) if isinstance(value, dict) else value
        if not isinstance(value, dict):
            raise DataError(f"'{path}': found a JSON {type(value).__name__}, expected an object with keys 'a|b'")
        twice += raw.keys() & value.keys()
        raw |= value
    pairs, findings = parse_pairs(raw, classes)
    return pairs, findings + [Finding("form", key, "is given twice in one answer; keep one") for key in sorted(twice)]


def _json_blocks(answer: str) -> list[str]:
    """The parts of an answer that should be JSON: all of it, its fences, or from the first brace to the last."""
    if answer.lstrip().startswith("{"):
        return [answer]
    fences = _FENCE.findall(answer)
    marked = [block for language, block in fences if language.lower() == "json"]
    if fences:
        return marked or [block for _, block in fences]
    return [answer[answer.find("{") : answer.rfind("}") + 1] if "{" in answer else answer]
