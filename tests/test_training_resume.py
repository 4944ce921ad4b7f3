"""Stopping and resuming: the same bits after any interruption, and nothing is lost, mixed up or begun anew silently."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
from pathlib import Path

import pytest

from tests.toy import (
    COUNT,
    UNET,
    Watcher,
    assert_equal_bits,
    assert_same_run,
    contents,
    fit_run,
    run_of,
    run_training,
    scalars,
    signal_at,
    train_config,
    write_dataset,
)
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import CONFIG, WEIGHTS, read_config, read_metadata, read_tensors, write_tensors
from vdiff.records import RUN_FILE
from vdiff.training import history, loop
from vdiff.training.config import TrainConfig
from vdiff.training.folder import check_same_run
from vdiff.training.objectives import StudentState, TrainBatch, TrainTarget
from vdiff.training.state import state_path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loop") / "toy_4")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates without a break."""
    folder = tmp_path_factory.mktemp("whole") / "original"
    run_training(train_config(data), folder)
    return folder


# Resuming


def crash(config: TrainConfig, folder: Path, at: int) -> None:
    """End a run without warning, after update `at`."""

    def act(_: str, completed: int) -> None:
        if completed == at:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_training(config, folder, reporter=Watcher(act))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("place", ["save_checkpoint", "take"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_before_a_checkpoint_is_kept_costs_none(data, tmp_path, monkeypatch, schedule, place, number):
    """Killed after the state was written or after the checkpoint was, also the last one: `--resume` keeps it."""
    folder, calls = tmp_path / "original", []
    config = train_config(data, ckpt_interval=2, keep_every=2, lr_schedule=schedule, sample_interval=9)
    owner = history if place == "take" else loop

    def killed(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("killed")
        real(*_, **__)

    real = getattr(owner, place)
    with monkeypatch.context() as patched:
        patched.setattr(owner, place, killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(config, folder)
    run_training(config, folder, resume=True)
    assert sorted(path.name for path in (folder / "history").iterdir()) == ["000000002", "000000004", "000000006"]
    for step in (2, 4, 6):
        assert read_config(folder / "history" / f"{step:09d}").num_iters == step
    run_training(config, tmp_path / "whole")
    for step in (2, 4, 6):
        kept = Path("history", f"{step:09d}", WEIGHTS)
        assert_equal_bits(folder / kept, tmp_path / "whole" / kept)
    assert state_path(folder).exists() == (schedule == "constant")


def test_a_state_has_all_that_a_run_needs(whole):
    names = read_tensors(whole / WEIGHTS).keys()
    parts = ("raw", "ema", "exp_avg", "exp_avg_sq")
    assert read_tensors(state_path(whole)).keys() == {f"{part}.{name}" for part in parts for name in names}


def test_a_state_of_an_earlier_version_is_continued(data, whole, tmp_path):
    """It says of the optimiser only how many updates it did."""
    folder = tmp_path / "original"
    run_training(train_config(data, num_iters=3), folder)
    metadata, tensors = read_metadata(state_path(folder)), read_tensors(state_path(folder))
    del metadata["optimizer"]
    write_tensors(state_path(folder), tensors, metadata)
    run_training(train_config(data), folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_more_updates_are_the_same_as_all_at_once(data, whole, tmp_path, cut):
    """k updates, then `--resume` to N: with dropout, flips, an average, warm-up and epochs that end inside a batch."""
    folder = tmp_path / "original"
    run_training(train_config(data, num_iters=cut), folder)
    assert read_config(folder).num_iters == cut
    run_training(train_config(data), folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
def test_a_run_that_is_cut_twice_ends_with_the_same_bits(data, tmp_path, lr_schedule):
    """Ctrl-C, resume, Ctrl-C, resume: the state in the middle and the weights at the end."""
    config = train_config(data, num_iters=7, lr_schedule=lr_schedule)
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder, cuts in ((once, [4]), (twice, [1, 4])):
        for cut in cuts:
            with pytest.raises(Interrupted):
                run_training(config, folder, reporter=signal_at(cut), resume=folder.exists())
    assert_same_run(once, twice)
    for folder in (once, twice):
        run_training(config, folder, resume=True)
    assert_same_run(once, twice)
    whole = tmp_path / "whole"
    run_training(config, whole)
    assert_same_run(once, whole)


def test_resuming_goes_on_counting(data, tmp_path):
    folder = tmp_path / "original"
    run_training(train_config(data, num_iters=2), folder)
    seconds = read_config(folder).train_seconds
    watcher = Watcher()
    done = run_training(train_config(data), folder, resume=True, reporter=watcher)
    assert watcher.bars == [("original", 6, 2), ("samples of original", 8, 0)]
    assert [completed for name, completed in watcher.seen if name == "original"] == [3, 4, 5, 6]
    assert (done.num_iters, done.target_iters, done.num_images) == (6, 6, 24)
    assert done.train_seconds >= seconds
    assert done.is_finished


@pytest.mark.parametrize("sampled", [1, 4])
def test_the_log_has_every_update_once_after_a_resumed_crash(data, whole, tmp_path, sampled):
    """Killed after update 5, where update 4 was the last one saved: what is logged of update 5 is redone."""
    config = train_config(data, log_interval=1, ckpt_interval=4, sample_interval=sampled)
    folder = tmp_path / "original"
    crash(config, folder, 5)
    assert list(scalars(folder)["loss"]) == [1, 2, 3, 4, 5]
    assert read_config(folder).num_iters == 4
    run_training(config, folder, resume=True)
    assert list(scalars(folder)["loss"]) == [1, 2, 3, 4, 5, 6]
    assert_same_run(folder, whole)


def test_a_finished_run_has_nothing_to_resume(data, whole):
    before = contents(whole)
    watcher = Watcher()
    found = run_training(train_config(data), whole, resume=True, reporter=watcher)
    assert contents(whole) == before
    assert watcher.lines == [f"{whole} is finished already: 6 updates; --resume with more --num_iters trains it longer"]
    assert found == read_config(whole)


def test_a_killed_run_without_a_checkpoint_begins_anew(data, whole, tmp_path):
    """Nothing was saved yet, so `--resume` has nothing to lose."""
    folder = tmp_path / "original"
    crash(train_config(data), folder, 2)
    assert not (folder / CONFIG).exists()
    run_training(train_config(data), folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine"])
def test_where_the_learning_rate_ends_at_zero_the_state_goes(data, tmp_path, lr_schedule):
    folder = tmp_path / "original"
    run_training(train_config(data, lr_schedule=lr_schedule), folder)
    assert not state_path(folder).parent.exists()
    assert read_config(folder).is_finished
    watcher = Watcher()
    before = contents(folder)
    run_training(train_config(data, lr_schedule=lr_schedule), folder, resume=True, reporter=watcher)
    assert "finished already" in watcher.lines[0]
    assert contents(folder) == before


def cut_run(data: Path, folder: Path, **changes) -> None:
    with pytest.raises(Interrupted):
        run_training(train_config(data, **changes), folder, reporter=signal_at(2))


def test_a_missing_state_never_begins_anew_silently(data, tmp_path):
    folder = tmp_path / "original"
    cut_run(data, folder)
    state_path(folder).unlink()
    before = contents(folder)
    with pytest.raises(VdiffError, match=r"cannot be resumed: .*state\.safetensors is missing; give another --out"):
        run_training(train_config(data), folder, resume=True)
    assert contents(folder) == before


@pytest.mark.parametrize("changes", [{}, {"ema_images": 50.0}, {"ema": 0.0, "ema_more": "0.5"}, {"ema": 0.0}])
def test_a_state_that_averaged_with_a_warm_up_is_refused(data, tmp_path, changes):
    """An older vdiff's state; one without exponential averages goes on."""
    folder = tmp_path / "original"
    cut_run(data, folder, **changes)
    metadata, tensors = read_metadata(state_path(folder)), read_tensors(state_path(folder))
    assert metadata.pop("averaging") == "bias-corrected"
    write_tensors(state_path(folder), tensors, metadata)
    if changes == {"ema": 0.0}:
        run_training(train_config(data, **changes), folder, resume=True)
        return
    before = contents(folder)
    with pytest.raises(VdiffError, match=r"older vdiff, whose averages .* had a warm-up; .* give another"):
        run_training(train_config(data, log_interval=7, **changes), folder, resume=True)  # a setting that may change
    assert contents(folder) == before


def test_the_state_of_another_model_is_refused(data, tmp_path):
    wide = {**UNET, "channels": 8}
    for name, unet in (("small", UNET), ("wide", wide)):
        cut_run(data, tmp_path / name, unet=unet)
    small, other = state_path(tmp_path / "small"), state_path(tmp_path / "wide")
    small.write_bytes(other.read_bytes())
    with pytest.raises(VdiffError, match=r"state\.safetensors does not belong to this run .*--overwrite"):
        run_training(train_config(data), tmp_path / "small", resume=True)
    small.write_bytes(other.read_bytes()[:-100])
    with pytest.raises(VdiffError, match="truncated or damaged"):
        run_training(train_config(data), tmp_path / "small", resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-3}, "lr 0.01, not 0.001"),
        ({"seed": 3}, "seed 0, not 3"),
        ({"batch_size": 5}, "batch_size 4, not 5"),
        ({"num_iters": 9}, "num_iters 6, not 9"),
        ({"unet": {**UNET, "channels": 8}}, "unet "),
    ],
)
def test_a_run_is_not_resumed_as_another_one(data, tmp_path, changes, words):
    folder = tmp_path / "original"
    cut_run(data, folder, lr_schedule="linear")
    before = contents(folder)
    with pytest.raises(OptionError, match="was begun with") as caught:
        run_training(train_config(data, **{"lr_schedule": "linear", **changes}), folder, resume=True)
    assert words in str(caught.value)
    assert contents(folder) == before


FREE = {
    "data", "base", "max_bad_steps", "log_interval", "sample_interval", "ckpt_interval", "ema_interval", "keep_last",
    "keep_every", "tracker", "device", "compile", "fsdp", "checkpointing", "threads", "num_workers", "lora",
    "sample_prompts",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
@pytest.mark.parametrize("lr_schedule", ["constant", "linear"])
def test_every_setting_is_compared_unless_the_result_does_not_depend_on_it(tmp_path, name, lr_schedule):
    """The number of updates is free only where the learning rate does not fall towards the last one."""
    saved = train_config(tmp_path, lr_schedule=lr_schedule)
    now = dataclasses.replace(saved)
    object.__setattr__(now, name, "another")
    check_same_run(tmp_path, saved, saved)
    if name in FREE | ({"num_iters"} if lr_schedule == "constant" else set()):
        check_same_run(tmp_path, now, saved)
    else:
        with pytest.raises(OptionError, match=f"was begun with {name} .*, not another; leave --{name} out to resume"):
            check_same_run(tmp_path, now, saved)


def test_what_does_not_change_the_result_may_change(data, whole, tmp_path):
    folder = tmp_path / "original"
    cut_run(data, folder)
    changes = {"log_interval": 3, "ckpt_interval": 2, "sample_interval": 2, "num_workers": 1, "device": "auto"}
    run_training(train_config(data, **changes), folder, resume=True)
    assert_same_run(folder, whole)


def test_other_images_are_refused(data, tmp_path):
    folder = tmp_path / "original"
    cut_run(data, folder)
    other = write_dataset(tmp_path / "other", count=COUNT + 1)
    with pytest.raises(VdiffError, match=r"other images than .*other holds; give --data .*toy_4"):
        run_training(train_config(other), folder, resume=True)


def test_there_must_be_a_run_to_resume(data, tmp_path):
    with pytest.raises(VdiffError, match=rf"holds no run to resume: it has no {RUN_FILE}; start it without --resume"):
        run_training(train_config(data), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


# Folders


def test_what_exists_is_replaced_only_when_told_to(data, whole, tmp_path):
    folder = tmp_path / "original"
    cut_run(data, folder, seed=5)
    before = contents(folder)
    with pytest.raises(VdiffError, match=r"exists already \(3 of 6 updates\); give --resume to continue, another"):
        run_training(train_config(data), folder)
    assert contents(folder) == before
    run_training(train_config(data), folder, overwrite=True)
    assert_same_run(folder, whole)
    with pytest.raises(
        VdiffError, match=r"exists already \(6 of 6 updates\); give another --name or --out to keep both"
    ):
        run_training(train_config(data), folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(data, tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    with pytest.raises(VdiffError, match="exists and is not a run that vdiff wrote"):
        run_training(train_config(data), tmp_path / "photos", overwrite=overwrite)
    with pytest.raises(VdiffError, match=r"cat\.txt exists and is not a run"):
        run_training(train_config(data), tmp_path / "photos" / "cat.txt", overwrite=overwrite)
    assert (tmp_path / "photos" / "cat.txt").read_text() == "meow"


# Stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["update", "bar"])
def test_a_signal_ends_the_update_and_saves_it(data, whole, tmp_path, number, code, where):
    """Whenever it comes, inside an update or while one is shown: what was done is kept, resuming changes nothing."""
    folder, reporter = tmp_path / "original", signal_at(3, number)
    run = run_of(train_config(data), folder)
    if where == "update":
        disturbed = disturb(run.objective, 2, lambda: os.kill(os.getpid(), number))
        run, reporter = dataclasses.replace(run, objective=disturbed), Watcher()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        fit_run(run, reporter)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert caught.value.exit_code == code
    (said,) = [line for line in reporter.lines if line.startswith("finishing")]
    assert re.fullmatch(r"finishing update [34](, .*)?; press again to leave now, with nothing saved", said)
    done = read_config(folder).num_iters
    assert done in ((3,) if where == "update" else (3, 4))
    assert read_metadata(state_path(folder))["step"] == str(done)
    assert str(caught.value).startswith(f"stopped after update {done} of 6, {folder} is saved")
    fit_run(run_of(train_config(data), folder))
    assert_same_run(folder, whole)


def disturb(objective, at: int, act):
    """An objective that does something in update `at` (from 0)."""
    calls = itertools.count()

    def answer(draws: TrainBatch, pupil: StudentState) -> TrainTarget:
        if next(calls) == at:
            act()
        return objective(draws, pupil)

    return answer


def test_a_signal_in_the_last_update_finishes_the_run(data, whole, tmp_path):
    folder = tmp_path / "original"
    with pytest.raises(Interrupted, match="is finished and saved") as caught:
        run_training(train_config(data), folder, reporter=signal_at(6, signal.SIGTERM, bar="original"))
    assert caught.value.exit_code == 143
    assert_same_run(folder, whole)


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint(data, tmp_path):
    folder, reported = tmp_path / "original", []

    def act(_: str, completed: int) -> None:
        reported.append(completed)
        if completed == 4:
            reported.append(contents(folder))
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at once") as caught:
        run_training(train_config(data, ckpt_interval=3, num_iters=9), folder, reporter=Watcher(act))
    assert caught.value.exit_code == 130
    *updates, before = reported
    assert updates == [1, 2, 3, 4]
    after = contents(folder)
    assert {name: after[name] for name in (WEIGHTS, CONFIG)} == {name: before[name] for name in (WEIGHTS, CONFIG)}
    assert read_config(folder).num_iters == 3
