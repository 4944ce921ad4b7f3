"""Several processes: the training of one, stopped and resumed together; and runs that are killed at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, TINY
from tests.programs import Forked, command, ends, launch
from tests.toy import assert_equal_bits, scalars, write_dataset
from vdiff.cli import distill, train
from vdiff.files import parse
from vdiff.models.checkpoint import CONFIG, WEIGHTS, load_checkpoint
from vdiff.training.state import state_path

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo and POSIX signals")
ALIKE = "num_workers = 0\n"
SETTINGS = TINY.replace("dropout = 0.1", "dropout = 0.0").replace("[unet]", f"{ALIKE}[unet]") + ALIKE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data/toy_4")
    (folder / "tiny.toml").write_text(SETTINGS)
    return folder


def done(line: str, place: Path, processes: int = 2) -> str:
    """Run what must succeed; what it said on stderr."""
    codes, stdout, stderr = ends(launch(command(line), place, processes))
    assert codes == [0] * processes, stdout + stderr
    return stderr


def torchrun(line: str, place: Path) -> str:
    """The same with a real launcher, as the README says it."""
    for script in ("train.py", "distill.py"):
        shutil.copy(ROOT / script, place)
    process = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", *line.split()],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, text=True,
        capture_output=True, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stderr


def close(first: Path, second: Path) -> bool:
    """Whether two models answer alike; weights that change no answer, before a norm, are what Adam makes of noise."""
    z = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    one, two = (load_checkpoint(folder)[0](z, t).v for folder in (first, second))
    return bool((one - two).norm() < 1e-3 * one.norm())


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """`one` and `two`: six updates, in one process and in two."""
    done("train.py --config tiny.toml --num_iters 6 --log_interval 1 --out one", place, processes=1)
    stderr = done("train.py --config tiny.toml --num_iters 6 --log_interval 1 --out two", place)
    assert "2 processes, cpu, fp32, batch 4 = 2 processes × 2 samples" in stderr
    assert stderr.count("training two") == 1  # one of them speaks
    return place


def test_two_processes_train_as_one(whole):
    one, two = scalars(whole / "one"), scalars(whole / "two")
    # before rounding is amplified: the very first update has the same loss and gradient
    for name in ("loss", "grad_norm"):
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-5)
        assert list(two[name].values()) == pytest.approx(list(one[name].values()), rel=0.02)
    assert one.keys() == two.keys()
    assert close(whole / "one", whole / "two")
    configs = [parse((whole / name / CONFIG).read_text()) for name in ("one", "two")]
    for config in configs:
        config.pop("train_seconds")
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_torchrun_trains_the_same(whole):
    stderr = torchrun("train.py --config tiny.toml --num_iters 6 --log_interval 1 --out launched", whole)
    assert "2 processes, cpu, fp32, batch 4 = 2 processes × 2 samples" in stderr
    assert_equal_bits(whole / "two" / WEIGHTS, whole / "launched" / WEIGHTS)
    assert_equal_bits(state_path(whole / "two"), state_path(whole / "launched"))


def test_two_processes_resume_to_the_same_bits(whole):
    done("train.py --config tiny.toml --num_iters 3 --out cut", whole)
    done("train.py --config tiny.toml --num_iters 6 --out cut --resume", whole)
    assert_equal_bits(whole / "two" / WEIGHTS, whole / "cut" / WEIGHTS)
    assert_equal_bits(state_path(whole / "two"), state_path(whole / "cut"))


def test_a_ladder_in_two_processes(whole):
    words = "--config tiny.toml --teacher_steps 16 --to_steps 4"
    stderr = done(f"distill.py --base two {words}", whole)
    assert stderr.count("base_1: RMSE to its teacher") == 1
    shutil.move(whole / "base_0", whole / "saved_0")
    shutil.move(whole / "base_1", whole / "saved_1")
    done(f"distill.py --base two {words}", whole, processes=1)
    for number in (0, 1):
        assert close(whole / f"saved_{number}", whole / f"base_{number}")
    assert (whole / "base_1" / "ladder.png").exists()


SHARDED = "--config tiny.toml --fsdp True --grad_accum 2 --ema_profiles True --ema_interval 2 --sample_interval 3"


@pytest.fixture(scope="module")
def sharded(whole: Path) -> Path:
    """`shared`: the weights of `two`, shared out over the processes, with averages, parts and samples."""
    done(f"train.py {SHARDED} --num_iters 6 --log_interval 1 --out shared", whole)
    return whole


def test_weights_shared_out_over_the_processes(sharded):
    """FSDP is the same training."""
    assert close(sharded / "two", sharded / "shared")
    first = scalars(sharded / "two"), scalars(sharded / "shared")
    assert first[1]["loss"][1] == pytest.approx(first[0]["loss"][1], rel=1e-5)
    assert first[1]["grad_norm"][1] == pytest.approx(first[0]["grad_norm"][1], rel=1e-4)
    assert len(list((sharded / "shared" / "samples").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("sharded")
def test_shared_out_weights_are_resumed_and_distilled(whole):
    """FSDP: resumed to the same bits, also without it; the same student."""
    done(f"train.py {SHARDED} --num_iters 3 --out shared_cut", whole)
    done(f"train.py {SHARDED} --num_iters 6 --out shared_cut --resume", whole)
    for name in (WEIGHTS, "state/state.safetensors", "averages/000000004.safetensors"):
        assert_equal_bits(whole / "shared" / name, whole / "shared_cut" / name)
    done(f"train.py {SHARDED} --fsdp False --num_iters 8 --out shared --resume", whole, processes=1)
    stderr = done(
        "distill.py --base two --teacher_steps 16 --to_steps 8 --out shared_student --config tiny.toml --fsdp", whole
    )
    assert stderr.count("shared_student: RMSE to its teacher") == 1
    done("distill.py --base two --teacher_steps 16 --to_steps 8 --out plain_student --config tiny.toml", whole)
    assert close(whole / "shared_student", whole / "plain_student")


def test_one_process_has_nothing_to_share(whole):
    _, _, stderr = ends(launch(command("train.py --config tiny.toml --fsdp True --out alone"), whole, 1))
    assert stderr.splitlines()[-1] == "error: --fsdp needs several processes; start them with torchrun"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_process_stops_both_after_the_same_update(whole, number, code):
    out = f"stopped_{code}"
    line = f"train.py --config tiny.toml --num_iters 100000 --ckpt_interval 100000 --compile False --out {out}"
    programs = launch(command(line), whole)
    deadline = time.monotonic() + 60
    while not list((whole / out / "log").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    programs[1].send_signal(number)  # the second process, which saves nothing
    codes, _, stderr = ends(programs)
    assert codes == [code, code], stderr
    found = re.findall(rf"stopped after update (\d+) of 100000, {out} is saved; continue with --resume", stderr)
    assert len(found) == 1
    config = json.loads((whole / out / CONFIG).read_text())
    assert config["num_iters"] == int(found[0]) > 0


def test_a_batch_that_cannot_be_shared(whole):
    codes, _, stderr = ends(launch(command("train.py --config tiny.toml --batch_size 5 --out odd"), whole))
    assert 0 not in codes
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: a batch of 5 cannot be shared equally by 2 processes in 1 parts; give --batch_size a multiple of 2"
    ]
    assert not (whole / "odd").exists()


def work(folder: Path) -> None:
    """Train a model and distil it, going on where that was begun."""
    words = ["--config", "tiny.toml", "--ckpt_interval", "2"]
    resumed = ["--resume"] if (folder / "original" / "run.toml").exists() else []
    for program, more in [
        (train, [*resumed, "--num_iters", "30", "--out", f"{folder}/original"]),
        (distill, ["--base", f"{folder}/original", "--teacher_steps", "16", "--to_steps", "4"]),
    ]:
        try:
            program.command.main([*words, *more], standalone_mode=True)
        except SystemExit as end:
            if end.code:
                raise


@pytest.mark.slow
def test_killed_at_random_moments_every_run_ends_with_the_same_weights(place, tmp_path):
    """Training and a ladder, killed 30 times in all: original and students are those of a run that never was."""

    def attempt(name: str) -> Forked:
        return Forked(partial(work, Path(name)), tmp_path)

    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copy(place / "tiny.toml", tmp_path)
    began = time.monotonic()
    assert ends([attempt("whole")])[0] == [0]
    usual = time.monotonic() - began
    rng, kills, least, rounds = random.Random(0), 0, 30, 0
    while kills < least or not rounds:
        rounds += 1
        while True:
            program, deadline = attempt(f"round_{rounds}"), time.monotonic() + rng.uniform(0.05, 0.6) * usual
            while program.returncode is None and (kills >= least or time.monotonic() < deadline):
                time.sleep(0.005)
            if program.returncode is not None:
                break
            program.send_signal(signal.SIGKILL)
            kills += 1
            program.communicate(timeout=60)
        assert ends([program])[0] == [0]
    for number in range(1, rounds + 1):
        for name in ("original", "base_0", "base_1"):
            assert_equal_bits(tmp_path / "whole" / name / WEIGHTS, tmp_path / f"round_{number}" / name / WEIGHTS)
