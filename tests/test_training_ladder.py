"""The ladder: its stages, what a student starts from, the same bits after any interruption, and that students learn."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.oracles import randn
from tests.toy import (
    SIZE,
    UNET,
    Watcher,
    assert_equal_bits,
    assert_equal_tensors,
    contents,
    distill_config,
    run_ladder,
    run_training,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.images import captioned_grid
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import (
    WEIGHTS,
    CheckpointConfig,
    load_checkpoint,
    read_config,
    read_tensors,
    weights_fingerprint,
)
from vdiff.records import LADDER, LADDER_PICTURE, RUN_FILE, VERDICT
from vdiff.training import ladder
from vdiff.training.comparison import compare, known_rows, plan_comparison
from vdiff.training.dataset import open_images
from vdiff.training.engine import build_engine
from vdiff.training.ladder import run_stages
from vdiff.training.presets import preset_for, read_preset
from vdiff.training.stages import plan_stages, remarks, resolve_distillation, teachers_images
from vdiff.training.state import state_path
from vdiff.training.verdict import read_verdict


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("ladder") / "toy_4")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 8 steps that knows something."""
    folder = tmp_path_factory.mktemp("teacher") / "original"
    unet = {**UNET, "channels": 8, "embedding_channels": 16}
    settings = {"unet": unet, "num_iters": 90, "batch_size": 16, "lr": 5e-3, "weight_decay": 0.0, "flip": False}
    run_training(train_config(data, **settings), folder)
    return folder


@pytest.fixture
def teacher(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for each test, that students may be put beside."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints" / "original"))


@pytest.fixture(scope="module")
def whole(data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a ladder from 8 steps to 1 without a break."""
    base = Path(shutil.copytree(trained, tmp_path_factory.mktemp("whole") / "original"))
    run_ladder(distill_config(data, base, to_steps=1), read_config(base))
    return base.parent


# Plans


def model(**changes) -> CheckpointConfig:
    """The description of a base model of 1024 steps."""
    values = {
        "unet": {}, "schedule": {"name": "cosine"}, "prediction": "v", "num_timesteps": 1024, "image_size": 4,
        "method": "base", "weights": "ema", "num_iters": 1, "target_iters": 1, "num_images": 1,
        "dataset": "toy", "dataset_fingerprint": "abc",
    }  # fmt: skip
    return CheckpointConfig(**values | changes)


def student(num_timesteps: int) -> CheckpointConfig:
    return model(method="progressive", num_timesteps=num_timesteps)


def plan(base: str, described: CheckpointConfig, out: str | None = None, **settings) -> list[tuple[str, int, str, int]]:
    stages = plan_stages(distill_config(Path(), Path(base), **settings), described, Path(out) if out else None)
    return [(s.base.as_posix(), s.teacher_steps, s.folder.as_posix(), s.num_steps) for s in stages]


def test_one_stage_is_the_default():
    assert plan("checkpoints/original", model()) == [("checkpoints/original", 1024, "checkpoints/base_0", 512)]


def test_a_ladder_goes_on_from_student_to_student():
    stages = plan("checkpoints/original", model(), to_steps=1)
    assert [s[2] for s in stages] == [f"checkpoints/base_{k}" for k in range(10)]
    assert [s[0] for s in stages] == ["checkpoints/original", *(s[2] for s in stages[:-1])]
    assert [s[3] for s in stages] == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert [s[1] for s in stages] == [2 * s[3] for s in stages]
    assert {s[2]: s[3] for s in stages}["checkpoints/base_6"] == 8


@pytest.mark.parametrize(
    ("base", "first"),
    [
        ("checkpoints/base_5", "checkpoints/base_6"),
        ("checkpoints/base_0", "checkpoints/base_1"),
        ("checkpoints/base_19", "checkpoints/base_20"),
        ("elsewhere/faces", "elsewhere/base_0"),
        ("elsewhere/base_5_copy", "elsewhere/base_0"),
        ("elsewhere/my_base_5", "elsewhere/base_0"),
        ("original", "base_0"),
    ],
)
def test_names_count_on_from_the_base(base, first):
    assert plan(base, student(16))[0][2] == first


def test_names_of_several_stages_count_on():
    stages = plan("checkpoints/base_5", student(16), stages=3)
    assert [(s[2], s[3]) for s in stages] == [(f"checkpoints/base_{k}", n) for k, n in ((6, 8), (7, 4), (8, 2))]


def test_stages_and_steps_say_the_same():
    for stages, to_steps in ((1, 512), (3, 128), (10, 1)):
        assert plan("a/original", model(), stages=stages) == plan("a/original", model(), to_steps=to_steps)


def test_a_continuous_teacher_takes_any_number_of_steps():
    """Also one that is no part of its own."""
    assert [s[1] for s in plan("a/original", model(), teacher_steps=48, to_steps=3)] == [48, 24, 12, 6]
    assert plan("a/original", model(), teacher_steps=2) == [("a/original", 2, "a/base_0", 1)]
    assert plan("a/original", model(), teacher_steps=4096)[0][3] == 2048


def test_out_names_the_only_student():
    assert plan("a/original", model(), "b/mine") == [("a/original", 1024, "b/mine", 512)]
    with pytest.raises(OptionError, match="--out names one student, but this ladder has 2"):
        plan("a/original", model(), "b/mine", stages=2)


@pytest.mark.parametrize("out", ["a/original", "a/../a/original", "a/original/"])
def test_out_is_never_the_teacher(out):
    with pytest.raises(OptionError, match="is the teacher itself"):
        plan("a/original", model(), out)


LINEAR = {"name": "linear", "num_levels": 96}


@pytest.mark.parametrize(
    ("described", "settings", "words"),
    [
        (model(num_timesteps=3), {}, "3 steps cannot be halved"),
        (model(num_timesteps=12), {"stages": 3}, "--stages 3: 12 steps cannot be halved so often"),
        (student(12), {"to_steps": 5}, "12 steps cannot become 5"),
        (model(), {"to_steps": 5, "teacher_steps": 12}, "12 steps cannot become 5"),
        (model(num_timesteps=16), {"to_steps": 9}, "16 steps cannot become 9"),
        (model(num_timesteps=1), {}, "already needs only 1 step"),
        (student(1), {}, "already needs only 1 step"),
        (model(num_timesteps=8), {"to_steps": 8}, "--to_steps 8: the teacher already takes 8; give less than 8"),
        (model(num_timesteps=8), {"to_steps": 16}, "--to_steps 16: the teacher already takes 8"),
        (model(num_timesteps=8), {"stages": 4}, "--stages 4: 8 steps cannot be halved so often"),
        (student(8), {"teacher_steps": 4}, "--teacher_steps 4: a/original was distilled for 8 steps; leave it out"),
        (student(8), {"teacher_steps": 16}, "--teacher_steps 16: a/original was distilled for 8 steps"),
        (model(schedule=LINEAR, num_timesteps=96), {"teacher_steps": 128}, "96 levels, too few for 128 steps"),
    ],
)
def test_ladders_that_lead_nowhere(described, settings, words):
    with pytest.raises(OptionError) as caught:
        plan("a/original", described, **settings)
    assert words in str(caught.value)
    assert caught.value.hint


PUBLISHED = model(schedule={"name": "linear"}, num_timesteps=1000)


@pytest.mark.parametrize(
    ("described", "settings", "steps"),
    [
        (PUBLISHED, {"to_steps": 1}, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
        (PUBLISHED, {"to_steps": 8}, [512, 256, 128, 64, 32, 16, 8]),
        (PUBLISHED, {"to_steps": 125}, [1000, 500, 250, 125]),
        (PUBLISHED, {"to_steps": 2, "teacher_steps": 250}, [250, 50, 10, 2]),
        (PUBLISHED, {"phases": "128,32,8,4"}, [128, 32, 8, 4]),
        (model(num_timesteps=12), {"to_steps": 5}, [10, 5]),
        (model(num_timesteps=16), {"to_steps": 3}, [12, 6, 3]),
        (student(125), {"to_steps": 1}, [125, 25, 5, 1]),
    ],
)
def test_any_number_of_steps_begins_a_ladder(described, settings, steps):
    """A teacher that takes any number begins where halving leads to the end; else odd ratios are a stage each."""
    found = plan("a/original", described, **settings)
    assert [s[1] for s in found] == steps[:-1]
    assert [s[3] for s in found] == steps[1:]


def test_what_a_plan_says_before_it_begins():
    def said(described, **settings):
        return remarks(distill_config(Path(), Path("a/original"), **settings), described)

    assert said(PUBLISHED, to_steps=4) == [
        "the ladder begins with 512 steps of the teacher: 1000 cannot be halved to 4",
    ]
    copy = "match: the student is a copy of its teacher, with nothing to learn; give --student_config"
    assert said(PUBLISHED, method="match") == [copy]
    for plain in ({"to_steps": 125}, {"to_steps": 4, "teacher_steps": 128}, {"phases": "128,4"}, {"method": "tract"}):
        assert said(PUBLISHED, **plain) == []
    assert said(dataclasses.replace(PUBLISHED, prediction="eps"), method="match") == []


def test_tables_are_halved_along_their_levels():
    stages = plan("a/original", model(schedule=LINEAR, num_timesteps=96), teacher_steps=48, to_steps=3)
    assert [s[3] for s in stages] == [24, 12, 6, 3]
    assert plan("a/base_0", student(8), teacher_steps=8)[0][3] == 4


# Settings and images


def test_settings_come_from_flags_file_and_the_preset_of_the_teacher(data, teacher, tmp_path):
    config, described = resolve_distillation({"base": str(teacher)}, None)
    assert described == read_config(teacher)
    assert (config.preset, config.data, config.base) == ("toy", str(data), teacher.as_posix())
    preset = read_preset("toy").distill
    assert (config.num_iters, config.lr, config.flip) == (preset["num_iters"], preset["lr"], False)
    file = tmp_path / "my.toml"
    file.write_text("lr = 9.0\nseed = 9\n[distill]\nlr = 0.25\nseed = 7\n")
    config, _ = resolve_distillation({"base": str(teacher), "seed": 8, "preset": "digits"}, file)
    assert (config.seed, config.lr, config.preset) == (8, 0.25, "digits")
    assert config.num_iters == read_preset("digits").distill["num_iters"]


def test_the_preset_goes_down_the_ladder(whole, data):
    config, described = resolve_distillation({"base": str(whole / "base_0"), "data": str(data)}, None)
    assert (config.preset, described.num_timesteps) == ("toy", 4)


def test_without_a_record_the_preset_follows_from_the_images(data, teacher):
    (teacher / RUN_FILE).unlink()
    config, _ = resolve_distillation({"base": str(teacher), "data": str(data)}, None)
    assert config.preset == preset_for((1, SIZE, SIZE), 0, "cpu")


def test_batch_and_updates_of_a_fitted_preset_follow_the_number_of_images(data, teacher):
    for place, expected in ((str(data), (16, 500)), ("nowhere", (32, 1_500))):  # 10 images, or an unknown number
        config, _ = resolve_distillation({"base": str(teacher), "data": place, "preset": "small32"}, None)
        assert (config.batch_size, config.num_iters) == expected


def test_to_steps_and_stages_together_are_refused(teacher):
    with pytest.raises(OptionError, match="--to_steps and --stages set the same thing"):
        resolve_distillation({"base": str(teacher), "to_steps": 4, "stages": 1}, None)


def test_a_teacher_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VdiffError, match="checkpoints/original: no such checkpoint"):
        resolve_distillation({}, None)


def test_images_must_be_of_the_teacher_s_kind(data, teacher, tmp_path):
    described = read_config(teacher)
    config = distill_config(data, teacher)
    assert teachers_images(config, described).fingerprint == described.dataset_fingerprint
    colours = write_dataset(tmp_path / "colours", channels=3)
    with pytest.raises(OptionError, match="has 3 channels, the teacher 1"):
        teachers_images(dataclasses.replace(config, data=str(colours)), described)
    with pytest.raises(OptionError, match="has other classes than the teacher"):
        teachers_images(config, dataclasses.replace(described, class_names=["a", "b"]))
    with pytest.raises(VdiffError, match="no images of size 8"):
        teachers_images(config, dataclasses.replace(described, image_size=8))


# What a student is


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "dropout": 0.3, "num_iters": 7, "seed": 5}])
def test_a_student_starts_as_its_teacher(data, teacher, monkeypatch, settings):
    """The same answers at every level it will be asked, with the same labels; only steps and dropout are its own."""
    runs = []
    monkeypatch.setattr(ladder, "fit", lambda run, *_: runs.append(run))
    monkeypatch.setattr(ladder, "check_student", lambda *_, **__: True)
    run_ladder(distill_config(data, teacher, **settings), read_config(teacher))
    (run,) = runs
    taught, described = load_checkpoint(teacher)
    assert_equal_tensors(run.denoiser.state_dict(), taught.state_dict())
    started = run.denoiser.eval()
    t = (torch.arange(4, dtype=torch.float64) + 1) / 4
    z = randn(4, 1, SIZE, SIZE, dtype=torch.float32)
    assert torch.equal(started.schedule.timestep(t), torch.tensor([255.0, 511, 767, 1023]).double())
    assert torch.equal(started(z, t).v, taught(z, t).v)
    assert run.objective.num_steps == 4
    assert not run.objective.teacher.training
    assert not any(parameter.requires_grad for parameter in run.objective.teacher.parameters())
    assert all(parameter.requires_grad for parameter in started.parameters())
    assert (described.unet["dropout"], run.description.unet["dropout"]) == (0.2, settings.get("dropout", 0.0))
    assert {module.p for module in started.modules() if isinstance(module, torch.nn.Dropout)} == {
        settings.get("dropout", 0.0)
    }
    assert run.description.weights == ("ema" if "ema" in settings else "raw")
    assert run.description.target_iters == settings.get("num_iters", 4)


def test_students_know_where_they_come_from(data, whole):
    original = read_config(whole / "original")
    for k, num_steps in enumerate((4, 2, 1)):
        found = read_config(whole / f"base_{k}")
        assert (found.num_timesteps, found.method, found.prediction) == (num_steps, "progressive", "v")
        assert (found.schedule, found.image_size) == (original.schedule, SIZE)
        assert (found.dataset, found.dataset_fingerprint) == (str(data), original.dataset_fingerprint)
        updates = 4 if num_steps > 2 else 8
        assert (found.num_iters, found.target_iters, found.num_images) == (updates, updates, 4 * updates)
        for below in range(k - 1, -2, -1):
            folder = whole / (f"base_{below}" if below >= 0 else "original")
            found_teacher = found.teacher
            assert found_teacher["path"] == folder.as_posix()
            assert found_teacher["fingerprint"] == weights_fingerprint(folder)
            own = dataclasses.asdict(read_config(folder))
            assert own.keys() - found_teacher.keys() <= {
                "backbone",
                "sample_shape",
                "codec",
                "parameterisation",
                "components",
                "adapter",
                "base",
                "guidance_scale",
                "condition_images",
                "sample_rate",
                "approximated",
            }  # absent where a UNet on pixels has nothing to say
            assert {key: found_teacher.get(key, own[key]) for key in own} == own
            found = dataclasses.replace(found, teacher=found_teacher["teacher"])
        assert found.teacher is None


def test_students_are_made_for_their_steps_and_for_those_that_divide_them(whole):
    found = read_config(whole / "base_0")
    for num_steps in (1, 2, 4):
        found.check_num_steps(num_steps)
    for num_steps in (3, 8):
        with pytest.raises(ValueError, match="this model was made for 4 steps"):
            found.check_num_steps(num_steps)


# Climbing


def assert_same_ladder(first: Path, second: Path) -> None:
    """Weights bit for bit, and descriptions but for paths and time."""
    for k in range(3):
        a, b = first / f"base_{k}", second / f"base_{k}"
        assert_equal_bits(a / WEIGHTS, b / WEIGHTS)
        bare = [dataclasses.replace(read_config(folder), train_seconds=0.0, teacher=None) for folder in (a, b)]
        assert bare[0] == bare[1]
        fingerprints = [read_config(folder).teacher["fingerprint"] for folder in (a, b)]
        assert fingerprints[0] == fingerprints[1]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("cuts", [[("base_1", 2)], [("base_0", 1), ("base_1", 6), ("base_2", 5)]])
def test_a_ladder_that_is_cut_ends_with_the_same_bits(data, teacher, whole, cuts):
    config, described = distill_config(data, teacher, to_steps=1), read_config(teacher)
    for name, update in cuts:
        with pytest.raises(Interrupted, match=rf"stopped after update .*{name} is saved; the same command continues"):
            run_ladder(config, described, reporter=signal_at(update, bar=name))
    finished = times(teacher.parent / "base_0") if cuts[0][0] == "base_1" else {}
    watcher = Watcher()
    run_ladder(config, described, reporter=watcher)
    assert_same_ladder(teacher.parent, whole)
    if finished:
        assert watcher.lines[0] == f"{teacher.parent / 'base_0'} is finished already: 4 steps"
        assert [bar[0] for bar in watcher.bars if bar[0].startswith("base_")] == ["base_1", "base_2"]
        assert watcher.bars[0][2] in (2, 3)
        assert times(teacher.parent / "base_0") == finished


def test_a_folder_in_the_way_of_a_later_stage_is_found_before_the_first_update(data, teacher, whole):
    shutil.copytree(whole / "base_1", teacher.parent / "base_1")
    before = times(teacher.parent)
    with pytest.raises(VdiffError, match=r"base_1 exists already, but its teacher .*base_0 is still to be trained"):
        run_ladder(distill_config(data, teacher, to_steps=1), read_config(teacher))
    assert times(teacher.parent) == before


def test_a_whole_ladder_that_is_replaced_and_cut_goes_on(data, teacher, whole):
    config, described = distill_config(data, teacher, to_steps=1), read_config(teacher)
    for k in range(3):
        shutil.copytree(whole / f"base_{k}", teacher.parent / f"base_{k}")
    with pytest.raises(Interrupted, match="; the same command without --overwrite continues"):
        run_ladder(config, described, reporter=signal_at(2, bar="base_0"), overwrite=True)
    run_ladder(config, described)
    assert_same_ladder(teacher.parent, whole)


def test_a_replacement_that_is_cut_goes_on_without_replacing_again(data, teacher, whole):
    config, described = distill_config(data, teacher), read_config(teacher)
    run_ladder(distill_config(data, teacher, seed=5), described)
    with pytest.raises(Interrupted, match="; the same command without --overwrite continues"):
        run_ladder(config, described, reporter=signal_at(2), overwrite=True)
    run_ladder(config, described)
    assert_equal_bits(teacher.parent / "base_0" / WEIGHTS, whole / "base_0" / WEIGHTS)


def test_a_killed_stage_goes_on_from_its_last_checkpoint(data, teacher, whole):
    def kill(description: str, completed: int) -> None:
        if (description, completed) == ("base_1", 6):
            raise RuntimeError("killed")

    config, described = distill_config(data, teacher, to_steps=1, ckpt_interval=3), read_config(teacher)
    with pytest.raises(RuntimeError, match="killed"):
        run_ladder(config, described, reporter=Watcher(kill))
    watcher = Watcher()
    run_ladder(config, described, reporter=watcher)
    assert [bar for bar in watcher.bars if bar[0].startswith("base_")] == [("base_1", 8, 3), ("base_2", 8, 0)]
    assert_same_ladder(teacher.parent, whole)


def test_finished_stages_are_left_alone(data, whole):
    base, before = whole / "original", times(whole)
    watcher = Watcher()
    config = distill_config(data, base, to_steps=1)
    stages, images = plan_stages(config, read_config(base)), open_images(config.data, SIZE)
    assert not run_stages(stages, config, images, build_engine(config), overwrite=False, reporter=watcher)
    assert times(whole) == before
    assert watcher.lines == [
        f"{whole / name} is finished already: {n}"
        for name, n in (("base_0", "4 steps"), ("base_1", "2 steps"), ("base_2", "1 step"))
    ]
    assert watcher.bars == []


def test_a_ladder_can_be_made_longer_stage_by_stage(data, teacher, whole):
    for base, settings in (("original", {}), ("original", {"stages": 2}), ("base_1", {})):
        folder = teacher.parent / base
        run_ladder(distill_config(data, folder, **settings), read_config(folder))
    assert_same_ladder(teacher.parent, whole)


def test_no_state_is_left_behind(whole):
    assert not any(state_path(whole / f"base_{k}").parent.exists() for k in range(3))


def test_another_teacher_is_refused(data, teacher):
    config, described = distill_config(data, teacher, check_images=0), read_config(teacher)
    run_ladder(config, described)
    folder = teacher.parent / "base_0"
    before = contents(folder)
    with pytest.raises(VdiffError, match=r"base_0 holds a model of 4 steps, not 2; give another --name"):
        run_ladder(distill_config(data, teacher, teacher_steps=4), described)
    write_checkpoint(teacher, seed=3, num_timesteps=8)
    with pytest.raises(VdiffError, match=r"base_0 was distilled from another teacher than .*original is now"):
        run_ladder(config, read_config(teacher))
    assert contents(folder) == before
    run_ladder(config, read_config(teacher), overwrite=True)
    assert read_config(folder).teacher["fingerprint"] == weights_fingerprint(teacher)
    assert contents(folder)[WEIGHTS] != before[WEIGHTS]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.5}, "was made with lr 0.005, not 0.5; leave --lr out, give --base "),
        ({"lr": 0.0025}, "was made with lr 0.005, not 0.0025; "),
        ({"num_iters": 5}, "was made with num_iters 4, not 5; "),
        ({"lr_schedule": "constant", "num_iters": 5}, "was made with num_iters 4, not 5; "),
        ({"weighting": "snr"}, "was made with weighting truncated_snr, not snr; "),
        ({"seed": 1}, "was made with seed 0, not 1; "),
        ({"preset": "digits"}, "was made with preset toy, not digits; "),
        ({"ema_more": "0.9"}, "was made with ema_more none, not 0.9; "),
    ],
)
def test_a_finished_student_is_not_taken_for_that_of_other_settings(data, teacher, changes, words):
    """The command would not have made it; only what does not bear on the result may be another."""
    kept = {key: value for key, value in changes.items() if key == "lr_schedule"}
    run_ladder(distill_config(data, teacher, check_images=0, **kept), read_config(teacher))
    folder = teacher.parent / "base_0"
    before = contents(folder)
    for longer in ({}, {"to_steps": 2}):
        with pytest.raises(VdiffError, match="base_0 ") as caught:
            run_ladder(distill_config(data, teacher, check_images=0, **{**longer, **changes}), read_config(teacher))
        assert words in str(caught.value)
    assert contents(folder) == before
    assert not (teacher.parent / "base_1").exists()
    free = {"log_interval": 7, "num_workers": 1, "keep_last": 3, "check_images": 0, **kept}
    watcher = Watcher()
    run_ladder(distill_config(data, teacher, **free), read_config(teacher), reporter=watcher)
    assert watcher.lines == [f"{folder} is finished already: 4 steps"]


def test_a_student_of_another_network_is_refused(data, teacher, tmp_path):
    file, folder = tmp_path / "student.toml", teacher.parent / "base_0"
    file.write_text("[unet]\nchannels = 16\n")
    run_ladder(distill_config(data, teacher, student_config=str(file), check_images=0), read_config(teacher))
    before = contents(folder)
    again, watcher = file.rename(tmp_path / "moved.toml"), Watcher()
    config = distill_config(data, teacher, student_config=str(again), check_images=0)
    run_ladder(config, read_config(teacher), reporter=watcher)
    assert watcher.lines == [f"{folder} is finished already: 4 steps"]
    file.write_text("[unet]\nchannels = 12\n")
    with pytest.raises(VdiffError, match=r"base_0 has another network than .*student\.toml; give another"):
        run_ladder(distill_config(data, teacher, student_config=str(file), check_images=0), read_config(teacher))
    with pytest.raises(VdiffError, match="base_0 has another network than its teacher; give another"):
        run_ladder(distill_config(data, teacher, check_images=0), read_config(teacher))
    assert contents(folder) == before


def test_a_student_without_a_record_is_known_by_its_description(data, teacher):
    """A folder that came from elsewhere has no run.toml."""
    run_ladder(distill_config(data, teacher, check_images=0), read_config(teacher))
    (teacher.parent / "base_0" / RUN_FILE).unlink()
    watcher = Watcher()
    config = distill_config(data, teacher, check_images=0, lr=1.0)
    run_ladder(config, read_config(teacher), reporter=watcher)
    assert watcher.lines == [f"{teacher.parent / 'base_0'} is finished already: 4 steps"]
    for method in ("trajectory", "tract"):
        with pytest.raises(VdiffError, match=f"base_0 holds a student by progressive, not {method}; give another"):
            run_ladder(dataclasses.replace(config, method=method), read_config(teacher))


@pytest.mark.parametrize(
    ("settings", "goes_on"),
    [({}, True), ({"ema_remainder": 0.1}, False), ({"method": "consistency"}, False), ({"method": "tract"}, True)],
)
def test_a_constant_rate_goes_on_to_more_updates_where_nothing_else_counts_them(data, teacher, settings, goes_on):
    """An average of a given remainder and an annealed teacher are told how many updates there are to be."""
    settings = {"lr_schedule": "constant", "phases": "8,4", "check_images": 0, **settings}
    cut_ladder(data, teacher, **settings)
    longer = distill_config(data, teacher, num_iters=5, **settings)
    if goes_on:
        run_ladder(longer, read_config(teacher))
        assert read_config(teacher.parent / "base_0").num_iters == 5
    else:
        with pytest.raises(OptionError, match="num_iters 4, not 5"):
            run_ladder(longer, read_config(teacher))


def test_a_kill_before_the_settings_were_written_leaves_nothing_in_the_way(data, teacher):
    """What a kill leaves there is a part of run.toml under another name; anything else is somebody's."""
    folder = teacher.parent / "base_0"
    folder.mkdir()
    (folder / f".{RUN_FILE}.123.tmp").write_text("[distill]")
    (folder / "mine.txt").touch()
    before = contents(folder)
    with pytest.raises(VdiffError, match="base_0 exists and is not a run that vdiff wrote"):
        run_ladder(distill_config(data, teacher, check_images=0), read_config(teacher))
    assert contents(folder) == before
    (folder / "mine.txt").unlink()
    run_ladder(distill_config(data, teacher, check_images=0), read_config(teacher))
    assert read_config(folder).is_finished
    assert not list(folder.glob(".*"))


def cut_ladder(data: Path, teacher: Path, **settings) -> Path:
    with pytest.raises(Interrupted):
        run_ladder(distill_config(data, teacher, **settings), read_config(teacher), reporter=signal_at(1))
    return teacher.parent / "base_0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.5}, "lr 0.005, not 0.5"),
        ({"num_iters": 5}, "num_iters 4, not 5"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"weighting": "snr"}, "weighting truncated_snr, not snr"),
    ],
)
def test_a_stage_that_was_cut_does_not_go_on_with_other_settings(data, teacher, changes, words):
    folder = cut_ladder(data, teacher)
    before = contents(folder)
    with pytest.raises(OptionError, match=r"base_0 was begun with") as caught:
        run_ladder(distill_config(data, teacher, **changes), read_config(teacher))
    assert words in str(caught.value)
    assert contents(folder) == before


def test_a_stage_that_was_cut_needs_its_state_and_its_images(data, teacher, tmp_path):
    folder = cut_ladder(data, teacher)
    other = write_dataset(tmp_path / "other", count=7)
    with pytest.raises(VdiffError, match="was begun with other images"):
        run_ladder(distill_config(other, teacher), read_config(teacher))
    state_path(folder).unlink()
    with pytest.raises(VdiffError, match="cannot be resumed"):
        run_ladder(distill_config(data, teacher), read_config(teacher))


def test_a_base_model_is_not_taken_for_a_student(data, teacher, trained):
    folder = teacher.parent / "base_0"
    shutil.copytree(trained, folder)
    before = contents(folder)
    with pytest.raises(VdiffError, match=r"base_0 (holds a model of 8 steps, not 4|was begun by train\.py)"):
        run_ladder(distill_config(data, teacher), read_config(teacher))
    assert contents(folder) == before


def test_a_damaged_teacher_costs_no_student(data, teacher):
    """With --overwrite the student goes only when the teacher could be read."""
    config, described = distill_config(data, teacher), read_config(teacher)
    run_ladder(config, described)
    before = contents(teacher.parent / "base_0")
    (teacher / WEIGHTS).write_bytes((teacher / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(VdiffError, match="truncated or damaged"):
        run_ladder(config, described, overwrite=True)
    assert contents(teacher.parent / "base_0") == before


def test_out_puts_the_student_elsewhere(data, teacher, tmp_path, whole):
    config = distill_config(data, teacher)
    stages, images = plan_stages(config, read_config(teacher), tmp_path / "mine"), open_images(config.data, SIZE)
    assert run_stages(stages, config, images, build_engine(config), overwrite=False, reporter=Watcher())
    assert_equal_bits(tmp_path / "mine" / WEIGHTS, whole / "base_0" / WEIGHTS)
    assert not (teacher.parent / "base_0").exists()


@pytest.mark.parametrize("schedule", ["ddpm_cosine", "linear"])
@pytest.mark.parametrize("prediction", ["v", "x", "both"])
def test_every_kind_of_teacher_has_students(data, tmp_path, schedule, prediction):
    base = tmp_path / "original"
    run_training(train_config(data, schedule=schedule, prediction=prediction, num_iters=2), base)
    trained = distill_config(data, base, stages=2, num_iters=2, last_factor=1.0, check_images=0)
    run_ladder(trained, read_config(base))
    for name, num_steps in (("base_0", 4), ("base_1", 2)):
        denoiser, found = load_checkpoint(tmp_path / name)
        assert (found.num_timesteps, found.prediction, denoiser.schedule.num_levels) == (num_steps, prediction, 8)
        assert all(weight.isfinite().all() for weight in denoiser.parameters())
    first, second = (read_tensors(tmp_path / name / WEIGHTS) for name in ("base_0", "base_1"))
    assert any(not torch.equal(first[key], second[key]) for key in first)


# What it comes to


def drawn(folder: Path, num_steps: int, count: int = 24) -> np.ndarray:
    """DDIM with x̂ clipped to ±1, written out in α and σ of the cosine schedule with λ ∈ [−20, 20]."""
    denoiser, _ = load_checkpoint(folder)
    streams = (np.random.Generator(np.random.Philox(key=np.array([3, k], np.uint64))) for k in range(count))
    noise = [stream.standard_normal((1, SIZE, SIZE), dtype=np.float32) for stream in streams]
    z = torch.from_numpy(np.stack(noise))
    low = math.atan(math.exp(-10))
    for i in range(num_steps, 0, -1):
        t = torch.full((count,), i / num_steps, dtype=torch.float64)
        angle, after = ((math.pi / 2 - 2 * low) * k / num_steps + low for k in (i, i - 1))
        with torch.no_grad():
            x = denoiser(z, t).x.double().clamp(-1, 1)
        eps = (z - math.cos(angle) * x) / math.sin(angle)
        z = (math.cos(after) * x + math.sin(after) * eps if i > 1 else x).float()
    return z.numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


def test_comparison_holds_what_its_models_draw(whole, data, tmp_path, monkeypatch):
    """ladder.json against pictures drawn by a DDIM written out, for a ladder that starts below the teacher's steps."""
    shown = {}

    def show(rows, titles, *others):
        shown.update(rows=rows, titles=titles, picture=captioned_grid(rows, titles, *others))
        return shown["picture"]

    monkeypatch.setattr("vdiff.training.comparison.captioned_grid", show)
    base = Path(shutil.copytree(whole / "original", tmp_path / "original"))
    stages = run_ladder(distill_config(data, base, teacher_steps=4, to_steps=1), read_config(base))
    watcher = Watcher()
    rows = compare(stages, seed=3, device=torch.device("cpu"), reporter=watcher, budget=10**9)
    table = json.loads((stages[-1].folder / LADDER).read_text())
    assert table == [dataclasses.asdict(row) for row in rows]
    expected = [("original", 8), ("original", 4), ("base_0", 2), ("base_1", 1)]
    assert [(row.checkpoint, row.num_steps) for row in rows] == [
        ((tmp_path / name).as_posix(), steps) for name, steps in expected
    ]
    images = [drawn(tmp_path / name, steps) for name, steps in expected]
    for k, row in enumerate(rows):
        config = read_config(Path(row.checkpoint))
        assert (row.num_iters, row.train_seconds) == (config.num_iters, config.train_seconds)
        assert row.ms_per_image > 0
        if k:
            assert row.rmse_to_first == pytest.approx(distance(images[k], images[0]), rel=1e-3)
    assert rows[0].rmse_to_first is None
    found = [read_verdict(stage.folder) for stage in stages]
    assert rows[1].rmse_to_teacher is None
    for row, each in zip(rows[2:], found, strict=True):
        assert (row.rmse_to_teacher == each.rmse) == (each.every == 1)
    for stage in stages:
        (stage.folder / VERDICT).unlink()
    again = compare(stages, seed=3, device=torch.device("cpu"), reporter=Watcher(), budget=10**9)
    for k in (2, 3):
        assert again[k].rmse_to_teacher == pytest.approx(distance(images[k], images[k - 1]), rel=1e-3)
    assert watcher.bars == [("comparing", 8 + 4 + 2 + 1, 0)]
    assert [completed for _, completed in watcher.seen] == list(range(1, 16))
    with PIL.Image.open(stages[-1].folder / LADDER_PICTURE) as picture:
        assert np.array_equal(np.array(picture), np.array(shown["picture"]))
    cells = np.array([[image.numpy() for image in row] for row in shown["rows"]])
    assert cells.shape == (8, 4, 1, SIZE, SIZE)
    for k in range(4):
        np.testing.assert_allclose(cells[:, k], images[k][:8], rtol=0, atol=1e-3)
    errors = [f"RMSE {row.rmse_to_first:.3f}" for row in rows[1:]]
    assert shown["titles"] == [
        "original\n8 steps\n", f"original\n4 steps\n{errors[0]}",
        f"base_0\n2 steps\n{errors[1]}", f"base_1\n1 step\n{errors[2]}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "count", "most"),
    [(10**9, 24, 8), (12 * 15, 12, 8), (8 * 15, 8, 8), (8 * 15 - 1, 17, 4), (8 * 7 - 1, 18, 2), (0, 8, 1)],
)
def test_a_comparison_costs_what_it_may(whole, budget, count, most):
    """Fewer images first, then without the models of many steps; said in one line, and the same for all who ask."""
    steps = [8, 4, 2, 1]
    assert plan_comparison(steps, 24, budget) == (count, most)
    stages = plan_stages(distill_config(Path(), whole / "original", to_steps=1), read_config(whole / "original"))
    watcher = Watcher()
    rows = compare(stages, seed=0, device=torch.device("cpu"), reporter=watcher, budget=budget)
    is_drawn = [n <= most for n in steps]
    assert [row.ms_per_image is not None for row in rows] == is_drawn
    checked = [read_verdict(stage.folder).every == 1 for stage in stages]
    told = [is_checked or n <= most / 2 for is_checked, n in zip(checked, steps[1:], strict=True)]
    assert [row.rmse_to_teacher is not None for row in rows] == [False, *told]
    assert [row.rmse_to_first is not None for row in rows] == [False, *([most == 8] * 3)]
    assert watcher.bars == [("comparing", sum(n for n in steps if n <= most), 0)]
    words = {8: "", 4: ", without models of more than 4 steps", 2: ", without models of more than 2 steps"}
    without = words.get(most, ", without models of more than 1 step")
    line = f"comparing {count} images of each{without}, because the training was short"
    assert watcher.lines == [line] * (budget < 10**9)
    assert known_rows(stages, seed=0) == rows


@pytest.mark.parametrize(("second", "is_doubtful"), [(24.0, False), (300.0, True)])
def test_times_that_cannot_be_are_measured_again_and_marked(whole, monkeypatch, second, is_doubtful):
    """24 images by 4 steps took 600 s, by 8 steps 240: both are drawn again, the shortest times count."""
    seconds = {8: [240.0, 250.0, 260.0], 4: [600.0, second, 601.0], 2: [20.0], 1: [10.0]}
    now = 0.0

    def fake(_denoiser, _sampler, *, indices, image_size, num_steps, **_):
        nonlocal now
        now += seconds[num_steps].pop(0)
        return torch.zeros(len(indices), 1, *image_size)

    monkeypatch.setattr("vdiff.models.drawing.draw", fake)
    monkeypatch.setattr("vdiff.training.comparison.time", SimpleNamespace(monotonic=lambda: now))
    stages = plan_stages(distill_config(Path(), whole / "original", to_steps=1), read_config(whole / "original"))
    rows = compare(stages, seed=7, device=torch.device("cpu"), reporter=Watcher(), budget=10**9)
    assert [row.ms_per_image for row in rows] == pytest.approx([10_000, second / 24 * 1000, 20_000 / 24, 10_000 / 24])
    assert [row.is_time_doubtful for row in rows] == [is_doubtful, is_doubtful, False, False]
    assert known_rows(stages, seed=7) == rows


def test_a_teacher_of_very_many_steps_is_drawn_with_those_distilled_alone(data, teacher, monkeypatch):
    """Of 8 steps 4 were distilled; were it 16 times as many, or more, they would be most of the comparison."""
    stages = run_ladder(distill_config(data, teacher, teacher_steps=4, check_images=0), read_config(teacher))
    for most, expected in ((2, [8, 4, 2]), (1.5, [4, 2])):
        monkeypatch.setattr("vdiff.training.comparison.MOST_STEPS", most)
        rows = compare(stages, seed=0, device=torch.device("cpu"), reporter=Watcher(), budget=10**9)
        assert [row.num_steps for row in rows] == expected
        assert known_rows(stages, seed=0) == rows


def test_comparison_of_a_whole_ladder_names_each_model_once(whole):
    config = distill_config(Path(), whole / "original", to_steps=1)
    stages = plan_stages(config, read_config(whole / "original"))
    rows = compare(stages, seed=0, device=torch.device("cpu"), reporter=Watcher(), budget=10**9)
    assert [(Path(row.checkpoint).name, row.num_steps) for row in rows] == [
        ("original", 8), ("base_0", 4), ("base_1", 2), ("base_2", 1)
    ]  # fmt: skip
    assert known_rows(stages, seed=0) == rows
    assert known_rows(stages[-1:], seed=0) == rows, "repeating the last stage leaves the table of the whole ladder"
    assert known_rows(stages, seed=1) is None
    assert known_rows(stages[:2], seed=0) is None
    longer = [dataclasses.replace(stages[0], teacher_steps=4), *stages[1:]]
    assert known_rows(longer, seed=0) is None
    for text in ("[", "[3]", "{}", '[{"checkpoint": "a"}]'):
        (stages[-1].folder / LADDER).write_text(text)
        assert known_rows(stages, seed=0) is None
    for name in (LADDER_PICTURE, LADDER):
        (stages[-1].folder / name).unlink()
    assert known_rows(stages, seed=0) is None


def test_students_learn_what_their_teacher_does(data, teacher):
    """4 → 2 → 1 steps: losses fall, and each student is nearer to the teacher than the teacher in as few steps."""
    settings = {"num_iters": 60, "last_factor": 1.0, "batch_size": 16, "lr": 3e-3, "log_interval": 15}
    config = distill_config(data, teacher, teacher_steps=4, to_steps=1, **settings)
    stages = run_ladder(config, read_config(teacher))
    target = drawn(teacher, 4)
    for stage in stages:
        events = EventAccumulator(str(stage.folder / "log"))
        events.Reload()
        losses = [event.value for event in events.Scalars("loss")]
        assert losses[-1] < 0.7 * losses[0]
        of_student = distance(drawn(stage.folder, stage.num_steps), target)
        of_teacher = distance(drawn(teacher, stage.num_steps), target)
        assert of_student < 0.8 * of_teacher
