"""Several processes: the training of one, stopped and resumed together; and runs that are killed at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, TINY
from tests.toy import assert_equal_bits, scalars, write_dataset
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
    for script in ("train.py", "distill.py"):
        shutil.copy(ROOT / script, folder)
    return folder


def launch(line: str, place: Path, processes: int = 2) -> subprocess.Popen[str]:
    """Start `train.py …` as the README says: `torchrun --standalone --nproc_per_node 2 train.py …`."""
    torchrun = Path(sys.executable).with_name("torchrun")
    words = [str(torchrun), "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [*(words or [sys.executable]), *line.split()],
        cwd=place,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def done(line: str, place: Path, processes: int = 2) -> str:
    """Run what must succeed; what it said on stderr."""
    stdout, stderr = (process := launch(line, place, processes)).communicate(timeout=900)
    assert process.returncode == 0, stdout + stderr
    return stderr


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
    assert "2 processes, cpu, fp32, batch 4 = 2 processes × 2 images" in stderr
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


def test_two_processes_resume_to_the_same_bits(whole):
    done("train.py --config tiny.toml --num_iters 3 --out cut", whole)
    done("train.py --config tiny.toml --num_iters 6 --out cut --resume", whole)
    assert_equal_bits(whole / "two" / WEIGHTS, whole / "cut" / WEIGHTS)
    assert_equal_bits(state_path(whole / "two"), state_path(whole / "cut"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_weights_shared_out_over_the_processes(whole):
    """FSDP: the same training, resumed to the same bits, with averages, parts and samples; readable without it."""
    words = "--config tiny.toml --fsdp True --grad_accum 2 --ema_profiles True --ema_interval 2 --sample_interval 3"
    done(f"train.py {words} --num_iters 6 --log_interval 1 --out shared", whole)
    assert close(whole / "two", whole / "shared")
    first = scalars(whole / "two"), scalars(whole / "shared")
    assert first[1]["loss"][1] == pytest.approx(first[0]["loss"][1], rel=1e-5)
    assert first[1]["grad_norm"][1] == pytest.approx(first[0]["grad_norm"][1], rel=1e-4)
    done(f"train.py {words} --num_iters 3 --out shared_cut", whole)
    done(f"train.py {words} --num_iters 6 --out shared_cut --resume", whole)
    for name in (WEIGHTS, "state/state.safetensors", "averages/000000004.safetensors"):
        assert_equal_bits(whole / "shared" / name, whole / "shared_cut" / name)
    assert len(list((whole / "shared" / "samples").iterdir())) == 2
    done(f"train.py {words} --fsdp False --num_iters 8 --out shared --resume", whole, processes=1)
    stderr = done(
        "distill.py --base two --teacher_steps 16 --to_steps 8 --out shared_student --config tiny.toml --fsdp", whole
    )
    assert stderr.count("shared_student: RMSE to its teacher") == 1
    done("distill.py --base two --teacher_steps 16 --to_steps 8 --out plain_student --config tiny.toml", whole)
    assert close(whole / "shared_student", whole / "plain_student")


def test_one_process_has_nothing_to_share(whole):
    process = launch("train.py --config tiny.toml --fsdp True --out alone", whole, processes=1)
    _, stderr = process.communicate(timeout=900)
    assert (
        stderr.splitlines()[-1]
        == "error: --fsdp: there is one process to share the weights; start several, with torchrun"
    )


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_to_one_process_stops_both_after_the_same_update(whole, number, code):
    out = f"stopped_{code}"
    process = launch(f"train.py --config tiny.toml --num_iters 100000 --ckpt_interval 100000 --out {out}", whole)
    deadline = time.monotonic() + 600
    while not list((whole / out / "log").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    workers = [pid for pid in descendants(process.pid) if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(max(workers), number)  # the second process, which saves nothing
    _, stderr = process.communicate(timeout=900)
    assert f"exitcode  : {code}" in stderr or f"exitcode: {code}" in stderr, stderr
    found = re.findall(rf"stopped after update (\d+) of 100000, {out} is saved; go on with --resume", stderr)
    assert len(found) == 1
    config = json.loads((whole / out / CONFIG).read_text())
    assert config["num_iters"] == int(found[0]) > 0


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found[1:]


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared(whole):
    process = launch("train.py --config tiny.toml --batch_size 5 --out odd", whole)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode != 0
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: a batch of 5 cannot be shared equally by 2 processes in 1 parts; give --batch_size a multiple of 2"
    ]
    assert not (whole / "odd").exists()


KILLER = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from vdiff.cli import distill, train
import accelerate, safetensors.torch, tensorboard.summary, vdiff.training.comparison  # once, not in every fork

KILLS = int(sys.argv[1])
WORDS = ["--config", "tiny.toml", "--ckpt_interval", "2"]

def work(folder):
    run = ["--resume"] if (Path(folder) / "original" / "run.toml").exists() else []
    for command, words in [
        (train.command, [*WORDS, *run, "--num_iters", "30", "--out", f"{folder}/original"]),
        (distill.command, [*WORDS, "--base", f"{folder}/original", "--teacher_steps", "16", "--to_steps", "4"]),
    ]:
        try:
            command.main(words, standalone_mode=True)
        except SystemExit as end:
            if end.code:
                os._exit(end.code)
    os._exit(0)

def attempt(folder, seconds):
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        work(folder)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (status := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(status[1])
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None

began = time.monotonic()
assert attempt("whole", 120) == 0
seconds = time.monotonic() - began
rng, kills, rounds = random.Random(0), 0, 0
while kills < KILLS or not rounds:
    rounds += 1
    folder = f"round_{rounds}"
    while (code := attempt(folder, rng.uniform(0.05, 0.6) * seconds if kills < KILLS else 120)) is None:
        kills += 1
    assert code == 0, (folder, code)
print(kills, rounds)
"""


@pytest.mark.parametrize("least", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_every_run_ends_with_the_same_weights(place, tmp_path, least):
    """Training and a ladder, killed so often in all: original and students are those of a run that never was."""
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copy(place / "tiny.toml", tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", KILLER, str(least)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    kills, rounds = map(int, process.stdout.split())
    assert kills >= least
    for number in range(1, rounds + 1):
        for name in ("original", "base_0", "base_1"):
            assert_equal_bits(tmp_path / "whole" / name / WEIGHTS, tmp_path / f"round_{number}" / name / WEIGHTS)
