"""`sample.py` as it is typed: where images go, what is said of them, and what is refused, each in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.commands import done, error, tree
from tests.drawing import write_guided
from tests.toy import SIZE, write_checkpoint
from vdiff.models.checkpoint import weights_fingerprint

FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of many kinds."""
    tmp_path = tmp_path_factory.mktemp("furnished")
    write_checkpoint(tmp_path / "checkpoints/plain", channels=3)
    write_checkpoint(tmp_path / "checkpoints/student", method="progressive", weights="ema")
    write_checkpoint(tmp_path / "checkpoints/table", schedule={"name": "linear", "num_levels": 8})
    write_guided(tmp_path / "checkpoints/guided")
    write_guided(tmp_path / "checkpoints/taught", told=True)
    write_guided(tmp_path / "checkpoints/narrow", told=True, guidance_range=[1.0, 4.0])
    for name, levels in (("eps_cosine", None), ("eps_linear", 8)):
        schedule = {"name": "linear", "num_levels": levels} if levels else {"name": "cosine"}
        write_checkpoint(tmp_path / f"checkpoints/{name}", prediction="eps", schedule=schedule)
    return tmp_path


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `furnished`, the working folder."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(words: str) -> dict[str, Any]:
    """The JSON object that is all of stdout."""
    return json.loads(done(f"sample.py --num 3 --json --checkpoint checkpoints/{words}").stdout)


def arrays(words: str) -> np.ndarray:
    """(N, H, W, C) of what is drawn."""
    out = result(f"{words} --format npz --overwrite --out drawn.npz")["out"]
    return np.load(out)["arr_0"].astype(int)


@pytest.mark.parametrize(
    ("words", "form"),
    [("--out x.zip", "zip"), ("--out x.NPZ", "npz"), ("--out x.lmdb", "lmdb"), ("--out x", "png"),
     ("--format zip", "zip"), ("--format lmdb --out x", "lmdb"), ("--out x.zip --format zip", "zip")],
)  # fmt: skip
@pytest.mark.usefixtures("place")
def test_the_format_is_what_is_asked_for(words, form):
    found = result(f"plain {words}")
    assert found["format"] == form
    assert Path(found["out"]).is_dir() == (form in ("png", "lmdb"))
    assert Path(found["picture"]).is_file()
    if "--out" not in words:
        assert found["out"] == "samples/plain-ddim-8steps-seed0.zip"


@pytest.mark.usefixtures("place")
def test_the_result_says_how_and_from_what_images_were_drawn():
    found = result("guided --guidance 2 --sampler ddpm --grid logsnr --classes owl,0 --seed 5 --trajectory --eta 1 "
                   "--sampler clipped --clipping_value 1.1 --guidance_interval 0.2,0.9")  # fmt: skip
    seconds = found.pop("seconds")
    assert found.pop("images_per_second") == pytest.approx(3 / seconds)
    assert 8 < found.pop("evaluations") < 16
    out = "samples/guided-clipped-logsnr-8steps-guidance2-seed5"
    assert found == {
        "out": out, "picture": f"{out}.grid.png",
        "trajectory": [f"{out}.trajectory.png", f"{out}.trajectory.webp"], "num": 3, "drawn": 3, "format": "png",
        "checkpoint": "checkpoints/guided", "fingerprint": weights_fingerprint(Path("checkpoints/guided")),
        "weights": "raw", "sampler": "clipped", "options": {"clipping_value": 1.1, "eta": 1.0},
        "grid": "logsnr", "steps": 8,
        "guidance": 2.0, "guidance_interval": [0.2, 0.9], "classes": ["owl", "cat"], "interpolate": [], "seed": 5,
        "prompts": [], "negative_prompt": "", "condition": "",
        "precision": "fp32", "device": "cpu", "processes": 1,
    }  # fmt: skip
    assert all(Path(picture).exists() for picture in found["trajectory"])
    again = result("student --interpolate 3 7")
    assert (again["weights"], again["interpolate"], again["classes"]) == ("ema", [3, 7], [])
    assert again["out"] == "samples/student-ddim-8steps-seed0-3to7"
    assert (again["drawn"], again["evaluations"]) == (3, 8)
    once_more = result("student --interpolate 3 7")
    keys = ("drawn", "evaluations", "images_per_second", "num")
    assert [once_more[key] for key in keys] == [0, None, None, 3]


@pytest.mark.usefixtures("place")
def test_an_unfinished_model_is_said_to_be():
    write_checkpoint(Path("checkpoints/half"), num_iters=3, target_iters=8)
    for name, line in (("half", "checkpoints/half, unfinished: 3 of 8 updates"), ("plain", "checkpoints/plain")):
        stderr = done(f"sample.py --checkpoint checkpoints/{name} --num 1 --out {name}").stderr
        assert stderr.splitlines()[0] == f"drawing from {line}"


@pytest.mark.usefixtures("place")
def test_what_was_drawn_is_said():
    line = "sample.py --checkpoint checkpoints/guided --num 3 --out x.zip --guidance 1 --trajectory"
    first, *pictures = done(line).stdout.splitlines()
    assert first.startswith("3 images in ")
    assert first.endswith("/s), ddim, 16 evaluations each, to x.zip")
    assert pictures == [
        "picture    x.zip.grid.png", "trajectory x.zip.trajectory.png", "trajectory x.zip.trajectory.webp",
    ]  # fmt: skip
    assert done(line).stdout.splitlines()[0] == "x.zip already holds all 3 images"


@pytest.mark.usefixtures("place")
def test_guidance_changes_images_where_it_acts():
    """-1 is no class at all, so that all classes look alike; a taught network is told the weight at no more cost."""
    plain, strong = arrays("guided"), arrays("guided --guidance 3")
    assert np.abs(plain - strong).max() > 3
    assert np.abs(arrays("guided --guidance 3 --guidance_interval 0.4,0.6") - strong).max() > 3
    none = arrays("guided --guidance -1")
    assert np.abs(arrays("guided --guidance -1 --classes dog") - none).max() <= 1
    taught = result("taught --guidance 3 --out t.npz")
    assert taught["evaluations"] == 8
    assert np.abs(np.load("t.npz")["arr_0"].astype(int) - arrays("taught")).max() > 0


@pytest.mark.usefixtures("place")
def test_an_image_in_the_middle_of_a_path_differs_from_the_ends():
    ends = arrays("plain --seed 2 --interpolate 0 1")
    images = arrays("plain --seed 2")
    assert np.array_equal(ends[[0, 2]], images[[0, 1]])


@pytest.mark.usefixtures("place")
def test_an_eps_prediction_with_signal_at_the_end_needs_no_clip():
    assert result("eps_linear --no_clip")["options"] == {"clipping_value": None}


def test_animations_and_grids_can_be_seen(place):
    result("plain --trajectory --out x")
    with PIL.Image.open(place / "x.trajectory.webp") as animation:
        assert animation.n_frames == 8
    with PIL.Image.open(place / "x.trajectory.png") as strip:
        assert strip.size[0] >= 8 * 72


SAMPLE = "sample.py --num 2 --out new --checkpoint checkpoints"
CASES = [
    (
        "plain --guidance 2",
        "--guidance: this model cannot predict without a class; leave it out, or train with --class_d",
    ),
    ("taught --guidance 5", "--guidance: this model supports weights 0 to 4, not 5; give one of these"),
    ("narrow", "--guidance: this model supports weights 1 to 4, not 0; give one of these"),
    ("guided --guidance nan", "--guidance: nan is not a guidance weight; give a number such as 1.5"),
    (
        "plain --clipping_value nan",
        "Invalid value for '--clipping_value': nan is not a finite number; see sample.py --help",
    ),
    (
        "plain --clipping_value inf",
        "Invalid value for '--clipping_value': inf is not a finite number; see sample.py --help",
    ),
    ("plain --clipping_value 0", "Invalid value for '--clipping_value': 0.0 is not in the range x>0"),
    (
        "plain --sampler clipped --clipping_value -1",
        "Invalid value for '--clipping_value': -1.0 is not in the range x>0",
    ),
    ("plain --eta nan", "Invalid value for '--eta': nan is not a finite number"),
    ("guided --guidance high", "Invalid value for '--guidance': 'high' is not a number; see sample.py --help"),
    (
        "guided --guidance_interval 0.2,0.8",
        "--guidance_interval: it has no effect without guidance; give --guidance too",
    ),
    (
        "guided --guidance 1 --guidance_interval 0.8,0.2",
        "--guidance_interval: 0.8,0.2 are not two increasing times between",
    ),
    (
        "guided --guidance 1 --guidance_interval 0.5",
        "--guidance_interval: 0.5 are not two increasing times between 0 and 1;",
    ),
    (
        "taught --guidance 1 --guidance_interval 0,0.5",
        "--guidance_interval: this model was distilled with guidance at al",
    ),
    (
        "student --grid logsnr",
        "--grid logsnr: this model was distilled for 8 uniform steps and supports no other times; ",
    ),
    (
        "student --num_timesteps 3",
        "--num_timesteps 3: this model was made for 8 steps, and 3 does not divide them; give",
    ),
    (
        "table --grid logsnr --num_timesteps 9",
        "--grid logsnr: the linear schedule has 8 levels, too few for 9 steps; gi",
    ),
    ("plain --grid log", "Invalid value for '--grid': 'log' is unknown; did you mean 'logsnr'?; see sample.py --help"),
    ("plain --interpolate 3 3", "--interpolate 3 3: the ends are the same image; give two different numbers"),
    ("plain --interpolate 3 4 --num 1", "--interpolate: --num 1 leaves no room for both ends; give --num 2 or more"),
    ("plain --interpolate 3", "Option '--interpolate' requires 2 arguments; see sample.py --help"),
    ("plain --out x.zip --format npz", "--out x.zip and --format npz contradict each other; give one of them"),
    (
        "plain --format tar",
        "Invalid value for '--format': 'tar' is unknown; choose from png, zip, npz, lmdb, wav, flac; see "
        "sample.py --help",
    ),
    ("plain --precision fp16 --device cpu", "--precision fp16 needs a GPU; give --precision bf16 or fp32"),
    (
        "plain --dynamic_threshold 0",
        "Invalid value for '--dynamic_threshold': 0.0 is not in the range 0<x<=1; see sample",
    ),
    (
        "plain --dynamic_threshold 0.9 --no_clip",
        "--no_clip and --dynamic_threshold exclude each other; give one of the",
    ),
    (
        "plain --dynamic_threshold 0.9 --clipped_sampling",
        "the sampler clipped does not use --dynamic_threshold; le",
    ),
    ("plain --sampler heun --eta 1", "the sampler heun does not use --eta; leave it out, or give --sampler ddim"),
    ("plain --order 2", "the sampler ddim does not use --order; leave it out, or give --sampler unipc"),
    ("plain --sampler unipc --order 4", "--order 4 is too large; it must be at most 3"),
    ("plain --sampler heun --frame x", "Invalid value for '--frame': 'x' is unknown; choose from v, eps"),
    (
        "eps_cosine --no_clip",
        "--no_clip: an eps-prediction at zero signal carries no information about the image, so x must be cli",
    ),
]


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line for line, _ in CASES])
def test_what_cannot_be_asked_is_refused_in_one_line(line, words, place):
    before = tree(place)
    assert error(f"{SAMPLE}/{line}", USAGE).startswith(words)
    assert tree(place) == before


def test_outputs_of_others_are_refused_in_one_line(place):
    done(f"{SAMPLE}/plain --out mine.zip")
    Path("photos.npz").write_text("mine")
    before = tree(place)
    for line, words in [
        ("plain --out photos.npz", "photos.npz exists and is not a set of samples that vdiff wrote; choose another"),
        (
            "plain --out photos.npz --overwrite",
            "photos.npz exists and is not a set of samples that vdiff wrote; choose another",
        ),
        (
            "plain --out mine.zip --num 3",
            "mine.zip holds 2 images, not 3; give another --name or --out, or --overwrite",
        ),
        (
            "plain --out mine.zip --seed 1",
            "mine.zip holds images drawn with seed 0, not 1; give another --name or --out",
        ),
        ("plain --out photos.npz/x.zip", "cannot write photos.npz/x.zip: Not a directory; "),
    ]:
        assert error(f"{SAMPLE}/{line}", FAILED).startswith(words)
    assert tree(place) == before


@pytest.mark.usefixtures("place")
def test_images_are_as_large_as_the_model_says():
    assert arrays("table").shape == (3, SIZE, SIZE, 1)
    assert arrays("table --grid trailing --num_timesteps 3").shape == (3, SIZE, SIZE, 1)
