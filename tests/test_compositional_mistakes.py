"""Compositional runs on data, settings and folders that are not as they should be."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from capt.data import CompositionalSet
from capt.errors import CaptError, DataError
from capt.files import read_json
from capt.methods.compositional.csp import CSPConfig
from capt.methods.compositional.prediction import candidates
from capt.methods.compositional.registry import load_model
from capt.methods.compositional.run import CompositionalRun, evaluate
from capt.methods.compositional.scoring import closed_world, encode_pairs, labels_of, open_world, score
from capt.methods.compositional.training import make_model
from capt.methods.runs.inputs import InputCache
from tests.test_compositional_runs import CONFIG, DATA, OPTIONS, TRAINING, fit_one, quiet
from tests.tiny import backbone, compositional_set

CSP = CSPConfig(training=replace(TRAINING, epochs=1))


def without_unseen(data: CompositionalSet, split: str) -> CompositionalSet:
    """The same data set without the images of unseen pairs of a split."""
    images = data.data.splits()[split]
    kept = images.subset(np.flatnonzero(data.seen[images.labels]))
    return replace(data, data=replace(data.data, **{split: kept}))


def test_without_unseen_validation_images_the_epoch_is_chosen_by_accuracy(tmp_path):
    """Their AUC is 0 in every epoch, which would always keep the first."""
    data = without_unseen(compositional_set(), "val")
    model = fit_one(tmp_path, replace(CONFIG, training=replace(TRAINING, epochs=5, lr=5e-3)), data=data)
    log = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    space = closed_world(data, "val")
    inputs = InputCache(backbone(), 1 << 30, quiet)(model, data.val, "val")
    found = score(model, encode_pairs(model, space), space, inputs, labels_of(data, "val")).best_pairs().curve()
    assert {line["auc"] for line in log} == {0.0}
    assert found.best_seen == max(line["best_seen"] for line in log) > log[0]["best_seen"]


@pytest.mark.parametrize(("split", "consequence"), [("val", "the epoch is chosen by accuracy"), ("test", "are 0")])
def test_a_split_without_unseen_images_is_warned_of(tmp_path, split, consequence):
    models = {"csp": CSPConfig(training=replace(TRAINING, epochs=0))}
    with pytest.warns(UserWarning, match=f"no {split} image shows an unseen pair, .*{consequence}"):
        CompositionalRun(without_unseen(DATA, split), backbone(), models, OPTIONS).fit(tmp_path)


def test_settings_that_do_not_fit_the_backbone_leave_an_earlier_run_alone(tmp_path):
    CompositionalRun(DATA, backbone(), {"csp": CSP}, OPTIONS).fit(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for wrong in ({"n_low": 9}, {"n_heads": 5}):
        with pytest.raises(CaptError):
            CompositionalRun(DATA, backbone(), {"csp": CSP, "msci": replace(CONFIG, **wrong)}, OPTIONS).fit(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_inputs_do_not_depend_on_the_models_before():
    """A model trained under autocast stores rounded features; another model gets its own."""
    cache = InputCache(backbone(), 1 << 30, quiet)
    rounding, exact = (
        make_model(replace(CSP, training=replace(TRAINING, amp=amp)), DATA, backbone()) for amp in (True, False)
    )
    some = torch.arange(3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cache(rounding, DATA.val, "val")(some)
    alone = InputCache(backbone(), 1 << 30, quiet)(exact, DATA.val, "val")(some)
    found = cache(exact, DATA.val, "val")(some)
    assert torch.equal(found, alone) and not torch.equal(found, rounded.float())


def test_a_prediction_chooses_among_the_pairs_that_the_run_kept(tmp_path):
    """Names are spoken alike in both, so that thresholds mean the same."""
    data = replace(DATA, states=("navy.blue", "green", "red_ish"))
    run = CompositionalRun(data, backbone(), {"csp": CSP}, OPTIONS)
    run.evaluate(tmp_path, run.fit(tmp_path))
    model = load_model(tmp_path / "seed-3" / "csp", backbone())
    threshold = read_json(tmp_path / "summary.json")["methods"]["csp"]["per_seed"]["3"]["open_threshold"]
    found, whole = candidates(tmp_path, model, "open", seed=3, method="csp"), open_world(data, backbone())
    assert torch.equal(found.pairs, whole.pruned(threshold).pairs)
    assert torch.equal(found.feasibility, whole.pruned(threshold).feasibility)


def test_a_run_that_was_interrupted_says_so(tmp_path):
    CompositionalRun(DATA, backbone(), {"csp": CSP}, OPTIONS).fit(tmp_path)
    (tmp_path / "seed-3" / "csp" / "state.json").unlink()
    with pytest.raises(DataError, match=r"state\.json': no trained model there; was the run interrupted"):
        evaluate(tmp_path, DATA, backbone())


def test_models_that_are_measured_differently_are_not_put_side_by_side():
    models = {"csp": CSP, "msci": replace(CONFIG, profile="released")}
    with pytest.raises(CaptError, match="all need the same one, found csp 'clean', msci 'released'"):
        CompositionalRun(DATA, backbone(), models)


@pytest.mark.parametrize("worlds", [("closed",), ("open",)])
def test_a_pair_whose_name_is_too_long_is_found_before_training(tmp_path, worlds):
    """Each of its parts fits; zero-shot, which needs both, is scored last."""
    long = "very " * 8 + "{}"
    data = replace(
        DATA, states=(long.format("blue"), *DATA.states[1:]), objects=(long.format("cat"), *DATA.objects[1:])
    )
    classes = tuple(f"{data.states[state]} {data.objects[object_]}" for state, object_ in data.pairs)
    data = replace(data, data=replace(data.data, classes=classes))
    with pytest.raises(CaptError, match="does not fit into 24 tokens"):
        CompositionalRun(data, backbone(), {"csp": CSP}, replace(OPTIONS, worlds=worlds)).fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
