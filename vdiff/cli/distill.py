"""`distill.py`: halve the sampling steps of a model, stage by stage."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import PATH, Command, option, project_option, switch
from vdiff.cli.quality import quality_of
from vdiff.cli.report import report_at_the_end
from vdiff.cli.settings import check_early, config_option, given, settings
from vdiff.cli.vdiffusion import home_of, imported
from vdiff.diffusion.distillation import METHODS
from vdiff.errors import shell
from vdiff.projects import Project
from vdiff.records import LADDER_PICTURE, LADDER_SOUNDS, LadderRow
from vdiff.reporting import DOUBTFUL, DOUBTFUL_TIMES
from vdiff.text import duration
from vdiff.training.config import DistillConfig

if TYPE_CHECKING:
    from vdiff.evaluation.features import FeatureDistance
    from vdiff.evaluation.results import Scale
    from vdiff.training.dataset import TrainingData
    from vdiff.training.engine import Engine
    from vdiff.training.stages import Stage


@click.command(
    cls=Command,
    theirs="distill",
    first="name out config overwrite dry_run report open data base to_steps teacher_steps phases method student_config "
    "num_iters batch_size grad_accum lr ckpt_interval seed device precision checkpointing",
    examples=[
        "python distill.py --base checkpoints/base_5         # base_6: half the steps",
        "python distill.py --to_steps 4                      # original to 4 steps",
        "python distill.py --teacher_steps 64 --to_steps 1   # begin at 64 steps",
        "python distill.py --method tract --phases 1024,32,1 # two stages",
        "python distill.py --method guided --to_steps 4 --dry_run   # how long?",
    ],
)
@project_option()
@option(
    "--out", group="Run", type=PATH, metavar="FOLDER", show_default="base_0, base_1, … beside --base",
    help="The student's folder, if there is only one student.",
)  # fmt: skip
@config_option
@switch("--overwrite", group="Run", help="Replace students that exist.")
@switch("--dry_run", "plan", old=["--plan"], group="Run", help="Print the stages and their time, then stop.")
@switch("--report", group="Run", default=True, help="Write report.html beside the students at the end.")
@switch("--open", "open_it", group="Run", help="Open the report in the browser.")
@settings(DistillConfig)
def command(
    project: Project,
    out: Path | None,
    config_file: Path | None,
    overwrite: bool,
    plan: bool,
    report: bool,
    open_it: bool,
    **flags: Any,
) -> None:
    """Distil a model into students that need fewer steps (Salimans & Ho 2022, and later methods).

    By default, one stage halves the steps; --to_steps or --phases makes a ladder of stages. After an interruption the
    same command continues and skips finished stages. Each student is compared with its teacher: if training made it
    worse, its initial weights are restored; if it collapsed, it is trained again. At the end the teacher and all
    students sample from the same noise: ladder.png and ladder.json in the last student's folder. report.html beside
    the students describes the whole ladder, with distances to the data for images of up to 32 × 32 pixels. All this
    takes about a tenth of the training time; a short training gets fewer images and fewer steps.
    """
    console, chosen, home = Console(), given(flags), None
    check_early(DistillConfig, chosen, config_file)
    if not config_file and "base" not in chosen:
        chosen["base"] = str(project.teacher(console.line))

    from vdiff.models.checkpoint import read_config
    from vdiff.models.codec import LATENTS
    from vdiff.models.condition import IMAGE, TOKENS
    from vdiff.replacing import check_ours, is_free, locked
    from vdiff.training.folder import RUN
    from vdiff.training.stages import plan_stages, remarks, resolve_distillation, teachers_images

    if "base" in chosen:  # else it is in the configuration file
        home = home_of(Path(chosen["base"]), project)
        chosen["base"] = str(imported(Path(chosen["base"]), console.line))
    config, teacher = resolve_distillation(chosen, config_file, project, console)
    images = teachers_images(config, teacher, project)
    stages = plan_stages(config, teacher, out, project.students_beside(home or Path(config.base)))
    if not overwrite and not is_free(stages[0].folder):
        check_ours(stages[0].folder, RUN)

    # torch is loaded here, when everything that needs no torch is known to be right
    from vdiff.evaluation.results import NOT_TRAINED
    from vdiff.training.comparison import compare, known_rows
    from vdiff.training.compilation import settled_compile
    from vdiff.training.engine import build_engine, effective_batch
    from vdiff.training.estimate import FEW_UPDATES, check_memory, facts, time_facts
    from vdiff.training.ladder import found_student, run_stages
    from vdiff.training.sample_conditions import sample_conditions
    from vdiff.training.sample_prompts import prompts_of_ladder, texts_of
    from vdiff.training.student import memory_of_stage, recorded_setting, times_of_stage
    from vdiff.training.threads import settled_threads
    from vdiff.training.verdict import read_verdict, write_verdict

    console.line(f"preset {config.preset}, {images.name}, method {config.method}")
    for remark in remarks(config, teacher):
        console.line(remark)
    if not teacher.is_finished:
        done = f"{teacher.num_iters} of {teacher.target_iters} updates"
        console.line(f"{config.base} is unfinished: {done}")
    threads = None
    if not overwrite:  # refuse before anything is measured
        found_student(stages[0], stages[0].settings(config))
        threads = recorded_setting(stages, "threads")
        if config.compile is None:
            config = replace(config, compile=recorded_setting(stages, "compile"))
    if (updates := sum(stage.updates(config) for stage in stages)) >= FEW_UPDATES:
        config = replace(config, threads=settled_threads(config, teacher.build, teacher.shape, console, threads))
    engine = build_engine(config)
    console.line(f"distilling on {engine.description}, {effective_batch(config, engine)}")
    memory = check_memory(lambda config: memory_of_stage(stages[0], config, images, engine), config, engine)
    for row in aligned(facts(memory, config, engine)):
        console.line(row)
    if plan:
        rows, *_ = planned(stages, config, images, engine, console, overwrite=overwrite)
        if engine.is_main:
            console.table(
                "Stages", ["student", "teacher", "method", "steps", "updates", f"{images.codec.noun}s", "time"], rows
            )
            console.line("the time covers the remaining updates, but not the checks and comparisons of students")
        return
    seconds, left = 0.0, 0
    if updates >= FEW_UPDATES:
        _, seconds, left = planned(stages, config, images, engine, console, overwrite=overwrite)
    if left:
        for row in aligned(time_facts(seconds, left, engine.device.type)):
            console.line(row)
        config = replace(
            config,
            compile=settled_compile(
                config,
                engine,
                lambda engine: times_of_stage(stages[0], config, images, engine),
                updates=left,
                seconds=seconds / left,
                num_networks=2 * len(stages),  # a teacher and a student in each
                reporter=console,
            ),
        )
        engine = engine if config.compile is None else replace(engine, compile=config.compile)
    budget = sum(stage.budget(config) for stage in stages)
    measures = config.distance_every > 0 and teacher.codec != LATENTS.name
    if measures and config.check_images and engine.is_main:
        data = images.name if images.store else ""
        verdict = quality_of(Path(config.base), data, budget, device=engine.device, console=console)
        if verdict:
            console.line(f"{config.base} is {verdict.short}")
            console.line(f"scale      {verdict.scale}")
        if verdict and verdict.word == NOT_TRAINED:
            console.line(
                "a student cannot be better than its teacher: train the teacher longer first, unless this is a trial"
            )
    distance = distance_to(images, config, engine) if measures else None
    trained = run_stages(stages, config, images, engine, overwrite=overwrite, reporter=console, distance=distance)
    if not engine.is_main:
        return
    last = stages[-1].folder
    takes_text = TOKENS in teacher.signature.names
    texts = texts_of(config, images) if takes_text else ()
    table = None if trained else known_rows(stages, seed=config.seed, prompts=texts)
    if table is None:
        prompts = prompts_of_ladder(config, read_config(last), images, engine.device)
        with locked(last, kind=RUN):
            table = compare(
                stages, seed=config.seed, device=engine.device, reporter=console, budget=budget,
                guidance=config.guidance_scale - 1 if config.guidance_scale else 0.0,
                prompts=prompts, conditions=sample_conditions(read_config(last), images, prompts),
            )  # fmt: skip
    console.table("Ladder", headings(images.codec.noun), [cells(row) for row in table])
    if any(row.kept_start for row in table):
        console.result(f"{KEPT}    training made the student worse, so its weights before training are kept")
    if any(row.is_time_doubtful for row in table):
        console.line(DOUBTFUL_TIMES)
    found = read_verdict(last)
    if distance and found and any(row.distance is not None for row in table):
        scale = scale_for(distance, found.num_images)
        console.result(f"scale      {scale}")
        if found.scale != asdict(scale):  # for the report
            with locked(last, kind=RUN):
                write_verdict(last, replace(found, scale=asdict(scale)))
    console.result(f"picture    {last / LADDER_PICTURE}")
    if teacher.space.is_sound:
        console.result(f"players    {last / LADDER_SOUNDS}")
    if report:
        data, device = images.name * (images.store is not None), engine.device
        report_at_the_end(
            stages, data, measure=measures, budget=budget, device=device, console=console, open_it=open_it
        )
    condition = " --prompt 'a red fox, watercolour'" * takes_text
    condition += " --condition FOLDER" * (IMAGE in teacher.signature.names)
    console.result(f"next       python sample.py {shell('--checkpoint', last)}{condition}")


def planned(
    stages: list[Stage],
    config: DistillConfig,
    images: TrainingData,
    engine: Engine,
    console: Console,
    *,
    overwrite: bool,
) -> tuple[list[list[str]], float, int]:
    """The rows of --dry_run, and the seconds and the number of updates that are left.

    Updates are timed once for each cost of an update.
    """
    from vdiff.training.ladder import found_student
    from vdiff.training.student import times_of_stage

    seconds: dict[tuple[object, ...], float] = {}
    rows = []
    total, num_left = 0.0, 0
    for stage in stages:
        found = None if overwrite else found_student(stage, stage.settings(config))
        updates, needs_images = stage.updates(config), METHODS[stage.method].needs_images
        left = updates if found is None else 0 if found.is_finished else updates - found.num_iters
        # the cost of an update depends on the steps of a path, the teacher's steps in a target and the precision, which
        # short steps need in full; a smaller student changes the networks from the second stage on
        cost = stage.num_steps if not needs_images else stage.teacher_steps // stage.num_steps
        kind = (stage.method, cost, stage.is_fine, bool(config.student_config) and not stage.is_first)
        steps = f"{stage.teacher_steps} → {stage.num_steps}"
        if left and kind not in seconds:
            console.line(f"timing updates of {stage.method}, {steps} steps")
            _, seconds[kind] = times_of_stage(stage, config, images, engine)
        total += left * seconds.get(kind, 0.0)
        num_left += left
        names = [stage.folder.as_posix(), stage.base.as_posix(), stage.method, steps]
        seen = f"{updates * config.batch_size:,}" if needs_images else "none"
        rows.append([*names, f"{updates:,}", seen, duration(left * seconds[kind]) if left else "finished"])
    if len(stages) > 1:
        updates = sum(stage.updates(config) for stage in stages)
        rows.append(["all", "", "", "", f"{updates:,}", "", duration(total)])
    return rows, total, num_left


def distance_to(images: TrainingData, config: DistillConfig, engine: Engine) -> FeatureDistance | None:
    """A function for the distance of samples to the data, in the process that checks students; None without data."""
    import torch

    from vdiff.evaluation.features import PIXELS, FeatureDistance, load_features

    is_due = config.distance_every and config.check_images and engine.is_main
    if images.store is None or not is_due or len(images.store) < 4:
        return None
    wanted = min(config.distance_images, len(images.store))
    reference: list[torch.Tensor] = []
    with closing(images.batches(config, engine).start_at(0)) as batches:
        while sum(map(len, reference)) < wanted:
            reference.append(next(batches).images)
    real = images.codec.encode(torch.cat(reference)[:wanted])
    meta = images.store.meta
    features = load_features(
        PIXELS, image_size=images.image_size, channels=images.channels, rate=meta.rate, loudness=meta.loudness
    )
    return FeatureDistance(features, real)


def scale_for(distance: FeatureDistance, num_images: int) -> Scale:
    """The scale for distances of `num_images` samples."""
    import numpy as np

    from vdiff.evaluation.features import ScaledFeatures
    from vdiff.evaluation.metrics import Moments
    from vdiff.evaluation.reference import DataStats, scale_of

    assert isinstance(distance.features, ScaledFeatures)  # of `distance_to`
    moments, vectors = Moments.of(distance.reference), distance.reference.astype(np.float32)
    return scale_of(DataStats(moments, vectors, np.arange(len(vectors))), num_images, distance.features)


KEPT = "kept start"


def headings(noun: str) -> list[str]:
    """Those of `cells`, for models that draw images or sounds."""
    errors = ["RMSE to teacher", "RMSE to first", "distance to data"]
    return ["model", "steps", "updates", "training", f"ms/{noun}", *errors]


def cells(row: LadderRow) -> list[str]:
    """One line of the table."""
    errors = ["" if error is None else f"{error:.4f}" for error in (row.rmse_to_teacher, row.rmse_to_first)]
    errors.append("" if row.distance is None else f"{row.distance:.4g}")
    milliseconds = "" if row.ms_per_image is None else f"{row.ms_per_image:.2f}{DOUBTFUL * row.is_time_doubtful}"
    times = [duration(row.train_seconds), milliseconds]
    return [row.checkpoint, str(row.num_steps), KEPT if row.kept_start else str(row.num_iters), *times, *errors]
