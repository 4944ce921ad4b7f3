"""The UNet against diffusers' `UNet2DModel` with the same weights, and its parts against what they stand for."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles import randn
from vdiff.models.backbone import count_flops, parameter_count
from vdiff.models.unet import (
    Attention,
    Resample,
    ResBlock,
    UNet,
    UNetConfig,
    UNetStage,
    group_norm,
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
        freq_shift=config.freq_shift,
        flip_sin_to_cos=True,
        down_block_types=tuple("AttnDownBlock2D" if attend else down for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else up for attend in reversed(attends)),
        block_out_channels=tuple(widths),
        layers_per_block=config.num_blocks,
        downsample_padding={"sides": 1, "end": 0}[config.downsample_pad],
        downsample_type=resample,
        upsample_type=resample,
        dropout=0.0,
        attention_head_dim=head_channels.pop(),
        norm_num_groups=config.num_groups or GROUPS,
        attn_norm_num_groups=config.num_groups or GROUPS,
        norm_eps=config.norm_eps,
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
    stages = [module for module in ours if isinstance(module, UNetStage)]
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
    "published": {"num_groups": 8, "norm_eps": 1e-3, "freq_shift": 1, "downsample_pad": "end"},
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
    timestep = torch.tensor([0, 1.5, 1023], dtype=torch.float64)
    expected = their(z, timestep, class_labels=classes).sample
    found = ours(z, timestep, classes)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("resample", ["block", "conv"])
def test_unet_is_diffusers_unet_in_float32(resample):
    config = UNetConfig(**BASE, resample=resample)
    ours, their = UNet(config), theirs(config)
    randomise(ours, seed=1)
    copy_weights(ours, their)
    z, timestep = randn(2, 3, 6, 2, dtype=torch.float32), torch.tensor([-1.0, 511.0])
    torch.testing.assert_close(ours(z, timestep), their(z, timestep).sample, rtol=1e-4, atol=1e-4)


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
    timestep = torch.tensor([-1.0, 0.0, 10.25, 1023.0])
    found = timestep_embedding(timestep, 7)
    for i, value in enumerate(timestep.tolist()):
        frequencies = [10_000 ** (-k / 3) for k in range(3)]
        expected = [math.cos(f * value) for f in frequencies] + [math.sin(f * value) for f in frequencies] + [0.0]
        assert found[i].tolist() == pytest.approx(expected, abs=2e-4)
    assert timestep_embedding(timestep.double(), 6, max_period=100.0)[2, 1].item() == pytest.approx(
        math.cos(10.25 * 100 ** (-1 / 3)), abs=1e-5
    )


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_timestep_embedding_is_diffusers_bit_for_bit(channels):
    timestep = torch.tensor([-1.0, 0.0, 10.25, 1023.0])
    found = timestep_embedding(timestep, channels)
    assert found.shape == (4, channels)
    if channels > 1:
        expected = get_timestep_embedding(timestep, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.equal(found, expected)


def test_fresh_network_answers_zero_and_its_residual_branches_are_closed():
    config = UNetConfig(**BASE)
    z, timestep = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    assert not UNet(config)(z, timestep).any()
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
    z, timestep = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    assert not torch.equal(network(z, timestep), network(z, timestep))
    network.eval()
    assert torch.equal(network(z, timestep), network(z, timestep))
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
        ({"attention_strides": (1,), "multipliers": (1, 2), "fold": 2}, r"among \[2, 4\], got \[1\]"),
        ({"fold": 0}, "fold must be at least 1, got 0"),
        ({"num_groups": -1}, "num_groups must be at least 0, got -1"),
        ({"num_groups": 5}, "64 channels do not split into 5 groups"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"freq_shift": 32}, "freq_shift must be below channels/2 = 32, got 32"),
        ({"downsample_pad": "start"}, "downsample_pad must be sides or end, got 'start'"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
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


# The default network stays what it was


def test_default_networks_keep_their_names_and_shapes():
    """Weights of earlier versions load: the digest was taken before folding and "no class" came in."""
    state = UNet(UNetConfig()).state_dict()
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in state.items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "e604c15e1ec19b36535c80a505e77d75b8ad4308a9fa211c09b0d9399a5cf8f7"


def test_default_networks_keep_their_answers():
    """Values of the version before folding and "no class" came in; the frequencies of the timestep are in float32."""
    network = UNet(UNetConfig(**BASE)).double()
    randomise(network)
    found = network(randn(1, 3, 4, 4), torch.tensor([511.0], dtype=torch.float64)).flatten()[::7]
    expected = [
        0.783631128201,
        0.526449356294,
        0.878801597057,
        0.583593591286,
        0.743671190893,
        -0.224645071269,
        -0.312714460579,
    ]
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


# Folding


def fold_by_hand(z: Tensor, fold: int) -> Tensor:
    """out[b, (c·f + i)·f + j, y, x] = z[b, c, y·f + i, x·f + j]: the order of the rosinality-style networks."""
    b, c, height, width = z.shape
    parts = z.reshape(b, c, height // fold, fold, width // fold, fold)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(b, c * fold**2, height // fold, width // fold)


def unfold_by_hand(h: Tensor, fold: int) -> Tensor:
    b, c, height, width = h.shape
    parts = h.reshape(b, c // fold**2, fold, fold, height, width)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(b, c // fold**2, height * fold, width * fold)


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("out_factor", [1, 2])
def test_folding_is_a_network_of_squares(fold, out_factor):
    """The same weights on squares that were folded by hand, also where the output has the channels of `both`."""
    config = UNetConfig(**BASE | {"attention_strides": (2 * fold,), "out_channels": 3 * out_factor, "fold": fold})
    plain = UNetConfig(**BASE | {"in_channels": 3 * fold**2, "out_channels": 3 * out_factor * fold**2})
    ours, squares = UNet(config), UNet(plain)
    randomise(ours)
    squares.load_state_dict(ours.state_dict())
    z, timestep = randn(2, 3, 4 * fold, 6 * fold, dtype=torch.float32), torch.tensor([3.0, 500.0])
    found = ours(z, timestep)
    assert found.shape == (2, 3 * out_factor, 4 * fold, 6 * fold)
    assert torch.equal(found, unfold_by_hand(squares(fold_by_hand(z, fold), timestep), fold))


@pytest.mark.parametrize("fold", [2, 4])
def test_folded_pixels_come_back_to_their_places(fold):
    """Each pixel of the input is one channel of its square, and unfolding is the inverse."""
    z = torch.arange(2 * 3 * 4 * fold * 2 * fold).reshape(2, 3, 4 * fold, 2 * fold).float()
    config = UNetConfig(channels=3 * fold**2, multipliers=(1,), attention_strides=(), fold=fold)
    network = UNet(config)
    seen: list[Tensor] = []
    network.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.conv_out.register_forward_hook(lambda *_: seen[0])
    assert torch.equal(network(z, torch.zeros(2)), z)
    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 3, 2 * fold - 1), (0, 1, fold, 1)):
        channel = (c * fold + y % fold) * fold + x % fold
        assert seen[0][b, channel, y // fold, x // fold] == z[b, c, y, x]


def test_folding_moves_sizes_and_strides():
    config = UNetConfig(multipliers=(1, 2, 2), fold=2, attention_strides=(2, 8))
    assert config.size_multiple == 8
    assert [config.stride(level) for level in range(3)] == [2, 4, 8]
    attends = [isinstance(stage.attention, Attention) for stage in UNet(config).down if isinstance(stage, UNetStage)]
    assert attends == [True, True, False, False, True, True]


def test_folding_costs_what_the_network_of_squares_costs():
    folded = UNetConfig(fold=2, attention_strides=(4,), num_classes=5, null_class=True)
    squares = UNetConfig(in_channels=12, out_channels=12, attention_strides=(2,), num_classes=6)
    assert count_flops(lambda: UNet(folded), (3, 32, 32)) == count_flops(lambda: UNet(squares), (12, 16, 16))
    plain = count_flops(lambda: UNet(UNetConfig()), (3, 32, 32))
    assert count_flops(lambda: UNet(folded), (3, 32, 32))[1] < 0.3 * plain[1]


# Memory


def gradients(network: UNet, z: Tensor, timestep: Tensor, seed: int = 0) -> tuple[list[Tensor], int]:
    """Output and all gradients, and the bytes that were kept for the backward pass beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    network.zero_grad()
    z = z.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(z, timestep)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    out.square().sum().backward()
    return [out, z.grad, *(parameter.grad for parameter in network.parameters())], size


@pytest.mark.parametrize("resample", ["block", "conv"])
@pytest.mark.parametrize("fold", [1, 2])
def test_checkpointing_changes_memory_and_no_bit(resample, fold):
    """Also with dropout, whose draws are repeated; the random numbers behind the forward pass stay the same too."""
    options = {"num_blocks": 2, "attention_strides": (2 * fold,), "resample": resample, "fold": fold}
    network = UNet(UNetConfig(**BASE | options, dropout=0.3))
    randomise(network)
    z, timestep = randn(2, 3, 16 * fold, 16 * fold, dtype=torch.float32), torch.tensor([3.0, 500.0])
    expected, usual = gradients(network, z, timestep)
    after = torch.rand(1)
    network.checkpointing = True
    found, less = gradients(network, z, timestep)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(gradients(network, z, timestep, seed=1)[0][0], found[0])
    assert 3 * less <= usual


def test_checkpointing_repeats_each_stage_once_and_only_for_gradients():
    network = UNet(UNetConfig(**BASE))
    network.checkpointing = True
    calls = []
    for stage in [*network.down, *network.middle, *network.up]:
        stage.register_forward_pre_hook(lambda *_: calls.append(1))
    z, timestep = randn(1, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0])
    count = len(network.down) + len(network.middle) + len(network.up)
    with torch.no_grad():
        network(z, timestep)
    assert len(calls) == count
    network(z, timestep).sum().backward()
    assert len(calls) == count + 2 * count


def test_checkpointing_is_no_part_of_the_description():
    network = UNet(UNetConfig(**BASE))
    assert network.checkpointing is False
    names = list(network.state_dict())
    network.checkpointing = True
    assert list(network.state_dict()) == names
    assert "checkpointing" not in network.config.to_dict()


def test_without_gradients_the_answer_is_the_same_bits():
    """And what the caller gave is left alone."""
    network = UNet(UNetConfig(**BASE))
    randomise(network)
    z, timestep = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    before = z.clone()
    expected = network(z, timestep)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(network(z, timestep), expected)
    assert torch.equal(z, before)


class Copies(TorchDispatchMode):
    """Counts the copies of whole tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.stack.default)
        return func(*args, **kwargs or {})


def test_attention_in_channels_last_copies_nothing():
    """Tokens, heads and pixels are views there, forward and backward."""
    attention = Attention(64, 4)
    randomise(attention)
    x = randn(2, 64, 4, 6, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.ones_like(x)
    with Copies() as copies:
        out = attention(x)
        out.backward(gradient)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert copies.count == 0


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("resample", ["block", "conv"])
def test_channels_last_stays_channels_last(fold, resample):
    """Every image-shaped tensor inside, and the numbers are the same."""
    network = UNet(UNetConfig(**BASE | {"attention_strides": (fold, 2 * fold), "fold": fold, "resample": resample}))
    randomise(network)
    z, timestep = randn(2, 3, 8 * fold, 4 * fold, dtype=torch.float32), torch.tensor([3.0, 500.0])
    expected = network(z, timestep)
    network = network.to(memory_format=torch.channels_last)
    strayed = []

    def look(module: nn.Module, _: object, out: Tensor) -> None:
        if out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            strayed.append(type(module).__name__)

    for module in network.modules():
        module.register_forward_hook(look)
    found = network(z.to(memory_format=torch.channels_last), timestep)
    assert strayed == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Mixed precision


def test_mixed_precision_is_close_and_tells_the_time_in_full():
    """bfloat16 has 8 bits: an error of 2⁻⁸ an operation; time and class reach the blocks in float32 all the same."""
    network = UNet(UNetConfig(**BASE, num_classes=3, null_class=True))
    randomise(network)
    z, timestep = randn(4, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 500.0, 1022.25, -0.5])
    classes = torch.tensor([0, 3, 1, 2])
    expected = network(z, timestep, classes)
    told: list[Tensor] = []
    network.down[0].block.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    network(z, timestep, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(z, timestep, classes)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert told[1].dtype == torch.float32
    assert torch.equal(told[0], told[1])
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


def test_full_precision_goes_before_mixed_precision():
    network = UNet(UNetConfig(**BASE))
    randomise(network)
    z, timestep = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 500.0])
    expected = network(z, timestep)
    for full in (False, True):
        network.full_precision = full
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network(z, timestep), expected) is full


def test_norms_in_mixed_precision_sum_in_float32():
    """bfloat16 sums of 4096 numbers around 4 would end near 1024."""
    norm = group_norm(64)
    x = (4 + randn(2, 64, 32, 64, dtype=torch.float32)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x)
    torch.testing.assert_close(found.float(), norm(x.float()), rtol=2**-7, atol=2**-7)


def test_networks_of_half_precision_are_told_the_time_in_full():
    """In bfloat16 the sinusoids are taken of the float32 timestep, which bfloat16 would round to 1024."""
    network = UNet(UNetConfig(**BASE)).bfloat16()
    seen: list[Tensor] = []
    network.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    timestep = torch.tensor([1021.0])
    assert network(randn(1, 3, 4, 4).bfloat16(), timestep).dtype == torch.bfloat16
    assert torch.equal(seen[0], timestep_embedding(timestep, 32).bfloat16())


# Compiling


@pytest.mark.parametrize("told", ["nothing", "classes", "no class"])
def test_a_network_is_one_graph(told):
    """Nothing in the forward pass makes the compiler break the graph; "eager" runs the captured graph as it is."""
    network = UNet(UNetConfig(**BASE, num_classes=0 if told == "nothing" else 3, null_class=told == "no class"))
    randomise(network)
    z, timestep = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    classes = torch.tensor([0, 2]) if told == "classes" else None
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z, timestep, classes), network(z, timestep, classes))
    if told == "no class":
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compiled(z, timestep, classes), network(z, timestep, classes))
    torch._dynamo.reset()
