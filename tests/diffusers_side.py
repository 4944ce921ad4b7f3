"""diffusers' side of the exchange, as a program: `python -I diffusers_side.py JOBS.json ANSWERS.safetensors`.

It cannot import vdiff. First it writes the pipelines of "make", then it draws what "draw" asks for.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file

OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def make(job: dict[str, Any]) -> None:
    """Save a pipeline with random weights; `flat`: as files of 2022 lie, with the names that attention had then."""
    folder = Path(job["folder"])
    unet = diffusers.UNet2DModel(**job["unet"])
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    scheduler = getattr(diffusers, job["scheduler_class"])(**job["scheduler"])
    pipeline = getattr(diffusers, job["pipeline"])(unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    if job.get("flat"):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        for new, old in OLD_NAMES.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        save_file(tensors, weights, {"format": "pt"})
        for part in ("unet", "scheduler"):
            for path in (folder / part).iterdir():
                path.rename(folder / path.name)
            (folder / part).rmdir()


@functools.cache
def load(kind: str, folder: str) -> Any:
    """A pipeline, read once."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Images as the pipeline gives them, and as its parts do, called in a loop, which may be told classes."""
    pipeline = load(job["pipeline"], job["folder"])
    usual = pipeline.scheduler
    pipeline.scheduler = type(usual).from_config(usual.config, **job.get("scheduler", {}))
    call, classes, count = job["call"], job.get("classes"), job["count"]
    answers = {}
    if classes is None:
        noise = torch.Generator().manual_seed(job["seed"])
        drawn = pipeline(batch_size=count, generator=noise, output_type="np", **call).images
        answers["called"] = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    noise = torch.Generator().manual_seed(job["seed"])
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    side = size if isinstance(size, int) else size[0]
    z = torch.randn((count, channels, side, side), generator=noise)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(call["num_inference_steps"])
    options = {key: value for key, value in call.items() if key != "num_inference_steps"}
    told = {} if classes is None else {"class_labels": torch.tensor(classes)}
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(pipeline.unet(z, t, **told).sample, t, z, generator=noise, **options).prev_sample
    answers["looped"] = z
    pipeline.scheduler = usual
    return answers


def run(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The program in a folder's README.md, as it is; what it drew."""
    folder = Path(job["folder"])
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    with chdir(folder.parent):
        exec(code, names)
    found = {"z": names["z"]} if "z" in names else {}
    if "images" in names:
        pixels = np.stack([np.asarray(image) for image in names["images"]])
        found["images"] = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous()
    return found


def main(jobs: str, answers: str) -> None:
    """Do the jobs."""
    diffusers.utils.logging.disable_progress_bar()
    todo = json.loads(Path(jobs).read_text())
    for job in todo["make"]:
        make(job)
    drawn = {f"{job['name']} {kind}": images for job in todo["draw"] for kind, images in draw(job).items()}
    drawn |= {f"{job['name']} {kind}": images for job in todo["run"] for kind, images in run(job).items()}
    try:
        import vdiff  # noqa: F401
    except ImportError:
        save_file(drawn, answers)


if __name__ == "__main__":
    sys.modules["vdiff"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    main(*sys.argv[1:])
