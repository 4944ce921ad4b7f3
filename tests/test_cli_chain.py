"""From images to samples as it is typed: the documented lines, ladders, resuming, and where settings come from."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin
import pytest

from tests import commands
from tests.commands import ROOT, TINY, done, error, image_of, run, tree, typed
from tests.programs import start
from tests.test_data_cli import children
from tests.toy import assert_equal_bits, write_checkpoint, write_dataset
from vdiff.data.store import ImageStore
from vdiff.models.checkpoint import read_config
from vdiff.training.presets import WRITTEN, read_preset

WEIGHTS = "model.safetensors"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset, a configuration file, and a teacher of 16 steps, which is the working folder."""
    return furnish(tmp_path, monkeypatch)


def furnish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(exist_ok=True)
    write_dataset(folder / "data/toy_4")
    (folder / "tiny.toml").write_text(TINY)
    write_checkpoint(folder / "checkpoints/base_5", num_timesteps=16)
    monkeypatch.chdir(folder)
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# The documented lines, as programs


@pytest.mark.slow
def test_digits_of_256_pixels(tmp_path):
    stdout = typed("python prepare_data.py --size 256", tmp_path)
    assert "written    1797 images, 10 classes, size 256, to data/digits_256\n" in stdout
    store = ImageStore(tmp_path / "data/digits_256")
    assert (len(store), store.meta.sizes, store.meta.channels) == (1797, (256,), 1)
    assert image_of(store, 256, 1796).size == (256, 256)


def here(line: str, _: Path) -> str:
    """As `typed`, in this process."""
    return done(line.removeprefix("python ")).stdout


@pytest.mark.parametrize("typed", [here, pytest.param(typed, marks=pytest.mark.slow)])
def test_from_nothing_to_samples(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "next       python train.py --data data/digits_8\n" in typed("python prepare_data.py", tmp_path)
    stdout = typed("python train.py --preset toy --num_iters 3", tmp_path)
    assert "checkpoints/original: 3 updates in " in stdout
    assert "python distill.py --base checkpoints/original\n" in stdout

    write_checkpoint(tmp_path / "checkpoints/base_5", num_timesteps=16, image_size=8)
    stdout = typed("python distill.py --base checkpoints/base_5", tmp_path)
    student = read_config(Path("checkpoints/base_6"))
    assert (student.num_timesteps, student.method, student.is_finished) == (8, "progressive", True)
    assert student.teacher is not None
    assert (student.teacher["path"], student.teacher["num_timesteps"]) == ("checkpoints/base_5", 16)
    assert stdout.endswith("next       python sample.py --checkpoint checkpoints/base_6\n")

    stdout = typed("python sample.py --clipped_sampling True", tmp_path)
    folder = Path("samples/base_6-clipped-8steps-seed0")
    assert stdout.endswith(f"picture    {folder}.grid.png\n")
    assert len(pictures(folder)) == 64
    with PIL.Image.open(f"{folder}.grid.png") as grid:
        assert grid.size[1] > grid.size[0] >= 8 * 72, "a title above rows of eight"

    done("sample.py --clipped_sampling --out bare")
    assert pictures(Path("bare")) == pictures(folder)
    done("vdiff sample --clipped_sampling True --out module")
    assert pictures(Path("module")) == pictures(folder)

    done("sample.py --clipped_sampling False")
    plain = Path("samples/base_6-ddim-8steps-seed0")
    done("sample.py --out default")
    assert pictures(plain) == pictures(Path("default")) != pictures(folder)

    done("sample.py --checkpoint checkpoints/original --time_scale 8 --num 2")
    record = json.loads(Path("samples/original-ddim-128steps-seed0/samples.json").read_text())
    assert (record["sampler"], record["num_steps"], record["checkpoint"]) == ("ddim", 128, "checkpoints/original")


def test_the_installed_command_is_the_scripts(place):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"vdiff": "vdiff.cli.main:main"}
    for name in ("train", "distill"):
        model = "--base checkpoints/base_5 " if name == "distill" else ""
        done(f"{name}.py {model}--config tiny.toml --out script/{name}")
        done(f"vdiff {name} {model}--config tiny.toml --out vdiff/{name}")
        assert_equal_bits(place / "script" / name / WEIGHTS, place / "vdiff" / name / WEIGHTS)
    done("sample.py --checkpoint checkpoints/base_5 --num 3 --out script/sample")
    done("vdiff sample --checkpoint checkpoints/base_5 --num 3 --out vdiff/sample")
    assert pictures(place / "script/sample") == pictures(place / "vdiff/sample")
    shutil.rmtree("data/toy_4")
    done("prepare_data.py --num_workers 0")
    done("vdiff prepare --num-workers 0 --out vdiff/digits")
    assert ImageStore("data/digits_8").meta.fingerprint == ImageStore("vdiff/digits").meta.fingerprint


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.usefixtures("place")
def test_the_commands_printed_at_the_end_can_be_typed(schedule):
    """Also for a table of 12 levels, which takes no number of steps but its divisors."""
    stdout = done(f"train.py --config tiny.toml --schedule {schedule} --num_timesteps 12").stdout
    following = [line[line.index("python ") + 7 :] for line in stdout.splitlines() if "python " in line]
    assert [line.split()[0] for line in following] == ["sample.py", "distill.py"]
    done(f"{following[0]} --num 1")
    stdout = done(f"{following[1]} --config tiny.toml").stdout
    done(stdout.splitlines()[-1].partition("python ")[2] + " --num 1")
    assert read_config(Path("checkpoints/base_0")).num_timesteps == 6


# Ladders


@pytest.mark.usefixtures("place")
def test_a_finished_stage_is_skipped(monkeypatch):
    monkeypatch.setattr("vdiff.training.estimate.FEW_UPDATES", 1)
    line = "distill.py --base checkpoints/base_5 --config tiny.toml"
    first = done(line)
    student = Path("checkpoints/base_6")
    files = [path for path in student.iterdir() if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    result = done(line)
    assert result.stdout == first.stdout
    assert "checkpoints/base_6 is finished already: 8 steps\n" in result.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
    assert result.stdout.startswith("Ladder\n")
    assert "comparing" not in result.stderr
    assert re.search(r"^time +\d.*: 3 updates of ", first.stderr, re.MULTILINE)
    assert not re.search(r"^time ", result.stderr, re.MULTILINE)


@pytest.mark.usefixtures("place")
def test_a_ladder_ends_with_a_table_and_a_picture(monkeypatch):
    monkeypatch.setattr("vdiff.training.stages.EVALUATIONS", 10**4)  # as after a long training
    ladder = "distill.py --base checkpoints/base_5 --config tiny.toml"
    result = done(f"{ladder} --to_steps 2")
    rows = [line.replace(" ?", "").split() for line in result.stdout.splitlines()[2:6]]  # a loaded machine's times
    assert [row[:3] for row in rows] == [
        ["checkpoints/base_5", "16", "1"],
        ["checkpoints/base_6", "8", "3"],
        ["checkpoints/base_7", "4", "3"],
        ["checkpoints/base_8", "2", "6"],  # twice the updates: last_factor
    ]
    assert [read_config(Path(row[0])).num_timesteps for row in rows] == [16, 8, 4, 2]
    table = json.loads(Path("checkpoints/base_8/ladder.json").read_text())
    assert [(row["checkpoint"], row["num_steps"]) for row in table] == [(row[0], int(row[1])) for row in rows]
    assert [f"{row['rmse_to_first']:.4f}" for row in table[1:]] == [row[6] for row in rows[1:]]
    with PIL.Image.open("checkpoints/base_8/ladder.png") as picture:
        picture.load()
    scale = json.loads(Path("checkpoints/base_8/verdict.json").read_text())["scale"]
    assert f"\nscale      other images {scale['same']:.3g}, blurred {scale['blurred']:.3g}, " in result.stdout

    result = done(f"{ladder} --stages 4")
    assert [line.split()[0] for line in result.stderr.splitlines() if "finished already" in line] == [
        f"checkpoints/base_{k}" for k in (6, 7, 8)
    ]
    assert read_config(Path("checkpoints/base_9")).num_timesteps == 1


def test_a_dry_run_of_a_ladder_writes_nothing(place):
    before = tree(place)
    same = []
    for words in ("--to_steps 4", "--stages 2", "--phases 16,8,4"):
        same.append(done(f"distill.py --base checkpoints/base_5 --config tiny.toml --dry_run {words}").stdout)
        rows = [line.split() for line in same[-1].splitlines()[1:]]
        assert [row[:8] for row in rows] == [
            ["student", "teacher", "method", "steps", "updates", "images", "time"],
            ["checkpoints/base_6", "checkpoints/base_5", "progressive", "16", "→", "8", "3", "12"],
            ["checkpoints/base_7", "checkpoints/base_6", "progressive", "8", "→", "4", "3", "12"],
            ["all", "6", *rows[3][2:]],
        ]
    assert tree(place) == before


# Doing it again


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ("train.py --config tiny.toml --seed 3", "train.py --config checkpoints/original/run.toml --out again"),
        (
            "distill.py --base checkpoints/base_5 --config tiny.toml --seed 3",
            "distill.py --config checkpoints/base_6/run.toml --out again",
        ),
    ],
)
@pytest.mark.usefixtures("place")
def test_the_record_of_a_run_makes_the_same_weights(first, again):
    done(first)
    done(again)
    result = Path("checkpoints/original" if first.startswith("train") else "checkpoints/base_6")
    assert_equal_bits(result / WEIGHTS, Path("again") / WEIGHTS)
    assert tomllib.loads((result / "run.toml").read_text()) == tomllib.loads(Path("again/run.toml").read_text())
    done(again.replace("again", "other") + " --seed 4")
    assert (result / WEIGHTS).read_bytes() != Path("other", WEIGHTS).read_bytes()


def next_lines(stdout: str) -> list[str]:
    """The commands that a result ends with, without `python`."""
    lines = stdout[stdout.index("\nnext ") :].split("\n")[1:]
    return [line.removeprefix("next").strip().removeprefix("python ") for line in lines if line]


@pytest.mark.usefixtures("place")
def test_what_comes_next_can_be_typed_also_where_names_have_spaces():
    """The paths are quoted for the shell; the * of the parts is not."""
    Path("my photos").mkdir()
    for k in range(4):
        PIL.Image.new("L", (8, 8), 50 * k).save(f"my photos/{k}.png")
    (train,) = next_lines(done("prepare_data.py 'my photos' --size 4 --num_workers 0").stdout)
    model = shlex.quote("my models/o'clock")
    sample, distill = next_lines(done(f"{train} --config tiny.toml --out {model}").stdout)
    (sample_student,) = next_lines(done(f"{distill} --config tiny.toml --report False").stdout)
    for line in (sample, sample_student):
        assert done(f"{line} --num 1").stdout.startswith("1 image in ")
    (merge,) = next_lines(done("prepare_data.py 'my photos' --size 4 --num_workers 0 --shard 1/2").stdout)
    assert merge == "vdiff data merge 'data/my photos_4'.*of2"


@pytest.mark.usefixtures("place")
def test_missing_samples_are_drawn_again_alone():
    line = "sample.py --checkpoint checkpoints/base_5 --num 5 --batch_size 2 --out out"
    done(line)
    before = pictures(Path("out"))
    assert "out already holds all 5 images\n" in done(line).stdout
    kept = Path("out/00001.png").stat().st_mtime_ns
    Path("out/00003.png").unlink()
    assert done(line).stdout.startswith("1 image in ")
    assert pictures(Path("out")) == before
    assert Path("out/00001.png").stat().st_mtime_ns == kept
    done(line.replace("--num 5", "--num 7"))
    more = pictures(Path("out"))
    assert {name: more[name] for name in before} == before
    assert len(more) == 7


@pytest.mark.usefixtures("place")
def test_a_full_disk_loses_nothing(monkeypatch):
    """The second checkpoint finds no room: the first stays whole, and the run goes on from there."""
    line = "train.py --config tiny.toml --num_iters 6"
    done(f"{line} --out whole")
    replace, writes = os.replace, []

    def full(source: Path, target: Path) -> None:
        if Path(target).name == WEIGHTS:
            writes.append(target)
            if len(writes) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        message = error(line, 1)
    assert message.startswith(f"cannot write checkpoints/original/{WEIGHTS}: No space left on device; free space")
    assert read_config(Path("checkpoints/original")).num_iters == 2
    done("sample.py --checkpoint checkpoints/original --num 1 --out out")
    done(f"{line} --resume")
    assert_equal_bits(Path("whole", WEIGHTS), Path("checkpoints/original", WEIGHTS))


# Signals, to programs at work

STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def stopped(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch, at_work: Callable[[Any], bool], start: Any = start
) -> list[str]:
    """Send Ctrl-C to one program and SIGTERM to another when they are at work; the line that each says at its end.

    They run at the same time, in the folders SIGINT and SIGTERM, made by `furnish`.
    """
    folders = [furnish(place / number.name, monkeypatch) for number, _ in STOPS]
    processes = [start(line, folder) for folder in folders]
    waiting = [0, 1]
    deadline = time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        for k in list(waiting):
            monkeypatch.chdir(folders[k])
            if at_work(processes[k]):
                processes[k].send_signal(STOPS[k][0])
                waiting.remove(k)
        time.sleep(0.01)
    ends = []
    for process, (_, code) in zip(processes, STOPS, strict=True):
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (code, ""), stderr
        assert "Traceback" not in stderr
        ends.append(stderr.splitlines()[-1])
    return ends


def log_is_open(folder: str) -> bool:
    return any(Path(folder, "log").glob("events*"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_training_is_stopped_and_resumed(tmp_path, monkeypatch):
    line = "train.py --config tiny.toml --num_iters 100000 --ckpt_interval 100000 --compile False"
    ends = stopped(line, tmp_path, monkeypatch, lambda _: log_is_open("checkpoints/original"))
    for (number, _), said in zip(STOPS, ends, strict=True):
        monkeypatch.chdir(tmp_path / number.name)
        updates = read_config(Path("checkpoints/original")).num_iters
        assert said == (
            f"stopped after update {updates} of 100000, checkpoints/original is saved; continue with --resume"
        )
        assert "give --resume to continue, another --name or --out to keep both, or --overwrite" in error(line, 1)
        done(f"train.py --resume --num_iters {updates + 2}")
        done(f"train.py --config tiny.toml --num_iters {updates + 2} --out whole")
        assert_equal_bits(Path("whole", WEIGHTS), Path("checkpoints/original", WEIGHTS))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_ladder_is_stopped_and_goes_on(tmp_path, monkeypatch):
    line = "distill.py --base checkpoints/base_5 --config tiny.toml --num_iters 80"
    ends = stopped(line, tmp_path, monkeypatch, lambda _: log_is_open("checkpoints/base_6"))
    students = []
    for (number, _), said in zip(STOPS, ends, strict=True):
        monkeypatch.chdir(tmp_path / number.name)
        updates = read_config(Path("checkpoints/base_6")).num_iters
        assert said == f"stopped after update {updates} of 80, checkpoints/base_6 is saved; the same command continues"
        assert f"\nbase_6: {updates}/" not in done(line).stderr
        assert read_config(Path("checkpoints/base_6")).num_iters == 80
        students.append(Path("checkpoints/base_6", WEIGHTS).resolve())
    assert_equal_bits(*students)  # cut at different updates


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sampling_is_stopped_and_goes_on(tmp_path, monkeypatch):
    line = "sample.py --checkpoint checkpoints/base_5 --num 60 --batch_size 1 --out out"
    ends = stopped(line, tmp_path, monkeypatch, lambda _: Path("out/00001.png").exists())
    done(f"{line} --batch_size 60 --out {tmp_path}/whole")
    for (number, _), said in zip(STOPS, ends, strict=True):
        monkeypatch.chdir(tmp_path / number.name)
        before = pictures(Path("out"))
        assert said == f"stopped: out holds {len(before)} of 60 images; the same command continues"
        assert done(line).stdout.startswith(f"{60 - len(before)} images in ")
        after = pictures(Path("out"))
        assert after == pictures(tmp_path / "whole")
        assert before.items() <= after.items()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_preparation_is_stopped_and_gone_on_with(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "0.png")
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(600):  # many seconds of work: the signals come early in it on any machine
        os.link(tmp_path / "0.png", photos / f"{k}.png")
    line = f"prepare_data.py {photos} --size 1024 --format png --num_workers 1 --out new/set"

    def worker_is_at_work(process: subprocess.Popen[str]) -> bool:
        began = children(process.pid) > 1
        time.sleep(began)  # a worker whose parent ends before it has begun complains
        return began

    def program(line: str, folder: Path) -> subprocess.Popen[str]:
        return commands.start(f"python {line}", folder)

    ends = stopped(line, tmp_path, monkeypatch, worker_is_at_work, program)
    assert [re.sub(r"\d+", "N", end) for end in ends] == [
        f"{word}; N images are done, the same command continues" for word in ("interrupted", "terminated")
    ]
    for number, _ in STOPS:
        assert [path.name for path in (tmp_path / number.name / "new").iterdir()] == ["set.partial"]
    small = line.replace("--size 1024", "--size 4")
    assert "unfinished preparation with conversion" in error(small, 1)
    done(f"{small} --overwrite")
    assert len(ImageStore("new/set")) == 600


def test_a_signal_while_an_image_is_converted_is_no_damaged_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for k in range(3):
        PIL.Image.new("RGB", (8, 8)).save(f"photos/{k}.png")
    load, calls = PIL.Image.Image.load, []

    def terminated(image: PIL.Image.Image) -> Any:
        calls.append(image)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return load(image)

    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", terminated)
    result = run("prepare_data.py photos --size 4 --num_workers 0")
    assert (result.exit_code, result.stderr) == (143, "terminated; 0 images are done, the same command continues\n")
    assert [path.name for path in Path("data").iterdir()] == ["photos_4.partial"]


# Where settings come from


def shown(line: str, env: dict[str, str] | None = None) -> dict[str, str]:
    """The settings that a dry run prints."""
    result = done(f"train.py --dry_run --all {line}", env)
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def test_flags_over_environment_over_file_over_preset_over_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('preset = "digits"\nlr = 0.2\nseed = 2\nema = 0.2\n[unet]\nchannels = 64\n')
    env = {"VDIFF_LR": "0.3", "VDIFF_SEED": "3", "VDIFF_FLIP": "", "VDIFF_WARMUP_ITERS": "7"}

    def values(line: str, env: dict[str, str] | None = None) -> list[str]:
        found = shown(line, env)
        return [found[key] for key in ("lr", "seed", "ema", "warmup_iters", "flip", "unet.channels", "weight_decay")]

    digits = read_preset("digits").train
    lr, ema, warmup = (str(digits[key]) for key in ("lr", "ema", "warmup_iters"))
    toys_warmup = str(read_preset("toy").train["warmup_iters"])
    assert toys_warmup != warmup
    channels = str(digits["unet"]["channels"])
    assert values("--preset digits") == [lr, "0", ema, warmup, "False", channels, "0.0"]
    assert values("--config my.toml") == ["0.2", "2", "0.2", warmup, "False", "64", "0.0"]
    assert values("--config my.toml", env) == ["0.3", "3", "0.2", "7", "False", "64", "0.0"]
    assert values("--config my.toml --lr 0.4 --weight-decay 0.5", env) == ["0.4", "3", "0.2", "7", "False", "64", "0.5"]
    assert values("--lr 0.4", {**env, "VDIFF_CONFIG": "my.toml"})[:3] == ["0.4", "3", "0.2"]
    assert values("--preset digits", {"VDIFF_CONFIG": "my.toml", "VDIFF_PRESET": "toy"})[3] == warmup
    assert values("--config my.toml", {"VDIFF_PRESET": "toy"})[3] == toys_warmup
    assert list(tmp_path.iterdir()) == [tmp_path / "my.toml"]


@pytest.mark.usefixtures("place")
def test_the_same_precedence_for_students():
    def updates(line: str, env: dict[str, str] | None = None) -> str:
        result = done(f"distill.py --base checkpoints/base_5 --dry_run --batch_size 2 {line}", env)
        return result.stdout.splitlines()[2].split()[6]

    by_preset = {name: str(read_preset(name).distill["num_iters"]) for name in ("digits", "toy")}
    assert updates("") == by_preset["digits"]  # by image size
    assert updates("--preset toy") == by_preset["toy"]
    assert updates("--config tiny.toml") == "3"
    assert updates("--config tiny.toml", {"VDIFF_NUM_ITERS": "5"}) == "5"
    assert updates("--config tiny.toml --num-iters 7", {"VDIFF_NUM_ITERS": "5"}) == "7"


@pytest.mark.usefixtures("place")
def test_the_environment_reaches_the_group_and_the_other_commands():
    env = {"VDIFF_NUM": "2", "VDIFF_OUT": "out", "VDIFF_CLIPPED_SAMPLING": "True", "VDIFF_SEED": "5"}
    done("vdiff sample --checkpoint checkpoints/base_5", env)
    record = json.loads(Path("out/samples.json").read_text())
    assert (record["sampler"], record["seed"]) == ("clipped", 5)
    assert len(pictures(Path("out"))) == 2
    done("prepare_data.py --num_workers 0", {"VDIFF_FORMAT": "webp", "VDIFF_OUT": "set"})
    assert ImageStore("set").meta.image_format == "webp"


@pytest.mark.parametrize("preset", WRITTEN)
def test_what_a_preset_costs_without_a_dataset(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = done(f"train.py --preset {preset} --dry_run --all")
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    settings = read_preset(preset)
    count = int(rows["parameters"].split("(")[1].rstrip(")").replace(",", ""))
    millions = {
        "toy": 0.2, "digits": 0.8, "cifar10": 60, "imagenet64": 296, "lsun128": 140, "celebahq256": 102,
        "audio_tiny": 3, "audio_16k": 24,
    }  # fmt: skip
    assert count / 1e6 == pytest.approx(millions[preset], rel=0.1)
    steps = settings.train.get("num_timesteps", 1024)
    assert f" an evaluation, {rows['FLOPs'].split('evaluation, ')[1]}" in rows["FLOPs"]
    assert rows["FLOPs"].endswith(f"a sample of {steps} steps")
    updates, batch = settings.train["num_iters"], settings.train["batch_size"]
    size, channels = settings.assumed["image_size"], settings.assumed["image_channels"]
    rate = settings.assumed.get("rate")
    assert f"{updates:,} updates of {batch}" in rows["sounds" if rate else "images"]
    shape = f"{size}×{channels} at {rate:,} Hz" if rate else f"{size}×{size}×{channels}"
    assert result.stderr == f"preset {preset}, assumed: {shape}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("place")
def test_without_a_preset_the_image_size_decides_and_the_first_line_says_so():
    why = "chosen for 10 images of this size on cpu"
    assert done("train.py --dry_run --all --device cpu").stderr == f"preset digits, data/toy_4: 4×4×1, {why}\n"
    assert run("train.py --dry_run --all --preset toy --image_size 64").stderr == "preset toy, assumed: 64×64×1\n"


# Tar shards


def test_training_from_tar_shards_here_and_by_url(place):
    """Prepared, trained, resumed and distilled; the same bits from a folder and from a server."""
    for index in range(40):
        path = place / "photos" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (index * 6, 255 - index * 6, 80)).save(path)
    done("prepare_data.py photos --size 4 --format png --num_workers 0 --out shards/photos.tar")
    words = "--config tiny.toml --image_size 4 --num_workers 0"
    done(f"train.py --data shards/photos {words} --out whole")
    done(f"train.py --data shards/photos {words} --num_iters 2 --out cut")
    done(f"train.py --resume {words} --num_iters 4 --out cut")
    assert_equal_bits(place / "whole" / WEIGHTS, place / "cut" / WEIGHTS)
    index = json.loads(Path("shards/photos/index.json").read_text())
    assert index["meta"]["class_names"] == ["a", "b"]
    assert read_config(place / "whole").dataset_fingerprint == index["meta"]["fingerprint"] != ""
    done("distill.py --base whole --data shards/photos --config tiny.toml --num_workers 0 --out student")
    handler = partial(Quiet, directory=str(place / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done(f"train.py --data http://127.0.0.1:{server.server_port}/photos {words} --out by_url")
        server.shutdown()
    assert_equal_bits(place / "whole" / WEIGHTS, place / "by_url" / WEIGHTS)


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *_: object) -> None: ...
