"""Compiling on a CPU: tried in long runs alone, kept if it saves time, recorded in the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.commands import TINY, done
from tests.toy import Watcher, train_config, write_dataset
from vdiff.training import compilation
from vdiff.training.compilation import SECONDS_TO_COMPILE, TRY_FROM, settled_compile
from vdiff.training.engine import build_engine
from vdiff.training.estimate import update_times
from vdiff.training.presets import read_run

LONG = TRY_FROM * SECONDS_TO_COMPILE


def settle(compiled: tuple[float, float] | Exception, *, num_networks: int = 1, updates: int = 1000, **changes):
    """What is decided where an update takes LONG/1000 seconds, and compiled `compiled`; what is printed."""
    watcher = Watcher()
    engine = build_engine(train_config(Path("none"), device="cpu"))
    engine = replace(engine, **{name: changes.pop(name) for name in ("device", "world_size") if name in changes})

    def times(timed):
        assert timed.compile
        if isinstance(compiled, Exception):
            raise compiled
        return compiled

    found = settled_compile(
        train_config(Path("none"), **changes), engine, times,
        updates=updates, seconds=LONG / 1000, num_networks=num_networks, reporter=watcher,
    )  # fmt: skip
    return found, watcher.lines[1:]


def test_compiling_is_kept_if_it_saves_more_than_it_takes():
    """1000 updates of 1.8 s; compiled they take 1.2 s, which saves 600 s."""
    assert settle((599, 1.2)) == (True, [
        "compiled: an update takes 1.2 s compiled and 1.8 s otherwise, and compiling takes 9:59 for 1 network; "
        "--compile overrides this"
    ])  # fmt: skip
    found, lines = settle((601, 1.2))
    assert found is False
    assert lines[0].startswith("not compiled: ")
    assert settle((301, 1.2), num_networks=2)[0] is False
    assert settle((0.1, 1.9))[0] is False


def test_short_runs_gpus_several_processes_and_explicit_settings_are_not_tried():
    never = AssertionError("compiled")
    assert settle(never, updates=999) == (None, [])
    assert settle(never, device=torch.device("cuda")) == (None, [])
    assert settle(never, world_size=2) == (None, [])
    assert settle(never, compile=False) == (False, [])
    assert settle(never, compile=True) == (True, [])


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is():
    found = settle(RuntimeError("No working C++ compiler\nfound"))
    assert found == (False, ["not compiled: No working C++ compiler found"])


def test_a_run_keeps_the_decision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    Path("tiny.toml").write_text(TINY)
    compiled: list[int] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: compiled.append(1))
    monkeypatch.setattr(compilation, "TRY_FROM", 0)
    trial = SimpleNamespace(gain=1.0)
    monkeypatch.setattr("vdiff.training.estimate.update_times", lambda *args: (0.0, 2.0 - trial.gain * args[2].compile))
    monkeypatch.setattr("vdiff.training.student.update_times", lambda *args: (0.0, 2.0 - trial.gain * args[2].compile))
    assert "compiling" in done("train.py --config tiny.toml --num_iters 100 --device cpu --dry_run").stdout
    line = "train.py --config tiny.toml --num_iters 100 --device cpu"
    assert "\ncompiled: an update takes 1 s compiled and 2 s otherwise" in done(line).stderr
    assert read_run(Path("checkpoints/original")).train["compile"] is True
    compiled.clear()
    done("train.py --resume --num_iters 101")
    assert compiled == [1]
    line = "distill.py --config tiny.toml --num_iters 100 --check_images 0 --device cpu"
    assert "\ncompiled: " in done(line).stderr
    assert read_run(Path("checkpoints/base_0")).distill["compile"] is True
    trial.gain = -1.0
    assert "compiled" not in done(f"{line} --report False").stderr.replace(", compiled", "")
    assert "\nnot compiled: " in done(f"{line} --out checkpoints/other").stderr
    assert read_run(Path("checkpoints/other")).distill["compile"] is False


@pytest.mark.slow
def test_a_trial_compiles_and_times_updates(tmp_path):
    """With torch's own compiler, if there is one for C++."""
    from vdiff.models.speed import compiler_failure
    from vdiff.training.base import describe
    from vdiff.training.base_training import base_task
    from vdiff.training.dataset import TrainingData

    config = train_config(tmp_path, device="cpu", batch_size=2)
    description = describe(config, TrainingData(4, 1))
    engine = replace(build_engine(config), compile=True)
    try:
        first, usual = update_times(base_task(config, description.build()), (1, 4, 4), engine)
    except Exception as error:
        if not compiler_failure(error):
            raise
        pytest.skip(f"nothing compiles here: {compiler_failure(error)}")
    assert first > usual > 0
