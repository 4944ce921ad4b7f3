"""Files of somebody who means harm: nothing in them is run, nothing is reserved for their claims, one line says why."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.commands import error
from tests.reference_network import Shape, save
from tests.toy import write_checkpoint
from vdiff.errors import VdiffError
from vdiff.files import CHECKSUM
from vdiff.interop import pickles
from vdiff.interop.pickles import read_pt
from vdiff.interop.reference import import_reference
from vdiff.models.checkpoint import CONFIG, WEIGHTS, load_checkpoint, read_config, read_tensors

IMPORT = "vdiff import reference evil.pt --image_size 8 --attention_heads 1 --out out"


@contextmanager
def frugal(mebibytes: int = 200, seconds: float = 20) -> Iterator[None]:
    """The block may not take much memory, or many seconds of this process, whatever a file claims."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024
    assert time.process_time() - began < seconds


def refused(do: Callable[[], object], *words: str) -> None:
    """It fails in one line that tells what to do."""
    with frugal(), pytest.raises(VdiffError) as caught:
        do()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert caught.value.hint
    for word in words:
        assert word in message


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "gotcha")


class Shell:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def archive(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip of just these."""
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that come twice
        for name, content in entries:
            file.writestr(name, content)


def good_entries(folder: Path) -> list[tuple[str, bytes]]:
    """What is in a file that torch.save wrote."""
    save(folder / "good.pt", Shape())
    with zipfile.ZipFile(folder / "good.pt") as file:
        return [(name, file.read(name)) for name in file.namelist()]


# Pickles


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "protocol 4", "in the weights", "shell", "a module"])
def test_a_pickle_is_never_run(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = {"G": Evil(tmp_path / "ran"), "n_timesteps": 8, "time_scale": 1}
    path = Path("evil.pt")
    if form == "legacy":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    elif form == "bare":
        path.write_bytes(pickle.dumps(evil))
    elif form == "protocol 4":
        archive(path, [("x/data.pkl", pickle.dumps(evil, protocol=4)), ("x/version", b"3")])
    elif form == "in the weights":
        torch.save({**evil, "G": {**Shape().random_weights(), "evil": Evil(tmp_path / "ran")}}, path)
    elif form == "shell":
        torch.save({**evil, "G": Shell()}, path)
    elif form == "a module":
        torch.save({**evil, "G": torch.nn.Linear(2, 2)}, path)
    else:
        torch.save(evil, path)
    with open(path, "rb") as file:
        if form in ("bare", "legacy"):
            file.seek(0)
    message = error(IMPORT, 1)
    assert message.startswith("evil.pt ")
    reasons = {"bare": "vdiff never opens a bare pickle", "legacy": "vdiff never opens a bare pickle"}
    reasons["protocol 4"] = "more than tensors, or damaged"
    assert reasons.get(form, "none of its code was run") in message
    assert sorted(os.listdir()) == ["evil.pt"]


def test_what_would_have_run_is_named(tmp_path):
    torch.save(Shell(), tmp_path / "evil.pt")
    refused(lambda: read_pt(tmp_path / "evil.pt"), "asks for 'posix.system', which weights do not need")


def test_torch_itself_refuses_what_the_list_of_names_would_let_through(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "NAMES", pickles.NAMES | {"pathlib Path.write_text", "posix system"})
    torch.save({"G": Shell()}, tmp_path / "evil.pt")
    refused(lambda: read_pt(tmp_path / "evil.pt"), "cannot be read as weights (more than tensors, or damaged)")
    assert not Path("ran").exists()


class Reserve:
    """Unpickling it reserves two gigabytes, which torch allows."""

    def __reduce__(self):
        return bytearray, (2**31,)


def test_memory_that_a_file_asks_for_is_not_reserved(tmp_path):
    data = pickle.dumps({"G": Reserve()}, protocol=2).replace(b"c__builtin__", b"cbuiltins")
    archive(tmp_path / "evil.pt", [("x/data.pkl", data), ("x/version", b"3"), ("x/byteorder", b"little")])
    refused(lambda: read_pt(tmp_path / "evil.pt"), "asks for 'builtins.bytearray', which weights do not need")


class Claim:
    """A tensor of `size` numbers in a storage that says it has `stored`; the record holds what it holds."""

    def __init__(self, size: int, stored: int) -> None:
        self.size, self.stored = size, stored

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(self.stored), 0, (self.size,), (1,), False, OrderedDict())


class Storage:
    """What a `Claim` points at."""

    def __init__(self, stored: int) -> None:
        self.stored = stored


class Claims(pickle.Pickler):
    """Writes storages as torch.save does."""

    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "0", "cpu", obj.stored) if isinstance(obj, Storage) else None


@pytest.mark.parametrize(("size", "stored"), [(2**60, 2**60), (2**60, 4), (2**33, 2**33), (5, 5), (5, 4)])
def test_tensors_that_the_file_does_not_hold(size, stored, tmp_path):
    buffer = io.BytesIO()
    Claims(buffer, protocol=2).dump({"G": {"a": Claim(size, stored)}, "n_timesteps": 8, "time_scale": 1})
    archive(
        tmp_path / "evil.pt",
        [("x/data.pkl", buffer.getvalue()), ("x/byteorder", b"little"), ("x/data/0", bytes(16)), ("x/version", b"3")],
    )
    refused(lambda: import_reference(tmp_path / "evil.pt", tmp_path / "out"), str(tmp_path / "evil.pt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(2**20, 3, 3, 3), (2**31, 3, 3, 3), (2**50,)])
def test_views_of_one_number_that_claim_to_be_many(size, tmp_path):
    weights = Shape().random_weights() | {"down.0.weight": torch.zeros(1).expand(size)}
    torch.save({"G": weights, "n_timesteps": 8, "time_scale": 1}, tmp_path / "evil.pt")
    refused(
        lambda: import_reference(tmp_path / "evil.pt", tmp_path / "out"),
        f"down.0.weight claims to be {' × '.join(map(str, size))} numbers, more than the file holds",
    )


# Archives


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "..\\evil", "good/../../evil"])
def test_entries_that_lead_out_of_the_archive_lead_nowhere(name, tmp_path):
    """Nothing is ever unpacked."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/evil.pt"
    archive(path, [*good_entries(tmp_path), (name, b"gotcha")])
    if name.startswith("good/"):
        assert read_pt(path)["n_timesteps"] == 8
    else:
        refused(lambda: read_pt(path), "cannot be read as weights")
    assert {found.name for found in tmp_path.rglob("*")} == {"in", "evil.pt", "good.pt"}
    assert not Path("/etc/evil").exists()


def test_archives_of_another_form(tmp_path, monkeypatch):
    path, entries = tmp_path / "evil.pt", good_entries(tmp_path)
    archive(path, entries)
    assert read_pt(path)["n_timesteps"] == 8
    archive(path, [*entries, ("x/data/bomb", bytes(2**24))], zipfile.ZIP_DEFLATED)
    refused(lambda: read_pt(path), " bytes but unpacks to 16,")
    for name in ("x/more.pkl", entries[0][0], "x/DATA.PKL"):
        archive(path, [*entries, (name, b"")])
        refused(lambda: read_pt(path), "holds 2 pickles, not one")
    archive(path, entries[1:])
    refused(lambda: read_pt(path), "holds 0 pickles")
    archive(path, [])
    refused(lambda: read_pt(path), "holds 0 pickles")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    archive(path, entries)
    refused(lambda: read_pt(path), "data.pkl' is too large")


def test_files_that_are_no_archive(tmp_path):
    path = tmp_path / "evil.pt"
    refused(lambda: read_pt(path), "no such file")
    refused(lambda: read_pt(tmp_path), "is a folder")
    (tmp_path / WEIGHTS).write_bytes(b"")
    refused(
        lambda: read_pt(tmp_path / WEIGHTS), "is not a .pt file", "give the checkpoint.pt; `vdiff import diffusers`"
    )
    for content in (b"", b"PK", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."):
        path.write_bytes(content)
        refused(lambda: read_pt(path), "evil.pt ")
    torch.save([1, 2], path)
    refused(lambda: read_pt(path), "holds a list, not a dictionary")
    path.write_bytes(b"PK\x03\x04")
    os.truncate(path, pickles.MAX_FILE_BYTES + 1)  # a hole: no disk holds it
    refused(lambda: read_pt(path), "is larger than 64 GiB")


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """No cut and no flipped byte of the file's bookkeeping ends in anything but one line."""
    save(tmp_path / "good.pt", Shape(4, (1,), attn_strides=()))
    whole = (tmp_path / "good.pt").read_bytes()
    chance, path = random.Random(0), tmp_path / "evil.pt"
    interesting = [whole.index(b"data.pkl"), whole.rindex(b"PK\x05\x06"), whole.rindex(b"PK\x01\x02"), 0]
    outcomes = set()
    for k in range(150):
        damaged = bytearray(whole)
        if k % 5 == 0:
            damaged = damaged[: chance.randrange(len(whole))]
        else:
            for _ in range(k % 5):
                at = chance.choice(interesting) + chance.randrange(400)
                damaged[at % len(whole)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            import_reference(path, tmp_path / f"out{k}", image_size=8, attention_heads=1)
            outcomes.add("imported")
        except VdiffError as found:
            is_clean = "\n" not in str(found) and "weights_only" not in str(found)
            outcomes.add("refused" if is_clean else str(found))
    assert outcomes - {"imported"} == {"refused"}


# Our own checkpoints


def edited(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values.pop(CHECKSUM, None)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and values[key] else value
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize("line", ["sample.py --checkpoint own", "distill.py --base own", "vdiff inspect own"])
def test_a_config_of_a_gigabyte(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("own"))
    os.truncate(f"own/{CONFIG}", 2**30)
    with frugal():
        assert "own/config.json cannot be read: 1,024 MiB, more than the 64 allowed" in error(line, 1)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"teacher": ' * 10**5, '{"teacher": ' * 500 + "{}" + "}" * 500, '{"a": ' + "1" * 5000 + "}"],
    ids=["lists", "teachers", "many teachers", "digits"],
)
def test_a_config_that_is_nested_too_deep_or_holds_a_monstrous_number(text, tmp_path):
    write_checkpoint(tmp_path / "own")
    (tmp_path / "own" / CONFIG).write_text(text)
    refused(lambda: read_config(tmp_path / "own"), "config.json cannot be read")


@pytest.mark.parametrize("teacher", [{"method": "base", "teacher": "x"}, {"teacher": {"teacher": [1]}}])
def test_teachers_are_looked_at_all_the_way_back(teacher, tmp_path):
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", teacher=teacher)
    refused(lambda: read_config(tmp_path / "own"), "'teacher' must be an object or null, all the way back")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet": {"channels": 10**9}}, "channels must be at most 65536, got 1000000000"),
        ({"unet": {"channels": 10**30}}, "channels must be at most"),
        ({"unet": {"embedding_channels": 10**12}}, "embedding_channels must be at most"),
        ({"unet": {"num_blocks": 10**9}}, "num_blocks must be at most"),
        ({"unet": {"multipliers": [1] * 10**5}}, "multipliers must be at most 16 numbers up to 1024"),
        ({"unet": {"multipliers": [10**9]}}, "multipliers must be at most 16 numbers up to 1024"),
        ({"unet": {"fold": 10**6}}, "fold must be at most"),
        ({"unet": {"num_classes": 10**12}}, "num_classes must be at most"),
        ({"unet": {"in_channels": 10**9, "out_channels": 10**9}}, "in_channels must be at most"),
        ({"unet": {"channels": 1e3}}, ""),
        ({"unet": {"multipliers": "ab"}}, ""),
        ({"unet": {"multipliers": [[1]]}}, ""),
        ({"unet": {"multipliers": None}}, ""),
        ({"unet": {"attention_strides": [{}]}}, ""),
        ({"unet": {"norm_eps": "x"}}, ""),
        ({"schedule": {"name": ["cosine"]}}, ""),
        ({"schedule": {"label_scale": "x"}}, "label_scale must be a whole number from 1"),
        ({"schedule": {"logsnr_max": "x"}}, ""),
        ({"num_timesteps": 10**15}, "'num_timesteps' must be at most 1048576"),
        ({"image_size": 10**9}, "'image_size' must be at most 8192"),
    ],
)
def test_a_config_that_describes_something_absurd(changes, words, tmp_path):
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", **changes)
    refused(lambda: load_checkpoint(tmp_path / "own"), str(tmp_path / "own" / CONFIG), words)


@pytest.mark.parametrize("name", ["ddpm_cosine", "linear", "scaled_linear"])
@pytest.mark.parametrize("num_levels", [10**12, 0, -1, 8.0, "8", True, None])
def test_tables_of_absurd_length(name, num_levels, tmp_path):
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", schedule=None)
    edited(tmp_path / "own", schedule={"name": name, "num_levels": num_levels})
    refused(lambda: read_config(tmp_path / "own"), "num_levels must be a whole number from 1 to 100000")


@pytest.mark.parametrize(
    "parameters",
    [
        {"name": "ddpm_cosine", "offset": "x"},
        {"name": "ddpm_cosine", "max_beta": 1},
        {"name": "ddpm_cosine", "labels_per_level": 0},
        {"name": "ddpm_cosine", "labels_per_level": 10**4},
        {"name": "linear", "last_beta": 2.0},
        {"name": "scaled_linear", "first_beta": -1e-3},
        {"name": "linear", "first_beta": float("nan")},
    ],
)
def test_tables_of_no_noise_levels(parameters, tmp_path):
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", schedule=None)
    edited(tmp_path / "own", schedule=parameters)
    refused(lambda: read_config(tmp_path / "own"), "does not describe a model: ")


def test_a_large_network_is_compared_with_its_weights_before_it_is_made(tmp_path):
    """Within the limits, and still a million times larger than the file."""
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", unet={"channels": 2**16, "embedding_channels": 2**18, "multipliers": [2**10, 2**10]})
    refused(lambda: load_checkpoint(tmp_path / "own"), "model.safetensors does not fit config.json: ")


def test_a_network_of_as_many_modules_as_may_be_is_refused_soon(tmp_path):
    write_checkpoint(tmp_path / "own")
    edited(tmp_path / "own", unet={"num_blocks": 64, "multipliers": [1] * 16})
    refused(
        lambda: load_checkpoint(tmp_path / "own"),
        "model.safetensors does not fit config.json: ",
        " tensors are too few",
    )


def safetensors(path: Path, header: dict[str, object], size: int) -> None:
    """A file of this header and `size` bytes, most of them a hole."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)


@pytest.mark.parametrize(
    ("shape", "end", "size"),
    [
        ([2**60], 2**62, 100),
        ([2**60], 100, 100),
        ([2**62, 2**62], 100, 100),
        ([25], 100, 50),
        ([25], 2**63, 100),
        ([-25], 100, 100),
    ],
)
def test_weights_that_claim_what_the_file_does_not_hold(shape, end, size, tmp_path):
    write_checkpoint(tmp_path / "own")
    path = tmp_path / "own" / WEIGHTS
    safetensors(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, size)
    for do in (lambda: load_checkpoint(tmp_path / "own"), lambda: read_tensors(path)):
        refused(do, "model.safetensors cannot be read")


def test_weights_full_of_holes(tmp_path):
    """Such a file takes no room on the disk, and would take all memory."""
    write_checkpoint(tmp_path / "own")
    path = tmp_path / "own" / WEIGHTS
    safetensors(path, {"a": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}, 2**30)
    refused(lambda: load_checkpoint(tmp_path / "own"), "does not fit config.json")
    safetensors(path, {"a": {"dtype": "F32", "shape": [2**35], "data_offsets": [0, 2**37]}}, 2**37)
    refused(lambda: load_checkpoint(tmp_path / "own"), "has 128 GiB, too much for weights")
    path.write_bytes(struct.pack("<Q", 2**62) + bytes(100))
    refused(lambda: load_checkpoint(tmp_path / "own"), "cannot be read")
