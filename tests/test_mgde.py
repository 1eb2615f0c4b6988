"""Multi-Granularity Difference Expert. Numbers in test names: docs/fidelity.md."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from capt import MultiGranularityDifferenceExpert
from capt.errors import CaptError
from capt.methods.capt import CAPT, CAPTConfig
from tests.tiny import backbone

D = 48


def expert(**options) -> MultiGranularityDifferenceExpert:
    torch.manual_seed(0)
    module = MultiGranularityDifferenceExpert(D, **{"n_heads": 4, "hidden": 32, **options})
    module.attention_gain.data.fill_(
        1.0
    )  # otherwise the tokens of an image do not meet, and tests of that prove nothing
    return module


def guidance(n: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, D, generator=generator), dim=-1) for _ in range(4)]


def test_23_router_weights_and_gradients():
    module = expert()
    inputs = guidance(64)
    output = module(*inputs)
    assert (output.weights >= 0).all() and ((output.weights > 0).sum(1) <= 2).all()
    assert torch.allclose(output.weights.sum(1), torch.ones(64), atol=1e-6)
    used = (output.weights > 0).any(0)
    assert used.all(), "the test needs every expert in use"
    output.correction.square().sum().backward()
    assert module.gate.grad.abs().sum() > 0
    for name in ("w_in", "b_in", "w_out", "b_out"):
        gradient = getattr(module, name).grad
        assert all(bool(gradient[e].abs().sum() > 0) for e in range(3)), name


def test_24_an_image_does_not_depend_on_its_batch_or_order():
    module = expert().eval()
    inputs = guidance(16)
    with torch.no_grad():
        together = module(*inputs).correction
        order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(module(*[x[order] for x in inputs]).correction, together[order], atol=1e-6)
        alone = torch.cat([module(*[x[i : i + 1] for x in inputs]).correction for i in range(16)])
        assert torch.allclose(alone, together, atol=1e-6)
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[1:] = normalize(torch.randn_like(x[1:]), dim=-1)
        assert torch.allclose(module(*changed).correction[0], together[0], atol=1e-6)


def test_25_beta_zero_reproduces_the_base_feature_bit_for_bit():
    module = expert()
    raw = 7.3 * torch.randn(32, D, generator=torch.Generator().manual_seed(3))
    correction = torch.randn(32, D, generator=torch.Generator().manual_seed(4))
    assert torch.equal(module.correct(raw, correction), normalize(raw, dim=-1))
    module.beta.data.fill_(0.3)
    expected = normalize(normalize(raw, dim=-1) + 0.3 * correction, dim=-1)
    assert torch.allclose(module.correct(raw, correction), expected, atol=1e-6)


def test_26_evaluation_is_deterministic_and_without_dropout():
    module = expert(dropout=0.9)
    inputs = guidance()
    assert not torch.equal(module(*inputs).correction, module(*inputs).correction)
    module.eval()
    assert torch.equal(module(*inputs).correction, module(*inputs).correction)


def test_27_parameter_count_at_width_768():
    module = MultiGranularityDifferenceExpert(768)
    assert sum(p.numel() for p in module.parameters()) == 16_535_040 + 2  # beta and the attention gain


def test_27_sample_expert_starts_as_the_towers_feed_forward():
    wrapped = backbone("vit")
    model = CAPT(wrapped, ["cat", "dog", "fox"], config=CAPTConfig(heads=4))
    w_in, b_in, w_out, b_out = wrapped.tower.feed_forward_weights()[:4]
    for mine, theirs in zip((model.mgde.w_in, model.mgde.b_in, model.mgde.w_out, model.mgde.b_out),
                            (w_in, b_in, w_out, b_out), strict=True):  # fmt: skip
        assert torch.equal(mine[2], theirs)


def test_semantic_experts_start_from_their_centres():
    module = expert()
    centres = normalize(torch.randn(5, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    module.initialise_experts(centres, -centres)
    assert torch.equal(module.w_in[0, :5], centres) and torch.equal(module.w_in[1, :5], -centres)
    assert torch.equal(module.w_out[0, :, :5], centres.T)


def test_balance_is_one_for_a_uniform_router_and_larger_for_a_collapsed_one():
    module = expert(top_k=1).eval()
    inputs = guidance(600)
    with torch.no_grad():
        module.gate.mul_(20)
        even = module(*inputs).balance
        module.gate.zero_()
        module.gate[0] = 1.0
        module.norm_out.weight.zero_()
        module.norm_out.bias.fill_(1.0)
        collapsed = module(*inputs).balance
    assert collapsed > 2.9 and even < 1.5


def test_another_width_maps_in_and_out():
    module = expert(width=64)
    output = module(*guidance())
    assert output.correction.shape == (8, D)


def test_wrong_sizes_are_refused():
    with pytest.raises(CaptError, match="divide"):
        MultiGranularityDifferenceExpert(50, n_heads=12)
    with pytest.raises(CaptError, match="top_k"):
        MultiGranularityDifferenceExpert(48, top_k=4)
