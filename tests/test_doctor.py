"""`vdiff doctor`: a healthy machine, and what it says where a library is missing, broken or ends the process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import tomllib
from pathlib import Path

import pytest

from tests.commands import ROOT, run
from tests.programs import start
from tests.test_signals import wait_until
from vdiff.cli import doctor, self_test

ERROR = "raise ImportError('libcudart.so.13: cannot open shared object file')"
MISSING = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)"


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Put modules of these sources before the installed ones, for the processes that doctor starts."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def extras(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let doctor try these extras alone, as if they were installed."""
    monkeypatch.setattr(doctor, "EXTRAS", {name: doctor.EXTRAS[name] for name in names})
    installed = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: installed(name) or "1.0")


def broken(code: int, *expected: str) -> str:
    """What doctor prints, which must be `expected` under BROKEN and next, one after the other."""
    result = run("vdiff doctor")
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    assert [line for line in result.stdout.splitlines() if len(line) > doctor.WIDTH] == []
    said = [line[doctor.COLUMN + 1 :] for line in result.stdout.splitlines() if re.match("BROKEN|  next", line)]
    assert len(said) == len(expected), result.stdout
    for found, words in zip(said, expected, strict=True):
        assert found.startswith(words)
    return result.stdout


def test_a_machine_on_which_everything_works(monkeypatch):
    extras(monkeypatch)
    text = broken(0)
    assert text.splitlines()[-1].split(maxsplit=1) == ["result", "everything works"]
    for words in ("vdiff ", "torch ", "devices      cpu", "memory ", "disk ", "4 images written to an LMDB and read"):
        assert f"\n{words}" in f"\n{text}" or words in text
    assert re.search(r"checkpoint written and read, 4 images drawn in\s+2 steps on", text)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("source", "cause", "hint"),
    [
        (ERROR, "torch: ImportError: libcudart.so.13: cannot open", "python -m pip install --force-reinstall torch"),
        (MISSING, "torch: ModuleNotFoundError: No module named 'torch'", "python -m pip install torch"),
        (CRASH, "torch: ended by SIGILL, this processor cannot run it", "python -m pip install --force-reinstall tor"),
    ],
)
def test_a_torch_that_cannot_be_imported(source, cause, hint, tmp_path, monkeypatch):
    extras(monkeypatch)
    pretend(tmp_path, monkeypatch, torch=source)
    broken(1, cause, hint)


def test_what_does_not_end_is_ended(tmp_path, monkeypatch):
    extras(monkeypatch)
    pretend(tmp_path, monkeypatch, torch="import time\ntime.sleep(600)")
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    broken(1, "torch: did not end in 1 s", "python -m pip install --force-reinstall torch")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_ends_the_self_test_too(tmp_path, monkeypatch):
    extras(monkeypatch)
    source = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    pretend(tmp_path, monkeypatch, torch=source)
    program = start("vdiff doctor", tmp_path)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    program.send_signal(signal.SIGTERM)
    _, stderr = program.communicate(timeout=60)
    assert (program.returncode, stderr) == (143, "terminated\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_a_dataset_that_comes_back_otherwise_is_told_as_the_step_that_failed(tmp_path, monkeypatch):
    extras(monkeypatch)
    pretend(tmp_path, monkeypatch, lmdb="def open(*_, **__): raise OSError(28, 'No space left on device')")
    broken(1, "dataset: ", "report it with this whole output; the step that failed is")


@pytest.mark.slow
def test_an_extra_that_is_broken_and_one_that_ends_the_process(tmp_path, monkeypatch):
    extras(monkeypatch, "heif", "wandb")
    pretend(tmp_path, monkeypatch, pillow_heif=ERROR, wandb=CRASH)
    text = broken(
        1, "extra heif, pillow_heif: ImportError: libcudart", "pip install --force-reinstall -e '.[heif]'",
        "wandb: ended by SIGILL", "reinstall that package",
    )  # fmt: skip
    assert re.search(r"\[heif\] +HEIC and AVIF photographs, broken\n\[wandb\] +--tracker wandb, unknown\n", text)


def test_packages_that_are_missing_or_too_old(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["a>=1.10", "b-c>=2.3", "d", "e>=9; extra == 'x'"])
    monkeypatch.setattr(doctor, "version_of", {"a": "1.10.1+cpu", "b-c": "2.2.9", "d": ""}.get)
    found, problems = doctor.packages()
    assert found == ["a 1.10.1+cpu", "b-c 2.2.9", "d MISSING"]
    assert problems == [
        "b-c 2.2.9, vdiff needs 2.3\npip install 'b-c>=2.3'", "d is missing, vdiff needs 0\npip install 'd>=0'"
    ]  # fmt: skip


def test_the_extras_are_those_of_the_package():
    """Each brings the packages whose modules doctor imports."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(declared) - {"dev", "benchmarks", "hub"}
    for name, (modules, _) in doctor.EXTRAS.items():
        brought = [re.split(r"[\[>=]", each)[0].replace("-", "_") for each in declared[name]]
        assert modules == [each for each in brought if each != "vdiff"]


def test_the_self_test_names_what_it_tries_before_it_does(tmp_path):
    told = list(self_test.libraries("json", "no_such_module"))
    assert told[:3] == [("json", "?"), ("json", ""), ("no_such_module", "?")]
    assert told[3][1].startswith("ModuleNotFoundError: ")
    assert json.dumps(self_test.dataset(tmp_path / "data")).startswith('"4 images')
