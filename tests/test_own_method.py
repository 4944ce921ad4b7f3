"""A method of one file: parameters, networks of its own with their optimiser, and whatever follows from its fields."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from torch import Tensor, nn

import vdiff.cli.distill
from tests.commands import error
from tests.oracles import randn
from tests.toy import (
    SIZE,
    UNET,
    Watcher,
    assert_equal_bits,
    assert_equal_tensors,
    distill_config,
    run_ladder,
    signal_at,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import METHODS, DistillContext, Method, TrainTarget
from vdiff.diffusion.phases import single_plan
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import Ddim, Renoising, ddim_step
from vdiff.diffusion.schedules import diffuse, grid_angles
from vdiff.diffusion.targets import grid_times_of
from vdiff.diffusion.weighting import LOSSES, WEIGHTINGS
from vdiff.errors import Interrupted, OptionError
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_config, read_tensors
from vdiff.models.condition import SECOND_TIME, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw_from
from vdiff.settings import setting
from vdiff.training.dataset import open_images
from vdiff.training.engine import build_engine
from vdiff.training.objectives import weighted_losses
from vdiff.training.stages import plan_stages, resolve_distillation
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep
from vdiff.training.student import begin_student, describe_student, stage_run


@dataclass(frozen=True)
class Adversarial(Method):
    """The middle between the teacher's x̂ and the image, a critic that tells the student's x̂ from it, a second time.

    Args:
        critic_weight: of the critic in the student's loss.
        critic_width: of its hidden layer.
    """

    critic_weight: float = setting("Weight of the critic of adversarial.", default=0.25, low=0, high=10)
    critic_width: int = setting("Hidden units of the critic of adversarial.", default=3, low=1, unit="UNITS")

    network_options: ClassVar[Mapping[str, Any]] = {"second_time": True}

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        return single_plan(num_steps, to_steps)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        assert context.networks is not None
        assert all(not parameter.grad_fn for parameter in context.networks.parameters())
        t = grid_times_of(u, context.num_steps)
        z = diffuse(x, noise, context.schedule.angle(t))
        inputs = {SECOND_TIME: (t - 1 / context.num_steps).clamp(min=0)}
        assert context.student is not None
        assert context.student(z, t, **inputs).x.shape == z.shape
        return TrainTarget(z, t, (context.teacher(z, t, **inputs).x + x) / 2, inputs=inputs)

    def networks(self, student: nn.Module) -> nn.Module:
        assert next(student.parameters()).requires_grad
        critic = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, self.critic_width), nn.SiLU())
        return critic.append(nn.Linear(self.critic_width, 1))

    def build_optimizer(self, networks: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(networks.parameters(), lr=2 * lr, momentum=0.5)

    def student_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor:
        del target
        return -self.critic_weight * networks(prediction.x).flatten()

    def network_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor:
        real, made = networks(target.x).flatten(), networks(prediction.x).flatten()
        return (1 - real).relu() + (1 + made).relu()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "adversarial", Adversarial)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("own") / "toy_4")


@pytest.fixture
def teacher(tmp_path: Path, data: Path) -> Path:
    write_checkpoint(tmp_path / "original", dataset=str(data))
    return tmp_path / "original"


SETTINGS = {
    "method": "adversarial", "phases": "8,2", "num_iters": 2, "last_factor": 1.0, "check_images": 0, "tracker": "none",
}  # fmt: skip


# Flags, files, help and checks


def test_its_parameters_are_flags_with_help():
    try:
        command = importlib.reload(vdiff.cli.distill).command
        text = " ".join(CliRunner().invoke(command, ["--help_all"]).output.split())
        assert "meanflow, adversarial. " in text
        assert "--critic_weight NUMBER Weight of the critic of adversarial. [default: 0.25; 0<=x<=10]" in text
        assert "--critic_width UNITS Hidden units of the critic of adversarial. [default: 3]" in text
        assert (
            "NAME: progressive, tract, consistency, trajectory, trajectory_v, scm, ect, meanflow, adversarial. " in text
        )  # --then
    finally:
        METHODS.pop("adversarial")
        importlib.reload(vdiff.cli.distill)


def test_its_parameters_are_keys_of_files(teacher, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('[distill]\nmethod = "adversarial"\ncritic_weight = 2\ncritic_width = 5\n')
    config, _ = resolve_distillation({"base": str(teacher), "critic_width": 7}, path)
    assert config.build_method() == Adversarial(2.0, 7)
    path.write_text("[distill]\ncritic_weight = 11.0\n")
    with pytest.raises(OptionError, match=r"critic_weight = 11\.0 is too large; it must be at most 10"):
        resolve_distillation({"base": str(teacher)}, path)
    with pytest.raises(OptionError, match=r"--critic_width 7: tract does not use it; .*--method adversarial"):
        resolve_distillation({"base": str(teacher), "method": "tract", "critic_width": 7}, None)


def test_two_methods_cannot_have_parameters_of_one_name(monkeypatch):
    @dataclass(frozen=True)
    class Other(Adversarial):
        critic_width: int = setting("Of another critic.", default=4, low=1)

    monkeypatch.setitem(METHODS, "other", Other)
    with pytest.raises(ValueError, match="other: another setting is called critic_width already"):
        distill_config(Path(), Path())


def test_a_parameter_of_a_method_has_a_default(monkeypatch):
    @dataclass(frozen=True)
    class Other(Method):
        width: int = setting("Of another critic.", low=1)

    monkeypatch.setitem(METHODS, "other", Other)
    with pytest.raises(ValueError, match="other: width needs a default"):
        distill_config(Path(), Path())


# Networks of its own


def first_update(data: Path, teacher: Path, **changes) -> tuple[Denoiser, nn.Module, TrainStep]:
    """Student and critic before the first update of a stage, and the training after it, by plain gradient descent."""
    config = distill_config(data, teacher, **{**SETTINGS, "batch_size": 6, "clip_norm": 1e9, **changes})
    described = read_config(teacher)
    stage, images = plan_stages(config, described)[0], open_images(config.data, SIZE)
    run = stage_run(stage, stage.settings(config), images, build_engine(config), {})
    after = TrainStep(
        run, build_engine(config), lambda network, _: torch.optim.SGD(network.parameters(), 1e-2, fused=True)
    )
    assert after.networks is not None
    student, critic = copy.deepcopy(after.denoiser), copy.deepcopy(after.networks.networks)
    pixels = torch.randint(0, 256, (6, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
    after(0, Batch(pixels, None))
    return student, critic, after


def test_student_and_critic_take_the_steps_of_their_own_losses(data, teacher, monkeypatch):
    targets: list[TrainTarget] = []
    make = Adversarial.__call__

    def spied(*args) -> TrainTarget:
        targets.append(make(*args))
        return targets[-1]

    monkeypatch.setattr(Adversarial, "__call__", spied)
    student, critic, after = first_update(data, teacher)
    (target,), config = targets, after.config
    prediction = student(target.z, target.t, Condition(target.inputs))
    logsnr = student.schedule.logsnr(target.t)
    errors = weighted_losses(prediction, target, logsnr, WEIGHTINGS[config.weighting], LOSSES[config.loss])
    loss = errors.mean() - 0.25 * critic(prediction.x).mean()
    gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
    for old, new, gradient in zip(student.parameters(), after.denoiser.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - config.lr * gradient, rtol=1e-4, atol=1e-7)
    of_critic = (1 - critic(target.x.clone())).relu().mean() + (1 + critic(prediction.x.detach())).relu().mean()
    gradients = torch.autograd.grad(of_critic, list(critic.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[:2])
    for old, new, gradient in zip(critic.parameters(), after.networks.networks.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - 2 * config.lr * gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_in_two_parts_is_the_same_update(data, teacher):
    whole, halves = (first_update(data, teacher, grad_accum=parts)[2] for parts in (1, 2))
    for one, other in ((whole.networks.networks, halves.networks.networks), (whole.denoiser, halves.denoiser)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_not_finite_changes_no_critic(data, teacher, monkeypatch):
    monkeypatch.setattr(Adversarial, "network_loss", lambda _, networks, target, __: networks(target.x) * torch.nan)
    _, critic, after = first_update(data, teacher)
    assert_equal_tensors(after.networks.networks.state_dict(), critic.state_dict())


def test_a_critic_learns_in_fp32_where_losses_are_scaled(data, teacher, monkeypatch):
    """The scale of fp16 is that of the student's loss alone; a scale that is switched off stands for it here."""
    seen = []
    make = Adversarial.network_loss
    monkeypatch.setattr(
        Adversarial, "network_loss", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or make(*args)
    )
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        monkeypatch.setattr(Accelerator, "scaler", property(lambda _, it=scaler: it, lambda *_: None), raising=False)
        first_update(data, teacher, precision="bf16")
    assert seen == [True, False]


def test_a_run_that_is_cut_ends_with_the_same_bits(data, teacher, tmp_path):
    """The critic and its momentum are part of the state, and of no checkpoint."""
    described, config = read_config(teacher), distill_config(data, teacher, **SETTINGS)
    once = run_ladder(config, described)[0].folder.rename(tmp_path / "once")
    folder = plan_stages(config, described)[0].folder
    with pytest.raises(Interrupted):
        run_ladder(config, described, reporter=signal_at(2))
    kept = read_tensors(state_path(folder))
    assert {name for name in kept if name.startswith("method.")} == {
        f"method.{kind}" for place in ("1", "3") for kind in (f"weights.{place}.weight", f"weights.{place}.bias")
    } | {f"method.optimizer.{number}.momentum_buffer" for number in range(4)}
    run_ladder(config, described, reporter=Watcher())
    assert_equal_bits(folder / WEIGHTS, once / WEIGHTS)
    plain = distill_config(data, teacher, **{**SETTINGS, "critic_weight": 0.0})
    other = run_ladder(dataclasses.replace(plain, base=config.base), described, overwrite=True)[0].folder
    with pytest.raises(AssertionError):
        assert_equal_bits(other / WEIGHTS, once / WEIGHTS)


# A second time


def at(s: float, count: int) -> Condition:
    return Condition({SECOND_TIME: torch.full((count,), s, dtype=torch.float64)})


def test_a_student_takes_a_second_time_its_teacher_does_not(data, teacher):
    """At its start it is its teacher at every second time; what it learns depends on it; none given is the first."""
    described, config = read_config(teacher), distill_config(data, teacher, **SETTINGS)
    (stage,) = plan_stages(config, described)
    start, _ = begin_student(stage, config, describe_student(stage, config, described))
    z, t = randn(4, 1, SIZE, SIZE).float(), torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    original = load_checkpoint(teacher)[0](z, t).x
    assert original.abs().max() > 0.01
    for condition in (Condition(), at(0.1, 4)):
        torch.testing.assert_close(start.eval()(z, t, condition).x, original, rtol=1e-5, atol=1e-6)
    run_ladder(config, described)
    student, found = load_checkpoint(stage.folder)
    assert found.unet["second_time"]
    near, far = (student(z, t, at(s, 4)).x for s in (0.0, 0.5))
    assert (near - far).abs().max() > 1e-6
    torch.testing.assert_close(student(z, t).x, student(z, t, Condition({SECOND_TIME: t})).x)
    assert not torch.equal(student(z, t).x, near)


def test_only_a_method_that_gives_a_second_time_distils_a_student_that_takes_it(data, teacher):
    folder = run_ladder(distill_config(data, teacher, **{**SETTINGS, "phases": "8,4"}), read_config(teacher))[0].folder
    described, options = read_config(folder), {**SETTINGS, "phases": "4,2"}
    for method in ("progressive", "match"):
        steps = {} if method == "match" else {"phases": "4,2"}
        with pytest.raises(OptionError, match=f"--method {method} does not pass the second time that the teacher n"):
            plan_stages(distill_config(data, folder, method=method, **steps), described)
    (stage,) = run_ladder(distill_config(data, folder, **options), described)
    assert read_config(stage.folder).num_timesteps == 2


def test_a_sampler_tells_where_its_step_ends(data, teacher):
    described, config = read_config(teacher), distill_config(data, teacher, **{**SETTINGS, "lr": 0.05})
    folder = run_ladder(config, described)[0].folder
    student, _ = load_checkpoint(folder)
    z, schedule = randn(3, 1, SIZE, SIZE).float(), student.schedule
    images = draw_from(student, Ddim(clipping_value=None), noise=lambda: z, num_steps=2)
    with torch.no_grad():
        for start, end in ((1.0, 0.5), (0.5, 0.0)):
            t, s = torch.full((3,), start, dtype=torch.float64), torch.full((3,), end, dtype=torch.float64)
            v = student(z, t, at(end, 3)).v
            z = ddim_step(z, v, schedule.angle(t), grid_angles(schedule, s))
    torch.testing.assert_close(images, z, rtol=1e-4, atol=1e-5)


def test_a_sampler_that_jumps_to_the_image_tells_so(data, teacher):
    described, config = read_config(teacher), distill_config(data, teacher, **{**SETTINGS, "lr": 0.05})
    student, _ = load_checkpoint(run_ladder(config, described)[0].folder)
    z, schedule = randn(3, 1, SIZE, SIZE).float(), student.schedule
    images = draw_from(student, Renoising(clipping_value=None), noise=lambda: z, num_steps=2)
    with torch.no_grad():
        state = z
        for start, end in ((1.0, 0.5), (0.5, 0.0)):
            t, s = torch.full((3,), start, dtype=torch.float64), torch.full((3,), end, dtype=torch.float64)
            state = diffuse(student(state, t, at(0.0, 3)).x, z, grid_angles(schedule, s))
    torch.testing.assert_close(images, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "diffusers"])
def test_other_formats_have_no_place_for_a_second_time(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("model"), unet={**UNET, "in_channels": 1, "out_channels": 1, "second_time": True})
    assert "second time" in error(f"vdiff export {kind} model out.pt2", 1)
