"""Threads of a run: who decides, what is timed, and that a continued run uses the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.commands import TINY, done
from tests.toy import Watcher, train_config, write_checkpoint, write_dataset
from vdiff.cli import options
from vdiff.training import threads
from vdiff.training.engine import build_engine
from vdiff.training.presets import read_run
from vdiff.training.threads import seconds_by_threads, settled_threads, timed_batch


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settle(monkeypatch, seconds: dict[int, float], bf16: float = 0.0, recorded: int | None = None, **changes):
    """The threads that are chosen where passes take so long, and what is said."""
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "seconds_by_threads", lambda *_: seconds)
    monkeypatch.setattr(threads, "computes_bf16", lambda: bf16 > 0)
    monkeypatch.setattr(threads, "seconds_of_pass", lambda *_: bf16)
    watcher = Watcher()
    config = train_config(Path("none"), device="cpu", **changes)
    found = settled_threads(config, lambda: torch.nn.Identity(), (1, 4, 4), watcher, recorded)
    return found, watcher.lines


def test_the_fastest_number_of_threads_is_taken_and_said(monkeypatch):
    line = "threads 1: a pass of 4 samples takes 0.25 s with 1, 0.5 s with 2; --threads sets the number"
    assert settle(monkeypatch, {1: 0.25, 2: 0.5}) == (1, [line])
    assert settle(monkeypatch, {1: 0.25, 2: 0.2})[0] == 2


@pytest.mark.parametrize(("most", "numbers"), [(2, [1, 2]), (5, [1, 3, 5]), (16, [1, 8, 16])])
def test_one_half_and_all_threads_are_timed(monkeypatch, most, numbers):
    def seconds(_, __, timed):
        assert timed == numbers
        return {number: 1 / number for number in timed}

    monkeypatch.setattr(threads, "seconds_by_threads", seconds)
    monkeypatch.setattr(threads, "seconds_of_pass", lambda *_: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: most)
    config = train_config(Path("none"), device="cpu", batch_size=32, precision="fp32")
    assert settled_threads(config, lambda: torch.nn.Identity(), (1, 4, 4), Watcher(), None) == most


@pytest.mark.parametrize(("an_image", "images"), [(0.001, 48), (0.01, 16), (0.03, 4), (0.2, 1)])
def test_a_timed_pass_takes_a_tenth_of_a_second_or_a_batch(monkeypatch, an_image, images):
    monkeypatch.setattr(threads, "seconds_of_pass", lambda _, z, __: len(z) * an_image)
    assert tuple(timed_batch(torch.nn.Identity(), (1, 4, 4), 48).shape) == (images, 1, 4, 4)


@pytest.mark.parametrize(("slow", "rounds"), [(0.1, 3), (0.6, 2), (5.0, 1)])
def test_slow_passes_are_timed_in_fewer_rounds(monkeypatch, slow, rounds):
    timed = []

    def seconds(*_):
        timed.append(torch.get_num_threads())
        return slow if timed[-1] == 2 else 0.05

    monkeypatch.setattr(threads, "seconds_of_pass", seconds)
    found = seconds_by_threads(torch.nn.Identity(), torch.zeros(2, 1, 4, 4), [1, 2])
    assert found == pytest.approx({1: 0.05, 2: slow})
    assert timed == [1, 2] * rounds


def test_bf16_is_proposed_where_it_is_much_faster(monkeypatch):
    _, lines = settle(monkeypatch, {1: 0.25, 2: 0.5}, bf16=0.1, precision="auto")
    assert lines[1] == "--precision bf16 is 2.5 times as fast here; its effect on quality is not measured"
    for bf16, precision in ((0.24, "auto"), (0.1, "fp32")):
        assert len(settle(monkeypatch, {1: 0.25, 2: 0.5}, bf16=bf16, precision=precision)[1]) == 1


def test_others_decide_first(monkeypatch):
    times = {1: 0.25, 2: 0.5}
    assert settle(monkeypatch, times, recorded=7) == (7, [])
    assert settle(monkeypatch, times, recorded=7, threads=3) == (3, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settle(monkeypatch, times) == (None, [])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settle(monkeypatch, times) == (None, [])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert settle(monkeypatch, times)[0] == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert settle(monkeypatch, times) == (None, [])


def test_passes_are_timed_with_each_number_and_leave_no_gradient(tmp_path):
    denoiser = write_checkpoint(tmp_path / "model", classes=3).train()
    times = seconds_by_threads(denoiser, torch.zeros(2, 1, 4, 4), [1, 2])
    assert list(times) == [1, 2]
    assert all(seconds > 0 for seconds in times.values())
    assert torch.get_num_threads() == 2
    assert all(weight.grad is None for weight in denoiser.parameters())


def test_a_run_keeps_its_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    Path("tiny.toml").write_text(TINY)
    monkeypatch.setattr(threads, "seconds_by_threads", lambda *_: {1: 0.1, 2: 0.5})
    done("train.py --config tiny.toml --num_iters 100 --device cpu")
    assert read_run(Path("checkpoints/original")).train["threads"] == 1
    torch.set_num_threads(2)
    done("train.py --resume --num_iters 102")
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    line = "distill.py --config tiny.toml --num_iters 100 --check_images 0 --device cpu"
    done(line)
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "seconds_by_threads", lambda *_: {1: 0.5, 2: 0.1})
    assert "threads" not in done(line).stderr
    assert torch.get_num_threads() == 1


def test_threads_are_set_by_the_engine():
    build_engine(replace(train_config(Path("none")), threads=1))
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="POSIX load averages")
def test_threads_wait_briefly_on_a_busy_machine_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for load, spins in ((1.9, None), (2.1, "1000")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        options.wait_briefly()
        assert os.environ.get("GOMP_SPINCOUNT") == spins
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv(name, "5")
        options.wait_briefly()
        assert os.environ.get("GOMP_SPINCOUNT") == ("5" if name == "GOMP_SPINCOUNT" else None)
