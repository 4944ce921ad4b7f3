"""Archives, folders, databases, settings and checkpoints of somebody who means harm: each ends in one line, soon."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import socket
import zipfile
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import lmdb
import PIL.Image
import pytest

from tests.commands import TINY, run, the_error
from tests.test_names import commands_in
from tests.toy import write_checkpoint, write_dataset
from vdiff.data import disk_sources, image_files, store, tar_files
from vdiff.data.batches import ImageBatches, ShardBatches
from vdiff.data.datasets import facts, open_dataset
from vdiff.data.shards import ShardStore
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter
from vdiff.errors import VdiffError

SECONDS = 20
PREPARE = "prepare_data.py {} --size 8 --num_workers 0 --out out"


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and an alarm for what hangs."""
    monkeypatch.chdir(tmp_path)

    def ring(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ends_in_one_line(line: str) -> str:
    """Run what must fail in one line that no terminal obeys; the line."""
    result = run(line)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2), result.output
    assert commands_in(result.output) == []
    return the_error(result.stdout, result.stderr)


def tells_of_one_bad_image(line: str) -> None:
    """Run what must skip one image, list it, and keep the other."""
    result = run(line)
    assert result.exit_code == 3, (result.output, result.exception)
    assert commands_in(result.output) == []
    assert "written    1 images" in result.stdout
    assert Path("out/rejected.jsonl").read_bytes().count(b"\n") == 1


# tars


def header(name: bytes = b"a.png", size: bytes = b"00000000010\0", kind: bytes = b"0", **fields: bytes) -> bytes:
    """One header block with a right checksum, whatever it says."""
    block = bytearray(512)
    places = {"name": 0, "mode": 100, "size": 124, "mtime": 136, "linkname": 157, "magic": 257, "sparse": 386}
    values = {"name": name, "mode": b"0000644\0", "size": size, "mtime": b"00000000000\0", "magic": b"ustar\x0000"}
    for key, value in {**values, **fields}.items():
        block[places[key] : places[key] + len(value)] = value
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes = b"a.png", content: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    size = b"%011o\0" % len(content)
    return header(name, size, kind, **fields) + content + bytes(-len(content) % 512)


def pax(**values: str) -> bytes:
    lines = b""
    for key, value in values.items():
        body = f" {key.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + len(str(len(body)))
        lines += str(length + (len(str(length + len(str(length)))) > len(str(length)))).encode() + body
    return member(b"pax", lines, b"x")


def binary(number: int) -> bytes:
    """A size as GNU tar writes what no octal number holds."""
    return (b"\xff" if number < 0 else b"\x80") + number.to_bytes(11, signed=True)


END = bytes(1024)
GOOD = member(b"good.png", png())
LONG = b"\0" * 600
TARS: dict[str, bytes] = {
    "negative size": header(size=binary(-512)) + GOOD + END,
    "negative size, later": GOOD + header(size=binary(-1024)) + END,
    "most negative size": GOOD + header(size=binary(-(2**86))) + END,
    "huge size": GOOD + header(size=binary(2**86)) + END,
    "size beyond the file": GOOD + header(size=b"77777777777\0") + END,
    "size that is no number": GOOD + header(size=b"abcdefghijk\0") + END,
    "wrong checksum": GOOD + bytes([header()[0] ^ 1]) + header()[1:] + GOOD + END,
    "pax size, huge": GOOD + pax(size="9" * 30) + header() + END,
    "pax size, negative": GOOD + pax(size="-1024") + header() + END,
    "pax size, no number": GOOD + pax(size="x") + header() + GOOD,
    "pax length, none": GOOD + member(b"pax", b"x size=3\n", b"x") + GOOD + header(size=binary(-512)),
    "pax length 0": GOOD + member(b"pax", b"0 size=3\n", b"x") + GOOD + header(size=binary(-512)),
    "pax header of 8 GiB": GOOD + header(size=b"77777777777\0", kind=b"x") + END,
    "global header of 8 GiB": GOOD + header(size=b"77777777777\0", kind=b"g") + END,
    "long name of 8 GiB": GOOD + header(size=b"77777777777\0", kind=b"L") + END,
    "long link of 8 GiB": GOOD + header(size=b"77777777777\0", kind=b"K") + END,
    "long name, negative": GOOD + header(size=binary(-512), kind=b"L") + END,
    "long names without end": GOOD + member(b"x", b"y", b"L") * 3000,
    "pax headers without end": GOOD + pax(path="y") * 3000,
    "sparse 1.0 map": GOOD + pax(GNU__sparse__major="1", GNU__sparse__minor="0") + member(content=b"x\n" * 256),
    "sparse 1.0, negative": GOOD + pax(GNU__sparse__major="1", GNU__sparse__minor="0", size="-512") + header() + END,
    "sparse 0.1 map": GOOD + pax(GNU__sparse__map="a,b") + header() + GOOD + END,
    "sparse, old, cut": GOOD + header(kind=b"S", sparse=b"x" * 96 + b"\1") + END[:100],
    "cut in a header": GOOD + header()[:100],
    "cut in a member": GOOD + GOOD[:600],
    "cut after a member": GOOD,
    "rubbish at the end": GOOD + b"rubbish" * 100,
    "headers of nothing": header(kind=b"x") * 2 + header(size=binary(-1)),
}
BAD_MEMBERS: dict[str, bytes] = {
    "a pipe": member(b"a.png", kind=b"6"),
    "a device": member(b"a.png", kind=b"3"),
    "a link": member(b"a.png", kind=b"2", linkname=b"/etc/passwd"),
    "a hard link": member(b"a.png", kind=b"1", linkname=b"../../etc/passwd"),
    "a sparse file of a petabyte": member(kind=b"S", sparse=bytes(97) + binary(2**50)),
    "a pax sparse file of a petabyte": pax(GNU__sparse__size=str(2**50), GNU__sparse__map="0,1") + member(content=b"x"),
    "an empty file": member(b"a.png"),
    "a pax size of 5,000 digits": pax(size="9" * 5000) + member(),
    "a name of commands": member(b"\x1b[2J\x9b1m.png", b"x"),
    "a name elsewhere": member(b"/etc/a.png", b"x"),
    "a name that is no text": member(b"\xff\xfe.png", b"x"),
    "a long name": member(b"x", b"d/" * 5000 + b"a.png\0", b"L") + member(b"x", b"x"),
}


@pytest.mark.parametrize("name", TARS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_is_damaged_or_made_up(name, packed):
    Path("x.tar").write_bytes(gzip.compress(TARS[name], 1) if packed else TARS[name])
    assert ends_in_one_line(PREPARE.format("x.tar")).startswith("cannot read x.tar: ")
    assert os.listdir() == ["x.tar"]


@pytest.mark.parametrize("name", TARS)
def test_a_shard_that_is_damaged_or_made_up(name):
    Path("x.tar").write_bytes(TARS[name])
    assert "x.tar" in ends_in_one_line("vdiff data info x.tar")


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_tar_with_one_bad_member(name):
    Path("x.tar").write_bytes(GOOD + BAD_MEMBERS[name] + END)
    tells_of_one_bad_image(PREPARE.format("x.tar"))


def test_packed_tars_that_unpack_without_end(monkeypatch):
    monkeypatch.setattr(disk_sources, "MAX_FILE_BYTES", 2**20)
    bomb = GOOD + member(b"b.png", bytes(2**23)) + END
    for name, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        Path(f"x.tar.{name}").write_bytes(pack(bomb))
        assert "it unpacks to more than 100 times its size" in ends_in_one_line(PREPARE.format(f"x.tar.{name}"))
    for name in ("gz", "bz2", "xz"):
        whole = Path(f"x.tar.{name}").read_bytes()
        Path("y.tar").write_bytes(whole[: len(whole) // 2])
        ends_in_one_line(PREPARE.format("y.tar"))


def test_a_file_that_is_too_large_is_skipped(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(tar_files, "MAX_FILE_BYTES", 1000)
    Path("x.tar").write_bytes(GOOD + member(b"b.png", bytes(1001)) + END)
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("good.png", png())
        archive.writestr("b.png", bytes(1001))
    Path("folder").mkdir()
    Path("folder/good.png").write_bytes(png())
    Path("folder/b.png").write_bytes(bytes(1001))
    for name in ("x.tar", "x.zip", "folder"):
        tells_of_one_bad_image(PREPARE.format(name) + " --overwrite")
        assert '"too large", "detail": "1,001 bytes, more than 1,000"' in Path("out/rejected.jsonl").read_text()
    Path("y.tar").write_bytes(member(b"b.png", bytes(1001)) + END)
    assert "b.png has 1,001 bytes" in ends_in_one_line("vdiff data info y.tar")


# zips


def zipped(method: int = zipfile.ZIP_STORED, content: bytes = b"x") -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("good.png", png(), zipfile.ZIP_STORED)
        archive.writestr("a.png", content)
    return bytearray(buffer.getvalue())


def changed(what: bytes, at: int, value: bytes, data: bytearray | None = None) -> bytes:
    """A zip with other bytes `at` from the last record of the kind `what`: the one of a.png, where it is of a file."""
    data = data or zipped()
    place = data.rindex(what) + at
    data[place : place + len(value)] = value
    return bytes(data)


CENTRAL, LOCAL, FOOT = b"PK\1\2", b"PK\3\4", b"PK\5\6"
ZIPS: dict[str, bytes] = {
    "a name that is no UTF-8": changed(CENTRAL, 8, b"\0\x08", bytearray(changed(CENTRAL, 46, b"\xff\xfe"))),
    "a later version": changed(CENTRAL, 6, b"\xff\xff"),
    "a directory of 4 GiB": changed(FOOT, 12, b"\xff\xff\xff\xff"),
    "a directory beyond the file": changed(FOOT, 16, b"\xff\xff\xff\x7f"),
    "a directory that is none": changed(CENTRAL, 0, b"PKPK"),
    "a directory that is cut": bytes(zipped()[:-30]) + bytes(zipped()[-22:]),
    "a foot alone": FOOT + bytes(18),
    "65,535 files": changed(FOOT, 8, b"\xff\xff\xff\xff", bytearray(changed(FOOT, 16, b"\xff\xff\xff\xff"))),
}
BAD_ZIP_MEMBERS: dict[str, bytes] = {
    "a name longer than the file": changed(CENTRAL, 28, b"\xff\xff"),
    "an extra field longer than the file": changed(CENTRAL, 30, b"\xff\xff"),
    "a zip64 field that is cut": changed(CENTRAL, 20, b"\xff" * 8, bytearray(changed(CENTRAL, 30, b"\4\0"))),
    "encrypted": changed(LOCAL, 6, b"\1\0", bytearray(changed(CENTRAL, 8, b"\1\0"))),
    "strongly encrypted": changed(LOCAL, 6, b"\x41\0", bytearray(changed(CENTRAL, 8, b"\x41\0"))),
    "patched": changed(LOCAL, 6, b"\x20\0", bytearray(changed(CENTRAL, 8, b"\x20\0"))),
    "an unknown method": changed(CENTRAL, 10, b"\x63\0"),
    "another method than it has": changed(CENTRAL, 10, b"\x08\0"),
    "another method, bzip2": changed(CENTRAL, 10, b"\x0c\0"),
    "another method, lzma": changed(CENTRAL, 10, b"\x0e\0"),
    "a wrong checksum": changed(CENTRAL, 16, b"abcd"),
    "a size of 4 GiB": changed(CENTRAL, 24, b"\xfe\xff\xff\xff"),
    "a packed size of 4 GiB": changed(CENTRAL, 20, b"\xfe\xff\xff\xff\xfe\xff\xff\xff"),
    "a place beyond the file": changed(CENTRAL, 42, b"\xff\xff\xff\x7f"),
    "another name in its own header": changed(LOCAL, 30, b"b"),
    "no header": changed(LOCAL, 0, b"PKPK"),
    "a bomb that says it is small": changed(CENTRAL, 24, b"\x10\0\0\0", zipped(zipfile.ZIP_DEFLATED, bytes(2**24))),
    "a bomb of bzip2": changed(CENTRAL, 24, b"\x10\0\0\0", zipped(zipfile.ZIP_BZIP2, bytes(2**24))),
    "a bomb of lzma": changed(CENTRAL, 24, b"\x10\0\0\0", zipped(zipfile.ZIP_LZMA, bytes(2**24))),
    "damaged": changed(LOCAL, 40, b"\xff" * 8, zipped(zipfile.ZIP_DEFLATED, bytes(range(256)))),
    "damaged bzip2": changed(LOCAL, 40, b"\xff" * 8, zipped(zipfile.ZIP_BZIP2, bytes(range(256)))),
    "damaged lzma": changed(LOCAL, 40, b"\xff" * 8, zipped(zipfile.ZIP_LZMA, bytes(range(256)))),
    "a name of commands": bytes(zipped()).replace(b"a.png", b"\x1b.png"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_is_damaged_or_made_up(name):
    Path("x.zip").write_bytes(ZIPS[name])
    ends_in_one_line(PREPARE.format("x.zip"))
    assert os.listdir() == ["x.zip"]


@pytest.mark.parametrize("name", BAD_ZIP_MEMBERS)
def test_a_zip_with_one_bad_member(name):
    Path("x.zip").write_bytes(BAD_ZIP_MEMBERS[name])
    tells_of_one_bad_image(PREPARE.format("x.zip"))


def test_a_zip_with_a_file_of_no_name():
    Path("x.zip").write_bytes(changed(CENTRAL, 28, b"\0\0\0\0\5\0"))
    assert run(PREPARE.format("x.zip")).exit_code == 0


# databases

META = DatasetMeta("toy", (4, 8), 3, "jpeg", class_names=("cat", "dog"), counts={"images": 20})


def jpeg(size: int, level: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (level, 0, 99)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An LMDB of 20 JPEGs in two sizes and two classes; the images of size 8 have pages of their own."""
    folder = tmp_path_factory.mktemp("database")
    writer = StoreWriter(folder, META)
    for index in range(20):
        writer.add({4: jpeg(4, 10 * index), 8: jpeg(8, 10 * index) + bytes(3000)}, index % 2)
    writer.finish({"images": 20})
    return (folder / "data.mdb").read_bytes()


def everything(path: Path) -> list[object]:
    """All that is read of a dataset."""
    opened = open_dataset(path)
    assert isinstance(opened, ImageStore)
    images = [(opened.label(index), opened.encoded(4, index), opened.encoded(8, index)) for index in range(len(opened))]
    return [opened.meta, facts(opened)["classes"], images]


def test_a_damaged_database_gives_an_error_or_what_was_written(database):
    """Never another image, class or description, never a traceback or the end of the process."""
    Path("set").mkdir()
    file = Path("set/data.mdb")
    file.write_bytes(database)
    want, results = everything(Path("set")), {"error": 0, "right": 0}
    generator = random.Random(0)
    for number in range(400):
        data, at = bytearray(database), generator.randrange(len(database))
        page = at // 4096 * 4096
        if number % 4 == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif number % 4 == 1:
            at = page + generator.choice([0, 8, 10, 12, 16, 18, 24, 28, 40, 88, 120, 128, 136, 144])
            data[at : at + 2] = generator.randbytes(2)
        elif number % 4 == 2:
            other = generator.randrange(len(database) // 4096) * 4096
            data[page : page + 4096] = database[other : other + 4096]
        else:
            del data[at:]
        file.write_bytes(data)
        try:
            assert everything(Path("set")) == want
            results["right"] += 1
        except VdiffError:
            results["error"] += 1
    assert min(results.values()) > 50


RECORDS: dict[str, tuple[bytes, bytes | None]] = {
    "length, none": (b"length", None),
    "length, negative": (b"length", b"-1"),
    "length, a word": (b"length", b"many"),
    "length, empty": (b"length", b""),
    "length, no text": (b"length", b"\xff\xfe"),
    "length, too many": (b"length", b"1000000000000000000"),
    "length, 5,000 digits": (b"length", b"9" * 5000),
    "description, no text": (b"meta", b"\xff"),
    "description, no JSON": (b"meta", b"{"),
    "description, a list": (b"meta", b"[]"),
    "description, deep": (b"meta", b"[" * 50_000),
    "class, negative": (b"label-00003", b"-1"),
    "class, a word": (b"label-00003", b"cat"),
    "class, out of range": (b"label-00003", b"2"),
    "class, 5,000 digits": (b"label-00003", b"9" * 5000),
    "class, none": (b"label-00003", None),
    "class, no text": (b"label-00003", b"\xff\x1b[2J"),
}
META_VALUES: dict[str, tuple[str, object]] = {
    f"{key}: {json.dumps(value)[:20]}": (key, value)
    for key, values in {
        "sizes": ([], [0], [-4], ["4"], [4.0], [8, 4], [4, 4], [10**9], 4, None, {}, [True], [[4]]),
        "channels": (0, 2, 4, -3, "3", 3.0, None, 2**70, True),
        "class_names": ("cat", [1], None, {"cat": 1}, [None], [["cat"]], ["cat"]),
        "counts": ([], None, 3, {"images": "x"}, {"skipped": []}, {"skipped": {"a": "b"}}, {"converted": {"a": None}}),
        "name": (None, 3, []),
        "complete": ("yes", 1, None, False),
        "shard": (None, 1, "1/0", "a/b", "0/4", "9" * 400),
        "fingerprint": (None, 3),
        "quality": ("90", [], 9.5),
        "format_version": (None, "2", 99, 2**70, []),
        "new": (1,),
    }.items()
    for value in values
}


def rewritten(folder: Path, database: bytes, key: bytes, value: bytes | None) -> None:
    """A database with another record, and without the checksums that would tell."""
    folder.mkdir()
    (folder / "data.mdb").write_bytes(database)
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        transaction.delete(b"check")
        transaction.delete(b"check-00003")
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


@pytest.mark.parametrize("name", RECORDS)
def test_a_database_with_one_bad_record(name, database):
    rewritten(Path("set"), database, *RECORDS[name])
    assert "prepare_data.py again" in ends_in_one_line("vdiff data info set")


@pytest.mark.parametrize("name", META_VALUES)
def test_a_description_with_one_bad_value(name, database):
    key, value = META_VALUES[name]
    changed = json.dumps({**json.loads(META.to_json()), "complete": True, key: value}).encode()
    rewritten(Path("set"), database, b"meta", changed)
    assert "prepare_data.py again" in ends_in_one_line("vdiff data info set")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_database_that_is_cut_short_while_it_is_read(num_workers, database):
    Path("set").mkdir()
    Path("set/data.mdb").write_bytes(database)
    opened = ImageStore("set")
    batches = ImageBatches(
        opened, image_size=8, batch_size=4, seed=0, flip=False, num_workers=num_workers, cache_bytes=0
    ).start_at(0)
    next(batches)
    os.truncate("set/data.mdb", 8192)
    with pytest.raises(VdiffError, match=r"set/data.mdb is truncated: it ends before byte \d+; run prepare_data.py"):
        list(islice(batches, 10))
    batches.close()
    with pytest.raises(VdiffError, match="is truncated"):
        [opened.encoded(8, index) for index in range(20)]
    for line in ("vdiff data show set", "vdiff data info set", "train.py --data set", "prepare_data.py set --out new"):
        assert "set/data.mdb is truncated: 8192 of " in ends_in_one_line(line)


def test_old_datasets_without_checksums_are_read(database, monkeypatch):
    plain = store.record_key
    monkeypatch.setattr(store, "record_key", lambda kind, k: plain("none" if kind == "check" else kind, k))
    Path("set").mkdir()
    Path("set/data.mdb").write_bytes(database)
    assert len(everything(Path("set"))[2]) == 20


# settings, descriptions and numbers

DEEP = 50_000
TOMLS: dict[str, bytes] = {
    "lists in lists": b"lr = " + b"[" * DEEP,
    "tables in tables": b"unet = " + b"{a=" * DEEP,
    "a key of many parts": b"unet" + b".a" * 2000 + b" = 1",
    "a number of 5,000 digits": b"num_iters = " + b"9" * 5000,
    "a large number": b"num_iters = 1000000000000000000",
    "a large real number": b"lr = 1e999",
    "a whole number too large to be real": b"lr = 1" + b"0" * 400,
    "a large negative number": b"lr = -1" + b"0" * 400,
    "no number": b"lr = nan",
    "infinity": b"lr = inf",
    "no text": b"\xff\xfe",
    "zeros": bytes(1000),
    "a name of commands": b'"\\u001b[2J" = 1',
    "a value of commands": b'preset = "\\u001b[2J\\u202e"',
    "a path with a zero": b'data = "\\u0000"',
    "a path of commands": b'data = "\\u001b[2J"',
    "a long path": b'data = "' + b"a" * 10_000 + b'"',
    "a table for a number": b"[lr]",
    "a date": b"lr = 1979-05-27",
    "a network of nothing": b"preset = 'toy'\n[unet]\nchannels = 0",
    "a network too large": b"preset = 'toy'\n[unet]\nchannels = 1000000000000",
    "a network of text": b"preset = 'toy'\n[unet]\nmultipliers = 'x'",
    "a network of no numbers": b"preset = 'toy'\n[unet]\nchannels = nan",
    "distillation that is a number": b"distill = 3",
}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a checkpoint."""
    folder = tmp_path_factory.mktemp("furnished")
    write_dataset(folder / "data/toy")
    write_checkpoint(folder / "checkpoints/base_5", num_timesteps=16)
    (folder / "tiny.toml").write_text(TINY)
    return folder


@pytest.fixture
def place(furnished: Path) -> None:
    """A copy of it, the working folder."""
    shutil.copytree(furnished, ".", dirs_exist_ok=True)


@pytest.mark.parametrize("name", TOMLS)
@pytest.mark.usefixtures("place")
def test_settings_that_are_made_up(name):
    Path("x.toml").write_bytes(TOMLS[name])
    ends_in_one_line("train.py --config x.toml")


NUMBERS = [
    "sample.py --interpolate 0 1180591620717411303424",
    "sample.py --interpolate -1 3",
    "sample.py --num 1000000000000000000",
    "sample.py --num 999999999999999999999999999999",
    f"sample.py --num {'9' * 5000}",
    "sample.py --seed 18446744073709551616",
    "sample.py --seed -1",
    "sample.py --batch_size 1000000000000000000",
    "sample.py --num_timesteps 1000000000000000000",
    "sample.py --guidance nan",
    "sample.py --time_scale 1000000000000000000",
    "train.py --config tiny.toml --seed 9223372036854775808",
    "train.py --config tiny.toml --num_iters 1000000000000000000",
    "train.py --config tiny.toml --batch_size 1000000000000000000",
    "train.py --config tiny.toml --image_size 1000000000",
    "train.py --config tiny.toml --lr nan",
    "train.py --config tiny.toml --lr 1e999",
    "distill.py --config tiny.toml --base checkpoints/base_5 --to_steps 1000000000000000000",
    f"distill.py --config tiny.toml --base checkpoints/base_5 --phases {'9' * 5000},1",
    "prepare_data.py --size 1000000000",
    f"prepare_data.py --size {'9' * 5000}",
    "prepare_data.py --crop random_resized --seed 1180591620717411303424",
    "prepare_data.py --min_size 1000000000000000000",
    f"prepare_data.py --shard 1/{'9' * 5000}",
    "prepare_data.py --crop_scale nan --crop random_resized",
    "prepare_data.py --num_workers 1000000000000000000",
    "vdiff data show data/toy --image_size 1000000000000000000",
    "vdiff evaluate checkpoints/base_5 --data data/toy --n 1000000000000000000",
]


@pytest.mark.parametrize("line", NUMBERS, ids=[line[:60] for line in NUMBERS])
@pytest.mark.usefixtures("place")
def test_numbers_that_nothing_can_hold(line):
    ends_in_one_line(line)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize(
    "line",
    [
        "prepare_data.py {}",
        "train.py --config {}",
        "train.py --config tiny.toml --data {}",
        "distill.py --config tiny.toml --base {}",
        "distill.py --config tiny.toml --base checkpoints/base_5 --student_config {}",
        "sample.py --checkpoint {}",
        "vdiff inspect {}",
        "vdiff import reference {} --image_size 4",
        "vdiff import diffusers {}",
        "vdiff data info {}",
        "vdiff data info {}.tar",
        "vdiff data merge {}",
        "vdiff evaluate checkpoints/base_5 --data data/toy --features {}",
        "vdiff evaluate checkpoints/base_5 --data {}",
        "vdiff report {}",
        "vdiff ema {}",
        "vdiff push checkpoints/base_5 me/x --token_file {}",
    ],
)
@pytest.mark.usefixtures("place")
def test_what_is_no_file_is_not_opened(line, kind):
    with socket.socket(socket.AF_UNIX) as server:
        for name in ("x", "x.tar"):
            if kind == "pipe":
                os.mkfifo(name)
            elif kind == "device":
                Path(name).symlink_to("/dev/zero")
            elif name in line.format("x").split():
                server.bind(name)
        ends_in_one_line(line.format("x"))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "data.mdb", "index.json", "job.json", "listing.sqlite"]
)
@pytest.mark.usefixtures("place")
def test_a_pipe_in_a_folder_is_not_opened(name):
    if name in ("config.json", "model.safetensors"):
        os.remove(f"checkpoints/base_5/{name}")
        os.mkfifo(f"checkpoints/base_5/{name}")
        for line in ("sample.py --checkpoint", "vdiff inspect", "distill.py --config tiny.toml --base"):
            ends_in_one_line(f"{line} checkpoints/base_5")
        return
    folder = "digits.partial" if name in ("job.json", "listing.sqlite") else "digits"
    os.mkdir(folder)
    os.mkfifo(f"{folder}/{name}")
    ends_in_one_line("vdiff data info digits")
    ends_in_one_line("prepare_data.py --num_workers 0 --out digits --overwrite")


# what an unfinished preparation left


JOBS: dict[str, bytes] = {
    "deep": b"[" * DEEP,
    "a list": b"[]",
    "no text": b"\xff",
    "empty": b"",
    "no job": b'{"command": "x"}',
    "a job that is a list": b'{"job": [], "command": "x"}',
    "a command that is a number": b'{"job": {}, "command": 3}',
    "a command of commands": b'{"job": {}, "command": "\\u001b[2J"}',
    "a number of 5,000 digits": b'{"job": {"part": ' + b"9" * 5000 + b'}, "command": "x"}',
    "no numbers": b'{"job": {"part": NaN}, "command": "x"}',
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_made_up(name):
    Path("photos").mkdir()
    Path("photos/good.png").write_bytes(png())
    Path("out.partial").mkdir()
    Path("out.partial/job.json").write_bytes(JOBS[name])
    ends_in_one_line(PREPARE.format("photos"))
    ends_in_one_line("vdiff data info out")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images, and a preparation of them that ended after 8."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(store, "BATCH_IMAGES", 4)
        Path("photos").mkdir()
        for index in range(12):
            Path(f"photos/{index:02d}.png").write_bytes(png(f"#{index:02x}0000"))
        run(PREPARE.format("photos").replace(" out", " whole"))

        def stop(self: StoreWriter) -> None:
            if self.num_committed == 2:
                raise KeyboardInterrupt
            commit(self)

        commit = StoreWriter.commit
        patched.setattr(StoreWriter, "commit", stop)
        assert run(PREPARE.format("photos")).exit_code == 130
    return folder


@pytest.mark.parametrize("name", ["listing.sqlite", "journal.sqlite"])
def test_a_changed_list_or_journal_gives_an_error_or_the_same_dataset(name, unfinished, monkeypatch):
    monkeypatch.setattr(store, "BATCH_IMAGES", 4)
    monkeypatch.chdir(unfinished)
    shutil.copytree("out.partial", "kept")
    file, want = Path("out.partial", name), Path("whole/data.mdb").read_bytes()
    whole, ends, generator = file.read_bytes(), set(), random.Random(0)
    for _ in range(25):
        data, text = bytearray(whole), generator.choice([b"position", b"images", b".png", b"fingerprint", b"\0\0"])
        at = max(data.rfind(text), 0) + generator.randrange(24)
        data[at] ^= 1 << generator.randrange(8)
        shutil.rmtree("out.partial", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("kept", "out.partial")
        file.write_bytes(data)
        result = run(PREPARE.format("photos"))
        assert isinstance(result.exception, SystemExit) or result.exit_code == 0, result.exception
        assert commands_in(result.output) == []
        if result.exit_code == 0:
            assert Path("out/data.mdb").read_bytes() == want
        ends.add(result.exit_code)
    shutil.rmtree("kept")
    assert 1 in ends


INDEX_VALUES = {
    "deep": b"[" * DEEP,
    "no text": b"\xff",
    "a list": b"[]",
    "no shards": b'{"meta": {}}',
    "shards, a number": b'{"meta": {}, "shards": 3}',
    "a shard of words": b'{"meta": {}, "shards": [{"file": "a.tar", "images": "1", "bytes": 1, "sha256": "a"}]}',
    "a shard of no number": b'{"meta": {}, "shards": [{"file": "a.tar", "images": NaN, "bytes": 1, "sha256": "a"}]}',
    "a shard of many": b'{"meta": {}, "shards": [{"file": "a.tar", "images": 1e99, "bytes": 1, "sha256": "a"}]}',
    "a shard elsewhere": b'{"meta": {}, "shards": [{"file": "../a.tar", "images": 1, "bytes": 9, "sha256": "a"}]}',
    "a shard, a number": b'{"meta": {}, "shards": [{"file": 3, "images": 1, "bytes": 9, "sha256": "a"}]}',
    "a sum, a number": b'{"meta": {}, "shards": [{"file": "a.tar", "images": 1, "bytes": 9, "sha256": 3}]}',
    "no description": b'{"meta": [], "shards": []}',
}


@pytest.mark.parametrize("name", INDEX_VALUES)
def test_an_index_that_is_made_up(name):
    Path("set").mkdir()
    Path("set/index.json").write_bytes(INDEX_VALUES[name])
    assert "set/index.json" in ends_in_one_line("vdiff data info set")


def test_a_changed_index_gives_an_error_or_what_was_written():
    Path("photos").mkdir()
    Path("photos/good.png").write_bytes(png())
    run(PREPARE.format("photos").replace("--out out", "--out set.tar"))
    text, whole = Path("set/index.json").read_bytes(), ShardStore("set")
    errors = 0
    for at in range(0, len(text), 7):
        data = bytearray(text)
        data[at] ^= 1
        Path("set/index.json").write_bytes(data)
        try:
            opened = ShardStore("set")
        except VdiffError:
            errors += 1
        else:
            assert (opened.meta, opened.shards) == (whole.meta, whole.shards)
    assert errors > len(text) // 10


def test_a_changed_image_in_a_shard_is_found_while_training():
    Path("photos").mkdir()
    for index in range(8):
        Path(f"photos/{index}.png").write_bytes(png(f"#{index}00000"))
    run(PREPARE.format("photos").replace("--out out", "--out set.tar --format jpeg"))
    shard = next(Path("set").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"\xff\xda") + 16] ^= 1  # among the pixels: it decodes to another picture
    shard.write_bytes(data)
    batches = ShardBatches(ShardStore("set"), image_size=8, batch_size=4, seed=0, flip=False, window=8)
    with closing(batches.start_at(0)) as found, pytest.raises(VdiffError, match="its checksum does not match"):
        list(islice(found, 60))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know its memory")
def test_the_worst_need_little_memory(database):
    """In a child of its own, which may take 256 MiB more than it has; the sizes that are said are up to petabytes."""
    import resource

    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            for name, data in {**TARS, **{n: GOOD + data + END for n, data in BAD_MEMBERS.items()}}.items():
                if any(word in name for word in ("GiB", "huge", "petabyte", "end", "digits", "negative")):
                    Path("x.tar").write_bytes(data)
                    assert run(PREPARE.format("x.tar") + " --overwrite").exit_code in (1, 3)
            for data in (*ZIPS.values(), *BAD_ZIP_MEMBERS.values()):
                Path("x.zip").write_bytes(data)
                assert run(PREPARE.format("x.zip") + " --overwrite").exit_code in (1, 3)
            rewritten(Path("set"), database, b"length", b"1000000000000000000")
            assert run("vdiff data info set").exit_code == 1
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
