"""Rectified flows of diffusers: pipelines of the same images, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

from tests.commands import done, error
from tests.oracles import randn
from tests.toy import SIZE, UNET, write_checkpoint
from vdiff.diffusion.parameterisation import Edm, Flow
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import EdmSchedule, FlowSchedule
from vdiff.interop.diffusers.reading import import_pipeline
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.drawing import draw_from
from vdiff.models.unet_config import UNetConfig


def flow_model(folder: Path, steps: int, shift: float = 1.0) -> None:
    """A student of `steps` steps whose network diffusers supports."""
    network = UNetConfig.from_dict({**UNET, "in_channels": 1, "out_channels": 1, "num_groups": 2})
    write_checkpoint(
        folder, **Flow().config_fields(), schedule=FlowSchedule(shift).to_dict(), num_timesteps=steps,
        method="progressive", unet=network.to_dict(),
    )  # fmt: skip


def ours(folder: Path, noise: torch.Tensor, steps: int) -> torch.Tensor:
    denoiser, _ = load_checkpoint(folder)
    return draw_from(denoiser, Ddim(clipping_value=None), noise=lambda: noise, num_steps=steps)


def theirs(pipeline: DDPMPipeline, noise: torch.Tensor, steps: int) -> torch.Tensor:
    z = noise
    pipeline.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            z = pipeline.scheduler.step(pipeline.unet(z, t).sample, t, z).prev_sample
    return z


@pytest.mark.parametrize(("steps", "shift"), [(4, 1.0), (1, 1.0), (1, 3.0)])
def test_an_exported_flow_draws_our_images_and_comes_back(steps, shift, tmp_path):
    flow_model(tmp_path / "model", steps, shift)
    done(f"vdiff export diffusers {tmp_path / 'model'} {tmp_path / 'out'} --clip False")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    noise = randn(2, 1, SIZE, SIZE, dtype=torch.float32)
    expected = ours(tmp_path / "model", noise, steps)
    torch.testing.assert_close(theirs(pipeline, noise, steps), expected, rtol=0, atol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=2, generator=torch.manual_seed(3), num_inference_steps=steps, output_type="pt"
    ).images  # fmt: skip
    start = torch.randn(2, 1, SIZE, SIZE, generator=torch.manual_seed(3))
    due = (ours(tmp_path / "model", start, steps) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, due, rtol=0, atol=1e-4)
    made = import_pipeline(str(tmp_path / "out"), tmp_path / "again")
    assert made.config.method == "progressive"
    assert (made.config.family, made.config.schedule) == (Flow(), read_config(tmp_path / "model").schedule)
    torch.testing.assert_close(ours(tmp_path / "again", noise, steps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_of_diffusers_is_a_base_model(shift, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=shift)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "theirs")
    made = import_pipeline(str(tmp_path / "theirs"), tmp_path / "model")
    assert made.config.family == Flow(500.0)
    assert made.config.schedule == {"name": "flow", "shift": shift, "label_scale": 500}
    assert len(made.remarks) == 1
    noise = randn(2, 1, 8, 8, dtype=torch.float32)
    # the levels of our uniform grid, which their scheduler shifts itself
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t).sample, t, z).prev_sample
    torch.testing.assert_close(ours(tmp_path / "model", noise, 4), z, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "shift", "flags", "words"),
    [
        (4, 1.0, "", "does not clip images; give --clip False"),
        (4, 3.0, "--clip False", "cannot take 4 steps with the time shift 3"),
    ],
)
def test_flows_that_diffusers_cannot_draw_are_refused(steps, shift, flags, words, tmp_path):
    flow_model(tmp_path / "model", steps, shift)
    assert words in error(f"vdiff export diffusers {tmp_path / 'model'} {tmp_path / 'out'} {flags}", 1)
    assert not (tmp_path / "out").exists()


def test_a_flow_on_another_schedule_and_edm_are_refused(tmp_path):
    write_checkpoint(tmp_path / "cosine", **Flow().config_fields())
    write_checkpoint(tmp_path / "edm", **Edm().config_fields(), schedule=EdmSchedule().to_dict())
    for name, words in (("cosine", "has no cosine schedule with flow"), ("edm", "scales its input, as edm does")):
        assert words in error(f"vdiff export diffusers {tmp_path / name} {tmp_path / 'out'} --clip False", 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"invert_sigmas": True}, "invert_sigmas is True"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
    ],
)
def test_schedulers_that_vdiff_cannot_follow_are_refused(values, words, tmp_path):
    flow_model(tmp_path / "model", 4)
    done(f"vdiff export diffusers {tmp_path / 'model'} {tmp_path / 'out'} --clip False")
    path = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert words in error(f"vdiff import diffusers {tmp_path / 'out'} --out {tmp_path / 'again'}", 1)
