"""Distillation stage by stage: each student is checked, and becomes the teacher of the next one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from vdiff.errors import Interrupted, VdiffError, shell
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config, weights_fingerprint
from vdiff.records import RUN_FILE
from vdiff.replacing import check_ours, discard, is_free, locked
from vdiff.reporting import Reporter
from vdiff.text import plural
from vdiff.training.config import DistillConfig, resolve
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import Engine
from vdiff.training.folder import (
    RUN,
    check_new,
    check_resumable,
    check_same_run,
    check_settings,
    is_run,
    recorded,
    start_anew,
)
from vdiff.training.loop import fit, settle
from vdiff.training.presets import recorded_layer
from vdiff.training.sample_conditions import sample_conditions
from vdiff.training.sample_prompts import prompts_of_ladder
from vdiff.training.stages import Stage
from vdiff.training.student import describe_student, shaped, stage_run
from vdiff.training.verdict import (
    MIN_NOISES,
    Distance,
    Examiner,
    check_student,
    failed_attempts,
    finish_keeping,
    read_verdict,
    times_failed,
)


def run_stages(
    stages: list[Stage],
    config: DistillConfig,
    images: TrainingData,
    engine: Engine,
    *,
    overwrite: bool,
    reporter: Reporter,
    distance: Distance | None = None,
) -> bool:
    """Train every unfinished stage, and resume an interrupted one; returns whether there was any.

    Args:
        distance: the distance of images to the data, for verdicts on students.

    Raises:
        Interrupted: by a signal; the same command continues.
        VdiffError: a student's folder holds something else, the training failed, or a student collapsed.
    """
    described = shaped(read_config(stages[0].base), images)
    prompts = prompts_of_ladder(config, described, images, engine.device)
    if prompts and config.sample_prompts:
        for note in prompts.prompting.notes(prompts.texts):
            reporter.line(note)
    examiner = Examiner(
        seed=config.seed,
        num_images=max(config.check_images, MIN_NOISES),
        num_distance_images=config.distance_images,
        distance=distance,
        device=engine.device,
        reporter=reporter,
        conditions=sample_conditions(described, images, prompts),
    )
    trained = False
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(locked(stage.folder, kind=RUN, mine=engine.is_main))
        _make_room(stages, config, engine, overwrite=overwrite)
        try:
            for k, stage in enumerate(stages):
                mine = stage.settings(config)
                measured = config.distance_every > 0 and (len(stages) - 1 - k) % config.distance_every == 0
                is_good = False
                while not is_good:
                    trained |= train_stage(stage, mine, images, engine, reporter)
                    is_good = not config.check_images or check_student(
                        stage, mine, engine, examiner, measure_distance=measured
                    )
        except Interrupted as stop:
            how = "the same command without --overwrite continues" if overwrite else "the same command continues"
            raise Interrupted(f"{stop}; {how}", stop.exit_code) from None
    return trained


def _make_room(stages: list[Stage], config: DistillConfig, engine: Engine, *, overwrite: bool) -> None:
    """Remove what `overwrite` allows, or check that nothing is in the way."""
    if overwrite:
        load_checkpoint(stages[0].base)  # it may be damaged: check before anything is removed
        engine.wait()
        if engine.is_main:
            old = [(path, stage.folder) for stage in stages for path in (*failed_attempts(stage.folder), stage.folder)]
            for path, _ in old:
                check_new(path, overwrite=True)
            for path, folder in old:
                discard(path, folder, last=RUN_FILE)
        engine.wait()
        return
    for stage in stages:
        if not is_free(stage.folder):
            check_ours(stage.folder, RUN)
    engine.wait()
    for stage in stages if engine.is_main else ():
        finish_keeping(stage.folder, config.retries)
    engine.wait()
    to_train = ""
    for stage in stages:
        if to_train and stage.folder.is_dir() and any(stage.folder.iterdir()):
            raise VdiffError(
                f"{stage.folder} exists already, but its teacher {to_train} is still to be trained",
                "move it away, or give --overwrite",
            )
        found = recorded(stage.folder)
        to_train = to_train if found and found.is_finished else stage.folder.as_posix()


def train_stage(stage: Stage, config: DistillConfig, images: TrainingData, engine: Engine, reporter: Reporter) -> bool:
    """Train what is left of a stage; returns whether anything was."""
    halved = replace(config, lr=config.lr / 2 ** times_failed(stage.folder))
    lineage = {"path": stage.base.as_posix(), "fingerprint": weights_fingerprint(stage.base)}
    if is_run(stage.folder):
        if (found := found_student(stage, config)) and found.is_finished:
            reporter.line(f"{stage.folder} is finished already: {plural(found.num_timesteps, 'step')}")
            if engine.is_main:
                settle(stage.folder, halved, found.num_iters)
            return False
        check_same_run(stage.folder, halved, _recorded_settings(stage))
        check_resumable(stage.folder, images)
        run = stage_run(stage, halved, images, engine, lineage, reporter)
    else:
        run = stage_run(stage, halved, images, engine, lineage, reporter)  # first, as the teacher may be damaged
        engine.wait()  # until every process has seen the empty folder
        if engine.is_main:
            start_anew(stage.folder, halved, overwrite=False)
        engine.wait()
    fit(run, engine, reporter)
    return True


def found_student(stage: Stage, config: DistillConfig) -> CheckpointConfig | None:
    """The student in a stage's folder, finished or not; None if there is none.

    Raises:
        VdiffError: the student has another method, teacher, network or number of steps.
        OptionError: the student is finished, and was made with other settings; names the setting and its two values.
    """
    found = recorded(stage.folder)
    if found is None:
        return None
    asked = describe_student(stage, config, read_config(stage.base))
    reason = ""
    if found.num_timesteps != asked.num_timesteps:
        reason = f"holds a model of {found.num_timesteps} steps, not {asked.num_timesteps}"
    elif found.method != asked.method:
        reason = f"holds a student by {found.method}, not {asked.method}"
    elif (found.teacher or {}).get("fingerprint") != weights_fingerprint(stage.base):
        reason = f"was distilled from another teacher than {stage.base} is now"
    elif found.adapter != asked.adapter:
        reason = f"holds {_kind_of(found)}, not {_kind_of(asked)}"
    elif found.network_config != asked.network_config:
        reason = f"has another network than {config.student_config or 'its teacher'}"
    if reason:
        raise VdiffError(
            f"{stage.folder} {reason}", "give another --name or --out to keep both, or --overwrite to replace it"
        )
    if found.is_finished and (stage.folder / RUN_FILE).is_file():
        _check_same_settings(stage, config)
    return found


def _kind_of(model: CheckpointConfig) -> str:
    """What a checkpoint holds."""
    lora = model.adapter
    return f"a LoRA of rank {lora.rank} for {', '.join(lora.targets)}" if lora else "a whole model"


def _check_same_settings(stage: Stage, config: DistillConfig) -> None:
    saved, verdict = _recorded_settings(stage), read_verdict(stage.folder)
    attempts = verdict.attempts if verdict else times_failed(stage.folder) + 1
    is_same_lr = saved.lr in {config.lr / 2**k for k in range(attempts)}
    but = ("student_config", *(["lr"] if is_same_lr else []))
    ways = f"give {shell('--base', stage.folder)} to continue from it, another --name to keep both, or --overwrite"
    check_settings(saved, config, f"{stage.folder} was made", lambda name: f"leave --{name} out, {ways}", but)


def _recorded_settings(stage: Stage) -> DistillConfig:
    """The settings of an earlier run of the stage, from its folder."""
    return resolve(DistillConfig, recorded_layer(DistillConfig, stage.folder))
