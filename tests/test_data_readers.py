"""Folders, lists, shards and the shipped emoji: what is read, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from capt.data import batches, load
from capt.data.names import class_list, natural_key, safe_relative
from capt.data.readers.coop_layouts import LAYOUTS
from capt.data.readers.emoji import read_emoji
from capt.data.readers.shards import expand
from capt.errors import CaptError, DamagedFileError, DataError
from tests.czsl_files import tree as czsl_tree
from tests.data_files import folders, image_bytes, member, save, shard, tar, to_tensor

ODD_NAMES = [
    "🦊", "\U0001f469\U0001f3fd\u200d\U0001f680", "\U0001f3f3\ufe0f\u200d\U0001f308", "1\ufe0f\u20e3", "キツネ",
    "北京烤鸭", "한국어", "ثعلب", "שועל", "می\u200cخواهم", "क्षत्रिय", "ไทย", "Ångström", "naïve café", "e\u0323\u0301",
    "ﬁne", "Straße", "İstanbul", "ǅ", "a\u202eb", "\u2067x\u2069", "…", "½", "x" * 80, "__class__", "..two-dots", "CON",
    "null", "True", "0", "-1", "1e5", "%s {} \\n", "'; drop table", "<b>&amp;", "a photo of a {}", "$" + "HOME",
    "~tilde", "#tag", "a,b;c", '"quoted"', "a  b", "C++", "R&D", "naïve\u00a0space",
]  # fmt: skip


class TestNames:
    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names_stay_what_they_are(self, name):
        assert class_list([name], "here") == (unicodedata.normalize("NFC", name),)

    def test_all_together(self):
        assert len(class_list(ODD_NAMES, "here")) == len(ODD_NAMES)

    @pytest.mark.parametrize("name", ["", " ", "\t", "\u200b", "\ufeff", "a\nb", "a\0b", "\x1b[31m", "a\x7f", "\udcff"])
    def test_unusable_names_are_named(self, name):
        with pytest.raises(DataError, match="here") as caught:
            class_list(["cat", name], "here")
        assert repr(name) in str(caught.value)

    @pytest.mark.parametrize(
        ("one", "two"),
        [("é", "e\u0301"), ("Å", "\u212b"), ("가", "\u1100\u1161"), ("cat", "cat "), ("cat", "c\u200bat"), ("x", "x")],
    )
    def test_twins_are_refused_and_shown_apart(self, one, two):
        with pytest.raises(DataError, match="same text after Unicode normalisation") as caught:
            class_list([one, two], "here")
        assert ascii(one) in str(caught.value) and ascii(two) in str(caught.value)

    @pytest.mark.parametrize(
        ("one", "two"), [("cat", "Cat"), ("a\u200cb", "ab"), ("ﬁ", "fi"), ("👨‍👩", "👨👩"), ("e", "é")]
    )
    def test_different_names_stay_different(self, one, two):
        assert len(set(class_list([one, two], "here"))) == 2

    def test_no_class(self):
        with pytest.raises(DataError, match="found no class"):
            class_list([], "here")

    def test_natural_order(self):
        names = ["item 10", "item 2", "item 1", "b", "a", "10", "9", "a1b10", "a1b9", "02", "2", "²"]
        expected = ["02", "2", "9", "10", "a", "a1b9", "a1b10", "b", "item 1", "item 2", "item 10", "²"]
        assert sorted(names, key=natural_key) == expected

    @pytest.mark.parametrize(
        "path",
        ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "", ".", "C:\\x", "c:/x", "\\\\host\\x", "a\\..\\x",
         "a\0b", "\udcff.png"],
    )  # fmt: skip
    def test_paths_that_leave_are_refused(self, path):
        with pytest.raises(DataError, match=r"line 3: the path"):
            safe_relative(path, "line 3")

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("a/b.png", "a/b.png"),
            ("./a//b.png", "a/b.png"),
            ("..a/b..", "..a/b.."),
            ("a b/c\nd", "a b/c\nd"),
            ("…", "…"),
        ],
    )
    def test_paths_inside(self, path, expected):
        assert safe_relative(path, "x") == expected


class TestFolder:
    def test_splits(self, tmp_path):
        root = folders(
            tmp_path / "pets", {"train/dog": 3, "train/cat": 2, "valid/cat": 1, "test/dog": 2, "test/cat": 1}
        )
        data = load(root)
        assert data.name == "pets" and data.classes == ("cat", "dog") and data.root == root
        assert data.train.names == [
            *(f"train/cat/{n}.png" for n in range(2)),
            *(f"train/dog/{n}.png" for n in range(3)),
        ]
        assert data.val.names == ["valid/cat/0.png"]
        assert data.test.labels.tolist() == [0, 1, 1]
        assert np.concatenate([data.train.ids, data.val.ids, data.test.ids]).tolist() == list(range(9))
        assert data.train.image(4).getpixel((0, 0)) == (2, 2, 2)

    def test_plain_makes_no_test_split_by_itself(self, tmp_path):
        data = load(folders(tmp_path, {"cat": 4, "dog": 4}))
        assert data.test is None and data.val is None and len(data.train) == 8

    def test_test_fraction_is_a_wish_and_recorded(self, tmp_path):
        root = folders(tmp_path, {"cat": 8, "dog": 4})
        data = load(root, test_fraction=0.25)
        assert data.train.counts.tolist() == [6, 3] and data.test.counts.tolist() == [2, 1]
        assert data.meta["hold_out"] == {"fraction": 0.25, "seed": 0}
        assert data.fingerprint() == load(root, test_fraction=0.25).fingerprint()
        assert data.fingerprint() != load(root, test_fraction=0.25, split_seed=1).fingerprint()

    def test_test_fraction_does_not_replace_a_test_split(self, tmp_path):
        with pytest.raises(DataError, match="2 test images already"):
            load(folders(tmp_path, {"train/cat": 4, "test/cat": 2}), test_fraction=0.5)

    def test_natural_order_of_classes_and_images(self, tmp_path):
        root = folders(tmp_path, {"10": 12, "9": 1, "2": 1})
        data = load(root)
        assert data.classes == ("2", "9", "10")
        assert data.train.names[-3:] == ["10/9.png", "10/10.png", "10/11.png"]

    def test_order_does_not_depend_on_the_file_system(self, tmp_path, monkeypatch):
        root = folders(tmp_path, {"b": 3, "a": 3, "c": 3})
        expected = load(root).fingerprint()
        real = os.scandir

        class Backwards:
            def __init__(self, path):
                self.entries = list(real(path))[::-1]

            def __enter__(self):
                return iter(self.entries)

            def __exit__(self, *_):
                pass

        monkeypatch.setattr("capt.data.readers.folder.os.scandir", Backwards)
        assert load(root).fingerprint() == expected

    def test_hidden_and_other_files_are_ignored_and_counted(self, tmp_path):
        root = folders(tmp_path, {"cat": 1, "dog": 1, ".git/objects": 1})
        save(root / "cat" / ".thumb.png")
        (root / "cat" / "notes.txt").write_text("x")
        (root / "readme.md").write_text("x")
        data = load(root)
        assert len(data.train) == 2 and data.meta["ignored_files"] == 1

    def test_sub_folders_belong_to_their_class(self, tmp_path):
        root = folders(tmp_path, {"cat": 1, "cat/close up": 2, "dog": 1})
        assert load(root).train.names == ["cat/0.png", "cat/close up/0.png", "cat/close up/1.png", "dog/0.png"]

    def test_upper_case_extensions(self, tmp_path):
        root = folders(tmp_path, {"cat": 1})
        (root / "cat" / "0.png").rename(root / "cat" / "A.JPEG")
        assert load(root).train.names == ["cat/A.JPEG"]

    def test_odd_names_work(self, tmp_path):
        names = [
            name for name in ODD_NAMES if "/" not in name and not name.startswith(".") and len(name.encode()) < 250
        ]
        data = load(folders(tmp_path, dict.fromkeys(names, 1)))
        assert set(data.classes) == {unicodedata.normalize("NFC", name) for name in names}
        assert sum(len(batch) for batch in batches(data.train, to_tensor, batch_size=16)) == len(names)

    def test_file_names_with_spaces_newlines_and_255_bytes(self, tmp_path):
        names = ["a b.png", "new\nline.png", "x" * 251 + ".png", "ü.png"]
        for name in names:
            save(tmp_path / "cat" / name)
        data = load(tmp_path)
        assert sorted(data.train.names) == sorted(f"cat/{name}" for name in names)
        assert data.train.image(1).size == (8, 6)

    def test_nfd_folder_of_one_split_matches_nfc_of_the_other(self, tmp_path):
        data = load(folders(tmp_path, {"train/caf\u00e9": 1, "test/cafe\u0301": 1}))
        assert data.classes == ("café",) and data.test.labels.tolist() == [0]
        assert data.test.image(0).size == (8, 6)

    def test_class_called_train(self, tmp_path):
        root = folders(tmp_path, {"train": 2, "bus": 2})
        assert load(root).classes == ("bus", "train")
        root = folders(tmp_path / "only", {"train": 2, "test": 2})
        assert load(root).classes == ("test", "train")

    def test_doubtful_layout_asks(self, tmp_path):
        root = folders(tmp_path, {"train/cat": 2, "test/cat": 2, "extra": 1})
        with pytest.raises(DataError, match="layout='splits'"):
            load(root)
        assert load(root, layout="splits").classes == ("cat",)
        assert load(root, layout="plain").classes == ("extra", "test", "train")

    def test_only_a_test_split(self, tmp_path):
        data = load(folders(tmp_path, {"test/cat": 2, "test/dog": 1}))
        assert len(data.train) == 0 and len(data.test) == 3 and data.train.classes == ("cat", "dog")

    def test_not_there(self, tmp_path):
        with pytest.raises(DataError, match="no such folder or file"):
            load(tmp_path / "nowhere")

    def test_without_classes(self, tmp_path):
        save(tmp_path / "0.png")
        with pytest.raises(DataError, match="found no sub-folder; expected one per class"):
            load(tmp_path)

    def test_empty_class_is_named(self, tmp_path):
        root = folders(tmp_path, {"cat": 1})
        (root / "dog").mkdir()
        (root / "dog" / "list.txt").write_text("")
        with pytest.raises(DataError, match=r"class 'dog' has no image \(1 other files"):
            load(root)

    def test_unicode_twins(self, tmp_path):
        with pytest.raises(DataError, match="same text"):
            load(folders(tmp_path, {"caf\u00e9": 1, "cafe\u0301": 1}))

    def test_class_of_test_only_is_named(self, tmp_path):
        with pytest.raises(DataError, match="'dgo' is in 'test' but not in 'train'"):
            load(folders(tmp_path, {"train/dog": 1, "test/dgo": 1}))

    def test_two_validation_folders(self, tmp_path):
        with pytest.raises(DataError, match="same split"):
            load(folders(tmp_path, {"train/a": 1, "val/a": 1, "validation/a": 1}))

    def test_undecodable_name(self, tmp_path):
        folders(tmp_path, {"cat": 1})
        os.rename(os.fsencode(tmp_path / "cat" / "0.png"), os.fsencode(tmp_path / "cat") + b"/\xff.png")
        with pytest.raises(DataError, match="not valid UTF-8"):
            load(tmp_path)

    @pytest.mark.parametrize("what", ["file", "class", "image folder"])
    def test_links_that_lead_out_are_refused(self, tmp_path, what):
        outside = save(tmp_path / "outside" / "secret.png", 9)
        root = folders(tmp_path / "root", {"cat": 1, "dog": 1})
        link = {"file": root / "cat" / "z.png", "class": root / "fox", "image folder": root / "cat" / "more"}[what]
        link.symlink_to(outside if what == "file" else outside.parent)
        with pytest.raises(DataError, match="leads out"):
            load(root)
        assert len(load(root, follow_links=True).train) == 3

    def test_links_inside_are_fine(self, tmp_path):
        root = folders(tmp_path, {"cat": 1, "dog": 1})
        (root / "cat" / "again.png").symlink_to(root / "dog" / "0.png")
        data = load(root)
        assert data.train.names == ["cat/0.png", "cat/again.png", "dog/0.png"] and data.train.image(1).size == (8, 6)

    def test_link_made_after_reading_is_refused_too(self, tmp_path):
        outside = save(tmp_path / "secret.png")
        root = folders(tmp_path / "root", {"cat": 1})
        data = load(root)
        (root / "cat" / "0.png").unlink()
        (root / "cat" / "0.png").symlink_to(outside)
        with pytest.raises(DataError, match="leads out"):
            data.train.image(0)

    def test_loop_of_links_ends(self, tmp_path):
        root = folders(tmp_path, {"cat": 1})
        (root / "cat" / "loop").symlink_to(root / "cat")
        with pytest.raises(DataError, match="folders deep"):
            load(root)

    def test_root_may_be_a_link(self, tmp_path):
        root = folders(tmp_path / "real", {"cat": 1})
        (tmp_path / "link").symlink_to(root)
        assert load(tmp_path / "link").train.image(0).size == (8, 6)

    def test_file_that_vanished_and_pipe(self, tmp_path):
        data = load(folders(tmp_path, {"cat": 2}))
        (tmp_path / "cat" / "0.png").unlink()
        os.mkfifo(tmp_path / "cat" / "0.png")
        with pytest.raises(DataError, match=r"cat/0\.png.*not a regular file"):
            data.train.image(0)
        (tmp_path / "cat" / "1.png").unlink()
        with pytest.raises(DataError, match=r"cat/1\.png.*cannot be read"):
            data.train.image(1)

    def test_errors_of_images_show_no_absolute_path(self, tmp_path):
        data = load(folders(tmp_path, {"cat": 1}))
        (tmp_path / "cat" / "0.png").write_bytes(b"no")
        with pytest.raises(DataError) as caught:
            data.train.image(0)
        assert str(tmp_path) not in str(caught.value)

    def test_nothing_is_written(self, tmp_path):
        root = folders(tmp_path, {"train/cat": 2, "test/cat": 2})
        before = sorted(str(path) for path in root.rglob("*"))
        list(batches(load(root).train, to_tensor, batch_size=2))
        assert sorted(str(path) for path in root.rglob("*")) == before


@pytest.fixture
def images(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    return tmp_path


def table(folder: Path, content: str | bytes, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestTable:
    def test_csv(self, images):
        data = load(
            table(images, "path,label,split\n0.png,dog,train\n1.png,cat,train\n2.png,cat,test\n3.png,dog,dev\n")
        )
        assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [1, 0]
        assert data.test.names == ["2.png"] and data.val.ids.tolist() == [2] and data.test.ids.tolist() == [3]
        assert data.test.image(0).getpixel((0, 0)) == (2, 2, 2)

    @pytest.mark.parametrize(
        "content",
        [
            b"\xef\xbb\xbfpath,label\n0.png,cat\n1.png,dog\n",
            b"path,label\r\n0.png,cat\r\n1.png,dog\r\n",
            b"path,label\n0.png,cat\n\n1.png,dog",
            b'"path","label"\n"0.png","cat"\n"1.png","dog"\n',
            b"label,extra,path\ncat,1,0.png\ndog,2,1.png\n",
            b" Path , LABEL \n./0.png, cat\n1.png,dog \n",
        ],
        ids=["BOM", "CRLF", "blank line", "quotes", "other order", "space and case"],
    )
    def test_spellings_of_csv(self, images, content):
        data = load(table(images, content))
        assert data.train.names == ["0.png", "1.png"] and data.classes == ("cat", "dog") and data.test is None

    def test_quoted_commas_newlines_and_unicode(self, images):
        data = load(table(images, 'path,label\n0.png,"cat, black"\n1.png,"say ""hi"""\n2.png,キツネ 🦊\n'))
        assert set(data.classes) == {"cat, black", 'say "hi"', "キツネ 🦊"}

    def test_formula_cells_are_text(self, images):
        assert load(table(images, 'path,label\n0.png,"=HYPERLINK(1)"\n')).classes == ("=HYPERLINK(1)",)

    def test_tsv_and_jsonl(self, images):
        tsv = load(table(images, "path\tlabel\n0.png\tcat, big\n", "a.tsv"))
        assert tsv.classes == ("cat, big",)
        rows = [{"path": "0.png", "label": "b"}, {"path": "1.png", "label": "a\u2028a", "split": "test"}]
        data = load(table(images, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "a.jsonl"))
        assert data.classes == ("a\u2028a", "b") and data.test.labels.tolist() == [0]

    def test_numbers_and_class_names(self, images):
        content = '{"path": "0.png", "label": 1}\n{"path": "1.png", "label": "cat"}\n'
        data = load(table(images, content, "a.jsonl"), class_names=["cat", "dog", "fox"])
        assert data.classes == ("cat", "dog", "fox") and data.train.labels.tolist() == [1, 0]
        assert load(table(images, "path,label\n0.png,10\n1.png,9\n")).classes == ("9", "10")

    def test_root(self, images, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("lists")
        data = load(table(elsewhere, "path,label\n0.png,cat\n"), root=images)
        assert data.train.image(0).size == (8, 6)

    def test_test_fraction(self, images):
        data = load(table(images, "path,label\n" + "".join(f"{n}.png,cat\n" for n in range(4))), test_fraction=0.5)
        assert len(data.train) == len(data.test) == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty"),
            (b"path,label\n", "no row"),
            (b"file,label\n0.png,cat\n", r"line 1: no column 'path'; found file, label"),
            (b"path;label\n0.png;cat\n", r"line 1: no column 'path'"),
            (b"path,label,label\n0.png,a,b\n", "'label' is there twice"),
            (b"path,label\n0.png,cat\n1.png\n", r"line 3: found 1 fields, expected 2"),
            (b"path,label\n0.png,cat,big\n", r"line 2: found 3 fields"),
            (b"path,label\n\n0.png,cat\n\n1.png\n", r"line 5"),
            (b"path,label\n0.png,\n", r"line 2: the label is empty"),
            (b"path,label\n,cat\n", r"line 2: the path '' is empty"),
            (b"path,label,split\n0.png,cat,tset\n", r"line 2: the split 'tset' is none of"),
            (b"path,label\n0.png,cat\n0.png,dog\n", r"line 3: '0\.png' is already listed in line 2"),
            (b"path,label\n0.png,cat\n./0.png,dog\n", r"line 3: '0\.png' is already listed"),
            (b"path,label\n0.png,cat\n9.png,dog\n", r"line 3: no file '9\.png'.*1 of 2 rows"),
            (b"path,label\n../0.png,cat\n", r"line 2: the path '\.\./0\.png' leaves"),
            (b"path,label\n/etc/passwd,cat\n", r"line 2: the path '/etc/passwd' is absolute"),
            (b"path,label\n0.png,caf\xe9\n", r"line 2: found bytes that are not UTF-8"),
            (b"path,label\n0.png,cat\0\n", r"line 2: found a NUL"),
            (b'path,label\n0.png,"cat\n', r"line 2: not valid CSV"),
            (b'path,label\n0.png,"ca"t\n', r"line 2: not valid CSV"),
            ("path,label\n0.png,é\n1.png,e\u0301\n".encode(), "same text"),
            (b"path,label\n0.png,a\x07b\n", "control character"),
            (b"path,label\n0.png," + b"x" * 200_000 + b"\n", r"line 2: not valid CSV"),
            (b"a," * 100_000 + b"b\n", r"line 1: no column 'path'"),
            (b"path,label\n9.png," + b"1" * 5000 + b"\n", "line 2: no file"),
        ],
    )
    def test_bad_csv_names_file_and_line(self, images, content, message):
        with pytest.raises(DataError, match=message) as caught:
            load(table(images, content))
        assert "list.csv" in str(caught.value) and len(str(caught.value)) < 1000

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"path": "0.png", "label": "a"}\nnot json\n', "line 2: expected one JSON object"),
            ('["0.png", "a"]', "line 1: expected a JSON object, found list"),
            ('{"path": "0.png"}', "line 1: no key 'label'"),
            ('{"path": 3, "label": "a"}', "line 1: expected a path"),
            ('{"path": "0.png", "label": true}', "line 1: expected a path"),
            ('{"path": "0.png", "label": 1.5}', "line 1: expected a path"),
            ('{"path": "0.png", "label": null}', "line 1: expected a path"),
            ('{"path": "0.png", "label": "a", "split": 1}', "line 1: expected a split"),
            ('{"path": "0.png", "path": "1.png", "label": "a"}', "line 1.*twice"),
            ("[" * 100_000, "line 1: expected one JSON object"),
            ("", "no row"),
            ('{"path": "..\\u002f0.png", "label": "a"}', "leaves"),
        ],
    )
    def test_bad_jsonl(self, images, content, message):
        with pytest.raises(DataError, match=message):
            load(table(images, content, "list.jsonl"))

    @pytest.mark.parametrize("label", ["3", "-1", "cat2", "00000000000000000001"])
    def test_label_outside_class_names(self, images, label):
        with pytest.raises(DataError, match=r"line 2: the label"):
            load(table(images, f"path,label\n0.png,{label}\n"), class_names=["a", "b", "c"])

    def test_link_out_is_refused_when_read(self, images, tmp_path_factory):
        secret = save(tmp_path_factory.mktemp("outside") / "secret.png")
        (images / "link.png").symlink_to(secret)
        path = table(images, "path,label\nlink.png,cat\n")
        with pytest.raises(DataError, match="leads out"):
            load(path).train.image(0)
        assert load(path, follow_links=True).train.image(0).size == (8, 6)

    def test_missing_list(self, tmp_path):
        with pytest.raises(DataError, match=r"a\.csv.*cannot be read"):
            load(tmp_path / "a.csv")


class TestShards:
    def test_shards(self, tmp_path):
        shard(tmp_path / "train" / "0.tar", [0, 1, 2])
        shard(tmp_path / "train" / "1.tar", [2, 1], first=3)
        shard(tmp_path / "test" / "0.tar", [1], first=9)
        (tmp_path / "classnames.txt").write_text("cat\ndog\nfox\n")
        data = load(f"{tmp_path}/train/{{0..1}}.tar", test=f"{tmp_path}/test/*.tar")
        assert data.classes == ("cat", "dog", "fox") and data.train.labels.tolist() == [0, 1, 2, 2, 1]
        assert data.train.names[0] == "train/0/0000.webp" and data.test.names == ["test/0/0009.webp"]
        assert data.test.ids.tolist() == [5]
        found = torch.cat([b.images[:, 0, 0, 0] for b in batches(data.train, to_tensor, batch_size=2, workers=2)])
        assert (found.int() - torch.arange(5)).abs().max() <= 2

    def test_class_names_argument_and_numbers(self, tmp_path):
        path = shard(tmp_path / "a.tar", [0, 2])
        assert load(path).classes == ("0", "1", "2")
        assert load([path], class_names=["x", "y", "z"]).classes == ("x", "y", "z")
        with pytest.raises(DataError, match="label 2 is none of the 2 classes"):
            load(path, class_names=["x", "y"])

    @pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
    def test_image_formats(self, tmp_path, extension):
        format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(extension.lower(), extension.upper())
        path = tar(tmp_path / "a.tar", member(f"k.{extension}", image_bytes(5, format)), member("k.cls", b" 0\n"))
        assert load(path).train.image(0).size == (8, 6)

    @pytest.mark.parametrize(
        ("extension", "content"),
        [
            ("txt", "キツネ".encode()),
            ("json", '{"label": "キツネ", "width": 8}'.encode()),
            ("json", '{"cls": "キツネ"}'.encode()),
        ],
    )
    def test_named_labels(self, tmp_path, extension, content):
        path = tar(tmp_path / "a.tar", member("k.png", image_bytes()), member(f"k.{extension}", content))
        assert load(path).classes == ("キツネ",)

    def test_class_number_wins_over_a_caption(self, tmp_path):
        for name, order in (("a", ("cls", "txt")), ("b", ("txt", "cls"))):
            labels = {"cls": member("k.cls", b"1"), "txt": member("k.txt", b"a caption")}
            path = tar(tmp_path / f"{name}.tar", member("k.png", image_bytes()), *(labels[one] for one in order))
            assert load(path, class_names=["x", "y"]).train.labels.tolist() == [1]

    def test_folders_and_dots_in_keys(self, tmp_path):
        path = tar(
            tmp_path / "a.tar",
            member("d", type=tarfile.DIRTYPE),
            member("d/k.png", image_bytes()),
            member("d/k.cls", b"0"),
        )
        assert load(path).train.names == ["a/d/k.png"]

    def test_shard_may_be_a_link(self, tmp_path):
        blob = shard(tmp_path / "blobs" / "0af3", [0])
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "x.tar").symlink_to(blob)
        assert load(tmp_path / "links" / "x.tar").train.names == ["x/0000.webp"]

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ([member("k.png", type=tarfile.SYMTYPE, link="/etc/passwd")], "links, devices"),
            ([member("k.png", type=tarfile.LNKTYPE, link="x")], "links, devices"),
            ([member("k.png", type=tarfile.FIFOTYPE)], "links, devices"),
            ([member("k.png", type=tarfile.CHRTYPE)], "links, devices"),
            ([member("/abs/k.png", image_bytes()), member("/abs/k.cls", b"0")], "is absolute"),
            ([member("../k.png", image_bytes()), member("../k.cls", b"0")], "leaves"),
            ([member("k.png", image_bytes())], "'k.png' has no label"),
            ([member("k.cls", b"0")], "'k' has no image"),
            ([member("k.png", image_bytes()), member("k.jpg", image_bytes()), member("k.cls", b"0")], "second image"),
            ([member("k.png", image_bytes()), member("k.cls", b"cat")], "expected a label"),
            ([member("k.png", image_bytes()), member("k.cls", b"1_0")], "expected a label"),
            ([member("k.png", image_bytes()), member("k.cls", b"\xff")], "expected a label"),
            ([member("k.png", image_bytes()), member("k.cls", b"-1")], "class number -1,"),
            ([member("k.png", image_bytes()), member("k.cls", b"999999999999")], "class number 999999999999"),
            ([member("k.png", image_bytes()), member("k.json", b"[" * 99_999)], "expected a label"),
            ([member("k.png", image_bytes()), member("k.json", b"3")], "expected a label"),
            ([member("k.png", image_bytes()), member("k.json", b'{"label": [1]}')], "class number or name"),
            ([member("k.png", image_bytes()), member("k.txt", b"x" * 2_000_000)], "too many for a label"),
            ([member("k.png", image_bytes()), member("k.txt", b" ")], "empty"),
            ([], "found no"),
        ],
    )
    def test_hostile_members(self, tmp_path, members, message):
        with pytest.raises(DataError, match=message):
            load(tar(tmp_path / "a.tar", *members))

    def test_sparse_member(self, tmp_path):
        info, content = member("k.png", image_bytes())
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,10", "GNU.sparse.size": "99999999999"}
        with pytest.raises(DataError, match=r"a\.tar"):
            load(tar(tmp_path / "a.tar", (info, content), member("k.cls", b"0")))

    def test_every_cut_is_noticed(self, tmp_path):
        data = shard(tmp_path / "a.tar", [0, 1]).read_bytes()
        needed = len(data.rstrip(b"\0")) // 512 * 512 + 1024  # members and the first block of the end mark
        for length in range(0, needed, 128):
            (tmp_path / "cut.tar").write_bytes(data[:length])
            with pytest.raises(DataError, match=r"cut\.tar"):
                load(tmp_path / "cut.tar")

    def test_damaged_header_in_the_middle_is_noticed(self, tmp_path):
        path = shard(tmp_path / "a.tar", [0, 1, 2])
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            offset = archive.getmembers()[2].offset
        data[offset + 3] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.tar.*damaged"):
            load(path)

    def test_shard_that_shrank_after_indexing(self, tmp_path):
        path = shard(tmp_path / "a.tar", [0, 1])
        data = load(path)
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(DataError, match="became shorter"):
            data.train.image(1)

    def test_compressed_shard(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
            pass
        (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
        with pytest.raises(DataError, match="unpack them"):
            load(tmp_path / "a.tar.gz")
        with pytest.raises(DataError, match="not an uncompressed tar"):
            load(tmp_path / "b.tar")

    def test_patterns(self, tmp_path):
        for name in ("a-00.tar", "a-01.tar", "a-10.tar", "b.tar"):
            shard(tmp_path / name, [0])
        names = [path.name for path in expand(f"{tmp_path}/{{a-{{00..01}},b}}.tar")]
        assert names == ["a-00.tar", "a-01.tar", "b.tar"]
        assert [path.name for path in expand(f"{tmp_path}/a-*.tar")] == ["a-00.tar", "a-01.tar", "a-10.tar"]
        with pytest.raises(DataError, match=r"no shard matches '.*a-02\.tar'"):
            expand(f"{tmp_path}/a-{{01..02}}.tar")
        with pytest.raises(DataError, match="more than 100,000"):
            expand("x-{0..999999999}.tar")

    def test_same_shard_for_two_splits(self, tmp_path):
        path = shard(tmp_path / "a.tar", [0])
        with pytest.raises(DataError, match="given for two splits"):
            load(path, test=path)

    def test_nothing_is_extracted(self, tmp_path):
        path = shard(tmp_path / "a.tar", [0, 0])
        load(path).train.image(0)
        assert os.listdir(tmp_path) == ["a.tar"]


def emoji_folder(folder: Path) -> Path:
    classes = [{"name": "fox", "key": "fox", "group": "animals"}, {"name": "red car", "key": "car", "group": "traffic"}]
    vendors, images = [], []
    for number, (vendor, split) in enumerate((("one", "train"), ("two", "test"), ("three", "train"))):
        members = []
        for label, entry in enumerate(classes):
            content = image_bytes(100 * label + number, "WEBP", lossless=True)
            members += [member(f"{entry['key']}.webp", content), member(f"{entry['key']}.cls", b"%d" % label)]
            images.append({"vendor": vendor, "key": entry["key"], "class": label})
        path = tar(folder / f"{vendor}.tar", *members)
        vendors.append(
            {"name": vendor, "split": split, "package": vendor, "version": "1", "license": "MIT", "images": 2,
             "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        )  # fmt: skip
    index = {"version": 1, "name": "emoji", "classes": classes, "vendors": vendors, "images": images}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


class TestEmoji:
    def test_format(self, tmp_path):
        data = read_emoji(emoji_folder(tmp_path))
        assert data.classes == ("fox", "red car")
        assert data.train.names == ["one/fox.webp", "one/car.webp", "three/fox.webp", "three/car.webp"]
        assert data.train.sources == ["one", "one", "three", "three"] and data.test.sources == ["two", "two"]
        assert data.test.ids.tolist() == [4, 5] and data.test.image(1).getpixel((0, 0)) == (101, 101, 101)
        assert data.meta["vendors"][1]["license"] == "MIT"

    def test_groups(self, tmp_path):
        data = read_emoji(emoji_folder(tmp_path), groups=["traffic"])
        assert data.classes == ("red car",) and data.train.ids.tolist() == [1, 3] and data.test.labels.tolist() == [0]
        with pytest.raises(DataError, match="there are animals, traffic"):
            read_emoji(tmp_path, groups=["food"])

    @pytest.mark.parametrize(
        "change",
        [
            lambda index: index.update(version=2),
            lambda index: index.pop("images"),
            lambda index: index["images"].pop(),
            lambda index: index["images"].append({"vendor": "one", "key": "cow", "class": 0}),
            lambda index: index["images"][0].update({"class": 1}),
            lambda index: index["vendors"][0].update(split="dev"),
            lambda index: index["vendors"][0].update(sha256="0" * 64),
            lambda index: index["vendors"][0].update(name="four"),
            lambda index: index.update(classes=3),
        ],
    )
    def test_index_that_does_not_fit_is_refused(self, tmp_path, change):
        edit_index(emoji_folder(tmp_path), change)
        with pytest.raises(DamagedFileError):
            read_emoji(tmp_path)

    def test_changed_shard_is_refused(self, tmp_path):
        path = emoji_folder(tmp_path) / "one.tar"
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match=r"one\.tar"):
            read_emoji(tmp_path)

    def test_shipped_set(self):
        data = load("emoji")
        assert (
            len(data.classes) == 307
            and data.train.counts.tolist() == [4] * 307
            and data.test.counts.tolist() == [2] * 307
        )
        assert not set(data.train.sources) & set(data.test.sources)
        assert all(vendor["license"] for vendor in data.meta["vendors"])
        assert data.test.image(613).size == (224, 224)


DOCS = Path(__file__).resolve().parent.parent / "docs" / "datasets.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*not the published data set")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_examples_of_the_page_run(tmp_path, monkeypatch, snippet, capsys):
    """Each one in a folder that holds what the page describes."""
    folders(tmp_path / "pets", {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1})
    folders(tmp_path / "flat_pets", {"cat": 2, "dog": 2})
    folders(tmp_path, {"photos": 4})
    lines = ["path,label,split", "photos/1.png,cat,train", 'photos/2.png,"dog, large",train', "photos/3.png,cat,test"]
    table(tmp_path, "\n".join(lines))
    table(tmp_path, '{"path": "photos/0.png", "label": 1}', "numbers.jsonl")
    for name, labels in (("train-000", [0, 1]), ("train-001", [1]), ("test-000", [0])):
        shard(tmp_path / "shards" / f"{name}.tar", labels)
    (tmp_path / "shards" / "classnames.txt").write_text("cat\ndog\n")
    pets = tmp_path / "DATA" / "oxford_pets"
    split = {part: [[f"{part}.png", 0, "boxer"]] for part in ("train", "val", "test")}
    for part in split:
        save(pets / "images" / f"{part}.png")
    (pets / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
    (pets / "split_fewshot").mkdir()
    record = b"\x80\x02}q\0U\x05trainq\x01]q\x02s."  # an empty list, as an old pickle
    (pets / "split_fewshot" / "shot_2-seed_1.pkl").write_bytes(record.replace(b"U\x05", b"X\x05\0\0\0"))
    rows = ["1.png,red,heart,train", "2.png,blue,face,train", "3.png,red,face,val", "0.png,blue,heart,test"]
    lines = ["path,state,object,split", *(f"photos/{row}" for row in rows)]
    table(tmp_path, "\n".join(lines), "pairs.csv")
    czsl_tree(tmp_path / "CZSL")
    labels = ["path,labels", *(f"photos/{n}.png,{row}" for n, row in enumerate(("dog;animal", "car", "", "dog")))]
    table(tmp_path, "\n".join(labels), "labels.csv")
    coco = tmp_path / "DATA" / "coco"
    save(coco / "data" / "1.png")
    save(coco / "data" / "2.png")
    for name, text in (("labels", "traffic light 0"), ("lt_train", "1.png 0"), ("lt_test", "2.png")):
        (coco / f"coco_{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/datasets.md", "exec"), {})


def test_table_of_the_page_is_the_layout_that_is_read():
    rows = re.findall(
        r"^\| `([\w-]+)` \| `(.*?)` \| (.*?) \| (.*?) \| ([\d,]+) \| (.*?) \|$", DOCS.read_text("utf-8"), re.M
    )
    assert [row[0] for row in rows] == list(LAYOUTS)
    for name, folder, images, files, classes, counts in rows:
        layout = LAYOUTS[name]
        sizes = " / ".join("none" if count is None else f"{count:,}" for count in layout.counts)
        assert (folder, classes, counts) == (layout.folder, f"{layout.classes:,}", sizes)
        assert layout.images in images and layout.files[-1] in files


class TestLoad:
    def test_data_set_passes_through(self, tmp_path):
        data = load(folders(tmp_path, {"cat": 4}))
        assert load(data) is data and len(load(data, test_fraction=0.5).test) == 2

    @pytest.mark.parametrize("spec", ["nothing", "", "a/b/c", "emojis", "https://example.org/x.zip", []])
    def test_unknown(self, spec):
        with pytest.raises(CaptError):
            load(spec)

    def test_message_lists_what_is_accepted(self):
        with pytest.raises(DataError, match=r"'emoji'.*folder.*\.csv.*coop:.*\.tar"):
            load("emojis")

    def test_unknown_option_is_named_with_the_known_ones(self, tmp_path):
        with pytest.raises(DataError, match=r"unknown option 'folow_links'.*layout, follow_links"):
            load(folders(tmp_path, {"cat": 1}), folow_links=True)

    def test_root_without_use(self, tmp_path):
        with pytest.raises(DataError, match="root"):
            load("emoji", root=tmp_path)

    def test_record_has_no_absolute_path(self, tmp_path):
        data = load(folders(tmp_path / "here", {"train/cat": 2, "test/cat": 1}))
        assert str(tmp_path) not in json.dumps(data.record())
        assert data.record()["images"] == {"train": 2, "test": 1}

    def test_ids_of_a_picture_do_not_change_in_subsets(self, tmp_path):
        data = load(folders(tmp_path, {"train/a": 2, "train/b": 2, "test/b": 1}))
        assert data.select_classes([1]).train.ids.tolist() == [2, 3] and data.select_classes([1]).test.ids.tolist() == [
            4
        ]
