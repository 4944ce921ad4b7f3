"""The UNet against diffusers' `UNet2DModel` with the same weights, and its parts against what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import randn
from vdiff.models.unet import (
    Attention,
    Resample,
    ResBlock,
    Stage,
    UNet,
    UNetConfig,
    group_norm,
    parameter_count,
    timestep_embedding,
    upsample_conv,
)

GROUPS = 32
"""diffusers has one number of groups for all norms: gcd(width, 32) is 32 at each width of these networks."""


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Non-zero weights everywhere, also where the initialisation puts zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def theirs(config: UNetConfig) -> UNet2DModel:
    """diffusers' model of the same shape."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    attends = [2**level in config.attention_strides for level in range(len(widths))]
    plain = {"block": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "conv": ("DownBlock2D", "UpBlock2D")}
    down, up = plain[config.resample]
    resample = {"block": "resnet", "conv": "conv"}[config.resample]
    head_channels = {width // config.heads(width) for width in widths}
    assert len(head_channels) == 1, "diffusers has one width for all heads"
    return UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        time_embedding_dim=config.embedding_channels,
        freq_shift=0,
        flip_sin_to_cos=True,
        down_block_types=tuple("AttnDownBlock2D" if attend else down for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else up for attend in reversed(attends)),
        block_out_channels=tuple(widths),
        layers_per_block=config.num_blocks,
        downsample_padding=1,
        downsample_type=resample,
        upsample_type=resample,
        dropout=0.0,
        attention_head_dim=head_channels.pop(),
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if config.time_affine else "default",
        class_embed_type=None,
        num_class_embeds=config.num_classes or None,
    )


def copy(ours: nn.Module, their: nn.Module) -> None:
    their.load_state_dict(ours.state_dict())


def copy_block(ours: ResBlock, their: nn.Module) -> None:
    names = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    for our_name, their_name in names.items():
        copy(getattr(ours, our_name), getattr(their, their_name))
    assert (their.conv_shortcut is None) == isinstance(ours.skip, nn.Identity)
    if their.conv_shortcut is not None:
        copy(ours.skip, their.conv_shortcut)


def copy_attention(ours: Attention, their: nn.Module) -> None:
    copy(ours.norm, their.group_norm)
    copy(ours.out, their.to_out[0])
    weights, biases = ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3)
    for linear, weight, bias in zip((their.to_q, their.to_k, their.to_v), weights, biases, strict=True):
        linear.load_state_dict({"weight": weight, "bias": bias})


def copy_level(ours: list[nn.Module], their: nn.Module) -> None:
    """A level's stages and the resampling behind them."""
    stages = [module for module in ours if isinstance(module, Stage)]
    attentions = getattr(their, "attentions", [None] * len(stages))
    for stage, block, attention in zip(stages, their.resnets, attentions, strict=True):
        copy_block(stage.block, block)
        assert (attention is None) == isinstance(stage.attention, nn.Identity)
        if attention is not None:
            copy_attention(stage.attention, attention)
    resamples = [module for module in ours if isinstance(module, Resample)]
    foreign = getattr(their, "downsamplers", None) or getattr(their, "upsamplers", None) or []
    for resample, module in zip(resamples, foreign, strict=True):
        if resample.block is not None:
            copy_block(resample.block, module)
        else:
            copy(resample.conv, module.conv)


def levels(modules: nn.ModuleList) -> list[list[nn.Module]]:
    """`modules` cut behind each resampling."""
    cut: list[list[nn.Module]] = [[]]
    for module in modules:
        cut[-1].append(module)
        if isinstance(module, Resample):
            cut.append([])
    return cut


def copy_weights(ours: UNet, their: UNet2DModel) -> None:
    copy(ours.embed[0], their.time_embedding.linear_1)
    copy(ours.embed[2], their.time_embedding.linear_2)
    if ours.embed_class is not None:
        copy(ours.embed_class, their.class_embedding)
    copy(ours.conv_in, their.conv_in)
    for our_modules, their_blocks in ((ours.down, their.down_blocks), (ours.up, their.up_blocks)):
        for level, block in zip(levels(our_modules), their_blocks, strict=True):
            copy_level(level, block)
    copy_block(ours.middle[0].block, their.mid_block.resnets[0])
    copy_attention(ours.middle[0].attention, their.mid_block.attentions[0])
    copy_block(ours.middle[1].block, their.mid_block.resnets[1])
    copy(ours.norm_out, their.conv_norm_out)
    copy(ours.conv_out, their.conv_out)


BASE = {"channels": 32, "embedding_channels": 24, "multipliers": (1, 2), "num_blocks": 1, "attention_strides": (2,)}
BASE |= {"head_channels": 16}
SHAPES = {
    "base": {},
    "classes": {"num_classes": 5},
    "deep": {"multipliers": (1, 2, 3), "num_blocks": 2, "attention_strides": (1, 4)},
    "no_attention": {"attention_strides": ()},
    "heads": {"multipliers": (1, 1), "num_heads": 4, "head_channels": 0, "attention_strides": (1, 2)},
    "one_level": {"multipliers": (1,), "attention_strides": (1,), "in_channels": 1, "out_channels": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resample", ["block", "conv"])
@pytest.mark.parametrize("time_affine", [False, True])
def test_unet_is_diffusers_unet(shape, resample, time_affine):
    config = UNetConfig(**BASE | SHAPES[shape], resample=resample, time_affine=time_affine)
    ours, their = UNet(config).double(), theirs(config).double()
    randomise(ours)
    copy_weights(ours, their)
    assert parameter_count(ours) == sum(parameter.numel() for parameter in their.parameters())
    classes = torch.tensor([0, 4, 2]) if config.num_classes else None
    height, width = (4, 12) if config.size_multiple == 4 else (2, 6)
    z = randn(3, config.in_channels, height, width)
    label = torch.tensor([0, 1.5, 1023], dtype=torch.float64)
    expected = their(z, label, class_labels=classes).sample
    found = ours(z, label, classes)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("resample", ["block", "conv"])
def test_unet_is_diffusers_unet_in_float32(resample):
    config = UNetConfig(**BASE, resample=resample)
    ours, their = UNet(config), theirs(config)
    randomise(ours, seed=1)
    copy_weights(ours, their)
    z, label = randn(2, 3, 6, 2, dtype=torch.float32), torch.tensor([-1.0, 511.0])
    torch.testing.assert_close(ours(z, label), their(z, label).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 1, 1), (3, 3, 5, 7)])
def test_upsample_conv_is_a_convolution_of_the_upsampled(shape):
    """Values, and gradients with respect to input, weight and bias."""
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    weight_of = randn(shape[0], 5, 2 * shape[2], 2 * shape[3], seed=1)
    results = []
    for apply in (upsample_conv, lambda h, conv: conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))):
        h = randn(*shape).requires_grad_()
        out = apply(h, conv)
        gradients = torch.autograd.grad((out * weight_of).sum(), [h, conv.weight, conv.bias])
        results.append([out, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_timestep_embedding_is_cos_and_sin_of_falling_frequencies():
    label = torch.tensor([-1.0, 0.0, 10.25, 1023.0])
    found = timestep_embedding(label, 7)
    for i, value in enumerate(label.tolist()):
        frequencies = [10_000 ** (-k / 3) for k in range(3)]
        expected = [math.cos(f * value) for f in frequencies] + [math.sin(f * value) for f in frequencies] + [0.0]
        assert found[i].tolist() == pytest.approx(expected, abs=2e-4)
    assert timestep_embedding(label.double(), 6, max_period=100.0)[2, 1].item() == pytest.approx(
        math.cos(10.25 * 100 ** (-1 / 3)), abs=1e-5
    )


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_timestep_embedding_is_diffusers_bit_for_bit(channels):
    label = torch.tensor([-1.0, 0.0, 10.25, 1023.0])
    found = timestep_embedding(label, channels)
    assert found.shape == (4, channels)
    if channels > 1:
        expected = get_timestep_embedding(label, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.equal(found, expected)


def test_fresh_network_answers_zero_and_its_residual_branches_are_closed():
    config = UNetConfig(**BASE)
    z, label = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    assert not UNet(config)(z, label).any()
    h, embedding = randn(2, 32, 4, 4, dtype=torch.float32), randn(2, 24, dtype=torch.float32)
    assert torch.equal(ResBlock(32, 32, config)(h, embedding), h)
    assert torch.equal(Attention(32, 2)(h), h)


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (48, 16), (112, 16), (7, 1), (256, 32)])
def test_groups_of_a_norm(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (groups, channels, 1e-5)


def test_dropout_acts_in_training_only():
    network = UNet(UNetConfig(**BASE, dropout=0.5))
    randomise(network)
    z, label = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    assert not torch.equal(network(z, label), network(z, label))
    network.eval()
    assert torch.equal(network(z, label), network(z, label))
    dropped = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert {module.p for module in dropped} == {0.5}


def test_classes_are_needed_where_there_are_classes():
    network = UNet(UNetConfig(**BASE, num_classes=5))
    with pytest.raises(ValueError, match="needs classes, 0 to 4"):
        network(torch.zeros(1, 3, 4, 4), torch.zeros(1))


def test_every_parameter_takes_part():
    """No dead weights: each one's gradient is non-zero somewhere once the zeros of the start are gone."""
    for resample in ("block", "conv"):
        network = UNet(UNetConfig(**BASE, resample=resample, num_classes=2))
        randomise(network)
        out: Tensor = network(randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0]), torch.tensor([0, 1]))
        out.square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_configuration_round_trip():
    config = UNetConfig(**BASE, num_classes=3)
    values = config.to_dict()
    assert all(not isinstance(value, tuple) for value in values.values())
    assert UNetConfig.from_dict(values) == config


def test_heads_and_sizes():
    assert [UNetConfig(head_channels=64).heads(c) for c in (32, 64, 192)] == [1, 1, 3]
    narrow = UNetConfig(channels=32, multipliers=(1, 2, 4), head_channels=64)
    assert [narrow.heads(32 * multiplier) for multiplier in narrow.multipliers] == [1, 1, 2]
    assert UNetConfig(num_heads=4).heads(64) == 4
    assert [UNetConfig(multipliers=m, attention_strides=()).size_multiple for m in ((1,), (1, 2), (1, 1, 1, 1))] == [
        1,
        2,
        8,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, r"multipliers .* got \(1, 0\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"resample": "pool"}, "block or conv, got 'pool'"),
        ({"attention_strides": (4,), "multipliers": (1, 2)}, r"among \[1, 2\], got \[4\]"),
        ({"num_heads": 3, "channels": 32}, "32 channels do not split into 3 heads"),
        ({"head_channels": 20, "channels": 64, "multipliers": (1,)}, "64 channels do not split into heads of 20"),
        ({"head_channels": 24, "channels": 64, "multipliers": (1,)}, "64 channels do not split into heads of 24"),
        ({"head_channels": 24, "channels": 32, "multipliers": (1,)}, "32 channels do not split into heads of 24"),
        ({"head_channels": 64, "channels": 32, "multipliers": (1, 2, 3)}, "96 channels do not split into heads of 64"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"attention_strides": ()} | change)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"unknown UNet option chanels; choose from in_channels"):
        UNetConfig.from_dict({"chanels": 3})
