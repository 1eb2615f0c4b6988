"""The ablation table: which variants there are, its numbers, its files."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from capt.errors import CaptError, DataError
from capt.evaluation.paired import harmonic_means, paired_difference
from capt.methods.ablation import FULL, GROUPS, VARIANTS, ablate, as_latex, chosen_variants, configurations
from capt.methods.runs import Run, base_to_novel
from tests.test_runs import CONFIG, OPTIONS
from tests.tiny import backbone, data_set

NAMES = ["full", "mgde", "random_texts", "shuffled_bank", "no_evidence"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    run = Run(base_to_novel(data_set()), backbone(), configurations(CONFIG, NAMES), replace(OPTIONS, seeds=(0, 1)))
    return folder, ablate(run, folder)


def test_every_variant_is_a_valid_configuration_that_differs_from_the_full_one():
    found = configurations(CONFIG, VARIANTS)
    assert set(found) == set(VARIANTS)
    assert len({repr(config) for config in found.values()}) == len(VARIANTS)
    controls = [name for name, variant in VARIANTS.items() if variant.what.startswith("control")]
    assert {"random_texts", "random_retrieval", "shuffled_bank"} <= set(controls)


def test_groups_and_names_choose_variants():
    assert chosen_variants() == list(VARIANTS)
    parts = chosen_variants(["parts"])
    assert parts[0] == FULL and {VARIANTS[name].group for name in parts[1:]} == {"parts"}
    assert chosen_variants(names=["k1"]) == [FULL, "k1"] and set(GROUPS) == {v.group for v in VARIANTS.values()} - {""}
    with pytest.raises(CaptError, match="no group or variant"):
        chosen_variants(["part"])


def test_the_table_has_every_row_with_its_interval(table):
    folder, result = table
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["zero_shot", "linear_adapter", "tip_adapter", *NAMES]
    assert "difference" not in rows["full"]
    for name, row in rows.items():
        if name != "full":
            gap = row["difference"]
            assert gap["low"] <= gap["mean"] <= gap["high"]
    for ending in ("json", "csv", "md", "tex"):
        assert (folder / f"ablation.{ending}").stat().st_size > 100
    lines = list(csv.reader((folder / "ablation.csv").open()))
    assert len(lines) == len(rows) + 1 and all(len(line) == len(lines[0]) for line in lines)
    assert as_latex(result).count(r"\\") == len(rows) + 1 and "_" not in as_latex(result).replace(r"\_", "")


def test_the_figure_is_drawn_and_repeatable(table):
    pytest.importorskip("matplotlib")
    folder, result = table
    from capt.methods.ablation import figure

    first = (folder / "ablation.svg").read_bytes()
    assert b"<svg" in first and figure(result) is not None


def test_paired_difference_knows_certain_and_uncertain_gaps():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.6
    assert paired_difference([right], [right], harmonic_means) == (0.0, 0.0, 0.0)
    better = right | (rng.random(400) < 0.5)
    mean, low, high = paired_difference([better], [right], harmonic_means)
    assert mean == pytest.approx(better.mean() - right.mean()) and 0 < low < mean < high
    noise = rng.random(400) < 0.6
    _, low, high = paired_difference([noise], [right], harmonic_means)
    assert low < 0 < high or abs(noise.mean() - right.mean()) > 0.05
    halves = paired_difference([np.ones(10), np.full(10, 0.5)], [np.ones(10), np.full(10, 0.25)], harmonic_means)
    assert halves[0] == pytest.approx(2 / 3 - 0.4)
    with pytest.raises(DataError, match="same"):
        paired_difference([right], [right[:-1]], harmonic_means)
