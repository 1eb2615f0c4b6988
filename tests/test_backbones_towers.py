"""Image towers: cut into parts they are still the model that was wrapped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from capt.backbones import wrap
from capt.errors import CaptError, DataError
from tests.backbone_models import DIM, TOWERS, clip, hf_clip, shaken, timm_model, timm_vit

_WITH_BLOCKS = [name for name in TOWERS if "ViT" in name or "transformers" in name or "CoCa" in name]


@pytest.fixture(scope="module", params=list(TOWERS))
def made(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    torch.manual_seed(0)
    model = TOWERS[request.param]()
    return request.param, model, wrap(model)


def images_for(backbone: Any, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, *backbone.image_hw, generator=torch.Generator().manual_seed(1))


def encoded(model: Any, images: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "encode_image"):
        return model.encode_image(images, normalize=False)
    return model.get_image_features(pixel_values=images).pooler_output


def test_project_of_run_is_the_wrapped_models_feature_bit_for_bit(made: tuple[str, Any, Any]) -> None:
    _, model, backbone = made
    images = images_for(backbone)
    features = backbone.tower.project(backbone.tower.run(images))
    assert features.shape == (2, backbone.dim)
    assert torch.equal(features, encoded(model, images))
    assert torch.equal(features, backbone.image_features(images))
    assert torch.equal(backbone.encode_image(images, normalize=True), F.normalize(features, dim=-1))


def test_tokens_have_the_announced_shape(made: tuple[str, Any, Any]) -> None:
    _, _, backbone = made
    tower = backbone.tower
    tokens = tower.run(images_for(backbone))
    assert tokens.shape == (2, tower.n_prefix + tower.grid[0] * tower.grid[1], backbone.token_dim)
    assert tower.patches(tokens).shape[1] == tower.grid[0] * tower.grid[1]


def test_stages_are_grids_at_several_depths(made: tuple[str, Any, Any]) -> None:
    name, _, backbone = made
    stages = backbone.tower.stages(images_for(backbone))
    assert len(stages) > 1
    for stage in stages:
        assert stage.tokens.shape[:2] == (2, stage.grid[0] * stage.grid[1])
    if name in _WITH_BLOCKS:
        last = backbone.tower.patches(backbone.tower.run(images_for(backbone)))
        assert torch.equal(stages[-1].tokens, last)
    picked = backbone.tower.stages(images_for(backbone), depths=[2])
    assert len(picked) == 1 and torch.isfinite(picked[0].tokens).all()


@pytest.mark.parametrize("name", _WITH_BLOCKS)
def test_an_identity_hook_sees_every_block_and_changes_nothing(name: str) -> None:
    model = TOWERS[name]()
    tower = wrap(model).tower
    images, seen = torch.randn(2, 3, *tower.image_hw), []

    def hook(index: int, tokens: torch.Tensor) -> torch.Tensor:
        seen.append((index, tokens.shape))
        return tokens

    assert torch.equal(tower.project(tower.run(images, hook)), encoded(model, images))
    assert seen == [(i, (2, tower.n_prefix + 16, tower.width)) for i in range(len(tower.blocks))]


@pytest.mark.parametrize("name", _WITH_BLOCKS)
def test_gradient_reaches_a_hook_through_frozen_blocks(name: str) -> None:
    tower = wrap(TOWERS[name]()).tower
    scale = torch.zeros((), requires_grad=True)
    features = tower.project(tower.run(torch.randn(2, 3, 32, 32), lambda i, x: x + scale * x.detach().roll(1, -1)))
    features.square().sum().backward()
    assert scale.grad is not None and scale.grad.abs() > 0


def test_gradient_reaches_the_final_map_of_a_convolutional_tower() -> None:
    tower = wrap(TOWERS["timm EfficientNet-Lite"]()).tower
    tokens = tower.run(torch.randn(2, 3, 64, 64)).requires_grad_()
    tower.project(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_a_map_in_another_memory_order_projects_to_the_same_bits() -> None:
    tower = wrap(timm_model()).tower
    tokens = tower.run(torch.randn(2, 3, 64, 64))
    strided = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    assert strided.stride() != tokens.stride()
    assert torch.equal(tower.project(strided), tower.project(tokens))


def test_late_blocks_can_start_from_kept_tokens() -> None:
    tower = wrap(clip()).tower
    images = torch.randn(2, 3, 32, 32)
    kept = tower.advance(tower.embed(images), stop=2)
    assert torch.equal(tower.advance(kept, start=2), tower.run(images))


@pytest.mark.parametrize("name", ["open_clip ViT, class token", "timm ViT, class token", "transformers CLIP"])
def test_feed_forward_weights_are_those_of_the_block(name: str) -> None:
    tower = wrap(TOWERS[name]()).tower
    w = tower.feed_forward_weights(-1)
    activation = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[w.activation]
    x = torch.randn(1, 5, tower.width)
    block = tower.blocks[-1]
    inner = getattr(block, "block", None) or block.layer
    norm = next(getattr(inner, n) for n in ("ln_2", "norm2", "layer_norm2") if hasattr(inner, n))
    scale = getattr(getattr(inner, "ls2", None), "gamma", 1.0)
    byhand = x + scale * F.linear(activation(F.linear(norm(x), w.w_in, w.b_in)), w.w_out, w.b_out)
    torch.testing.assert_close(block.feed_forward(x), byhand)


def test_unusual_feed_forwards_are_not_offered_as_plain_ones() -> None:
    assert wrap(TOWERS["open_clip ViT, custom blocks"]()).tower.feed_forward_weights() is None
    assert wrap(timm_vit(mlp_layer=_gated())).tower.feed_forward_weights() is None
    assert wrap(timm_model()).tower.feed_forward_weights() is None


def _gated() -> Any:
    import timm

    return timm.layers.SwiGLU


def test_large_batches_of_a_convolutional_tower_are_cut_without_a_trace() -> None:
    model = timm_model()
    backbone = wrap(model)
    images = torch.randn(19, 3, 64, 64)
    torch.testing.assert_close(backbone.image_features(images), model.encode_image(images), rtol=1e-5, atol=1e-5)


def test_tokens_first_inside_the_transformer_is_handled() -> None:
    old = shaken(clip())
    for stack in (old.visual.transformer, old.transformer):
        stack.batch_first = False
        for block in stack.resblocks:
            block.attn.batch_first = False
    backbone = wrap(old)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.image_features(images), old.encode_image(images), rtol=0, atol=1e-6)


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    backbone = wrap(clip())
    with pytest.raises(DataError, match=r"40 x 40 pixels.*32 x 32"):
        backbone.image_features(torch.randn(1, 3, 40, 40))
    with pytest.raises(DataError, match="uint8"):
        backbone.tower.run(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match="batch, 3, height, width"):
        backbone.tower.embed(torch.randn(3, 32, 32))


def test_wrapped_models_are_frozen_and_stay_in_evaluation_mode() -> None:
    model = timm_model().train().requires_grad_(True)
    backbone = wrap(model)
    backbone.frozen_check()
    torch.nn.ModuleList([backbone]).train()
    assert backbone.training and not any(m.training for m in model.modules())
    next(model.parameters()).requires_grad_(True)
    with pytest.raises(CaptError, match="must stay frozen"):
        backbone.frozen_check()


def test_wrapping_leaves_running_statistics_alone() -> None:
    model = timm_model().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wrap(model)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_copied_backbone_uses_its_own_weights() -> None:
    backbone = wrap(clip())
    images = torch.randn(1, 3, 32, 32)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.model.visual.proj.zero_()
    assert other.image_features(images).abs().max() == 0 < backbone.image_features(images).abs().max()


def test_a_backbone_can_be_sent_to_another_process() -> None:
    backbone = wrap(clip())
    images = torch.randn(1, 3, 32, 32)
    other = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(other.image_features(images), backbone.image_features(images))
    assert other.fingerprint() == backbone.fingerprint()
    assert torch.equal(other.text_features(["a cat"]), backbone.text_features(["a cat"]))


def test_bfloat16_towers_take_float32_images() -> None:
    backbone = wrap(clip().bfloat16())
    features = backbone.image_features(torch.randn(2, 3, 32, 32))
    assert features.dtype == torch.bfloat16 and features.shape == (2, DIM)


def test_scale_and_bias_are_ready_to_use() -> None:
    model = hf_clip()
    torch.testing.assert_close(wrap(model).logit_scale, model.logit_scale.exp())
    assert wrap(model).logit_bias == 0 and wrap(clip()).logit_scale.shape == ()
    siglip = TOWERS["transformers SigLIP"]()
    torch.testing.assert_close(wrap(siglip).logit_bias, siglip.logit_bias[0])


def test_models_of_unknown_kind_are_refused() -> None:
    with pytest.raises(CaptError, match=r"Linear.*open_clip"):
        wrap(torch.nn.Linear(2, 2))
    import transformers

    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(CaptError, match="not an image-text model"):
        wrap(bert)
