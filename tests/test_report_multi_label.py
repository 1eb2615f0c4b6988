"""The report of a multi-label run: precision by frequency, classes and confused labels follow from stored logits."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capt.data import load_multi_label
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation import aggregate_seeds
from capt.files import read_json, save_tensors, write_json
from capt.report import data_of_run, markdown_table, read_summary, verdict, write_report
from capt.report.multi_label import read_outcome
from tests import label_files
from tests.test_report import HOSTILE, Page

NAMES = ["cat", "dog", "fox", "owl"]
FREQUENCY = [200, 30, 30, 0]
TARGETS = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.uint8)
#: Under thresholds 0 images 1 and 2 miss "dog" and get "fox" instead, image 2 more surely; image 4 is wrong with "owl",
#: but misses nothing.
SCORES = torch.tensor(
    [[3.0, -2.0, -1.0, -1.0], [2.0, -1.0, 1.0, -1.0], [-1.0, -0.5, 2.0, -1.0], [-3.0, 0.5, 3.0, -2.0], [1, -3, -2, 4]]
)


def write_example(run: Path, names: list[str] = NAMES, methods: tuple[str, ...] = ("linear_bce", "cprfl")) -> Path:
    """A finished run of two seeds of which only what the report reads is there; the linear classifier is all wrong."""
    found = {}
    for method, value in {"zero_shot": 0.4, **{m: 0.5 + 0.1 * i for i, m in enumerate(methods)}}.items():
        scores = -SCORES if method.startswith("linear") else SCORES
        for seed in (1, 2):
            tensors = {"scores": scores.contiguous(), "targets": TARGETS, "thresholds": torch.zeros(4)}
            save_tensors(run / f"seed-{seed}" / method / "scores.safetensors", tensors)
        values = {"map": value, "map_head": value, "map_medium": value + 0.1, "op_half": 0.25, "cf1_chosen": 0.75}
        found[method] = aggregate_seeds({seed: values for seed in (1, 2)})
    write_json(
        run / "run.json",
        {"protocol": "multi-label", "classes": names, "frequency": FREQUENCY,
         "options": {"head": 100, "medium": 20, "val_fraction": 0.15}, "data": {"name": "x", "fingerprint": "f" * 32}},
    )  # fmt: skip
    write_json(
        run / "summary.json",
        {"schema": 1, "protocol": "multi-label", "metrics": ["map", "map_head", "map_medium"], "dataset": "pets",
         "model": "a model", "seeds": [1, 2], "methods": found},
    )  # fmt: skip
    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_classes_are_listed_by_frequency_with_their_precision(tmp_path: Path) -> None:
    index = write_report(write_example(tmp_path / "run"))
    content = read_json(index.parent / "data.json")
    assert [(row["name"], row["group"], row["frequency"], row["positives"]) for row in content["classes"]] == [
        ("cat", "head", 200, 3), ("dog", "medium", 30, 2), ("fox", "medium", 30, 1), ("owl", "tail", 0, 0),
    ]  # fmt: skip
    # Cat: images 0, 1, 4 lead. Dog: image 3, then 2, 1; precisions 1/2 and 2/3. Fox: image 3 leads.
    assert [row["ap"]["cprfl"] for row in content["classes"]] == [1.0, pytest.approx(7 / 12, abs=1e-4), 1.0, None]
    assert content["excluded"] == ["owl"] and [row["threshold"] for row in content["classes"]] == [0.5] * 4
    rows = rows_of(index.parent / "classes.csv")
    assert rows[1]["AP: cprfl"] == "58.33" and rows[3]["AP: cprfl"] == "" and rows[3]["training images"] == "0"
    html = index.read_text(encoding="utf-8")
    assert "No test image shows owl: this class has no average precision and is in no mean." in html


def test_the_figure_has_a_bar_for_every_class_with_a_precision(tmp_path: Path) -> None:
    figure = read_json(write_report(write_example(tmp_path / "run")).parent / "data.json")["figure"]
    cat, dog, fox = figure["bars"]
    assert cat["main"] == figure["top"] and cat["x"] > fox["x"] > dog["x"]  # dog and fox side by side
    assert dog["main"] == pytest.approx(figure["bottom"] - 7 / 12 * (figure["bottom"] - figure["top"]), abs=0.11)
    assert "dog (medium): 30 training images, 2 test images; AP Zero-shot 58.3, Linear (BCE) 41.7" in dog["label"]
    bands = {band["label"]: band for band in figure["bands"]}
    assert list(bands) == ["head", "medium"]  # no tail class has a precision
    assert bands["medium"]["x"] + bands["medium"]["width"] == pytest.approx(bands["head"]["x"], abs=0.11)
    assert bands["medium"]["x"] < dog["x"] < bands["head"]["x"] < cat["x"]
    assert bands["medium"]["means"][2]["label"] == "CPRFL, medium: mAP 70.0"
    assert [entry["dot"] for entry in figure["legend"]] == [False, True, True]
    assert [tick["label"] for tick in figure["x_ticks"]] == ["50", "100", "200"]


def test_confused_labels_are_missed_and_wrong_on_one_image(tmp_path: Path) -> None:
    index = write_report(write_example(tmp_path / "run"))
    (entry,) = read_json(index.parent / "data.json")["confusions"]
    assert (entry["true"], entry["predicted"]) == ("dog", "fox")
    assert entry["counts"]["cprfl"] == entry["counts"]["zero_shot"] == 2
    (row,) = rows_of(index.parent / "confusions.csv")
    assert (row["true"], row["predicted"], row["cprfl"]) == ("dog", "fox", "2")


def test_images_of_confused_labels_are_test_images_the_surest_first(tmp_path: Path) -> None:
    table = label_files.write_labels(tmp_path)
    data = load_multi_label(table)
    test = data.test
    assert test is not None
    five = replace(data, test=test.subset(range(5)))
    run = write_example(tmp_path / "run")
    write_json(run / "run.json", {**read_json(run / "run.json"), "data": {"fingerprint": five.fingerprint()}})
    index = write_report(run, data=data_of_run(run, five), images_per_pair=1)
    ((image,),) = (entry["images"] for entry in read_json(index.parent / "data.json")["confusions"])
    assert image["name"] == test.names[2] and (index.parent / "thumbs" / image["thumbnail"]).is_file()
    assert f"dog, predicted instead fox: {test.names[2]}" in index.read_text(encoding="utf-8")
    with pytest.raises(DataError, match="give the data set of the run"):
        data_of_run(run, data)


def test_precision_and_recall_are_shown_for_every_way_to_predict(tmp_path: Path) -> None:
    further = read_json(write_report(write_example(tmp_path / "run")).parent / "data.json")["further"]
    assert further["columns"] == ["Predicted labels", "OP", "OR", "OF1", "CP", "CR", "CF1"]
    assert [row["method"] for row in further["rows"]][::3] == ["Zero-shot", "Linear (BCE)", "CPRFL"]
    assert further["rows"][0]["cells"] == ["probability 0.5", "25.0", "-", "-", "-", "-", "-"]
    assert further["rows"][1]["cells"] == ["threshold of each class", "-", "-", "-", "-", "-", "75.0"]


def test_page_is_static_accessible_and_escapes_names(tmp_path: Path) -> None:
    index = write_report(write_example(tmp_path / "run", names=HOSTILE))
    html = index.read_text(encoding="utf-8")
    page = Page(html)
    plain = Page(write_report(write_example(tmp_path / "plain")).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert "<script" not in html and "No images: the data set of this run was not found" in html
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [str(attrs["href"]) for attrs in page.named("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert all((index.parent / link).is_file() for link in links if not link.startswith("#"))
    assert all(attrs.get("scope") for attrs in page.named("th"))
    assert all(attrs.get("aria-label") for attrs in page.named("svg"))
    assert len(page.named("circle")) == 2 * 3


def test_a_run_without_confusions_or_linear_classifier_has_a_page(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", methods=("cprfl",))
    right = {"scores": 4.0 * TARGETS - 2, "targets": TARGETS, "thresholds": torch.zeros(4)}
    save_tensors(run / "seed-1" / "cprfl" / "scores.safetensors", right)
    index = write_report(run)
    assert "On no test image CPRFL misses one label" in index.read_text(encoding="utf-8")
    assert read_json(index.parent / "data.json")["rival"] == "Zero-shot"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run")
    file = run / "seed-2" / "cprfl" / "scores.safetensors"
    save_tensors(file, {"scores": SCORES})
    with pytest.raises(DamagedFileError, match=r"seed-2.*cprfl.*targets"):
        write_report(run)
    save_tensors(file, {"scores": SCORES, "targets": TARGETS[1:], "thresholds": torch.zeros(4)})
    with pytest.raises(DamagedFileError, match="do not fit"):
        read_outcome(file)
    file.unlink()
    with pytest.raises(DataError, match=r"seed-2.*cprfl"):
        write_report(run)
    run = write_example(tmp_path / "other")
    write_json(run / "run.json", {"protocol": "multi-label"})
    with pytest.raises(DamagedFileError, match=r"not the record of a multi-label run .*classes"):
        write_report(run)
    for option in ("n_pairs", "images_per_pair"):
        with pytest.raises(CaptError, match=rf"{option} .*: expected 0 or more, found -1"):
            write_report(run, **{option: -1})


def test_report_and_summary_of_a_trained_run_agree(tmp_path: Path) -> None:
    table = label_files.write_labels(tmp_path)
    run = label_files.write_run(tmp_path / "run", table, epochs=1)
    content = read_json(write_report(run, data=data_of_run(run, load_multi_label(table))).parent / "data.json")
    assert content["excluded"] == ["gold square"]
    for method, found in read_summary(run)["methods"].items():
        known = [row["ap"][method] for row in content["classes"] if row["positives"]]
        assert sum(known) / len(known) == pytest.approx(found["mean"]["map"], abs=1e-4), method
    assert data_of_run(run) is None  # neither shipped nor given


def test_table_and_verdict_name_metrics_and_rivals(tmp_path: Path) -> None:
    summary = read_summary(write_example(tmp_path / "run", methods=("linear_bce", "linear_asl", "cprfl")))
    assert markdown_table(summary).splitlines()[0] == "| Method | Seed | mAP | mAP head | mAP medium |"
    seeds = "higher in the mean, higher in 2 of 2 seeds)."
    assert verdict(summary) == [
        f"Mean average precision over all classes: CPRFL 70.0 %, zero-shot 40.0 % (30.0 points {seeds}",
        f"CPRFL beats Linear (BCE) in mAP: 70.0 %, linear (BCE) 50.0 % (20.0 points {seeds}",
        f"CPRFL beats Linear (ASL) in mAP: 70.0 %, linear (ASL) 60.0 % (10.0 points {seeds}",
    ]
    methods = summary["methods"]
    methods["linear_asl"], methods["cprfl"] = methods["cprfl"], methods["linear_asl"]
    assert verdict(summary)[-1].startswith("CPRFL does not beat Linear (ASL) in mAP: 60.0 %")
    del methods["cprfl"]
    assert verdict(summary)[-1].startswith("Linear (ASL) beats Linear (BCE) in mAP: 70.0 %")
