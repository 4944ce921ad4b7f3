"""`vdiff.load`: the images of `sample.py` and the predictions of the network, in Python."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import vdiff
from tests.commands import ROOT
from tests.drawing import run, spec, write_guided
from tests.oracles import condition, randn
from tests.toy import SIZE, write_checkpoint
from vdiff.api import Model
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.samplers import Clipped, Ddim
from vdiff.errors import OptionError, VdiffError
from vdiff.models.denoiser import GuidedDenoiser
from vdiff.models.drawing import classes_in_turn, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "plain", channels=3)
    write_guided(root / "classes")
    write_guided(root / "taught", told=True)
    write_checkpoint(root / "student", channels=3, method="progressive")
    return root


@pytest.fixture(scope="module")
def plain(folder: Path) -> Model:
    return vdiff.load(folder / "plain")


@pytest.fixture(scope="module")
def classes(folder: Path) -> Model:
    return vdiff.load(str(folder / "classes"), device="cpu")


def test_importing_vdiff_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'vdiff.api'} & {*sys.modules}"
    code = f"import sys, vdiff; print({heavy}, vdiff.load.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() vdiff.api"


def test_a_model_says_what_it_is(plain):
    assert plain.config.num_timesteps == 8
    assert plain.shape == (3, SIZE, SIZE)
    assert repr(plain) == "<vdiff model: base, 8 steps, (3, 4, 4), on cpu>"


def test_images_are_those_that_sample_draws(plain, folder, tmp_path):
    images = plain.sample(7, steps=4, seed=3)
    assert (images.shape, images.dtype, images.device.type) == ((7, 3, SIZE, SIZE), torch.float32, "cpu")
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert float(plain.sample(7, sampler="clipped").abs().max()) == 1  # which goes to ±1.2
    run(spec(folder / "plain"), tmp_path / "out.npz", form="npz")
    found = np.load(tmp_path / "out.npz")["arr_0"]
    assert np.abs((images.permute(0, 2, 3, 1).numpy() + 1) * 127.5 - found).max() <= 0.501
    assert plain.sample(num=2).shape == (2, 3, SIZE, SIZE)
    assert plain.sample().shape == (16, 3, SIZE, SIZE)
    expected = draw(plain.denoiser, Ddim(), indices=range(2), image_size=SIZE, num_steps=8)
    assert torch.equal(plain.sample(2), expected.clamp(-1, 1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_images_do_not_depend_on_the_batch(plain, sampler):
    together = plain.sample(5, sampler=sampler)
    torch.testing.assert_close(plain.sample(5, sampler=sampler, batch_size=2), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.sample(3, sampler=sampler), together[:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_given_noise_takes_the_place_of_the_seeds(plain, sampler):
    """The seed's own noise gives the seed's images, also by samplers that add more of it."""
    noise = ImageNoise(seed=9, indices=range(5), shape=plain.shape)()
    usual = plain.sample(5, seed=9, sampler=sampler)
    torch.testing.assert_close(
        plain.sample(seed=9, noise=noise, sampler=sampler, batch_size=2), usual, rtol=0, atol=1e-5
    )
    assert (plain.sample(noise=-noise, seed=9, sampler=sampler) - usual).abs().max() > 0.02
    assert torch.equal(plain.sample(noise=noise.double(), seed=9, sampler=sampler), usual)


def test_samplers_and_their_options(plain):
    expected = draw(
        plain.denoiser, Clipped(clipping_value=0.7, eta=0.5), indices=range(3), image_size=SIZE, num_steps=8
    )
    assert torch.equal(plain.sample(3, sampler="clipped", clipping_value=0.7, eta=0.5), expected)
    assert torch.equal(plain.sample(3, sampler=Clipped(clipping_value=0.7, eta=0.5)), expected)
    expected = draw(plain.denoiser, Ddim(), indices=range(3), image_size=SIZE, num_steps=6, grid="karras")
    assert torch.equal(plain.sample(3, steps=6, grid="karras"), expected.clamp(-1, 1))


def test_classes_and_guidance(classes):
    denoiser = classes.denoiser
    options = {"indices": range(4), "image_size": SIZE, "num_steps": 8}
    options["conditions"] = partial(classes_in_turn, choices=[2, 0])
    named = classes.sample(4, classes=["owl", 0])
    assert torch.equal(named, draw(denoiser, Ddim(), **options).clamp(-1, 1))
    guided = draw(GuidedDenoiser(denoiser, 2.0, (0.3, 0.8)), Ddim(), **options).clamp(-1, 1)
    assert torch.equal(classes.sample(4, classes=["owl", 0], guidance=2.0, guidance_interval=(0.3, 0.8)), guided)
    assert (guided - named).abs().max() > 1e-3
    assert (classes.sample(4, guidance=2.0) - guided).abs().max() > 1e-3


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.1, 0.5, 1.0])])
def test_denoising_is_asking_the_denoiser(plain, classes, t):
    times = torch.as_tensor(t, dtype=torch.float64).expand(3)
    z = randn(3, 3, SIZE, SIZE, dtype=torch.float32)
    found, expected = plain.denoise(z, t), plain.denoiser(z, times)
    for name in ("x", "eps", "v"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert not getattr(found, name).requires_grad
    z, labels = z[:, :1], torch.tensor([2, 0, 2])
    guided = GuidedDenoiser(classes.denoiser, 1.5)(z, times, condition(labels))
    assert torch.equal(classes.denoise(z, t, classes=["owl", "cat"], guidance=1.5).x, guided.x)


def test_a_network_that_was_taught_guidance_is_told_it(folder):
    model = vdiff.load(folder / "taught")
    z = randn(2, 1, SIZE, SIZE, dtype=torch.float32)
    told = model.denoise(z, 0.5, guidance=3.0).v
    expected = model.denoiser(
        z, torch.full((2,), 0.5, dtype=torch.float64), condition(torch.tensor([0, 1]), torch.full((2,), 3.0))
    ).v
    assert torch.equal(told, expected.detach())
    assert (told - model.denoise(z, 0.5).v).abs().max() > 1e-4
    with pytest.raises(VdiffError, match="this model supports weights 0 to 4, not 5"):
        model.sample(1, guidance=5)
    with pytest.raises(VdiffError, match="distilled with guidance at all times; leave it out"):
        model.sample(1, guidance=1, guidance_interval=(0.1, 0.5))


def test_answers_are_tensors_like_others(plain):
    """Not bound to inference mode: gradients may be computed with them."""
    images = plain.sample(1).requires_grad_()
    images.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))
    assert not plain.denoise(images.detach(), 0.5).x.is_inference()


def test_images_in_double_precision_are_denoised_like_others(plain):
    z = randn(2, 3, SIZE, SIZE, dtype=torch.float32)
    assert torch.equal(plain.denoise(z.double(), 0.5).x, plain.denoise(z, 0.5).x)


def test_what_cannot_be_is_refused(plain, classes, folder):
    student = vdiff.load(folder / "student")
    for call, words in [
        (lambda: plain.sample(1, sampler="dimm"), "unknown sampler 'dimm'; did you mean 'ddim'?"),
        (lambda: plain.sample(1, sampler="ddpm", eta=1.0), "the sampler ddpm does not use eta; it takes clip"),
        (
            lambda: plain.sample(1, clipping_value=-1.0),
            "clipping_value must be a positive number, got -1.0; give another",
        ),
        (lambda: plain.sample(1, classes=[0]), "this model has no classes; leave it out"),
        (lambda: classes.sample(1, classes=["cow"]), "unknown class 'cow'; did you mean 'owl'?"),
        (lambda: classes.sample(1, classes=[]), "no class is given; choose from cat, dog, owl"),
        (lambda: classes.sample(1, classes=[-1]), "unknown class '-1'; choose from cat, dog, owl"),
        (lambda: plain.sample(1, guidance=1.0), "this model cannot predict without a class; leave it out, or train"),
        (lambda: classes.sample(1, guidance=float("nan")), "nan is not a guidance weight; "),
        (lambda: classes.sample(1, guidance_interval=(0.1, 0.2)), "it has no effect without guidance; "),
        (lambda: classes.sample(1, guidance=1, guidance_interval=(0.9, 0.2)), "0.9,0.2 are not two increasing times"),
        (lambda: plain.sample(1, grid="log"), "unknown grid 'log'"),
        (
            lambda: student.sample(1, grid="logsnr"),
            "this model was distilled for 8 uniform steps and supports no other",
        ),
        (lambda: student.sample(1, steps=3), "this model was made for 8 steps, and 3 does not divide them; give a num"),
        (lambda: plain.sample(1, steps=0), "num_steps must be at least 1, got 0"),
        (lambda: plain.sample(1, sampler=None), "None is not a sampler; choose from ddim"),
        (lambda: vdiff.load(folder / "plain", device="gpu"), "unknown device 'gpu'; did you mean 'cpu'?"),
        (lambda: vdiff.load(folder / "plain", precision="fp8"), "unknown precision 'fp8'; choose from auto, fp32"),
        (lambda: vdiff.load(folder / "nowhere"), "no such checkpoint; "),
    ]:
        with pytest.raises(VdiffError) as caught:
            call()
        assert words in str(caught.value)
        assert caught.value.hint
    for call, words in [
        (lambda: plain.sample(0), "at least one image"),
        (lambda: plain.sample(1, batch_size=0), "one in a batch"),
        (lambda: plain.sample(2, noise=torch.zeros(3, 3, 4, 4)), r"noise of shape \(3, 3, 4, 4\); need \(2, 3, 4, 4\)"),
        (lambda: plain.sample(1, noise=[1]), r"noise is a list; need a tensor \(num, 3, 4, 4\)"),
        (lambda: plain.sample(1, seed=-1), r"seed = -1; need a whole number from 0 to 2\*\*64 - 1"),
        (lambda: plain.sample(1, seed=2**64), "need a whole number from 0"),
        (lambda: plain.sample(1, sampler=Ddim(), eta=1.0), "set eta in the sampler itself"),
        (lambda: plain.denoise(torch.zeros(3, 4, 4), 0.5), r"z of shape \(3, 4, 4\); need \(B, 3, 4, 4\)"),
        (lambda: plain.denoise(torch.zeros(2, 3, 4, 4), torch.ones(3)), "need one number or 2"),
        (lambda: plain.denoise(torch.zeros(1, 3, 4, 4), 0.0), r"times lie in \(0, 1\], got 0.0"),
        (lambda: plain.denoise(torch.zeros(1, 3, 4, 4), float("nan")), r"times lie in \(0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


# Precision and compilation


def test_half_precision_draws_nearly_the_same(folder, plain):
    half = vdiff.load(folder / "plain", precision="bf16")
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    images, exact = half.sample(8), plain.sample(8)
    assert images.dtype == torch.float32
    assert 1e-4 < (images - exact).abs().max() < 0.1
    with pytest.raises(OptionError, match="--precision fp16 needs a GPU; give --precision bf16 or fp32"):
        vdiff.load(folder / "plain", device="cpu", precision="fp16")


def test_half_precision_is_told_the_exact_time(folder):
    """Labels of 1024 steps are no numbers of bfloat16, which has 8 bits: they are embedded before they are rounded."""
    half = vdiff.load(folder / "plain", precision="bf16").denoiser
    z = randn(1, 3, SIZE, SIZE, dtype=torch.float32).expand(2, -1, -1, -1)
    v = half(z, torch.tensor([0.9, 0.9 + 1 / 1024], dtype=torch.float64)).v
    assert (v[0] - v[1]).abs().max() > 0


def test_a_half_precise_network_that_overflows_says_so(folder):
    model = vdiff.load(folder / "plain", precision="bf16")
    model.denoiser.network.network.conv_out.weight.data.fill_(float("inf"))
    with pytest.raises(VdiffError) as caught:
        model.sample(1)
    assert str(caught.value) == (
        "the model draws no sample: step 1 of 8 produced non-finite values in torch.float32, "
        "the network in torch.bfloat16; give --precision fp32"
    )


def test_evaluations_are_counted(folder):
    model = vdiff.load(folder / "classes")
    for options, expected in [
        ({}, 8), ({"sampler": "heun"}, 15), ({"guidance": 1.0}, 16),
        ({"guidance": 1.0, "guidance_interval": (0.3, 0.8)}, 8 + 4),
    ]:  # fmt: skip
        model.denoiser.network.evaluations = 0
        model.sample(3, **options)
        assert model.denoiser.network.evaluations == 3 * expected


def test_a_compiled_network_draws_the_same(folder, plain, monkeypatch):
    """Compiled in the manner that CUDA needs too: told of each step, its answers kept beyond the next one."""
    asked = []

    def compile_network(self, **options):
        asked.append(options)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch.nn.Module, "compile", compile_network)
    compiled = vdiff.load(folder / "plain", compiled=True)
    torch.testing.assert_close(compiled.sample(3), plain.sample(3), rtol=0, atol=1e-5)
    assert asked == [{"dynamic": False, "mode": None}]


def test_what_cannot_be_compiled_is_said_in_one_line(folder, monkeypatch):
    def broken(graph, inputs):
        del graph, inputs
        raise RuntimeError("no compiler\nat all")

    def compile_network(self, **options):
        del options
        self._compiled_call_impl = torch.compile(self._call_impl, backend=broken)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_network)
    with pytest.raises(VdiffError, match=r"the network cannot be compiled here: .*; leave --compile out") as caught:
        vdiff.load(folder / "plain", compiled=True).sample(1)
    assert "\n" not in str(caught.value)
    torch._dynamo.reset()


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_answers_outlive_the_replay_of_a_graph(tmp_path, monkeypatch, prediction):
    """A graph answers in the same memory every time, and a multistep sampler remembers answers: they are copied."""
    write_checkpoint(tmp_path, channels=3, prediction=prediction)
    plain, model = vdiff.load(tmp_path), vdiff.load(tmp_path)
    fast = model.denoiser.network
    memory, marks = {}, []
    real = fast.network.forward

    def replay(*args):
        output = real(*args)
        return memory.setdefault(output.shape, torch.empty_like(output)).copy_(output)

    monkeypatch.setattr(fast.network, "forward", replay)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    fast.is_graph = True
    expected = plain.sample(3, sampler="dpmpp_3m")
    assert torch.equal(model.sample(3, sampler="dpmpp_3m"), expected)
    assert len(marks) == 8


def test_the_lines_in_the_readme_run(folder):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## In Python\n")[2].partition("\n## ")[0].splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))
    names = {"z": randn(2, 3, SIZE, SIZE, dtype=torch.float32)}
    exec(code.replace("checkpoints/base_5", str(folder / "plain")), names)
    assert names["images"].shape == (16, 3, SIZE, SIZE)
    assert names["prediction"].x.shape == names["z"].shape
