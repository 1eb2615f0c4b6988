"""Behaviours 19 to 36 through real runs and the corners that the modules' own tests leave (docs/fidelity.md)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from capt import CAPT, ConfusionBank, DiffMannerAdapter, SemanticConfusionMiner, ops
from capt.data import DataSet, ImageSet, base_novel
from capt.data.pair_texts import PairText, PairTexts
from capt.data.sources import MemorySource
from capt.evaluation import base_to_novel_table, harmonic_mean
from capt.evaluation.expected import expected_numbers
from capt.methods.base.ivlp import IVLP, IVLPConfig
from capt.methods.base.registry import base_type, load_base
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, base_to_novel, seeds
from capt.modules.pair_prompts import PairPrompts
from capt.training import TrainingOptions
from tests.accuracy import relative_l2
from tests.tiny import CLASSES, backbone, data_set

SHORT = TrainingOptions(epochs=2, batch_size=9, lr=3e-3)
CONFIG = CAPTConfig(heads=4, hidden=16, views=0, training=SHORT)
OPTIONS = RunOptions(shots=2, seeds=(1,), rivals=())
BASE, NOVEL = CLASSES[:5], CLASSES[5:]
TUNED = {
    "coop": {}, "ivlp": {"text_depth": 1, "visual_depth": 2}, "promptkd": {"depth": 1}, "tip-adapter": {},
}  # fmt: skip


def pixels(n: int = 9) -> torch.Tensor:
    images = data_set().train
    return torch.stack([backbone().preprocess(images.image(6 * i)) for i in range(n)])


def digest(module: torch.nn.Module) -> str:
    """Of every parameter and buffer."""
    found = hashlib.blake2b()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


# ---- adapter ---------------------------------------------------------------------------------------------------------


def test_19_learned_prompts_and_cls_pass_the_adapter_unchanged():
    base = IVLP(backbone(), CLASSES, IVLPConfig(visual_depth=2, text_depth=1)).finish()
    adapter = DiffMannerAdapter.for_tower(base.tower)
    with torch.no_grad():
        tokens = adapter.frozen_tokens(base.tower, pixels())
        assert torch.equal(adapter.encode(base.tower, tokens), adapter.encode_frozen(base.tower, tokens))
        adapter.weight.normal_()
        adapted = adapter(tokens, 1, grid=base.tower.grid, n_prefix=base.tower.n_prefix)
    n = backbone().tower.n_prefix + base.config.n_ctx_visual
    assert base.tower.n_prefix == n and torch.equal(adapted[:, :n], tokens[:, :n])
    assert (adapted[:, n:] != tokens[:, n:]).any(dim=(0, 2)).all()


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_25_beta_zero_gives_the_base_models_logits_bit_for_bit():
    wrapped = backbone()
    bank = ConfusionBank.build(wrapped, data_set().train)
    model = CAPT(wrapped, CLASSES, config=CONFIG.as_published(), bank=bank)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.mgde.beta.zero_()
        for names in (CLASSES, NOVEL, ["violin", "ship"]):
            assert torch.equal(model.logits(pixels(), names), model.base(pixels(), names))
        model.mgde.beta.fill_(0.1)
        assert not torch.equal(model.logits(pixels()), model.base(pixels()))


@pytest.mark.parametrize("n_tokens", [1, 5, 64, 101])
def test_25_dense_and_grouped_experts_agree(n_tokens):
    """Dense, written out here: every expert on every token, times its weight. Grouped: only the tokens it is given."""
    generator = torch.Generator().manual_seed(n_tokens)
    shapes = [(n_tokens, 24), (3, 24), (3, 40, 24), (3, 40), (3, 24, 40), (3, 24)]
    values = [(torch.randn(shape, generator=generator) * shape[-1] ** -0.25) for shape in shapes]
    upstream = torch.randn(n_tokens, 24, generator=generator)
    exact = [value.double().requires_grad_() for value in values]
    x, gate, w_in, b_in, w_out, b_out = exact
    kept = (x @ gate.T).softmax(1)
    kept = kept * torch.zeros_like(kept).scatter(1, kept.topk(2).indices, 1.0)
    kept = kept / kept.sum(1, keepdim=True)
    hidden = torch.einsum("nd,ehd->neh", x, w_in) + b_in
    dense = torch.einsum("neh,edh->ned", hidden * torch.sigmoid(1.702 * hidden), w_out) + b_out
    expected = (kept.unsqueeze(2) * dense).sum(1)
    wanted = torch.autograd.grad((expected * upstream).sum(), exact)
    for backend in ("cpu", "reference"):
        leaves = [value.clone().requires_grad_() for value in values]
        output, weights, *_ = ops.expert_gating(*leaves, top_k=2, backend=backend)
        for mine, theirs in ((output, expected), (weights, kept)):
            assert relative_l2(mine.detach(), theirs.detach()) < 1e-5
        found = torch.autograd.grad((output * upstream).sum(), leaves)
        assert max(relative_l2(a, b) for a, b in zip(found, wanted, strict=True)) < 2e-5


def test_28_prompt_attention_weights_sum_to_one_over_the_rows_there_are():
    n, s, k = 6, 2, 3
    rows = torch.eye(n * s).view(n, s, n * s)  # what is returned is then the weight of every row
    query = torch.randn(4, n * s, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.tensor([[0, 3, 5], [1, -1, 2], [-1, -1, 4], [-1, -1, -1]])
    for backend in ("cpu", "reference"):
        for weights in ops.prompt_attention(
            query, rows, rows, commonality_index=index, difference_index=index, backend=backend
        ):
            there = torch.zeros(4, n + 1).scatter(1, index.where(index >= 0, n), 1.0)[:, :n].repeat_interleave(s, 1)
            assert (weights[there == 0] == 0).all() and (weights[there > 0] > 0).all()
            assert torch.allclose(weights[:3].sum(1), torch.ones(3), atol=1e-6) and (weights[3] == 0).all()
            (slope,) = torch.autograd.grad(weights.square().sum(), query, retain_graph=True)
            assert slope.isfinite().all()
    # In the miner a pair without written texts falls back to its class texts.
    texts = PairPrompts(PairTexts("toy", "base", BASE, {}), backbone())
    text = backbone().class_text_features(BASE)
    mined = SemanticConfusionMiner(k)(text[:4], 10 * text[:4] @ text.T, text, None, texts)
    assert mined.commonality.isfinite().all() and (mined.commonality.norm(dim=1) > 0.1).all()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero-shot", "ivlp"])
def test_30_frozen_parameters_keep_their_hash_and_exactly_adapter_and_mgde_learn(kind, tmp_path, monkeypatch):
    wrapped = backbone()
    base_config = replace(IVLPConfig(**TUNED["ivlp"], views=0), training=SHORT) if kind == "ivlp" else None
    seen, fit_capt = {}, seeds.SeedTrainer._train_capt

    def spy(self, model, *rest):
        seen.update(base=digest(model.base), start={n: p.detach().clone() for n, p in model.trainable().items()})
        fit_capt(self, model, *rest)

    monkeypatch.setattr(seeds.SeedTrainer, "_train_capt", spy)
    before = digest(wrapped)
    run = Run(base_to_novel(data_set()), wrapped, CONFIG, replace(OPTIONS, base=kind), base_config=base_config)
    model = run.fit(tmp_path)[1].capt["capt"]
    assert digest(wrapped) == before and digest(model.base) == seen["base"]
    every = {name for name, _ in model.named_parameters()}
    expected = {name for name in every if name.startswith(("sample.adapter.", "mgde."))}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected == set(model.trainable())
    assert every - expected == {f"base.{name}" for name, _ in model.base.named_parameters()}
    optimised = [id(p) for group in model.learning_rates().values() for p in group]
    assert sorted(optimised) == sorted(id(p) for p in model.trainable().values())
    moved = {name for name, p in model.trainable().items() if not torch.equal(p, seen["start"][name])}
    assert {"sample.adapter.weight", "mgde.beta", "mgde.gate", "mgde.w_in", "mgde.w_out"} <= moved


# ---- kernels ---------------------------------------------------------------------------------------------------------

BATCHES = (1, 4, 32, 37, 100)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def both(function, arguments, dtype) -> float:
    """Largest relative error of a kernel's results and gradients against the reference in float64."""
    found = []
    for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
        leaves = [value.to(dtype).to(kind).requires_grad_() for value in arguments]
        results = [result for result in function(*leaves, backend=backend) if result.requires_grad]
        total = sum((r.double() * torch.linspace(0.5, 1.5, r.numel()).view_as(r)).sum() for r in results)
        found.append([*(r.detach() for r in results), *torch.autograd.grad(total, leaves)])
    return max(relative_l2(a, b) for a, b in zip(*found, strict=True))


@dtypes
@pytest.mark.parametrize("n_classes", [5, 19, 24, 50, 98, 199, 500, 1000])
def test_32_kernels_equal_the_reference_at_every_number_of_classes(n_classes, dtype):
    torch.manual_seed(n_classes)
    d, k = 24, 3
    for batch in BATCHES:
        logits = (5 * torch.randn(batch, n_classes)).to(dtype)
        classes = ((torch.arange(n_classes)[:, None] + torch.tensor([1, 2])) % n_classes).flatten()
        statistics = {
            "offsets": torch.arange(0, 2 * n_classes + 1, 2), "classes": classes,
            "counts": torch.randint(1, 9, classes.shape),
        }  # fmt: skip
        found = ops.confusion_pairs(logits, k=k, backend="cpu", **statistics)
        wanted = ops.confusion_pairs(logits.double(), k=k, backend="reference", **statistics)
        assert torch.equal(found[0], wanted[0]) and relative_l2(found[2], wanted[2]) < TOLERANCE[dtype]
        same = (found[1] == wanted[1]).float().mean()
        assert same > 0.99 or dtype != torch.float32  # rounding may swap two classes whose scores nearly tie

        index = torch.randint(-1, n_classes, (batch, k))
        prior = torch.randn(batch, k)

        def attention(query, common, differ, backend, index=index, prior=prior):
            return ops.prompt_attention(
                query, common, differ, commonality_index=index, difference_index=index, log_prior=prior.to(query.dtype),
                backend=backend,
            )  # fmt: skip

        tables = [torch.randn(n_classes, 2, d), torch.randn(n_classes, 3, d)]
        assert both(attention, [torch.randn(batch, d), *tables], dtype) < TOLERANCE[dtype]

        rows, queries = torch.randn(2 * n_classes, d).to(dtype), torch.randn(batch, d).to(dtype)
        start = torch.randint(0, 2 * n_classes, (batch, k, 2))
        ranges = torch.stack([start, start + torch.randint(-1, 40, start.shape)], -1).clamp_max(2 * n_classes)
        found = ops.bank_topk(queries, rows, k=2, ranges=ranges, backend="cpu")
        wanted = ops.bank_topk(queries.double(), rows.double(), k=2, ranges=ranges, backend="reference")
        assert torch.equal(found[1] < 0, wanted[1] < 0)
        there = wanted[1] >= 0
        assert relative_l2(found[0][there], wanted[0][there]) < TOLERANCE[dtype] or not there.any()


@dtypes
@pytest.mark.parametrize("batch", BATCHES)
def test_32_kernels_equal_the_reference_at_every_batch(batch, dtype):
    torch.manual_seed(batch)
    shapes = [(batch, 48), (3, 48), (3, 64, 48), (3, 64), (3, 48, 64), (3, 48)]
    values = [torch.randn(shape) * shape[-1] ** -0.25 for shape in shapes]

    def gating(*leaves, backend):
        return ops.expert_gating(*leaves, top_k=2, backend=backend)[:2]

    def adapter(tokens, weight, backend):
        return [ops.grid_adapter(tokens, weight, alpha=0.7, grid=(5, 6), n_prefix=2, backend=backend)]

    assert both(gating, values, dtype) < TOLERANCE[dtype]
    assert both(adapter, [torch.randn(batch, 33, 40), torch.randn(40, 3, 3)], dtype) < TOLERANCE[dtype]


# ---- evaluation ------------------------------------------------------------------------------------------------------

SPLITS = {
    "ImageNet": (1000, 500), "Caltech101": (100, 50), "OxfordPets": (37, 19), "StanfordCars": (196, 98),
    "Flowers102": (102, 51), "Food101": (101, 51), "FGVCAircraft": (100, 50), "SUN397": (397, 199), "DTD": (47, 24),
    "EuroSAT": (10, 5), "UCF101": (101, 51),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_33_base_and_novel_sizes_of_the_published_data_sets(name):
    n_classes, n_base = SPLITS[name]
    names = [f"class {c:04d}" for c in range(n_classes)]
    images = ImageSet(names, np.arange(n_classes), np.arange(n_classes), names, MemorySource({}))
    base, novel = base_novel(DataSet(name, images, None, None, tuple(names)))
    assert (len(base.classes), len(novel.classes)) == (n_base, n_classes - n_base)
    assert (*base.classes, *novel.classes) == tuple(names)
    assert novel.train.labels.tolist() == list(range(n_classes - n_base))
    assert [harmonic_mean(x, x) for x in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0] and harmonic_mean(0.8, 0.0) == 0.0


def test_34_the_shipped_table_gives_the_recomputed_average_and_not_the_printed_one():
    numbers = expected_numbers("base-to-novel")
    average = base_to_novel_table([(row["capt"]["base"], row["capt"]["novel"]) for row in numbers["cells"].values()])
    found = tuple(round(average[name], 2) for name in ("base", "novel", "hm_of_means"))
    assert len(numbers["cells"]) == 11 and found == (87.41, 80.73, 83.94)
    printed = numbers["printed_average"]["capt"]
    assert (printed["base"], printed["novel"], printed["hm"]) == (87.41, 80.90, 83.90) != found


def poisoned(model: CAPT) -> CAPT:
    """Everything that belongs to the trained classes is not a number any more."""
    for values in (model.text_features, model.evidence.means, model.bank.features, model.bank.confidences):
        values.fill_(float("nan"))
    for rows in (model.pair_prompts.commonality, model.pair_prompts.difference):
        rows.fill_(float("nan"))
    return model


def test_36_novel_evaluation_reads_nothing_that_belongs_to_base_classes(tmp_path):
    words = {("cat", "dog"): PairText(("fur", "a tail"), ("whiskers",), ("a wet nose",))}
    prompts = PairPrompts(PairTexts("tiny", "base", BASE, words), backbone())
    run = Run(base_to_novel(data_set()), backbone(), replace(CONFIG, bank_at_inference=True), OPTIONS)
    run.pair_texts.trained = lambda base: prompts
    model = run.fit(tmp_path)[1].capt["capt"].eval()
    classes = model.class_set(NOVEL)
    assert classes.statistics is None and classes.bank is None and classes.evidence is None
    assert classes.pair_prompts is None and model.pair_prompts is prompts
    expected = model.logits(pixels(), NOVEL)
    assert (expected - model.base(pixels(), NOVEL)).abs().max() > 0  # the method is active
    assert torch.equal(poisoned(model).logits(pixels(), NOVEL), expected)
    assert not model.logits(pixels(), BASE).isfinite().all()  # the poison is there


@pytest.mark.parametrize("kind", TUNED)
def test_36_switched_off_it_is_the_tuned_base_model_bit_for_bit(kind, tmp_path):
    type_ = base_type(kind).config_type
    quick = {name: value for name, value in vars(type_(**TUNED[kind])).items() if name not in ("training", "views")}
    options = replace(OPTIONS, base=kind)
    run = Run(
        base_to_novel(data_set()), backbone(), replace(CONFIG, evidence=0.0), options,
        base_config=type_(**quick, views=0, training=SHORT),
    )  # fmt: skip
    trained = run.fit(tmp_path)[1].capt["capt"].eval()
    stored = load_base(tmp_path / "seed-1" / "base", backbone())
    with torch.no_grad():
        for names in (BASE, NOVEL):
            assert not torch.equal(trained.logits(pixels(), names), stored(pixels(), names))
        for parameter in (trained.mgde.beta, trained.mgde.shared.weight, trained.adapter.weight):
            parameter.zero_()
        for names in (BASE, NOVEL):
            assert torch.equal(trained.logits(pixels(), names), stored(pixels(), names))
        plain = backbone().logit_scale * normalize(backbone().image_features(pixels()), dim=-1)
        zero_shot = plain @ backbone().class_text_features(BASE).T
        assert not torch.equal(stored(pixels(), BASE), zero_shot)  # tuning had changed something
