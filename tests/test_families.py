"""Models of EDM and rectified flow from training to every command: what works on vdiff's own works on these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vdiff
from tests.commands import done
from tests.oracles import randn
from tests.toy import (
    SIZE,
    UNET,
    assert_same_run,
    distill_config,
    run_ladder,
    run_training,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff import api
from vdiff.cli.inspect import approximated, described, facts
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.parameterisation import Edm, Flow, Vp, normal_angles
from vdiff.diffusion.schedules import (
    CosineSchedule,
    DdpmCosineSchedule,
    EdmSchedule,
    FlowSchedule,
    LinearSchedule,
    VpSdeSchedule,
)
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.foreign import NO_VARIANCE
from vdiff.interop.graphs import GraphOptions, export_torch
from vdiff.interop.onnx import export_onnx
from vdiff.models.checkpoint import CONFIG, load_checkpoint, read_config
from vdiff.settings import COMMAND_LINE
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import base_task
from vdiff.training.config import TrainConfig, resolve
from vdiff.training.dataset import open_images
from vdiff.training.finetuning import describe_finetuned
from vdiff.training.objectives import DenoisingObjective, StudentState, TrainBatch

ENOUGH = {"num_iters": 5, "batch_size": 4, "lr": 1e-3}
VE = Edm(scaled_input=False, noise_output=True, noise_scale=1.0, noise_offset=-0.6931)
FAMILIES = {
    "edm": {**Edm(noise_scale=250.0).config_fields(), "schedule": EdmSchedule().to_dict()},
    "ve": {**VE.config_fields(), "schedule": EdmSchedule(sigma_max=50.0).to_dict()},
    "flow": {**Flow().config_fields(), "schedule": FlowSchedule(3.0).to_dict()},
}
QUICK = [("edm", False), ("flow", True)]
"""Exports of `make test`, with the sampler's steps or without."""
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("families") / "toy_4")


def config_of(name: str, **flags: object) -> TrainConfig:
    return resolve(TrainConfig, {"a test": ENOUGH, COMMAND_LINE: {"parameterisation": name, **flags}})


# Training


def test_a_family_brings_its_schedule_its_noise_levels_and_its_weighting():
    for name, mean, std in (("edm", -1.2, 1.2), ("flow", 0.0, 1.0)):
        config = config_of(name)
        assert (config.schedule, config.weighting, config.noise_mean, config.noise_std) == (name, "output", mean, std)
    chosen = config_of("flow", schedule="cosine", weighting="snr_plus_one", noise_mean=1.0, noise_std=2.0)
    assert (chosen.schedule, chosen.weighting, chosen.noise_mean) == ("cosine", "snr_plus_one", 1.0)
    usual = config_of("vp")
    assert (usual.schedule, usual.weighting, usual.noise_mean) == ("cosine", "truncated_snr", None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"parameterisation": "edm", "prediction": "x"}, "--prediction is only for --parameterisation vp"),
        ({"parameterisation": "flow", "sigma_data": 0.4}, "--sigma_data is only for --parameterisation edm"),
        ({"flow_shift": 3.0}, "--flow_shift is only for --schedule flow"),
        ({"noise_mean": 1.0}, "describe one distribution"),
        ({"noise_mean": 1.0, "noise_std": 0.0}, "--noise_std 0.0 is too small; it must be above 0"),
        ({"parameterisation": "edm", "sigma_data": 0.0}, "--sigma_data 0.0 is too small"),
        ({"schedule": "flow", "flow_shift": 0.0}, "--flow_shift 0.0 is too small"),
        ({"schedule": "flow", "prediction": "eps"}, "--schedule flow: at zero SNR an eps-prediction"),
    ],
)
def test_settings_of_another_family_are_refused(flags, words):
    with pytest.raises(OptionError, match=words):
        resolve(TrainConfig, {"a test": ENOUGH, COMMAND_LINE: flags})


def test_training_describes_the_family(data):
    images = open_images(str(data), SIZE)
    config = train_config(data, parameterisation="edm", schedule="edm", sigma_data=0.4)
    found = describe(config, images)
    assert found.family == Edm(0.4, noise_scale=250.0)
    assert found.prediction == "edm"
    flow = describe(train_config(data, parameterisation="flow", schedule="flow", flow_shift=3.0), images)
    assert (flow.family, flow.schedule["shift"]) == (Flow(), 3.0)
    plain = describe(train_config(data), images)
    assert "parameterisation" not in plain.to_dict()
    assert plain.family == Vp("v")


@pytest.mark.parametrize(("schedule", "shift"), [("edm", 1.0), ("flow", 3.0), ("linear", 1.0)])
def test_noise_levels_of_training_follow_their_distribution(data, schedule, shift):
    """The median and the quartiles of ln tan φ; a shift s moves them by ln s; a table gives its nearest levels."""
    config = train_config(
        data, schedule=schedule, flow_shift=shift, noise_mean=-0.5, noise_std=1.0, num_timesteps=1000, weighting="snr"
    )
    denoiser = describe(config, open_images(str(data), SIZE)).build()
    objective = base_task(config, denoiser).objective
    u = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    z = randn(999, 1, 1, 1)
    target = objective(TrainBatch(z, z, u), StudentState(denoiser, denoiser, 0.0))
    logs = denoiser.schedule.angle(target.t).tan().log()
    quartiles = torch.tensor([-0.6745, 0.0, 0.6745]) - 0.5 + torch.tensor(shift).log()
    torch.testing.assert_close(logs[[249, 499, 749]].float(), quartiles, rtol=0, atol=0.02)
    assert (target.t > 0).all()
    assert (target.t <= 1).all()
    far = DenoisingObjective(denoiser.schedule, (40.0, 1.0))(TrainBatch(z, z, u), StudentState(denoiser, denoiser, 0.0))
    assert (far.t > 1 - 1e-9).all()
    assert float(normal_angles(torch.tensor([0.5]), 1.5, 3.0).tan().log()) == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_a_continued_training_ends_with_the_same_bits(name, data, tmp_path):
    settings = {"parameterisation": name, "schedule": name, "weighting": "output", "noise_mean": 0.0, "noise_std": 1.0}
    whole, half = (train_config(data, **settings, ckpt_interval=3, num_iters=count) for count in (6, 3))
    run_training(whole, tmp_path / "whole")
    run_training(half, tmp_path / "parts")
    run_training(whole, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("family", ["edm", "flow"])
def test_a_fine_tuned_model_keeps_its_bases_family(family, data, tmp_path):
    write_checkpoint(tmp_path / "base", **FAMILIES[family])
    flags = {"data": str(data), "base": str(tmp_path / "base"), "num_iters": 2}
    config, images = resolve_training(flags, None, folder=tmp_path / "out", resume=False)
    assert config.noise_mean == {"edm": -1.2, "flow": 0.0}[family]
    found, due = describe_finetuned(config, images), read_config(tmp_path / "base")
    assert (found.family, found.prediction, found.schedule) == (due.family, due.prediction, due.schedule)
    with pytest.raises(OptionError, match="--prediction is only for --parameterisation vp"):
        resolve_training({**flags, "prediction": "x"}, None, folder=tmp_path / "out", resume=False)
    with pytest.raises(OptionError, match=r"--parameterisation vp: .* has"):
        resolve_training({**flags, "parameterisation": "vp"}, None, folder=tmp_path / "out", resume=False)


# Students


@every_family
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_student_of_its_teachers_family(family, method, data, tmp_path):
    classes = {}
    if method == "guided":
        data = write_dataset(tmp_path / "toy_4", classes=("cat", "dog"))
        unet = {**UNET, "in_channels": 1, "out_channels": 1, "num_classes": 2, "null_class": True}
        classes = {"unet": unet, "class_names": ["cat", "dog"]}
    write_checkpoint(tmp_path / "original", **classes, **FAMILIES[family])
    teacher = read_config(tmp_path / "original")
    config = distill_config(data, tmp_path / "original", method=method, num_iters=2)
    stages = run_ladder(config, teacher)
    student = read_config(stages[-1].folder)
    assert student.family == teacher.family.student()
    assert student.schedule == teacher.schedule
    assert not student.family.predicts_noise


@every_family
def test_a_student_that_learned_nothing_answers_as_its_teacher(family, tmp_path, data):
    """With a rate of nearly 0, at the times of its own grid; one of a noise-predicting teacher begins with F = 0."""
    teacher = write_checkpoint(tmp_path / "original", **FAMILIES[family])
    config = distill_config(data, tmp_path / "original", lr=1e-12, num_iters=1)
    stages = run_ladder(config, read_config(tmp_path / "original"))
    student, _ = load_checkpoint(stages[0].folder)
    z, t = randn(2, 1, SIZE, SIZE, dtype=torch.float32), torch.tensor([0.25, 1.0], dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = student(z, t), teacher(z, t)
    assert torch.allclose(ours.x, theirs.x, atol=1e-4) == (family != "ve")


# Commands


@every_family
def test_commands_take_a_model_of_each_family(family, data, tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(folder, **FAMILIES[family], dataset=str(data))
    said = json.loads(done(f"vdiff inspect {folder} --json").stdout)
    most = {"edm": 80.0, "ve": 50.0, "flow": None}[family]
    assert said["noise"]["most"] == (most if most is None else pytest.approx(most))
    assert said["parameterisation"]["name"] == FAMILIES[family]["prediction"]
    rows = done(f"vdiff inspect {folder}").stdout
    assert "sigma/alpha from" in rows
    sampler = "--sampler heun --frame eps --grid karras" if family != "flow" else "--sampler unipc"
    done(f"vdiff sample --checkpoint {folder} --num_images 2 --num_timesteps 4 {sampler} --out {tmp_path / 's'}")
    done(
        f"vdiff evaluate {folder} --data {data} --num_images 16 --num_timesteps 4 --metrics kd "
        f"--out {tmp_path / 'evaluation.json'}"
    )


NOISE_ALONE = "samples start from noise alone, without the part alpha = {} of the data at t = 1"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (FAMILIES["edm"], [NOISE_ALONE.format(0.012)]),
        (FAMILIES["ve"], [NOISE_ALONE.format(0.02)]),
        (FAMILIES["flow"], []),
        (
            {"schedule": LinearSchedule(1000).to_dict(), "prediction": "eps"},
            [NOISE_ALONE.format(0.0064), "between its 1,000 noise levels, angles are interpolated"],
        ),
        ({"schedule": LinearSchedule(1000, zero_snr=True).to_dict(), "prediction": "v", "method": "progressive"}, []),
    ],
)
def test_inspect_says_what_is_approximated(model, words, tmp_path):
    write_checkpoint(tmp_path, **model)
    values = facts(tmp_path)
    assert values["approximated"] == words
    assert described(values)["approximated"] == ("; ".join(words) or "nothing")
    config = read_config(tmp_path)
    transformer = {"kind": "diffusers", "config": {"drops_variance": True}}
    assert approximated(replace(config, unet={}, backbone=transformer)) == [NO_VARIANCE, *words]
    student = replace(config, teacher={"teacher": {**config.to_dict(), "approximated": ["dropout"]}})
    assert approximated(student) == ["dropout", *words]


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        pytest.param(family, sampler, marks=[pytest.mark.slow] * ((family, sampler) not in QUICK))
        for family in FAMILIES
        for sampler in (True, False)
    ],
)
def test_exported_graphs_compute_what_vdiff_computes(family, sampler, tmp_path):
    write_checkpoint(tmp_path / "model", **FAMILIES[family])
    denoiser, config = load_checkpoint(tmp_path / "model")
    options = GraphOptions(sampler, "x", num_steps=2)
    assert export_torch(denoiser, config, options, tmp_path / "model.pt2", fingerprint="") <= 1e-4
    assert export_onnx(denoiser, config, options, tmp_path / "model.onnx", fingerprint="") <= 1e-4


def test_a_wrapped_network_of_another_family_is_saved_and_loaded(tmp_path):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layer(z) + timestep[:, None]
            return output

    model = api.wrap(Network(), (2,), parameterisation=Edm(sigma_data=1.0), codec="unbounded")
    assert model.config.schedule["name"] == "edm"
    model.save(tmp_path / "model")
    again = api.load(tmp_path / "model", network=Network())
    assert again.config.family == Edm(sigma_data=1.0)
    assert torch.equal(again.sample(3, steps=4), model.sample(3, steps=4))
    flow = api.wrap(Network(), (2,), parameterisation=Flow(), schedule=FlowSchedule(3.0))
    assert flow.config.schedule == {"name": "flow", "shift": 3.0, "label_scale": 1024}
    for given in (model, flow):
        trained = vdiff.train(given, randn(64, 2, dtype=torch.float32), num_iters=2, batch_size=8).finish()
        assert trained.config.family == given.config.family


def test_an_inner_model_of_k_diffusion_denoises_as_its_denoiser():
    """Their formulas (`Denoiser.forward` of k-diffusion): the inner model gets c_in x and sigma itself."""

    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return x.flip(1) * sigma[:, None].log1p() + 0.3

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(z, (4 * timestep).exp())
            return output

    sigma, data = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64), 0.6
    x = randn(3, 2) * (1 + sigma[:, None] ** 2).sqrt()
    model = api.wrap(Wrapper(), (2,), parameterisation=Edm(data), codec="unbounded")
    z = x / (1 + sigma[:, None] ** 2).sqrt()
    found = model.denoiser(z, model.denoiser.schedule.time(sigma.atan())).x
    s = sigma[:, None]
    norm = (s**2 + data**2).sqrt()
    expected = Inner()(x / norm, sigma) * s * data / norm + x * data**2 / norm**2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameterisation": {"name": "edn"}}, "unknown parameterisation 'edn'"),
        ({"parameterisation": {"name": "flow"}}, "'prediction' is 'edm', and not 'flow'"),
        ({"prediction": "w", "parameterisation": None}, "unknown prediction type 'w'"),
    ],
)
def test_descriptions_of_no_family_are_refused(changes, words, tmp_path):
    write_checkpoint(tmp_path / "model", **FAMILIES["edm"])
    values = json.loads((tmp_path / "model" / CONFIG).read_text())
    values = {key: value for key, value in {**values, **changes}.items() if key != "vdiff_crc32"}
    (tmp_path / "model" / CONFIG).write_text(json.dumps(values))
    with pytest.raises(VdiffError, match=words):
        load_checkpoint(tmp_path / "model")


# Ladders

THOUSAND = {
    **{name: {**family, "num_timesteps": 1024} for name, family in FAMILIES.items()},
    "vp_sde": {"schedule": VpSdeSchedule().to_dict(), "prediction": "eps", "num_timesteps": 1024},
    "linear": {"schedule": LinearSchedule(1000).to_dict(), "prediction": "eps", "num_timesteps": 1000},
    "ddpm_cosine": {"schedule": DdpmCosineSchedule(4000).to_dict(), "prediction": "eps", "num_timesteps": 4000},
    "cosine": {"schedule": CosineSchedule().to_dict(), "prediction": "v", "num_timesteps": 1024},
}
"""Teachers of each family with the levels of the published ones."""


@pytest.mark.slow
@pytest.mark.parametrize("name", THOUSAND)
def test_a_teacher_of_a_thousand_levels_goes_to_four_and_one_steps_as_typed(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("checkpoints/original"), **THOUSAND[name], dataset=str(data))
    fast = "--num_iters 2 --batch_size 4 --lr 1e-6 --device cpu --check_images 2 --distance_every 0"
    for steps in (4, 1):
        done(f"distill.py --base checkpoints/original --to_steps {steps} {fast}")
        students = {read_config(path).num_timesteps: path for path in Path("checkpoints").glob("base_*")}
        assert min(students) == steps
        assert max(students) >= 512
        samples = api.load(students[steps]).sample(2)
        assert samples.isfinite().all()
