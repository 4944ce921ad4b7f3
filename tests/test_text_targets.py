"""Targets of every method with guidance, of a Gaussian teacher whose mean and spread follow from the prompt."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from tests.oracles import randn
from tests.pipelines import pipeline
from tests.text_training import write_text_checkpoint
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.models.checkpoint import read_config
from vdiff.models.denoiser import Denoiser
from vdiff.models.diffusers_names import TEXT_UNET
from vdiff.models.prompting import Prompting
from vdiff.training.config import DistillConfig, resolve
from vdiff.training.engine import build_engine
from vdiff.training.objectives import StudentState, TrainBatch
from vdiff.training.stages import Stage
from vdiff.training.student import stage_task

PROMPTS = ["a red fox", "a sad cat", "blue bird", "the moon and a boat in the snow"]
SCALE = 4.0
STEPS, TO_STEPS = 8, 2


class GaussianUNet(nn.Module):
    """v̂ of data N(m, s²) in each pixel, where m (a channel each) and s follow from the embedding of the prompt."""

    def __init__(self, signature: Any, sign: float) -> None:
        super().__init__()
        self.signature, self.sign, self.full_precision, self.class_name = signature, sign, False, TEXT_UNET
        self.nothing, self.rows = nn.Parameter(torch.zeros(())), 0

    def forward(self, z: Tensor, timestep: Tensor, *, text: Tensor) -> Tensor:
        self.rows += len(z)
        angle = ((timestep.double() + 1) / 1024 * math.pi / 2).reshape(-1, 1, 1, 1)
        alpha, sigma, words = angle.cos(), angle.sin(), text.double().mean(1)
        mean, spread = self.sign * words[:, :4, None, None], (0.5 + words[:, 5].sigmoid()).reshape(-1, 1, 1, 1)
        x = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (z - alpha * mean)
        return (alpha * z - x) / sigma


@dataclass
class Oracle:
    """E[x | z] = m + α s² (z − α m)/d and E[ε | z] = σ (z − α m)/d, d = α² s² + σ², for one prompt."""

    words: Tensor
    sign: float = 1.0

    def __call__(self, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        mean, spread = self.sign * self.words[:4, None, None], 0.5 + 1 / (1 + math.exp(-float(self.words[5])))
        d = alpha**2 * spread**2 + sigma**2
        return mean + alpha * spread**2 / d * (z - alpha * mean), sigma / d * (z - alpha * mean)


def step(z: Tensor, t: float, s: float, predict: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> Tensor:
    """A DDIM step by x̂ and ε̂."""
    x, eps = predict(z, t)
    return math.cos(s * math.pi / 2) * x + math.sin(s * math.pi / 2) * eps


def inverted(z: Tensor, end: Tensor, t: float, s: float) -> Tensor:
    """Eq. 9 of Salimans & Ho 2022."""
    alpha, sigma, alpha_s, sigma_s = (f(u * math.pi / 2) for u in (t, s) for f in (math.cos, math.sin))
    return (end - sigma_s / sigma * z) / (alpha_s - sigma_s / sigma * alpha)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "sd2"
    write_text_checkpoint(folder, "sd2")
    return folder


CASES: dict[str, tuple[str, dict[str, Any], float, tuple[float, float]]] = {
    "progressive": ("progressive", {}, 0.0, (2 * STEPS / TO_STEPS, 0)),
    "tract": ("tract", {}, 0.0, (2, 1)),
    "consistency, coarse": ("consistency", {"first_steps": 4}, 0.0, (2, 1)),
    "consistency, fine": ("consistency", {"first_steps": 4}, 1.0, (2, 1)),
    "trajectory": (
        "trajectory", {"path_sampler": "ddim", "path_steps": STEPS}, 0.0,
        (2 * STEPS / TO_STEPS, (TO_STEPS - 1) / TO_STEPS),
    ),
}  # fmt: skip
"""Method, settings, progress, and the evaluations of the guided teacher and of the student for one target."""


@pytest.mark.parametrize("name", CASES)
def test_a_guided_target_is_the_closed_form(base, tmp_path, name):
    """x* of a teacher's guided steps; the student, which tract and consistency let jump, is not guided."""
    method, settings, progress, evaluations = CASES[name]
    schedule = CosineSchedule(math.inf)
    config = replace(read_config(base), schedule=schedule.to_dict())
    network = config.build().network.double()
    encoder = CLIPTextModel.from_pretrained(pipeline("sd2") / "text_encoder").double()
    network.text_encoders[0].load_state_dict(encoder.state_dict())

    def gaussian(sign: float) -> Denoiser:
        own = copy.deepcopy(network)
        own.unet = GaussianUNet(network.unet.signature, sign)
        return Denoiser(own.eval(), schedule, "v")

    prompting = Prompting.read(config)
    count = len(PROMPTS)
    condition = prompting.condition(network.signature.names, PROMPTS)
    x, noise, u = randn(count, 4, 2, 2), randn(count, 4, 2, 2, seed=1), (torch.arange(count) + 0.4).double() / count
    values: dict[str, Any] = {
        "num_iters": 1,
        "batch_size": count,
        "lr": 1e-3,
        "device": "cpu",
        "base": "x",
        "class_dropout": 0.0,
    }
    values |= {"teacher_steps": STEPS, "method": method, "guidance_scale": SCALE, **settings}
    given = resolve(DistillConfig, {"a test": values})
    stage = Stage(Path("x"), STEPS, tmp_path, TO_STEPS, method, is_guided=True)
    taught, learns = gaussian(1.0), gaussian(-1.0)
    task = stage_task(stage, stage.settings(given), build_engine(given), taught, config, learns, config)
    found = task.objective(TrainBatch(x, noise, u, condition), StudentState(learns, learns, progress))
    rows_of: list[Any] = [denoiser.network.unet for denoiser in (taught, learns)]
    assert tuple(unet.rows / count for unet in rows_of) == evaluations

    tokens = torch.cat([torch.as_tensor(condition.null["tokens"])[None], condition.tensors["tokens"]])
    with torch.no_grad():
        nothing, *words = encoder(input_ids=tokens)[0].mean(1)
    fine = 4 if name == "consistency, coarse" else STEPS
    rows = range(count) if found.rows is None else found.rows.tolist()
    for k, row in enumerate(rows):
        teachers, student = (Oracle(words[row]), Oracle(nothing)), Oracle(words[row], -1.0)

        def guided(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
            one, other = (of(z, t) for of in teachers)  # noqa: B023
            x, eps = (SCALE * a - (SCALE - 1) * b for a, b in zip(one, other, strict=True))
            return x, eps

        if method == "trajectory":
            t = float(found.t[k])
            z = end = noise[row]
            for level in range(STEPS, round((t - 1 / TO_STEPS) * STEPS), -1):
                end = step(end, level / STEPS, (level - 1) / STEPS, guided)
            for level in range(TO_STEPS, round(t * TO_STEPS), -1):
                z = step(z, level / TO_STEPS, (level - 1) / TO_STEPS, student)
            s = t - 1 / TO_STEPS
        else:
            levels = TO_STEPS if method == "progressive" else fine
            t = (math.floor(float(u[k]) * levels) + 1) / levels
            s = (math.ceil(t * TO_STEPS) - 1) / TO_STEPS
            z = end = math.cos(t * math.pi / 2) * x[row] + math.sin(t * math.pi / 2) * noise[row]
            if method == "progressive":
                for j in range(STEPS // TO_STEPS):
                    end = step(end, t - j / STEPS, t - (j + 1) / STEPS, guided)
            else:
                end = step(end, t, t - 1 / fine, guided)
                end = step(end, t - 1 / fine, s, student) if t - 1 / fine > s + 1e-9 else end
        assert float(found.t[k]) == pytest.approx(t)
        torch.testing.assert_close(found.z[k], z, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.x[k], inverted(z, end, t, s), rtol=1e-6, atol=1e-6)
