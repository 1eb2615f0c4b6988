"""CPRFL: counts, shapes, symmetries, texts, paths of the gradient, what learns; numbers are those of its behaviours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.backbones import Backbone, import_torchvision, wrap
from capt.errors import CaptError, DamagedFileError
from capt.methods.cprfl import CPRFL
from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.registry import load_model
from capt.modules.prompt_initialiser import PromptInitialiser
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction
from capt.training import train
from tests import tiny
from tests.backbone_models import CONTEXT, TOWERS, word_tokenizer

import_torchvision()

import open_clip  # noqa: E402
import timm  # noqa: E402

CLASSES = tiny.SHAPES
SMALL = {"dim": 32, "n_heads": 4, "head_dim": 16, "feed_forward": 24, "interaction_dropout": 0.0, "text_prior": False}
LEARNED = ("prompt_initialiser", "projection", "interaction")


def made(classes=CLASSES, backbone: Backbone | None = None, **changes) -> CPRFL:
    torch.manual_seed(0)
    return CPRFL(backbone or tiny.backbone(), classes, CPRFLConfig(**{**SMALL, **changes})).eval()


def exact(model: CPRFL) -> CPRFL:
    """In double precision; the backbone is shared by tests and stays as it is."""
    return copy.deepcopy(model).double()


def pictures(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size)


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def gradients(model: CPRFL, inputs: Tensor, weights: Tensor | None = None) -> dict[str, Tensor | None]:
    """Of the weighted sum of the logits, by parameter that learns."""
    logits = model.logits(inputs)
    weights = torch.ones_like(logits) if weights is None else weights
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.trainable().items()}


def norm(found: dict[str, Tensor | None], part: str) -> float:
    """Of the gradient that reached a part of the model; 0 where there is none."""
    mine = [gradient for name, gradient in found.items() if name.startswith(part)]
    assert mine
    return float(sum(0 if gradient is None else gradient.square().sum() for gradient in mine)) ** 0.5


# ---- model ---------------------------------------------------------------------------------------------------------


def test_01_parameter_counts_of_the_published_model():
    model = CPRFL(tiny.backbone(dim=1024), CLASSES, CPRFLConfig(dim=2048))
    assert count(model.prompt_initialiser) == 3_148_800 and count(model.interaction) == 41_957_376
    assert count(model.projection) == model.backbone.token_dim * 2048 + 2048
    assert model.interaction.layers[0].query.out_features == 8 * 512
    with torch.device("meta"):
        image_tower = timm.create_model("resnet101", num_classes=0)
        projection = nn.Linear(image_tower.num_features, 2048)
        text_towers = {
            dim: open_clip.CLIP(dim, tiny.VISION["vit"], {"width": 512, "heads": 8, "layers": 12})
            for dim in (1024, 512)
        }
    assert (count(image_tower), count(projection)) == (42_500_160, 4_196_352)
    learned = count(image_tower, projection, model.prompt_initialiser, model.interaction)
    text = {dim: count(clip) - count(clip.visual) - 1 for dim, clip in text_towers.items()}  # 1: the logit scale
    assert text == {1024: 63_690_240, 512: 63_428_096}
    assert (learned, learned + text[1024]) == (91_802_688, 155_492_928)


@pytest.mark.parametrize("paths", ["both", "encoder", "classifier"])
def test_02_logits_have_a_row_for_each_image_and_a_column_for_each_class(paths):
    for classes in (CLASSES, CLASSES[:1]):
        model = made(classes, paths=paths)
        for batch in (1, 3):
            inputs = model.inputs(pictures(batch))
            assert inputs.shape == (batch, 1 + 16, model.backbone.token_dim) and not inputs.requires_grad
            for mode in (True, False):
                logits = model.train(mode).logits(inputs)
                assert logits.shape == (batch, len(classes)) and logits.dtype == torch.float32
    assert model.features(inputs, model.category_prompts()).shape == (3, 1, 32)


def test_03_patches_in_any_order_and_classes_in_step():
    model, other = made(), made(CLASSES[::-1])
    inputs = model.inputs(pictures())
    logits = model.logits(inputs)
    shuffled = torch.cat([inputs[:, :1], inputs[:, 1:].flip(1)], dim=1)  # behind the class token
    torch.testing.assert_close(model.logits(shuffled), logits)
    torch.testing.assert_close(other.logits(inputs), logits.flip(1))


def test_04_images_are_independent_and_another_class_changes_the_logits():
    model, more = made(), made((*CLASSES, "black square"))
    inputs = model.inputs(pictures())
    logits = model.logits(inputs)
    torch.testing.assert_close(model.logits(inputs[1:2]), logits[1:2])
    torch.testing.assert_close(more.category_prompts()[:-1], model.category_prompts())
    assert (more.logits(inputs)[:, :-1] - logits).abs().min() > 1e-6


@pytest.mark.parametrize("residual", [False, True])
def test_05_the_whole_model_by_hand(residual):
    model = exact(made(residual=residual))
    inputs, layer = torch.randn(3, 1 + 9, 48, dtype=torch.float64), model.interaction.layers[0]
    first, second = model.prompt_initialiser.layers
    prompts = F.gelu(model.text @ first.weight.T + first.bias) @ second.weight.T + second.bias
    patches = inputs[:, 1:] @ model.projection.weight.T + model.projection.bias
    tokens = torch.cat([patches, prompts.repeat(3, 1, 1)], 1)

    def normed(x: Tensor, by: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * by.weight + by.bias

    u = normed(tokens, layer.norm_in)
    heads = []
    for rows in torch.arange(4 * 16).split(16):
        q, k, v = (u @ part.weight[rows].T for part in (layer.query, layer.key, layer.value))
        scores = (q @ k.transpose(1, 2) / 4).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    y = torch.cat(heads, -1) @ layer.out.weight.T + layer.out.bias
    if residual:
        y = y + tokens
    z = F.gelu(normed(y, layer.norm_out) @ layer.w_in.weight.T + layer.w_in.bias) @ layer.w_out.weight.T
    z = z + layer.w_out.bias + (y if residual else 0)
    want = (z[:, 9:] * prompts).sum(-1)
    torch.testing.assert_close(model.logits(inputs).double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.features(inputs, prompts), z[:, 9:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [512, 1024])
def test_07_the_prompt_network_follows_the_width_of_the_texts(width):
    model = made(backbone=tiny.backbone(dim=width))
    assert model.text.shape == (6, width) and model.text.dtype == torch.float32
    assert model.logits(model.inputs(pictures())).shape == (3, 6)


def test_07_texts_of_another_width_are_refused():
    with pytest.raises(CaptError, match=r"text embeddings must have shape \[C, 1024\], found \[7, 512\]"):
        PromptInitialiser(1024, 16)(torch.randn(7, 512))


def test_08_class_names_are_put_into_the_one_template():
    model = made(("traffic_light", "diningtable", "person"))
    texts = ["a photo of a traffic light.", "a photo of a diningtable.", "a photo of a person."]
    tokens = model.get_buffer("tokens")
    assert torch.equal(tokens, model.backbone.tokenize(texts))
    assert tokens[2, :9].tolist() == [49406, 320, 1125, 539, 320, 2533, 269, 49407, 0]
    assert made(("a {} b",)).get_buffer("tokens").tolist() == model.backbone.tokenize(["a photo of a a {} b."]).tolist()


def test_09_padding_that_no_text_needs_changes_nothing():
    names = [*CLASSES, "a rather long name of a class of things"]
    model = made(names)
    tokens = model.get_buffer("tokens")
    assert int(model.backbone.text_tower.eot_index(tokens).max()) + 1 < tokens.shape[1]
    torch.testing.assert_close(model.text, model.backbone.text_tower.encode(tokens), rtol=1e-5, atol=1e-6)
    assert model.text.norm(dim=-1).std() > 1e-4  # not normalised


@pytest.mark.parametrize("kind, size, n_patches", [("vit", 32, 16), ("resnet", 64, 4), ("cnn", 64, 4)])
def test_10_towers_of_any_kind_and_size(kind, size, n_patches):
    model = made(backbone=tiny.backbone(kind))
    inputs = model.inputs(pictures(2, size))
    patches = model.backbone.tower.patches(inputs)
    assert patches.shape == (2, n_patches, model.backbone.token_dim) and model.logits(inputs).isfinite().all()


def test_pixels_keep_their_values_where_they_are_not_normalised():
    plain, model = made(normalize=False), made()
    raw = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain.inputs((raw - 0.5) / 0.5), model.inputs(raw), rtol=1e-4, atol=1e-5)
    assert plain.input_kind != model.input_kind


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_11_the_gradient_of_the_prompt_network_is_the_sum_of_both_paths(training):
    found = {}
    for paths in ("both", "encoder", "classifier"):
        model = exact(made(paths=paths)).train(training)
        torch.manual_seed(1)
        found[paths] = gradients(model, torch.randn(3, 9, 48).double(), torch.randn(3, 6))
    for name, whole in found["both"].items():
        if name.startswith("prompt_initialiser"):
            parts = found["encoder"][name], found["classifier"][name]
            assert float((parts[0] + parts[1] - whole).norm() / whole.norm()) < 1e-6
            assert min(float(part.norm() / whole.norm()) for part in parts) > 0.01


def test_12_one_path_alone_reaches_what_it_should():
    both = gradients(made(train_image=True), pictures())
    encoder = gradients(made(train_image=True, paths="encoder"), pictures())
    classifier = gradients(made(train_image=True, paths="classifier"), pictures())
    for part in (*LEARNED, "tuned"):
        assert norm(both, part) > 0 and norm(encoder, part) > 0
        assert (norm(classifier, part) > 0) is (part == "prompt_initialiser")
    for name in both:  # what is read out does not depend on where the prompts' gradient stops
        if not name.startswith("prompt_initialiser"):
            torch.testing.assert_close(encoder[name], both[name], rtol=1e-3, atol=1e-6)


def test_13_the_classifier_path_in_closed_form():
    model = made(paths="classifier")
    inputs, delta = model.inputs(pictures()), torch.randn(3, 6)
    prompts = model.category_prompts().detach().requires_grad_()
    model.category_prompts = lambda: prompts  # type: ignore[method-assign]
    (model.logits(inputs) * delta).sum().backward()
    with torch.no_grad():
        want = torch.einsum("bc,bcd->cd", delta, model.features(inputs, prompts))
    torch.testing.assert_close(prompts.grad, want)


def ten_steps(model: CPRFL, inputs: Tensor, **options) -> None:
    training = CPRFLConfig(training=tiny.one_cycle(10, **options)).training
    targets = (torch.rand(len(inputs), len(model.classes)) < 0.4).float()
    train(
        model.trained_by_rate(),
        lambda batch, _: {"loss": F.binary_cross_entropy_with_logits(model.logits(inputs[batch]), targets[batch])},
        len(inputs), training, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_14_frozen_texts_stay_as_they_are():
    model = made()
    inputs, before = model.inputs(pictures()), {name: value.clone() for name, value in model.state_dict().items()}
    assert {name.split(".")[0] for name in model.trainable()} == set(LEARNED) and model.tuned is None
    ten_steps(model.train(), inputs)
    after = model.state_dict()
    assert torch.equal(after["text"], before["text"])
    for name, value in before.items():
        fixed = name.startswith(("backbone.", "text", "thresholds", "trust"))
        assert torch.equal(after[name], value) is fixed, name


def test_14_a_text_tower_that_learns_changes_the_texts_and_leaves_the_backbone_alone():
    model = made(train_text=True)
    inputs, prints = model.inputs(pictures()), model.backbone.fingerprint()
    texts = model.backbone.encode_trimmed(model.get_buffer("tokens"))
    torch.testing.assert_close(model.tuned.encode_trimmed(model.get_buffer("tokens")), texts)
    ten_steps(model.train(), inputs)
    changed = model.tuned.encode_trimmed(model.get_buffer("tokens")) - texts
    assert changed.abs().amax(1).min() > 1e-3 and model.backbone.fingerprint() == prints
    images = pictures()
    assert torch.equal(model.tuned.image_features(images), model.backbone.image_features(images))


def test_15_alternate_refinement_freezes_the_interaction_then_the_prompt_network_then_nothing():
    model = made(refinement="alternate")
    inputs = model.inputs(pictures())
    moved: list[set[str]] = []
    last: dict[str, Tensor] = {}

    def before_epoch(epoch: int) -> None:
        noted()
        model.start_epoch(epoch)

    def noted() -> None:
        now = {name: value.detach().clone() for name, value in model.trainable_at_first.items()}
        if last:
            moved.append({name.split(".")[0] for name, value in now.items() if not torch.equal(value, last[name])})
        last.update(now)

    model.trainable_at_first = model.trainable()
    train(
        model.trained_by_rate(), lambda batch, _: {"loss": model.logits(inputs[batch]).square().mean()}, 3,
        tiny.one_cycle(13, batch_size=2), generator=torch.Generator().manual_seed(0), before_epoch=before_epoch,
    )  # fmt: skip
    noted()
    first, second = {"prompt_initialiser", "projection"}, {"interaction", "projection"}
    assert moved == [first] * 5 + [second] * 4 + [set(LEARNED)] + [first] * 3


# ---- prior -----------------------------------------------------------------------------------------------------------


def test_with_the_prior_training_starts_at_zero_shot_and_trusts_frequent_classes():
    model = made(text_prior=True, shrinkage=20.0)
    inputs = model.inputs(pictures())
    counts = torch.tensor([0, 5, 20, 60, 180, 380])
    model.prepare(iter(inputs.split(2)), counts)
    torch.testing.assert_close(model.trust, torch.tensor([0, 0.2, 0.5, 0.75, 0.9, 0.95]))
    features = F.normalize(model.backbone.tower.project(inputs), dim=-1)
    texts = model.backbone.class_text_features([name.replace("_", " ") for name in CLASSES])
    cosines = model.backbone.logit_scale * features @ texts.T
    torch.testing.assert_close(model.logits(inputs), cosines - cosines.mean(0) - 4, rtol=1e-4, atol=1e-4)
    ten_steps(model.train(), inputs)
    found = model.eval().logits(inputs) - model.prior(features)
    assert found[:, 0].abs().max() == 0 and found[:, 1:].abs().amax(0).min() > 0
    refined = (model.features(inputs, model.category_prompts()) * model.category_prompts()).sum(-1)
    torch.testing.assert_close(found, model.trust * refined, rtol=1e-3, atol=1e-4)


def test_the_prior_learns_at_its_own_rate_and_is_stored(tmp_path):
    model = made(text_prior=True, prior_lr_mult=3.0)
    groups = model.trained_by_rate()
    assert groups.keys() == {1.0, 3.0} and {id(p) for p in groups[3.0]} == {id(p) for p in model.prior.parameters()}
    inputs = model.inputs(pictures())
    model.prepare([inputs], torch.arange(6))
    ten_steps(model.train(), inputs)
    model.eval().save(tmp_path)
    assert torch.equal(load_model(tmp_path, tiny.backbone()).logits(inputs), model.logits(inputs))


@pytest.mark.parametrize("shrinkage", [-1.0, float("nan")])
def test_a_shrinkage_that_is_none_is_refused(shrinkage):
    with pytest.raises(CaptError, match="shrinkage: expected a finite number of 0 or more"):
        CPRFLConfig(shrinkage=shrinkage)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_19_the_same_dropout_masks_give_the_same_training_output(monkeypatch, depth, residual):
    """A mask that is the same for all rows, so that reading out prompts alone cannot shift it."""

    def masked(x: Tensor, p: float, training: bool) -> Tensor:
        keep = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(x.shape[-1])) >= p
        return x * keep / (1 - p) if training else x

    monkeypatch.setattr(F, "dropout", masked)
    model = VisualSemanticInteraction(32, depth=depth, n_heads=4, hidden=24, dropout=0.5, residual=residual).double()
    patches, prompts = torch.randn(2, 9, 32).double(), torch.randn(5, 32).double()
    dropped = model.full(patches, prompts)
    torch.testing.assert_close(model(patches, prompts), dropped, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.scores(patches, prompts), (dropped * prompts).sum(-1), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model.eval()(patches, prompts), dropped)


def test_dropout_acts_in_training_alone():
    model = made(interaction_dropout=0.3, prompt_dropout=0.3)
    inputs = model.inputs(pictures())
    assert torch.equal(model.logits(inputs), model.logits(inputs))
    assert not torch.equal(model.train().logits(inputs), model.logits(inputs))


# ---- towers that learn -----------------------------------------------------------------------------------------------


def wrapped(name: str) -> Backbone:
    model = TOWERS[name]()
    small = getattr(getattr(model, "config", None), "model_type", "") == "siglip"
    return wrap(model, word_tokenizer() if small else open_clip.SimpleTokenizer(context_length=CONTEXT))


def learning(model: CPRFL) -> set[str]:
    return {name for name in model.trainable() if name.startswith("tuned.")}


@pytest.mark.parametrize("name", TOWERS)
def test_every_kind_of_tower_learns_in_a_copy_of_its_own(name):
    backbone = wrapped(name)
    model = made(backbone=backbone, train_image=True, train_text=True)
    images, tokens = torch.randn(2, 3, *backbone.image_hw), model.get_buffer("tokens")
    found = gradients(model, images, torch.randn(2, 6))
    assert all(gradient is not None for gradient in found.values())  # what cannot learn is not among them
    assert norm(found, "tuned") > 0 and not any(name.startswith("backbone.") for name in found)
    with torch.no_grad():
        before = backbone.tower.run(images), backbone.encode_trimmed(tokens)
        for parameter in model.tuned.parameters():
            parameter.add_(0.1)
        after = backbone.tower.run(images), backbone.encode_trimmed(tokens)
        own = model.tuned.tower.run(images), model.tuned.encode_trimmed(tokens)
    backbone.frozen_check()
    for old, new, changed in zip(before, after, own, strict=True):
        assert torch.equal(old, new) and not torch.allclose(old, changed)


@pytest.mark.parametrize("name", ["open_clip ViT, class token", "open_clip CoCa", "transformers SigLIP"])
def test_one_tower_learns_without_the_other(name):
    backbone = wrapped(name)
    image, text = (learning(made(backbone=backbone, **{tower: True})) for tower in ("train_image", "train_text"))
    assert image and text and not image & text
    assert image | text == learning(made(backbone=backbone, train_image=True, train_text=True))
    assert not any("decoder" in name or "logit" in name for name in image | text)


@pytest.mark.parametrize("name", ["open_clip ResNet", "timm EfficientNet-Lite"])
def test_statistics_of_towers_that_learn_are_kept(name):
    model = made(backbone=wrapped(name), train_image=True).train()
    assert model.training and not any(module.training for module in model.tuned.model.modules())
    before = {key: value.clone() for key, value in model.tuned.named_buffers()}
    model.logits(torch.randn(2, 3, *model.backbone.image_hw)).sum().backward()
    assert before and all(torch.equal(before[key], value) for key, value in model.tuned.named_buffers())


@pytest.mark.parametrize(
    "changes", [{"train_text": True}, {"train_image": True}, {"train_text": True, "train_image": True}]
)
def test_tuned_towers_are_stored_and_restored_without_the_backbone(tmp_path, changes):
    model = made(**changes, residual=True, dim=16)
    ten_steps(model.train(), model.inputs(pictures()))
    model.thresholds.uniform_(-1, 1)
    model.requires_grad_(False).eval().save(tmp_path)
    again = load_model(tmp_path, tiny.backbone())
    inputs = model.inputs(pictures())
    assert torch.equal(again.logits(inputs), model.logits(inputs))
    assert again.config == model.config and torch.equal(again.thresholds, model.thresholds)
    assert not again.training and again.tuned is not None
    tower = [name for name in model.state() if name.startswith("tuned.model.")]
    assert any(name.startswith("tuned.model.visual") for name in tower) == ("train_image" in changes)
    assert any("text" in name or "token_embedding" in name for name in tower) == ("train_text" in changes)
    assert not any(name.startswith("backbone.") or name.endswith("logit_scale") for name in model.state())


def test_tensors_of_another_model_are_not_restored(tmp_path):
    made(train_text=True).save(tmp_path)
    whole = tmp_path / "model.safetensors"
    record = (tmp_path / "state.json").read_text()
    for old, new in (('"train_text": true', '"train_text": false'), ('"dim": 32', '"dim": 16')):
        assert old in record
        (tmp_path / "state.json").write_text(record.replace(old, new))
        with pytest.raises(DamagedFileError, match=r"model\.safetensors.*not those of a 'cprfl' model"):
            load_model(tmp_path, tiny.backbone())
    assert whole.is_file()


def test_a_copied_model_learns_alone():
    model = made(train_text=True, train_image=True)
    other = copy.deepcopy(model)
    images = pictures()
    assert torch.equal(other.logits(images), model.logits(images))
    before = model.logits(images).detach().clone()
    ten_steps(other.train(), images)
    assert torch.equal(model.logits(images), before) and not torch.allclose(other.eval().logits(images), before)


@pytest.mark.parametrize("changes", [{}, {"train_text": True}, {"train_image": True}, {"paths": "encoder"}])
def test_training_under_autocast_stays_finite_and_near(changes):
    model = made(**changes).train()
    inputs = model.inputs(pictures())
    exact = model.logits(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.logits(inputs)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    ten_steps(model, inputs, amp=True)
    assert all(value.isfinite().all() for value in model.state().values())


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_26_the_factor_of_the_towers_applies_with_and_without_a_wrapper(wrapper, rate):
    model = made(train_text=True, train_image=True, backbone_lr_mult=rate)
    if wrapper:
        assert all(name.startswith("0.") for name, _ in nn.Sequential(model).named_parameters())
    found = model.trained_by_rate()
    assert found.keys() == {1.0, rate}
    towers = {id(p) for p in model.tuned.parameters() if p.requires_grad}
    assert towers and towers <= {id(p) for p in found[rate]}
    every = [id(p) for group in found.values() for p in group]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert rate == 1.0 or towers == {id(p) for p in found[rate]}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"paths": "none"}, "paths: expected one of both, encoder, classifier, found 'none'"),
        ({"refinement": "slow"}, "refinement: expected one of joint, alternate, found 'slow'"),
        ({"refinement": "alternate", "paths": "classifier"}, "refinement: 'alternate' takes turns"),
        ({"dim": 0}, "dim: expected at least 1, found 0"),
        ({"head_dim": 0}, "head_dim: expected at least 1, found 0"),
        ({"hidden_ratio": 0.0}, "hidden_ratio: expected a finite number above 0"),
        ({"backbone_lr_mult": float("inf")}, "backbone_lr_mult: expected a finite number above 0"),
        ({"interaction_dropout": 1.0}, "interaction_dropout: expected at least 0 and less than 1, found 1.0"),
        ({"prompt_dropout": -0.1}, "prompt_dropout: expected at least 0"),
        ({"ema": 1.0}, "ema: expected at least 0 and less than 1"),
        ({"views": -1}, "views: expected at least 0"),
        ({"loss": "hinge"}, "loss: expected one of asl, bce"),
        ({"margin": -0.1}, "margin"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(CaptError, match=message):
        CPRFLConfig(**values)


def test_a_linear_prompt_network_and_two_layers_of_interaction(tmp_path: Path):
    model = made(linear_prompts=True, depth=2)
    assert len(model.prompt_initialiser.layers) == 1 and len(model.interaction.layers) == 2
    model.save(tmp_path)
    inputs = model.inputs(pictures())
    assert torch.equal(load_model(tmp_path, tiny.backbone()).logits(inputs), model.logits(inputs))
