"""Winograd's convolution against the plain one, and a network with it against the same network without."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import randn
from vdiff.models import winograd
from vdiff.models.unet import Conv3x3, UNet, UNetConfig

SHAPES = [(1, 1, 4, 4, 1), (3, 5, 8, 12, 7), (2, 6, 16, 4, 3), (5, 2, 4, 8, 4)]


def operands(n: int, c: int, height: int, width: int, o: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (channels last), weight and bias, all with gradients."""
    x = randn(n, c, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = randn(o, c, 3, 3, seed=1, dtype=dtype) / (9 * c) ** 0.5, randn(o, seed=2, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def with_gradients(convolve, given: list[Tensor]) -> list[Tensor]:
    """The answer, and the gradients of a weighted sum of it."""
    out = convolve(*given)
    return [out, *torch.autograd.grad((out * randn(*out.shape, seed=3, dtype=out.dtype)).sum(), given)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 2 * 36 * 64, 2**19])
def test_it_is_the_plain_convolution(shape, chunk, monkeypatch):
    """Values and all gradients, in chunks of one image, of two and the rest, and of all."""
    monkeypatch.setattr(winograd, "CHUNK_NUMBERS", chunk)
    given = operands(*shape)
    for found, expected in zip(*(with_gradients(f, given) for f in (winograd.conv3x3, plain)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_rounding_error_is_near_that_of_a_plain_convolution():
    """Of answer and gradients in float32, against float64."""
    exact, single = operands(4, 64, 16, 16, 64), operands(4, 64, 16, 16, 64, torch.float32)
    expected = with_gradients(plain, exact)
    errors = [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(with_gradients(f, single), expected, strict=True)]
        for f in (winograd.conv3x3, plain)
    ]
    assert max(errors[0]) < 2e-6
    assert errors[0][0] < 4 * errors[1][0]


def test_the_matrices_correlate_any_tile_with_any_kernel():
    """Each pixel of a tile with each tap of a kernel: a one where they meet, and nothing elsewhere."""
    matrices = winograd._matrices(torch.float64)
    pixels, taps = torch.eye(36, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    found = torch.einsum("ak,kt,kp->pta", matrices.answer, matrices.kernel @ taps, matrices.data @ pixels)
    expected = torch.zeros(6, 6, 3, 3, 4, 4, dtype=torch.float64)
    for row, column, i, j in itertools.product(range(4), range(4), range(3), range(3)):
        expected[row + i, column + j, i, j, row, column] = 1
    torch.testing.assert_close(found, expected.view(36, 9, 16), rtol=0, atol=1e-13)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for(wanted):
    given = operands(2, 3, 4, 8, 5)
    for tensor, is_wanted in zip(given, wanted, strict=True):
        tensor.requires_grad_(is_wanted)
    out = winograd.conv3x3(*given)
    assert out.requires_grad == any(wanted)
    asked = [tensor for tensor in given if tensor.requires_grad]
    if asked:
        expected = torch.autograd.grad(plain(*given).sum(), asked)
        for found, gradient in zip(torch.autograd.grad(out.sum(), asked), expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_it_keeps_what_a_plain_convolution_keeps():
    """Its input and its weights, for the gradient; the answer and the gradient of the input are channels last."""
    given, kept = operands(2, 3, 8, 8, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = winograd.conv3x3(*given)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given[:2]}
    (gradient,) = torch.autograd.grad(out.sum(), given[:1])
    for tensor in (out, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


# Where it is taken

CHANNELS = winograd.MIN_CHANNELS


def image(n: int = 8, c: int = CHANNELS, height: int = 8, width: int = 8) -> Tensor:
    return randn(n, c, height, width, dtype=torch.float32).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "o", "expected"),
    [
        (image(), CHANNELS, True),
        (image(1, CHANNELS, 32, 16), CHANNELS + 1, True),
        (image(7), CHANNELS, False),
        (image(c=CHANNELS - 1), CHANNELS, False),
        (image(), CHANNELS - 1, False),
        (image(height=10), CHANNELS, False),
        (image(width=10), CHANNELS, False),
        (image().contiguous(), CHANNELS, False),
        (image().double(), CHANNELS, False),
        (image().bfloat16(), CHANNELS, False),
        (image().to("meta"), CHANNELS, False),
    ],
)
def test_where_it_is_taken(x, o, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "conv3x3", lambda x, weight, bias: calls.append(1) or plain(x, weight, bias))
    convolution = Conv3x3(x.shape[1], o).to(x.device, x.dtype)
    assert convolution(x).shape == (len(x), o, *x.shape[2:])
    assert bool(calls) == expected


def test_autocast_has_another_precision_in_mind():
    x, weight = image(), torch.zeros(CHANNELS, CHANNELS, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd.suits(x, weight)
    assert winograd.suits(x, weight)


def test_recorded_graphs_hold_convolutions():
    x, convolution = image(), Conv3x3(CHANNELS, CHANNELS)
    assert winograd.suits(x, convolution.weight)
    graph = torch.export.export(convolution, (x,)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert len(called) == 1
    assert "conv2d" in called[0]


# In a network


def network(resample: str) -> tuple[UNet, list[Tensor]]:
    """A network of which most convolutions suit, and what to ask it."""
    shape = {"channels": CHANNELS, "embedding_channels": 16, "multipliers": (1, 1), "num_blocks": 1}
    built = UNet(UNetConfig(**shape, attention_strides=(2,), resample=resample)).to(memory_format=torch.channels_last)
    for k, parameter in enumerate(built.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=k) / parameter[0].numel() ** 0.5)
    return built, [randn(8, 3, 16, 16, dtype=torch.float32), torch.arange(8) * 100.0]


def answers(built: UNet, given: list[Tensor]) -> list[Tensor]:
    built.zero_grad()
    out = built(*given)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in built.parameters())]


@pytest.mark.parametrize("resample", ["block", "conv"])
def test_a_network_answers_and_learns_the_same(resample, monkeypatch):
    built, given = network(resample)
    convolutions = [module for module in built.modules() if isinstance(module, Conv3x3)]
    taken = []
    fast = winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *given: taken.append(1) or fast(*given))
    found = answers(built, given)
    # not those of the first and last layer, and not the one that upsamples as well
    assert len(taken) == len(convolutions) - 3
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    expected = answers(built, given)
    assert len(taken) == len(convolutions) - 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    assert not torch.equal(found[0], expected[0])


def test_checkpointing_changes_no_bit():
    built, given = network("block")
    expected = answers(built, given)
    built.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(answers(built, given), expected, strict=True))


def test_it_starts_like_a_plain_convolution():
    """The same draws for the same seed: weights of a run do not depend on how they are multiplied."""
    torch.manual_seed(0)
    one = Conv3x3(5, 7)
    torch.manual_seed(0)
    two = nn.Conv2d(5, 7, 3, padding=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
