"""The report: what it says follows from the numbers, it escapes everything, and it loads nothing from elsewhere."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from capt.errors import DamagedFileError, DataError
from capt.files import read_json, write_json
from capt.report import markdown_table, read_summary, verdict, write_report
from tests import run_folders

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'; DROP TABLE-- ${7*7} {{7*7}} {% raw %}",
    "\u202egnp.exe </title></style><b>\u2028",
]


class Page(HTMLParser):
    """Collects tags with attributes, and text by tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def fake_data(tmp_path: Path) -> Any:
    colours = {10: "red", 11: "green", 12: "blue"}  # id 13 is missing on purpose
    images = SimpleNamespace(ids=list(colours), image=lambda i: Image.new("RGB", (400, 200), list(colours.values())[i]))
    return SimpleNamespace(train=images)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folders.write_run(tmp_path / "run")


def test_report_is_a_folder_with_page_data_tables_and_thumbnails(run: Path, tmp_path: Path) -> None:
    index = write_report(run, data=fake_data(tmp_path))
    assert index == run / "report" / "index.html"
    page = Page(index.read_text(encoding="utf-8"))
    shown = [attrs["src"] for attrs in page.named("img")]
    assert sorted(shown) == ["thumbs/10.webp", "thumbs/11.webp", "thumbs/12.webp"]
    for source in shown:
        with Image.open(index.parent / str(source)) as image:
            assert image.size == (160, 80)
    content = read_json(index.parent / "data.json")
    pair = content["pairs"][0]
    assert (pair["directions"][0]["true"], pair["directions"][0]["predicted"]) == ("fox", "wolf")
    assert pair["in_bank"] == 3
    assert [image["id"] for image in pair["directions"][0]["images"]] == [11, 10]  # most confident first
    assert pair["directions"][0]["on_test"] == {"zero_shot": 9, "linear_adapter": 4, "capt": 2}
    assert content["pairs"][1]["directions"][0]["images"][0]["thumbnail"] is None
    rows = list(csv.DictReader((index.parent / "summary.csv").open(encoding="utf-8")))
    assert [row["seed"] for row in rows if row["method"] == "capt"] == ["1", "2", "mean"]
    assert rows[0]["base"] == "50.0"


def test_report_without_the_images_says_so(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    assert "No images: the data set of this run was not found" in html
    assert "<img" not in html and not (run / "report" / "thumbs").exists()


def test_page_loads_nothing_from_elsewhere_and_runs_no_script(run: Path, tmp_path: Path) -> None:
    index = write_report(run, data=fake_data(tmp_path))
    page = Page(index.read_text(encoding="utf-8"))
    assert not page.named("script") and not page.named("iframe") and not page.named("form")
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        for name in ("src", "href"):
            target = attrs.get(name) or "#"
            assert "//" not in target
            assert target.startswith("#") or (index.parent / target).is_file(), target


def test_page_can_be_used_by_keyboard_and_reader(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.named("html")[0]["lang"] == "en"
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {str(a["href"])[1:] for a in page.named("a") if str(a["href"]).startswith("#")} <= targets
    assert all(attrs.get("alt") for attrs in page.named("img"))
    assert all(attrs.get("scope") for attrs in page.named("th"))
    style = (Path(write_report(run)).read_text(encoding="utf-8")).split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style and ":focus-visible" in style


def test_class_and_file_names_are_escaped(tmp_path: Path) -> None:
    run = run_folders.write_run(tmp_path / "run", classes=HOSTILE, names=HOSTILE)
    index = write_report(run, data=fake_data(tmp_path))
    html = index.read_text(encoding="utf-8")
    page = Page(html)
    plain = Page(write_report(run_folders.write_run(tmp_path / "plain"), data=fake_data(tmp_path)).read_text("utf-8"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]  # the names add no element
    assert "<script" not in html
    text = "".join(page.text)
    for name in HOSTILE:
        assert name in text
    assert json.loads((index.parent / "data.json").read_text(encoding="utf-8"))["confusions"][0]["true"] == HOSTILE[0]


def test_csv_cells_cannot_become_formulas(tmp_path: Path) -> None:
    run = run_folders.write_run(tmp_path / "run", classes=["=1+1", "@x", "-2", "plain"])
    rows = list(csv.reader((write_report(run).parent / "confusions.csv").open(encoding="utf-8")))
    assert rows[1][:2] == ["'=1+1", "'@x"] and rows[2][:2] == ["'-2", "plain"]


def test_empty_bank_and_no_bank_are_told_apart(tmp_path: Path) -> None:
    import torch

    from capt.bank import ConfusionBank

    run = tmp_path / "run"
    write_json(run / "summary.json", run_folders.summary())
    (run / "seed-1").mkdir()
    assert "holds no confusion bank" in write_report(run).read_text(encoding="utf-8")
    none = torch.zeros(0, dtype=torch.long)
    empty = ConfusionBank(torch.zeros(0, 4), none, none, torch.zeros(0), none, run_folders.CLASSES)
    empty.save(run / "seed-1" / "bank")
    assert "made no mistake" in write_report(run).read_text(encoding="utf-8")


def test_the_verdict_follows_the_numbers() -> None:
    summary = run_folders.summary()
    text = " ".join(verdict(summary))
    assert "CAPT 89.0 %, zero-shot 50.0 % (39.0 points higher in the mean, higher in 2 of 2 seeds)" in text
    assert "CAPT corrects 79.0 %; of what zero-shot had right it breaks 2.0 %" in text
    assert "CAPT beats an ordinary linear adapter" in text

    summary["methods"]["capt"]["mean"]["n_mistakes"] = 0.0
    assert "nothing to correct" in " ".join(verdict(summary))
    better = summary["methods"]["linear_adapter"]
    summary["methods"]["linear_adapter"], summary["methods"]["capt"] = summary["methods"]["capt"], better
    text = " ".join(verdict(summary))
    assert "CAPT does not beat an ordinary linear adapter" in text and "points lower in the mean" in text

    summary["expected"] = {"judgements": [{"verdict": "within", "why": ""}, {"verdict": "below", "why": ""}]}
    assert "1 within, 1 below" in verdict(summary)[-1]
    summary["expected"] = {"judgements": [{"verdict": "not comparable", "why": "another backbone"}]}
    assert "not comparable: another backbone" in verdict(summary)[-1]
    del summary["methods"]["capt"], summary["expected"]
    assert verdict(summary)[0].startswith("Accuracy on the classes it was trained on: Linear adapter 89.0 %, zero-shot")
    del summary["methods"]["linear_adapter"]
    assert verdict(summary) == ["This run holds zero-shot results only."]


def test_markdown_table_has_every_seed_and_the_mean() -> None:
    lines = markdown_table(run_folders.summary()).splitlines()
    assert len(lines) == 2 + 3 * 3 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| Zero-shot | 1 | 50.0 | 46.0 |")
    assert lines[-1].startswith("| **CAPT** | mean | **89.0 ± 1.0** | **46.0 ± 1.0** |")
    assert "| - |" in lines[2] and "| - |" not in lines[-1]


def test_unfinished_and_damaged_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no summary\.json"):
        read_summary(tmp_path)
    write_json(tmp_path / "summary.json", {"schema": 1, "methods": {"capt": {"mean": {}}}})
    with pytest.raises(DamagedFileError, match=r"summary\.json.*not a run summary"):
        read_summary(tmp_path)
    write_json(tmp_path / "summary.json", {**run_folders.summary(), "schema": 99})
    with pytest.raises(DamagedFileError, match="schema 99"):
        read_summary(tmp_path)
