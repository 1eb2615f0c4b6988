"""Metadata of torch.save in both formats: what plain data gives, and what is refused without running any of it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from capt.data.readers import t7
from capt.data.readers.t7 import read_t7
from capt.errors import DataError

RECORDS = [
    {"image": "old_dog/1.jpg", "attr": "old", "obj": "dog", "set": "train", "n": 3, "x": 0.5, "big": 2**40},
    {"image": "café.jpg", "attr": "NA", "obj": "NA", "set": "NA", "none": None, "yes": True, "nested": [[1], {}]},
]


def saved(value: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/").replace("_", "."), content)
    return stream.getvalue()


def legacy(*pickles: bytes) -> bytes:
    """The header of the older format and then these pickles."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}})
    return b"".join([*(pickle.dumps(part, 2) for part in header), *pickles])


EMPTY = pickle.dumps([], 2)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [RECORDS, [], [RECORDS[0]] * 2500, {"a": "b"}, "text"])
def test_plain_data_is_what_torch_load_gives(tmp_path, value, zipped):
    (tmp_path / "a.t7").write_bytes(saved(value, zipped))
    assert read_t7(tmp_path / "a.t7") == value == torch.load(tmp_path / "a.t7", weights_only=True)


def test_text_of_python_2(tmp_path):
    record = b"\x80\x02]q\x00}q\x01(U\x05imageU\x05caf\xc3\xa9T\x03\x00\x00\x00objU\x03dogua."
    (tmp_path / "a.t7").write_bytes(legacy(record, EMPTY))
    assert read_t7(tmp_path / "a.t7") == [{"image": "café", "obj": "dog"}]


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(canary: str) -> dict[str, bytes]:
    """Files that make the canary file when torch loads them the trusting way."""
    touch = Call(os.system, f"touch '{canary}'")
    opened = f"open({canary!r}, 'w')"
    line = canary.encode()
    calls = {
        "reduce": touch,
        "inside a record": [{**RECORDS[0], "attr": touch}],
        "as a key": [{touch: 1}],
        "eval": Call(eval, opened),
        "exec": Call(exec, opened),
        "open": Call(open, canary, "w"),
        "behind records": [*RECORDS, touch],
    }
    files = {f"{name}, zip": saved(value) for name, value in calls.items()}
    files |= {f"{name}, legacy": saved(value, zipped=False) for name, value in calls.items()}
    old = b"cos\nsystem\n(S'touch " + line + b"'\ntR."
    files["protocol 0"] = legacy(old, EMPTY)
    files["inst"] = legacy(b"(S'touch " + line + b"'\nios\nsystem\n.", EMPTY)
    files["instead of the mark"] = old
    files["instead of the header"] = b"".join(pickle.dumps(part, 2) for part in (t7._MAGIC, 1001)) + old
    files["instead of the storages"] = legacy(pickle.dumps(RECORDS, 2), pickle.dumps(touch, 2))
    files["stack global"] = legacy(pickle.dumps(touch, 4), EMPTY)
    return files


@pytest.mark.parametrize("kind", list(attacks("canary")))
def test_hostile_file_is_refused_and_nothing_runs(tmp_path, kind):
    canary = tmp_path / "canary"
    path = tmp_path / "metadata.t7"
    path.write_bytes(attacks(str(canary))[kind])
    with pytest.raises(DataError, match=r"'metadata\.t7': (refused|damaged)"):
        read_t7(path)
    assert not canary.exists()
    with contextlib.suppress(Exception):  # the trap is real: the trusting loader falls into it
        torch.load(path, weights_only=False)
    assert canary.exists()


BODY = pickle.dumps(RECORDS, 2)
REFUSED = {
    "empty": b"",
    "text": b"hello",
    "a tensor": saved([torch.zeros(2)]),
    "a tensor, legacy": saved([torch.zeros(2)], zipped=False),
    "a numpy array": saved(np.zeros(2)),
    "a set": saved({1}),
    "bytes": legacy(pickle.dumps(b"x", 3), EMPTY),
    "a key that is a number": saved({1: 2}),
    "a tuple": saved([(1, 2)]),
    "no data.pkl": archive(a__version=b"3"),
    "two data.pkl": archive(a__data_pkl=BODY, b__data_pkl=BODY),
    "storages beside it": archive(a__data_pkl=BODY, a__data__0=b"x"),
    "something behind the pickle": archive(a__data_pkl=BODY + BODY),
    "something behind the file": legacy(BODY, EMPTY) + b"x",
    "storages listed": legacy(BODY, pickle.dumps(["0"], 2)),
    "no storages": legacy(BODY),
    "other mark": pickle.dumps(7, 2) + legacy(BODY, EMPTY),
    "cut zip": saved(RECORDS)[:-40],
    "cut zip at the start": saved(RECORDS)[:60],
    "cut legacy": saved(RECORDS, zipped=False)[:-30],
    "damaged zip": saved(RECORDS).replace(b"old_dog", b"old_cat"),
    "persistent id": legacy(b"\x80\x02Pcanary\n.", EMPTY),
    "persistent id on the stack": legacy(b"\x80\x02U\x01xQ.", EMPTY),
    "extension": legacy(b"\x80\x02\x82\x01.", EMPTY),
    "memo that was never set": legacy(b"\x80\x02h\x05.", EMPTY),
    "values left over": legacy(b"\x80\x02]].", EMPTY),
    "text of 2^31 bytes": legacy(b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.", EMPTY),
    "nothing to append to": legacy(b"\x80\x02K\x01K\x02a.", EMPTY),
    "mark as a value": legacy(b"\x80\x02((t.", EMPTY),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused(tmp_path, content):
    (tmp_path / "metadata.t7").write_bytes(content)
    with pytest.raises(DataError, match=r"'metadata\.t7': (refused|damaged)"):
        read_t7(tmp_path / "metadata.t7")


def test_nested_lists_neither_crash_nor_hang(tmp_path):
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    (tmp_path / "a.t7").write_bytes(legacy(deep, EMPTY))
    assert isinstance(read_t7(tmp_path / "a.t7"), list)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'a\.t7': cannot be read"):
        read_t7(tmp_path / "a.t7")


def test_limits_hold_before_memory_is_used(tmp_path, monkeypatch):
    path = tmp_path / "a.t7"
    with open(path, "wb") as stream:  # sparse: takes no space
        stream.truncate((128 << 20) + 1)
    with pytest.raises(DataError, match="134,217,729 bytes, more than the limit"):
        read_t7(path)
    monkeypatch.setattr(t7, "_MAX_BYTES", 1 << 20)
    path.write_bytes(archive(a__data_pkl=b"\x80\x02" + b"]0" * (1 << 20) + b"."))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="unpacks to more than 1,048,576 bytes"):
        read_t7(path)
    monkeypatch.setattr("capt.data.readers.plain_pickle._MAX_INSTRUCTIONS", 1000)
    path.write_bytes(legacy(b"\x80\x02(" + b"]" * 2000 + b"e.", EMPTY))
    with pytest.raises(DataError, match="more than 1,000 instructions"):
        read_t7(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_end_in_a_value_or_in_our_error(tmp_path, zipped):
    whole, rng = saved(RECORDS * 5, zipped), np.random.default_rng(0)
    path: Path = tmp_path / "a.t7"
    for number in range(200):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        if number % 3 == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del data[at : at + 1 + number % 50]
        else:
            data[at:at] = rng.bytes(3)
        path.write_bytes(bytes(data))
        with contextlib.suppress(DataError):
            read_t7(path)
