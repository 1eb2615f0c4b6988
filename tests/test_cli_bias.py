"""``capt bias`` from the command line, on the shipped vision transformer and few objects."""

from __future__ import annotations

import json

import pytest

import capt
from capt.cli import main
from capt.cli.common import ModelOptions
from capt.errors import CaptError

FEW = ["--model", "embedded-vit", "--objects", "shapes", "--n", "4", "--cells", "3", "--backgrounds", "grey"]
FEW += ["--center-radius", "0.4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bias")
    for verb in (["measure"], ["explain"], ["mitigate", "--region-objects", "1"]):
        assert main(["bias", *verb, *FEW, "--out", str(out)]) == 0
    return out


def test_the_three_steps_collect_in_one_record_and_one_page(run):
    record = json.loads((run / "bias.json").read_text())
    assert {"measure", "preprocessing", "explain", "mitigate", "pictures", "took"} <= record.keys()
    assert set(record["preprocessing"]["preprocessing"]) == {"native", "squash", "pad"}
    page = (run / "report" / "index.html").read_text()
    for part in ("positions", "stages", "attention", "carriers", "confounds", "mitigation"):
        assert f'id="{part}"' in page
    assert record["measure"]["verdict"] in page and "Diagnosis: " in page
    assert "native" in page and "squash" in page
    assert page.count("<img") == len(record["pictures"]) == len(list((run / "report" / "pictures").iterdir())) == 12


def test_report_writes_the_page_of_a_bias_run_again(run, capsys):
    page = run / "report" / "index.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert page.read_text() == before and str(page) in capsys.readouterr().out


def test_a_mitigated_model_is_opened_by_its_run(run):
    record = json.loads((run / "bias.json").read_text())["mitigate"]
    found = ModelOptions(f"bias:{run}").open()
    assert found.fingerprint() == record["fingerprint"]["mitigated"]
    assert (found.fingerprint() != capt.load("embedded-vit").fingerprint()) == record["helps"]


def test_json_is_the_part_that_was_done(tmp_path, capsys):
    assert main(["bias", "explain", *FEW, "--out", str(tmp_path / "run"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"explain", "pictures"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["measure", "--objects", "nowhere"], 2, "neither 'emoji' nor 'shapes'"),
        (["measure", "--photos", "nowhere"], 3, "--photos nowhere"),
        (["measure", "--cells", "4"], 2, "odd number"),
        (["explain", "--n", "1"], 2, "at least 2 objects"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, code, said, tmp_path, capsys):
    assert main(["bias", *arguments, "--model", "embedded-vit", "--out", str(tmp_path / "run")]) == code
    assert said in capsys.readouterr().err


def test_a_folder_of_another_model_is_refused(run, capsys):
    assert main(["bias", "explain", *FEW[2:], "--model", "embedded", "--out", str(run)]) == 2
    assert "holds the bias of another model" in capsys.readouterr().err


def test_a_folder_of_another_kind_or_a_damaged_one_is_refused_before_the_work(run, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["bias", "measure", *FEW, "--out", str(tmp_path)]) == 2
    assert "a run of another kind" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    record = json.loads((run / "bias.json").read_text())
    for part, value in (("took", 3), ("explain", "x"), ("measure", {"verdict": ""})):
        (damaged / "bias.json").write_text(json.dumps({**record, part: value}))
        assert main(["bias", "measure", *FEW, "--out", str(damaged)]) == 4
        assert "bias.json" in capsys.readouterr().err
    assert main(["bias", "measure", *FEW, "--out", str(tmp_path / "run.json" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_run_without_a_mitigation_is_no_model(tmp_path):
    with pytest.raises(CaptError, match=r"mitigation\.json"):
        ModelOptions(f"bias:{tmp_path}").open()
