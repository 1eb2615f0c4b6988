"""Pair texts: what two classes share and what tells them apart, in words. Format and rules: docs/pair-texts.md."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from capt.data.names import class_key, class_list
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import read_json, write_json

SPLITS = ("base", "novel", "all")
MOST_TEXTS = 16
_FORMAT = "capt.pair_texts"
_VERSION = 1
_NAME_IN_KEY = r"((?:[^\\|]|\\[\\|])*)"
_KEY = re.compile(rf"{_NAME_IN_KEY}\|{_NAME_IN_KEY}")

Pair: TypeAlias = tuple[str, str]


class PairText(NamedTuple):
    """Texts about the classes (a, b); each kind has 1 to 16."""

    commonality: tuple[str, ...]  # what both have
    difference_ab: tuple[str, ...]  # what an a has that a b has not
    difference_ba: tuple[str, ...]  # the other way round


class Finding(NamedTuple):
    """One thing that is wrong with, or missing from, pair texts.

    Attributes:
        kind: ``form``, ``class``, ``order``, ``text``, ``leak``, ``length``; or ``missing``, the only one that is no
            error: such a pair gets its prompts from the class texts.
        pair: the key, ``a|b``.
        problem: what was found and what was expected.
    """

    kind: str
    pair: str
    problem: str

    def __str__(self) -> str:
        return f"'{self.pair}': {self.problem}"


@dataclass(frozen=True)
class PairTexts:
    """Texts of the pairs of one data set.

    Attributes:
        dataset: its name.
        split: ``base``, ``novel`` or ``all``: which classes the texts are about, and so when they may be used.
        classes: class names in data-set order; a pair (a, b) has a before b.
        pairs: texts by pair of names.
        source: how they were written, for records.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    pairs: Mapping[Pair, PairText]
    source: str = ""


def pair_key(a: str, b: str) -> str:
    r"""``a|b``; a ``|`` or ``\`` inside a name gets a ``\`` before it."""
    return "|".join(name.replace("\\", r"\\").replace("|", r"\|") for name in (a, b))


def load_pair_texts(path: str | Path) -> PairTexts:
    """Read a file of :func:`save_pair_texts`, or one written by hand.

    Raises:
        DamagedFileError: it is no file of pair texts.
        DataError: it is one, but with mistakes; the message names pair and problem.
    """
    record = read_json(path)
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
        raise DamagedFileError(f"'{path}': expected a {_FORMAT} file of version {_VERSION}; see docs/pair-texts.md")
    wanted = {"dataset": str, "split": str, "classes": list, "pairs": dict}
    wrong = [name for name, kind in wanted.items() if not isinstance(record.get(name), kind)]
    if wrong or record["split"] not in SPLITS:
        raise DamagedFileError(
            f"'{path}': '{wrong[0] if wrong else 'split'}' is absent or of the wrong form; see docs/pair-texts.md"
        )
    classes = class_list(record["classes"], f"'{path}', classes", allow_duplicates=True)
    pairs, findings = parse_pairs(record["pairs"], classes)
    texts = PairTexts(record["dataset"], record["split"], classes, pairs, str(record.get("source", "")))
    refuse([*findings, *validate_pair_texts(texts, classes)], str(path))
    return texts


def save_pair_texts(path: str | Path, texts: PairTexts) -> None:
    """Write pair texts as JSON, atomically; the same texts give the same bytes, whatever order they came in.

    Raises:
        DataError: :func:`validate_pair_texts` finds an error.
    """
    refuse(validate_pair_texts(texts, texts.classes), str(path))
    place = _places(texts.classes)
    ordered = sorted(texts.pairs, key=lambda pair: [place[class_key(name)] for name in pair])
    write_json(
        path,
        {
            "format": _FORMAT,
            "version": _VERSION,
            "dataset": texts.dataset,
            "split": texts.split,
            "classes": list(texts.classes),
            "source": texts.source,
            "pairs": {
                pair_key(*pair): {k: list(v) for k, v in texts.pairs[pair]._asdict().items()} for pair in ordered
            },
        },
    )


def parse_pairs(raw: Mapping[str, Any], classes: Sequence[str]) -> tuple[dict[Pair, PairText], list[Finding]]:
    """The ``pairs`` of a file, or of a language model's answer, which may also hold its ``reasoning``.

    Only the form is checked here: keys, and three lists an entry. Names are spelled as in ``classes`` where they are
    the same after normalisation.
    """
    known = {class_key(name): name for name in classes}
    pairs: dict[Pair, PairText] = {}
    findings = []
    for key, entry in raw.items():
        names = _KEY.fullmatch(key)
        if names is None:
            findings.append(Finding("form", key, r"expected two class names as 'a|b' ('\|' for a '|' in a name)"))
            continue
        a, b = (re.sub(r"\\(.)", r"\1", name) for name in names.groups())
        pair = known.get(class_key(a), a), known.get(class_key(b), b)
        entry = {kind: v for kind, v in entry.items() if kind != "reasoning"} if isinstance(entry, dict) else {}
        wrong = sorted(entry.keys() ^ set(PairText._fields)) or [k for k, v in entry.items() if not isinstance(v, list)]
        if wrong:
            expected = ", ".join(PairText._fields)
            findings.append(
                Finding("form", key, f"expected the lists {expected}; {wrong[0]!r} is absent, no list or extra")
            )
        elif pair in pairs:
            findings.append(Finding("form", key, "the pair is given twice; keep one"))
        else:
            pairs[pair] = PairText(**{kind: tuple(entry[kind]) for kind in PairText._fields})
    return pairs, findings


def refuse(findings: Iterable[Finding], where: str) -> None:
    """Raise :class:`DataError` with the first five errors among ``findings``; do nothing without any."""
    errors = [str(finding) for finding in findings if finding.kind != "missing"]
    if errors:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise DataError(f"'{where}': {'; '.join(errors[:5])}{more}")


# ---- what may be wrong -------------------------------------------------------------------------------------------


def validate_pair_texts(
    texts: PairTexts,
    classes: Sequence[str],
    *,
    selectable: ArrayLike | None = None,
    forbidden_classes: Iterable[str] = (),
) -> list[Finding]:
    """Everything that is wrong with pair texts, and which pairs have none.

    Args:
        texts: the texts.
        classes: class names of the data set (of the split the texts are for), in its order.
        selectable: int [P, 2], pairs of ids into ``classes`` that can occur
            (:func:`capt.modules.pair_prompts.selectable_pairs`); those without texts come last, as ``missing``.
        forbidden_classes: names that no text may mention: the novel classes, for texts of base classes.

    Returns:
        findings, pair by pair; empty if all is well.
    """
    place = _places(classes)
    findings = [
        Finding("class", name, f"the class list has it, the data set has not{_nearest(name, classes)}")
        for name in texts.classes
        if class_key(name) not in place
    ]
    forbidden = NameFinder(forbidden_classes)
    for pair, text in texts.pairs.items():
        key = pair_key(*pair)
        findings += [Finding(kind, key, problem) for kind, problem in _pair_problems(pair, texts, classes, place)]
        findings += [Finding("text", key, problem) for problem in _text_problems(text)]
        own = NameFinder(pair)
        for where, sentence in _each(text):
            findings += [
                Finding("leak", key, f"{where} names the class {name!r}, which these texts must not: {sentence!r}")
                for name in forbidden.named(sentence, inside=own)
            ]
    if selectable is not None:
        have = {frozenset(map(class_key, pair)) for pair in texts.pairs}
        chosen = [tuple(classes[i] for i in ids) for ids in np.asarray(selectable, dtype=np.int64).reshape(-1, 2)]
        findings += [
            Finding("missing", pair_key(a, b), "no texts; its prompts are made of the two class texts")
            for a, b in chosen
            if class_key(a) != class_key(b) and frozenset(map(class_key, (a, b))) not in have
        ]
    return findings


def length_findings(texts: PairTexts, tokenize: Callable[[list[str]], Any]) -> list[Finding]:
    """Texts that ``tokenize`` (of a backbone) refuses because they do not fit into its context."""

    def refusal(sentences: list[str]) -> str:
        try:
            tokenize(sentences)
        except CaptError as error:
            return str(error)
        return ""

    if not refusal(distinct_texts(texts)):
        return []
    return [
        Finding("length", pair_key(*pair), f"{where}: {problem}")
        for pair, text in texts.pairs.items()
        for where, sentence in _each(text)
        if (problem := refusal([sentence]))
    ]


def distinct_texts(texts: PairTexts) -> list[str]:
    """Every text once, in order of appearance."""
    return list(dict.fromkeys(sentence for text in texts.pairs.values() for _, sentence in _each(text)))


def _places(classes: Sequence[str]) -> dict[str, int]:
    """Position of each name; the first, where a list repeats one (CLIP's ImageNet names do)."""
    return {class_key(name): place for place, name in reversed(list(enumerate(classes)))}


def _each(text: PairText) -> Iterator[tuple[str, str]]:
    """Every usable text with where it stands."""
    for kind, sentences in text._asdict().items():
        for number, sentence in enumerate(sentences, 1):
            if isinstance(sentence, str):
                yield f"{kind}, text {number}", sentence


def _nearest(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _pair_problems(
    pair: Pair, texts: PairTexts, classes: Sequence[str], place: dict[str, int]
) -> Iterator[tuple[str, str]]:
    a, b = map(class_key, pair)
    unknown = [name for name in pair if class_key(name) not in place]
    if unknown:
        yield "class", f"no class is named {unknown[0]!r}{_nearest(unknown[0], classes)}"
    elif a == b:
        yield "order", "a class makes no pair with itself"
    elif place[a] > place[b]:
        found = f"stands beside '{pair_key(*pair[::-1])}'; keep one" if pair[::-1] in texts.pairs else "is reversed"
        yield "order", f"{found}; the class that comes first in the data set is named first, {pair[1]!r} here"


def _text_problems(text: PairText) -> Iterator[str]:
    for kind, sentences in text._asdict().items():
        if not 1 <= len(sentences) <= MOST_TEXTS:
            yield f"{kind} has {len(sentences)} texts, expected 1 to {MOST_TEXTS}"
        for number, sentence in enumerate(sentences, 1):
            if not isinstance(sentence, str):
                yield f"{kind}, text {number}: expected text, found {sentence!r}"
            elif not class_key(sentence):
                yield f"{kind}, text {number} is empty"
    if text.difference_ab and set(text.difference_ab) == set(text.difference_ba):
        yield "difference_ab and difference_ba are the same texts; each is about what the other class has not"


# ---- class names inside texts ------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+")
_POSSESSIVE = re.compile(r"['\u2019\u02bc]s\b")
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), *((f"{e}es", e) for e in ("s", "x", "z", "ch", "sh", "o")))


class NameFinder:
    """Finds class names in texts as whole words.

    Case, accents' composition, punctuation, the joint of compounds ("wineglass", "t-shirt"), regular plurals on either
    side and possessives make no difference. "cat" is not found in "caterpillar", nor "acorn" in "a corn".
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[tuple[str, int]]] = {}
        self._longest = 0
        for name in names:
            words = _words(name)
            self._longest = max(self._longest, len(words))
            for form in {"".join(parts) for parts in itertools.product(*map(_forms, words))} - {""}:
                self._names.setdefault(form, []).append((name, len(words)))

    def spans(self, text: str) -> set[tuple[int, int, str]]:
        """(first word, word after the last, name) of every mention."""
        forms = [_forms(word) for word in _words(text)] if self._names else []
        return {
            (start, stop, name)
            for start in range(len(forms))
            for stop in range(start + 1, min(start + self._longest, len(forms)) + 1)
            for parts in itertools.product(*forms[start:stop])
            for name, length in self._names.get("".join(parts), ())
            if stop - start <= length
        }

    def named(self, text: str, inside: NameFinder) -> list[str]:
        """Names that ``text`` mentions, except where the mention is part of a name of ``inside``.

        With "hot dog" inside, "a hot dog in a bun" does not mention "dog", but "a hot dog is no dog" does.
        """
        found = self.spans(text)
        own = inside.spans(text) if found else set()
        covered = {(start, stop) for start, stop, _ in found for s, e, _ in own if s <= start and stop <= e}
        return sorted({name for start, stop, name in found if (start, stop) not in covered})


def _words(text: str) -> list[str]:
    return _WORD.findall(_POSSESSIVE.sub("", class_key(text).casefold()))


def _forms(word: str) -> set[str]:
    """The word itself, and what it may be the plural of."""
    singular = {word.removesuffix(end) + instead for end, instead in _PLURALS if word.endswith(end)}
    if word.endswith("s") and not word.endswith("ss"):
        singular.add(word[:-1])
    return {word} | (singular if len(word) > 3 else set())
