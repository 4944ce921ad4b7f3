"""The plan of a ladder: its settings, its data, and its stages from the teacher's steps down."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vdiff.data.captions import read_prompts
from vdiff.diffusion.distillation import METHODS, Guided, shortening
from vdiff.diffusion.phases import check_phase, fitting_phases, halving_start
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import parse, read_text
from vdiff.models.checkpoint import CheckpointConfig, read_config
from vdiff.models.codec import LATENTS
from vdiff.models.condition import GUIDANCE, IMAGE, SECOND_TIME, TOKENS
from vdiff.models.diffusers_names import TEXT_UNET, diffusers_class, diffusers_part
from vdiff.models.kinds import PYTHON, TEXT, UNET
from vdiff.projects import Project
from vdiff.records import RUN_FILE
from vdiff.reporting import Reporter
from vdiff.settings import COMMAND_LINE, parameters
from vdiff.training.base import check_dropped, check_unet
from vdiff.training.config import DistillConfig, resolve
from vdiff.training.dataset import TrainingData, check_conditions, no_images, open_images
from vdiff.training.finetuning import check_captioned, sample_shape_of, size_of
from vdiff.training.presets import DISTILLING, FINE_TUNING, Settings, preset_for, read_preset, read_run, read_settings

EVALUATIONS = 5
"""The cost of an update per image, in network evaluations: the teacher's two, the student's, and its gradient."""
SHARE = 25
"""A check uses at most 1/N of its stage's evaluations; comparison and report use 1/N of the ladder's."""
SIZES_OF_DIFFUSERS = (
    *("block_out_channels", "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    *("attention_head_dim", "num_attention_heads", "norm_num_groups"),
    *("down_block_types", "mid_block_type", "up_block_types"),
)
"""What a `student_config` may change in a UNet of diffusers; an empty text stands for their `None`."""
SHORTEST_IN_HALF = 64
"""Up to this many teacher steps, bf16 is precise enough. On 8×8 digits, targets differ from the student's prediction
by 0.0016 at 1024 → 512 steps and 0.0065 at 64 → 32; bf16 adds an error of 0.0014 to 0.0015 (x-prediction, root mean
square of x)."""


@dataclass(frozen=True)
class Stage:
    """One student: the folder and the steps of its teacher, and its own folder, steps and method.

    Attributes:
        is_first: whether the student's network may differ from its teacher's.
        is_guided: whether the student learns its teacher's predictions with `guidance_scale`.
    """

    base: Path
    teacher_steps: int
    folder: Path
    num_steps: int
    method: str = "progressive"
    is_first: bool = field(default=True, compare=False)
    is_guided: bool = field(default=False, compare=False)

    def updates(self, config: DistillConfig) -> int:
        """Optimiser updates: `num_iters` for each halving, and more for students of 1 and 2 steps."""
        halvings = max(1.0, math.log2(self.teacher_steps / self.num_steps))
        factor = config.last_factor if self.num_steps <= 2 and not METHODS[self.method].keeps_steps else 1.0
        return max(1, round(config.num_iters * halvings * factor))

    def budget(self, config: DistillConfig) -> int:
        """How many network evaluations the check may use."""
        return self.updates(config) * config.batch_size * EVALUATIONS // SHARE

    @property
    def is_fine(self) -> bool:
        """Whether the steps in targets are so short that bf16 rounding would exceed their effect."""
        method = METHODS[self.method]
        steps = self.teacher_steps if method.needs_images else self.num_steps  # a path has its own steps
        return not method.keeps_steps and steps > SHORTEST_IN_HALF

    def settings(self, config: DistillConfig) -> DistillConfig:
        """The settings of this stage alone."""
        return replace(
            config,
            student_config=config.student_config if self.is_first else "",
            base=self.base.as_posix(),
            guidance_scale=config.guidance_scale if self.is_guided else None,
            method=self.method,
            teacher_steps=self.teacher_steps,
            phases="" if METHODS[self.method].keeps_steps else f"{self.teacher_steps},{self.num_steps}",
            to_steps=None,
            stages=None,
        )


def resolve_distillation(
    flags: Mapping[str, Any],
    config_file: Path | None,
    project: Project | None = None,
    reporter: Reporter | None = None,
) -> tuple[DistillConfig, CheckpointConfig]:
    """The settings of a ladder, and its first teacher: by default the project's base model.

    Raises:
        VdiffError: settings or teacher cannot be used.
    """
    settings = read_settings(config_file) if config_file else Settings({}, {})
    chosen = {**settings.distill, **flags}
    base = Path(chosen.get("base") or (project or Project()).teacher(reporter.line if reporter else id))
    teacher = read_config(base)
    usual = teacher.dataset if is_there(teacher.dataset) and not chosen.get("prompts") else ""
    data = str(chosen.get("data") or usual)
    num_images, takes_text = 0, TOKENS in teacher.signature.names
    with suppress(VdiffError):  # the code that reads the images reports their errors
        num_images = open_images(data, size_of(teacher), buckets=takes_text).num_images
    preset = str(chosen.get("preset") or _preset_of(base))
    if not preset and takes_text:
        preset = "text_lora" if chosen.get("lora_rank") else "text"
    if not preset:
        from vdiff.distributed import pick_device

        device = pick_device(str(chosen.get("device") or "auto")).type
        preset = preset_for(teacher.shape, num_images, device)
    presets = read_preset(preset, num_images).distill
    if ways := {"phases", "to_steps", "stages"} & chosen.keys():  # instead of those of the preset
        without = {"phases", "to_steps", "stages", *(["teacher_steps"] if "phases" in ways else [])}
        presets = {key: value for key, value in presets.items() if key not in without}
    layers: dict[str, Mapping[str, Any]] = {f"preset {preset}": presets}
    method = str(chosen.get("method") or presets.get("method") or DistillConfig.method)
    has_recipe = method == presets.get("method") and not chosen.get("recipe")  # the preset itself is one
    if method == "guided":
        method = str(chosen.get("then") or Guided.then)
    if method in METHODS and not has_recipe:
        layers[f"method {method}"] = recipe_of(method, str(chosen.get("recipe") or ""), presets)
    if takes_text:  # captions are dropped instead of classes
        layers["a text-to-image teacher"] = {"class_dropout": 0.0}
    if (chosen.get("lora_rank") or presets.get("lora_rank")) and teacher.family.predicts_noise:
        layers["a student that predicts ε"] = {"weighting": "snr_plus_one"}
    if config_file:
        layers[str(config_file)] = settings.distill
    config = resolve(DistillConfig, {**layers, COMMAND_LINE: flags})
    _check_read(config, flags)
    check_dropped(config, takes_text=takes_text, takes_classes=not takes_text)
    return replace(config, base=base.as_posix(), preset=preset, data=data), teacher


def recipe_of(method: str, recipe: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method, by `recipe`: those of its paper, or those of vdiff."""
    kind = METHODS[method]
    return kind.paper_settings(preset) if recipe == "paper" else kind.settings(preset)


def _check_read(config: DistillConfig, flags: Mapping[str, Any]) -> None:
    """Refuse flags of other methods.

    Raises:
        OptionError: names the flag, and a method that has it.
    """
    for name in flags:
        readers = [method for method, kind in METHODS.items() if name in parameters(kind)]
        if readers and not {config.method, config.shortening} & set(readers):
            flag = "then" if config.method == "guided" and readers[0] in shortening() else "method"
            raise OptionError(
                f"--{name} {flags[name]}: {config.method} does not use it",
                f"leave it out, or give --{flag} {readers[0]}",
            )


def _preset_of(base: Path) -> str:
    """The preset that the teacher was trained with, if it is recorded."""
    if not (base / RUN_FILE).is_file():
        return ""
    settings = read_run(base)
    preset = str(settings.train.get("preset") or settings.distill.get("preset") or "")
    return "" if preset in (*FINE_TUNING, *DISTILLING) else preset  # those do not follow from a model


def is_there(dataset: str) -> bool:
    """Whether a checkpoint's recorded dataset can still be opened: it is a local folder, or on a server."""
    return "://" in dataset or Path(dataset).exists()


def teachers_images(config: DistillConfig, teacher: CheckpointConfig, project: Project | None = None) -> TrainingData:
    """The dataset of a ladder, which must match the teacher; none if the method needs no images.

    Raises:
        VdiffError: the dataset is missing, or has another size, other channels or other classes.
    """
    takes_text, takes_image = (name in teacher.signature.names for name in (TOKENS, IMAGE))
    has_match = teacher.family.predicts_noise and not config.lora_rank
    if config.prompts:
        return _prompts_of(config, teacher, has_match=has_match)
    needs_images = METHODS[config.method].needs_images or has_match or takes_text or takes_image
    if not needs_images and not config.data:
        return no_images(teacher)
    if takes_text:
        images = open_images(config.data, size_of(teacher), project, buckets=True)
        check_captioned(images, config.base)
        sample_shape_of(teacher, images)
        return images
    if not (teacher.image_size or teacher.space.is_sound):
        raise OptionError(
            f"{config.base} generates samples of {' × '.join(map(str, teacher.shape))}, "
            "but datasets hold square images",
            "distil it in Python: vdiff.distill accepts tensors as data",
        )
    images = open_images(config.data, size_of(teacher), project)
    check_conditions(images, teacher.signature)
    if teacher.codec == LATENTS.name:
        sample_shape_of(teacher, images)
    elif images.channels != teacher.shape[0]:
        raise OptionError(
            f"{images.name} has {images.channels} channels, the teacher {teacher.shape[0]}",
            "give --data the dataset that it was trained on",
        )
    elif (images.shape, images.rate) != (teacher.shape, teacher.sample_rate):
        raise OptionError(
            f"{images}, but the teacher has samples of {' × '.join(map(str, teacher.shape))}"
            f"{f' at {teacher.sample_rate:,} Hz' if teacher.sample_rate else ''}",
            "give --data the dataset that it was trained on",
        )
    if teacher.class_names and images.class_names != teacher.class_names:
        raise OptionError(
            f"{images.name} has other classes than the teacher", "give --data the dataset that it was trained on"
        )
    return images


def _prompts_of(config: DistillConfig, teacher: CheckpointConfig, *, has_match: bool) -> TrainingData:
    """The prompts of --prompts in place of images.

    Args:
        has_match: whether the ladder begins with a student of v, which needs images.

    Raises:
        OptionError: the file cannot be read, or teacher or method need something else.
    """
    from vdiff.models.autoencoder import picture_shape

    flag = f"--prompts {config.prompts}"
    if TOKENS not in teacher.signature.names:
        raise OptionError(f"{flag}: {config.base} takes no prompts", "leave it out")
    if config.data:
        raise OptionError(f"{flag} and --data {config.data} exclude each other", "give one of them")
    if METHODS[config.method].needs_images or has_match:
        why = f"{config.method} learns from images"
        if has_match:
            why = f"{config.base} predicts ε, and a whole student learns v from images first"
        ways = f"--method trajectory{' with --lora_rank 64' * has_match}"
        raise OptionError(f"{flag}: {why}", f"give {ways}, or draw a dataset with sample.py --out drawn.lmdb")
    texts, shape = read_prompts(Path(config.prompts), "--prompts"), teacher.shape
    pictures: tuple[int, ...] = shape
    if teacher.codec == LATENTS.name:
        pictures = picture_shape((shape[0], shape[1], shape[2]), Path((teacher.components or {})["path"]))
    return replace(no_images(teacher), shape=pictures, prompts=tuple(texts), latents=shape)


def plan_stages(
    config: DistillConfig, teacher: CheckpointConfig, out: Path | None = None, home: Path | None = None
) -> list[Stage]:
    """The stages from the teacher's steps down: `base_k` beside the teacher, counting on from the teacher's k.

    A teacher that predicts ε gets a student of v first, with the same steps: at zero signal, where few-step students
    start, ε carries no information about the image. A LoRA keeps the prediction of its base. A teacher whose guidance
    becomes an input gets a student with the same steps, too. Guidance of a fixed scale is part of the first stage that
    follows.

    Args:
        home: a path that replaces the teacher's for the students' names and parent folder.

    Raises:
        OptionError: the steps do not fit together, or the teacher cannot be distilled.
    """
    base = Path(config.base)
    if base.name in ("", ".."):  # students go beside the teacher, so its folder needs a name
        base = base.resolve()
    if out is not None and out.name in ("", ".."):
        out = out.resolve()
    steps = list(_steps(config, teacher))
    if out is not None and len(steps) > 1:
        raise OptionError(f"--out names one student, but this ladder has {len(steps)}", "leave --out out")
    if out is not None and out.resolve() == base.resolve():
        raise OptionError(f"--out {out} is the teacher itself", "choose another --out")
    home = home or base
    match = re.fullmatch(r"base_(\d+)", home.name)
    number = int(match.group(1)) + 1 if match else 0
    stages: list[Stage] = []
    guided = next((k for k, (method, *_) in enumerate(steps) if method != "match"), 0) if config.guidance_scale else -1
    for k, (method, before, after) in enumerate(steps):
        folder, mine = out or home.parent / f"base_{number + k}", stages[-1].folder if stages else base
        stages.append(Stage(mine, before, folder, after, method, is_first=not stages, is_guided=k == guided))
    is_last = stages[-1].num_steps == 1 and not METHODS[stages[-1].method].knows_teachers_times
    if config.lora_rank and teacher.family.predicts_noise and is_last:
        raise OptionError(
            f"{config.base} predicts ε, and so does its LoRA, which at the first of its times cannot draw in 1 step",
            "end at 2 steps, or leave --lora_rank out: the student is then a whole model that predicts v",
        )
    return stages


def _check_guided(config: DistillConfig, teacher: CheckpointConfig) -> None:
    """Refuse `guidance_scale` for a teacher that cannot be guided.

    Raises:
        OptionError: says why.
    """
    flag = f"--guidance_scale {config.guidance_scale or 0:g}"
    if teacher.method != "base":
        learned = f", which has learned the scale {teacher.guidance_scale:g}" if teacher.guidance_scale else ""
        raise OptionError(
            f"{flag}: {config.base} is a student of {teacher.num_timesteps} steps{learned}",
            "leave it out, or give --base the model that it was distilled from",
        )
    if teacher.guidance_range:
        low, high = (weight + 1 for weight in teacher.guidance_range)
        raise OptionError(
            f"{flag}: {config.base} takes the scale as an input, {low:g} to {high:g}, and so do its students",
            "leave it out: sample.py --guidance_scale chooses it",
        )
    if not teacher.signature.null:
        raise OptionError(
            f"{flag}: {config.base} cannot predict without its condition",
            "leave it out, or train a class-conditional model with --class_dropout 0.1",
        )


def _steps(config: DistillConfig, teacher: CheckpointConfig) -> list[tuple[str, int, int]]:
    """The method, the teacher's steps and the student's steps of each stage."""
    phases = config.phase_steps()
    first = starting_steps(config, teacher)
    _check_first(config, teacher, first, phases)
    if config.guidance_scale:
        _check_guided(config, teacher)
    steps: list[tuple[str, int, int]] = []
    if config.method == "match" or (teacher.family.predicts_noise and not config.lora_rank):
        steps.append(("match", first, first))
    if config.method == "guided" and not teacher.guidance_range:
        if not teacher.signature.null:
            why = "was trained only with classes and cannot predict without one"
            if IMAGE in teacher.signature.names and not teacher.signature.num_classes:
                why = "has no prediction without its condition image"
            raise OptionError(
                f"--method guided: {config.base} {why}", "train a class-conditional model with --class_dropout 0.1"
            )
        if teacher.guidance_scale:
            raise OptionError(
                f"--method guided: {config.base} has learned the guidance scale {teacher.guidance_scale:g}",
                "give --base the model that it was distilled from",
            )
        is_fixed = teacher.kind not in (UNET, TEXT, PYTHON) or diffusers_part(teacher.network_config) == "transformer"
        if is_fixed and GUIDANCE not in teacher.signature.names:
            raise OptionError(
                f"--method guided: the network of {config.base} cannot take a guidance weight as an input",
                "give --guidance_scale: the students learn one scale",
            )
        steps.append(("guided", first, first))
    is_shortened = phases or config.to_steps is not None or config.stages is not None
    if config.method != "match" and (is_shortened or not steps):
        method = config.shortening
        students = _student_steps(config, method, first)
        steps += [(method, before, after) for before, after in zip([first, *students], students, strict=False)]
    elif config.method == "match" and is_shortened:
        raise OptionError("--method match keeps the teacher's steps", "leave --to_steps, --stages and --phases out")
    if SECOND_TIME in teacher.signature.names and SECOND_TIME not in METHODS[steps[0][0]].network_options:
        raise OptionError(
            f"--method {steps[0][0]} does not pass the second time that the teacher needs",
            f"give --method {teacher.method}, or another --base",
        )
    asked = next((method for method, *_ in steps if config.build_method(method).asks_at_any_time), "")
    if asked and asked == steps[0][0] and not teacher.takes_any_num_steps:
        raise OptionError(
            f"--method {asked} asks the teacher at every time, and {config.base} knows those of its "
            f"{teacher.num_timesteps} steps",
            "give --base the base model, or --method ect",
        )
    return steps


def starting_steps(config: DistillConfig, teacher: CheckpointConfig) -> int:
    """The teacher's steps at the beginning of a ladder: those in the settings, else its own.

    If its own cannot be halved down to `to_steps`, the ladder begins with fewer, if the teacher supports any number.
    """
    if config.teacher_steps or config.phases:
        return config.teacher_steps or config.phase_steps()[0]
    own, to_steps = teacher.num_timesteps, config.to_steps or 0
    if config.shortening != "progressive" or not teacher.takes_any_num_steps or not 0 < 2 * to_steps <= own:
        return own
    return halving_start(own, to_steps)


def remarks(config: DistillConfig, teacher: CheckpointConfig) -> list[str]:
    """Lines to print about a plan before it runs."""
    lines, first = [], starting_steps(config, teacher)
    if not config.teacher_steps and not config.phases and first != teacher.num_timesteps:
        own = f"{teacher.num_timesteps} cannot be halved to {config.to_steps}"
        lines.append(f"the ladder begins with {first} steps of the teacher: {own}")
    if config.lora_rank and teacher.adapter and teacher.method == "base":
        own = f"it contains the fine-tuning {config.base}"
        lines.append(f"the students' LoRA belongs to {(teacher.base or {})['path']}: {own}")
    if (
        config.method == "match"
        and not teacher.family.predicts_noise
        and student_network(config, teacher) == teacher.network_config
    ):
        lines.append("match: the student is a copy of its teacher, with nothing to learn; give --student_config")
    return lines


def _check_first(config: DistillConfig, teacher: CheckpointConfig, first: int, phases: list[int]) -> None:
    """Refuse a number of steps that the teacher does not support.

    Raises:
        OptionError: names the setting.
    """
    flag = f"--phases {config.phases}" if phases else f"--teacher_steps {first}"
    if phases and phases[0] != first:
        raise OptionError(f"{flag} begins with {phases[0]} steps, not {first} as --teacher_steps", "leave one out")
    if not teacher.takes_any_num_steps and first != teacher.num_timesteps:
        raise OptionError(f"{flag}: {config.base} was distilled for {teacher.num_timesteps} steps", "leave it out")
    try:
        teacher.check_num_steps(first)
    except ValueError as error:
        raise OptionError(f"{flag}: {error}", "give fewer") from None


def _student_steps(config: DistillConfig, method: str, first: int) -> list[int]:
    """The students' numbers of steps."""
    if first < 2:
        raise OptionError(f"{config.base} already needs only 1 step", "distil another --base")
    if phases := config.phase_steps()[1:]:
        return _checked_phases(config, first, phases)
    if config.to_steps is not None and config.to_steps >= first:
        raise OptionError(f"--to_steps {config.to_steps}: the teacher already takes {first}", f"give less than {first}")
    stages = config.stages or 1
    if config.to_steps is None and first % 2**stages:
        asked, often = (f"--stages {stages}: ", " so often") if config.stages else ("", "")
        raise OptionError(f"{asked}{first} steps cannot be halved{often}", "give --to_steps or --phases")
    plan = METHODS[method]().plan if config.to_steps is not None else METHODS["progressive"]().plan
    try:
        return plan(first, config.to_steps or first >> stages)
    except ValueError as error:
        raise OptionError(str(error), "choose another --to_steps, --stages or --teacher_steps") from None


def _checked_phases(config: DistillConfig, first: int, phases: list[int]) -> list[int]:
    """The students of --phases, if each can follow the previous one."""
    for before, after in zip([first, *phases], phases, strict=False):
        try:
            check_phase(before, after)
        except ValueError as error:
            fitting = ",".join(map(str, fitting_phases([first, *phases])))
            raise OptionError(
                f"--phases {config.phases}: {error}", f"the nearest that fits is --phases {fitting}"
            ) from None
    return phases


def student_network(config: DistillConfig, teacher: CheckpointConfig) -> dict[str, Any]:
    """The student's network: the teacher's, with the changes in `student_config`.

    Raises:
        OptionError: the file cannot be read, or does not describe a valid network.
    """
    if not config.student_config:
        return teacher.network_config
    name = diffusers_class(teacher.network_config)
    if teacher.kind not in (UNET, TEXT) or name not in ("", TEXT_UNET):
        raise OptionError(
            f"--student_config describes a UNet, but the teacher's network is {name or f'of kind {teacher.kind}'}",
            "leave it out",
        )
    path = Path(config.student_config)
    try:
        values = parse(read_text(path), tomllib.loads)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--student_config {path} cannot be read: {reason}", "give a TOML file") from None
    table = values.get("unet")
    example = "channels = 32" if teacher.kind == UNET else "layers_per_block = 1"
    if not isinstance(table, dict) or not table:
        raise OptionError(f"--student_config {path} has no table [unet]", f"write one: [unet], {example}")
    if teacher.kind == UNET:
        check_unet(table, f"--student_config {path}: ")
        return {**teacher.unet, **table}
    for key in sorted(table.keys() - set(SIZES_OF_DIFFUSERS)):
        where = f"--student_config {path}: [unet] {key}"
        if key in teacher.network_config["unet"]["config"]:
            raise OptionError(f"{where} must be that of the teacher", "take it out of the file")
        raise OptionError(f"{where} is not a size of a UNet of diffusers", suggestion(key, SIZES_OF_DIFFUSERS))
    return with_unet(teacher.network_config, **{key: None if value == "" else value for key, value in table.items()})


def with_unet(network: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration of a text-to-image network with changes in that of its UNet of diffusers."""
    unet = network["unet"]
    return {**network, "unet": {**unet, "config": {**unet["config"], **changes}}}
