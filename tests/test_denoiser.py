"""The denoiser: what it tells the network, and how it reads the answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import ALL_SCHEDULES, Z_SHAPE, column, condition, gaussian, mixture, no_noise, randn
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.samplers import Ddim, sample
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule, grid_times
from vdiff.models.condition import Signature
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
every_kind = pytest.mark.parametrize("kind", PREDICTION_TYPES)


class Stub(nn.Module):
    """Answers what `answer(z, timestep)` says, and remembers what it was told."""

    def __init__(self, kind: str = "v", answer=None, channels: int = 2) -> None:
        super().__init__()
        factor = PREDICTION_TYPES[kind].channel_factor
        self.signature = Signature(channels, channels * factor)
        self.answer = answer or (lambda z, _: torch.zeros_like(z).repeat(1, factor, 1, 1))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, z: Tensor, timestep: Tensor, classes: Tensor | None = None) -> Tensor:
        self.calls.append((z, timestep, classes))
        return self.answer(z, timestep)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_is_told_the_level_s_number(schedule, dtype):
    """timestep = L t − 1: at level k of a grid of L it is k − 1, exactly, in float32 too; classes pass untouched."""
    stub, size = Stub(), schedule.label_scale
    levels = torch.tensor([1, size // 2, size])
    z, classes = randn(*Z_SHAPE, dtype=dtype), torch.tensor([4, 0, 7])
    Denoiser(stub, schedule, "v")(z, grid_times(size)[levels], condition(classes))
    seen_z, timestep, seen_classes = stub.calls[0]
    assert timestep.dtype == dtype
    assert timestep.tolist() == [0, size // 2 - 1, size - 1]
    assert seen_z is z
    assert seen_classes is classes


def test_labels_are_real_numbers_between_levels():
    stub = Stub()
    Denoiser(stub, CosineSchedule(), "v")(torch.zeros(2, 2, 1, 1), torch.tensor([1 / 3, 1e-3], dtype=torch.float64))
    assert stub.calls[0][1].tolist() == pytest.approx([1024 / 3 - 1, 0.024], abs=1e-4)
    assert stub.calls[0][2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_are_not_rounded_with_images_of_half_precision(dtype):
    """bfloat16 knows 1020 and 1024 and nothing between."""
    stub = Stub()
    t = torch.tensor([1022.5 / 1024, 1.0], dtype=torch.float64)
    Denoiser(stub, CosineSchedule(), "v")(torch.zeros(2, 2, 1, 1, dtype=dtype), t)
    z, timestep, _ = stub.calls[0]
    assert (z.dtype, timestep.dtype, timestep.tolist()) == (dtype, torch.float32, [1021.5, 1023.0])


def test_mixed_precision_ends_at_the_network():
    """Under autocast the answer has the precision of z, and is close to that of full precision."""
    network = UNet(UNetConfig(channels=32, multipliers=(1, 2), num_blocks=1, attention_strides=(2,)))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    denoiser = Denoiser(network, CosineSchedule(), "v")
    z, t = randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    expected = denoiser(z, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoiser(z, t)
    for name in ("x", "eps", "v"):
        assert getattr(found, name).dtype == torch.float32
        assert (getattr(found, name) - getattr(expected, name)).norm() < 0.03 * expected.v.norm()
    assert not torch.equal(found.v, expected.v)


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()], ids=["cosine", "linear"])
def test_the_same_noise_level_has_the_same_label_in_every_stage(schedule):
    told = []
    for num_steps in (8, 4, 2, 1):
        stub = Stub()
        sample(
            Denoiser(stub, schedule, "v"), schedule, Ddim(), z=randn(1, 2, 1, 1), num_steps=num_steps, noise=no_noise
        )
        told.append([timestep.item() for _, timestep, _ in stub.calls])
    size = schedule.label_scale
    assert told[0] == [k * size / 8 - 1 for k in range(8, 0, -1)]
    assert told[1:] == [told[0][::2], told[0][::4], told[0][::8]]


@every_schedule
@every_kind
@pytest.mark.parametrize("oracle", [gaussian, mixture], ids=["gaussian", "mixture"])
def test_a_perfect_network_of_any_type_is_the_perfect_denoiser(schedule, kind, oracle):
    """A network that knows only z and its timestep gives the closed-form x̂, ε̂ and v̂."""
    if kind == "eps" and schedule.zero_snr:
        pytest.skip("refused")
    perfect = oracle(schedule, c=0.5)

    def answer(z: Tensor, timestep: Tensor) -> Tensor:
        known = perfect(z, (timestep + 1) / schedule.label_scale)
        said = {"x": [known.x], "eps": [known.eps], "v": [known.v], "both": [known.x, known.eps]}
        return torch.cat(said[kind], dim=1)

    t = torch.tensor([0.1, 0.4, 0.95], dtype=torch.float64)
    z = randn(*Z_SHAPE)
    found, expected = Denoiser(Stub(kind, answer), schedule, kind)(z, t), perfect(z, t)
    for name in ("x", "eps", "v"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-8, atol=1e-8)


@every_kind
@every_schedule
def test_answers_of_low_precision_are_read_in_the_precision_of_z(schedule, kind):
    """Mixed precision ends at the network: a bfloat16 answer does not round z."""
    if kind == "eps" and schedule.zero_snr:
        pytest.skip("refused")
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    z, output = randn(*Z_SHAPE, dtype=torch.float32), randn(3, 4 if kind == "both" else 2, 3, 5).bfloat16()
    found = Denoiser(Stub(kind, lambda *_: output), schedule, kind)(z, t)
    assert {found.x.dtype, found.eps.dtype, found.v.dtype} == {torch.float32}
    angle = schedule.angle(t)
    again = column(angle.cos(), z) * found.x + column(angle.sin(), z) * found.eps
    torch.testing.assert_close(again, z, rtol=1e-5, atol=1e-5)


def test_at_t_0_v_prediction_is_read_at_the_clean_image():
    z = randn(*Z_SHAPE)
    found = Denoiser(Stub(answer=lambda z, _: z + 1), CosineSchedule(), "v")(z, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(found.x, z)
    assert torch.equal(found.eps, z + 1)


def test_gradients_reach_the_network():
    stub = Stub(answer=lambda z, _: stub.scale * z)
    stub.scale = nn.Parameter(torch.tensor(0.5))
    z, t = randn(*Z_SHAPE, dtype=torch.float32), torch.full((3,), 0.5, dtype=torch.float64)
    Denoiser(stub, CosineSchedule(), "v")(z, t).x.sum().backward()
    torch.testing.assert_close(stub.scale.grad, -(0.5**0.5) * z.sum(), rtol=1e-4, atol=1e-5)


def test_unknown_type_and_wrong_channels_are_refused():
    with pytest.raises(ValueError, match="unknown prediction type 'w', choose from v, x, eps, both"):
        Denoiser(Stub(), CosineSchedule(), "w")
    with pytest.raises(ValueError, match="both prediction needs 4 output channels, but the network has 2"):
        Denoiser(Stub("v"), CosineSchedule(), "both")
    with pytest.raises(ValueError, match="v prediction needs 2 output channels, but the network has 4"):
        Denoiser(Stub("both"), CosineSchedule(), "v")


def test_eps_prediction_with_zero_terminal_snr_is_refused():
    network = UNet(UNetConfig(channels=4, embedding_channels=8, multipliers=(1,), attention_strides=()))
    with pytest.raises(ValueError, match="eps prediction carries no information about the image at zero terminal SNR"):
        Denoiser(network, LinearSchedule(zero_snr=True), "eps")
    Denoiser(network, LinearSchedule(zero_snr=True), "v")
