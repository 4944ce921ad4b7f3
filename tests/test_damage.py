"""One changed byte in any file that vdiff writes is an error, or changes nothing: never another result."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands import done
from tests.oracles import randn
from tests.toy import run_training, train_config, write_checkpoint, write_dataset
from vdiff.errors import VdiffError
from vdiff.files import CHECKSUM
from vdiff.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    write_tensors,
)
from vdiff.models.reading import read_shapes
from vdiff.records import RUN_FILE
from vdiff.sampling.spec import SampleSpec, read_record
from vdiff.training.presets import read_run, read_settings
from vdiff.training.verdict import Verdict, read_verdict, write_verdict

FLIPS = 300
"""In all, shared out evenly."""


def tensors(path: Path) -> Any:
    """Metadata and bytes of a safetensors file."""
    metadata = read_metadata(path)
    return metadata, {name: (str(t.dtype), t.numpy().tobytes()) for name, t in read_tensors(path).items()}


def arrays(path: Path) -> Any:
    with open(path, "rb") as opened, np.load(opened) as file:
        return {name: file[name].tobytes() for name in file.files}


def entries(path: Path) -> Any:
    """The files of a zip; as many as its last record says, which `zipfile` does not check."""
    with zipfile.ZipFile(path) as file:
        if len(file.namelist()) != int.from_bytes(path.read_bytes()[-12:-10], "little"):
            raise zipfile.BadZipFile("files are missing")
        return {name: file.read(name) for name in file.namelist()}


def order(path: Path) -> Any:
    """What is compared with the next command; None where that is refused."""
    found = read_record(path)
    return found and {item.name: found[item.name] for item in fields(SampleSpec)}


READERS: dict[str, Callable[[Path], Any]] = {
    "run/model.safetensors": tensors,
    "run/config.json": lambda path: read_config(path.parent),
    "run/run.toml": lambda path: read_run(path.parent),
    "run/state/state.safetensors": tensors,
    "run/history/*/model.safetensors": tensors,
    "run/history/*/config.json": lambda path: read_config(path.parent),
    "run/averages/*.safetensors": tensors,
    "run/verdict.json": lambda path: read_verdict(path.parent),
    "samples/samples.json": order,
    "samples.npz": arrays,
    "samples.zip": entries,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with state, older checkpoints and averages, and its samples in every format."""
    place = tmp_path_factory.mktemp("damage")
    config = train_config(write_dataset(place / "data"), ema_profiles=True, ckpt_interval=2, keep_last=2)
    run_training(config, place / "run")
    write_verdict(place / "run", Verdict(0.5, 0.25, 1.5, None, 16, 1, ""))
    for name in ("samples", "samples.npz", "samples.zip"):
        done(f"sample.py --checkpoint {place}/run --num 2 --device cpu --out {place}/{name}")
    return place


@pytest.mark.parametrize("name", READERS)
def test_a_changed_byte_is_an_error_or_nothing(written, name):
    path = min(written.glob(name))
    read, whole, chance = READERS[name], path.read_bytes(), random.Random(name)
    right, errors = read(path), 0
    assert right is not None
    for _ in range(-(-FLIPS // len(READERS))):
        at = chance.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found = read(path)
        except VdiffError as error:
            found = str(error) if "\n" in str(error) else None
        except (ValueError, OSError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
            assert path.suffix in (".npz", ".zip")  # read by their own libraries
            found = None
        assert found in (None, right), f"byte {at}"
        errors += found is None
    path.write_bytes(whole)
    assert read(path) == right
    assert errors


# Tensors


def test_equal_tensors_make_equal_files(tmp_path):
    """safetensors itself writes metadata in random order."""
    values = {"größe": randn(3, 2), "b": randn(1)}
    metadata = {"step": "3", "format": "pt", 'ä\n"\\': "ü\t\x01"}
    for k in range(8):
        write_tensors(tmp_path / f"{k}", values, metadata if k % 2 else dict(reversed(metadata.items())))
        assert (tmp_path / f"{k}").read_bytes() == (tmp_path / "0").read_bytes()
    assert read_metadata(tmp_path / "0") == metadata
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert sorted(file.metadata()) == sorted([*metadata, CHECKSUM])


def test_headers_alone_are_checked_where_tensors_are_not_read(tmp_path):
    path = tmp_path / "state"
    write_tensors(path, {"a": randn(4)}, {"step": "3"})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step":"3"', b'"step":"4"'))
    for read in (read_metadata, read_shapes, read_tensors):
        with pytest.raises(VdiffError, match="its bytes do not match its checksum"):
            read(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_metadata(path) == {"step": "3"}
    with pytest.raises(VdiffError, match="its bytes do not match its checksum"):
        read_tensors(path)


def test_files_without_a_checksum_are_read_as_they_are(tmp_path):
    """Those of earlier versions and of other tools."""
    write_checkpoint(tmp_path / "own")
    found = load_file(tmp_path / "own" / WEIGHTS)
    save_file(found, tmp_path / "own" / WEIGHTS, {"format": "pt"})
    load_checkpoint(tmp_path / "own")
    assert read_tensors(tmp_path / "own" / WEIGHTS).keys() == found.keys()


# Texts


def test_a_description_may_be_edited_without_its_checksum(tmp_path):
    write_checkpoint(tmp_path / "own")
    path = tmp_path / "own" / CONFIG
    lines = path.read_text().replace('"dataset": "toy"', '"dataset": "cats"').splitlines()
    path.write_text("\n".join(lines))
    with pytest.raises(VdiffError, match=f"config.json cannot be read: damaged, or edited .* key '{CHECKSUM}'"):
        read_config(tmp_path / "own")
    assert CHECKSUM in lines[1]
    path.write_text("\n".join(lines[:1] + lines[2:]))
    assert read_config(tmp_path / "own").dataset == "cats"


def test_settings_may_be_edited_without_their_checksum(written, tmp_path):
    text = (written / "run" / RUN_FILE).read_text().replace("lr = 0.01", "lr = 0.02")
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(VdiffError, match=r"run.toml is damaged, or edited; restore it, or delete its last line"):
        read_run(tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    assert read_settings(tmp_path / "mine.toml").train["lr"] == 0.02
    (tmp_path / RUN_FILE).write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert read_run(tmp_path).train["lr"] == 0.02
