"""Lines of the v-diffusion repositories' README and notebook work as typed, or are answered with the line that does."""

from __future__ import annotations

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.commands import PROGRAMS, done, error
from tests.reference_network import Shape, save
from tests.toy import write_checkpoint
from vdiff.cli import distill
from vdiff.cli.vdiffusion import THEIRS, imported, translated
from vdiff.interop import reference
from vdiff.models.checkpoint import read_config
from vdiff.training.presets import read_run

TINY = Shape(4, (1, 1, 1, 1), attn_strides=(), attn_heads=4, affine=True)
NETWORK = """
num_timesteps = 4
[unet]
channels = 4
embedding_channels = 8
multipliers = [1, 1, 1, 1]
num_blocks = 1
attention_strides = []
num_heads = 1
"""
LIGHT = {"VDIFF_CHECK_IMAGES": "0", "VDIFF_DISTANCE_EVERY": "0", "VDIFF_REPORT": "False", "VDIFF_DEVICE": "cpu"}


def read_as(stderr: str) -> str:
    """The line that a line of theirs was read as."""
    (line,) = re.findall(r"^read as: (.*)$", stderr, re.MULTILINE)
    return str(line)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PROGRAMS, "distillate.py", distill.command)
    return tmp_path


def test_from_their_checkpoint_to_a_picture(place):
    """The picture is one image, as there; the file is imported once."""
    save(Path("checkpoints/celeba/base_6/checkpoint.pt"), TINY, n_timesteps=2, time_scale=4)
    line = (
        "sample.py --out_file ./images/x.png --module celeba_u --checkpoint ./checkpoints/celeba/base_6/checkpoint.pt"
    )
    result = done(f"{line} --batch_size 1")
    assert read_as(result.stderr) == (
        "python sample.py --out images/x.png --checkpoint checkpoints/celeba/base_6/checkpoint.pt "
        "--batch_size 1 --num 1"
    )
    assert (
        "checkpoint.pt is read as the network of celeba_u: 256 pixels, 4 heads; for others: vdiff import"
        in result.stderr
    )
    assert result.stdout.splitlines()[-1] == "picture    images/x.png"
    with PIL.Image.open("images/x.png") as picture:
        assert picture.size == (256, 256)
    assert len(list(Path("samples/celeba").glob("base_6-*/0*.png"))) == 1
    (cached,) = (place / "cache/vdiff/imported").glob("*/base_6/config.json")
    before = cached.stat().st_mtime_ns
    again = done(f"{line} --time_scale=1 --clipped_sampling True --clipping_value 1.2")  # one image is their default
    assert "clipped" in again.stdout
    assert cached.stat().st_mtime_ns == before
    Path("images/x.png").unlink()
    PIL.Image.new("L", (8, 8)).save("images/mine.png")
    assert "images/mine.png exists and is not a picture that vdiff wrote" in error(
        f"sample.py --checkpoint {cached.parent} --out images/mine.png", 1
    )


def test_their_checkpoint_is_exported_and_inspected_as_a_folder_is():
    save(Path("their/base_6/checkpoint.pt"), TINY, n_timesteps=2, time_scale=4)
    result = done("vdiff export weights their/base_6/checkpoint.pt exports/base_6")
    assert "checkpoint.pt is read as the network of celeba_u" in result.stderr
    assert read_config(Path("exports/base_6")).num_timesteps == 2
    assert "not by vdiff" in done("vdiff inspect their/base_6/checkpoint.pt").stdout
    Path("their/other.pt").write_bytes(b"PK")
    assert error("vdiff export weights their/other.pt exports/other", 1).startswith("their/other.pt ")
    assert sorted(path.name for path in Path("exports").iterdir()) == ["base_6"]


def test_of_processes_that_start_together_one_imports(monkeypatch):
    """As those of torchrun do; the others wait for it."""
    save(Path("their/base_6/checkpoint.pt"), TINY, n_timesteps=2, time_scale=4)
    calls, import_reference = [], reference.import_reference

    def slowly(*args):
        calls.append(args)
        time.sleep(0.3)
        import_reference(*args)

    monkeypatch.setattr(reference, "import_reference", slowly)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: imported(Path("their/base_6/checkpoint.pt"), id), range(2)))
    assert len(calls) == 1
    assert read_config(folders[0]) == read_config(folders[1])


@pytest.mark.slow
def test_their_notebook_from_images_to_a_student():
    """`distillate.py` takes what their train.py left, or what ours left under the path that theirs has."""
    generator = np.random.default_rng(0)
    Path("faces/all").mkdir(parents=True)
    for k in range(3):
        PIL.Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(f"faces/all/{k}.png")
    Path("tiny.toml").write_text(NETWORK)
    env = {**LIGHT, "VDIFF_CONFIG": "tiny.toml"}
    train = "train.py --module celeba_u --name celeba --dname original --batch_size 1 --num_workers 4 --num_iters 1"
    done("prepare_data.py --size 256 --out celeba_256 faces --n_worker 0")
    assert "give" not in (said := error(train, 1, env))
    assert said.endswith("or choose with --data: celeba_256")
    Path("data").mkdir()
    shutil.move("celeba_256", "data/celeba_256")
    result = done(train, env)
    assert read_as(result.stderr).startswith(
        "python train.py --preset celebahq256 --name celeba --out checkpoints/celeba/o"
    )
    found = read_run(Path("checkpoints/celeba/original")).train
    assert (found["preset"], found["data"], found["batch_size"]) == ("celebahq256", "data/celeba_256", 1)

    distil = "distillate.py --module celeba_u --diffusion GaussianDiffusionDefault --name celeba --dname base_0"
    rest = "--batch_size 1 --num_workers -1 --num_iters 1 --log_interval 5 --scheduler StrategyLinearLR --gamma 0"
    done(f"{distil} --base_checkpoint ./checkpoints/celeba/original/checkpoint.pt {rest}", LIGHT)
    assert read_config(Path("checkpoints/celeba/base_0")).num_timesteps == 2
    save(Path("their/base_5/checkpoint.pt"), TINY, n_timesteps=4, time_scale=2)
    result = done(
        "distill.py --base their/base_5/checkpoint.pt --data data/celeba_256 --num_iters 1 --batch_size 1", LIGHT
    )
    assert read_config(Path("their/base_6")).num_timesteps == 2  # beside the file, not in the cache


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.py --module mine", "--module mine: vdiff does not read networks in Python; leave it out, and give "),
        ("train.py --module celeba_u --scheduler StrategyOneCycle", "--scheduler StrategyOneCycle is not in vdiff; "),
        ("train.py --checkpoint_to_continue x.pt", "--checkpoint_to_continue: vdiff continues its own runs; leave it "),
        ("distillate.py --gamma 0.3", "--gamma 0.3: vdiff lacks this weighting; choose another with --weighting"),
        ("distillate.py --gamma x", "--gamma x: vdiff lacks this weighting; choose another with --weighting"),
        ("distillate.py --diffusion Mine", "--diffusion Mine: vdiff does not load your classes; see --method and"),
        ("sample.py --module mine --checkpoint x.pt", "--module mine: vdiff does not read networks in Python; import "
         "it first: vdiff import reference x.pt --image_size PIXELS --attention_heads HEADS"),
        ("sample.py --module celeba_u --checkpoint y.pt", "y.pt: no such checkpoint; "),
    ],
)  # fmt: skip
def test_what_vdiff_has_nothing_for_is_answered_with_what_does_it(line, words):
    save(Path("x.pt"), TINY)
    assert error(line, 1 if "y.pt" in line else 2).startswith(words)


def test_other_lines_are_left_as_they_are():
    write_checkpoint(Path("checkpoints/base_5"))
    for command, words in (
        ("train", ["--name", "x"]),
        ("sample", ["--batch_size", "1", "--checkpoint=a"]),
        ("", ["--module"]),
    ):
        assert translated(command, words) == words
    result = done("sample.py --module mine --num 1")  # a checkpoint of vdiff tells its network
    assert read_as(result.stderr) == "python sample.py --num 1"
    assert not any(f"--{name}" in done(f"{program} --help_all").stdout
                   for program, names in zip(("train.py", "distill.py", "sample.py"), THEIRS.values(), strict=False)
                   for name in names.split())  # fmt: skip
