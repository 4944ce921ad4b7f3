"""Classes: leaving them out in training, "no class" in the network, and guidance away from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import ALL_SCHEDULES, Z_SHAPE, column, condition, randn
from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.diffusion.targets import progressive_target
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.drawing import draw
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig

MEANS = torch.tensor([-0.8, 0.1, 0.7, 0.05], dtype=torch.float64)
SPREADS = torch.tensor([0.2, 0.3, 0.1, 0.6], dtype=torch.float64)
"""Of three classes of pixels N(mean, spread²), and of "no class"."""
NONE = 3

SMALL = {"channels": 8, "embedding_channels": 12, "multipliers": (1, 2), "num_blocks": 1, "attention_strides": ()}
TIMES = torch.tensor([0.1, 0.4, 0.95], dtype=torch.float64)
CLASSES = torch.tensor([2, 0, 1])


def truth(schedule, z: Tensor, t: Tensor, classes: Tensor) -> Prediction:
    """The perfect denoiser of each image's class: x̂ = μ + α c² (z − α μ)/d, ε̂ = σ (z − α μ)/d, d = α²c² + σ²."""
    angle = schedule.angle(t)
    alpha, sigma, mean, variance = (
        column(k, z) for k in (angle.cos(), angle.sin(), MEANS[classes], SPREADS[classes] ** 2)
    )
    share = (z - alpha * mean) / (alpha**2 * variance + sigma**2)
    x, eps = mean + alpha * variance * share, sigma * share
    return Prediction(x, eps, alpha * eps - sigma * x)


class Perfect(nn.Module):
    """A network that answers `truth` in the words of its prediction type, and remembers what it was asked."""

    def __init__(self, schedule, kind: str, *, null_class: bool = True) -> None:
        super().__init__()
        factor = PREDICTION_TYPES[kind].channel_factor
        self.signature = UNetConfig(2, 2 * factor, num_classes=NONE, null_class=null_class).signature
        self.schedule, self.kind = schedule, kind
        self.calls: list[list[int] | None] = []

    def forward(self, z: Tensor, timestep: Tensor, classes: Tensor | None = None) -> Tensor:
        self.calls.append(None if classes is None else classes.tolist())
        classes = torch.full((len(z),), NONE) if classes is None else classes
        known = truth(self.schedule, z, (timestep + 1) / self.schedule.label_scale, classes)
        said = {"x": [known.x], "eps": [known.eps], "v": [known.v], "both": [known.x, known.eps]}
        return torch.cat(said[self.kind], dim=1)


def guided(kind: str = "v", *, schedule=None, **options) -> GuidedDenoiser:
    schedule = schedule or CosineSchedule()
    return GuidedDenoiser(Denoiser(Perfect(schedule, kind), schedule, kind), **options)


def small_network(**options) -> UNet:
    """A network without zeros in it."""
    network = UNet(UNetConfig(**SMALL, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


# Leaving classes out


def dropped(classes: Tensor, u: Tensor, rate: float, none: int) -> Tensor:
    """The classes, and the null of number `none` where u < `rate`."""
    return Condition({"classes": classes}, {"classes": none}).drop(u < rate).tensors["classes"]


def test_a_class_is_left_out_where_u_is_below_the_rate():
    classes, u = torch.tensor([0, 1, 2, 3, 4, 1]), torch.tensor([0.0, 0.0999, 0.1, 0.5, 0.999, 0.05])
    assert dropped(classes, u, 0.1, 5).tolist() == [5, 5, 2, 3, 4, 5]
    assert dropped(classes, u, 0.0, 5).tolist() == classes.tolist()
    assert dropped(classes, u, 1.0, 5).tolist() == [5] * 6


def test_leaving_out_is_a_pure_function():
    """Of its arguments, which it does not change; it draws nothing, and keeps the type of the classes."""
    classes, u = torch.arange(8), torch.linspace(0, 0.99, 8, dtype=torch.float64)
    kept, state = (classes.clone(), u.clone()), torch.get_rng_state()
    results = [dropped(classes, u, 0.4, 8) for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(classes, kept[0])
    assert torch.equal(u, kept[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert [dropped(classes.to(kind), u, 0.4, 8).dtype for kind in (torch.int32, torch.int64)] == [
        torch.int32,
        torch.int64,
    ]


def test_leaving_out_never_waits_for_the_device():
    """Meta tensors have no values that the host could ask for."""
    found = dropped(torch.zeros(4, dtype=torch.int64, device="meta"), torch.rand(4, device="meta"), 0.1, 7)
    assert (found.shape, found.dtype, found.device.type) == ((4,), torch.int64, "meta")


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_left_out_is_the_rate_in_every_class(rate):
    generator, count = torch.Generator().manual_seed(0), 60_000
    classes = torch.randint(4, (count,), generator=generator)
    values = classes.double() + torch.rand(count, generator=generator, dtype=torch.float64)
    found = dropped(classes, torch.rand(count, generator=generator), rate, 4)
    assert set((found - classes)[found < 4].tolist()) == {0}
    for k in range(4):
        of_class = found[classes == k]
        share = (of_class == 4).double().mean().item()
        assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(of_class)))
    # the least-squares answer of "no class" is then the mean of all data, that of a class its own mean
    assert values[found == 4].mean().item() == pytest.approx(values.mean().item(), abs=0.08)
    assert values[found == 2].mean().item() == pytest.approx(2.5, abs=0.02)


# "No class" in the network


def test_no_class_has_a_row_of_its_own_behind_the_classes():
    assert small_network(num_classes=3).embed_class.weight.shape == (3, 12)
    assert small_network(num_classes=3, null_class=True).embed_class.weight.shape == (4, 12)
    assert small_network().embed_class is None


def test_a_network_is_told_no_class_where_it_is_given_none():
    network = small_network(num_classes=3, null_class=True)
    z, timestep = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0])
    without = network(z, timestep)
    assert torch.equal(without, network(z, timestep, torch.tensor([3, 3])))
    for k in range(3):
        assert (without - network(z, timestep, torch.tensor([k, k]))).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    with pytest.raises(ValueError, match="needs classes, 0 to 2"):
        small_network(num_classes=3)(z, timestep)


@pytest.mark.parametrize(("classes", "rows"), [([0, 2], {0, 2}), ([1, 3], {1, 3}), (None, {3})])
def test_gradients_reach_the_rows_that_were_told(classes, rows):
    network = small_network(num_classes=3, null_class=True)
    told = None if classes is None else torch.tensor(classes)
    network(randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0]), told).square().sum().backward()
    touched = network.embed_class.weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) == rows


def test_the_row_of_no_class_changes_no_class():
    """The first rows of a network with the extra row are the network without it."""
    plain, wide = small_network(num_classes=3), small_network(num_classes=3, null_class=True)
    weights = plain.state_dict()
    rows = torch.cat([weights["embed_class.weight"], torch.full((1, 12), 9.0)])
    wide.load_state_dict(weights | {"embed_class.weight": rows})
    arguments = randn(3, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 500.0, 1.0]), torch.tensor([2, 0, 1])
    assert torch.equal(plain(*arguments), wide(*arguments))


def test_descriptions_without_the_key_have_no_such_class():
    values = UNetConfig(num_classes=3).to_dict()
    del values["null_class"], values["fold"]
    assert UNetConfig.from_dict(values) == UNetConfig(num_classes=3, null_class=False, fold=1)
    config = UNetConfig(num_classes=3, null_class=True)
    assert UNetConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="null_class needs classes, but num_classes is 0"):
        UNetConfig(null_class=True)


# Guidance


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("weight", [-1.0, -0.3, 0.0, 0.5, 4.0])
def test_guidance_is_the_same_sum_of_images_noises_and_velocities(schedule, kind, weight):
    """Whatever the network predicts, and from closed forms that never pass through one another."""
    if kind == "eps" and schedule.zero_snr:
        pytest.skip("eps carries no information at zero SNR: refused")
    z = randn(*Z_SHAPE)
    found = guided(kind, schedule=schedule, weight=weight)(z, TIMES, condition(CLASSES))
    with_class = truth(schedule, z, TIMES, CLASSES)
    without = truth(schedule, z, TIMES, torch.full((3,), NONE))
    for name in ("x", "eps", "v"):
        expected = (1 + weight) * getattr(with_class, name) - weight * getattr(without, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-6, atol=1e-7)
    angle = schedule.angle(TIMES)
    again = column(angle.cos(), z) * found.x + column(angle.sin(), z) * found.eps
    torch.testing.assert_close(again, z, rtol=1e-12, atol=1e-12)


def test_guidance_leads_away_from_no_class():
    """One number by hand: at t = 1 the image is the mean, so x̂ = (1 + w) μ_c − w μ_∅."""
    schedule = ALL_SCHEDULES["cosine_uncut"]
    t = torch.ones(3, dtype=torch.float64)
    x = guided(schedule=schedule, weight=2.0)(randn(*Z_SHAPE), t, condition(CLASSES)).x
    expected = [3 * 0.7 - 2 * 0.05, 3 * -0.8 - 2 * 0.05, 3 * 0.1 - 2 * 0.05]
    torch.testing.assert_close(x, column(torch.tensor(expected), x).expand_as(x).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_weights_0_and_minus_1_are_the_plain_answers(kind):
    z = randn(*Z_SHAPE)
    plain = guided(kind, weight=0.0)
    denoiser = Denoiser(plain.network, plain.schedule, kind)
    for name in ("x", "eps", "v"):
        assert torch.equal(
            getattr(plain(z, TIMES, condition(CLASSES)), name), getattr(denoiser(z, TIMES, condition(CLASSES)), name)
        )
        found = getattr(guided(kind, weight=-1.0)(z, TIMES, condition(CLASSES)), name)
        torch.testing.assert_close(found, getattr(denoiser(z, TIMES), name), rtol=1e-8, atol=1e-8)


def test_both_answers_come_from_one_batch():
    found = guided(weight=1.5)
    found(randn(*Z_SHAPE), TIMES, condition(CLASSES))
    assert found.network.calls == [[2, 0, 1, 3, 3, 3]]


def test_without_need_the_network_is_asked_once_for_each_image():
    """At weight 0, without classes, and at times that are not guided."""
    plain = guided(weight=0.0)
    plain(randn(*Z_SHAPE), TIMES, condition(CLASSES))
    unconditional = guided(weight=2.0)
    unconditional(randn(*Z_SHAPE), TIMES)
    elsewhere = guided(weight=2.0, interval=(0.5, 0.9))
    elsewhere(randn(*Z_SHAPE), TIMES, condition(CLASSES))
    assert [found.network.calls for found in (plain, unconditional, elsewhere)] == [[[2, 0, 1]], [None], [[2, 0, 1]]]


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 1.0), [True, True, True]),
        ((0.2, 0.5), [False, True, False]),
        ((0.1, 0.4), [True, True, False]),
        ((0.4, 0.95), [False, True, True]),
        ((0.4, 0.4), [False, True, False]),
        ((0.5, 0.6), [False, False, False]),
    ],
)
def test_guidance_acts_within_its_interval(interval, inside):
    z = randn(*Z_SHAPE)
    found = guided(weight=2.0, interval=interval)(z, TIMES, condition(CLASSES))
    full, plain = guided(weight=2.0)(z, TIMES, condition(CLASSES)), guided(weight=0.0)(z, TIMES, condition(CLASSES))
    for i, is_guided in enumerate(inside):
        for name in ("x", "eps", "v"):
            expected = getattr(full if is_guided else plain, name)[i]
            torch.testing.assert_close(getattr(found, name)[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("times_on", ["cpu", "meta"])
def test_guidance_never_waits_for_the_device(times_on):
    """Images without values on the device; times on the host, as samplers have them, or beside them, as training."""
    with torch.device("meta"):
        network = UNet(UNetConfig(**SMALL, num_classes=3, null_class=True))
        z, classes = torch.empty(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64)
    found = GuidedDenoiser(Denoiser(network, CosineSchedule(), "v"), 1.0, (0.2, 0.5))(
        z, TIMES.to(times_on), condition(classes)
    )
    assert (found.x.shape, found.x.device.type) == ((3, 3, 4, 4), "meta")


def test_guidance_keeps_the_precision_of_the_images():
    for dtype in (torch.float32, torch.float64):
        found = guided(weight=0.7)(randn(*Z_SHAPE, dtype=dtype), TIMES, condition(CLASSES))
        assert {found.x.dtype, found.eps.dtype, found.v.dtype} == {dtype}


def test_a_guided_denoiser_is_the_denoiser_with_the_same_weights():
    denoiser = Denoiser(small_network(num_classes=3, null_class=True), CosineSchedule(), "v")
    found = GuidedDenoiser(denoiser, 1.0)
    assert list(found.state_dict()) == list(denoiser.state_dict())
    assert all(a is b for a, b in zip(found.parameters(), denoiser.parameters(), strict=True))


def test_guided_images_are_drawn_like_others():
    denoiser = Denoiser(small_network(num_classes=3, null_class=True), CosineSchedule(), "v")
    options = {"indices": range(4), "image_size": 4, "num_steps": 2}
    plain = draw(denoiser, Ddim(), **options)
    assert torch.equal(draw(GuidedDenoiser(denoiser, 0.0), Ddim(), **options), plain)
    images = draw(GuidedDenoiser(denoiser, 3.0), Ddim(), **options)
    assert images.isfinite().all()
    assert (images - plain).abs().max() > 1e-3


def test_images_may_have_weights_of_their_own():
    z, weights = randn(*Z_SHAPE), torch.tensor([0.0, 1.5, 4.0], dtype=torch.float64)
    found = guided(weight=9.0)(z, TIMES, condition(CLASSES, weights))
    for i, weight in enumerate(weights.tolist()):
        expected = guided(weight=weight)(z, TIMES, condition(CLASSES))
        for name in ("x", "eps", "v"):
            torch.testing.assert_close(getattr(found, name)[i], getattr(expected, name)[i], rtol=1e-9, atol=1e-9)


def test_a_network_that_takes_the_weight_begins_without_heed_and_can_learn_it():
    """So a student that copies its teacher's weights begins as its teacher, for every w."""
    network = small_network(num_classes=3, null_class=True, guidance_input=True)
    torch.nn.init.zeros_(network.embed_guidance[-1].weight)
    torch.nn.init.zeros_(network.embed_guidance[-1].bias)
    z, labels = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([3.0, 700.0])
    classes = torch.tensor([0, 2])
    plain = network(z, labels, classes)
    assert torch.equal(network(z, labels, classes, torch.tensor([0.0, 4.0])), plain)
    torch.nn.init.ones_(network.embed_guidance[-1].weight)
    told = network(z, labels, classes, torch.tensor([0.0, 4.0]))
    assert torch.equal(network(z, labels, classes, torch.tensor([0.0, 0.0]))[0], told[0])
    assert (network(z, labels, classes)[1] - told[1]).abs().max() > 1e-4
    assert (network(z, labels, classes, torch.tensor([0.0, 3.9]))[1] - told[1]).abs().max() > 1e-5


def test_images_are_drawn_with_the_weight_as_an_input_or_by_two_answers():
    options = {"indices": range(3), "image_size": 4, "num_steps": 2, "guidance": 2.5}
    plain = Denoiser(small_network(num_classes=3, null_class=True), CosineSchedule(), "v")
    expected = draw(GuidedDenoiser(plain, 2.5), Ddim(), **{**options, "guidance": 0.0})
    assert torch.equal(draw(plain, Ddim(), **options), expected)
    taught = Denoiser(small_network(num_classes=3, null_class=True, guidance_input=True), CosineSchedule(), "v")
    torch.nn.init.ones_(taught.network.embed_guidance[-1].weight)
    asked = []
    taught.register_forward_pre_hook(lambda _, args: asked.append(args[2].tensors["guidance"]))
    draw(taught, Ddim(), **options)
    assert [weights.tolist() for weights in asked] == [[2.5] * 3] * 2


def test_a_guided_teacher_is_one_whose_answers_are_guided():
    """The target of distillation of the guided answers, made by hand for data of closed form."""
    schedule, weight = CosineSchedule(), 1.5
    z, t = randn(*Z_SHAPE), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)

    def by_hand(z: Tensor, t: Tensor) -> Prediction:
        parts = truth(schedule, z, t, CLASSES), truth(schedule, z, t, torch.full((3,), NONE))
        return Prediction(
            *((1 + weight) * getattr(parts[0], k) - weight * getattr(parts[1], k) for k in ("x", "eps", "v"))
        )

    teacher = guided(weight=weight)
    found = progressive_target(lambda z, t: teacher(z, t, condition(CLASSES)), schedule, z=z, t=t, num_steps=4)
    expected = progressive_target(by_hand, schedule, z=z, t=t, num_steps=4)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)


def test_guidance_that_cannot_be_is_refused():
    schedule = CosineSchedule()
    with pytest.raises(ValueError, match=r"trained with class dropout \(null_class\)"):
        GuidedDenoiser(Denoiser(Perfect(schedule, "v", null_class=False), schedule, "v"), 1.0)
    for interval in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="must increase within 0 to 1"):
            guided(weight=1.0, interval=interval)
