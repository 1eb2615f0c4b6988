"""Runs at their edges: base models that are rivals, memory that does not suffice, folders used twice, other orders."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from capt.bank import ConfusionBank
from capt.data import load, save_few_shot
from capt.data.pair_texts import PairText, PairTexts
from capt.errors import CaptError, DataError
from capt.files import load_tensors
from capt.methods.ablation import FULL, VARIANTS, configurations
from capt.methods.base.promptkd import PromptKDConfig
from capt.methods.base.registry import load_base
from capt.methods.base.tip_adapter import TipAdapter
from capt.methods.capt import CAPT
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import (
    Run,
    RunOptions,
    base_to_novel,
    cross_dataset,
    domain_generalisation,
    evaluate,
    few_shot_all,
)
from capt.methods.runs.memory import announced_memory
from capt.methods.runs.views import rows_of
from capt.modules import PairPrompts
from capt.report.summary import verdict
from capt.training import TrainingOptions
from tests.tiny import CLASSES, backbone, data_set

ONE = TrainingOptions(epochs=1, batch_size=9, lr=3e-3)
CONFIG = CAPTConfig(heads=4, hidden=16, views=0, training=ONE)
OPTIONS = RunOptions(shots=2, seeds=(0,), rivals=(), linear=ONE)
STUDENT = PromptKDConfig(depth=2, views=1, training=replace(PromptKDConfig().training, epochs=1, warmup_epochs=0.0))


def read(path):
    return json.loads(path.read_text())


def test_a_cache_is_no_rival_of_itself(tmp_path):
    run = Run(
        base_to_novel(data_set()), backbone(), CONFIG, replace(OPTIONS, base="tip-adapter", rivals=("tip_adapter",))
    )
    models = run.fit(tmp_path)
    summary = run.evaluate(tmp_path, models)
    assert list(summary["methods"]) == ["zero_shot", "tip_adapter", "capt"]
    target = run.protocol.targets[0]
    with run.protocol.lock.opened(), torch.no_grad():
        pixels = torch.stack([backbone().preprocess(target.images.image(i)) for i in range(len(target.images))])
        own = models[0].base(pixels).argmax(-1)
    assert torch.equal(load_tensors(tmp_path / "seed-0" / "predictions.safetensors")["base_tip_adapter"], own)
    assert evaluate(tmp_path, data_set(), backbone())["methods"] == summary["methods"]


def test_a_cache_of_wider_features_is_read_again(tmp_path):
    features = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    cache = TipAdapter(backbone(), CLASSES[:3])
    cache.prepare(rows_of([features]).plain, torch.arange(6) % 3)
    cache.finish().save(tmp_path)
    again = load_base(tmp_path, backbone())
    assert torch.equal(again.extra_logits(features, CLASSES[:3]), cache.extra_logits(features, CLASSES[:3]))


def test_a_distilled_student_trains_alike_whether_or_not_its_inputs_are_kept(tmp_path):
    states = []
    for memory in (2 << 30, 0):
        options = replace(OPTIONS, seeds=(0, 1), base="promptkd", token_memory=memory)
        run = Run(base_to_novel(data_set(per_class=3)), backbone(), {}, options, base_config=STUDENT)
        states.append([models.base.state() for models in run.fit(tmp_path / str(memory)).values()])
    for kept, made_again in zip(*states, strict=True):
        for name, value in kept.items():
            torch.testing.assert_close(made_again[name].float(), value.float(), rtol=1e-4, atol=1e-5)


def test_a_bank_of_another_base_model_holds_the_mistakes_of_these_very_images(tmp_path, monkeypatch):
    seen = []
    from capt.methods.runs import seeds

    original = seeds.SeedTrainer.base

    def watched(self, kind, seed, config=None):
        seen.append(original(self, kind, seed, STUDENT if kind == "promptkd" else config))
        return seen[-1]

    monkeypatch.setattr(seeds.SeedTrainer, "base", watched)
    run = Run(base_to_novel(data_set()), backbone(), replace(CONFIG, bank_source="promptkd"), OPTIONS)
    bank = run.fit(tmp_path)[0].capt["capt"].bank
    shots = run.shots(0)
    with torch.no_grad():
        pixels = torch.stack([backbone().preprocess(shots.image(i)) for i in range(len(shots))])
        features, logits = backbone().image_features(pixels), seen[-1](pixels, run.protocol.classes)
    labels, ids = torch.tensor(shots.labels), torch.tensor(shots.ids)
    direct = ConfusionBank.from_logits(F.normalize(features, dim=-1), logits, labels, ids, run.protocol.classes)
    assert len(bank) and bank.sample_ids.tolist() == direct.sample_ids.tolist()
    assert bank.predictions.tolist() == direct.predictions.tolist()


def test_a_folder_used_again_keeps_nothing_of_the_earlier_run(tmp_path):
    protocol = base_to_novel(data_set())
    Run(protocol, backbone(), CONFIG, replace(OPTIONS, seeds=(0, 1))).fit(tmp_path)
    (tmp_path / "seed-pictures").mkdir()
    (tmp_path / "seed-7").mkdir()  # not ours either: there is no list of training images in it
    Run(protocol, backbone(), {}, replace(OPTIONS, base="linear-probe")).fit(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "seed-0", "seed-7", "seed-pictures"}
    assert {path.name for path in (tmp_path / "seed-0").iterdir()} == {"few_shot.json", "base"}
    with pytest.raises(CaptError, match="another --out"):
        Run(protocol, backbone(), CONFIG, replace(OPTIONS, base=str(tmp_path))).fit(tmp_path / "." / "")
    assert (tmp_path / "seed-0" / "base").is_dir()


def test_an_interrupted_run_is_not_mistaken_for_a_whole_one(tmp_path):
    def stop(what, done, total):
        if what.startswith("seed 1"):
            raise KeyboardInterrupt

    protocol, options = base_to_novel(data_set()), replace(OPTIONS, seeds=(0, 1))
    run = Run(protocol, backbone(), CONFIG, options)
    run.evaluate(tmp_path, run.fit(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        Run(protocol, backbone(), CONFIG, options, progress=stop).fit(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(DataError, match=r"state\.json"):
        evaluate(tmp_path, data_set(), backbone())
    again = Run(protocol, backbone(), CONFIG, options)
    assert len(again.evaluate(tmp_path, again.fit(tmp_path))["seeds"]) == 2


def test_the_order_of_a_variants_classes_does_not_matter(tmp_path):
    source, plain = data_set(), replace(data_set(per_class=2, seed=5), name="sketch")
    turned = plain.select_classes(list(reversed(range(len(CLASSES)))))
    run = Run(few_shot_all(source), backbone(), CONFIG, OPTIONS)
    models = run.fit(tmp_path)
    right = {}
    for make in (domain_generalisation, cross_dataset):
        for name, variant in (("plain", plain), ("turned", turned)):
            other = Run(make(source, [variant]), backbone(), CONFIG, OPTIONS)
            other.evaluate(tmp_path, models)
            found = load_tensors(tmp_path / "seed-0" / "predictions.safetensors")
            for row in ("zero_shot", "capt"):
                correct = (found["sketch_labels"] == found[f"sketch_{row}"]).numpy()
                ids = found["sketch_ids"].numpy()
                right[make.__name__, name, row] = correct[np.argsort(ids)].tolist()
    for (make, name, row), value in right.items():
        assert value == right["domain_generalisation", "plain", row], (make, name, row)


def test_a_list_of_training_images_may_not_be_longer_than_said(tmp_path):
    run = Run(base_to_novel(data_set()), backbone(), {}, replace(OPTIONS, shots=3))
    save_few_shot(tmp_path / "3-0.json", run.shots(0))
    named = replace(OPTIONS, shots=3, few_shot_lists=str(tmp_path / "{shots}-{seed}.json"))
    assert Run(run.protocol, backbone(), {}, named).shots(0).names == run.shots(0).names
    fixed = replace(named, shots=2, few_shot_lists=str(tmp_path / "3-0.json"))
    with pytest.raises(DataError, match="up to 3 images"):
        Run(run.protocol, backbone(), {}, fixed).shots(0)
    with pytest.raises(CaptError, match="few_shot_lists"):
        Run(run.protocol, backbone(), {}, replace(named, few_shot_lists="{fold}.json")).shots(0)


def test_a_transductive_base_model_makes_the_run_transductive(tmp_path):
    protocol = base_to_novel(data_set(per_class=3))
    options = replace(OPTIONS, base="promptkd", transductive=True)
    Run(protocol, backbone(), {}, options, base_config=STUDENT).fit(tmp_path / "kd")
    Run(protocol, backbone(), CONFIG, replace(OPTIONS, base=str(tmp_path / "kd"))).fit(tmp_path / "capt")
    assert read(tmp_path / "capt" / "run.json")["transductive"] is True


def test_memory_of_an_unlabelled_base_model_counts_all_images_but_no_more_than_are_kept():
    protocol, options = base_to_novel(data_set()), replace(OPTIONS, base="promptkd")
    labelled = announced_memory(protocol, backbone(), replace(options, base="coop"), {}, 10)["inputs of the base model"]
    whole = announced_memory(protocol, backbone(), options, {}, 10)["inputs of the base model"]
    assert whole == labelled * len(protocol.train) / 10
    little = announced_memory(protocol, backbone(), replace(options, token_memory=1000), {}, 10)
    assert little["inputs of the base model"] == 1000


def test_published_and_partial_variants_use_no_texts_of_ours():
    config = CAPTConfig()
    found = configurations(config, VARIANTS)
    assert found["as_published"] == config.as_published()
    without_texts = {name for name, one in found.items() if one.semantic in ("none", "commonality")}
    assert without_texts and all(found[name].semantic_evidence == 0 for name in without_texts)


def test_mistakes_collected_anew_do_not_depend_on_evidence_at_prediction():
    pairs = {
        (CLASSES[a], CLASSES[b]): PairText(("both are things",), (f"it is a {CLASSES[a]}",), (f"it is a {CLASSES[b]}",))
        for a, b in itertools.combinations(range(len(CLASSES)), 2)
    }
    texts = PairTexts("tiny", "base", CLASSES, pairs)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels, banks = torch.arange(12) % len(texts.classes), []
    for strength in (0.0, 1000.0):
        config = replace(CONFIG, semantic_evidence=strength)
        model = CAPT(backbone(), texts.classes, config=config, pair_prompts=PairPrompts(texts, backbone()))
        tokens = model.tokens(images)
        banks.append(model.refresh_bank(lambda rows, t=tokens: t[rows], labels, torch.arange(12)))
    assert banks[0].predictions.tolist() == banks[1].predictions.tolist()


def test_an_ablation_is_judged_by_its_full_method(tmp_path):
    run = Run(base_to_novel(data_set()), backbone(), {FULL: CONFIG, "k1": replace(CONFIG, k=1)}, OPTIONS)
    summary = run.evaluate(tmp_path, run.fit(tmp_path))
    assert verdict(summary)[0].startswith("Accuracy on the classes it was trained on: CAPT ")


def folder_of(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def test_somebodys_own_folder(tmp_path):
    names = {"Käse|alt": 3, "犬": 2, "a, b; c": 1, "100 %": 5, "-x": 3}
    root = folder_of(tmp_path / "photos", names)
    with pytest.raises(DataError, match="test-fraction"):
        base_to_novel(load(root))
    data = load(root, test_fraction=0.3)
    out = tmp_path / "run"
    for make in (base_to_novel, few_shot_all):
        run = Run(make(data), backbone(), CONFIG, replace(OPTIONS, shots=4, rivals=("linear_adapter", "tip_adapter")))
        summary = run.evaluate(out, run.fit(out))
        assert evaluate(out, data, backbone())["methods"] == summary["methods"]
    with pytest.raises(DataError, match="few-shot"):
        base_to_novel(load(folder_of(tmp_path / "two", {"cat": 3, "dog": 3}), test_fraction=0.3))
    two = Run(few_shot_all(load(tmp_path / "two", test_fraction=0.3)), backbone(), CONFIG, OPTIONS)
    two.evaluate(out, two.fit(out))
    with pytest.raises(DataError, match="no test split"):
        few_shot_all(load(folder_of(tmp_path / "single", {"cat": 1, "dog": 1}), test_fraction=0.3))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    root = folder_of(tmp_path / "photos", {"cat": 2, "dog": 2})
    for path in root.glob("cat/*"):
        path.write_bytes(b"no picture")
    run = Run(few_shot_all(load(root, test_fraction=0.3)), backbone(), CONFIG, OPTIONS)
    with pytest.raises(DataError, match=r"cat/\d.png"):
        run.fit(tmp_path / "out")
