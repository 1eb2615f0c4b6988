"""CoOp's layout: the eleven data sets, its few-shot pickles (benign and hostile), and the check of a root folder."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capt.data import check, few_shot, load
from capt.data.readers.coop_layouts import LAYOUTS, layout_of
from capt.data.readers.coop_pickle import read_coop_pickle
from capt.errors import DataError
from tests.coop_files import CLASSES, SPLIT_FILES, fgvc, imagenet, importable_datum, zhou
from tests.data_files import save

pytestmark = pytest.mark.filterwarnings("ignore:.*not the published data set")


class TestLayouts:
    def test_published_numbers(self):
        assert len(LAYOUTS) == 15
        assert {name: layout.classes for name, layout in LAYOUTS.items()} == {
            "imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102,
            "food101": 101, "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101,
            "imagenetv2": 1000, "imagenet-sketch": 1000, "imagenet-a": 200, "imagenet-r": 200,
        }  # fmt: skip
        # Test images as the CoOp and CAPT papers list them.
        assert [layout.counts[2] for layout in LAYOUTS.values()] == [
            50_000, 2_465, 3_669, 8_041, 2_463, 30_300, 3_333, 19_850, 1_692, 8_100, 3_783,
            10_000, 50_889, 7_500, 30_000,
        ]  # fmt: skip

    @pytest.mark.parametrize("dataset", SPLIT_FILES)
    def test_split_file(self, tmp_path, dataset):
        folder = zhou(tmp_path, dataset)
        data = load(f"coop:{dataset}", root=tmp_path)
        assert data.classes == ("Abyssinian cat", "boxer") and data.root == folder
        assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 4)
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.test.image(3).size == (8, 6)
        assert all((folder / name).is_file() for name in data.train.names)
        assert len(data.meta["sha256"][SPLIT_FILES[dataset]]) == 64

    def test_split_file_names(self):
        assert SPLIT_FILES["dtd"] == "split_zhou_DescribableTextures.json"
        assert SPLIT_FILES["oxford_flowers"] == "split_zhou_OxfordFlowers.json"
        assert len(SPLIT_FILES) == 9

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("OxfordPets", "oxford_pets"), ("caltech-101", "caltech101"), ("flowers102", "oxford_flowers"),
         ("cars", "stanford_cars"), ("DescribableTextures", "dtd"),
         ("food-101", "food101"), ("FGVCAircraft", "fgvc_aircraft"), ("SUN", "sun397"),
         ("ImageNet", "imagenet"), ("EuroSAT", "eurosat"), ("UCF-101", "ucf101")],
    )  # fmt: skip
    def test_other_names(self, name, expected):
        assert layout_of(name).name == expected

    def test_unknown_name_lists_the_known(self, tmp_path):
        with pytest.raises(DataError, match=r"unknown data set.*oxford_pets"):
            load("coop:mnist", root=tmp_path)

    def test_underscores_can_stay(self, tmp_path):
        zhou(tmp_path, "dtd")
        assert load("coop:dtd", root=tmp_path, underscores="keep").classes == tuple(CLASSES)

    def test_fgvc(self, tmp_path):
        fgvc(tmp_path)
        data = load("coop:aircraft", root=tmp_path)
        assert data.classes == ("707-320", "F/A-18", "DC-3 b")
        assert data.val.names == ["images/0010.jpg", "images/0011.jpg", "images/0012.jpg"]
        assert data.test.labels.tolist() == [0, 1, 2]

    def test_fgvc_unknown_variant(self, tmp_path):
        (fgvc(tmp_path) / "images_variant_val.txt").write_text("0010 707-320\n0011 B-2\n")
        with pytest.raises(DataError, match=r"images_variant_val\.txt', line 2: the variant 'B-2'"):
            load("coop:fgvc_aircraft", root=tmp_path)

    def test_imagenet(self, tmp_path):
        imagenet(tmp_path)
        data = load("coop:imagenet", root=tmp_path)
        assert data.classes == ("sunglasses", "great white shark", "sunglasses")
        assert data.meta["duplicate_class_names"] == ["sunglasses"]
        assert data.train.names[:2] == ["images/train/n01/n01_2.png", "images/train/n01/n01_10.png"]
        assert data.val is None and data.test.names[2] == "images/val/n03/v_1.png" and data.test.labels[2] == 2

    def test_imagenet_folders_may_be_links_but_their_files_may_not(self, tmp_path):
        folder = imagenet(tmp_path)
        (folder / "images" / "train").rename(tmp_path / "elsewhere")
        (folder / "images" / "train").symlink_to(tmp_path / "elsewhere")
        data = load("coop:imagenet", root=tmp_path)
        assert data.train.image(0).size == (8, 6)
        secret = save(tmp_path / "secret.png")
        (tmp_path / "elsewhere" / "n01" / "n01_2.png").unlink()
        (tmp_path / "elsewhere" / "n01" / "n01_2.png").symlink_to(secret)
        with pytest.raises(DataError, match="leads out"):
            data.train.image(0)

    def test_imagenet_folder_without_a_name(self, tmp_path):
        folder = imagenet(tmp_path)
        save(folder / "images" / "train" / "n99" / "1.png")
        with pytest.raises(DataError, match="'n99'"):
            load("coop:imagenet", root=tmp_path)

    def test_other_counts_than_published_are_told_and_recorded(self, tmp_path):
        zhou(tmp_path, "eurosat")
        with pytest.warns(UserWarning, match="2 classes, expected 10; 6 train images, expected 13,500"):
            data = load("coop:eurosat", root=tmp_path)
        assert data.meta["differs_from_published"][0] == "2 classes, expected 10"

    def test_missing_parts_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r"root \(--root\) is missing"):
            load("coop:dtd")
        with pytest.raises(DataError, match=r"file 'split_zhou_DescribableTextures\.json', the folder 'images'"):
            load("coop:dtd", root=tmp_path)

    def test_missing_image_is_named(self, tmp_path):
        folder = zhou(tmp_path, "ucf101")
        (folder / "UCF-101-midframes" / "boxer" / "val_0.jpg").unlink()
        with pytest.raises(DataError, match=r"1 images are missing.*boxer/val_0\.jpg"):
            load("coop:ucf101", root=tmp_path)
        assert len(load("coop:ucf101", root=tmp_path, check_files=False).val) == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda split: split.pop("val"), "lists train, val and test"),
            (lambda split: split["train"].append(["a.jpg", 0]), r"train\[6\]: expected \[path"),
            (lambda split: split["train"].append(["a.jpg", "0", "boxer"]), r"train\[6\]: expected \[path"),
            (lambda split: split["train"].append(["a.jpg", True, "boxer"]), r"train\[6\]: expected \[path"),
            (lambda split: split["train"].append(["../../x.jpg", 0, CLASSES[0]]), r"train\[6\]: the path .* leaves"),
            (lambda split: split["test"].append(["/etc/x.jpg", 0, CLASSES[0]]), r"test\[4\]: the path .* is absolute"),
            (lambda split: split["test"].append(["x.jpg", 0, "other"]), r"test\[4\]: label 0 is 'other' here"),
            (lambda split: split["test"].append(["x.jpg", 5, "other"]), "without gaps"),
            (lambda split: split["test"].append(split["train"][0]), "listed twice"),
        ],
    )
    def test_damaged_split_file(self, tmp_path, change, message):
        path = zhou(tmp_path, "dtd") / "split_zhou_DescribableTextures.json"
        split = json.loads(path.read_text())
        change(split)
        path.write_text(json.dumps(split))
        with pytest.raises(DataError, match=message):
            load("coop:dtd", root=tmp_path, check_files=False)

    @pytest.mark.parametrize("content", [b"", b"[1", b"[]", b"\xff", b"[" * 100_000])
    def test_split_file_that_is_no_json(self, tmp_path, content):
        (zhou(tmp_path, "dtd") / "split_zhou_DescribableTextures.json").write_bytes(content)
        with pytest.raises(DataError, match=r"split_zhou_DescribableTextures\.json"):
            load("coop:dtd", root=tmp_path)

    def test_reads_a_folder_it_may_not_write(self, tmp_path):
        folder = zhou(tmp_path, "dtd")
        before = sorted(str(path) for path in folder.rglob("*"))
        few_shot(load("coop:dtd", root=tmp_path).train, 1, 1)
        check(tmp_path)
        assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.fixture
def datum(monkeypatch):
    return importable_datum(monkeypatch)


AWAY = "/data/alice/DATA/oxford_pets/images"


def store(root: Path, value: object, protocol: int = pickle.HIGHEST_PROTOCOL, name: str = "shot_2-seed_1.pkl") -> Path:
    path = root / "oxford_pets" / "split_fewshot" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


class TestBenignPickles:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_paths_are_rebased(self, tmp_path, datum, protocol):
        zhou(tmp_path, "oxford_pets")
        lists = {
            "train": [
                datum(f"{AWAY}/{name}/train_{n}.jpg", label, name) for label, name in enumerate(CLASSES) for n in (2, 0)
            ],
            "val": [datum(f"{AWAY}/boxer/val_0.jpg", 1, "boxer")],
        }
        store(tmp_path, lists, protocol)
        data = load("coop:oxford_pets", root=tmp_path, shots=2, seed=1)
        assert data.train.names == [f"images/{name}/train_{n}.jpg" for name in CLASSES for n in (2, 0)]
        assert data.train.ids.tolist() == [2, 0, 5, 3] and data.val.ids.tolist() == [7] and len(data.test) == 4
        assert data.train.image(0).size == (8, 6)
        assert data.meta["few_shot"]["file"] == "shot_2-seed_1.pkl" and len(data.meta["few_shot"]["sha256"]) == 64
        assert str(tmp_path) not in json.dumps(data.record())

    def test_windows_paths_and_no_val(self, tmp_path, datum):
        zhou(tmp_path, "oxford_pets")
        store(tmp_path, {"train": [datum("D:\\data\\oxford_pets\\images\\boxer\\train_1.jpg", 1, "boxer")]})
        data = load("coop:oxford_pets", root=tmp_path, shots=2, seed=1)
        assert data.train.names == ["images/boxer/train_1.jpg"] and len(data.val) == 2

    def test_repeated_images_are_taken_once_and_counted(self, tmp_path, datum):
        zhou(tmp_path, "oxford_pets")
        one = datum(f"{AWAY}/boxer/train_1.jpg", 1, "boxer")
        store(tmp_path, {"train": [one, one, datum(f"{AWAY}/boxer/train_1.jpg", 1, "boxer")], "val": []})
        data = load("coop:oxford_pets", root=tmp_path, shots=2, seed=1)
        assert data.train.names == ["images/boxer/train_1.jpg"]
        assert data.meta["few_shot"]["repeated"] == {"train": 2, "val": 0}

    def test_many_records_as_pickle_writes_them(self, tmp_path, datum):
        lists = {"train": [datum(f"/x/images/{n}.jpg", n % 7, f"class {n % 7}") for n in range(3000)], "val": []}
        found = read_coop_pickle(store(tmp_path, lists))
        assert len(found["train"]) == 3000 and found["train"][2999].label == 2999 % 7
        assert found["train"][300].class_name == "class 6"

    @pytest.mark.parametrize(
        ("path", "label", "name", "message"),
        [
            ("boxer/train_9.jpg", 1, "boxer", r"'boxer/train_9\.jpg' is not among the train images"),
            ("boxer/test_0.jpg", 1, "boxer", "not among the train images"),
            ("boxer/train_0.jpg", 0, "boxer", "do not belong together"),
            ("boxer/train_0.jpg", 1, "pug", "do not belong together"),
            ("../../../../etc/passwd", 1, "boxer", "not among the train images"),
        ],
    )
    def test_list_of_other_data(self, tmp_path, datum, path, label, name, message):
        zhou(tmp_path, "oxford_pets")
        store(tmp_path, {"train": [datum(f"{AWAY}/{path}", label, name)], "val": []})
        with pytest.raises(DataError, match=message):
            load("coop:oxford_pets", root=tmp_path, shots=2, seed=1)

    def test_no_such_list_and_half_a_wish(self, tmp_path):
        zhou(tmp_path, "oxford_pets")
        with pytest.raises(DataError, match=r"shot_4-seed_0\.pkl.*no such few-shot file"):
            load("coop:oxford_pets", root=tmp_path, shots=4, seed=0)
        with pytest.raises(DataError, match="give both"):
            load("coop:oxford_pets", root=tmp_path, shots=4)


class _Call:
    def __init__(self, function, *arguments):
        self.pair = (function, arguments)

    def __reduce__(self):
        return self.pair


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"  # STACK_GLOBAL


DATUM = named("dassl.data.datasets.base_dataset", "Datum")
STATE = b"}(" + text("_impath") + text("x") + text("_label") + b"K\x01" + text("_domain") + b"K\0"
STATE += text("_classname") + text("c") + b"u"
RECORD = DATUM + b")\x81" + STATE + b"b"


def lists(item: bytes) -> bytes:
    """{"train": [item]} in protocol 4."""
    return b"\x80\x04}" + text("train") + b"]" + item + b"as."


def test_hand_made_benign_pickle_is_read(tmp_path):
    (tmp_path / "x.pkl").write_bytes(lists(RECORD))
    assert [(item.path, item.label, item.class_name) for item in read_coop_pickle(tmp_path / "x.pkl")["train"]] == [
        ("x", 1, "c")
    ]


def executing(canary: str) -> dict[str, bytes]:
    """Pickles that make the canary file when they are loaded the ordinary way."""
    command = f"touch '{canary}'"
    call = text(command) + b"\x85R"
    system = named("os", "system")
    return {
        "reduce, protocol 4": pickle.dumps(_Call(os.system, command), 4),
        "reduce, protocol 0": pickle.dumps(_Call(os.system, command), 0),
        "eval": pickle.dumps(_Call(eval, f"open({canary!r}, 'w')")),
        "exec": pickle.dumps(_Call(exec, f"open({canary!r}, 'w')")),
        "open": pickle.dumps(_Call(open, canary, "w")),
        "subprocess": pickle.dumps(_Call(subprocess.call, ["touch", canary])),
        "inside the dict": pickle.dumps({"train": [_Call(os.system, command)], "val": []}),
        "beside the lists": pickle.dumps({"train": [], "val": [], "x": _Call(os.system, command)}),
        "as a key": pickle.dumps({_Call(os.system, command): 1}),
        "inst": b"(S'" + command.replace("'", '"').encode() + b"'\nios\nsystem\n.",
        "obj": b"(" + system + text(command) + b"o.",
        "global, old": b"cos\nsystem\n(S'" + command.replace("'", '"').encode() + b"'\ntR.",
        "importlib": named("importlib", "import_module") + text("os") + b"\x85R0" + system + call + b".",
        "getattr": named("builtins", "getattr") + named("builtins", "__import__") + text("os") + b"\x85R"
        + text("system") + b"\x86R" + call + b".",
        "then a benign list": b"\x80\x04" + system + call + b"0}" + text("train") + b"]" + RECORD + b"as.",
        "after a benign list": lists(RECORD)[:-1] + system + call + b"0.",
        "state of a record": lists(DATUM + b")\x81" + STATE[:-1] + text("_extra") + system + call + b"ub"),
        "partial": pickle.dumps(_Call(__import__("functools").partial(os.system, command))),
        "runpy": pickle.dumps(_Call(__import__("runpy").run_path, _script(canary))),
        "ordered dict": pickle.dumps(collections.OrderedDict(train=[_Call(os.system, command)])),
    }  # fmt: skip


def _script(canary: str) -> str:
    path = Path(canary).with_suffix(".py")
    path.write_text(f"open({canary!r}, 'w')")
    return str(path)


HOSTILE = [
    "reduce, protocol 4", "reduce, protocol 0", "eval", "exec", "open", "subprocess", "inside the dict",
    "beside the lists", "as a key", "inst", "obj", "global, old", "importlib", "getattr", "then a benign list",
    "after a benign list", "state of a record", "partial", "runpy", "ordered dict",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, datum, kind):
    canary = tmp_path / "canary"
    payload = executing(str(canary))[kind]
    path = tmp_path / "shot_1-seed_1.pkl"
    path.write_bytes(payload)
    with pytest.raises(DataError, match=r"shot_1-seed_1\.pkl': (refused|damaged)"):
        read_coop_pickle(path)
    assert not canary.exists()
    with contextlib.suppress(Exception):  # the trap is real: the ordinary loader falls into it
        pickle.loads(payload)
    assert canary.exists()


REFUSED = {
    "empty file": b"",
    "text": b"hello",
    "no end": lists(RECORD)[:-1],
    "cut": lists(RECORD)[:-20],
    "second pickle behind it": lists(RECORD) + lists(RECORD),
    "a list": b"\x80\x04].",
    "only val": b"\x80\x04}" + text("val") + b"]s.",
    "third list": b"\x80\x04}(" + text("train") + b"]" + text("test") + b"]u.",
    "train is a dict": b"\x80\x04}" + text("train") + b"}s.",
    "train holds text": lists(text("x")),
    "train holds the class": lists(DATUM),
    "record without state": lists(DATUM + b")\x81"),
    "record filled twice": lists(RECORD + STATE + b"b"),
    "record with a list as arguments": lists(DATUM + b"]\x81" + STATE + b"b"),
    "record with arguments": lists(DATUM + text("x") + b"\x85\x81" + STATE + b"b"),
    "state on the class": lists(DATUM + STATE + b"b"),
    "state is text": lists(DATUM + b")\x81" + text("x") + b"b"),
    "state lacks a field": lists(DATUM + b")\x81}" + text("_label") + b"K\x01sb"),
    "label is text": lists(RECORD.replace(b"K\x01", text("1"))),
    "label is a truth value": lists(RECORD.replace(b"K\x01", b"\x88")),
    "label is a float": lists(RECORD.replace(b"K\x01", b"G" + struct.pack(">d", 1))),
    "label is a huge number": lists(RECORD.replace(b"K\x01", b"\x8a\xff" + b"\x7f" * 255)),
    "path is a list": lists(RECORD.replace(text("x"), b"]")),
    "key is a number": lists(RECORD.replace(text("_label"), b"K\x07")),
    "Datum of another module": lists(RECORD.replace(DATUM, named("os", "Datum"))),
    "other class of the module": lists(RECORD.replace(DATUM, named("dassl.data.datasets.base_dataset", "DatasetBase"))),
    "attribute of the class": lists(RECORD.replace(DATUM, named("dassl.data.datasets.base_dataset", "Datum.__init__"))),
    "class name in a variable": lists(b"]]\x93"),
    "object": lists(named("builtins", "object") + b")\x81"),
    "newobj_ex": lists(DATUM + b")}\x92" + STATE + b"b"),
    "persistent id": b"Pcanary\n.",
    "binary persistent id": text("x") + b"Q.",
    "extension 1": b"\x82\x01.",
    "extension 4": b"\x84\x01\0\0\0.",
    "next buffer": b"\x97.",
    "pop": b"\x80\x04]0}" + text("train") + b"]s.",
    "dup": lists(RECORD + b"2"),
    "memo that was never set": lists(b"h\x05"),
    "list in itself": b"\x80\x04}" + text("train") + b"]\x94h\0as.",
    "mark as a value": b"\x80\x04}" + text("train") + b"]((as.",
    "nothing to append to": b"\x80\x04" + text("x") + text("x") + b"a.",
    "text of 2^62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "text that is no UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "deep nesting": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "numpy array": pickle.dumps({"train": [np.zeros(2)], "val": []}),
    "set": pickle.dumps({"train": {1}, "val": []}),
    "bytes": pickle.dumps({"train": b"x", "val": []}),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'x\.pkl': (refused|damaged)"):
        read_coop_pickle(path)


def test_memo_index_costs_no_memory(tmp_path):
    (tmp_path / "x.pkl").write_bytes(lists(RECORD + b"r" + struct.pack("<I", 2**32 - 1)))
    assert len(read_coop_pickle(tmp_path / "x.pkl")["train"]) == 1


def test_reading_imports_nothing(tmp_path, datum):
    (tmp_path / "x.pkl").write_bytes(lists(RECORD))
    calls = []
    datum.__setstate__ = lambda self, state: calls.append(state)
    before = set(sys.modules)
    read_coop_pickle(tmp_path / "x.pkl")
    assert set(sys.modules) == before and not calls


def test_too_large_file(tmp_path):
    with open(tmp_path / "x.pkl", "wb") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(DataError, match="more than the limit"):
        read_coop_pickle(tmp_path / "x.pkl")
