"""``capt data pair-texts``: what to ask a language model, and what it answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from capt.cli.bank import open_bank
from capt.cli.common import Data, DataOptions, Model, ModelOptions, Spec, print_json
from capt.data import base_novel
from capt.data.pair_text_requests import pair_text_request, read_answers
from capt.data.pair_texts import (
    Finding,
    Pair,
    PairText,
    PairTexts,
    length_findings,
    load_pair_texts,
    pair_key,
    save_pair_texts,
    validate_pair_texts,
)
from capt.errors import CaptError, DataError
from capt.files import write_json
from capt.modules.pair_prompts import selectable_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from capt.backbones import Backbone
    from capt.bank import ConfusionBank
    from capt.data import DataSet

Split = Literal["base", "novel", "all"]


def pair_texts(
    data: Spec,
    /,
    emit: Path | None = None,
    ingest: tuple[Path, ...] = (),
    out: Path | None = None,
    have: Path | None = None,
    bank: Path | None = None,
    split: Split = "base",
    neighbours: int = 8,
    texts: int = 5,
    source: str = "a language model, instructed by capt data pair-texts",
    model: Model = ModelOptions(),  # noqa: B008 - frozen
    where: Data = DataOptions(),  # noqa: B008 - frozen
    json: bool = False,
) -> int:
    """Ask for texts about pairs of classes (--emit), or check what was answered and store it (--ingest, --out).

    Nothing is sent anywhere: give the emitted file to a language model of your choice, and its answers back.

    Args:
        data: data set whose classes are described.
        emit: JSON file to write: pairs that can occur, and the instruction for a language model.
        ingest: answers: JSON, also in a ```json fence; several files count together.
        out: file of pair texts to write, if no answer has a mistake.
        have: pair texts that exist already: not asked for again, and kept in --out.
        bank: folder of a bank or run; the pairs it has mistakes of can occur too.
        split: classes described; 'base' texts may not name a novel class.
        neighbours: classes with the most similar names, for each class, that can be mixed up with it.
        texts: texts of each kind to ask for.
        source: how the texts were written, for the record.
        model: which CLIP model finds similar names and has to fit the texts into its context.
        where: where the data set lies.
        json: print JSON.
    """
    if (emit is None) == (not ingest) or (out is None) == bool(ingest):
        raise CaptError("give --emit FILE, or --ingest ANSWERS with --out FILE")
    data_set = where.open(data)
    classes, forbidden = _classes(data_set, split)
    known = _existing(have, PairTexts(data_set.name, split, classes, {}))
    backbone = model.open()
    selectable = selectable_pairs(backbone.class_text_features(classes), _bank(bank, classes), neighbours)
    if emit is None:
        assert out is not None
        return _ingest(ingest, out, known, source, selectable, forbidden, backbone, json)
    missing = [(a, b) for a, b in _names(selectable, classes) if (a, b) not in known.pairs]
    request = pair_text_request(
        known.dataset, split, missing, forbidden_classes=forbidden, texts=texts, context_length=backbone.context_length
    )
    write_json(emit, request)
    if json:
        print_json({"file": str(emit), "pairs": len(missing), "have_texts": len(known.pairs)})
    else:
        print(f"{len(missing)} pairs to be described: {emit}")
    return 0


def _ingest(
    answers: tuple[Path, ...], out: Path, known: PairTexts, source: str, selectable: Tensor,
    forbidden: tuple[str, ...], backbone: Backbone, json: bool,
) -> int:  # fmt: skip
    given: dict[Pair, PairText] = {}
    findings: list[Finding] = []
    for path in answers:
        pairs, wrong = read_answers(path, known.classes)
        twice = [Finding("form", pair_key(*pair), f"is given again in '{path}'") for pair in pairs if pair in given]
        findings += wrong + twice
        given |= pairs
    source = source if known.source in ("", source) else f"{known.source}; {source}"
    merged = replace(known, pairs={**known.pairs, **given}, source=source)
    findings += validate_pair_texts(merged, known.classes, selectable=selectable, forbidden_classes=forbidden)
    findings += length_findings(merged, backbone.tokenize)
    problems = [finding for finding in findings if finding.kind != "missing"]
    missing = [finding.pair for finding in findings if finding.kind == "missing"]
    if not problems:
        save_pair_texts(out, merged)
    if json:
        print_json(
            {
                "file": None if problems else str(out),
                "problems": [finding._asdict() for finding in problems],
                "pairs": len(merged.pairs),
                "replaced": len(known.pairs.keys() & given.keys()),
                "can_occur": len(_names(selectable, known.classes)),
                "missing": missing,
            }
        )
    elif problems:
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{len(problems)} problems: nothing was written")
    else:
        can_occur = len(_names(selectable, known.classes))
        print(f"{len(merged.pairs)} pairs have texts: {out}")
        print(f"{can_occur - len(missing)} of {can_occur} pairs that can occur; class texts stand in for the rest")
    return DataError.exit_code if problems else 0


def _classes(data_set: DataSet, split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes of the split, and those that its texts may not name."""
    if split == "all":
        return data_set.classes, ()
    base, novel = (half.classes for half in base_novel(data_set))
    return (base, novel) if split == "base" else (novel, ())


def _existing(path: Path | None, wanted: PairTexts) -> PairTexts:
    if path is None:
        return wanted
    found = load_pair_texts(path)
    if (found.dataset, found.split, found.classes) != (wanted.dataset, wanted.split, wanted.classes):
        raise DataError(
            f"--have {path}: texts of the {found.split} classes of '{found.dataset}' ({len(found.classes)}), expected "
            f"the {wanted.split} classes of '{wanted.dataset}' ({len(wanted.classes)}), in their order"
        )
    return found


def _bank(folder: Path | None, classes: tuple[str, ...]) -> ConfusionBank | None:
    found = None if folder is None else open_bank(folder)
    if found is not None and found.class_names != classes:
        raise DataError(
            f"--bank {folder}: its {found.n_classes} classes are not the {len(classes)} of this data set and --split"
        )
    return found


def _names(pairs: Tensor, classes: tuple[str, ...]) -> list[Pair]:
    """Pairs of names; two classes of one name have no words to tell them apart."""
    named = ((classes[a], classes[b]) for a, b in pairs.tolist())
    return list(dict.fromkeys((a, b) for a, b in named if a != b))
