"""Every method through the real loop and ladder: what students are and learn, and the same bits after any cut."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.by_hand import distance, drawn, drawn_by
from tests.commands import done, error
from tests.oracles import condition, randn
from tests.toy import (
    SIZE,
    UNET,
    Watcher,
    assert_equal_bits,
    distill_config,
    run_ladder,
    run_training,
    scalars,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.weighting import LOSSES, WEIGHTINGS
from vdiff.errors import Interrupted
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_config, read_tensors, save_checkpoint
from vdiff.models.denoiser import GuidedDenoiser
from vdiff.models.drawing import draw
from vdiff.models.unet_config import UNetConfig
from vdiff.records import VERDICT
from vdiff.training import ladder, student
from vdiff.training.averages import Exponential
from vdiff.training.dataset import open_images
from vdiff.training.engine import build_engine
from vdiff.training.ladder import run_stages
from vdiff.training.optimisation import build_optimizer
from vdiff.training.stages import plan_stages, resolve_distillation, teachers_images
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep, averages_of
from vdiff.training.student import begin_student, describe_student, stage_run, times_of_stage

CLASSES = ("cat", "dog")
QUICK = {"num_iters": 2, "last_factor": 1.0, "check_images": 0, "tracker": "none"}
"""Two updates a halving, and nobody looks at what they made."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("methods") / "toy_4")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("methods") / "classes_4", classes=CLASSES)


@pytest.fixture
def teacher(tmp_path: Path, data: Path) -> Path:
    """Eight steps, random weights."""
    write_checkpoint(tmp_path / "original", dataset=str(data))
    return tmp_path / "original"


def classed(**more) -> dict[str, object]:
    """A network of two classes and of none."""
    unet = {**UNET, "in_channels": 1, "out_channels": 1, "num_classes": 2, "null_class": True, **more}
    return {"unet": UNetConfig.from_dict(unet).to_dict(), "class_names": list(CLASSES)}


@pytest.fixture
def conditional(tmp_path: Path, classes: Path) -> Path:
    write_checkpoint(tmp_path / "original", dataset=str(classes), **classed())
    return tmp_path / "original"


def students(base: Path, count: int) -> list[Path]:
    return [base.parent / f"base_{k}" for k in range(count)]


# Updates


class Learner:
    """The first stage of a method, begun again and again with other settings."""

    def __init__(self, base: Path, method: str) -> None:
        shortened = {} if METHODS[method].keeps_steps else {"phases": "8,4"}
        if method == "consistency":  # at one step of the teacher the student, its copy, has nothing to learn
            shortened["first_steps"] = 8
        described = read_config(base)
        config = distill_config(Path(described.dataset), base, method=method, batch_size=6, path_steps=8, **shortened)
        stage, images = plan_stages(config, described)[0], open_images(config.data, SIZE)
        self.run = stage_run(stage, stage.settings(config), images, build_engine(config), {})
        self.start = {name: tensor.clone() for name, tensor in self.run.denoiser.state_dict().items()}

    def two_updates(self, build=build_optimizer, **settings) -> tuple[list[float], torch.Tensor]:
        """Losses and gradient norms of two updates of the optimiser that `build` makes, and all weights after them."""
        run = dataclasses.replace(self.run, config=dataclasses.replace(self.run.config, **settings))
        run.denoiser.load_state_dict(self.start)
        update = TrainStep(run, build_engine(run.config), build)
        numbers: list[float] = []
        for step in range(2):
            pixels = torch.randint(0, 256, (6, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(step))
            result = update(step, Batch(pixels.byte(), torch.arange(6) % 2))
            numbers += [*result.losses.tolist(), result.norm.item()]
            assert not result.is_bad
        return numbers, self.weights()

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.run.denoiser.parameters()])


@pytest.fixture(scope="module", params=METHODS)
def learner(request: pytest.FixtureRequest, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """A match has something to learn from a teacher of noise alone: its student begins with nothing said."""
    folder = tmp_path_factory.mktemp("every") / "original"
    prediction = "eps" if request.param == "match" else "v"
    write_checkpoint(folder, dataset=str(classes), prediction=prediction, **classed())
    return Learner(folder, request.param)


def test_every_method_learns_with_every_weighting_and_loss(learner):
    """Two updates each: finite losses and gradients, weights that move, and no two alike."""
    ends = {(): torch.cat([learner.start[name].flatten() for name, _ in learner.run.denoiser.named_parameters()])}
    for weighting, loss in itertools.product(WEIGHTINGS, LOSSES):
        numbers, ends[weighting, loss] = learner.two_updates(weighting=weighting, loss=loss)
        assert all(math.isfinite(number) and number >= 0 for number in numbers), (weighting, loss)
        assert numbers[-1] > 0
        assert ends[weighting, loss].isfinite().all()
    for (first, a), (second, b) in itertools.combinations(ends.items(), 2):
        assert not torch.equal(a, b), (first, second)


def test_parts_of_a_batch_add_up_to_it(learner):
    """Classes and weights of guidance go with their images; a trajectory's paths are those of each part.

    By gradient descent: the first updates of Adam are signs, in which rounding alone turns some around.
    """

    def descent(denoiser, config):
        return torch.optim.SGD(denoiser.parameters(), lr=config.lr, fused=True)

    whole, weights = learner.two_updates(descent)
    parts, of_parts = learner.two_updates(descent, grad_accum=3)
    assert len(parts) == len(whole)
    if learner.run.description.method.startswith("trajectory"):
        assert parts != pytest.approx(whole, rel=2e-3)
        return
    assert parts == pytest.approx(whole, rel=2e-3, abs=1e-6)
    torch.testing.assert_close(of_parts, weights, rtol=0, atol=2e-5)


# Cut and resumed

METHOD_RUNS = {
    "progressive": {"phases": "8,4"},
    "tract": {"method": "tract", "phases": "8,2", "ema_remainder": 0.01, "lr_schedule": "constant"},
    "consistency": {"method": "consistency", "phases": "8,2", "first_steps": 2, "addim": 0.5, "ema_remainder": 0.01},
    "trajectory": {"method": "trajectory", "phases": "8,2", "loss": "l1", "batch_size": 5},
    "match": {"method": "match", "dropout": 0.2},
    "scm": {"method": "scm", "phases": "8,2", "adaptive_weight": True, "ema_remainder": 0.01},
    "ect": {"method": "ect", "phases": "8,2"},
    "meanflow": {"method": "meanflow", "phases": "8,2", "precision": "bf16"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("progressive", "match", "ect"))) for name in METHOD_RUNS],
)
def test_a_stage_that_is_cut_ends_with_the_same_bits(data, teacher, name):
    halvings = 1 if name in ("match", "progressive") else 2
    settings = {**QUICK, "num_iters": 6 // halvings, "dropout": 0.1, "path_steps": 4, **METHOD_RUNS[name]}
    described, config = read_config(teacher), distill_config(data, teacher, **settings)
    run_ladder(config, described, out=teacher.parent / "whole")
    (folder,) = students(teacher, 1)
    for update in (1, 3):  # each stops after the next one
        with pytest.raises(Interrupted):
            run_ladder(config, described, reporter=signal_at(update))
        parts = {key.partition(".")[0] for key in read_tensors(state_path(folder))}
        assert ("self_teacher" in parts) == (name == "tract")
        assert ("ema" in parts) == ("ema_remainder" in settings)
    run_ladder(config, described)
    assert_equal_bits(folder / WEIGHTS, teacher.parent / "whole" / WEIGHTS)
    assert state_path(folder).exists() == (name == "tract")  # whose learning rate does not end at 0


def test_a_guided_ladder_that_is_cut_ends_with_the_same_bits(classes, conditional):
    described = read_config(conditional)
    config = distill_config(classes, conditional, method="guided", phases="4,2", **QUICK)
    run_ladder(config, described)
    for folder in students(conditional, 2):
        folder.rename(folder.with_name(f"whole_{folder.name[-1]}"))
    for name, update in (("base_0", 1), ("base_1", 1)):
        with pytest.raises(Interrupted):
            run_ladder(config, described, reporter=signal_at(update, bar=name))
    run_ladder(config, described)
    for folder in students(conditional, 2):
        assert_equal_bits(folder / WEIGHTS, folder.with_name(f"whole_{folder.name[-1]}") / WEIGHTS)


# Ladders


def test_tract_in_phases(data, teacher):
    """8 → 2 → 1: few stages, the inference average in the folder, a self-teacher in each run."""
    runs = []
    real = ladder.fit
    config = distill_config(data, teacher, method="tract", phases="8,2,1", **QUICK, ema_remainder=0.1, self_ema=0.25)
    try:
        ladder.fit = lambda run, *rest: (runs.append(run), real(run, *rest))[-1]
        run_ladder(config, read_config(teacher))
    finally:
        ladder.fit = real
    found = [read_config(folder) for folder in students(teacher, 2)]
    assert [(c.method, c.num_timesteps, c.num_iters, c.weights, c.levels) for c in found] == [
        ("tract", 2, 4, "ema", 2), ("tract", 1, 2, "ema", 1)
    ]  # fmt: skip
    assert [run.self_ema for run in runs] == [0.25, 0.25]
    assert [run.step_bins for run in runs] == [2, 1]
    assert [(run.objective.num_steps, run.objective.teacher_steps, run.objective.levels) for run in runs] == [
        (2, 8, None), (1, 2, 2)
    ]  # fmt: skip
    engine = build_engine(config)
    averages = averages_of(runs[0].config, runs[0].denoiser, engine, runs[0].self_ema)
    assert averages._tracked[0][0].decay == pytest.approx(0.1 ** (1 / 4))
    assert averages._tracked[1][0] == Exponential(0.25)


def test_consistency_in_one_stage(data, teacher):
    config = distill_config(data, teacher, method="consistency", to_steps=2, first_steps=4, **QUICK)
    run_ladder(config, read_config(teacher))
    (folder,) = students(teacher, 1)
    found = read_config(folder)
    assert (found.method, found.num_timesteps, found.num_iters) == ("consistency", 2, 4)


def test_progress_is_the_part_of_the_updates_that_is_done(data, teacher):
    """It anneals the teacher's steps of consistency, and goes on where a run is resumed."""
    told = []

    class Telling:
        def __init__(self, objective) -> None:
            self.objective = objective

        def __call__(self, draws, pupil):
            told.append(pupil.progress)
            return self.objective(draws, pupil)

    config = distill_config(data, teacher, method="consistency", phases="8,4", **QUICK)
    (stage,), images = plan_stages(config, read_config(teacher)), open_images(config.data, SIZE)
    engine = build_engine(config)
    run = stage_run(stage, dataclasses.replace(stage.settings(config), num_iters=4), images, engine, {})
    run = dataclasses.replace(run, objective=Telling(run.objective))
    update = TrainStep(run, engine)
    pixels = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.uint8)
    for step in range(4):
        update(step, Batch(pixels, None))
    assert told == [0, 0.25, 0.5, 0.75]


def test_a_trajectory_needs_no_dataset(tmp_path, monkeypatch):
    """Unconditional and by class: no folder of images is there at all."""
    monkeypatch.chdir(tmp_path)
    for name, more in (("plain", {}), ("classed", classed())):
        base = tmp_path / name / "original"
        write_checkpoint(base, dataset="gone", **more)
        config, described = resolve_distillation(
            {"base": str(base), "preset": "toy", "method": "trajectory", "phases": "8,2", "device": "cpu", **QUICK},
            None,
        )
        images = teachers_images(config, described)
        assert (images.none_needed, config.loss, config.data) == (True, "l1", "")
        assert run_stages(
            plan_stages(config, described), config, images, build_engine(config), overwrite=False, reporter=Watcher()
        )
        found = read_config(base.parent / "base_0")
        assert (found.method, found.dataset, found.dataset_fingerprint) == ("trajectory", "no images", "")
        assert found.num_iters == 4


@pytest.mark.parametrize("then", ["progressive", "tract", "consistency", "trajectory", "scm"])
def test_a_guided_student_is_told_its_weight_and_hands_it_on(classes, conditional, then):
    """Guided, then progressive: w stays an input all the way down, and is sampled with."""
    weights: list[torch.Tensor] = []
    config = distill_config(
        classes, conditional, method="guided", then=then, phases="4,2", guidance_range="0.5,3", batch_size=8, **QUICK
    )
    real = GuidedDenoiser.forward

    def watched(self, z, t, condition):
        weights.append(condition.tensors["guidance"])
        return real(self, z, t, condition)

    try:
        GuidedDenoiser.forward = watched
        run_ladder(config, read_config(conditional))
    finally:
        GuidedDenoiser.forward = real
    told = torch.cat(weights)
    assert len(told) == 16
    assert told.min() >= 0.5
    assert told.max() <= 3
    assert told.max() - told.min() > 1.5
    for folder, (method, steps) in zip(students(conditional, 2), (("guided", 4), (then, 2)), strict=True):
        student, found = load_checkpoint(folder)
        assert (found.method, found.num_timesteps, found.guidance_range) == (method, steps, [0.5, 3.0])
        assert student.network.config.guidance_input
        pictures = [
            draw(student, Ddim(), indices=range(4), image_size=SIZE, num_steps=2, guidance=w) for w in (0.5, 3.0)
        ]
        assert (pictures[0] - pictures[1]).abs().max() > 1e-5
        z, t = randn(3, 1, SIZE, SIZE, dtype=torch.float32), torch.tensor([0.5, 0.5, 0.5]).double()
        assert torch.equal(
            draw(student, Ddim(), indices=range(4), image_size=SIZE, num_steps=2, guidance=3.0), pictures[1]
        )
        assert student(z, t, condition(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2, 3]))).x.isfinite().all()


def test_a_teacher_of_noise_gets_a_student_of_v_first(data, tmp_path):
    """base_0 says the same in v, at as many steps and at every time; then its steps are halved."""
    base = tmp_path / "original"
    write_checkpoint(base, dataset=str(data), prediction="eps")
    run_ladder(distill_config(data, base, to_steps=4, **QUICK), read_config(base))
    found = [read_config(folder) for folder in students(base, 2)]
    assert [(c.method, c.prediction, c.num_timesteps, c.levels) for c in found] == [
        ("match", "v", 8, None), ("progressive", "v", 4, 4)
    ]  # fmt: skip
    assert found[1].teacher["method"] == "match"
    found[0].check_num_steps(16)
    with pytest.raises(ValueError, match="made for 4 steps"):
        found[1].check_num_steps(16)


def test_a_published_model_of_1000_levels_becomes_one_of_one_step(data, tmp_path):
    """1000 has no half after 125: the ladder begins with 512 steps between the levels, and each student keeps them."""
    base = tmp_path / "original"
    table = {"schedule": {"name": "linear"}, "num_timesteps": 1000, "dataset": "imported:diffusers/tiny"}
    write_checkpoint(base, prediction="eps", **table)
    result = done(f"distill.py --base {base} --data {data} --to_steps 1 --batch_size 2 --plan")
    assert "the ladder begins with 512 steps of the teacher: 1000 cannot be halved to 1\n" in result.stderr
    quick = {**QUICK, "num_iters": 1, "batch_size": 2}
    run_ladder(distill_config(data, base, to_steps=1, **quick), read_config(base))
    found = [read_config(folder) for folder in students(base, 10)]
    assert [c.num_timesteps for c in found] == [2**k for k in range(9, -1, -1)]
    assert [c.method for c in found] == ["match", *["progressive"] * 9]
    assert [c.takes_any_num_steps for c in found] == [True] + 9 * [False]
    assert [c.prediction for c in found] == ["v"] * 10
    done(f"sample.py --checkpoint {students(base, 10)[-1]} --num 2 --out {tmp_path / 'one'}")
    done(f"sample.py --checkpoint {base} --num_timesteps 128 --num 2 --out {tmp_path / 'between'}")
    assert "--num_timesteps 128: this model was made for 4 steps" in error(
        f"sample.py --checkpoint {students(base, 10)[7]} --num_timesteps 128 --out {tmp_path / 'none'}", 2
    )


@pytest.mark.parametrize(
    ("method", "phases", "precision", "levels", "full_precision"),
    [
        ("progressive", "96,32", "auto", 96, True),
        ("progressive", "95,19", "bf16", None, False),
        ("progressive", "64,32", "auto", None, False),
        ("tract", "96,1", "auto", 96, True),
        ("consistency", "80,2", "auto", None, True),
        ("trajectory", "96,4", "auto", 96, False),
    ],
)
def test_what_a_stage_tells_its_networks(data, tmp_path, method, phases, precision, levels, full_precision):
    """Steps between the levels of a table are on no grid; short steps need more than the 8 bits of bf16."""
    base = tmp_path / "original"
    write_checkpoint(base, schedule={"name": "linear", "num_levels": 96}, num_timesteps=96)
    config = distill_config(data, base, method=method, phases=phases, precision=precision)
    (stage,), images = plan_stages(config, read_config(base)), open_images(config.data, SIZE)
    run = stage_run(stage, config, images, build_engine(config), {})
    assert run.objective.levels == levels
    networks = run.denoiser.network, run.objective.teacher.network
    assert [network.full_precision for network in networks] == [full_precision] * 2


def test_what_a_student_knows_is_what_its_teachers_knew(tmp_path):
    """A table's levels, a student's own steps, and through stages that keep the steps what came before them."""
    table = {"schedule": {"name": "linear", "num_levels": 96}}
    base = {"method": "base", "teacher": None}
    shortened = {"method": "tract", "teacher": base}
    cases = [
        ({"method": "base"}, None),
        ({"method": "base", **table}, 96),
        ({"method": "match", "teacher": base}, None),
        ({"method": "match", "teacher": base, **table}, 96),
        ({"method": "guided", "teacher": {"method": "match", "teacher": base}}, None),
        ({"method": "guided", "teacher": {"method": "match", "teacher": base}, **table}, 96),
        ({"method": "tract", "teacher": base}, 8),
        ({"method": "guided", "teacher": shortened}, 8),
        ({"method": "guided", "teacher": {"method": "match", "teacher": shortened}, **table}, 8),
        ({"method": "match"}, 8),  # of a teacher that nobody described
        ({"method": "another tool's"}, 8),
    ]
    write_checkpoint(tmp_path)
    plain = read_config(tmp_path)
    for changes, levels in cases:
        found = dataclasses.replace(plain, **changes)
        assert found.levels == levels, changes
        assert found.takes_any_num_steps == (levels in (None, 96))


@pytest.mark.parametrize("with_classes", [False, True])
def test_a_smaller_student_begins_with_what_fits(data, classes, tmp_path, with_classes):
    """--student_config is for the first student; those after it have its network, and inherit all of it."""
    base, small = tmp_path / "original", tmp_path / "small.toml"
    settings = classed(channels=8) if with_classes else {}
    write_checkpoint(base, dataset="toy", **settings)
    small.write_text("[unet]\nchannels = 2\nembedding_channels = 6\n")
    config = distill_config(
        classes if with_classes else data, base, student_config=str(small), to_steps=2, teacher_steps=8, **QUICK
    )
    described, lines = read_config(base), []
    stages = plan_stages(config, described)
    student, inherited = begin_student(stages[0], config, describe_student(stages[0], config, described))
    assert "parameters from the teacher" in inherited
    assert student.network.config.channels == 2
    run_ladder(config, described, reporter=Watcher(lambda *words: lines.append(words)))
    for folder in students(base, 2):
        found = read_config(folder)
        assert (found.unet["channels"], found.unet["embedding_channels"]) == (2, 6)
    first = read_config(base.parent / "base_0")
    again, whole = begin_student(
        stages[1], config, describe_student(stages[1], stages[1].settings(no_file(config)), first)
    )
    assert whole == ""
    assert all(
        torch.equal(tensor, read_tensors(base.parent / "base_0" / WEIGHTS)[name])
        for name, tensor in again.state_dict().items()
    )


def no_file(config):
    return dataclasses.replace(config, student_config="")


# What students begin with


def begun(base: Path, config, number: int = 0):
    described = read_config(base)
    stage = plan_stages(config, described)[number]
    return begin_student(stage, config, describe_student(stage, config, described))[0]


def test_a_guided_student_begins_as_its_teacher_whatever_its_weight(classes, conditional):
    student = begun(conditional, distill_config(classes, conditional, method="guided"))
    taught, _ = load_checkpoint(conditional)
    z, t = randn(3, 1, SIZE, SIZE, dtype=torch.float32), torch.tensor([0.25, 0.5, 1.0]).double()
    labels = torch.tensor([0, 1, 2])
    for weight in (0.0, 4.0):
        said = student.eval()(z, t, condition(labels, torch.full((3,), weight))).x
        torch.testing.assert_close(said, taught(z, t, condition(labels)).x, rtol=1e-4, atol=1e-5)


def test_a_student_of_another_prediction_begins_with_nothing_said(data, tmp_path):
    """The last layer spoke of ε; the features below it are the teacher's."""
    base = tmp_path / "original"
    write_checkpoint(base, dataset=str(data), prediction="eps")
    config = distill_config(data, base, method="match")
    student, again = (begun(base, config) for _ in range(2))
    taught, _ = load_checkpoint(base)
    assert student.parameterisation.prediction == "v"
    for name, tensor in student.state_dict().items():
        of_last_layer = name.startswith("network.conv_out")
        assert torch.equal(tensor, torch.zeros_like(tensor) if of_last_layer else taught.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])


# Losses step by step, time


def test_losses_are_logged_for_each_step(data, teacher):
    """Of students; not of those that keep their teacher's steps, which learn every time."""
    settings = {**QUICK, "tracker": "tensorboard", "log_interval": 1, "batch_size": 8}
    run_ladder(distill_config(data, teacher, **settings), read_config(teacher))
    run_ladder(
        distill_config(data, teacher, method="match", **settings), read_config(teacher), out=teacher.parent / "m"
    )
    shown = scalars(teacher.parent / "base_0")
    names = [name for name in shown if name.startswith("loss_by_step/")]
    assert sorted(names) == [f"loss_by_step/{i}" for i in (1, 2, 3, 4)]
    for update in (1, 2):  # stratified times: two images in each step
        mean = sum(shown[name][update] for name in names) / 4
        assert shown["loss"][update] == pytest.approx(mean, rel=1e-5)
    assert not [name for name in scalars(teacher.parent / "m") if name.startswith("loss_by_step")]


@pytest.mark.parametrize("method", ["progressive", "guided", "trajectory"])
def test_the_time_of_an_update_is_measured_without_writing_anything(classes, conditional, method):
    shortened = {} if METHODS[method].keeps_steps else {"phases": "8,4"}
    config = distill_config(classes, conditional, method=method, **shortened)
    stages = plan_stages(config, read_config(conditional))
    images, before = open_images(config.data, SIZE), sorted(conditional.parent.rglob("*"))
    later = dataclasses.replace(stages[0], base=conditional.parent / "not_there_yet")
    for stage in (stages[0], later):
        assert 0 < times_of_stage(stage, config, images, build_engine(config))[1] < 60
    assert sorted(conditional.parent.rglob("*")) == before


def test_later_stages_of_a_smaller_student_are_timed_with_small_networks(data, teacher, tmp_path, monkeypatch):
    """The first teaches a small network by the large one; then both are small. Nothing stays behind."""
    runs: list[tuple[int, int]] = []
    real = student.stage_run

    def noted(stage, *rest):
        run = real(stage, *rest)
        runs.append((run.description.teacher["unet"]["channels"], run.denoiser.network.config.channels))
        return run

    monkeypatch.setattr(student, "stage_run", noted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    file = tmp_path / "small.toml"
    file.write_text("[unet]\nchannels = 2\n")
    config = distill_config(data, teacher, to_steps=2, student_config=str(file))
    images = open_images(config.data, SIZE)
    for stage in plan_stages(config, read_config(teacher)):
        assert 0 < times_of_stage(stage, config, images, build_engine(config))[1] < 60
    large = read_config(teacher).unet["channels"]
    assert runs == [(large, 2), (2, 2)]
    assert large > 2
    assert list((tmp_path / "scratch").iterdir()) == []


# Verdicts


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 8 steps that knows something."""
    folder = tmp_path_factory.mktemp("teacher") / "original"
    settings = {"num_iters": 60, "batch_size": 16, "lr": 5e-3, "weight_decay": 0.0, "flip": False, "tracker": "none"}
    run_training(train_config(data, **settings), folder)
    return folder


def test_verdicts_of_a_ladder_hold_what_its_models_draw(data, trained, tmp_path, monkeypatch):
    """8 → 4 → 2 → 1: differences from the teacher in every stage, the distance in every second one, the last included;
    a finished ladder is not looked at again. Fewer noises than 64 are not taken."""
    monkeypatch.setattr("vdiff.training.stages.EVALUATIONS", 10**6)  # as after a long training
    base = Path(shutil.copytree(trained, tmp_path / "original"))
    config = distill_config(
        data, base, to_steps=1, num_iters=6, check_images=6, distance_images=70, distance_every=2, retries=0, seed=5,
        tracker="none",
    )  # fmt: skip
    stages, images = plan_stages(config, read_config(base)), open_images(config.data, SIZE)
    watcher = Watcher()

    def far(pictures: torch.Tensor) -> float:
        return 10 + float(pictures.double().mean())

    def climbed(reporter: Watcher) -> bool:
        return run_stages(
            stages, config, images, build_engine(config), overwrite=False, reporter=reporter, distance=far
        )  # fmt: skip

    assert climbed(watcher)
    seed = 2**63 + 5
    assert [stage.num_steps for stage in stages] == [4, 2, 1]
    for stage, measured in zip(stages, (True, False, True), strict=True):
        found = json.loads((stage.folder / VERDICT).read_text())
        count = 70 if measured else 64
        theirs = drawn(stage.base, stage.teacher_steps, count=count, seed=seed)
        mine = drawn(stage.folder, stage.num_steps, count=count, seed=seed)
        before = drawn_by(load_checkpoint(stage.base)[0], stage.num_steps, count=64, seed=seed)
        assert found["rmse"] == pytest.approx(distance(mine[:64], theirs[:64]), rel=1e-3)
        assert found["rmse_before"] == pytest.approx(distance(before, theirs[:64]), rel=1e-3)
        expected = [10 + mine.astype(float).mean(), 10 + theirs.astype(float).mean()] if measured else [None, None]
        assert [found["distance"], found["teacher_distance"]] == pytest.approx(expected, abs=1e-4)
        assert (found["num_images"], found["attempts"], found["reason"]) == (count, 1, "")
        said = f"{stage.folder}: RMSE to its teacher {found['rmse']:.4f} (before training {found['rmse_before']:.4f})"
        if measured:
            said += f", distance to the data {found['distance']:.3g} (teacher {found['teacher_distance']:.3g})"
        assert said in watcher.lines
    again = Watcher()
    assert not climbed(again)
    assert again.bars == []
    assert again.lines == [f"{stage.folder} is finished already: {words}" for stage, words in zip(
        stages, ("4 steps", "2 steps", "1 step"), strict=True
    )]  # fmt: skip


def test_without_images_to_check_there_is_no_verdict(data, teacher):
    run_ladder(distill_config(data, teacher, **QUICK), read_config(teacher))
    (folder,) = students(teacher, 1)
    assert not (folder / VERDICT).exists()
    watcher = Watcher()
    checked = distill_config(data, teacher, **{**QUICK, "check_images": 2, "retries": 0})
    unchanged = load_checkpoint(teacher)[0].state_dict()
    save_checkpoint(folder, unchanged, read_config(folder))  # no worse than it began
    run_ladder(checked, read_config(teacher), reporter=watcher)
    assert (folder / VERDICT).exists()  # asked for afterwards
    assert [bar[0] for bar in watcher.bars] == ["checking original", "checking before training", "checking base_0"]
