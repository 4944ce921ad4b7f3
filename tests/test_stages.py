"""What a ladder will do: the stages of each method, their updates and settings, where settings come from, its data."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.toy import SIZE, UNET, distill_config, write_checkpoint, write_dataset
from vdiff.errors import OptionError, VdiffError
from vdiff.models.checkpoint import CheckpointConfig, read_config
from vdiff.training.config import values_of
from vdiff.training.dataset import no_images
from vdiff.training.engine import build_engine
from vdiff.training.presets import read_preset
from vdiff.training.stages import Stage, plan_stages, resolve_distillation, student_network, teachers_images
from vdiff.training.student import describe_student

LINEAR = {"name": "linear", "num_levels": 96}
WITHOUT_CLASS = {"unet": {"num_classes": 3, "null_class": True}}


def model(**changes) -> CheckpointConfig:
    """The description of a base model of 1024 steps."""
    values: dict[str, Any] = {
        "unet": {}, "schedule": {"name": "cosine"}, "prediction": "v", "num_timesteps": 1024, "image_size": 4,
        "method": "base", "weights": "ema", "num_iters": 1, "target_iters": 1, "num_images": 1,
        "dataset": "toy", "dataset_fingerprint": "abc",
    }  # fmt: skip
    return CheckpointConfig(**values | changes)


def stages_of(described: CheckpointConfig, base: str = "a/original", **settings) -> list[Stage]:
    return plan_stages(distill_config(Path(), Path(base), **settings), described)


def steps(described: CheckpointConfig, **settings) -> list[tuple[str, int, int]]:
    """Method, teacher's and student's steps."""
    return [(stage.method, stage.teacher_steps, stage.num_steps) for stage in stages_of(described, **settings)]


# Which stages


@pytest.mark.parametrize(
    ("described", "settings", "expected"),
    [
        (model(), {"method": "tract", "to_steps": 1}, [("tract", 1024, 32), ("tract", 32, 1)]),
        (model(), {"method": "tract", "to_steps": 2, "teacher_steps": 16}, [("tract", 16, 2)]),
        (model(), {"method": "tract"}, [("tract", 1024, 512)]),
        (model(), {"method": "tract", "stages": 2}, [("tract", 1024, 512), ("tract", 512, 256)]),
        (model(), {"method": "consistency", "to_steps": 4}, [("consistency", 1024, 4)]),
        (model(), {"method": "trajectory", "to_steps": 1, "teacher_steps": 12}, [("trajectory", 12, 1)]),
        (model(), {"phases": "8,4,2"}, [("progressive", 8, 4), ("progressive", 4, 2)]),
        (model(), {"method": "tract", "phases": "12, 6 ,2,1"}, [("tract", 12, 6), ("tract", 6, 2), ("tract", 2, 1)]),
        (model(), {"phases": "8,4", "teacher_steps": 8}, [("progressive", 8, 4)]),
        (model(), {"phases": "128,32,8,4"}, [("progressive", 128, 32), ("progressive", 32, 8), ("progressive", 8, 4)]),
        (model(**WITHOUT_CLASS), {"method": "guided", "phases": "8,2"}, [("guided", 8, 8), ("progressive", 8, 2)]),
        (model(), {"method": "match"}, [("match", 1024, 1024)]),
        (model(), {"method": "match", "teacher_steps": 8}, [("match", 8, 8)]),
        (model(prediction="eps"), {"teacher_steps": 4}, [("match", 4, 4)]),
        (
            model(prediction="eps"),
            {"teacher_steps": 4, "to_steps": 1},
            [("match", 4, 4), ("progressive", 4, 2), ("progressive", 2, 1)],
        ),
        (
            model(prediction="eps"),
            {"method": "consistency", "phases": "64,8,2"},
            [("match", 64, 64), ("consistency", 64, 8), ("consistency", 8, 2)],
        ),
        (model(prediction="eps", schedule=LINEAR, num_timesteps=96), {"method": "match"}, [("match", 96, 96)]),
        (model(**WITHOUT_CLASS), {"method": "guided"}, [("guided", 1024, 1024)]),
        (
            model(**WITHOUT_CLASS),
            {"method": "guided", "teacher_steps": 4, "to_steps": 1},
            [("guided", 4, 4), ("progressive", 4, 2), ("progressive", 2, 1)],
        ),
        (
            model(**WITHOUT_CLASS),
            {"method": "guided", "teacher_steps": 64, "to_steps": 1, "then": "tract"},
            [("guided", 64, 64), ("tract", 64, 8), ("tract", 8, 1)],
        ),
        (
            model(**WITHOUT_CLASS, prediction="eps"),
            {"method": "guided", "phases": "8,4"},
            [("match", 8, 8), ("guided", 8, 8), ("progressive", 8, 4)],
        ),
        (
            model(**WITHOUT_CLASS, guidance_range=[0.0, 4.0], method="guided", num_timesteps=8),
            {"method": "guided"},
            [("progressive", 8, 4)],
        ),
        (
            model(**WITHOUT_CLASS, guidance_range=[0.0, 4.0], method="guided", num_timesteps=8),
            {"method": "guided", "then": "tract", "to_steps": 2},
            [("tract", 8, 2)],
        ),
    ],
)
def test_stages_of_the_methods(described, settings, expected):
    assert steps(described, **settings) == expected


def test_each_student_is_the_next_stage_s_teacher_and_takes_the_next_name():
    stages = stages_of(model(**WITHOUT_CLASS, prediction="eps"), "a/base_3", method="guided", phases="8,4")
    assert [(s.base.as_posix(), s.folder.as_posix()) for s in stages] == [
        ("a/base_3", "a/base_4"), ("a/base_4", "a/base_5"), ("a/base_5", "a/base_6")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("described", "settings", "words"),
    [
        (model(), {"method": "match", "to_steps": 4}, "--method match keeps the teacher's steps"),
        (model(), {"method": "match", "stages": 1}, "--method match keeps the teacher's steps"),
        (model(), {"method": "guided"}, "a/original was trained only with classes and cannot predict without one"),
        (model(unet={"num_classes": 3}), {"method": "guided", "to_steps": 1}, "only with classes"),
        (model(), {"phases": "100,30"}, "--phases 100,30: 100 steps cannot become 30"),
        (model(), {"method": "tract", "phases": "8,3"}, "--phases 8,3: 8 steps cannot become 3"),
        (model(), {"method": "tract", "phases": "4,8"}, "--phases 4,8: 4 steps cannot become 8"),
        (model(), {"method": "tract", "phases": "8,2,2"}, "--phases 8,2,2: 2 steps cannot become 2"),
        (model(), {"phases": "8,4", "teacher_steps": 16}, "--phases 8,4 begins with 8 steps, not 16"),
        (model(method="tract", num_timesteps=8), {"phases": "16,8"}, "--phases 16,8: a/original was distilled for 8"),
        (model(schedule=LINEAR, num_timesteps=96), {"phases": "128,32"}, "--phases 128,32: the linear schedule has 96"),
        (model(), {"method": "consistency", "to_steps": 3}, "1024 steps cannot become 3"),
        (model(), {"method": "tract", "to_steps": 1024}, "--to_steps 1024: the teacher already takes 1024"),
        (model(), {"method": "tract", "to_steps": 700}, "1024 steps cannot become 700"),
        (model(num_timesteps=1), {"method": "tract"}, "already needs only 1 step"),
        (model(num_timesteps=1), {"method": "consistency", "to_steps": 1}, "already needs only 1 step"),
    ],
)
def test_ladders_that_lead_nowhere(described, settings, words):
    with pytest.raises(OptionError) as caught:
        steps(described, **settings)
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("phases", ["8", "8,", "8,x", "8,0", "8,-4", "8,4.0", ","])
def test_phases_are_a_list_of_steps(phases):
    with pytest.raises(OptionError, match=f"--phases {phases}: not a list of steps"):
        distill_config(Path(), Path(), phases=phases)


@pytest.mark.parametrize("words", ["4", "4,0", "1,1", "0,inf", "0,nan", "-2,1", "a,b", "0,1,2", ""])
def test_weights_of_guidance_are_a_range(words):
    with pytest.raises(OptionError, match=f"--guidance_range {words}: not a range of weights"):
        distill_config(Path(), Path(), guidance_range=words)
    assert distill_config(Path(), Path(), guidance_range="-1, 2.5").build_method("guided").weights() == (-1, 2.5)
    assert distill_config(Path(), Path()).build_method("guided").weights() == (0, 4)


# How many updates


def test_updates_follow_the_halvings_and_the_last_stages_get_more():
    """num_iters for each halving; last_factor times as many for students of 2 steps and of 1."""

    def updates(teacher_steps: int, num_steps: int, method: str = "tract", **settings) -> int:
        stage = Stage(Path("a"), teacher_steps, Path("b"), num_steps, method)
        return stage.updates(distill_config(Path(), Path(), **{"num_iters": 10, "last_factor": 3.0, **settings}))

    assert [updates(2 * n, n, "progressive") for n in (512, 8, 4, 3, 2, 1)] == [10, 10, 10, 10, 30, 30]
    assert updates(1024, 32) == 50
    assert updates(32, 1) == 150
    assert updates(32, 2) == 120
    assert updates(12, 4) == 16  # log₂ 3 = 1.58
    assert updates(1024, 1, "consistency", last_factor=1.0) == 100
    assert [updates(n, n, "match") for n in (1024, 2, 1)] == [10, 10, 10]
    assert updates(2, 2, "guided") == 10
    assert [updates(2 * n, n, num_iters=3, last_factor=0.1) for n in (8, 4, 2, 1)] == [3, 3, 1, 1]


# What one stage is told


@pytest.mark.parametrize(
    ("described", "settings"),
    [
        (model(), {"to_steps": 64}),
        (model(), {"method": "tract", "phases": "1024,32,1"}),
        (model(), {"method": "consistency", "stages": 2, "teacher_steps": 16}),
        (model(prediction="eps"), {"method": "trajectory", "phases": "8,2,1"}),
        (model(**WITHOUT_CLASS, prediction="eps"), {"method": "guided", "then": "tract", "phases": "8,2,1"}),
    ],
)
def test_the_settings_of_a_stage_are_those_that_do_it_alone(described, settings):
    """Given to distill.py again, with the teacher as it then is, they plan this stage and no other."""
    config = distill_config(Path(), Path("a/original"), lr=0.125, **settings)
    stages = plan_stages(config, described)
    for stage in stages:
        alone = stage.settings(config)
        assert plan_stages(alone, described) == [dataclasses.replace(stage, folder=alone_folder(stage))]
        assert stage.updates(alone) == stage.updates(config)
        kept = {"base", "method", "teacher_steps", "phases", "to_steps", "stages"}
        for field in dataclasses.fields(config):
            if field.name not in kept:
                assert getattr(alone, field.name) == getattr(config, field.name)
        taught = dataclasses.replace(
            described,
            method=stage.method,
            num_timesteps=stage.num_steps,
            prediction="v",
            guidance_range=[0.0, 4.0] if stage.method == "guided" else described.guidance_range,
            teacher=dataclasses.asdict(described),
        )
        described = taught


def alone_folder(stage: Stage) -> Path:
    """The name that comes after the teacher's."""
    number = stage.base.name.removeprefix("base_")
    return stage.base.parent / f"base_{int(number) + 1 if number.isdecimal() else 0}"


# The student's network


def test_a_student_s_network_is_the_teacher_s_with_what_a_file_says(tmp_path):
    teacher = model(unet={**UNET, "channels": 8, "num_heads": 1})
    assert student_network(distill_config(Path(), Path()), teacher) == teacher.unet
    path = tmp_path / "small.toml"
    path.write_text("[unet]\nchannels = 4\nnum_blocks = 2\n")
    found = student_network(distill_config(Path(), Path(), student_config=str(path)), teacher)
    assert found == {**teacher.unet, "channels": 4, "num_blocks": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file or directory; give a TOML file"),
        ("[unet", "cannot be read: "),
        ("channels = 3\n", "has no table [unet]; write one"),
        ("[unet]\n", "has no table [unet]"),
        ("unet = 3\n", "has no table [unet]"),
        ("[unet]\nchannel = 3\n", "[unet] unknown UNet option channel; did you mean 'channels'?"),
        ("[unet]\nin_channels = 3\n", "[unet] in_channels follows from data and other settings"),
        ("[unet]\ndropout = 0.5\n", "[unet] dropout follows from data and other settings"),
        ("[unet]\nchannels = 'x'\n", "[unet] channels = 'x' is of another type"),
    ],
)
def test_files_that_describe_no_network(tmp_path, text, words):
    path = tmp_path / "small.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError) as caught:
        student_network(distill_config(Path(), Path(), student_config=str(path)), model(unet=UNET))
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_heads = 3", "correct the file"),
        ("multipliers = [1, 1, 1, 1]", "images of 4 pixels need a network for multiples of 8; correct the file"),
        ("channels = 0", "correct the file"),
    ],
)
def test_networks_that_cannot_be_are_refused_before_anything_is_written(tmp_path, text, words):
    path = tmp_path / "small.toml"
    path.write_text(f"[unet]\n{text}\n")
    write_checkpoint(tmp_path / "original")
    described = read_config(tmp_path / "original")
    config = distill_config(Path(), tmp_path / "original", student_config=str(path))
    (stage,) = plan_stages(config, described)
    with pytest.raises(OptionError) as caught:
        describe_student(stage, config, described)
    assert str(caught.value).startswith(f"--student_config {path}: ")
    assert words in str(caught.value)


# Where settings come from


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    data = write_dataset(tmp_path / "toy_4")
    write_checkpoint(tmp_path / "original", dataset=str(data))
    return tmp_path / "original"


def test_a_method_s_defaults_stand_between_preset_and_file(teacher, tmp_path):
    """Preset toy says nothing of these four, its own defaults stand for progressive."""

    def found(**flags) -> tuple[object, ...]:
        config, _ = resolve_distillation({"base": str(teacher), "preset": "toy", **flags}, file)
        return config.lr_schedule, config.ema_remainder, config.last_factor, config.loss

    file = None
    assert found() == ("linear", 0.0, 2.0, "l2")
    assert found(method="progressive") == ("linear", 0.0, 2.0, "l2")
    assert found(method="tract") == ("constant", 1e-3, 1.0, "l2")
    assert found(method="consistency") == ("linear", 1e-3, 1.0, "l2")
    assert found(method="trajectory") == ("linear", 0.0, 1.0, "l1")
    assert found(method="match") == ("linear", 0.0, 2.0, "l2")
    assert found(method="guided") == ("linear", 0.0, 2.0, "l2")
    assert found(method="guided", then="tract") == ("constant", 1e-3, 1.0, "l2")
    assert found(method="tract", lr_schedule="cosine", last_factor=3.0) == ("cosine", 1e-3, 3.0, "l2")
    file = tmp_path / "my.toml"
    file.write_text('[distill]\nmethod = "tract"\nema_remainder = 0.5\n')
    assert found() == ("constant", 0.5, 1.0, "l2")
    assert found(ema_remainder=0.25) == ("constant", 0.25, 1.0, "l2")
    assert found(method="progressive") == ("linear", 0.5, 2.0, "l2")
    file.write_text('[distill]\nmethod = "guided"\nthen = "tract"\n')
    assert found() == ("constant", 1e-3, 1.0, "l2")


def test_a_method_says_more_than_a_preset(teacher):
    assert "distance_every" in read_preset("digits").distill
    config, _ = resolve_distillation({"base": str(teacher), "preset": "digits", "method": "tract"}, None)
    assert read_preset("digits").distill["lr"] == 3e-4
    assert (config.lr, config.lr_schedule) == (1e-3, "constant")


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("", {}, (0.0, 0.0, 1e-3)),
        ("", {"ema": 0.0}, (0.0, 0.0, 0.0)),
        ("", {"ema": 0.99}, (0.99, 0.0, 0.0)),
        ("", {"ema_images": 50.0}, (0.0, 50.0, 0.0)),
        ("ema = 0.9", {}, (0.9, 0.0, 0.0)),
        ("ema_images = 9.0", {"ema": 0.99}, (0.99, 0.0, 0.0)),
        ("ema = 0.9", {"ema_images": 50.0}, (0.9, 50.0, 0.0)),
        ("ema_remainder = 0.5", {"ema_images": 50.0}, (0.0, 50.0, 0.0)),
        ("ema = 0.9", {"ema_remainder": 0.5}, (0.9, 0.0, 0.5)),
        ("ema_remainder = 0.5\nema = 0.9", {}, (0.9, 0.0, 0.5)),
    ],
)
def test_the_average_that_was_asked_for_last_counts(teacher, tmp_path, file, flags, expected):
    """Half-lives and remainders go before a decay, but not before one that is said on top of them."""
    path = tmp_path / "my.toml"
    path.write_text(f"[distill]\nmethod = 'tract'\n{file}\n")
    config, _ = resolve_distillation({"base": str(teacher), **flags}, path)
    assert (config.ema, config.ema_images, config.ema_remainder) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"addim": 0.75},
            "--addim 0.75: progressive does not use it; leave it out, or give --method consistency",
        ),
        (
            {"then": "tract"},
            "--then tract: progressive does not use it; leave it out, or give --method guided",
        ),
        (
            {"method": "trajectory", "self_ema": 0.9},
            "--self_ema 0.9: trajectory does not use it; leave it out, or ",
        ),
        (
            {"method": "tract", "path_steps": 4},
            "--path_steps 4: tract does not use it; .*--method trajectory",
        ),
        ({"method": "tract", "path_sampler": "ddim"}, "--path_sampler ddim: tract does not use it"),
        (
            {"method": "match", "guidance_range": "0,9"},
            "--guidance_range 0,9: match does not use it; .*guided",
        ),
        ({"method": "guided", "self_ema": 0.9}, "--self_ema 0.9: guided does not use it; .*--then tract"),
        (
            {"method": "guided", "first_steps": 3},
            "--first_steps 3: guided does not use it; .*--then consistency",
        ),
    ],
)
def test_flags_that_the_method_does_not_read_are_refused(teacher, flags, message):
    with pytest.raises(OptionError, match=re.escape(message).replace(r"\.\*", ".*")):
        resolve_distillation({"base": str(teacher), **flags}, None)


def test_flags_that_the_method_reads_and_files_that_say_more_are_taken(teacher, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[distill]\naddim = 0.75\nself_ema = 0.9\npath_steps = 4\n")
    for flags in (
        {}, {"method": "tract", "self_ema": 0.8}, {"method": "consistency", "addim": 0.5, "first_steps": 2},
        {"method": "trajectory", "path_steps": 8, "path_sampler": "ddim"},
        {"method": "guided", "guidance_range": "0,2", "then": "tract", "self_ema": 0.3},
    ):  # fmt: skip
        config, _ = resolve_distillation({"base": str(teacher), **flags}, path)
        assert values_of(config).items() >= flags.items()
    assert (config.method_settings["addim"], config.method_settings["path_steps"]) == (0.75, 4)


@pytest.mark.parametrize(
    "flags",
    [{"phases": "8,4", "to_steps": 4}, {"phases": "8,4", "stages": 1}, {"to_steps": 4, "stages": 1}],
)
def test_one_way_of_saying_the_steps(teacher, flags):
    first, second = flags
    with pytest.raises(OptionError, match=f"--{first} and --{second} set the same thing; give one of them"):
        resolve_distillation({"base": str(teacher), **flags}, None)


def test_an_unknown_method_is_named(teacher):
    for flags in ({"method": "progresive"}, {"method": "guided", "then": "match"}):
        with pytest.raises(OptionError, match="is unknown; "):
            resolve_distillation({"base": str(teacher), **flags}, None)


def test_data_that_are_gone_are_not_asked_for(teacher, tmp_path):
    config, _ = resolve_distillation({"base": str(teacher)}, None)
    assert config.data == str(tmp_path / "toy_4")
    write_checkpoint(teacher, dataset=str(tmp_path / "gone"))
    assert resolve_distillation({"base": str(teacher)}, None)[0].data == ""
    write_checkpoint(teacher, dataset="hf://somewhere/else")
    assert resolve_distillation({"base": str(teacher)}, None)[0].data == "hf://somewhere/else"


# Data


def test_a_method_that_needs_no_images_does_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(distill_config(Path(), Path("a"), method="trajectory"), data="")
    described = model(unet={"in_channels": 3}, class_names=["a", "b"])
    found = teachers_images(config, described)
    assert found == no_images(described)
    assert (found.image_size, found.channels, found.class_names, found.store) == (4, 3, ["a", "b"], None)
    assert (found.name, found.fingerprint) == ("no images", "")
    for config_, described_ in (
        (dataclasses.replace(config, method="progressive"), described),
        (config, model(unet={"in_channels": 3}, prediction="eps")),  # whose first student needs them
    ):
        with pytest.raises(VdiffError, match="data"):
            teachers_images(config_, described_)


def test_images_that_are_there_are_taken_all_the_same(tmp_path):
    """A trajectory learns nothing from them, but its students are compared with them."""
    data = write_dataset(tmp_path / "toy_4")
    described = model(unet={"in_channels": 1})
    found = teachers_images(distill_config(data, Path("a"), method="trajectory"), described)
    assert found.store is not None
    assert found.image_size == SIZE


def test_batches_of_no_images_have_classes_by_seed_and_step(tmp_path):
    described = model(unet={"in_channels": 2}, class_names=["a", "b", "c"])
    config = distill_config(tmp_path, Path("a"), method="trajectory", batch_size=64, seed=3)
    engine = build_engine(config)

    def classes(start: int, number: int, **changes) -> list[list[int]]:
        stream = no_images(described).batches(dataclasses.replace(config, **changes), engine).start_at(start)
        batches = [next(stream) for _ in range(number)]
        assert all(batch.images.shape == (64, 2, 4, 4) and not batch.images.any() for batch in batches)
        return [batch.classes.tolist() for batch in batches]

    whole = classes(0, 4)
    assert whole == classes(0, 4)
    assert whole[2:] == classes(2, 2)
    assert whole[0] != whole[1]
    assert whole != classes(0, 4, seed=4)
    assert {k for batch in whole for k in batch} == {0, 1, 2}
    assert min(sum(batch.count(k) for batch in whole) for k in range(3)) > 60
    bare = next(no_images(model(unet={"in_channels": 2})).batches(config, engine).start_at(0))
    assert bare.classes is None


def test_processes_share_the_classes_of_no_images(tmp_path):
    described = model(unet={"in_channels": 1}, class_names=["a", "b", "c"])
    config = distill_config(tmp_path, Path("a"), method="trajectory", batch_size=8)
    whole = no_images(described).batches(config, build_engine(config))
    parts = [dataclasses.replace(whole, share=slice(4 * k, 4 * k + 4)) for k in range(2)]
    for step in range(3):
        one, *two = (next(batches.start_at(step)) for batches in (whole, *parts))
        assert [k for part in two for k in part.classes.tolist()] == one.classes.tolist()
        assert [len(part.images) for part in two] == [4, 4]
