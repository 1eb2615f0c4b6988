"""The check of a folder in CoOp's layout: what is found, missing, different or damaged; few-shot lists made JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from capt import cli
from capt.data import base_novel, check, load, load_few_shot, save_few_shot
from capt.data.readers.coop_layouts import LAYOUTS
from capt.errors import DataError
from capt.files import read_json, sha256
from tests.coop_files import CLASSES, imagenet, importable_datum, published, tree, zhou
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


def capt(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def size(root: Path, dataset: str) -> tuple[int, tuple]:
    data = load(f"coop:{dataset}", root=root)
    return len(data.classes), (len(data.train), data.val and len(data.val), len(data.test))


def test_all_fifteen_are_found_counted_and_hashed(tmp_path, monkeypatch, capsys):
    for dataset in LAYOUTS:
        tree(tmp_path, dataset)
        published(monkeypatch, dataset, *size(tmp_path, dataset))
    assert capt("data", "check", "coop", "--root", tmp_path, "--json") == 0
    findings = {finding["dataset"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert list(findings) == list(LAYOUTS)
    for dataset, finding in findings.items():
        layout = LAYOUTS[dataset]
        assert finding["status"] == "ok" and finding["found"] == finding["expected"], finding
        assert finding["sha256"] == {file: sha256(tmp_path / layout.folder / file) for file in layout.files}
    assert findings["imagenet-r"]["found"] == {"classes": 3, "train": 0, "test": 6}


def test_nothing_there_fails_and_names_all_fifteen(tmp_path, capsys):
    assert capt("data", "check", "coop", "--root", tmp_path) == 3
    out = capsys.readouterr().out
    assert out.count("missing") == 15 and "imagenet-rendition/" in out and "50,889 test" in out


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_one_image_less_or_more_is_seen(tmp_path, monkeypatch, dataset):
    folder = tree(tmp_path, dataset)
    published(monkeypatch, dataset, *size(tmp_path, dataset))
    layout = LAYOUTS[dataset]
    victim = next(
        path for path in sorted((folder / layout.images).rglob("*")) if path.is_file() and path.suffix != ".txt"
    )
    if layout.from_folders:
        save(victim.with_name("another.png"))
        (finding,) = check(tmp_path, dataset).findings
        assert finding.status == "different" and "images, expected" in finding.problems[0]
    content = victim.read_bytes()
    victim.unlink()
    victim.with_name("another.png").unlink(missing_ok=True)
    (finding,) = check(tmp_path, dataset).findings
    assert finding.status == ("different" if layout.from_folders else "incomplete")
    victim.write_bytes(content)
    assert check(tmp_path, dataset).ok


def test_check_of_one_data_set_shows_its_hash_and_its_lists(tmp_path, monkeypatch, capsys):
    folder = zhou(tmp_path, "dtd")
    published(monkeypatch, "dtd", 2, (6, 2, 4))
    pickled(folder, monkeypatch)
    assert capt("data", "check", "coop:dtd", "--root", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    file = "split_zhou_DescribableTextures.json"
    assert found["sha256"] == found["layout"]["sha256"] == {file: sha256(folder / file)}
    assert found["layout"]["few_shot"]["shot_2-seed_1.pkl"]["images"] == {"train": 3, "val": 1}


def test_data_without_training_images_are_no_problem(tmp_path, monkeypatch, capsys):
    tree(tmp_path, "imagenet-r")
    published(monkeypatch, "imagenet-r", *size(tmp_path, "imagenet-r"))
    assert capt("data", "check", "coop:imagenet-r", "--root", tmp_path) == 0
    assert "every image can be read" in capsys.readouterr().out


def relabel(split: dict) -> None:
    """An image of class 0 becomes one of class 1, in a way that is consistent in itself and keeps all counts."""
    for path, label in (("Abyssinian_cat/train_0.jpg", 1), ("boxer/train_0.jpg", 0)):
        (entry,) = [entry for entry in split["train"] if entry[0] == path]
        entry[1:] = [label, CLASSES[label]]


def half_relabel(split: dict) -> None:
    split["train"][0][1] = 1


def twice(split: dict) -> None:
    split["test"][0] = split["train"][0]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (relabel, "different", "2 class folders hold images of several classes, first 'images/Abyssinian_cat'"),
        (half_relabel, "damaged", "label 1 is 'boxer' here but 'Abyssinian_cat' before"),
        (twice, "damaged", "listed twice"),
        (lambda split: split["test"].pop(), "different", "3 test images, expected 4"),
        (lambda split: split["val"].append(["pug/1.jpg", 2, "pug"]), "incomplete", "first 'images/pug/1.jpg'"),
    ],
)  # fmt: skip
def test_changed_split_file(tmp_path, monkeypatch, change: Callable[[dict], object], status, message):
    path = zhou(tmp_path, "dtd") / "split_zhou_DescribableTextures.json"
    published(monkeypatch, "dtd", 2, (6, 2, 4))
    before = check(tmp_path, "dtd").findings[0]
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))
    (finding,) = check(tmp_path, "dtd").findings
    assert finding.status == status and message in " ".join(finding.problems)
    assert before.status == "ok" and finding.sha256 != before.sha256


AWAY = "/data/alice/DATA/dtd/images"


def pickled(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "shot_2-seed_1.pkl") -> Path:
    """A list of CoOp: two images of the cat, one of the boxer given twice, as it fills classes that are too small."""
    datum = importable_datum(monkeypatch)
    listed = [(0, "train_2"), (0, "train_0"), (1, "train_1"), (1, "train_1")]
    lists = {
        "train": [datum(f"{AWAY}/{CLASSES[label]}/{image}.jpg", label, CLASSES[label]) for label, image in listed],
        "val": [datum(f"{AWAY}/boxer/val_0.jpg", 1, "boxer")],
    }
    (folder / "split_fewshot").mkdir(exist_ok=True)
    path = folder / "split_fewshot" / name
    path.write_bytes(pickle.dumps(lists))
    return path


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_hostile_and_foreign_lists_are_found_and_do_nothing(tmp_path, monkeypatch):
    folder = zhou(tmp_path, "dtd")
    published(monkeypatch, "dtd", 2, (6, 2, 4))
    monkeypatch.chdir(tmp_path)
    good = pickled(folder, monkeypatch)
    good.with_name("shot_4-seed_1.pkl").write_bytes(pickle.dumps({"train": [Evil()], "val": []}))
    good.with_name("shot_16-seed_1.pkl").write_bytes(good.read_bytes()[:-20])
    other = importable_datum(monkeypatch)("/x/dtd/images/boxer/test_0.jpg", 1, "boxer")
    good.with_name("shot_1-seed_1.pkl").write_bytes(pickle.dumps({"train": [other], "val": []}))
    (finding,) = check(tmp_path, "dtd").findings
    assert finding.status == "damaged" and list(finding.few_shot) == [good.name]
    assert [problem.split(":")[0] for problem in finding.problems] == [
        "'shot_1-seed_1.pkl'", "'shot_4-seed_1.pkl'", "'shot_16-seed_1.pkl'",
    ]  # fmt: skip
    assert "not among the train images" in finding.problems[0] and "refused" in finding.problems[1]
    assert not Path("canary").exists()
    assert (
        capt("data", "few-shot", "coop:dtd", "--root", tmp_path, "--from-pickle", good.with_name("shot_4-seed_1.pkl"))
        == 3
    )
    assert not list(tmp_path.glob("*.json")) and not Path("canary").exists()


def test_a_pickle_becomes_a_list_of_ours(tmp_path, monkeypatch, capsys):
    source = pickled(zhou(tmp_path, "dtd"), monkeypatch)
    out = tmp_path / "lists" / "shot_2-seed_1.json"
    out.parent.mkdir()
    before = sorted((tmp_path / "dtd").rglob("*"))
    arguments = ("data", "few-shot", "coop:dtd", "--root", tmp_path, "--from-pickle", source)
    assert capt(*arguments, "--out", out, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in written] == ["shot_2-seed_1.json", "shot_2-seed_1-val.json"]
    assert sorted((tmp_path / "dtd").rglob("*")) == before
    text, record = out.read_text(), read_json(out)
    assert "alice" not in text and str(tmp_path) not in text
    assert [image["name"] for image in record["images"]] == [
        "images/Abyssinian_cat/train_2.jpg", "images/Abyssinian_cat/train_0.jpg", "images/boxer/train_1.jpg",
    ]  # fmt: skip
    assert (record["shots"], record["seed"], record["short_classes"]) == (2, 1, {"boxer": 1})
    assert record["repeated"] == {"train": 1, "val": 0} and record["sha256"] == sha256(source)
    data = load("coop:dtd", root=tmp_path)
    listed = load_few_shot(out, data.train)
    assert listed.ids.tolist() == [2, 0, 4] and listed.meta["few_shot"]["seed"] == 1
    # A run keeps the list it was given, with where it came from: the same bytes.
    save_few_shot(tmp_path / "again.json", listed)
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()
    assert listed.ids.tolist() == load("coop:dtd", root=tmp_path, shots=2, seed=1).train.ids.tolist()
    assert load_few_shot(out.with_name("shot_2-seed_1-val.json"), data.val).names == ["images/boxer/val_0.jpg"]


def test_a_folder_of_pickles_and_base_classes_alone(tmp_path, monkeypatch, capsys):
    folder = zhou(tmp_path, "dtd")
    pickled(folder, monkeypatch)
    pickled(folder, monkeypatch, "shot_2-seed_10.pkl")
    arguments = ("data", "few-shot", "coop:dtd", "--root", tmp_path, "--from-pickle", folder / "split_fewshot")
    assert capt(*arguments, "--out", tmp_path / "base", "--base-only") == 0
    assert capsys.readouterr().out.count("2 images of 1 classes") == 2
    # The only validation image is of a novel class.
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["shot_2-seed_1.json", "shot_2-seed_10.json"]
    base, _ = base_novel(load("coop:dtd", root=tmp_path))
    listed = load_few_shot(tmp_path / "base" / "shot_2-seed_10.json", base.train)
    assert listed.classes == ("Abyssinian cat",) and listed.ids.tolist() == [2, 0]
    (tmp_path / "none").mkdir()
    assert capt(*arguments[:-1], tmp_path / "none") == 3
    assert "holds no .pkl file" in capsys.readouterr().err
