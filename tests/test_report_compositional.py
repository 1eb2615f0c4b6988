"""The report of a compositional run: curves, grid and confusions follow from the stored best pairs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from capt.data import load_compositional
from capt.errors import DamagedFileError, DataError
from capt.evaluation import aggregate_seeds
from capt.files import read_json, save_tensors, write_json
from capt.report import data_of_run, markdown_table, read_summary, verdict, write_report
from capt.report.compositional import read_outcome
from tests import pair_files
from tests.test_report import HOSTILE, Page

#: Best seen and best unseen pair with their scores; the label; and whether the label is seen: the example of
#: docs/compositional-evaluation.md.
EXAMPLE = {
    "labels": torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]]),
    "label_seen": torch.tensor([True, True, False, False]),
    "seen_pairs": torch.tensor([[0, 0], [1, 1], [0, 0], [0, 0]]),
    "unseen_pairs": torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]]),
    "seen_scores": torch.tensor([5.0, 4.0, 4.0, 6.0]),
    "unseen_scores": torch.tensor([3.0, 3.5, 3.0, 3.0]),
}
CURVE = {"best_seen": 1.0, "best_unseen": 1.0, "best_hm": 0.5, "auc": 0.25}


def write_example(run: Path, states=("dry", "wet"), objects=("cat", "dog"), worlds=("closed", "open")) -> Path:
    """A finished run of which only what the report reads is there; CSP gets labels of exchanged parts."""
    metrics = [f"{world}_{name}" for world in worlds for name in CURVE]
    methods = {}
    for method, factor in (("zero_shot", 0.5), ("csp", 0.0), ("msci", 1.0)):
        for seed in ("1", "2"):
            wrong = {"labels": EXAMPLE["labels"].flip(1)} if method == "csp" else {}
            tensors = {f"{world}_{name}": value for world in worlds for name, value in {**EXAMPLE, **wrong}.items()}
            save_tensors(run / f"seed-{seed}" / method / "best_pairs.safetensors", tensors)
        write_json(run / "seed-1" / method / "state.json", {"states": states, "objects": objects})
        values = {f"{world}_{name}": factor * value for world in worlds for name, value in CURVE.items()}
        methods[method] = aggregate_seeds({seed: values for seed in (1, 2)})
    write_json(run / "run.json", {"protocol": "compositional", "data": {"name": "pets", "fingerprint": "f" * 32}})
    write_json(
        run / "summary.json",
        {"schema": 1, "protocol": "compositional", "metrics": metrics, "dataset": "pets", "model": "a model",
         "seeds": [1, 2], "methods": methods},
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_files.write_pairs(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_files.write_run(tmp_path_factory.mktemp("runs") / "shapes", table, seeds=(1,), epochs=1)


def test_the_curve_of_a_report_is_that_of_the_summary(trained: Path) -> None:
    summary = read_summary(trained)
    for method, results in summary["methods"].items():
        for world in ("closed", "open"):
            outcome = read_outcome(trained / "seed-1" / method / "best_pairs.safetensors", world)
            for name in CURVE:
                assert getattr(outcome.curve, name) == results["per_seed"]["1"][f"{world}_{name}"], (method, world)
    assert data_of_run(trained) is None  # neither shipped nor given


def test_report_of_a_trained_run_shows_test_images(trained: Path, table: Path, tmp_path: Path) -> None:
    data = load_compositional(table)
    index = write_report(trained, data=data_of_run(trained, data), out=tmp_path / "report")
    content = read_json(index.parent / "data.json")
    shown = {image["thumbnail"] for entry in content["confusions"] for image in entry["images"]}
    assert shown and all((index.parent / "thumbs" / name).is_file() for name in shown)
    assert shown <= {f"{sample_id}.webp" for sample_id in data.test.ids.tolist()}
    rows = list(csv.DictReader((index.parent / "pairs.csv").open(encoding="utf-8")))
    assert sum(int(row["images"]) for row in rows) == len(data.test)
    assert {(row["state"], row["object"]) for row in rows if row["seen"] == "0"} == {
        pair for pair, split in pair_files.UNSEEN.items() if split == "test"
    }
    with pytest.raises(DataError, match="give the data set of the run"):
        data_of_run(trained, load_compositional("emoji-pairs"))


def test_grid_and_confusions_are_those_of_the_best_bias(tmp_path: Path) -> None:
    index = write_report(write_example(tmp_path / "run"))
    content = read_json(index.parent / "data.json")
    # The best harmonic mean of the example is at bias 1: images 1 and 3 are right, 2 is read as (0, 1), 4 as (0, 0).
    assert [(p["state"], p["object"], p["images"], p["right"]["msci"]) for p in content["pairs"]] == [
        ("dry", "cat", 1, 1.0), ("dry", "dog", 1, 1.0), ("wet", "cat", 1, 0.0), ("wet", "dog", 1, 0.0),
    ]  # fmt: skip
    assert [cell["accuracy"] for cell in content["grid"]["cells"]] == [1, 1, 0, 0]
    found = [(entry["true"], entry["predicted"], entry["seen"], entry["wrong"]) for entry in content["confusions"]]
    assert found == [("wet cat", "dry cat", False, "state"), ("wet dog", "dry dog", True, "state")]
    assert content["confusions"][0]["counts"] == {"zero_shot": 1, "csp": 1, "msci": 1}
    assert content["mistakes"][2] == {"method": "MSCI", "cells": ["50.0", "50.0", "0.0", "0.0"]}
    lines = content["curves"][0]["lines"]
    # A line for each seed, but for the model that has none; the dot stands at seen 0.5 and unseen 0.5.
    assert [line["series"] for line in lines] == [0, 1, 1, 2, 2]
    curve = content["curves"][0]
    assert lines[3]["dot"] == pytest.approx(
        [(curve["left"] + curve["right"]) / 2, (curve["top"] + curve["bottom"]) / 2], abs=0.11
    )
    assert lines[3]["path"].count("L") == 4


def test_an_image_without_candidates_is_wrong_everywhere(tmp_path: Path) -> None:
    inf = torch.inf
    tensors = EXAMPLE | {
        "seen_scores": torch.tensor([5.0, -inf, 4.0, -inf]), "unseen_scores": torch.tensor([-inf, -inf, 3.0, 3.0])
    }  # fmt: skip
    save_tensors(tmp_path / "b.safetensors", {f"open_{name}": value for name, value in tensors.items()})
    outcome = read_outcome(tmp_path / "b.safetensors", "open")
    assert outcome.predicted[1].tolist() == [-1, -1] and outcome.curve.best_seen == 0.5
    assert outcome.predicted[0].tolist() == [0, 0] and outcome.predicted[3].tolist() == [1, 0]


def test_page_is_static_accessible_and_escapes_names(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", states=HOSTILE[:2], objects=HOSTILE[2:])
    index = write_report(run)
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
    assert len(page.named("path")) == 2 * 5  # two worlds


def test_the_page_says_where_the_table_is_not_of_the_curves(tmp_path: Path) -> None:
    run = write_example(tmp_path)
    sentence = "those of these exact curves differ"
    assert sentence not in write_report(run).read_text(encoding="utf-8")
    write_json(run / "run.json", {**read_json(run / "run.json"), "models": {"msci": {"profile": "released"}}})
    assert sentence in write_report(run).read_text(encoding="utf-8")


def test_a_run_of_one_world_shows_one_curve(tmp_path: Path) -> None:
    index = write_report(write_example(tmp_path / "run", worlds=("open",)))
    content = json.loads((index.parent / "data.json").read_text(encoding="utf-8"))
    assert content["world"] == "open" and [curve["title"] for curve in content["curves"]] == ["Open world"]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run")
    file = run / "seed-2" / "csp" / "best_pairs.safetensors"
    save_tensors(file, {"closed_labels": torch.zeros(1, 2)})
    with pytest.raises(DamagedFileError, match=r"seed-2.*csp.*closed_label_seen"):
        write_report(run)
    file.unlink()
    with pytest.raises(DataError, match=r"seed-2.*csp"):
        write_report(run)
    run = write_example(tmp_path / "other")
    for state in run.glob("seed-1/*/state.json"):
        state.unlink()
    with pytest.raises(DataError, match="no trained model"):
        write_report(run)
    shutil.rmtree(run / "seed-1")
    with pytest.raises(DataError, match="seed-1"):
        write_report(run)


def test_table_and_verdict_name_worlds_and_rivals(tmp_path: Path) -> None:
    summary = read_summary(write_example(tmp_path / "run"))
    lines = markdown_table(summary, seeds=False).splitlines()
    assert lines[0].startswith("| Method | Seed | Closed seen | Closed unseen | Closed HM | Closed AUC | Open seen |")
    assert lines[-1].startswith("| **MSCI** | mean | **100.0 ± 0.0** |")
    sentences = verdict(summary)
    assert sentences[0].startswith("Closed world, best harmonic mean of seen and unseen: MSCI 50.0 %, zero-shot 25.0 %")
    assert sentences[-1].startswith("MSCI beats CSP in open AUC: 25.0 %, CSP 0.0 % (25.0 points higher in the mean")
    methods = summary["methods"]
    methods["csp"], methods["msci"] = methods["msci"], methods["csp"]
    assert any(sentence.startswith("MSCI does not beat CSP in closed HM") for sentence in verdict(summary))
    del methods["msci"]
    assert all("beat" not in sentence for sentence in verdict(summary))
    assert verdict(summary)[0].startswith("Closed world, best harmonic mean of seen and unseen: CSP 50.0 %")
