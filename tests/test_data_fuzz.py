"""Damaged lists, archives and indexes: every reader ends in a data set or in one of our errors, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capt.data import load, load_few_shot, save_few_shot
from capt.data.readers.coop_few_shot import read_coop_few_shot
from capt.errors import DamagedFileError, DataError
from tests.data_files import save, shard

MUTANTS = 150
PLANTED = (
    b"\0",
    b"\xff\xfe",
    b'"',
    b",",
    b"\n",
    b"{",
    b"]",
    b"../",
    b"9" * 30,
    b"\xe2\x80\xae",
    b"R",
    b"c os\n",
    b"\x80\x04",
)


def mutants(original: bytes, rng: np.random.Generator) -> list[bytes]:
    """Cuts, flipped bits, planted tokens, doubled and moved pieces."""
    result = []
    for number in range(MUTANTS):
        data = bytearray(original)
        at, length = (int(value) for value in rng.integers(0, len(data), 2))
        kind = number % 5
        if kind == 0:
            del data[at:]
        elif kind == 1:
            for place in rng.integers(0, len(data), 1 + number % 8):
                data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at:at] = PLANTED[int(rng.integers(len(PLANTED)))]
        elif kind == 3:
            data[at:at] = data[length : length + 64]
        else:
            del data[at : at + length % 64 + 1]
        result.append(bytes(data))
    return result


def zhou(root: Path) -> Path:
    path = root / "dtd" / "split_zhou_DescribableTextures.json"
    save(root / "dtd" / "images" / "a.png")
    path.write_text(json.dumps({"train": [["a.png", 0, "dotted"]], "val": [], "test": []}))
    return path


def csv(root: Path) -> tuple[Path, Callable[[], object]]:
    path = root / "list.csv"
    path.write_text('path,label,split\n"a.png",cat,train\nb.png,dög,test\n', "utf-8")
    return path, lambda: load(path, check_files=False)


def jsonl(root: Path) -> tuple[Path, Callable[[], object]]:
    path = root / "list.jsonl"
    path.write_text('{"path": "a.png", "label": "cat"}\n{"path": "b.png", "label": 1, "split": "val"}\n')
    return path, lambda: load(path, check_files=False)


def split_file(root: Path) -> tuple[Path, Callable[[], object]]:
    return zhou(root), lambda: load("coop:dtd", root=root, check_files=False)


def shards(root: Path) -> tuple[Path, Callable[[], object]]:
    path = shard(root / "a.tar", [0, 1, 2])
    return path, lambda: load(path)


def few_shot_list(root: Path) -> tuple[Path, Callable[[], object]]:
    zhou(root)
    images = load("coop:dtd", root=root, warn=False).train
    path = root / "shots.json"
    save_few_shot(path, images)
    return path, lambda: load_few_shot(path, images)


def coop_pickle(root: Path) -> tuple[Path, Callable[[], object]]:
    zhou(root)
    data = load("coop:dtd", root=root, warn=False)
    path = root / "shot_1-seed_1.pkl"
    record = b"cdassl.data.datasets.base_dataset\nDatum\n)\x81}(X\x07\0\0\0_impathX\x0d\0\0\0/images/a.png"
    record += b"X\x06\0\0\0_labelK\0X\x07\0\0\0_domainK\0X\n\0\0\0_classnameX\x06\0\0\0dottedub"
    path.write_bytes(b"\x80\x02}X\x05\0\0\0train]" + record + b"as.")
    return path, lambda: read_coop_few_shot(path, data)


@pytest.mark.filterwarnings("ignore:.*not the published data set")
@pytest.mark.parametrize("reader", [csv, jsonl, split_file, shards, few_shot_list, coop_pickle])
def test_damage_ends_in_our_errors(tmp_path, reader):
    path, read = reader(tmp_path)
    read()  # the undamaged file is fine
    refused, started = 0, time.monotonic()
    for data in mutants(path.read_bytes(), np.random.default_rng(1)):
        path.write_bytes(data)
        try:
            read()
        except (DataError, DamagedFileError) as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > MUTANTS // 5
    assert time.monotonic() - started < 30


def test_changed_few_shot_list_is_never_accepted(tmp_path):
    path, read = few_shot_list(tmp_path)
    original = json.loads(path.read_text())
    for data in mutants(path.read_bytes(), np.random.default_rng(2)):
        path.write_bytes(data)
        try:
            read()
        except (DataError, DamagedFileError):
            continue
        assert json.loads(data) == original  # only white space was touched
