"""`prepare_data.py` as it is typed: defaults, summaries, exit codes, one-line errors, signals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from tests.commands import image_of
from vdiff.cli import prepare as cli
from vdiff.data import conversion
from vdiff.data import store as store_module
from vdiff.data.disk_sources import Folder
from vdiff.data.listing import Item
from vdiff.data.source import Sample
from vdiff.data.sources import Digits, open_source
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError

SCRIPT = Path(__file__).parent.parent / "prepare_data.py"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.command, list(words), prog_name="prepare_data.py")


def picture(path: str, width: int = 6, height: int = 4) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (width, height), (200, 100, 50)).save(path, format="PNG")


def error(*words: str, code: int = 1) -> str:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_digits_by_default() -> None:
    result = run()
    assert result.exit_code == 0
    store = ImageStore("data/digits_8")
    assert (store.meta.sizes, store.meta.channels, store.meta.image_format) == ((8,), 1, "png")
    assert "1797 images, 10 classes" in result.stdout
    assert result.stdout.splitlines()[-1].split() == ["next", "python", "train.py", "--data", "data/digits_8"]
    assert "already" in error()


def test_a_folder_with_everything_in_the_summary() -> None:
    for name in ("photos/a.PNG", "photos/b.png"):
        picture(name)
    Path("photos/bad.png").write_text("text")
    Path("photos/notes.txt").write_text("text")
    result = run("photos", "--size", "8,4", "--num-workers", "0")
    assert result.exit_code == 3
    for words in (
        "2 images, size 4, 8, to data/photos_4_8",
        "1 not an image (listed in data/photos_4_8/rejected.jsonl)",
        "1 .txt",
        "2 enlarged",
    ):
        assert words in result.stdout
    store = ImageStore("data/photos_4_8")
    assert (store.meta.channels, store.meta.image_format, store.meta.quality) == (3, "jpeg", 100)


def test_json_is_one_object() -> None:
    picture("photos/a.png")
    Path("photos/bad.png").write_text("text")
    result = run("photos", "--size", "4", "--json", "--out", "x")
    assert result.exit_code == 3
    values = json.loads(result.stdout)
    assert (values["path"], values["images"], values["skipped"]) == ("x", 1, {"not an image": 1})
    assert values["rejected"] == 1


def test_every_option_reaches_the_dataset() -> None:
    picture("photos/a.png", 8, 4)
    conversion_words = ["--channels", "1", "--crop", "pad", "--resample", "box", "--background", "#000080"]
    assert run("photos", "--size", "8", "--format", "webp", *conversion_words, "--out", "x").exit_code == 0
    store = ImageStore("x")
    meta = store.meta
    assert (meta.image_format, meta.channels, meta.crop, meta.resample, meta.background, meta.quality) == (
        "webp", 1, "pad", "box", "#000080", None
    )  # fmt: skip
    assert PIL.Image.open(io.BytesIO(store.encoded(8, 0))).format == "WEBP"
    assert image_of(store, 8, 0).getpixel((0, 0)) == round(0x80 * 0.114)
    assert run("photos", "--size", "8", "--quality", "30", "--out", "x", "--overwrite").exit_code == 0
    assert ImageStore("x").meta.quality == 30


def test_strict_stops() -> None:
    picture("photos/a.png")
    Path("photos/bad.png").write_text("text")
    assert "bad.png: not an image" in run("photos", "--strict").stderr.splitlines()[-1]
    assert not Path("data/photos_64").exists()
    assert not Path("data").exists()


def test_errors_say_what_to_do() -> None:
    picture("photos/a.png")
    Path("empty").mkdir()
    Path("text.zip").write_text("no zip")
    Path("file").write_text("")
    assert "photo: no such file or folder; did you mean photos?" in error("photo")
    assert "text.zip is damaged: not a whole zip; copy or download it again" in error("text.zip")
    assert "no images in empty" in error("empty")
    assert "0 is not in the range" in error("photos", "--size", "0", code=2)
    assert "5000 is not in the range" in error("photos", "--size", "64,5000", code=2)
    assert "'x' is not a whole number" in error("photos", "--size", "x", code=2)
    assert "--quality 90 does not apply to png" in error("photos", "--format", "png", "--quality", "90", code=2)
    assert "--background 'whitish' is not a colour" in error("photos", "--background", "whitish", code=2)
    assert "cannot write file/out" in error("photos", "--out", "file/out")
    assert "file exists and is not a dataset that vdiff wrote" in error("photos", "--out", "file", "--overwrite")
    assert "did you mean" in error("photos", "--strickt", code=2)
    assert run("photos", "--size", "4", "--out", "set").exit_code == 0
    assert "crop_scale 0.5 does not apply to --crop center" in error("photos", "--crop_scale", "0.5", code=2)
    assert "--seed 1 does not apply" in error("photos", "--seed", "1", code=2)
    assert "--crop none resizes nothing" in error("photos", "--crop", "none", "--size", "4,8", code=2)
    assert "--split x: there are no folders train, val or test" in error("photos", "--split", "x", code=2)
    assert "did you mean 'cifar10'?" in error("cifar1O")
    assert "need full, auto or two numbers such as 0,4095, not '5,1'" in error("photos", "--range", "5,1", code=2)
    assert "two numbers such as 0,4095, not 'nan,1'" in error("photos", "--range", "nan,1", code=2)


def test_choices_are_the_registries() -> None:
    assert list(conversion.FORMATS) == cli.FORMATS
    assert list(conversion.CROPS) == cli.CROPS
    assert list(conversion.RESAMPLES) == cli.RESAMPLES


def test_the_help_of_a_fresh_process_imports_nothing_heavy() -> None:
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    heavy = {"torch", "torchvision", "sklearn", "webdataset", "datasets"}
    for modules, absent in [
        ("vdiff.cli.prepare, vdiff.cli.data", heavy | {"numpy", "PIL", "lmdb"}),
        ("vdiff.data.preparation, vdiff.data.sources", heavy),
    ]:
        check = f"import sys, {modules}\nassert not {absent} & set(sys.modules), set(sys.modules) & {absent}"
        subprocess.run([sys.executable, "-c", check], check=True, env=env)
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], check=True, capture_output=True, text=True)
    assert "photos.zip --crop pad --background black" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_everybody_leaves_one_line_and_what_is_done(number: int, code: int, words: str) -> None:
    """As a terminal sends Ctrl-C: to the whole process group, the workers included."""
    picture("photos/0.png", 64, 64)
    for index in range(1, 3000):
        os.link("photos/0.png", f"photos/{index}.png")
    typed = ["photos", "--size", "512", "--format", "png", "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *typed],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and children(process.pid) < 2:  # the workers are on their way
        time.sleep(0.02)
    assert children(process.pid) >= 2
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == b""
    lines = [line for line in stderr.decode().splitlines() if not line.startswith(("prepare: ", "stopping; "))]
    (line,) = lines
    assert re.fullmatch(rf"{words}; \d+ images are done, the same command continues", line)
    assert os.listdir("data") == ["photos_512.partial"]
    with pytest.raises(VdiffError, match=rf"complete it: python prepare_data\.py {' '.join(typed)}"):
        ImageStore("data/photos_512")


def children(pid: int) -> int:
    listing = subprocess.run(["ps", "-eo", "ppid"], capture_output=True, text=True, check=True).stdout
    return listing.split().count(str(pid))


def test_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        picture(f"photos/{index:02d}.png")
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 4)
    words = ["photos", "--size", "4", "--num_workers", "0"]
    with monkeypatch.context() as patch:
        read, seen = Folder.read, []

        def interrupted(self: Folder, item: Item) -> Sample:
            seen.append(item)
            if len(seen) > 10:
                raise KeyboardInterrupt
            return read(self, item)

        patch.setattr(Folder, "read", interrupted)
        result = run(*words)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted; 8 images are done, the same command continues"
    result = run(*words)
    assert result.exit_code == 0
    assert "continuing after 8 images" in result.stderr
    assert "kept       8 of them from an earlier run" in result.stdout
    values = json.loads(run(*words, "--overwrite", "--json").stdout)
    assert (values["images"], values["kept"]) == (20, 0)


def test_tar_shards_as_they_are_typed() -> None:
    for index in range(5):
        picture(f"photos/{index:02d}.png")
    result = run("photos", "--size", "4", "--out", "set.tar")
    assert result.exit_code == 0
    assert "5 images, size 4, to set" in result.stdout
    assert sorted(os.listdir("set")) == ["index.json", "photos-000000.tar"]
    assert "set exists already" in error("photos", "--size", "4", "--out", "set.tar")
    assert run("photos", "--size", "4", "--out", "set.tar", "--overwrite").exit_code == 0


def test_skipping_small_images_and_taking_exact_ones() -> None:
    picture("photos/a.png", 6, 4)
    picture("photos/b.png", 8, 8)
    values = json.loads(run("photos", "--size", "8", "--min_size", "8", "--out", "x", "--json").stdout)
    assert (values["images"], values["skipped"]) == (1, {"too small": 1})
    values = json.loads(run("photos", "--size", "8", "--crop", "none", "--out", "y", "--json").stdout)
    assert (values["images"], values["skipped"]) == (1, {"not 8×8": 1})


def test_random_parts_depend_on_the_seed_alone() -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Path("photos").mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(f"photos/{index}.png")
    prints = []
    for out, words in enumerate((["--seed", "1"], ["--seed", "1", "--num_workers", "0"], ["--seed", "2"])):
        values = run("photos", "--size", "8", "--crop", "random_resized", "--out", str(out), "--json", *words).stdout
        prints.append(json.loads(values)["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_a_source_by_name() -> None:
    assert isinstance(open_source("digits"), Digits)
