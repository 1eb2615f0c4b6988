"""CAPT as a whole, on tiny towers. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from capt import CAPT, ConfusionBank
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors
from capt.methods.capt import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel, evaluate
from capt.training import TrainingOptions
from tests.tiny import CLASSES, backbone, data_set

CONFIG = CAPTConfig(heads=4, hidden=32, views=1, training=TrainingOptions(epochs=3, batch_size=9, lr=3e-3))
OPTIONS = RunOptions(shots=4, seeds=(0, 1), linear=TrainingOptions(epochs=2, lr=3e-3))
KINDS = ("vit", "resnet", "cnn")


def trained_models(kind: str, folder, **changes):
    run = Run(base_to_novel(data_set()), backbone(kind), CAPTConfig(**{**vars(CONFIG), **changes}), OPTIONS)
    return run, run.evaluate(folder, run.fit(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *trained_models("vit", folder)


def pixels(kind: str, n: int = 12) -> torch.Tensor:
    images = data_set().train
    return torch.stack([backbone(kind).preprocess(images.image(i)) for i in range(0, 4 * n, 4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bank", [False, True])
def test_step_0_equals_the_base_model_bit_for_bit(kind, with_bank):
    wrapped = backbone(kind)
    bank = ConfusionBank.build(wrapped, data_set().train) if with_bank else None
    model = CAPT(wrapped, CLASSES, config=CONFIG, bank=bank).eval()
    with torch.no_grad():
        images = pixels(kind)
        features = normalize(wrapped.image_features(images), dim=-1)
        expected = wrapped.logit_scale * features @ wrapped.class_text_features(CLASSES).T
        assert torch.equal(model.logits(images), expected)
        assert torch.equal(model.encode_image(images), features)


def test_step_0_of_an_image_does_not_depend_on_its_batch_and_neither_does_a_trained_model(run):
    folder, *_ = run
    model = CAPT.load(folder / "seed-1", backbone("vit"))
    images = pixels("vit")
    together = model.logits(images)
    alone = torch.cat([model.logits(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4) and torch.equal(together.argmax(1), alone.argmax(1))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.logits(images[order]), together[order], atol=1e-4)


def test_04_with_an_empty_bank_training_and_prediction_work(tmp_path):
    wrapped = backbone("vit")
    model = CAPT(wrapped, CLASSES, config=CONFIG)
    assert model.bank is None
    tokens = model.tokens(pixels("vit"))
    losses = model.train().losses(tokens, torch.arange(12) % 9, bank_tokens=None, sample_ids=torch.arange(12))
    assert torch.isfinite(losses["loss"])
    model.save(tmp_path)
    assert torch.equal(CAPT.load(tmp_path, wrapped).logits(pixels("vit")), model.logits(pixels("vit")))


def test_30_only_the_adapter_and_mgde_learn(run):
    folder, fitted, _ = run
    wrapped = backbone("vit")
    before = wrapped.fingerprint()
    model = CAPT(wrapped, fitted.protocol.classes, config=CONFIG)
    assert {name.split(".")[0] for name in model.trainable()} == {"sample", "mgde"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.trainable())
    learned = CAPT.load(folder / "seed-1", wrapped)
    torch.manual_seed(1)
    start = CAPT(wrapped, fitted.protocol.classes, config=CONFIG, bank=learned.bank).trainable()
    assert any(not torch.equal(start[name], value) for name, value in learned.trainable().items())
    assert learned.mgde.beta.item() != 0 and learned.adapter.weight.abs().sum() > 0
    assert wrapped.fingerprint() == before
    wrapped.frozen_check()


def test_31_same_seed_same_curve_and_other_seed_other_curve(run, tmp_path):
    folder, *_ = run
    trained_models("vit", tmp_path)
    for seed in (0, 1):
        first, second = ((f / f"seed-{seed}" / "metrics.jsonl").read_text() for f in (folder, tmp_path))
        assert first == second
        tensors = [load_tensors(f / f"seed-{seed}" / "adapter.safetensors") for f in (folder, tmp_path)]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    curves = [(folder / f"seed-{s}" / "metrics.jsonl").read_text() for s in (0, 1)]
    assert curves[0] != curves[1]


def test_31_the_test_split_is_opened_after_the_last_training_step(tmp_path):
    data, events = data_set(), []

    class Watched:
        def read(self, name):
            events.append("opened test")
            return data.test.source.read(name)

    test = data.test.subset(range(len(data.test)))
    test.source = Watched()
    protocol = base_to_novel(replace(data, test=test))
    run = Run(protocol, backbone("vit"), CONFIG, OPTIONS, progress=lambda what, done, total: events.append(what))
    models = run.fit(tmp_path)
    assert "opened test" not in events and any(event.startswith("seed") for event in events)
    run.evaluate(tmp_path, models)
    assert events.count("opened test") == len(data.test)  # each image once, for all seeds and methods


def test_36_novel_evaluation_uses_no_statistics_and_no_base_text(run, monkeypatch):
    folder, fitted, _ = run
    model = CAPT.load(folder / "seed-1", backbone("vit"))
    classes = model.class_set(fitted.protocol.targets[1].classes)
    assert classes.statistics is None and classes.bank is None
    assert classes.text_features.shape[0] == len(fitted.protocol.targets[1].classes)
    expected = model.logits(pixels("vit"), fitted.protocol.targets[1].classes)
    model.text_features.fill_(float("nan"))  # base texts are poisoned: nothing may change
    assert torch.equal(model.logits(pixels("vit"), fitted.protocol.targets[1].classes), expected)


def test_36_switching_the_method_off_reproduces_the_base_model(run):
    folder, fitted, _ = run
    model = CAPT.load(folder / "seed-0", backbone("vit"))
    for parameter in (model.mgde.beta, model.mgde.shared.weight, model.adapter.weight):
        parameter.data.zero_()
    wrapped = backbone("vit")
    with torch.no_grad():
        features = normalize(wrapped.image_features(pixels("vit")), dim=-1)
        expected = wrapped.logit_scale * features @ wrapped.class_text_features(fitted.protocol.targets[1].classes).T
    assert torch.equal(model.logits(pixels("vit"), fitted.protocol.targets[1].classes), expected)


def test_classes_that_mix_old_and_new_keep_the_statistics_of_known_pairs(run):
    folder, fitted, _ = run
    model = CAPT.load(folder / "seed-1", backbone("vit"))
    names = [*reversed(fitted.protocol.classes), *fitted.protocol.targets[1].classes]
    moved = model.class_set(names).statistics
    known = model.bank.statistics()
    assert moved.counts.sum() == known.counts.sum() > 0
    position = {name: n for n, name in enumerate(names)}
    for old, name in enumerate(fitted.protocol.classes):
        theirs = slice(*known.offsets[old : old + 2].tolist())
        mine = slice(*moved.offsets[position[name] : position[name] + 2].tolist())
        expected = {
            (fitted.protocol.classes[c], int(n))
            for c, n in zip(known.classes[theirs], known.counts[theirs], strict=True)
        }
        assert {(names[c], int(n)) for c, n in zip(moved.classes[mine], moved.counts[mine], strict=True)} == expected


def test_run_folder_and_evaluate_agree(run):
    folder, fitted, _ = run
    for name in ("run.json", "summary.json", "seed-0/metrics.jsonl", "seed-0/few_shot.json", "seed-1/bank/bank.json"):
        assert (folder / name).is_file(), name
    stored = json.loads((folder / "summary.json").read_text())
    keys = {
        "base", "novel", "hm", "sample_correction_rate", "pair_resolution_rate", "net_reduction", "new_error_rate",
    }  # fmt: skip
    for method in ("zero_shot", "linear_adapter", "tip_adapter", "capt"):
        assert keys <= set(stored["methods"][method]["mean"])
        assert set(stored["methods"][method]["per_seed"]) == {"0", "1"}
    again = evaluate(folder, data_set(), backbone("vit"))
    assert again["methods"] == stored["methods"]
    bank = ConfusionBank.load(folder / "seed-0" / "bank")
    assert set(bank.sample_ids.tolist()) <= set(fitted.protocol.train.ids.tolist())
    assert len(bank) > 0


@pytest.mark.parametrize("kind", ["resnet", "cnn"])
def test_other_towers_train(kind, tmp_path):
    trained_models(kind, tmp_path, bank_at_inference=True, dynamic_alpha=kind == "cnn", m=2)
    curve = [json.loads(line) for line in (tmp_path / "seed-1" / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_predict_names_confusable_classes(run):
    folder, _fitted, _ = run
    model = CAPT.load(folder / "seed-1", backbone("vit"))
    images = [data_set().test.image(i) for i in range(3)]
    for prediction in model.predict(images, top=4):
        assert len(prediction.classes) == 4 and sum(prediction.probabilities) <= 1 + 1e-5
        assert prediction.base_class not in prediction.confusable_with and len(prediction.confusable_with) == 3


def test_wrong_use_is_refused(run, tmp_path):
    folder, *_ = run
    with pytest.raises(CaptError, match="another backbone"):
        CAPT.load(folder / "seed-1", backbone("vit", seed=1))
    with pytest.raises(DataError, match="others"):
        other = data_set()
        evaluate(folder, other.select_classes([8, 7, 6, 5, 4]), backbone("vit"))
    with pytest.raises(DataError, match="at least 4 classes"):
        base_to_novel(data_set().select_classes([0, 1, 2]))
    with pytest.raises(CaptError, match="seeds"):
        RunOptions(seeds=(1, 1))
    bank = ConfusionBank.load(folder / "seed-1" / "bank")
    with pytest.raises(CaptError, match="other classes"):
        CAPT(backbone("vit"), CLASSES, config=CONFIG, bank=bank)
    state = json.loads((folder / "seed-1" / "state.json").read_text())
    for name, value in (("adapter_sha256", "0" * 64), ("schema", 9)):
        broken = tmp_path / name
        broken.mkdir()
        (broken / "state.json").write_text(json.dumps({**state, "has_bank": False, name: value}))
        (broken / "adapter.safetensors").write_bytes((folder / "seed-1" / "adapter.safetensors").read_bytes())
        with pytest.raises(DamagedFileError):
            CAPT.load(broken, backbone("vit"))


def test_evidence_is_neutral_in_training_and_for_new_classes_and_names_the_class_of_a_training_image():
    wrapped, images = backbone("vit"), data_set().train
    model = CAPT(wrapped, CLASSES, config=CONFIG)
    pixels_, labels = pixels("vit", 54 // 4 + 1), torch.from_numpy(images.labels.copy())
    with torch.no_grad():
        everything = torch.stack([wrapped.preprocess(images.image(i)) for i in range(len(images))])
        before = model.eval().logits(everything)
        model.evidence.remember(wrapped.image_features(everything), labels)
        tokens = model.tokens(pixels_)
        assert torch.equal(model.train()(tokens).logits, model(tokens).base_logits)
        after = model.eval().logits(everything)
    assert (after.argmax(1) == labels).float().mean() > (before.argmax(1) == labels).float().mean()
    new = model.logits(everything, ["violin", "ship", "lamp"])
    model.evidence.means.zero_()
    assert torch.equal(model.logits(everything, ["violin", "ship", "lamp"]), new)
    assert torch.equal(model.logits(everything), before)


def test_one_new_class_among_the_candidates_switches_evidence_and_full_strength_off(run):
    folder, fitted, _ = run
    model = CAPT.load(folder / "seed-1", backbone("vit"))
    base, novel = list(fitted.protocol.classes), list(fitted.protocol.targets[1].classes)
    assert model.class_set().known and model.class_set().evidence is not None
    assert model.class_set(base[::-1]).known and model.class_set(base[1:]).evidence is not None
    for mixed in (base + novel, [*base, novel[0]], novel):
        assert not model.class_set(mixed).known and model.class_set(mixed).evidence is None
    order = list(range(len(base)))[::-1]
    assert torch.allclose(model.logits(pixels("vit"), base[::-1]), model.logits(pixels("vit"))[:, order], atol=1e-3)


def test_custom_class_texts_survive_saving(tmp_path):
    wrapped = backbone("vit")
    text = normalize(torch.randn(9, wrapped.dim, generator=torch.Generator().manual_seed(5)), dim=-1)
    model = CAPT(wrapped, CLASSES, config=CONFIG, text_features=text)
    model.save(tmp_path)
    assert torch.equal(CAPT.load(tmp_path, wrapped).logits(pixels("vit")), model.logits(pixels("vit")))


def test_images_trained_on_are_not_evaluated(run):
    folder, *_ = run
    data = data_set()
    swapped = type(data)(data.name, data.test, None, data.train, data.classes)
    with pytest.raises(DataError, match="was trained on"):
        evaluate(folder, swapped, backbone("vit"))


def test_a_half_without_test_images_is_refused_before_training():
    data = data_set()
    only_base = data.test.subset(data.test.labels < 5)
    with pytest.raises(DataError, match="novel classes have no test image"):
        base_to_novel(type(data)(data.name, data.train, None, only_base, data.classes))


def test_an_earlier_run_in_the_same_folder_leaves_no_trace(tmp_path):
    (tmp_path / "seed-7").mkdir()
    (tmp_path / "seed-7" / "few_shot.json").write_text("{}")
    trained_models("vit", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("seed-*")) == ["seed-0", "seed-1"]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"views": -1}, {"dropout": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(CaptError, match="found"):
        CAPTConfig(**wrong)
