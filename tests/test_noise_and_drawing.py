"""Images by number: each has its own noise, and looks the same whatever it is drawn with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from tests.oracles import randn
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.samplers import (
    SAMPLERS,
    Clipped,
    Ddim,
    Ddpm,
    Dpmpp2m,
    Dpmpp3m,
    Heun,
    Ipndm,
    Renoising,
    Sampler,
    UniPc,
)
from vdiff.diffusion.schedules import CosineSchedule, DdpmCosineSchedule
from vdiff.errors import VdiffError
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import classes_in_turn, draw, image_classes
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig

SHAPE = (3, 4, 4)
SIZE = 4


def noise(indices: Sequence[int], seed: int = 0, calls: int = 1) -> torch.Tensor:
    """What the last of `calls` draws."""
    source = ImageNoise(seed=seed, indices=indices, shape=SHAPE)
    return [source() for _ in range(calls)][-1]


# Noise


@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize("indices", [[0], [3, 1, 2], [7, 3], list(range(50)), [10**9, 3]])
def test_noise_of_an_image_is_the_same_in_every_batch(indices, calls):
    together = noise(indices, seed=5, calls=calls)
    assert together.shape == (len(indices), *SHAPE)
    assert together.dtype == torch.float32
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, noise([index], seed=5, calls=calls)[0])


def test_every_image_seed_and_call_has_noise_of_its_own():
    """Also where seed and number agree in their lower 32 bits, or are exchanged."""
    seeds = (0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1)
    indices = (0, 1, 2, 2**32, 2**32 + 1)
    drawn = {(s, k, c): noise([k], s, c)[0] for s, k, c in itertools.product(seeds, indices, (1, 2))}
    for (a, first), (b, second) in itertools.combinations(drawn.items(), 2):
        assert (first == second).sum() <= 1, (a, b)


def test_noise_is_the_same_on_every_machine():
    """Philox 4×64 with the key (seed, index): what was drawn once can be drawn again."""
    expected = [0.09969189, 0.66432607, -0.31522349, -1.08781111]
    assert noise([7], seed=2**40 + 3)[0].flatten()[:4].tolist() == pytest.approx(expected, abs=1e-7)
    stream = np.random.Generator(np.random.Philox(key=np.array([2**40 + 3, 7], np.uint64)))
    assert np.array_equal(noise([7], seed=2**40 + 3)[0], stream.standard_normal(SHAPE, dtype=np.float32))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_noise_is_standard_normal(seed):
    """Moments and distribution of 192 000 numbers, and no correlation of neighbours, images or calls."""
    source = ImageNoise(seed=seed, indices=range(2000), shape=SHAPE)
    first, second = source().double().flatten(1), source().double().flatten(1)
    for batch in (first, second):
        n = batch.numel()
        assert batch.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
        assert batch.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
        assert (batch**3).mean().item() == pytest.approx(0, abs=4 * math.sqrt(15 / n))
        assert (batch**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n))
        below = 0.5 * (1 + torch.erf(batch.flatten().sort().values / math.sqrt(2)))
        assert (below - torch.arange(n) / n).abs().max() < 1.95 / math.sqrt(n)
    pairs = {
        "calls": (first, second),
        "images": (first[:-1], first[1:]),
        "pixels": (first[:, :-1], first[:, 1:]),
    }
    for name, (a, b) in pairs.items():
        assert (a * b).mean().item() == pytest.approx(0, abs=4 / math.sqrt(a.numel())), name


def test_noise_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    noise([1, 2, 3])
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


# Drawing


def denoiser(schedule=None, *, classes: int = 0, channels: int = 3) -> Denoiser:
    """A network with random weights everywhere, and enough dropout to show if it is not switched off."""
    config = UNetConfig(
        channels, channels, channels=4, embedding_channels=8, multipliers=(1, 2), num_blocks=1, attention_strides=(2,),
        num_classes=classes, dropout=0.5,
    )  # fmt: skip
    model = Denoiser(UNet(config), schedule or CosineSchedule(), "v")
    for k, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.5 * randn(*parameter.shape, seed=k))
    return model


EVERY_SAMPLER: dict[str, Sampler] = {
    "ddim": Ddim(),
    "ddim_unclipped": Ddim(clipping_value=None),
    "ddim_eta": Ddim(eta=0.5),
    "ddpm": Ddpm(),
    "clipped": Clipped(),
    "clipped_eta": Clipped(eta=0.7),
    "dpmpp_2m": Dpmpp2m(),
    "dpmpp_3m_thresholded": Dpmpp3m(threshold=0.9),
    "unipc": UniPc(),
    "ipndm": Ipndm(),
    "heun": Heun(),
    "renoising": Renoising(renoise=0.5),
}
every_sampler = pytest.mark.parametrize("sampler", EVERY_SAMPLER.values(), ids=EVERY_SAMPLER)


def drawn(model: Denoiser, sampler: Sampler, indices: Sequence[int], **options) -> torch.Tensor:
    return draw(model, sampler, **{"indices": indices, "image_size": SIZE, "num_steps": 4, "seed": 11, **options})


@every_sampler
@pytest.mark.parametrize("classes", [0, 3])
def test_an_image_is_the_same_in_every_batch_and_order(sampler, classes):
    model = denoiser(classes=classes)
    together = drawn(model, sampler, range(7))
    assert together.shape == (7, 3, SIZE, SIZE)
    assert together.dtype == torch.float32
    for indices in ([6], [4, 0, 2], [5, 6, 1, 0, 3, 2, 4], list(range(7))):
        torch.testing.assert_close(drawn(model, sampler, indices), together[indices], rtol=0, atol=1e-5)
    differences = [(a - b).abs().max() for a, b in itertools.combinations(together, 2)]
    assert min(differences) > 0.05


@every_sampler
def test_seeds_and_steps_make_other_images(sampler):
    model = denoiser()
    images = drawn(model, sampler, [0])
    assert (drawn(model, sampler, [0], seed=12) - images).abs().max() > 0.05
    assert (drawn(model, sampler, [0], seed=11 + 2**32) - images).abs().max() > 0.05
    assert (drawn(model, sampler, [0], num_steps=2) - images).abs().max() > 1e-3


def test_every_sampler_is_drawn_with_here():
    assert {type(sampler) for sampler in EVERY_SAMPLER.values()} == {make().__class__ for make in SAMPLERS.values()}


def test_drawing_is_ddim_written_out():
    """z_s = α_s x̂ + σ_s ε̂ from the noise of the image at t = 1, with the network asked at t = i/N; the end is x̂."""
    model, schedule = denoiser(DdpmCosineSchedule(num_levels=8)).eval(), DdpmCosineSchedule(num_levels=8)
    z = noise([4], seed=11)
    kept = [1.0]
    for beta in schedule.betas():
        kept.append(kept[-1] * (1 - beta))
    for i in (8, 6, 4, 2):
        with torch.no_grad():
            x = model(z, torch.tensor([i / 8], dtype=torch.float64)).x
        eps = (z - math.sqrt(kept[i]) * x) / math.sqrt(1 - kept[i])
        z = math.sqrt(kept[i - 2]) * x + math.sqrt(1 - kept[i - 2]) * eps
    torch.testing.assert_close(drawn(model, Ddim(clipping_value=None), [4]), z, rtol=1e-4, atol=1e-4)


def test_classes_are_taken_in_turn():
    assert image_classes(range(7), [4, 1, 3]).tolist() == [4, 1, 3, 4, 1, 3, 4]
    assert image_classes([5, 0, 10**6], range(4)).tolist() == [1, 0, 0]
    assert image_classes([3], [2]).dtype == torch.int64


def test_images_take_their_classes_in_turn():
    """Image k of all classes is image k of the class k mod n alone."""
    model = denoiser(classes=3)

    def of(indices: Sequence[int], *choices: int) -> torch.Tensor:
        return drawn(model, Ddim(), indices, conditions=partial(classes_in_turn, choices=choices))

    together = drawn(model, Ddim(), range(6))
    assert torch.equal(of(range(6), 0, 1, 2), together)
    for k in range(6):
        torch.testing.assert_close(of([k], k % 3)[0], together[k], rtol=0, atol=1e-5)
        assert (of([k], (k + 1) % 3)[0] - together[k]).abs().max() > 1e-3
    torch.testing.assert_close(of(range(4), 2, 0)[1], of([1], 0)[0], rtol=0, atol=1e-5)


def test_steps_are_told():
    told: list[int] = []
    drawn(denoiser(), Ddim(), [0, 1], num_steps=5, on_step=told.append)
    assert told == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_drawing_and_the_mode_comes_back(training):
    model = denoiser().train(training)
    torch.manual_seed(0)
    first = drawn(model, Ddim(), [0, 1])
    torch.manual_seed(1)
    assert torch.equal(drawn(model, Ddim(), [0, 1]), first)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Broken(torch.nn.Module):
    """Lets a network answer NaN or infinity from its n-th evaluation on."""

    def __init__(self, value: float, at: int) -> None:
        super().__init__()
        self.value, self.at, self.calls = value, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.value if self.calls >= self.at else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "at"),
    [
        ("ddim", math.nan, 1),
        ("ddim", math.nan, 3),
        ("clipped", math.nan, 4),
        ("ddpm", math.nan, 2),
        ("ddim_unclipped", math.inf, 2),  # what clips makes numbers of infinities
    ],
)
def test_a_network_that_is_not_finite_draws_nothing(training, name, value, at):
    model = denoiser().train(training)
    model.network.conv_out = torch.nn.Sequential(model.network.conv_out, Broken(value, at))
    with pytest.raises(VdiffError) as caught:
        drawn(model, EVERY_SAMPLER[name], [0, 1])
    assert str(caught.value) == (
        f"the model draws no sample: step {at} of 4 produced non-finite values in torch.float32; "
        "use an earlier checkpoint, or train with a lower --lr"
    )
    assert model.training is training


def test_a_number_of_steps_that_a_table_lacks():
    model = denoiser(DdpmCosineSchedule(num_levels=8)).train()
    with pytest.raises(ValueError, match="8 levels, too few for 9 steps"):
        drawn(model, Ddim(), [0], num_steps=9)
    assert model.training
