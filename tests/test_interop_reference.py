"""Checkpoints of the v-diffusion repositories: imported, they draw the images that their own network and sampler draw.

The oracle is `tests/reference_network.py`, which shares no code with what is tested.
"""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.commands import done, error
from tests.oracles import no_noise
from tests.reference_network import Shape, alpha_bars, clipped_sampling, save
from tests.toy import SIZE, contents, write_checkpoint, write_dataset
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.samplers import Clipped, sample
from vdiff.diffusion.schedules import build_schedule, grid_times
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.reference import import_reference
from vdiff.models.checkpoint import load_checkpoint, read_config

SHAPES = {
    "one head": Shape(),
    "affine time": Shape(affine=True, multipliers=(2, 1)),
    "four heads at several strides": Shape(attn_heads=4, attn_strides=(1, 2)),
    "three levels": Shape(12, (1, 2, 3), n_res_blocks=2, attn_strides=(1, 4), attn_heads=3, affine=True),
    "folded": Shape(fold=2, affine=True, attn_heads=2),
    "folded, no attention but in the middle": Shape(fold=2, multipliers=(1, 2, 1), attn_strides=()),
    "grey": Shape(image_channels=1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
STEPS = [(16, 1), (8, 128), (4, 3), (1, 1024)]
TINY = Shape(4, (1, 2), affine=True, attn_heads=2, image_channels=1)
"""For the pictures of 4 × 4 pixels of `tests.toy`."""


def imported(folder: Path, shape: Shape, *, num_steps: int = 8, time_scale: int = 1, order: str = "bgr"):
    """Their weights, and our denoiser made from them."""
    weights = save(folder / "checkpoint.pt", shape, n_timesteps=num_steps, time_scale=time_scale)
    import_reference(
        folder / "checkpoint.pt",
        folder / "out",
        image_size=8,
        attention_heads=shape.attn_heads,
        channel_order=order,
    )
    return weights, load_checkpoint(folder / "out")[0]


def images_of(denoiser, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    with torch.no_grad():
        return sample(denoiser, denoiser.schedule, Clipped(), z=noise, num_steps=num_steps, noise=no_noise)


@every_shape
@pytest.mark.parametrize(("num_steps", "time_scale"), STEPS)
def test_clipped_sampling_draws_their_images(shape, num_steps, time_scale, tmp_path):
    """Their first channel is blue, our last one."""
    weights, denoiser = imported(tmp_path, shape, num_steps=num_steps, time_scale=time_scale)
    noise = torch.randn(2, shape.image_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = clipped_sampling(shape, weights, noise.flip(1), num_steps, time_scale).flip(1)
    assert theirs.std() > 0.1
    torch.testing.assert_close(images_of(denoiser, noise, num_steps).double(), theirs, rtol=0, atol=5e-5)


def test_networks_of_rgb_images_keep_their_channels(tmp_path):
    shape = SHAPES["folded"]
    weights, denoiser = imported(tmp_path, shape, order="rgb")
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = clipped_sampling(shape, weights, noise, 8, 1)
    torch.testing.assert_close(images_of(denoiser, noise, 8).double(), theirs, rtol=0, atol=5e-5)
    assert (theirs - theirs.flip(1)).abs().max() > 0.1


@every_shape
def test_the_description_is_found_from_the_shapes(shape, tmp_path):
    _, denoiser = imported(tmp_path, shape, num_steps=4, time_scale=2)
    found = denoiser.network.config
    assert (found.channels, found.multipliers, found.num_blocks) == (
        *(shape.channel, shape.multipliers, shape.n_res_blocks),
    )
    assert found.attention_strides == tuple(shape.fold * stride for stride in shape.attn_strides)
    assert (found.time_affine, found.fold, found.in_channels) == (shape.affine, shape.fold, shape.image_channels)
    config = read_config(tmp_path / "out")
    assert (config.prediction, config.num_timesteps, config.image_size, config.weights) == ("v", 4, 8, "ema")
    assert config.is_imported
    assert config.is_finished
    assert re.fullmatch(r"imported:reference/checkpoint.pt sha256:[0-9a-f]{64}", config.dataset)


@pytest.mark.parametrize(("num_steps", "time_scale"), STEPS)
def test_noise_levels_are_their_table_and_labels_index_times_time_scale(num_steps, time_scale, tmp_path):
    """Up to the shift by time_scale − 1 that the weights of the first layer have taken in."""
    imported(tmp_path, TINY, num_steps=num_steps, time_scale=time_scale)
    schedule = build_schedule(read_config(tmp_path / "out").schedule)
    t = grid_times(num_steps)[1:]
    expected = [index * time_scale + time_scale - 1 for index in range(num_steps)]
    assert schedule.timestep(t).tolist() == expected
    bars = torch.tensor(alpha_bars(num_steps), dtype=torch.float64)
    torch.testing.assert_close(schedule.angle(t).cos() ** 2, bars, rtol=1e-9, atol=1e-15)
    assert schedule.label_scale == num_steps * time_scale


def test_the_defaults_are_those_of_celebahq(tmp_path):
    """112 channels and 1, 2, 2, 4, 4 would be 60 million numbers; eight channels have the same form."""
    shape = Shape(8, (1, 2, 2, 4, 4), 2, attn_strides=(8, 16), attn_heads=4, affine=True)
    save(tmp_path / "checkpoint.pt", shape, n_timesteps=1024)
    config = import_reference(tmp_path / "checkpoint.pt", tmp_path / "out")
    assert (config.image_size, config.unet["num_heads"], config.num_timesteps) == (256, 4, 1024)
    assert config.unet["attention_strides"] == [8, 16]
    assert config.unet["in_channels"] == 3


@pytest.mark.parametrize("form", ["ordered", "wrapped", "parameters", "half", "no frequencies"])
def test_weights_as_they_may_lie_in_the_file(form, tmp_path):
    shape = TINY
    path = tmp_path / "checkpoint.pt"
    weights = save(path, shape, n_timesteps=2)
    plain = torch.load(path, weights_only=True)
    kept = OrderedDict(plain["G"])
    kept._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    forms = {
        "ordered": kept,
        "wrapped": {f"module.{name}": tensor for name, tensor in weights.items()},
        "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()},
        "half": {name: tensor.half() for name, tensor in weights.items()},
        "no frequencies": {name: tensor for name, tensor in weights.items() if name != "time.0.inv_freq"},
    }
    torch.save({**plain, "G": forms[form]}, path)
    import_reference(path, tmp_path / "out", image_size=4, attention_heads=2)
    denoiser, _ = load_checkpoint(tmp_path / "out")
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    theirs = clipped_sampling(shape, weights, noise, 2, 1)
    tolerance = 2e-2 if form == "half" else 5e-5
    torch.testing.assert_close(images_of(denoiser, noise, 2).double(), theirs, rtol=0, atol=tolerance)


# As a user goes about it


def test_import_sample_and_distil_as_typed(tmp_path, monkeypatch):
    """The PNG files are their images; a student of the model is told what its teacher was told."""
    monkeypatch.chdir(tmp_path)
    weights = save(Path("runs/base_2/checkpoint.pt"), TINY, n_timesteps=8, time_scale=16)
    result = done("vdiff import reference runs/base_2/checkpoint.pt --image_size 4 --attention_heads 2")
    assert result.stdout.splitlines() == [
        "checkpoints/base_2: 8 steps, 4 × 4 × 1, 4 channels × [1, 2], 1 block a level, attention at [2], 2 heads",
        "next       python sample.py --checkpoint checkpoints/base_2 --clipped_sampling True",
    ]
    done("sample.py --checkpoint checkpoints/base_2 --clipped_sampling True --num 3 --seed 5 --out drawn")
    noise = ImageNoise(seed=5, indices=[0, 1, 2], shape=(1, SIZE, SIZE), device=torch.device("cpu"))()
    theirs = clipped_sampling(TINY, weights, noise, 8, 16).clamp(-1, 1)
    pixels = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(Path("drawn").glob("0*.png"))])
    expected = ((theirs[:, 0] + 1) * 127.5).round().numpy()
    assert expected.std() > 10
    assert np.abs(pixels - expected).max() <= 1

    write_dataset(Path("data/toy_4"))
    flags = "--preset toy --num_iters 2 --batch_size 4 --lr 1e-9 --device cpu --check_images 2 --distance_every 0"
    done(f"distill.py --base checkpoints/base_2 {flags}")
    teacher, before = load_checkpoint(Path("checkpoints/base_2"))
    student, after = load_checkpoint(Path("checkpoints/base_3"))
    assert (before.num_timesteps, after.num_timesteps) == (8, 4)
    assert not after.is_imported
    assert after.teacher is not None
    assert after.teacher["dataset"] == before.dataset
    with torch.no_grad():
        for k in range(1, 5):
            t = torch.full((3,), k / 4, dtype=torch.float64)
            assert torch.equal(student.schedule.timestep(t), teacher.schedule.timestep(t))
            torch.testing.assert_close(student(noise, t).v, teacher(noise, t).v, rtol=0, atol=1e-4)
    done("sample.py --checkpoint checkpoints/base_3 --num 2 --out student")


@pytest.mark.parametrize("order", ["bgr", "rgb"])
def test_png_files_show_their_pictures_in_their_colours(order, tmp_path, monkeypatch):
    """They write `array.astype(uint8)` with cv2.imwrite, which takes the first channel of an array as blue."""
    monkeypatch.chdir(tmp_path)
    shape = Shape(attn_heads=2)
    weights = save(Path("theirs.pt"), shape)
    done(f"vdiff import reference theirs.pt --image_size 8 --attention_heads 2 --channel_order {order}")
    done("sample.py --checkpoint checkpoints/theirs --clipped_sampling True --num 2 --seed 5 --out drawn")
    noise = ImageNoise(seed=5, indices=[0, 1], shape=(3, 8, 8), device=torch.device("cpu"))()
    blue_first = order == "bgr"
    theirs = clipped_sampling(shape, weights, noise.flip(1) if blue_first else noise, 8, 1)
    arrays = (255 * (theirs + 1) / 2).clip(0, 255).numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    for k, array in enumerate(arrays):
        PIL.Image.fromarray(array[:, :, ::-1] if blue_first else array).save(f"theirs_{k}.png")
        expected, found = (
            np.asarray(PIL.Image.open(path)).astype(int) for path in (f"theirs_{k}.png", f"drawn/{k:05d}.png")
        )
        assert np.abs(found - expected).max() <= 1
        assert np.abs(found[:, :, ::-1] - expected).max() > 20


def test_an_imported_student_draws_the_same_in_diffusers(tmp_path, monkeypatch):
    """An export knows nothing of where a checkpoint came from: labels 15, 31, … 127 are trailing timesteps."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    shape = Shape(attn_heads=2)
    weights = save(Path("theirs.pt"), shape, n_timesteps=8, time_scale=16)
    done("vdiff import reference theirs.pt --image_size 8 --attention_heads 2")
    done("vdiff export diffusers checkpoints/theirs pipeline")
    unet = diffusers.UNet2DModel.from_pretrained("pipeline/unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained("pipeline/scheduler")
    scheduler.set_timesteps(8)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for index, timestep in zip(range(7, -1, -1), scheduler.timesteps, strict=True):
            theirs = shape.forward(weights, noise.flip(1), torch.full((2,), 16 * index)).flip(1)
            torch.testing.assert_close(unet(noise, timestep).sample, theirs, rtol=0, atol=1e-4)
            level = scheduler.alphas_cumprod[timestep].item()
            assert level == pytest.approx(alpha_bars(8)[index], rel=1e-4)


def test_an_import_replaces_only_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("digits.pt"), TINY)
    flags = "--image_size 4 --attention_heads 2"
    done(f"vdiff import reference digits.pt {flags}")
    before = contents(Path("checkpoints/digits"))
    told = error(f"vdiff import reference digits.pt {flags}", 1)
    assert told == "checkpoints/digits exists already; give another --out to keep both, or --overwrite to replace it"
    save(Path("digits.pt"), TINY, seed=1)
    error(f"vdiff import reference digits.pt {flags} --overwrite --image_size 5", 2)
    assert contents(Path("checkpoints/digits")) == before
    done(f"vdiff import reference digits.pt {flags} --overwrite")
    assert contents(Path("checkpoints/digits")) != before
    write_checkpoint(Path("checkpoints/own"))
    Path("notes").mkdir()
    Path("notes/thesis.txt").write_text("years of work")
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "bert"}')
    shutil.copytree("checkpoints/digits", "half")
    Path("half/model.safetensors").unlink()
    done(f"vdiff import reference digits.pt {flags} --overwrite --out half")
    assert contents(Path("half")) == contents(Path("checkpoints/digits"))  # an import that lost its weights is mended
    for folder in ("checkpoints/own", "notes", "theirs"):
        held = contents(Path(folder))
        told = error(f"vdiff import reference digits.pt {flags} --overwrite --out {folder}", 1)
        assert told == f"{folder} exists and is not an imported model that vdiff wrote; choose another --out"
        assert contents(Path(folder)) == held


# What cannot be imported


def refused(folder: Path, match: str, kind: type[VdiffError] = VdiffError, **options) -> None:
    """The import fails in one line and writes nothing."""
    before = contents(folder)
    with pytest.raises(kind, match=match) as caught:
        import_reference(folder / "checkpoint.pt", folder / "out", **{"image_size": 8, "attention_heads": 1, **options})
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert str(folder / "checkpoint.pt") in caught.value.cause
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 9}, "--image_size 9: the network of .* needs multiples of 2"),
        ({"attention_heads": 3}, "--attention_heads 3: 8 channels do not split into 3 heads"),
        ({"image_channels": 4}, "--image_channels: .* has 3 outputs, not 4 times a square"),
        ({"image_channels": 2}, "--image_channels: .* has 3 outputs, not 2 times a square"),
    ],
)
def test_options_that_do_not_fit(options, match, tmp_path):
    save(tmp_path / "checkpoint.pt", Shape())
    refused(tmp_path, match, OptionError, **options)


def test_two_channels_are_told_apart_from_a_fold(tmp_path):
    save(tmp_path / "checkpoint.pt", replace(Shape(), image_channels=12))
    assert import_reference(tmp_path / "checkpoint.pt", tmp_path / "a", image_size=8).unet["fold"] == 2
    unet = import_reference(tmp_path / "checkpoint.pt", tmp_path / "b", image_size=8, image_channels=12).unet
    assert (unet["fold"], unet["in_channels"]) == (1, 12)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"G": ...}, "lacks 'G': it holds n_timesteps, time_scale"),
        ({"n_timesteps": ..., "time_scale": ...}, "lacks 'n_timesteps', 'time_scale': it holds G"),
        ({"G": 3}, "'G' is not a dictionary of weights"),
        ({"G": {}}, "is not a UNet of these repositories: it has no down.0.weight"),
        ({"G": {"a": torch.zeros(1, dtype=torch.int64)}}, "'G' is not a dictionary of weights"),
        ({"n_timesteps": 0}, "n_timesteps must be a whole number from 1"),
        ({"n_timesteps": 10**9}, "n_timesteps must be a whole number from 1 to 100000"),
        ({"n_timesteps": 1001, "time_scale": 100}, "n_timesteps × time_scale is 100100; at most 100000"),
        ({"time_scale": True}, "time_scale must be a whole number"),
        ({"time_scale": 1.0}, "time_scale must be a whole number"),
    ],
)
def test_files_that_hold_something_else(changes, match, tmp_path):
    save(tmp_path / "checkpoint.pt", Shape())
    values = torch.load(tmp_path / "checkpoint.pt", weights_only=True) | changes
    torch.save({key: value for key, value in values.items() if value is not ...}, tmp_path / "checkpoint.pt")
    refused(tmp_path, match)


def resized(*size: int) -> torch.Tensor:
    return torch.zeros(size)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("mid.1.resblocks.conv2.bias", None, "lacks mid.1.resblocks.conv2.bias"),
        ("down.1.attention.qkv.weight", resized(24, 8, 1, 1), "lacks down.1.attention.norm.bias"),
        ("up.4.more.weight", resized(1), "has up.4.more.weight, which is unknown"),
        ("mid.0.resblocks.conv1.weight", resized(16, 16, 1, 1), "is 16 × 16 × 1 × 1, not 16 × 16 × 3 × 3"),
        ("mid.0.attention.out.weight", resized(8, 32, 1, 1), "is 8 × 32 × 1 × 1, not 16 × 16"),
        ("down.0.weight", resized(8, 4, 3, 3), "takes 4 channels and returns 3"),
        ("down.0.weight", resized(8, 3), "is not a UNet of these repositories: it has no down.0.weight"),
        ("down.0.weight", resized(0, 3, 3, 3), "is not a UNet of these repositories"),
        ("down.1.resblocks.conv1.weight", resized(9, 8, 3, 3), r"blocks of \[\[9\], \[16\]\] channels from 8"),
        ("down.4.0.weight", resized(16, 16, 3, 3), r"blocks of \[\[8\], \[16\], \[\]\] channels"),
        ("out.0.bias", torch.full((8,), float("nan")), "out.0.bias holds values that are not finite"),
        ("time.0.inv_freq", resized(4), "time.0.inv_freq is another time embedding"),
        ("time.0.inv_freq", 10_000 ** (-torch.arange(4) / 3), "time.0.inv_freq is another time embedding"),
    ],
)
def test_networks_of_another_form(name, tensor, match, tmp_path):
    weights = save(tmp_path / "checkpoint.pt", Shape())
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    torch.save({"G": weights, "n_timesteps": 8, "time_scale": 1}, tmp_path / "checkpoint.pt")
    refused(tmp_path, match)
