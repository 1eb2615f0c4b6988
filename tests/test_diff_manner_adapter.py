"""Diff-Manner Adapter inside towers. Numbers in test names: docs/fidelity.md. The stencil itself: test_grid_adapter."""

from __future__ import annotations

import pytest
import torch

from capt import DiffMannerAdapter
from capt.errors import CaptError
from tests.tiny import backbone


def pixels(kind: str, n: int = 3) -> torch.Tensor:
    size = backbone(kind).image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["vit", "resnet", "cnn"])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_19_identity_at_initialisation_bit_for_bit(kind, layers):
    wrapped = backbone(kind)
    adapter = DiffMannerAdapter.for_tower(wrapped.tower, layers=layers)
    with torch.no_grad():
        tokens = adapter.frozen_tokens(wrapped.tower, pixels(kind))
        expected = wrapped.image_features(pixels(kind))
        assert torch.equal(adapter.encode_frozen(wrapped.tower, tokens), expected)
        assert torch.equal(adapter.encode(wrapped.tower, tokens), expected)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_19_alpha_zero_is_the_identity_and_the_prefix_passes(kind):
    wrapped = backbone(kind)
    adapter = DiffMannerAdapter.for_tower(wrapped.tower)
    torch.nn.init.normal_(adapter.weight)
    with torch.no_grad():
        tokens = adapter.frozen_tokens(wrapped.tower, pixels(kind))
        assert torch.equal(
            adapter.encode(wrapped.tower, tokens, alpha=0.0), adapter.encode_frozen(wrapped.tower, tokens)
        )
        assert not torch.equal(adapter.encode(wrapped.tower, tokens), adapter.encode_frozen(wrapped.tower, tokens))
        n_prefix = wrapped.tower.n_prefix
        adapted = adapter(tokens, 0, grid=wrapped.tower.grid, n_prefix=n_prefix)
        assert torch.equal(adapted[:, :n_prefix], tokens[:, :n_prefix])
        assert not torch.equal(adapted[:, n_prefix:], tokens[:, n_prefix:])


def test_20_wrong_grid_is_rejected():
    adapter = DiffMannerAdapter(8)
    with pytest.raises(CaptError, match="grid"):
        adapter(torch.randn(2, 10, 8), grid=(3, 4))


def test_21_parameter_counts_of_vit_b_16():
    assert DiffMannerAdapter(768, 12).weight.numel() == 82_944
    assert DiffMannerAdapter(768, 1).weight.numel() == 6_912


@pytest.mark.parametrize("kind", ["vit", "resnet", "cnn"])
def test_21_gradient_reaches_every_layer_but_nothing_frozen(kind):
    wrapped = backbone(kind)
    adapter = DiffMannerAdapter.for_tower(wrapped.tower)
    tokens = adapter.frozen_tokens(wrapped.tower, pixels(kind)).detach()
    adapter.encode(wrapped.tower, tokens).square().sum().backward()
    reached = [bool(layer.abs().sum() > 0) for layer in adapter.weight.grad]
    # The pooled CLS token has no attention after the last block's adapter: that one layer is inert.
    assert reached == ([True] * (len(reached) - 1) + [False] if kind == "vit" else [True])
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_22_dynamic_alpha_is_finite_increasing_and_independent_of_the_batch():
    adapter = DiffMannerAdapter(8, dynamic=True)
    similarity = torch.tensor([-0.5, 0.0, 0.25, 1.0], requires_grad=True)
    alpha = adapter.intensity(similarity)
    alpha.sum().backward()
    assert torch.isfinite(alpha).all() and torch.isfinite(similarity.grad).all()
    assert alpha[0] == alpha[1] < 1e-4 and torch.allclose(alpha[2:], torch.tensor([2.5, 5.0]))
    assert torch.equal(adapter.intensity(similarity[2:3]), alpha[2:3])


def test_layers_must_exist():
    with pytest.raises(CaptError, match="1 to 3"):
        DiffMannerAdapter.for_tower(backbone("vit").tower, layers=4)
    with pytest.raises(CaptError, match="'all'"):
        DiffMannerAdapter.for_tower(backbone("vit").tower, layers="first")
