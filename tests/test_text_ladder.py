"""Ladders of text-to-image models: guided targets by formula, LoRA students on one frozen base, and whole students."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import vdiff
from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import pipeline
from tests.programs import ends, launch
from tests.text_training import write_captioned, write_text_checkpoint
from tests.toy import Watcher, assert_equal_bits, scalars, signal_at
from vdiff.api import wrap
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.files import CHECKSUM, write_json
from vdiff.interop.diffusers.reading import import_pipeline
from vdiff.interop.diffusers.text_writing import export_single_file, export_text_pipeline
from vdiff.interop.lora import export_lora
from vdiff.models.adapters import AdapterSettings, add_adapter, copy_adapter, merge_adapter
from vdiff.models.checkpoint import ADAPTER, WEIGHTS, load_checkpoint, read_config, read_tensors
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw_from, rmse
from vdiff.models.prompting import Prompting
from vdiff.training import comparison
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import memory_of_base
from vdiff.training.comparison import picture
from vdiff.training.config import DistillConfig
from vdiff.training.engine import build_engine
from vdiff.training.ladder import run_stages
from vdiff.training.objectives import StudentState, TrainBatch
from vdiff.training.presets import read_run
from vdiff.training.stages import Stage, plan_stages, remarks, resolve_distillation, teachers_images
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep
from vdiff.training.student import begin_stage, describe_student, memory_of_stage, stage_run, stage_task
from vdiff.training.verdict import HELD_OUT, read_verdict


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the tiny pipelines, and a captioned dataset."""
    folder = tmp_path_factory.mktemp("text_ladder")
    write_captioned(folder / "data")
    for kind in ("sd15", "sd2", "sdxl"):
        write_text_checkpoint(folder / kind, kind)
    return folder


def planned(place: Path, base: Path, students: Path, **flags: Any) -> tuple[DistillConfig, list[Stage]]:
    """The settings of a short ladder from 8 steps, and its stages, whose students go into the folder `students`."""
    values = {
        "base": str(base), "data": str(place / "data"), "num_iters": 2, "batch_size": 2, "lr": 1e-2, "device": "cpu",
        "num_workers": 0, "tracker": "none", "threads": 1, "warmup_iters": 0, "teacher_steps": 8, **flags,
    }  # fmt: skip
    config, teacher = resolve_distillation({key: value for key, value in values.items() if value is not None}, None)
    return config, plan_stages(config, teacher, home=students / "student")


def climb(place: Path, base: Path, students: Path, reporter: Watcher | None = None, **flags: Any) -> list[Stage]:
    """Train a short ladder."""
    config, stages = planned(place, base, students, **flags)
    images = teachers_images(config, read_config(base))
    run_stages(stages, config, images, build_engine(config), overwrite=False, reporter=reporter or Watcher())
    return stages


PROMPTS = ["a red fox", "a sad cat"]


# Targets


class Gaussian(nn.Module):
    """v̂ of data N(m_c, s_c²) in each pixel, where class 0 has (m, s) = (1, ½), and no class (−½, 2)."""

    def forward(self, z: Tensor, timestep: Tensor, *, classes: Tensor) -> Tensor:
        angle = (timestep.double() + 1) / 1024 * math.pi / 2
        mean, std = (torch.tensor(pair)[classes].double() for pair in ([1.0, -0.5], [0.5, 2.0]))
        alpha, sigma = angle.cos(), angle.sin()
        shape = (-1, *[1] * (z.ndim - 1))
        gain = (alpha * std**2 / (alpha**2 * std**2 + sigma**2)).reshape(shape)
        alpha, sigma, mean = (each.reshape(shape) for each in (alpha, sigma, mean))
        x = mean + gain * (z.double() - alpha * mean)
        return ((alpha * z.double() - x) / sigma).to(z.dtype)


@pytest.mark.parametrize(("steps", "after"), [(8, 4), (8, 2), (8, 1)])
def test_the_target_of_the_first_stage_is_the_guided_path_of_the_teacher(tmp_path, steps, after):
    """Written out for Gaussian data: DDIM by x̂ and ε̂ of the guided x̂, and eq. 9 of Salimans & Ho 2022 for x*."""
    scale, count = 4.0, 6
    teacher = wrap(Gaussian(), (1, 2, 2), schedule=CosineSchedule(math.inf), classes=1, null_class=True)
    values = {"num_iters": 1, "batch_size": count, "lr": 1e-3, "device": "cpu", "guidance_scale": scale, "base": "x"}
    config = DistillConfig(**values, teacher_steps=steps, class_dropout=0.0)
    stage = Stage(Path("x"), steps, tmp_path, after, is_guided=True)
    settings = stage.settings(config)
    task = stage_task(
        stage, settings, build_engine(config), teacher.plain(), teacher.config, teacher.plain(), teacher.config
    )
    x, noise, u = randn(count, 1, 2, 2), randn(count, 1, 2, 2, seed=1), (torch.arange(count) + 0.5).double() / count
    classes = torch.zeros(count, dtype=torch.int64)
    batch = TrainBatch(x, noise, u, teacher.denoiser.condition(classes=classes))
    found = task.objective(batch, StudentState(teacher.plain(), teacher.plain(), 0.0))

    def guided(z: Tensor, alpha: float, sigma: float) -> Tensor:
        answers = [m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z - alpha * m) for m, s in ((1, 0.5), (-0.5, 2))]
        return scale * answers[0] - (scale - 1) * answers[1]

    for k in range(count):
        level = math.floor(float(u[k]) * after) + 1
        times = [level / after - j / steps for j in range(steps // after + 1)]
        curve = [(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)) for t in times]
        start = z = curve[0][0] * x[k].double() + curve[0][1] * noise[k].double()
        for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(curve):
            image = guided(z, alpha, sigma)
            z = alpha_s * image + sigma_s * (z - alpha * image) / sigma
        (alpha, sigma), (alpha_s, sigma_s) = curve[0], curve[-1]
        expected = (z - sigma_s / sigma * start) / (alpha_s - sigma_s / sigma * alpha)
        torch.testing.assert_close(found.x[k].double(), expected, rtol=1e-8, atol=1e-8)


# The LoRA of a student


def test_a_lora_begins_with_the_product_of_a_smaller_one():
    """W + (alpha/rank)·B A of both, written out; other layers and other rows change nothing."""
    small, large = AdapterSettings(2, 3.0, targets=("0",)), AdapterSettings(5, 2.0, targets=("0", "1"))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    networks = [copy.deepcopy(wrap(layers, (4,)).network) for _ in range(2)]
    for network, settings in zip(networks, (small, large), strict=True):
        add_adapter(network, settings)
    for k, (name, weight) in enumerate(networks[0].named_parameters()):
        if "lora_B" in name:
            weight.data.copy_(randn(*weight.shape, seed=k))
    copy_adapter(networks[1], large, networks[0], small)
    a, b = (dict(networks[0].named_parameters())[f"model.0.lora_{part}.default.weight"] for part in "AB")
    expected = layers[0].weight + 3.0 / 2 * b @ a
    merge_adapter(networks[1])
    torch.testing.assert_close(networks[1].get_submodule("model.0").weight, expected)
    assert torch.equal(networks[1].get_submodule("model.1").weight, layers[1].weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 1}, "--lora_rank 1: the LoRA of the teacher has rank 2; give --lora_rank 2"),
        ({"targets": ("1",)}, "--lora_targets 1: the LoRA of the teacher changes model.0 too; give --lora_targets 0"),
    ],
)
def test_a_lora_that_the_one_of_its_teacher_does_not_fit_in_is_refused(changes, words):

    before = AdapterSettings(2, 2.0, targets=("0",))
    mine = AdapterSettings(**{"rank": 2, "alpha": 2.0, "targets": ("0",), **changes})
    networks = [copy.deepcopy(wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (4,)).network) for _ in range(2)]
    for network, settings in zip(networks, (before, mine), strict=True):
        add_adapter(network, settings)
    with pytest.raises(OptionError) as caught:
        copy_adapter(networks[1], mine, networks[0], before)
    assert str(caught.value) == words


def answer(denoiser: Denoiser, base: Path) -> Tensor:
    """v̂ for two latents and prompts, in the middle of the noise."""
    prompting = Prompting.read(read_config(base))
    condition = prompting.condition(denoiser.network.signature.names, ["a red fox", "a sad cat"])
    with torch.no_grad():
        return denoiser.eval()(randn(2, 4, 8, 8, dtype=torch.float32), torch.full((2,), 0.5).double(), condition).v


@pytest.fixture(scope="module")
def students(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided ladder of LoRA students from 8 steps to 2, without a break."""
    folder = tmp_path_factory.mktemp("students")
    climb(place, place / "sd2", folder, **LORA)
    return folder


LORA: dict[str, Any] = {"guidance_scale": 3.0, "to_steps": 2, "lora_rank": 3, "num_iters": 3}


def test_students_are_loras_of_the_one_base(place, students):
    base = read_config(place / "sd2")
    for k, steps in enumerate((4, 2)):
        folder = students / f"base_{k}"
        found = read_config(folder)
        assert (found.num_timesteps, found.method, found.prediction) == (steps, "progressive", "v")
        assert found.adapter is not None
        assert found.adapter.rank == 3
        assert found.base is not None
        assert Path(found.base["path"]) == place / "sd2"
        assert (found.guidance_scale, found.shape, found.components) == (3.0, (4, 8, 8), base.components)
        assert not (folder / "model.safetensors").exists()
        tensors = read_tensors(folder / ADAPTER)
        assert all(".lora_" in name for name in tensors)
        assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
        assert read_verdict(folder) is not None


def test_the_weights_of_the_base_are_in_memory_once(place, students):
    """The teacher, the student and the average that tract learns from."""
    flags = {**LORA, "to_steps": None, "method": "tract", "phases": "8,4,2"}
    config, stages = planned(place, place / "sd2", students, **flags)
    engine, images = build_engine(config), teachers_images(config, read_config(place / "sd2"))
    second = stages[1]
    run = stage_run(second, second.settings(config), images, engine, {})
    step = TrainStep(run, engine)
    teacher: Any = run.objective
    networks = [step.denoiser.network, step.averages.teacher.network, teacher.teacher.network]
    places = [
        {name: weight.data_ptr() for name, weight in network.named_parameters() if ".lora_" not in name}
        for network in networks
    ]
    assert len(places[0]) > 100
    assert places[0] == places[1] == places[2]
    loras = [
        {weight.data_ptr() for name, weight in network.named_parameters() if ".lora_" in name} for network in networks
    ]
    assert not (loras[0] & loras[1]) | (loras[1] & loras[2]) | (loras[0] & loras[2])
    assert {name for name, weight in step.denoiser.named_parameters() if weight.requires_grad} == {
        name for name, _ in step.denoiser.named_parameters() if ".lora_" in name
    }


def test_a_student_begins_as_its_teacher_and_merged_as_unmerged(place, students):
    config, stages = planned(place, place / "sd2", students, **LORA)
    second = stages[1].settings(config)
    description = describe_student(stages[1], second, read_config(stages[0].folder))
    teacher, student, _ = begin_stage(stages[1], second, description)
    expected = answer(teacher, place / "sd2")
    assert torch.equal(answer(student, place / "sd2"), expected)
    merged = answer(load_checkpoint(stages[0].folder)[0], place / "sd2")
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (answer(load_checkpoint(place / "sd2")[0], place / "sd2") - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("bar", "update"), [("base_0", 1), ("base_1", 3)])
def test_a_cut_ladder_ends_with_the_same_bits(place, students, tmp_path, bar, update):
    with pytest.raises(Interrupted):
        climb(place, place / "sd2", tmp_path, signal_at(update, bar=bar), **LORA)
    names = read_tensors(state_path(tmp_path / bar)).keys()
    assert all(".lora_" in name for name in names if name.startswith(("raw.", "exp_avg")))
    climb(place, place / "sd2", tmp_path, **LORA)
    for name in ("base_0", "base_1"):
        assert_equal_bits(students / name / ADAPTER, tmp_path / name / ADAPTER)


@pytest.mark.parametrize(("kind", "number"), [("sd2", 0), ("sd2", 1), ("sd15", 0)])
def test_a_stage_needs_little_more_memory_than_training_a_lora(place, students, tmp_path, kind, number):
    """Bytes of weights, gradients, moments and activations, counted: a stage of a ladder and an update of `train.py`.

    The first stage is guided; the teacher of the second one has a LoRA of its own.
    """
    home = students if number else tmp_path
    config, stages = planned(place, place / kind, home, **LORA, batch_size=8, check_images=0)
    engine, images = build_engine(config), teachers_images(config, read_config(place / kind))
    stage = memory_of_stage(stages[number], config, images, engine)
    flags = {"base": config.base, "data": config.data, "lora_rank": 3, "batch_size": 8, "device": "cpu", "ema": 0.0}
    training, images = resolve_training(flags, None, folder=Path("none"), resume=False)
    plain = memory_of_base(training, images, describe(training, images), engine)
    found, expected = (memory.total - memory.program - memory.images for memory in (stage, plain))
    assert expected <= found <= 1.25 * expected


def test_a_fine_tuned_lora_is_a_part_of_the_lora_of_its_students(place, students, tmp_path):
    """As a base model: its students' LoRA is one of the same base, and says so; without that base nothing begins."""
    tuned = Path(shutil.copytree(students / "base_0", tmp_path / "tuned"))
    described = json.loads((tuned / "config.json").read_text())
    described |= {"method": "base", "teacher": None, "guidance_scale": None, "num_timesteps": 50}
    described["base"]["path"] = str(place / "sd2")
    write_json(tuned / "config.json", {key: value for key, value in described.items() if key != CHECKSUM})
    config, stages = planned(place, tuned, tmp_path, to_steps=4, lora_rank=4)
    first = stages[0].settings(config)
    described = describe_student(stages[0], first, read_config(tuned))
    teacher, student, _ = begin_stage(stages[0], first, described)
    expected = answer(teacher, place / "sd2")
    torch.testing.assert_close(answer(student, place / "sd2"), expected)
    torch.testing.assert_close(answer(load_checkpoint(students / "base_0")[0], place / "sd2"), expected)
    assert f"belongs to {place / 'sd2'}: it contains the fine-tuning {tuned}" in remarks(config, read_config(tuned))[0]
    lost = replace(described, base={"path": str(tmp_path / "lost"), "fingerprint": ""})
    with pytest.raises(VdiffError, match=r"lost, the base of this model: no such checkpoint; put the base back there"):
        begin_stage(stages[0], first, lost)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_encoded_data_give_the_latents_and_embeddings_of_pictures_and_captions(place, tmp_path, kind):
    """Those of the empty caption too, which guidance needs."""
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    flags = {"data": str(data), "flip": False, "guidance_scale": 2.0, "lora_rank": 2, "caption_dropout": 0.5}
    given = []
    for is_encoded in (False, True):
        if is_encoded:
            done(f"vdiff data encode {data} --base {place / kind} --device cpu")
        config, stages = planned(place, place / kind, tmp_path, **flags)
        engine, images = build_engine(config), teachers_images(config, read_config(place / kind))
        run = stage_run(stages[0], stages[0].settings(config), images, engine, {})
        with closing(run.batches.start_at(0)) as batches:
            batch = next(batches)
        assert (batch.embeddings is not None) == is_encoded
        given.append(TrainStep(run, engine).draw(0, batch))
    torch.testing.assert_close(given[0].images, given[1].images, rtol=1e-5, atol=1e-5)
    assert given[0].condition.can_drop
    for part in ("tensors", "null"):
        fresh, kept = (getattr(each.condition, part) for each in given)
        for name in fresh.keys() - {"tokens"}:
            torch.testing.assert_close(torch.as_tensor(fresh[name]), torch.as_tensor(kept[name]), rtol=1e-5, atol=1e-5)


# Plans


def plans(place: Path, kind: str, tmp_path: Path, **flags: Any) -> list[tuple[str, int, int, bool]]:
    _, stages = planned(place, place / kind, tmp_path, **flags)
    return [(stage.method, stage.teacher_steps, stage.num_steps, stage.is_guided) for stage in stages]


def test_guidance_is_part_of_the_first_stage_that_shortens(place, tmp_path):
    halvings = [("progressive", 8, 4, True), ("progressive", 4, 2, False)]
    assert plans(place, "sd2", tmp_path, guidance_scale=3.0, to_steps=2) == halvings
    assert plans(place, "sd15", tmp_path, guidance_scale=3.0, to_steps=2, lora_rank=2) == halvings
    whole = plans(place, "sd15", tmp_path, guidance_scale=3.0, to_steps=2)
    assert whole == [("match", 8, 8, False), *halvings]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_predicts_what_its_base_predicts(place, tmp_path, kind):
    stages = climb(place, place / kind, tmp_path, to_steps=4, lora_rank=2, guidance_scale=2.0)
    found = read_config(stages[-1].folder)
    assert (found.prediction, found.num_timesteps, found.method) == ("eps", 4, "progressive")


def test_whole_students_of_a_base_that_predicts_noise_predict_v(place, tmp_path):
    stages = climb(place, place / "sd15", tmp_path, to_steps=4, guidance_scale=2.0)
    assert [read_config(stage.folder).prediction for stage in stages] == ["v", "v"]
    names = read_tensors(stages[-1].folder / "model.safetensors").keys()
    assert names
    assert not [name for name in names if "text_encoder" in name]


SMALLER = '[unet]\nblock_out_channels = [8, 8, 16, 16]\nnorm_num_groups = 4\nmid_block_type = ""\n'


def test_a_smaller_unet_is_trained_resumed_drawn_exported_and_imported(place, tmp_path):
    """The first student has the smaller UNet, with the weights that fit; the others are copies of it."""
    (tmp_path / "small.toml").write_text(SMALLER)
    flags = {"student_config": str(tmp_path / "small.toml"), "to_steps": 2, "guidance_scale": 2.0, "check_images": 0}
    reporter = Watcher()
    whole = climb(place, place / "sd2", tmp_path / "whole", reporter, **flags)
    [line] = [line for line in reporter.lines if "begins with" in line]
    assert re.fullmatch(r".*base_0 begins with 100% of [\d,]+ parameters from the teacher \(\d+ tensors .*", line)
    with pytest.raises(Interrupted):
        climb(place, place / "sd2", tmp_path / "cut", signal_at(1, bar="base_0"), **flags)
    cut = climb(place, place / "sd2", tmp_path / "cut", **flags)
    for one, other in zip(whole, cut, strict=True):
        assert_equal_bits(one.folder / WEIGHTS, other.folder / WEIGHTS)
        unet = read_config(one.folder).network_config["unet"]["config"]
        assert (unet["block_out_channels"], unet["mid_block_type"]) == ([8, 8, 16, 16], None)
    last, noise = whole[-1].folder, randn(2, 4, 8, 8, dtype=torch.float32)
    expected = torch.Tensor(vdiff.load(last, device="cpu").sample(prompts=PROMPTS, noise=noise))
    with pytest.raises(VdiffError, match="has a UNet without a middle, which single files do not have; write a folder"):
        export_single_file(last, tmp_path / "whole.safetensors")
    export_text_pipeline(last, tmp_path / "pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"latents": noise, "output_type": "pt", "height": 64, "width": 64}
    drawn = pipe(PROMPTS, num_inference_steps=2, guidance_scale=0, **call).images
    torch.testing.assert_close(drawn * 2 - 1, expected, rtol=0, atol=1e-4)
    import_pipeline(str(tmp_path / "pipeline"), tmp_path / "again")
    again = torch.Tensor(vdiff.load(tmp_path / "again", device="cpu").sample(prompts=PROMPTS, noise=noise))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("layer_per_block = 1", {}, "layer_per_block is not a size of a UNet of diffusers; did you mean 'layers"),
        ("cross_attention_dim = 8", {}, "cross_attention_dim must be that of the teacher; take it out"),
        ("block_out_channels = [10, 10, 10, 10]", {}, "must be divisible by num_groups .8.; correct the file"),
        ("block_out_channels = 'wide'", {}, "small.toml: .*; correct the file"),
        ("layers_per_block = 2", {"lora_rank": 2}, "--lora_rank 2: this student has another network than its teacher"),
    ],
)
def test_a_smaller_unet_that_cannot_be_is_refused(place, tmp_path, text, more, words):
    (tmp_path / "small.toml").write_text(f"[unet]\n{text}\n")
    config, stages = planned(
        place, place / "sd2", tmp_path, student_config=str(tmp_path / "small.toml"), to_steps=4, **more
    )
    with pytest.raises(OptionError, match=words):
        describe_student(stages[0], stages[0].settings(config), read_config(place / "sd2"))


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("sd15", {"lora_rank": 2, "to_steps": 1}, "sd15 predicts ε, and so does its LoRA, .* end at 2 steps, or"),
        ("sd2", {"guidance_scale": 3.0, "method": "guided"}, "--guidance_scale 3: .* take guidance as an input; leave"),
        ("sd2", {"guidance_scale": 3.0, "method": "ect"}, "--guidance_scale 3: ect does not learn what its teacher"),
        ("sd2", {"class_dropout": 0.1}, "--class_dropout 0.1: the network does not use classes"),
        ("sd2", {"lora_alpha": 2.0}, "--lora_alpha: all weights are to learn; give --lora_rank"),
    ],
)
def test_what_does_not_fit_together_is_refused(place, tmp_path, kind, flags, words):
    with pytest.raises(OptionError, match=words):
        planned(place, place / kind, tmp_path, **flags)


def test_a_student_is_no_teacher_to_be_guided(place, students, tmp_path):
    with pytest.raises(OptionError, match=r"base_0 is a student of 4 steps, which has learned the scale 3; leave it"):
        planned(place, students / "base_0", tmp_path, guidance_scale=3.0, teacher_steps=None)
    with pytest.raises(
        OptionError, match=r"--method guided: .*base_0 has learned the guidance scale 3; give --base the"
    ):
        planned(place, students / "base_0", tmp_path, method="guided", teacher_steps=None)


def test_a_negative_prompt_that_has_no_effect_is_refused(place, students):
    words = "it has no effect, as this student has its guidance inside; leave it out"
    line = f"sample.py --checkpoint {students / 'base_1'} --prompt fox --negative_prompt blurry --device cpu"
    assert f"--negative_prompt: {words}" in error(line, 2)
    student, base = (vdiff.load(folder, device="cpu") for folder in (students / "base_1", place / "sd2"))
    with pytest.raises(VdiffError, match=words):
        student.sample(prompts=PROMPTS, negative_prompt="blurry")
    for draw in (base.sample, partial(base.denoise, torch.zeros(1, 4, 8, 8), 0.5)):
        with pytest.raises(VdiffError, match="it has no effect without guidance; leave it out, or give --guidance"):
            draw(prompts=PROMPTS[:1], negative_prompt="blurry", guidance=0.0)


def test_pictures_of_a_student_need_no_guidance(students):
    denoiser, config = load_checkpoint(students / "base_1")
    prompting = Prompting.read(config)
    noise = ImageNoise(seed=0, indices=range(2), shape=config.shape, device=torch.device("cpu"))
    condition = prompting.condition(denoiser.network.signature.names, ["a red fox", "a sad cat"])
    latents = draw_from(denoiser, Ddim(clipping_value=None), noise=noise, num_steps=2, condition=condition)
    assert prompting.decode(latents, check=False).shape == (2, 3, 64, 64)


def test_checks_comparison_and_samples_draw_the_prompts_of_a_file(place, tmp_path, monkeypatch):
    """A finished ladder draws its comparison again for other prompts, and for no other reason."""
    shown: list[Any] = []
    monkeypatch.setattr(comparison, "picture", lambda *facts: shown.append(facts) or picture(*facts))
    texts = ["a green house", "two cars", "the night"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "others.txt").write_text("a boat")
    line = (
        f"distill.py --base {place / 'sd2'} --data {place / 'data'} --out {tmp_path / 'student'} --teacher_steps 8 "
        "--num_iters 2 --batch_size 2 --lora_rank 2 --lr 1e-2 --device cpu --num_workers 0 --tracker none "
        "--report False --guidance_scale 3 --seed 5 --sample_prompts "
    )
    done(f"{line}{tmp_path / 'prompts.txt'}")
    student, verdict = tmp_path / "student", read_verdict(tmp_path / "student")
    assert (student / "samples" / "0000002.png").is_file()
    prompting = Prompting.read(read_config(place / "sd2"))

    def drawn(folder: Path, steps: int, guidance: float, seed: int) -> Tensor:
        denoiser, model = load_checkpoint(folder)
        noise = ImageNoise(seed=seed, indices=range(64), shape=model.shape, device=torch.device("cpu"))
        takes = denoiser.network.signature.names
        condition = prompting.condition(takes, [texts[k % 3] for k in range(64)])
        sampler = Ddim(clipping_value=None)
        return draw_from(denoiser, sampler, noise=noise, num_steps=steps, condition=condition, guidance=guidance)

    assert verdict is not None
    few = verdict.every
    found = [drawn(place / "sd2", 8 // few, 2.0, HELD_OUT + 5), drawn(student, 4 // few, 0.0, HELD_OUT + 5)]
    assert rmse(*found, read_config(student).space) == pytest.approx(verdict.rmse, rel=1e-4)
    [(columns, subjects)] = shown
    assert subjects == texts
    latents = drawn(student, 4, 0.0, 5)[:8]
    torch.testing.assert_close(columns[-1][1], prompting.decode(latents, check=False), rtol=0, atol=1e-3)
    done(f"{line}{tmp_path / 'prompts.txt'}")
    assert len(shown) == 1
    before = (student / ADAPTER).read_bytes()
    done(f"{line}{tmp_path / 'others.txt'}")
    assert shown[1][1] == ["a boat"]
    assert (student / ADAPTER).read_bytes() == before
    assert read_run(student).distill["sample_prompts"] == str(tmp_path / "prompts.txt")


def distil_by_prompts(place: Path, students: Path, prompts: Path, cut_at: int = 0) -> None:
    """A ladder with prompts for its checks and samples, interrupted after an update of its first stage."""
    reporter = signal_at(cut_at, bar="base_0") if cut_at else Watcher()
    flags = {**LORA, "batch_size": 4, "sample_prompts": str(prompts), "tracker": "tensorboard"}
    with nullcontext() if not cut_at else suppress(Interrupted):
        climb(place, place / "sd2", students, reporter, **flags)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_distil_by_prompts_as_one_and_resume(place, tmp_path):
    """Only the first one draws; an interrupted ladder of two ends with the bits of two."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green house\ntwo cars\nthe night\n")
    for name, count, cut_at in (("one", 1, 0), ("two", 2, 0), ("cut", 2, 2), ("cut", 2, 0)):
        act = partial(distil_by_prompts, place, tmp_path / name, prompts, cut_at)
        codes, stdout, stderr = ends(launch(act, tmp_path, count))
        assert codes == [0] * count, stdout + stderr
        assert (tmp_path / name / "base_1").exists() == (cut_at == 0)
    for student in ("base_0", "base_1"):
        one, two, cut = (tmp_path / name / student for name in ("one", "two", "cut"))
        assert_equal_bits(two / ADAPTER, cut / ADAPTER)
        verdicts = [read_verdict(folder) for folder in (one, two, cut)]
        assert verdicts[2] == verdicts[1]
        assert [verdict.rmse for verdict in verdicts if verdict] == pytest.approx([verdicts[0].rmse] * 3, rel=0.05)
        pictures = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (one, two, cut)]
        assert pictures[0] == pictures[1] == pictures[2] != []
        first, second = (scalars(folder)["loss"] for folder in (one, two))
        assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-2)


def one_stage(place: Path, students: Path, fsdp: bool) -> None:
    """The first stage of a ladder of LoRAs, whose teacher is guided."""
    flags = {"guidance_scale": 3.0, "to_steps": 4, "lora_rank": 3, "check_images": 2}
    climb(place, place / "sd2", students, **flags, fsdp=fsdp)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_that_shard_the_lora_distil_as_one(place, tmp_path):
    one_stage(place, tmp_path / "one", False)
    codes, stdout, stderr = ends(launch(partial(one_stage, place, tmp_path / "two", True), tmp_path))
    assert codes == [0, 0], stdout + stderr
    one, two = (read_tensors(tmp_path / name / "base_0" / ADAPTER) for name in ("one", "two"))
    assert one.keys() == two.keys()
    weights = [torch.cat([found[name].flatten() for name in one]) for found in (one, two)]
    assert (weights[0] - weights[1]).norm() < 1e-4 * weights[0].norm()
    assert read_verdict(tmp_path / "two" / "base_0") is not None


# Other tools


def drawn_by_diffusers(noise: Tensor, steps: int, **call: Any) -> tuple[Any, Callable[[], Tensor]]:
    """The pipeline sd2 with trailing timesteps; call it for pictures in [−1, 1]."""
    whole = diffusers.DiffusionPipeline.from_pretrained(pipeline("sd2"))
    whole.set_progress_bar_config(disable=True)
    trailing = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    whole.scheduler = diffusers.DDIMScheduler.from_config(whole.scheduler.config, **trailing)

    def draw() -> Tensor:
        images: Tensor = whole(PROMPTS, latents=noise, output_type="pt", num_inference_steps=steps, **call).images
        return images * 2 - 1

    return whole, draw


def test_the_exported_lora_draws_the_pictures_of_the_student(students, tmp_path):
    export_lora(students / "base_1", tmp_path / "fox.safetensors", "diffusers")
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    whole, draw = drawn_by_diffusers(noise, 2, guidance_scale=0)
    before = draw()
    whole.load_lora_weights(tmp_path, weight_name="fox.safetensors")
    expected = draw()
    found = vdiff.load(students / "base_1", device="cpu").sample(prompts=PROMPTS, noise=noise)
    torch.testing.assert_close(torch.Tensor(found), expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 1e-3


def test_a_student_that_takes_guidance_draws_the_pictures_of_diffusers_pipeline(place, tmp_path):
    """The pipeline feeds `guidance_scale` − 1 where the UNet has `time_cond_proj_dim`."""
    flags = {"method": "guided", "guidance_range": "2,14", "to_steps": 4, "num_iters": 3, "check_images": 0}
    stages = climb(place, place / "sd2", tmp_path, **flags)
    assert [(stage.method, stage.num_steps) for stage in stages] == [("guided", 8), ("progressive", 4)]
    model = vdiff.load(stages[-1].folder, device="cpu")
    assert model.config.guidance_range == [2.0, 14.0]
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    pictures = [torch.Tensor(model.sample(prompts=PROMPTS, noise=noise, guidance=w)) for w in (2.0, 6.5)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4
    assert torch.equal(torch.Tensor(model.sample(prompts=PROMPTS, noise=noise)), pictures[1])
    export_text_pipeline(stages[-1].folder, tmp_path / "pipeline")
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    whole.set_progress_bar_config(disable=True)
    drawn = whole(PROMPTS, latents=noise, output_type="pt", num_inference_steps=4, guidance_scale=7.5).images
    torch.testing.assert_close(pictures[1], drawn * 2 - 1, rtol=0, atol=1e-4)
    import_pipeline(str(tmp_path / "pipeline"), tmp_path / "again")
    again = vdiff.load(tmp_path / "again", device="cpu")
    assert (again.config.guidance_range, again.config.num_timesteps) == ([2.0, 14.0], 4)
    for weight, expected in zip((2.0, 6.5), pictures, strict=True):
        assert torch.equal(torch.Tensor(again.sample(prompts=PROMPTS, noise=noise, guidance=weight)), expected)
    scheduler = tmp_path / "pipeline/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(VdiffError, match=r"vdiff/config.json describes another schedule or prediction; export"):
        import_pipeline(str(tmp_path / "pipeline"), tmp_path / "other")
    readme = (tmp_path / "pipeline" / "README.md").read_text()
    assert "guidance scale 3 to 15 in diffusers" in readme
    assert "num_inference_steps=4, guidance_scale=9)" in readme
    with pytest.raises(VdiffError, match="is not a LoRA: it takes the guidance as an input"):
        export_lora(stages[-1].folder, tmp_path / "lora.safetensors", "diffusers")


# Without images, and the other methods


def test_a_student_learns_from_prompts_alone(place, tmp_path):
    """Every prompt once in an epoch; a cut run ends with the same bits; another file is refused."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n\na sad cat\nblue bird\n")
    flags = {"data": None, "prompts": str(prompts), "method": "trajectory", "to_steps": 2, "path_steps": 4,
        "lora_rank": 2, "guidance_scale": 2.0
    }  # fmt: skip
    config, _ = planned(place, place / "sdxl", tmp_path, **flags)
    images = teachers_images(config, read_config(place / "sdxl"))
    engine = build_engine(replace(config, batch_size=3))
    with closing(images.batches(replace(config, batch_size=3), engine).start_at(5)) as batches:
        batch = next(batches)
    assert sorted(batch.captions or []) == ["a red fox", "a sad cat", "blue bird"]
    climb(place, place / "sdxl", tmp_path / "whole", **flags)
    with pytest.raises(Interrupted):
        climb(place, place / "sdxl", tmp_path / "cut", signal_at(1, bar="base_0"), **flags)
    climb(place, place / "sdxl", tmp_path / "cut", **flags)
    assert_equal_bits(tmp_path / "whole" / "base_0" / ADAPTER, tmp_path / "cut" / "base_0" / ADAPTER)
    assert read_config(tmp_path / "cut" / "base_0").prediction == "eps"


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("sd2", {}, "progressive learns from images; give --method trajectory, or draw a dataset with sample.py"),
        ("sd15", {"method": "trajectory"}, "sd15 predicts ε, .* give --method trajectory with --lora_rank 64, or"),
        ("sd2", {"data": "x", "method": "trajectory"}, "and --data x exclude each other; give one"),
    ],
)
def test_prompts_that_cannot_replace_images_are_refused(place, tmp_path, kind, flags, words):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n")
    config, _ = planned(
        place, place / kind, tmp_path, **{"data": None, "prompts": str(prompts), "to_steps": 4, **flags}
    )
    with pytest.raises(OptionError, match=words):
        teachers_images(config, read_config(place / kind))


@pytest.mark.parametrize("method", ["tract", "consistency"])
def test_other_methods_make_loras(place, tmp_path, method):
    stages = climb(place, place / "sd2", tmp_path, method=method, phases="8,2", lora_rank=2, guidance_scale=2.0)
    found = read_config(stages[-1].folder)
    assert (found.method, found.num_timesteps, found.guidance_scale) == (method, 2, 2.0)
    assert (stages[-1].folder / ADAPTER).exists()


def test_the_recipe_of_lcm_lora_is_consistency_in_one_segment(place, tmp_path):
    config, stages = planned(
        place, place / "sd15", tmp_path, preset="lcm_lora", teacher_steps=None, num_iters=None, lr=None, batch_size=None
    )
    assert [(stage.method, stage.teacher_steps, stage.num_steps) for stage in stages] == [("consistency", 64, 1)]
    assert (config.lora_rank, config.lora_alpha, config.lr, config.loss) == (64, 64.0, 1e-4, "huber")
    assert (config.batch_size, stages[0].updates(config), config.guidance_scale) == (12, 1020, 7.5)
    shorter = {"lora_rank": 2, "lora_alpha": 2.0, "teacher_steps": 8, "num_iters": 1, "check_images": 0}
    climb(place, place / "sd15", tmp_path, preset="lcm_lora", **shorter)
    model = vdiff.load(tmp_path / "base_0", device="cpu")
    assert model.config.num_timesteps == 1
    assert model.sample(prompts=PROMPTS, steps=4, sampler="consistency").shape == (2, 3, 64, 64)
