"""Category prompts and their interaction with patches: against the definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from capt.errors import CaptError
from capt.modules import split_attention as split_attention_module
from capt.modules.prompt_initialiser import PromptInitialiser
from capt.modules.split_attention import split_attention
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction

D, W, C, B = 64, 9, 7, 3


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    settings = {"n_heads": 4, "head_dim": 32, "hidden": 48, **options}
    model = VisualSemanticInteraction(D, **settings).to(dtype).eval()
    return model, torch.randn(B, W, D, dtype=dtype), torch.randn(C, D, dtype=dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_16_prompt_rows_equal_the_full_encoder_with_all_gradients(residual, depth, dtype, tolerance):
    model, patches, prompts = made(dtype, residual=residual, depth=depth)
    weights = torch.randn(B, C, D, dtype=dtype)
    results = []
    for path in (model.forward, model.full):
        inputs = patches.clone().requires_grad_(), prompts.clone().requires_grad_()
        model.zero_grad()
        out = path(*inputs)
        (out * weights).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs), *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        scale = float(expected.abs().max()) + 1e-30
        assert float((found - expected).abs().max()) / scale < tolerance


@pytest.mark.parametrize("n_patches, n_classes", [(1, 7), (9, 1), (1, 1), (3, 200)])
def test_16_any_number_of_patches_and_classes(n_patches, n_classes):
    model, *_ = made()
    patches, prompts = torch.randn(2, n_patches, D).double(), torch.randn(n_classes, D).double()
    torch.testing.assert_close(model(patches, prompts), model.full(patches, prompts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_16_extreme_logits_let_one_part_dominate_without_nan(factor):
    model, patches, prompts = made()
    with torch.no_grad():
        model.layers[0].query.weight.mul_(factor)
    found = model(patches, prompts)
    assert found.isfinite().all()
    torch.testing.assert_close(found, model.full(patches, prompts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
def test_18_folded_scores_equal_the_dot_products_and_are_refused_under_dropout(residual):
    model, patches, prompts = made(residual=residual)
    expected = (model.full(patches, prompts) * prompts).sum(-1)
    torch.testing.assert_close(model.scores(patches, prompts), expected, rtol=1e-11, atol=1e-11)
    model.train()
    with pytest.raises(CaptError, match="evaluation mode"):
        model.layers[0].folded_scores(torch.randn(B, C, D).double(), prompts)
    assert model.scores(patches, prompts).shape == (B, C)


@pytest.mark.parametrize("residual", [False, True])
def test_18_without_dropout_training_folds_the_scores_with_the_same_gradients(residual):
    model, patches, prompts = made(residual=residual, dropout=0.0)
    model.train()
    results = []
    for scores in (model.scores, lambda x, p: (model.full(x, p) * p).sum(-1)):
        inputs = [patches.clone().requires_grad_(), prompts.clone().requires_grad_(), *model.parameters()]
        out = scores(*inputs[:2])
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_01_parameter_counts_of_the_published_sizes():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(VisualSemanticInteraction(2048, head_dim=512)) == 41_957_376
        assert count(PromptInitialiser(1024, 2048)) == 3_148_800
        assert count(PromptInitialiser(512, 2048)) == 2_624_512


def test_03_patches_in_any_order_and_classes_in_step():
    model, patches, prompts = made()
    scores = model.scores(patches, prompts)
    torch.testing.assert_close(model.scores(patches.flip(1), prompts), scores)
    torch.testing.assert_close(model.scores(patches, prompts.flip(0)), scores.flip(1))


def test_04_images_are_independent_and_classes_are_not():
    model, patches, prompts = made()
    scores = model.scores(patches, prompts)
    torch.testing.assert_close(model.scores(patches[1:2], prompts), scores[1:2])
    more = model.scores(patches, torch.cat([prompts, torch.randn(1, D).double()]))
    assert not torch.allclose(more[:, :C], scores)


def test_05_without_skip_connections_nothing_passes_zeroed_layers():
    for residual in (False, True):
        model, patches, prompts = made(residual=residual)
        layer = model.layers[0]
        with torch.no_grad():
            for part in (layer.out, layer.w_in, layer.w_out):
                part.weight.zero_(), part.bias.zero_()
        expected = prompts.expand(B, -1, -1) if residual else torch.zeros(B, C, D).double()
        assert torch.equal(model(patches, prompts), expected)


def test_06_attention_has_no_bias_and_is_scaled_by_the_width_of_a_head():
    model, patches, prompts = made()
    layer = model.layers[0]
    assert all(part.bias is None for part in (layer.query, layer.key, layer.value))
    tokens = torch.cat([patches, prompts.expand(B, -1, -1)], 1)
    x = layer.norm_in(tokens)
    q, k, v = (part(x).unflatten(-1, (4, 32)).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    attended = ((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, W:]
    torch.testing.assert_close(layer.attended(patches, prompts), attended)


def test_17_the_prompts_own_attention_is_formed_once_a_batch():
    """In float64, which torch's own products compute, so that their arithmetic can be counted."""
    model, *_ = made()
    n_classes = 50

    def flops(images):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(images, W, D).double(), torch.randn(n_classes, D).double()).sum().backward()
        return counter.get_total_flops()

    inner, once = 128, 3 * 2 * n_classes * 3 * 128 * D  # projections of the prompts, forward and twice backward
    once += 7 * 2 * n_classes * n_classes * inner
    assert flops(1) - (flops(3) - flops(2)) == pytest.approx(once, rel=0.05)


def parts(dtype, n_classes, n_patches, dim):
    torch.manual_seed(1)
    shapes = [(n_classes, dim)] * 3 + [(B, n_patches, dim)] * 2
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
def test_17_derivatives_of_the_split_softmax_equal_finite_differences(monkeypatch, block):
    monkeypatch.setattr(split_attention_module, "BLOCK_SCORES", block)
    assert torch.autograd.gradcheck(lambda *x: split_attention(*x, n_heads=2), parts(torch.float64, 3, 4, 4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_17_split_softmax_of_other_dtypes_equals_attention_in_float64(dtype, tolerance):
    given = parts(dtype, 40, W, 32)
    exact = [x.detach().double().requires_grad_() for x in given]
    query, own_keys, own_values, keys, values = exact
    joint = (torch.cat([own.expand(B, -1, -1), x], 1) for own, x in ((own_keys, keys), (own_values, values)))
    q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (query.expand(B, -1, -1), *joint))
    expected = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = split_attention(*given, n_heads=4)
    weights = torch.randn_like(out)
    found = out, *torch.autograd.grad(out, given, weights)
    expected = expected, *torch.autograd.grad(expected, exact, weights.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).abs().max()) < tolerance * float(b.abs().max())


def test_17_a_second_derivative_is_refused():
    given = parts(torch.float64, C, W, 32)
    with pytest.raises(CaptError, match="differentiable once"):
        torch.autograd.grad(split_attention(*given, n_heads=4).sum(), given[:1], create_graph=True)


def test_17_under_autocast_a_step_stays_near_that_of_float32():
    model, patches, prompts = made(torch.float32)
    results = []
    for enabled in (False, True):
        inputs = patches.clone().requires_grad_(), prompts.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model.scores(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.isfinite().all()
        assert float((exact - rounded).norm()) < 0.05 * float(exact.norm())


def test_bad_settings_are_named():
    with pytest.raises(CaptError, match="depth must be at least 1, found 0"):
        VisualSemanticInteraction(D, depth=0)
    with pytest.raises(CaptError, match="n_heads must be at least 1"):
        VisualSemanticInteraction(D, n_heads=-1)
