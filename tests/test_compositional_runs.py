"""Runs of compositional models: training with validation, the run folder, the test lock, both worlds and profiles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capt.data import CompositionalSet
from capt.errors import CaptError, DamagedFileError, DataError
from capt.evaluation import SeenUnseenCurve
from capt.files import load_tensors, read_json, write_json
from capt.methods.compositional.csp import CSPConfig
from capt.methods.compositional.model import CompositionalConfig, CompositionalModel
from capt.methods.compositional.registry import load_model
from capt.methods.compositional.run import CompositionalOptions, CompositionalRun, evaluate
from capt.methods.compositional.scoring import closed_world, encode_pairs, labels_of, open_world, rows, score
from capt.methods.compositional.training import fit_model, make_model
from capt.methods.msci import MSCI
from capt.methods.msci_config import MSCIConfig
from capt.methods.runs.inputs import InputCache
from capt.training import TrainingOptions
from tests.tiny import backbone, compositional_set

DATA = compositional_set(seed=1)  # where zero-shot is above 0
TRAINING = TrainingOptions(
    epochs=3, batch_size=6, optimizer="adam", lr=3e-3, schedule="halving", warmup_epochs=0, clip_norm=0
)
CONFIG = MSCIConfig(n_low=1, n_high=1, n_heads=4, adapter_width=8, training=TRAINING)
MODELS = {"msci": CONFIG, "csp": CSPConfig(training=replace(TRAINING, epochs=1))}
OPTIONS = CompositionalOptions(seeds=(3,), n_thresholds=4)


def quiet(what: str, done: int, total: int) -> None:
    pass


def fit_one(folder: Path, config: MSCIConfig = CONFIG, seed: int = 3, data: CompositionalSet = DATA) -> MSCI:
    return fit_model("msci", config, data, InputCache(backbone(), 1 << 30, quiet), seed, folder, quiet)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any], dict]:
    out = tmp_path_factory.mktemp("run")
    run = CompositionalRun(DATA, backbone(), MODELS, OPTIONS)
    models = run.fit(out, opened_with={"pretrained": "none"})
    return out, run.evaluate(out, models), models


def copied(finished: tuple, folder: Path) -> Path:
    for path in finished[0].rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(finished[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


# ---- training --------------------------------------------------------------------------------------------


class Watched:
    """Notes at every step: training mode, how many batches the statistics have seen, and whether dropout drops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[bool, int, bool]] = []
        self.modes: set[bool] = set()
        self.loads = 0
        plain, load = MSCI.losses, MSCI.load_state_dict

        def losses(model: MSCI, *given: Any) -> Any:
            found = plain(model, *given)
            batches = int(model.disentangle_state.norm.num_batches_tracked)
            self.steps.append((model.training, batches, not torch.equal(model.prompts.dropped(), model.prompts.table)))
            self.modes.add(any(module.training for module in model.backbone.model.modules()))
            return found

        def counted(model: MSCI, *given: Any, **named: Any) -> Any:
            self.loads += 1
            return load(model, *given, **named)

        monkeypatch.setattr(MSCI, "losses", losses)
        monkeypatch.setattr(MSCI, "load_state_dict", counted)


def test_15_training_mode_is_restored_after_validation(tmp_path, monkeypatch):
    """In the published code dropout and batch statistics end with the first validation (its item 1)."""
    watched = Watched(monkeypatch)
    fit_one(tmp_path)
    assert [step[0] for step in watched.steps] == [True] * 9
    assert [step[1] for step in watched.steps] == list(range(1, 10))  # statistics move in every epoch
    assert all(step[2] for step in watched.steps) and watched.modes == {False}


def test_15_the_released_profile_freezes_dropout_and_statistics_after_the_first_validation(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    fit_one(tmp_path, replace(CONFIG, profile="released"))
    assert watched.steps == [(True, n, True) for n in (1, 2, 3)] + [(False, 3, False)] * 6


def test_training_never_goes_back_to_an_earlier_epoch(tmp_path, monkeypatch):
    """The published code can reload its best epoch in the middle (its item 11); here once, at the end."""
    watched = Watched(monkeypatch)
    fit_one(tmp_path)
    assert watched.loads == 1


def test_the_model_of_the_epoch_with_the_best_validation_auc_is_kept(tmp_path):
    data = compositional_set()  # of which the AUC rises and falls
    model = fit_one(tmp_path, replace(CONFIG, training=replace(TRAINING, epochs=5, lr=5e-3)), data=data)
    log = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [line["epoch"] for line in losses] == [1, 2, 3, 4, 5]
    assert {"loss", "pair", "state", "object", "lr"} <= losses[0].keys()
    space = closed_world(data, "val")
    inputs = InputCache(backbone(), 1 << 30, quiet)(model, data.val, "val")
    found = score(model, encode_pairs(model, space), space, inputs, labels_of(data, "val")).best_pairs().curve()
    assert (
        len({line["auc"] for line in log}) > 1 and found.auc == max(line["auc"] for line in log) and not model.training
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_released_profile_chooses_the_epoch_with_weights_of_one_and_the_grid(tmp_path):
    """Its validation differs from its test: other weights, no repeated primitives (items 3 and 9)."""
    logs = []
    for weights in ((1.0, 1.0, 1.0), (0.0, 9.0, 0.0)):
        fit_one(tmp_path, replace(CONFIG, profile="released", score_weights=weights))
        logs.append((tmp_path / "validation.jsonl").read_text())
    assert logs[0] == logs[1]
    fit_one(tmp_path, replace(CONFIG, score_weights=weights))
    assert (tmp_path / "validation.jsonl").read_text() != logs[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    config = replace(CONFIG, views=1, pairs_per_step=3)
    torch.manual_seed(11)
    one = fit_one(tmp_path / "a", config)
    torch.manual_seed(12)
    same, other = fit_one(tmp_path / "b", config), fit_one(tmp_path / "c", config, seed=4)
    assert all(torch.equal(value, same.state()[name]) for name, value in one.state().items())
    assert (tmp_path / "a" / "validation.jsonl").read_text() == (tmp_path / "b" / "validation.jsonl").read_text()
    assert not torch.equal(one.prompts.table, other.prompts.table)


def test_inputs_that_are_not_kept_give_the_same_model(tmp_path):
    kept, made_again = fit_one(tmp_path), InputCache(backbone(), 0, quiet)
    other = fit_model("msci", CONFIG, DATA, made_again, 3, tmp_path, quiet)
    assert all(torch.equal(value, other.state()[name]) for name, value in kept.state().items())
    assert all(store._tokens is None for store in made_again._stores.values())


def test_a_run_under_autocast_trains_and_scores(tmp_path):
    model = fit_one(tmp_path, replace(CONFIG, training=replace(TRAINING, amp=True, epochs=1)))
    assert all(value.isfinite().all() for value in model.state().values())


# ---- the run folder --------------------------------------------------------------------------------------


def test_a_run_folder_holds_records_models_logs_and_the_best_pairs(finished):
    out, summary, _ = finished
    record = read_json(out / "run.json")
    assert record["models"]["msci"]["kind"] == "msci" and record["models"]["csp"]["profile"] == "clean"
    assert record["test_opened"] == 1 and record["opened_with"] == {"pretrained": "none"}
    assert record["hashes"] == {"backbone": backbone().fingerprint(), "data": DATA.fingerprint()}
    assert read_json(out / "training_images.json") == sorted(DATA.train.names)
    assert summary == read_json(out / "summary.json")
    assert summary["methods"].keys() == {"zero_shot", "msci", "csp"} and summary["pretrained"] == "none"
    assert summary["metrics"] == [
        f"{w}_{m}" for w in ("closed", "open") for m in ("best_seen", "best_unseen", "best_hm", "auc")
    ]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    trained = {"state.json", "model.safetensors", "metrics.jsonl", "validation.jsonl", "best_pairs.safetensors"}
    assert files == {"run.json", "summary.json", "training_images.json", "seed-3/zero_shot/best_pairs.safetensors"} | {
        f"seed-3/{name}/{file}" for name in MODELS for file in trained
    }
    assert str(out) not in json.dumps([record, summary])


def test_metrics_follow_from_the_stored_best_pairs(finished):
    out, summary, _ = finished
    for name in ("zero_shot", "msci", "csp"):
        found = load_tensors(out / "seed-3" / name / "best_pairs.safetensors")
        metrics = summary["methods"][name]["per_seed"]["3"]
        for world in ("closed", "open"):
            seen, labels = found[f"{world}_label_seen"], found[f"{world}_labels"]
            own = torch.where(seen[:, None], found[f"{world}_seen_pairs"], found[f"{world}_unseen_pairs"])
            margin = found[f"{world}_seen_scores"].double() - found[f"{world}_unseen_scores"].double()
            curve = SeenUnseenCurve.exact(margin.numpy(), (own == labels).all(1).numpy(), seen.numpy())
            assert metrics[f"{world}_auc"] == pytest.approx(curve.auc, abs=1e-9)
            assert torch.equal(labels, labels_of(DATA, "test"))


def test_training_and_choosing_thresholds_never_read_a_test_image(tmp_path, monkeypatch):
    reads: list[str] = []
    source = type(DATA.test.source)
    plain = source.read
    monkeypatch.setattr(source, "read", lambda own, name: reads.append(name) or plain(own, name))
    run = CompositionalRun(DATA, backbone(), {"csp": MODELS["csp"]}, OPTIONS)
    models = run.fit(tmp_path)
    assert {name.split("/")[0] for name in reads} == {"train", "val"}
    model, whole = models[3]["csp"], open_world(DATA, backbone())
    run._threshold("csp", model, encode_pairs(model, whole), whole)
    assert "test" not in {name.split("/")[0] for name in reads}
    with pytest.raises(DataError, match="the test split is locked"):
        run.data.test.image(0)
    run.evaluate(tmp_path, models)
    assert {name for name in reads if name.startswith("test")} == set(DATA.test.names)
    with pytest.raises(DataError, match="the test split is locked"):
        run.data.test.image(0)


def test_fitting_into_a_folder_takes_nothing_of_an_earlier_run(finished, tmp_path):
    out = copied(finished, tmp_path)
    (out / "seed-pictures").mkdir()
    (out / "seed-7").mkdir()
    (out / "seed-7" / "mine.txt").write_text("not of a run")
    (out / "notes.txt").write_text("kept")
    CompositionalRun(DATA, backbone(), {"other": MODELS["csp"]}, replace(OPTIONS, seeds=(5,))).fit(out)
    assert not (out / "summary.json").exists() and not (out / "seed-3").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "notes.txt", "run.json", "seed-5", "seed-7", "seed-pictures", "training_images.json",
    ]  # fmt: skip
    assert read_json(out / "run.json")["test_opened"] == 0


# ---- models from folders ---------------------------------------------------------------------------------


def test_a_stored_model_scores_like_the_trained_one(finished):
    out, _, models = finished
    for name in MODELS:
        stored, trained = load_model(out / "seed-3" / name, backbone()), models[3][name]
        assert stored.state().keys() == trained.state().keys() and stored.config == trained.config
        assert all(torch.equal(value, trained.state()[key]) for key, value in stored.state().items())
        space = open_world(DATA, backbone())
        texts = encode_pairs(stored, space), encode_pairs(trained, space)
        assert all(torch.equal(a, b) for a, b in zip(*(t[:3] for t in texts), strict=True) if a is not None)


def test_damaged_and_foreign_model_folders_are_refused(finished, tmp_path):
    folder = copied(finished, tmp_path) / "seed-3" / "msci"
    record = read_json(folder / "state.json")
    with pytest.raises(CaptError, match=r"trained on another backbone .* give the same --model"):
        load_model(folder, backbone(seed=1))
    for wrong in (
        {**record, "schema": 2}, {**record, "method": "capt"}, {**record, "config": {**record["config"], "bias": 1}},
        {**record, "config": {}}, {name: value for name, value in record.items() if name != "train_pairs"},
        {name: value for name, value in record.items() if name != "sha256"}, [],
    ):  # fmt: skip
        write_json(folder / "state.json", wrong)
        with pytest.raises(DamagedFileError, match="fit it again"):
            load_model(folder, backbone())
    write_json(folder / "state.json", {**record, "config": {**record["config"], "adapter_width": 4}})
    with pytest.raises(DamagedFileError, match=r"model\.safetensors.*not those of a 'msci' model"):
        load_model(folder, backbone())
    write_json(folder / "state.json", record)
    tensors = folder / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        load_model(folder, backbone())
    tensors.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_model(folder, backbone())
    with pytest.raises(DataError, match=r"state\.json"):
        load_model(tmp_path / "nothing", backbone())


# ---- evaluation ------------------------------------------------------------------------------------------


def test_evaluating_again_gives_the_same_numbers_counts_and_writes_nothing_else(finished, tmp_path):
    out = copied(finished, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.json"}
    found = evaluate(out, DATA, backbone())
    assert found["methods"] == finished[1]["methods"] and found["test_opened"] == 2
    assert read_json(out / "run.json")["test_opened"] == 2
    assert {path: path.read_bytes() for path in before} == before
    closed = evaluate(out, DATA, backbone(), options=CompositionalOptions(seeds=(9,), worlds=("closed",)))
    assert closed["seeds"] == [3] and closed["test_opened"] == 3
    one = closed["methods"]["msci"]["per_seed"]["3"]
    assert one == {
        key: value for key, value in finished[1]["methods"]["msci"]["per_seed"]["3"].items() if "open" not in key
    }


def test_evaluation_on_other_data_is_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    for other, what in (
        (replace(DATA, states=("blue", "green", "rose")), "states"),
        (replace(DATA, objects=("cat", "dog", "fish")), "objects"),
        (replace(DATA, split_pairs={**DATA.split_pairs, "train": DATA.split_pairs["train"][:-1]}), "training pairs"),
    ):
        with pytest.raises(DataError, match=rf"{what}.*fit a new run"):
            evaluate(out, other, backbone())
    swapped = replace(DATA, data=replace(DATA.data, test=DATA.train))
    with pytest.raises(DataError, match=r"was trained on 15 of the test images .* 'train/blue-cat-0.png'"):
        evaluate(out, swapped, backbone())
    record = read_json(out / "run.json")
    assert record["test_opened"] == 1
    write_json(out / "run.json", {key: value for key, value in record.items() if key != "models"})
    with pytest.raises(DamagedFileError, match=r"run\.json.*not the record of a compositional run"):
        evaluate(out, DATA, backbone())


def test_both_profiles_run_in_both_worlds_and_are_measured_differently(finished, tmp_path):
    config = replace(CONFIG, profile="released", training=replace(TRAINING, epochs=1))
    run = CompositionalRun(DATA, backbone(), {"msci": config}, OPTIONS)
    methods = run.evaluate(tmp_path, run.fit(tmp_path))["methods"]
    for name in ("msci", "zero_shot"):  # zero-shot is measured like the model beside it
        found = methods[name]["per_seed"]["3"]
        assert (
            found["closed_auc"] == found["closed_auc_grid"] and found["closed_best_hm"] == found["closed_best_hm_grid"]
        )
    clean = finished[1]["methods"]["zero_shot"]["per_seed"]["3"]
    assert clean["closed_auc"] != clean["closed_auc_grid"]
    assert clean["closed_auc_grid"] == methods["zero_shot"]["per_seed"]["3"]["closed_auc"]


@pytest.mark.parametrize(
    "changes, kept",
    [({"n_thresholds": 0}, None), ({"threshold": -2.0}, 1.0), ({"threshold": 2.0}, 5 / 9)],
)
def test_the_open_world_drops_what_a_threshold_says(tmp_path, changes, kept):
    """At or below the lowest feasibility nothing is dropped and nothing doubled (the published item 12)."""
    run = CompositionalRun(DATA, backbone(), {"csp": MODELS["csp"]}, replace(OPTIONS, worlds=("open",), **changes))
    zero_shot = run.evaluate(tmp_path, run.fit(tmp_path))["methods"]["zero_shot"]["per_seed"]["3"]
    assert zero_shot.get("open_kept") == kept and not any(name.startswith("closed") for name in zero_shot)
    if kept != 5 / 9:
        model, space = zero_shot_model(), open_world(DATA, backbone())
        inputs = InputCache(backbone(), 1 << 30, quiet)(model, DATA.test, "test")
        plain = score(model, encode_pairs(model, space), space, inputs, labels_of(DATA, "test")).best_pairs()
        assert zero_shot["open_auc"] == plain.curve().auc
    else:
        assert zero_shot["open_best_unseen"] == 0.0  # seen pairs alone are left


def zero_shot_model() -> CompositionalModel:
    return make_model(CompositionalConfig(), DATA, backbone()).eval()


def test_30_pruning_before_scoring_gives_what_masking_afterwards_gives():
    model, whole = zero_shot_model(), open_world(DATA, backbone())
    inputs = InputCache(backbone(), 1 << 30, quiet)(model, DATA.test, "test")
    labels, texts = labels_of(DATA, "test"), encode_pairs(model, whole)
    threshold = float(whole.feasibility[~whole.seen].median())
    pruned = whole.pruned(threshold)
    before = score(model, rows(texts, whole, pruned), pruned, inputs, labels).best_pairs()
    after = score(model, texts, whole, inputs, labels, thresholds=torch.tensor([threshold])).best_pairs()
    assert len(pruned) < len(whole)
    assert before.curve().record() == after.curve().record()


def test_a_model_without_anything_to_train_can_be_run_and_loaded(tmp_path):
    run = CompositionalRun(DATA, backbone(), {"clip": CompositionalConfig()}, replace(OPTIONS, worlds=("closed",)))
    methods = run.evaluate(tmp_path, run.fit(tmp_path))["methods"]
    assert methods["clip"]["per_seed"] == methods["zero_shot"]["per_seed"]
    assert load_model(tmp_path / "seed-3" / "clip", backbone()).kind == "zero-shot"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seeds": ()}, "seeds must be distinct and at least one"), ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"worlds": ()}, "worlds: expected"), ({"worlds": ("ajar",)}, "worlds: expected 'closed', 'open' or both"),
        ({"n_thresholds": -1}, "n_thresholds: expected 0 or more"), ({"seeds": (-1,)}, "seeds must be 0 or more"),
        ({"threshold": float("nan")}, "threshold: expected a finite number, found nan"),
        ({"threshold": 0.3, "worlds": ("closed",)}, "threshold: only the open world has one"),
        ({"token_memory": -1}, "token_memory: expected 0 or more, found -1"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        CompositionalOptions(**values)


def test_rows_need_names_of_their_own():
    for models in ({}, {"zero_shot": CONFIG}):
        with pytest.raises(CaptError, match="expected at least one, none called 'zero_shot'"):
            CompositionalRun(DATA, backbone(), models)
