"""Leaks L1 to L7 of docs/fidelity.md: each is impossible or refused, on real runs of tiny towers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from capt import ConfusionBank
from capt.data import DataSet, ImageSet, few_shot
from capt.data.pair_texts import PairText, PairTexts, save_pair_texts
from capt.errors import CaptError, DataError
from capt.files import load_tensors
from capt.methods.base.dpc import DPCConfig
from capt.methods.base.promptkd import PromptKDConfig
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel, cross_dataset, few_shot_all, seeds
from capt.training import TrainingOptions
from tests.tiny import CLASSES, backbone, data_set

SHORT = TrainingOptions(epochs=1, batch_size=9, lr=3e-3)
CONFIG = CAPTConfig(heads=4, hidden=16, views=0, training=SHORT)
OPTIONS = RunOptions(shots=2, seeds=(3,), rivals=())
DISTIL = PromptKDConfig(views=0, depth=1, training=SHORT)
PROMPTS = DPCConfig(views=0, text_depth=1, visual_depth=2, training=SHORT)
BASE, NOVEL = CLASSES[:5], CLASSES[5:]


class Watched:
    """An image source that notes what is read, by name."""

    def __init__(self, source, reads: list[str]) -> None:
        self.source, self.reads = source, reads

    def read(self, name):
        self.reads.append(name)
        return self.source.read(name)


def watch(images: ImageSet, reads: list[str]) -> ImageSet:
    watched = images.subset(range(len(images)))
    watched.source = Watched(images.source, reads)
    return watched


def scene(**changes) -> tuple[DataSet, list[str], list[str]]:
    """Data whose training and test reads are noted."""
    data, train, test = data_set(**changes), [], []
    return replace(data, train=watch(data.train, train), test=watch(data.test, test)), train, test


def read(path):
    return json.loads(path.read_text())


def names_of(images: ImageSet, classes=CLASSES) -> set[str]:
    return {name for name, label in zip(images.names, images.labels, strict=True) if images.classes[label] in classes}


def listed(folder, seed: int = 3) -> set[str]:
    return {image["name"] for image in read(folder / f"seed-{seed}" / "few_shot.json")["images"]}


# ---- L1: nothing is chosen on the test split -------------------------------------------------------------------------


def test_L1_any_read_of_the_test_split_before_evaluate_raises(tmp_path):
    data, _, opened = scene()
    refusals = []

    def peek(what, done, total):
        if what.startswith("seed"):  # in the middle of training
            with pytest.raises(DataError, match="locked"):
                run.protocol.targets[0].images.image(0)
            refusals.append(what)

    run = Run(base_to_novel(data), backbone(), CONFIG, OPTIONS, progress=peek)
    models = run.fit(tmp_path)
    for target in run.protocol.targets:
        for images in (target.images, target.images.subset([0]), target.images.select_classes([1, 0])):
            with pytest.raises(DataError, match="locked"):
                images.image(0)
    assert refusals and opened == []
    run.evaluate(tmp_path, models)
    assert len(opened) == len(data.test)
    with pytest.raises(DataError, match="locked"):
        run.protocol.targets[1].images.image(0)


def test_L1_what_is_stored_is_the_last_epoch_not_a_chosen_one(tmp_path, monkeypatch):
    states: list[list[torch.Tensor]] = []
    train = seeds.train

    def spy(parameters, *args, progress, **options):
        trained = [p for group in parameters.values() for p in group] if isinstance(parameters, dict) else parameters

        def after(epoch, epochs, loss):
            states.append([p.detach().clone() for p in trained])
            progress(epoch, epochs, loss)

        return train(parameters, *args, progress=after, **options)

    monkeypatch.setattr(seeds, "train", spy)
    config = replace(CONFIG, training=replace(SHORT, epochs=3))
    models = Run(base_to_novel(data_set()), backbone(), config, OPTIONS).fit(tmp_path)
    parts = models[3].capt["capt"].learning_rates().values()
    kept = [p for group in parts for p in group]
    assert len(states) == 3 == len((tmp_path / "seed-3" / "metrics.jsonl").read_text().splitlines())
    same = [all(torch.equal(a, b) for a, b in zip(kept, state, strict=True)) for state in states]
    assert same == [False, False, True]
    stored = load_tensors(tmp_path / "seed-3" / "adapter.safetensors").values()
    assert all(any(torch.equal(p.detach(), t) for t in stored if t.shape == p.shape) for p in kept)


# ---- L2: unlabelled images of novel classes --------------------------------------------------------------------------


def test_L2_novel_images_are_read_with_transductive_only_and_that_is_recorded(tmp_path):
    assert RunOptions().transductive is False
    data, reads, _ = scene(per_class=4)
    options = replace(OPTIONS, base="promptkd")
    for transductive, classes in ((False, BASE), (True, CLASSES)):
        reads.clear()
        out = tmp_path / str(transductive)
        run = Run(base_to_novel(data), backbone(), {}, replace(options, transductive=transductive), base_config=DISTIL)
        models = run.fit(out)
        assert set(reads) == names_of(data.train, classes)
        record = read(out / "run.json")
        assert (record["transductive"], record["unlabelled_images"]) == (transductive, len(set(reads)))
        assert models[3].base.class_names == classes
        assert run.evaluate(out, models)["transductive"] is transductive
    # CAPT on top of a stored transductive model is transductive, too.
    reads.clear()
    on_top = replace(OPTIONS, base=str(tmp_path / "True"))
    Run(base_to_novel(data), backbone(), CONFIG, on_top).fit(tmp_path / "capt")
    assert read(tmp_path / "capt" / "run.json")["transductive"] is True
    assert set(reads) == listed(tmp_path / "capt") < names_of(data.train, BASE)


def test_L2_transductive_is_refused_where_it_would_mean_nothing():
    for base, config in (("zero-shot", CONFIG), ("coop", {}), ("dpc", {})):
        with pytest.raises(CaptError, match="labelled images alone"):
            Run(base_to_novel(data_set()), backbone(), config, replace(OPTIONS, base=base, transductive=True))
    with pytest.raises(CaptError, match="inductive"):
        Run(few_shot_all(data_set()), backbone(), {}, replace(OPTIONS, base="promptkd", transductive=True))


# ---- L3: training reads the few-shot list and nothing else -----------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("zero-shot", {"bank_refresh": 1, "m": 2, "bank_at_inference": True, "bank_source": "linear-probe"}),
        ("dpc", {}),
        ("tip-adapter", {}),
    ],
)
def test_L3_training_reads_the_few_shot_list_and_nothing_else(base, changes, tmp_path):
    data, reads, _ = scene()
    config = replace(CONFIG, training=replace(SHORT, epochs=2), **changes)
    base_config = PROMPTS if base == "dpc" else None
    options = replace(OPTIONS, base=base, rivals=("linear_adapter", "tip_adapter", "plain_adapter"), linear=SHORT)
    run = Run(base_to_novel(data), backbone(), config, options, base_config=base_config)
    models = run.fit(tmp_path)
    assert set(reads) == listed(tmp_path) and len(listed(tmp_path)) == 2 * len(BASE)
    bank = ConfusionBank.load(tmp_path / "seed-3" / "bank")
    assert set(bank.names) <= listed(tmp_path)
    run.evaluate(tmp_path, models)
    assert set(reads) == listed(tmp_path)
    assert read(tmp_path / "run.json")["unlabelled_images"] == 0


def test_L3_a_bank_of_a_label_free_source_still_holds_few_shot_images_and_the_rest_is_recorded(tmp_path, monkeypatch):
    data, reads, _ = scene(per_class=4)
    made, base = [], seeds.SeedTrainer.base

    def spy(self, kind, seed, config=None):
        made.append(base(self, kind, seed, DISTIL if kind == "promptkd" else config))
        return made[-1]

    monkeypatch.setattr(seeds.SeedTrainer, "base", spy)
    run = Run(base_to_novel(data), backbone(), replace(CONFIG, bank_source="promptkd"), OPTIONS)
    bank = run.fit(tmp_path)[3].capt["capt"].bank
    assert set(reads) == names_of(data.train, BASE)
    assert read(tmp_path / "run.json")["unlabelled_images"] == len(set(reads)) and made[-1].kind == "promptkd"
    images = run.shots(3)
    with torch.no_grad():
        pixels = torch.stack([backbone().preprocess(images.image(i)) for i in range(len(images))])
        guesses = made[-1](pixels, BASE).argmax(1)
    wrong = {int(i): (int(y), int(g)) for i, y, g in zip(images.ids, images.labels, guesses, strict=True) if y != g}
    rows = zip(bank.sample_ids.tolist(), bank.labels.tolist(), bank.predictions.tolist(), strict=True)
    assert wrong and {i: (y, g) for i, y, g in rows} == wrong


# ---- L4: texts of base pairs never name novel classes ----------------------------------------------------------------


def written(path, sentence: str, classes=BASE) -> str:
    texts = PairText((sentence,), ("whiskers",), ("a wet nose",))
    save_pair_texts(path, PairTexts("tiny", "base", classes, {("cat", "dog"): texts}, "by hand"))
    return str(path)


@pytest.mark.parametrize("sentence", ["as heavy as a tram", "seen from Buses", "red like apples", "not a blue car"])
def test_L4_a_file_of_base_texts_that_names_a_novel_class_is_refused_by_the_run(sentence, tmp_path):
    protocol = base_to_novel(data_set())
    good = written(tmp_path / "good.json", "four legs")
    run = Run(protocol, backbone(), CONFIG, replace(OPTIONS, pair_text_files=(good,)))
    assert run.pair_texts.record().keys() == {"good.json"}
    bad = written(tmp_path / "bad.json", sentence)
    with pytest.raises(DataError, match="which these texts must not"):
        Run(protocol, backbone(), CONFIG, replace(OPTIONS, pair_text_files=(bad,)))
    with pytest.raises(DataError, match="other classes"):  # written for base and novel classes together
        together = written(tmp_path / "all.json", "four legs", CLASSES)
        Run(protocol, backbone(), CONFIG, replace(OPTIONS, pair_text_files=(together,)))


# ---- L5: the bank is built from training images ----------------------------------------------------------------------


@pytest.mark.parametrize("base", ["zero-shot", "promptkd"])
def test_L5_a_training_image_that_is_also_a_test_image_is_refused(base, tmp_path):
    data = data_set()
    both = data.train.subset([*range(len(data.train))])
    for split in ("val", "test"):
        few = both.subset(range(0, len(both), 3))
        # Of a base and a novel class each, so that both halves have test images.
        mixed = replace(data, **{split: few})
        with pytest.raises(DataError, match="also occur in the validation or test split"):
            Run(base_to_novel(mixed), backbone(), CONFIG, replace(OPTIONS, shots=6, base=base)).fit(tmp_path)
    one_shot = few_shot(base_to_novel(data).train, 1, seed=3)
    left = [i for i, name in enumerate(data.train.names) if name not in one_shot.names]
    hidden = replace(data, val=data.train.subset(left[:3]))  # outside the one-shot list, but read without labels
    run = Run(base_to_novel(hidden), backbone(), CONFIG, replace(OPTIONS, shots=1, base=base), base_config=None)
    assert set(run.shots(3).names) == set(one_shot.names)
    if base == "promptkd":
        with pytest.raises(DataError, match="unlabelled training images"):
            run.fit(tmp_path)


def test_L5_building_a_bank_with_forbidden_ids_raises():
    data = data_set()
    forbidden = data.test.ids.tolist()
    assert len(ConfusionBank.build(backbone(), data.train, forbidden_ids=forbidden))
    for images in (data.test, ImageSet(CLASSES, [0, 1], [0, forbidden[-1]], ["0", "1"], data.train.source)):
        with pytest.raises(DataError, match="training images only"):
            ConfusionBank.build(backbone(), images, forbidden_ids=forbidden)


# ---- L6: novel results are the method's ------------------------------------------------------------------------------


def test_L6_a_trained_model_changes_novel_logits_unless_told_not_to(tmp_path):
    run = Run(
        base_to_novel(data_set()), backbone(), {"on": CONFIG, "off": replace(CONFIG, unseen_strength=0.0)}, OPTIONS
    )
    models = run.fit(tmp_path)[3]
    images = data_set().train
    pixels = torch.stack([backbone().preprocess(images.image(i)) for i in range(0, 54, 9)])
    with torch.no_grad():
        expected = models.base(pixels, NOVEL)
    assert torch.equal(models.capt["off"].logits(pixels, NOVEL), expected)
    assert (models.capt["on"].logits(pixels, NOVEL) - expected).abs().max() > 1e-3
    # The published equality, "novel column = base model", is thus a setting and no default.
    assert CAPTConfig().unseen_strength > 0 and CAPTConfig().as_published().unseen_strength == 1.0


def test_L6_a_decoupled_base_model_is_scored_by_what_it_leaves_new_classes_to(tmp_path):
    run = Run(base_to_novel(data_set()), backbone(), {}, replace(OPTIONS, base="dpc"), base_config=PROMPTS)
    models = run.fit(tmp_path)
    base = models[3].base
    with torch.no_grad():
        base.visual.add_(torch.randn_like(base.visual))  # far from zero-shot, whatever the training did
    run.evaluate(tmp_path, models)
    found = load_tensors(tmp_path / "seed-3" / "predictions.safetensors")
    assert torch.equal(found["novel_dpc"], found["novel_zero_shot"])
    assert not torch.equal(found["base_dpc"], found["base_zero_shot"])
    images = data_set().test.select_classes(range(5, 9))
    with torch.no_grad():
        pixels = torch.stack([backbone().preprocess(images.image(i)) for i in range(len(images))])
        assert torch.equal(base.for_classes(NOVEL)(pixels, NOVEL).argmax(1), found["novel_dpc"])
        tuned = base.logits(base.features(base.inputs(pixels)), NOVEL).argmax(1)
    assert not torch.equal(tuned, found["novel_dpc"]), "the test needs prompts that matter"


# ---- L7: cross-dataset is inductive ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["zero-shot", "promptkd"])
def test_L7_no_image_of_a_target_is_read_in_training(base, tmp_path):
    source, train, test = scene(per_class=3)
    target, target_train, target_test = scene(per_class=2, seed=1)
    protocol = cross_dataset(source, [replace(target, name="elsewhere")])
    options = replace(OPTIONS, base=base)
    run = Run(protocol, backbone(), CONFIG, options, base_config=DISTIL if base == "promptkd" else None)
    models = run.fit(tmp_path)
    assert target_train == target_test == test == []
    assert set(train) == (listed(tmp_path) if base == "zero-shot" else set(source.train.names))
    run.evaluate(tmp_path, models)
    assert target_train == [] and len(target_test) == len(target.test)
    with pytest.raises(CaptError, match="inductive"):
        Run(protocol, backbone(), CONFIG, replace(options, transductive=True))
    assert read(tmp_path / "run.json")["transductive"] is False
