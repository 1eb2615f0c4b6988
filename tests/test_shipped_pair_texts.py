"""The pair texts of the shipped images: sound, without novel names, and there for every mistake of the shipped model.

Numbers in test names: docs/fidelity.md.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import capt
from capt.backbones import Backbone
from capt.backbones import load as load_backbone
from capt.bank import ConfusionBank
from capt.data import DataSet, base_novel, few_shot, load, load_pair_texts, validate_pair_texts
from capt.data.pair_texts import length_findings
from capt.modules.pair_prompts import PairPrompts, selectable_pairs

FOLDER = Path(capt.__file__).parent / "assets" / "emoji"
FILES = {path.stem.removeprefix("pair_texts_"): path for path in sorted(FOLDER.glob("pair_texts_*.json"))}
shipped = pytest.mark.parametrize("split", FILES)


@functools.cache
def halves() -> dict[str, DataSet]:
    data = load("emoji")
    base, novel = base_novel(data)
    return {"base": base, "novel": novel, "all": data}


@functools.cache
def backbone() -> Backbone:
    return load_backbone("embedded")


@shipped
def test_file_is_sound_and_about_the_classes_of_its_split(split: str) -> None:
    texts = load_pair_texts(FILES[split])
    assert (texts.dataset, texts.split) == ("emoji", split)
    assert texts.classes == halves()[split].classes
    assert texts.pairs and texts.source


@shipped
def test_13_no_base_text_names_a_novel_class(split: str) -> None:
    texts = load_pair_texts(FILES[split])
    forbidden = halves()["novel"].classes if split == "base" else ()
    findings = validate_pair_texts(texts, halves()[split].classes, forbidden_classes=forbidden)
    assert not findings, "\n".join(map(str, findings))


@shipped
def test_14_every_text_fits_the_shipped_model_and_has_a_unit_row(split: str) -> None:
    texts = load_pair_texts(FILES[split])
    findings = length_findings(texts, backbone().tokenize)
    assert not findings, "\n".join(map(str, findings))
    some = texts.classes[:16]  # to encode all of them takes a minute
    prompts = PairPrompts(texts, backbone(), some)
    assert 0 < len(prompts) == sum(set(pair) <= set(some) for pair in texts.pairs)
    for rows in (prompts.commonality, prompts.difference):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:2]))


@shipped
def test_12_every_mistake_of_the_shipped_model_has_texts(split: str) -> None:
    """Base: all cells of a bank of half the training images (all take a minute). Novel: every class is in a pair."""
    texts, data = load_pair_texts(FILES[split]), halves()[split]
    if split != "base":
        assert {name for pair in texts.pairs for name in pair} == set(data.classes)
        return
    bank = ConfusionBank.build(backbone(), few_shot(data.train, 2, seed=1))
    cells = selectable_pairs(backbone().class_text_features(data.classes), bank, neighbours=0)
    assert len(cells) > 50
    missing = validate_pair_texts(texts, data.classes, selectable=cells)
    assert not missing, "\n".join(map(str, missing))
