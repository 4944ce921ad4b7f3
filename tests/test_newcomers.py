"""What newcomers type by mistake is answered in one line, with the next step to copy; most before torch is loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from tests.commands import ROOT, TINY, done, error
from tests.toy import write_checkpoint, write_dataset
from vdiff.network import answers


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two projects, photographs, and files that are none."""
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/digits_4"))
    write_dataset(Path("data/photos_4"))
    write_checkpoint(Path("checkpoints/original"), num_timesteps=16)
    write_checkpoint(Path("checkpoints/photos/original"), num_timesteps=16)
    write_checkpoint(Path("checkpoints/photos/base_0"), num_timesteps=8)
    write_dataset(Path("other/colours_4"), channels=3)
    Path("photos").mkdir()
    PIL.Image.new("RGB", (8, 8)).save("photos/1.png")
    Path("empty").mkdir()
    Path("film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    Path("paper.pdf").write_bytes(b"%PDF-1.5")
    Path("tiny.toml").write_text(TINY)
    Path("deep.toml").write_text('preset = "toy"\n[unet]\nmultipliers = [1, 1, 1, 1]\nattention_strides = []\n')
    return tmp_path


MISTAKES = [
    # spelling, which needs no torch
    ("train.py --epochs 5", 2, "unknown option --epochs; did you mean '--num_iters'?"),
    ("train.py --batchsize 5", 2, "unknown option --batchsize; did you mean '--batch_size'?"),
    ("train.py --preset cifar", 2, "Invalid value for '--preset': 'cifar' is unknown; did you mean 'cifar10'?"),
    ("prepare_data.py photos --size 64x64", 2, "Invalid value for '--size': '64x64' is not a whole number; did you m"),
    ("distill.py --stages 2 --to_steps 4", 2, "--to_steps and --stages set the same thing; give one of them"),
    ("distill.py --to_steps four", 2, "Invalid value for '--to_steps': 'four' is not a whole number"),
    ("train.py --prediction eps --weighting truncated_snr", 2, "truncated_snr cannot weight an eps-prediction: "),
    ("train.py --config nowhere.toml", 2, "nowhere.toml cannot be read: No such file or directory; give --config a TO"),
    ("sample.py --interpolate 3 3", 2, "--interpolate 3 3: the ends are the same image; give two different numbers"),
    ("sample.py --clipped_sampling --sampler heun", 2, "--clipped_sampling and --sampler heun exclude each other; giv"),
    ("distill.py --steps 4", 2, "unknown option --steps; did you mean '--to_steps'?"),
    ("sample.py --out x.jpg", 2, "--out x.jpg: no such file is written; give a folder, or FILE.png, .zip, .npz or .l"),
    ("vdiff data verfy", 2, "unknown command 'verfy'; did you mean 'verify'?; see vdiff data --help"),
    ("vdiff import sd", 2, "unknown command 'sd'; choose from diffusers, edm, google, "),
    ("vdiff smaple", 2, "unknown command 'smaple'; did you mean 'sample'?"),
    # a model of another place
    ("sample.py --checkpoint checkpoints/photos", 1,
     "checkpoints/photos holds no config.json; give one of the checkpoints in it: "),
    ("sample.py --checkpoint checkpoints/base_5", 1, "checkpoints/base_5: no such checkpoint; checkpoints holds origi"),
    ("sample.py --checkpoint checkpoints\\\\original", 1, "did you mean checkpoints/original?"),
    ("sample.py --checkpoint checkpoints/original/config.json", 1, "give the checkpoint's folder, checkpoints/origina"),
    ("sample.py --name nothing", 1, "no checkpoint under checkpoints/nothing/; run `python train.py --name nothing` f"),
    ("distill.py --base checkpoints/nowhere", 1, "checkpoints/nowhere: no such checkpoint; checkpoints holds original"),
    ("distill.py --name nothing", 1, "checkpoints/nothing/original: no such checkpoint; run `python train.py --name"),
    ("vdiff evaluate checkpoints/nowhere", 1, "checkpoints/nowhere: no such checkpoint; checkpoints holds original"),
    ("vdiff inspect photos", 1, "photos holds no config.json; give a folder that train.py or distill.py wrote"),
    ("train.py --name original", 2, "--name original: checkpoints/original is a model's folder; give another name"),
    # datasets, and runs that exist
    ("train.py --out new", 1, "data/ holds several datasets; choose with --data: data/digits_4, data/photos_4"),
    ("train.py --data photos --out new", 1, "photos is not a dataset: it holds no data.mdb; make one of"),
    ("train.py --data data/digits_4/data.mdb --out new", 1, "data/digits_4/data.mdb is not a dataset: it is a file o"),
    ("train.py --data data/digits_8 --out new", 1, "data/digits_8: no such dataset; give the folder that prepare_da"),
    ("train.py --name cats", 1, "data/ holds no dataset of the project cats; make one: python prepare_data.py FOLDER_"),
    ("train.py --data data/digits_4 --image_size 8 --out new", 1, "data/digits_4 has no images of size 8; it has 4; "),
    ("train.py --config tiny.toml --data data/digits_4", 1, "checkpoints/original exists already (1 of 1 updates); gi"),
    ("train.py --data data/digits_4 --resume", 1, "checkpoints/original holds no run to resume: it has no run.toml; "),
    ("train.py --config deep.toml --data data/digits_4 --name new", 2, "images of 4 pixels do not fit a network of 4 "),
    ("distill.py --preset toy --data photos", 1, "photos is not a dataset: it holds no data.mdb; make one of your ima"),
    ("distill.py --preset toy --data other/colours_4", 2, "other/colours_4 has 3 channels, the teacher 1; give --d"),
    ("distill.py --preset toy --data data/digits_4 --to_steps 16", 2, "--to_steps 16: the teacher already takes 16; "),
    ("distill.py --preset toy --data data/digits_4 --out photos", 1, "photos exists and is not a run that vdiff wrote"),
]  # fmt: skip
WITH_TORCH = [
    # images and datasets
    ("prepare_data.py photo", 1, "photo: no such file or folder; did you mean photos?"),
    ("prepare_data.py empty", 1, "no images in empty; give a folder or an archive with image files"),
    ("prepare_data.py film.mp4", 1, "film.mp4 is not a folder, zip, tar or dataset; give a folder of images, or an ar"),
    ("prepare_data.py paper.pdf", 1, "paper.pdf is not a folder, zip, tar or dataset; give a folder of images, or an"),
    ("prepare_data.py https://example.org/x.zip", 1, "https://example.org/x.zip is not downloaded by vdiff; download "),
    ("prepare_data.py photos --captions no.csv", 1, "--captions no.csv cannot be read: No such file or directory; giv"),
    # twice, and in the wrong order
    ("prepare_data.py photos --size 4", 1, "data/photos_4 exists already; give another --name or --out to keep both,"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), [*MISTAKES, *WITH_TORCH])
@pytest.mark.usefixtures("place")
def test_a_mistake_is_answered_in_one_line(line, code, words):
    assert words in error(line, code)


@pytest.mark.parametrize("name", ["prepare_data", "train", "distill", "sample"])
def test_a_python_without_vdiffs_packages_is_told_in_one_line(name):
    found = subprocess.run([sys.executable, "-S", ROOT / f"{name}.py"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no click, msgspec, rich; activate the environment")


def test_ctrl_c_while_a_command_is_imported_is_one_line(tmp_path):
    (tmp_path / "click").mkdir()
    (tmp_path / "click/__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    found = subprocess.run(
        [sys.executable, ROOT / "sample.py"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (found.stdout, found.stderr) == ("", "interrupted\n")
    assert found.returncode != 0


def test_these_are_found_before_torch_is_loaded(place):
    """All in one interpreter, that starts without torch."""
    program = """
import json, sys
from tests.commands import run
found = {}
for line in json.loads(sys.argv[1]):
    result = run(line)
    found[line] = [result.exit_code, "torch" in sys.modules]
print(json.dumps(found))
"""
    lines = [line for line, _, _ in MISTAKES]
    process = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)], capture_output=True, text=True, cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr == ""
    assert json.loads(process.stdout) == {line: [code, False] for line, code, _ in MISTAKES}


@pytest.mark.usefixtures("place")
def test_in_another_folder_the_way_back_is_told(monkeypatch):
    monkeypatch.chdir("photos")
    assert error("sample.py --checkpoint checkpoints/original", 1).endswith("did you mean ../checkpoints/original?")
    assert error("prepare_data.py photos", 1).endswith("did you mean ../photos?")


@pytest.mark.usefixtures("place")
def test_the_steps_of_a_project_follow_from_its_name():
    """And a second project meets nothing of the first."""
    done("prepare_data.py photos --size 4 --name cats --num_workers 0")
    done("train.py --config tiny.toml --name cats")
    done("distill.py --config tiny.toml --name cats --report False")
    result = done("sample.py --name cats --num 1")
    assert "checkpoints/cats/base_0 is the newest model in checkpoints/cats/\nothers: original\n" in result.stderr
    assert len(list(Path("samples/cats").glob("base_0-*/*.png"))) == 1
    done("sample.py --name cats --checkpoint original --num 1", {"VDIFF_NAME": "photos"})
    done("sample.py --num 1 --num_timesteps 2 --checkpoint base_0", {"VDIFF_NAME": "photos"})
    assert [path.name for path in sorted(Path("samples").iterdir())] == ["cats", "photos"]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_not_waited_for(silent):
    assert not answers(silent, seconds=0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert not answers(closed)


@pytest.mark.parametrize("reply", [b"", b"no HTTP\r\n", b"HTTP/1.1 501 No HEAD\r\n\r\n"])
def test_a_server_that_refuses_to_be_asked_is_there(reply, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply_once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=reply_once)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_hub_that_cannot_be_reached_is_said_to_be(silent, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_ENDPOINT", silent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("vdiff.network.SECONDS", 0.2)
    assert error("vdiff import diffusers owner/nothing", 1).startswith(
        "owner/nothing: no such folder, and the hub does not answer; check the name and the network"
    )


def test_no_hint_offers_overwrite_before_a_way_that_keeps_both():
    first = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "vdiff").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if '"give --overwrite' in line or "; give --overwrite" in line
    ]
    assert first == []
