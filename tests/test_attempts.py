"""Stages that make things worse: done again with half the learning rate, the best kept, whenever the power goes."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import done, error
from tests.toy import (
    Watcher,
    assert_equal_bits,
    contents,
    distill_config,
    run_ladder,
    signal_at,
    write_checkpoint,
    write_dataset,
)
from vdiff.errors import Interrupted, VdiffError
from vdiff.files import remove
from vdiff.models.checkpoint import WEIGHTS, read_config, save_checkpoint
from vdiff.records import RUN_FILE
from vdiff.training import ladder
from vdiff.training import verdict as verdicts
from vdiff.training.config import DistillConfig
from vdiff.training.engine import Engine
from vdiff.training.presets import read_run
from vdiff.training.stages import Stage
from vdiff.training.verdict import (
    Examiner,
    Verdict,
    failed_attempts,
    read_verdict,
    times_failed,
    warning,
    why_failed,
)

LR = 0.008
COLLAPSED = "distance to the data is 100, its teacher's 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("attempts") / "toy_4")


@pytest.fixture
def teacher(tmp_path: Path, data: Path) -> Path:
    write_checkpoint(tmp_path / "original", dataset=str(data))
    return tmp_path / "original"


class Told:
    """Students that are as good as a table says, by their learning rate, and are made at once.

    Attributes:
        rmse: learning rate → RMSE to the teacher, which was 0.3 before the training.
        distance: learning rate → distance to the data, of which the teacher's is 1; without one a student whose RMSE
            rose collapsed, the others are not measured.
        trained: folder and learning rate of every training.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rmse: dict[float, float], distance=None) -> None:
        self.rmse, self.distance, self.trained = rmse, distance or {}, []
        monkeypatch.setattr(ladder, "fit", self.fit)
        told = self

        def examine(_, stage: Stage, *__, attempts: int, max_regression: float, **___) -> Verdict:
            lr = read_run(stage.folder).distill["lr"]
            far = told.distance.get(lr, 100.0 if told.rmse[lr] > 0.3 else None)
            found = Verdict(0.3, told.rmse[lr], far, None if far is None else 1.0, 4, attempts, "")
            return dataclasses.replace(found, reason=why_failed(found, max_regression))

        monkeypatch.setattr(Examiner, "examine", examine)

    def fit(self, run, *_: object) -> None:
        lr = run.config.lr
        self.trained.append((run.folder.name, lr))
        weights = {name: tensor + lr for name, tensor in run.denoiser.state_dict().items()}
        save_checkpoint(run.folder, weights, dataclasses.replace(run.description, num_iters=run.config.num_iters))


def settings(data: Path, teacher: Path, **changes) -> DistillConfig:
    return distill_config(data, teacher, **{"lr": LR, "tracker": "none", **changes})


def climbed(data: Path, teacher: Path, *, reporter: Watcher | None = None, overwrite: bool = False, **changes) -> None:
    run_ladder(settings(data, teacher, **changes), read_config(teacher), reporter=reporter, overwrite=overwrite)


def failure(data: Path, teacher: Path, **changes) -> str:
    with pytest.raises(VdiffError) as caught:
        climbed(data, teacher, **changes)
    assert caught.value.exit_code == 1
    return str(caught.value)


def lr_of(folder: Path) -> float:
    return tomllib.loads((folder / RUN_FILE).read_text())["distill"]["lr"]


def test_a_failed_stage_is_done_again_with_half_the_learning_rate(data, teacher, monkeypatch):
    """The failed student is set aside with its verdict; the next stage has the full learning rate again."""
    told = Told(monkeypatch, {LR: 0.4, LR / 2: 0.2})
    watcher = Watcher()
    folder, aside = teacher.parent / "base_0", teacher.parent / "base_0.failed_0"
    climbed(data, teacher, reporter=watcher)
    assert told.trained == [("base_0", LR), ("base_0", LR / 2)]
    assert (lr_of(folder), lr_of(aside)) == (LR / 2, LR)
    assert read_verdict(folder) == Verdict(0.3, 0.2, None, None, 4, 2, "")
    assert read_verdict(aside) == Verdict(0.3, 0.4, 100.0, 1.0, 4, 1, COLLAPSED)
    assert f"{folder} failed: {COLLAPSED}; trying again with half the learning rate" in watcher.lines
    assert [path.name for path in failed_attempts(folder)] == ["base_0.failed_0"]
    assert read_config(folder).teacher["path"] == teacher.as_posix()
    climbed(data, teacher, to_steps=2)
    assert told.trained[2:] == [("base_1", LR), ("base_1", LR / 2)]
    again = Watcher()
    climbed(data, teacher, to_steps=2, reporter=again)
    assert len(told.trained) == 4
    assert [line.endswith("steps") and "is finished already" in line for line in again.lines] == [True, True]


def test_a_student_is_set_aside_only_when_no_process_reads_it(data, teacher, monkeypatch):
    told, set_aside, events = Told(monkeypatch, {LR: 0.4, LR / 2: 0.2}), verdicts.set_aside, []
    monkeypatch.setattr(ladder, "fit", lambda *args: (events.append("trained"), told.fit(*args)))
    monkeypatch.setattr(Engine, "wait", lambda _: events.append("wait"))
    monkeypatch.setattr(verdicts, "set_aside", lambda folder: (events.append("set aside"), set_aside(folder)))
    climbed(data, teacher)
    assert "wait" in events[events.index("trained") : events.index("set aside")]


@pytest.mark.parametrize("best", [0, 1, 2])
def test_when_all_attempts_failed_the_best_is_kept(data, teacher, monkeypatch, best):
    """Nearest to the teacher; no other is left, and no later stage is begun."""
    errors = [0.5, 0.5, 0.5]
    errors[best] = 0.4
    told = Told(monkeypatch, {LR / 2**k: value for k, value in enumerate(errors)})
    message = failure(data, teacher, retries=2, to_steps=1)
    folder = teacher.parent / "base_0"
    assert message == (
        f"{folder} collapsed: {COLLAPSED}; "
        "the best attempt is kept there; give a lower --lr or more --num_iters, with another --out or with --overwrite"
    )
    assert [lr for _, lr in told.trained] == [LR, LR / 2, LR / 4]
    assert lr_of(folder) == LR / 2**best
    assert read_verdict(folder).attempts == 3
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["base_0", "original"]
    before, watcher = contents(teacher.parent), Watcher()
    for _ in range(2):
        assert failure(data, teacher, retries=2, to_steps=1, reporter=watcher) == message
    assert contents(teacher.parent) == before
    assert watcher.bars == []
    assert len(told.trained) == 3
    assert failure(data, teacher, retries=0, to_steps=1) == message


def test_more_retries_go_on_where_the_others_ended(data, teacher, monkeypatch):
    told = Told(monkeypatch, {LR: 0.4, LR / 2: 0.5, LR / 4: 0.45, LR / 8: 0.1})
    failure(data, teacher, retries=1)
    climbed(data, teacher, retries=3)
    assert [lr for _, lr in told.trained] == [LR, LR / 2, LR / 4, LR / 8]
    folder = teacher.parent / "base_0"
    assert (lr_of(folder), read_verdict(folder).attempts) == (LR / 8, 4)
    assert [lr_of(path) for path in failed_attempts(folder)] == [LR, LR / 4]


def test_without_retries_the_first_failure_ends_it(data, teacher, monkeypatch):
    told = Told(monkeypatch, {LR: 0.4})
    assert COLLAPSED in failure(data, teacher, retries=0)
    assert told.trained == [("base_0", LR)]
    assert read_verdict(teacher.parent / "base_0").attempts == 1


def test_a_student_far_from_the_data_is_let_through_where_that_is_allowed(data, teacher, monkeypatch):
    """--max_regression may be raised afterwards; a student that training made worse stays as it began even then."""
    told = Told(monkeypatch, {LR: 0.2}, {LR: 5.0})
    folder = teacher.parent / "base_0"
    assert "distance to the data is 5, its teacher's 1" in failure(data, teacher, retries=0, max_regression=3.0)
    assert "distance to the data" in failure(data, teacher, retries=0, max_regression=4.9)
    climbed(data, teacher, retries=0, max_regression=5.0)
    assert told.trained == [("base_0", LR)]
    assert read_verdict(folder) == Verdict(0.3, 0.2, 5.0, 1.0, 4, 1, "")
    climbed(data, teacher, retries=0, max_regression=3.0)  # what was good stays good
    remove(folder)
    told.rmse[LR] = 0.4
    assert "distance to the data" in failure(data, teacher, retries=0, max_regression=3.0)
    climbed(data, teacher, retries=0, max_regression=10.0)
    assert read_verdict(folder).kept_start == "training raised its RMSE to its teacher from 0.3000 to 0.4000"


def test_replacing_a_ladder_replaces_what_was_set_aside(data, teacher, monkeypatch):
    told = Told(monkeypatch, {LR: 0.4, LR / 2: 0.2})
    climbed(data, teacher)
    told.rmse[LR] = 0.1
    climbed(data, teacher, overwrite=True)
    assert [lr for _, lr in told.trained] == [LR, LR / 2, LR]
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["base_0", "original"]


def test_folders_of_other_names_are_nobody_s_attempts(data, teacher, monkeypatch):
    """Only `base_0.failed_NUMBER` is, also where a name has letters that mean something to a shell."""
    for name in ("base_0.failed_mine", "base_0.failed_", "base_00.failed_0", "base_0"):
        (teacher.parent / name).mkdir()
    assert failed_attempts(teacher.parent / "base_0") == []
    assert times_failed(teacher.parent / "base_0") == 0
    (teacher.parent / "base_0").rmdir()
    Told(monkeypatch, {LR: 0.4, LR / 2: 0.2})
    climbed(data, teacher)
    assert (teacher.parent / "base_0.failed_mine").is_dir()
    odd = teacher.parent / "b[0]"
    for number in (10, 9, 0):
        (teacher.parent / f"b[0].failed_{number}").mkdir()
    assert [path.name for path in failed_attempts(odd)] == ["b[0].failed_0", "b[0].failed_9", "b[0].failed_10"]
    assert times_failed(odd) == 3  # nothing is known of them but their number


class KilledError(Exception):
    """What a kill is to a test."""


POINTS: list[tuple[object, str]] = [
    (Path, "rename"), (verdicts, "remove"), (verdicts, "write_verdict"),
    (ladder, "start_anew"),
]  # fmt: skip


def die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """End everything before call `number` (from 1) of `POINTS`; answers the names of the calls."""
    calls: list[str] = []

    def dying(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                raise KilledError(name)
            return real(*args, **kwargs)

        return call

    for owner, name in POINTS:
        monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    return calls


CALLS = [
    "start_anew", "write_verdict", "rename", "start_anew", "write_verdict", "rename", "start_anew", "write_verdict",
    "write_verdict", "rename", "rename", "remove", "remove", "the end",
]  # fmt: skip


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in (4, 10, 14))) for n in range(1, len(CALLS) + 1)],
)
def test_killed_at_any_moment_the_same_command_ends_the_same(data, teacher, monkeypatch, number):
    """Three attempts, of which the second is the best: none is done twice, and the second is left alone."""
    told = Told(monkeypatch, {LR: 0.5, LR / 2: 0.4, LR / 4: 0.45})
    with monkeypatch.context() as patch:
        calls = die_at(patch, number)
        with pytest.raises(VdiffError if number == len(CALLS) else KilledError):
            climbed(data, teacher, retries=2)
    assert calls == CALLS[:number][: len(CALLS) - 1]
    message = failure(data, teacher, retries=2)
    assert COLLAPSED in message
    assert [lr for _, lr in told.trained] == [LR, LR / 2, LR / 4]
    folder = teacher.parent / "base_0"
    assert (lr_of(folder), read_verdict(folder).attempts) == (LR / 2, 3)
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["base_0", "original"]


@pytest.mark.parametrize("dead", ["save_checkpoint", "remove_state", "write_verdict"])
def test_killed_while_the_start_is_put_back_the_same_command_ends_the_same(data, teacher, monkeypatch, dead):
    """Wherever it is cut: the start's weights as the student's, in its steps, and nothing trained twice."""
    told = Told(monkeypatch, {LR: 0.4}, {LR: 1.0})
    folder, real, calls = teacher.parent / "base_0", getattr(verdicts, dead), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if dead == "write_verdict" else 1):  # the first verdict is that of the trained student
            raise KilledError(dead)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, dead, dying)
        with pytest.raises(KilledError):
            climbed(data, teacher)
    watcher = Watcher()
    climbed(data, teacher, reporter=watcher)
    reason = "training raised its RMSE to its teacher from 0.3000 to 0.4000"
    assert told.trained == [("base_0", LR)]
    assert watcher.lines[-1] == f"{folder}: {reason}; its initial weights are kept"
    assert_equal_bits(folder / WEIGHTS, teacher / WEIGHTS)
    model = read_config(folder)
    assert (model.kept_start, model.num_timesteps, model.method, model.is_finished) == (True, 4, "progressive", True)
    assert read_verdict(folder) == Verdict(0.3, 0.3, None, 1.0, 4, 1, "", kept_start=reason)
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["base_0", "original"]
    told.rmse[LR] = 0.2
    climbed(data, teacher, to_steps=2)
    assert not read_config(teacher.parent / "base_1").kept_start
    assert read_config(teacher.parent / "base_1").teacher["kept_start"]


def test_an_attempt_that_is_cut_goes_on_with_its_own_learning_rate(data, teacher, monkeypatch):
    """Trained in earnest: the second attempt is the training with half the rate, to the last bit."""
    config = settings(data, teacher, num_iters=4, check_images=2, max_regression=1e9, distance_every=0)
    folder = teacher.parent / "base_0"
    verdicts = iter(["worse", "", ""])

    def examine(*_, attempts: int, **__) -> Verdict:
        reason = next(verdicts)
        return Verdict(0.5, math.inf if reason else 0.4, None, None, 2, attempts, reason)

    monkeypatch.setattr(Examiner, "examine", examine)
    watcher = signal_at(1)
    seen = watcher.act
    watcher.act = lambda name, completed: (
        seen(name, completed) if folder.with_name("base_0.failed_0").exists() else None
    )
    with pytest.raises(Interrupted, match="stopped after update 2 of 4"):
        run_ladder(config, read_config(teacher), reporter=watcher)
    assert (lr_of(folder), read_config(folder).num_iters) == (LR / 2, 2)
    run_ladder(config, read_config(teacher))
    half = dataclasses.replace(config, lr=LR / 2)
    run_ladder(half, read_config(teacher), out=teacher.parent / "half")
    assert_equal_bits(folder / WEIGHTS, teacher.parent / "half" / WEIGHTS)


# At the command line

WORDS = (
    "distill.py --base original --preset toy --num_iters 2 --batch_size 4 --device cpu --num_workers 0 "
    "--teacher_steps 8 --to_steps 2 --tracker none --check_images 8 --distance_every 0"
)


def test_a_learning_rate_far_too_high_harms_no_ladder(teacher, monkeypatch):
    """The students stay as they began, marked in table and config; the ladder goes on."""
    monkeypatch.chdir(teacher.parent)
    result = done(f"{WORDS} --lr 3 --num_iters 6")
    for name, steps in (("base_0", 4), ("base_1", 2)):
        kept, model = read_verdict(Path(name)), read_config(Path(name))
        assert kept.kept_start.startswith("training raised its RMSE to its teacher from")
        assert (kept.rmse, kept.attempts, kept.reason) == (kept.rmse_before, 1, "")
        assert (model.kept_start, model.num_timesteps, model.is_finished) == (True, steps, True)
        assert_equal_bits(Path(name) / WEIGHTS, teacher / WEIGHTS)
        assert f"{name}: {kept.kept_start}; its initial weights are kept" in result.stderr
    rows = [row for row in table(result.stdout) if row[0].startswith("base_")]
    assert [row[:3] for row in rows] == [["base_0", "4", "kept start"], ["base_1", "2", "kept start"]]
    before = contents(Path("base_0"))
    done(f"{WORDS} --lr 3 --num_iters 6")
    assert contents(Path("base_0")) == before
    done(f"{WORDS} --lr 1e-3 --num_iters 6 --overwrite")
    assert not read_config(Path("base_0")).kept_start


def test_a_student_that_collapses_ends_in_one_line(teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    words = f"{WORDS} --lr 3 --num_iters 6 --distance_every 1 --max_regression 1"
    message = error(words, 1)
    assert re.fullmatch(
        r"base_0 collapsed: distance to the data is \S+, its teacher's \S+; the best attempt is kept there; give "
        r"a lower --lr or more --num_iters, with another --out or with --overwrite",
        message,
    )
    assert sorted(path.name for path in Path().iterdir()) == ["base_0", "original"]
    assert read_verdict(Path("base_0")).attempts == 2
    assert error(words, 1) == message


def table(stdout: str) -> list[list[str]]:
    """The cells of a table without boxes, two blanks between them."""
    return [re.split(r" {2,}", line.strip()) for line in stdout.splitlines()]


def test_a_plan_tells_stages_updates_images_and_time_and_does_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("original"), dataset=str(data))
    words = WORDS.replace("--to_steps 2", "").replace("--teacher_steps 8", "")
    rows = table(done(f"{words} --method tract --phases 8,2,1 --last_factor 3 --plan").stdout)
    assert rows[0] == ["Stages"]
    assert rows[1] == ["student", "teacher", "method", "steps", "updates", "images", "time"]
    assert [row[:6] for row in rows[2:4]] == [
        ["base_0", "original", "tract", "8 → 2", "12", "48"], ["base_1", "base_0", "tract", "2 → 1", "6", "24"]
    ]  # fmt: skip
    assert rows[4][:2] == ["all", "18"]
    assert all(re.fullmatch(r"\d+:\d\d", row[-1]) for row in rows[2:])
    rows = table(done(f"{words} --method trajectory --phases 8,2 --dry_run").stdout)
    assert rows[2][:6] == ["base_0", "original", "trajectory", "8 → 2", "4", "none"]
    assert len(rows) == 3
    result = done(f"{words} --method consistency --phases 8,2 --plan")
    assert "timing updates of consistency" in result.stderr
    assert "time covers the remaining updates" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_a_plan_times_what_costs_something_else(data, tmp_path, monkeypatch):
    """Paths of another length, and the smaller networks that come after the first stage; others once."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("original"), dataset=str(data))
    timed: list[tuple[str, int]] = []

    def told(stage, *_):
        timed.append((stage.method, stage.num_steps))
        return 0.0, 60.0 * stage.num_steps

    monkeypatch.setattr("vdiff.training.student.times_of_stage", told)
    words = WORDS.replace("--to_steps 2", "").replace("--teacher_steps 8", "").replace("--num_iters 2", "--num_iters 1")
    Path("small.toml").write_text("[unet]\nchannels = 2\n")
    for flags, expected in [
        ("--to_steps 1", [("progressive", 4)]),
        ("--to_steps 1 --student_config small.toml", [("progressive", 4), ("progressive", 2)]),
        ("--method trajectory --phases 8,4,2", [("trajectory", 4), ("trajectory", 2)]),
    ]:
        timed.clear()
        result = done(f"{words} {flags} --plan")
        assert timed == expected
    rows = table(result.stdout)
    assert [row[-1] for row in rows[2:]] == ["4:00", "2:00", "6:00"]


def test_a_plan_counts_what_is_left(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("original"), dataset=str(data))
    monkeypatch.setattr("vdiff.training.student.times_of_stage", lambda *_: (0.0, 60.0))
    words = WORDS.replace("--to_steps 2", "")
    done(f"{words} --report False")
    before = contents(Path("base_0"))
    result = done(f"{words} --to_steps 2 --plan")
    assert [row[-1] for row in table(result.stdout)[2:]] == ["finished", "4:00", "4:00"]
    assert "base_0 was made with lr" in error(f"{words} --to_steps 2 --plan --lr 0.5", 2)
    result = done(f"{words} --to_steps 2 --plan --lr 0.5 --overwrite")
    assert [row[-1] for row in table(result.stdout)[2:]] == ["2:00", "4:00", "6:00"]
    assert contents(Path("base_0")) == before


def test_a_finished_student_of_other_settings_is_refused_before_the_teacher_is_measured(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("original"), dataset=str(data))
    words = WORDS.replace("--to_steps 2", "")
    done(f"{words} --report False")
    before = contents(Path("base_0"))
    monkeypatch.setattr("vdiff.cli.distill.quality_of", lambda *_, **__: pytest.fail("the teacher is measured"))
    assert "base_0 was made with lr" in error(f"{words} --lr 0.5 --distance_every 1", 2)
    assert contents(Path("base_0")) == before


@pytest.mark.parametrize(
    ("distance", "teachers", "reason", "expected"),
    [
        (0.32, 0.2, "", "its distance to the data is 1.6 times its teacher's: more --num_iters may help"),
        (0.3, 0.2, "", ""), (0.9, 0.2, "far", ""), (None, None, "", ""), (0.3, 0.0, "", ""),
    ],
)  # fmt: skip
def test_a_student_much_worse_than_its_teacher_is_spoken_of(distance, teachers, reason, expected):
    assert warning(Verdict(0.3, 0.2, distance, teachers, 4, 1, reason)) == expected


def test_the_warning_is_said_once_with_the_verdict(data, teacher, monkeypatch):
    Told(monkeypatch, {LR: 0.2}, {LR: 2.0})
    watcher = Watcher()
    climbed(data, teacher, reporter=watcher)
    told = [line for line in watcher.lines if "more --num_iters may help" in line]
    assert told == [
        f"{teacher.parent / 'base_0'}: its distance to the data is 2.0 times its teacher's: more --num_iters may help"
    ]
