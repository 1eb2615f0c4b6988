"""The check of a folder in CoOp's layout: what is found, missing, different or damaged; few-shot lists made JSON."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import capt.cli
from capt.data import base_novel, check, load, load_few_shot
from capt.data.readers.coop_few_shot import coop_few_shot_sets
from capt.data.readers.coop_layouts import LAYOUTS
from capt.errors import DataError
from tests.coop_files import CLASSES, SPLIT_FILES, SYNSETS, datum_class, imagenet, published, tree, zhou
from tests.data_files import save

pytestmark = pytest.mark.filterwarnings("ignore:.*not the published data set")


def test_all_kinds_of_findings(tmp_path, monkeypatch):
    zhou(tmp_path, "dtd")
    zhou(tmp_path, "eurosat")
    (zhou(tmp_path, "food101") / "split_zhou_Food101.json").unlink()
    (zhou(tmp_path, "ucf101") / "UCF-101-midframes" / "boxer" / "test_1.jpg").unlink()
    (zhou(tmp_path, "sun397") / "split_zhou_SUN397.json").write_text("{")
    imagenet(tmp_path)
    published(monkeypatch, "dtd", 2, (6, 2, 4))
    report = check(tmp_path)
    found = {finding.dataset: finding for finding in report.findings}
    assert {name: finding.status for name, finding in found.items()} == {
        "dtd": "ok", "eurosat": "different", "food101": "incomplete", "ucf101": "incomplete", "sun397": "damaged",
        "imagenet": "different", "caltech101": "missing", "oxford_pets": "missing", "stanford_cars": "missing",
        "oxford_flowers": "missing", "fgvc_aircraft": "missing", "imagenetv2": "missing",
        "imagenet-sketch": "missing", "imagenet-a": "missing", "imagenet-r": "missing",
    }  # fmt: skip
    assert found["dtd"].found == found["dtd"].expected == {"classes": 2, "train": 6, "val": 2, "test": 4}
    assert found["food101"].problems == ["no file 'split_zhou_Food101.json'"]
    assert "UCF-101-midframes/boxer/test_1.jpg" in found["ucf101"].problems[0]
    assert found["eurosat"].problems[0] == "2 classes, expected 10"
    assert not report.ok


def test_text_and_json(tmp_path, monkeypatch):
    zhou(tmp_path, "dtd")
    published(monkeypatch, "dtd", 2, (6, 2, 4))
    report = check(tmp_path, "dtd")
    assert report.ok and len(report.findings) == 1
    assert check(tmp_path).ok  # data sets that are not there at all do no harm
    assert "2 classes, 6 train, 2 val, 4 test" in report.text()
    assert json.loads(json.dumps(report.as_dict()))["findings"][0]["status"] == "ok"
    assert "expected: 37 classes, 2,944 train" in check(tmp_path, ["pets", "cars"]).text()


def test_empty_root_is_not_ok(tmp_path):
    assert not check(tmp_path).ok
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "nowhere")


def test_no_warning(tmp_path, recwarn):
    zhou(tmp_path, "eurosat")
    check(tmp_path)
    assert not recwarn.list
