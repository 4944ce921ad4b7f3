"""Updates, targets and samplers on PyTorch's meta device, which has shapes and no values, in place of a GPU.

A value that is read back to the host raises an error there, as does an operation on tensors of two devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cases import all_cases
from tests.oracles import condition
from tests.test_own_method import Adversarial
from tests.toy import SIZE, distill_config, train_config
from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.grids import GRIDS, grid_of
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.samplers import SAMPLERS, sample
from vdiff.diffusion.schedules import SCHEDULES
from vdiff.diffusion.weighting import LOSSES, WEIGHTINGS
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.training.base import describe
from vdiff.training.config import TrainConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import Engine
from vdiff.training.meter import Meter, Position
from vdiff.training.objectives import DenoisingObjective, DistillationObjective
from vdiff.training.step import Task, TrainStep

DEVICE = torch.device("meta")
BATCH = 4
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, as a GPU does: numbers may lie on the host, and copies go there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and (leaf.dim() or leaf.is_meta)}
        assert len(devices) < 2 or func in COPIES, f"{func} meets tensors on {devices}"
        return func(*args, **(kwargs or {}))


class Descent(torch.optim.SGD):
    """θ ← θ − lr g, told of bad updates like the fused AdamW of a run, which has no kernel on the meta device."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters)
        self.param_groups[0]["fused"] = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        assert self.found_inf.device == DEVICE
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])


def denoiser_of(description: CheckpointConfig) -> Denoiser:
    """The denoiser of a description, on the meta device."""
    with DEVICE:
        return description.build()


def described(tmp_path: Path, *, classes: int = 0, **changes: Any) -> tuple[TrainConfig, CheckpointConfig]:
    """The settings of a run and what its checkpoint says."""
    config = train_config(tmp_path, **{"class_conditional": classes > 0, **changes})
    return config, describe(config, TrainingData(SIZE, 1, [str(k) for k in range(classes)]))


def update_once(task: Task) -> None:
    """One update and what the meter makes of it, without a value of the device being read."""
    engine = Engine(DEVICE, accelerator=Accelerator(cpu=True, device_placement=False), compile=False)
    update = TrainStep(task, engine, lambda denoiser, _: Descent(denoiser.parameters()))
    meter = Meter(Position(0, 0.0), task.config, engine, task.step_bins)
    size = task.config.batch_size
    result = update(0, Batch(torch.zeros((size, 1, SIZE, SIZE), dtype=torch.uint8), torch.zeros(size).long()))
    with patch.object(Meter, "_read_late", return_value=0.0):  # CUDA's own way of reading without a wait
        meter.add(result, 0.0)
    for tensor in (result.losses, result.t, result.logsnr, result.norm, result.is_bad):
        assert tensor.device == DEVICE


BASES: dict[str, dict[str, Any]] = {
    "parts": {"grad_accum": 2},
    "checkpointing": {"checkpointing": True},
    "classes": {"classes": 3, "class_dropout": 0.1},
    "importance": {"times": "importance"},
    "averages": {"ema_more": "0.5,0.6", "ema_profiles": True},
    **{f"schedule {name}": {"schedule": name} for name in SCHEDULES},
    **{f"weighting {name}": {"weighting": name} for name in WEIGHTINGS},
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"prediction {name}": {"prediction": name, "weighting": "snr"} for name in PREDICTION_TYPES},
}


@pytest.mark.parametrize("name", BASES)
def test_an_update_of_a_base_model_stays_on_the_device(tmp_path: Path, name: str) -> None:
    config, description = described(tmp_path, **BASES[name])
    with OneDevice():
        denoiser = denoiser_of(description)
        update_once(Task(denoiser, DenoisingObjective(denoiser.schedule), config, class_dropout=0.1))


STUDENTS: dict[str, dict[str, Any]] = {
    **{method: {} for method in METHODS},
    "tract with importance": {"times": "importance"},
    "consistency with aDDIM": {"addim": 0.75},
    **{f"trajectory by {name}": {"path_sampler": name} for name in ("ddim", "dpmpp_2m", "unipc", "ipndm", "heun")},
    "progressive with classes": {"class_dropout": 0.1},
    **{f"progressive of {name}": {"prediction": name} for name in ("x", "both")},
}


@pytest.mark.parametrize("name", [*STUDENTS, "adversarial"])
def test_an_update_of_a_student_stays_on_the_device(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last method is one of a test, with networks of its own and a second time."""
    monkeypatch.setitem(METHODS, "adversarial", Adversarial)
    method, _, _ = name.partition(" ")
    changes = dict(STUDENTS.get(name, {}))
    prediction = changes.pop("prediction", "v")
    classes = 3 if method == "guided" or "class_dropout" in changes else 0
    _, teacher = described(
        tmp_path, classes=classes, prediction=prediction, **({"class_dropout": 0.1} if classes else {})
    )
    config = distill_config(tmp_path, tmp_path, method=method, **changes)
    built = config.build_method()
    student = replace(teacher, unet={**teacher.unet, **built.network_options})
    student = replace(student, guidance_range=[0.0, 4.0]) if method == "guided" else student
    with OneDevice():
        frozen = denoiser_of(teacher).requires_grad_(False)
        objective = DistillationObjective(
            GuidedDenoiser(frozen) if method == "guided" else frozen,
            built,
            num_steps=8 if METHODS[method].keeps_steps else 4,
            teacher_steps=8,
        )
        bins = None if METHODS[method].keeps_steps else 4
        update_once(
            Task(
                denoiser_of(student), objective, config, 0.1, student.guidance_range, built.self_ema, bins, bins, built
            )
        )


@pytest.mark.parametrize(("name", "grid"), all_cases(lambda i, j: i == 0 or j == 0, list(SAMPLERS), list(GRIDS)))
def test_a_sampler_stays_on_the_device(tmp_path: Path, name: str, grid: str) -> None:
    _, description = described(tmp_path, classes=3, class_dropout=0.1)
    with OneDevice():
        denoiser = denoiser_of(description).eval()
        guided = GuidedDenoiser(denoiser, 1.5)
        classes = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
        z = torch.randn(BATCH, 1, SIZE, SIZE, device=DEVICE)
        times = grid_of(grid, denoiser.schedule, 4)
        with torch.inference_mode():
            images = sample(
                lambda z, t: guided(z, t, condition(classes)),
                denoiser.schedule,
                SAMPLERS[name](),
                z=z,
                num_steps=4,
                noise=lambda: torch.randn_like(z),
                times=times,
                check=False,
            )
    assert images.device == DEVICE
