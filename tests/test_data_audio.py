"""Sounds: from files to a dataset to batches; loudness, pieces, damaged files, kills, pages and the command line."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
import wave
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import run
from vdiff.data import preparation
from vdiff.data.audio import AudioConfig, decode_sound, frame_powers, levelled, pieces, read_sound, to_int16
from vdiff.data.batches import ImageBatches, open_batches
from vdiff.data.conversion import ConversionConfig
from vdiff.data.datasets import merge, open_dataset, verify
from vdiff.data.disk_sources import Folder
from vdiff.data.image_files import UnreadableImageError
from vdiff.data.preparation import Part, prepare
from vdiff.data.shards import ShardStore
from vdiff.data.source import Sample, SourceOptions
from vdiff.data.sources import open_source
from vdiff.data.store import ImageStore
from vdiff.errors import OptionError, VdiffError
from vdiff.models.codec import WAVEFORM, spectrograms

sf = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE, LENGTH = 8000, 400
AS_IT_IS = AudioConfig(RATE, LENGTH, loudness=None)


def sine(num: int, rate: int = RATE, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(num) / rate)


def noise(num: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (num, channels))


def file_of(x: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, x, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


class Killed(BaseException):
    """In the place of the end of a process."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, writer: Any, commits: int) -> Iterator[None]:
    """The preparation in the block ends, as by a kill, where `writer` would commit once more than `commits` times."""
    commit, left = writer.commit, commits

    def dying(self):
        nonlocal left
        left -= 1
        if left < 0:
            for file in (getattr(self, name) for name in ("_tar", "_file") if hasattr(self, name)):
                file.close()  # or it is reported as left open; the hidden file stays
            raise Killed
        commit(self)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "commit", dying)
        with pytest.raises(Killed):
            yield


def words(root: Path, count: int = 12) -> Path:
    """Sounds of different lengths in two classes."""
    return write(root, {f"{'ab'[k % 2]}/{k:02d}.wav": file_of(noise(150 + 60 * k, k)) for k in range(count)})


def test_samples_of_16_bits_come_back_bit_for_bit(tmp_path):
    source = write(tmp_path / "sounds", {f"{k}.wav": file_of(noise(LENGTH, k)) for k in range(6)})
    report = prepare(Folder(source), tmp_path / "data", AS_IT_IS)
    store = ImageStore(report.path)
    assert (store.meta.rate, store.meta.sizes, store.meta.channels, len(store)) == (RATE, (LENGTH,), 1, 6)
    batches = ImageBatches(store, image_size=LENGTH, batch_size=6, seed=0, flip=False)
    batch = next(batches.start_at(0))
    assert batch.images.shape == (6, 1, LENGTH)
    for place, index in enumerate(batches.plan.indices(0).tolist()):
        with wave.open(str(source / f"{index}.wav")) as file:  # another reader than libsndfile
            due = np.frombuffer(file.readframes(LENGTH), "<i2")
        assert np.array_equal(batch.images[place, 0].numpy(), due)
        assert np.array_equal(WAVEFORM.encode(batch.images)[place, 0].numpy(), (due / 32768).astype(np.float32))
    assert verify(store).is_good


@pytest.mark.parametrize(
    ("form", "subtype", "error"),
    [
        ("WAV", "PCM_24", 0.5), ("WAV", "PCM_32", 0.5), ("WAV", "FLOAT", 0.5), ("WAV", "DOUBLE", 0.5),
        ("WAV", "PCM_U8", 256.0), ("FLAC", "PCM_24", 0.5), ("AIFF", "PCM_16", 0.0), ("AU", "PCM_16", 0.0),
        ("WAV", "ULAW", 600.0), ("W64", "PCM_16", 0.0), ("CAF", "PCM_16", 0.0),
    ],
)  # fmt: skip
def test_every_format_within_its_error(form, subtype, error):
    x = noise(LENGTH)
    given = to_int16(x) if subtype == "PCM_16" else x  # libsndfile would round numbers in its own way
    found, _ = read_sound(file_of(given, RATE, form, subtype), RATE, 1)
    assert found.shape == (LENGTH, 1)
    # half a level more, as the expected numbers are rounded; libsndfile cuts off what 8 bits do not hold
    assert np.abs(to_int16(found).astype(int) - to_int16(x)).max() <= error + 0.5


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_formats_are_close(form, subtype):
    rate = 48_000
    x = sine(rate, rate)
    found, _ = read_sound(file_of(x, rate, form, subtype), rate, 1)
    assert len(found) == pytest.approx(len(x), abs=3000)
    spectrum = np.abs(np.fft.rfft(found[: len(x), 0]))
    assert spectrum.argmax() == pytest.approx(440 * min(len(found), len(x)) / rate, abs=2)
    assert np.sqrt(np.square(found[5000:40_000]).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


@pytest.mark.parametrize("rate", [11_025, 16_000, 22_050, 44_100, 96_000])
def test_resampling_keeps_a_sine_where_it_is(rate):
    found, kinds = read_sound(file_of(sine(rate, rate), rate, subtype="FLOAT"), RATE, 1)
    assert len(found) == pytest.approx(RATE, abs=2)
    assert "resampled" in kinds
    due = sine(len(found))
    assert np.abs(found[200:-200, 0] - due[200:-200]).max() < 2e-3  # no delay, no change of level


def test_frequencies_above_half_the_rate_are_removed():
    rate = 44_100
    found, _ = read_sound(file_of(sine(rate, rate, frequency=6000), rate, subtype="FLOAT"), RATE, 1)
    assert np.abs(found[200:-200]).max() < 1e-3


def test_long_files_in_blocks_are_read_as_in_one(monkeypatch):
    data = file_of(noise(50_000, channels=2), 22_050, subtype="FLOAT")
    whole, _ = read_sound(data, RATE, 1)
    monkeypatch.setattr("vdiff.data.audio.BLOCK_NUMBERS", 3000)
    parts, _ = read_sound(data, RATE, 1)
    assert np.abs(whole - parts).max() < 1e-6


def test_mono_is_the_mean_and_stereo_keeps_both_sides():
    x = noise(LENGTH, channels=2)
    data = file_of(x, subtype="DOUBLE")
    mono, kinds = read_sound(data, RATE, 1)
    assert np.allclose(mono[:, 0], x.mean(1), atol=1e-7)
    assert "mixed channels" in kinds
    assert np.allclose(read_sound(data, RATE, 2)[0], x, atol=1e-7)
    doubled, kinds = read_sound(file_of(x[:, :1], subtype="DOUBLE"), RATE, 2)
    assert np.allclose(doubled, x[:, :1].repeat(2, 1), atol=1e-7)
    assert "doubled channel" in kinds


def test_loudness_is_the_rms_of_the_loud_frames():
    config = AudioConfig(RATE, LENGTH, loudness=-26.0)
    frame = RATE // 20
    loud, pause = sine(10 * frame, frequency=400, amplitude=0.02), np.full(30 * frame, 5e-5)  # 49 dB below
    x, kinds = levelled(np.concatenate([pause, loud, pause])[:, None].astype(np.float32), config)
    active = x[30 * frame : 40 * frame, 0].astype(np.float64)
    assert 20 * np.log10(np.sqrt(np.square(active).mean())) == pytest.approx(-26, abs=0.01)
    assert kinds == ()
    click = np.zeros((10 * frame, 1), np.float32)
    click[5] = 0.5
    x, kinds = levelled(click, AudioConfig(RATE, LENGTH, loudness=-10.0))
    assert np.abs(x).max() == pytest.approx(10 ** (-1 / 20))
    assert kinds == ("limited by its peak",)


def test_trimming_removes_quiet_ends_and_keeps_pauses():
    frame = RATE // 20
    quiet, loud = 1e-3 * np.ones(4 * frame), sine(4 * frame)
    x = np.concatenate([quiet, loud, quiet, loud, quiet])[:, None]
    kept, kinds = levelled(x, AudioConfig(RATE, LENGTH, trim=40, loudness=None))
    assert np.array_equal(kept, x[4 * frame : 16 * frame])
    assert kinds == ("trimmed",)
    assert len(levelled(x, AudioConfig(RATE, LENGTH, trim=60, loudness=None))[0]) == len(x)


def test_powers_of_frames():
    x = noise(1050, channels=2)
    due = [np.square(x[start : start + 400]).mean() for start in (0, 400, 800)]
    assert frame_powers(x, 400) == pytest.approx(due)


@pytest.mark.parametrize(
    ("num", "count", "padded"), [(1, 1, True), (400, 1, False), (600, 1, False), (601, 2, True), (1200, 3, False)]
)
def test_long_sounds_are_cut_and_short_ones_padded(num, count, padded):
    x = noise(num)
    found = pieces(x, AS_IT_IS)
    assert len(found) == count
    assert ("padded" in found[-1].kinds) == padded
    joined = np.concatenate([decode_sound(each.images[LENGTH], 1, LENGTH, RATE, "it")[0] for each in found])
    used = min(num, len(joined))
    assert np.array_equal(joined[:used], to_int16(x[:used, 0]))
    assert not joined[used:].any()


def test_silent_pieces_are_left_out():
    x = np.concatenate([noise(LENGTH), np.zeros((LENGTH, 1)), noise(LENGTH, 1)])
    found = pieces(x, AS_IT_IS)
    assert [each.kinds.count("silent piece left out") for each in found] == [0, 1]


def cut(data: bytes, at: int) -> bytes:
    return data[:at]


def header(rate: int = RATE, channels: int = 1, bits: int = 16, size: int = 800) -> bytes:
    width = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, bits)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"


GOOD = file_of(noise(LENGTH))
LONG_FLAC = file_of(noise(40_000), form="FLAC")
NAN = np.where(np.arange(LENGTH) == 7, np.nan, 0.1)
HOSTILE = {
    "empty.wav": (b"", "empty file"),
    "text.wav": (b"hello, this is no sound" * 9, "not a sound"),
    "picture.mp3": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a sound"),
    "truncated.wav": (cut(GOOD, len(GOOD) - 100), "damaged"),
    "header_alone.wav": (cut(GOOD, 44), "damaged"),
    "half_a_header.wav": (cut(GOOD, 20), "damaged"),
    "truncated.flac": (cut(LONG_FLAC, len(LONG_FLAC) // 2), "damaged"),
    "bits_changed.flac": (LONG_FLAC[:9000] + bytes(3000) + LONG_FLAC[12_000:], "damaged"),
    "no_samples.wav": (file_of(np.zeros(0)), "no samples"),
    "no_samples.aiff": (file_of(np.zeros(0), form="AIFF"), "no samples"),
    "silent.wav": (file_of(np.zeros(LENGTH)), "silent"),
    "nan.wav": (file_of(NAN, subtype="FLOAT"), "unsupported values"),
    "infinite.wav": (file_of(NAN * np.inf, subtype="DOUBLE"), "unsupported values"),
    "huge_rate.wav": (header(rate=2**31 - 1) + struct.pack("<I", 800) + bytes(range(200)) * 4, "unsupported rate"),
    "rate_0.wav": (header(rate=0) + struct.pack("<I", 800) + bytes(800), None),
    "rate_1.wav": (header(rate=1) + struct.pack("<I", 800) + bytes(range(200)) * 4, "unsupported rate"),
    "no_channels.wav": (header(channels=0) + struct.pack("<I", 800) + bytes(800), "damaged"),
    "many_channels.wav": (header(channels=65_535) + struct.pack("<I", 800) + bytes(800), None),
    "bits_65.wav": (header(bits=65) + struct.pack("<I", 800) + bytes(800), "damaged"),
    "longer_than_said.wav": (header(size=2**30) + struct.pack("<I", 2**30) + bytes(800), "damaged"),
    "header.ogg": (b"OggS" + bytes(60), "damaged"),
    "id3.mp3": (b"ID3\x04\0\0\0\0\0\0" + bytes(30), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_rejected_in_one_line(name):
    data, reason = HOSTILE[name]
    with pytest.raises(UnreadableImageError) as caught:
        AudioConfig(RATE, LENGTH).convert(Sample(data), name)
    assert reason in (None, caught.value.reason)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_surround_needs_mono():
    data = file_of(noise(LENGTH, channels=6))
    with pytest.raises(UnreadableImageError, match="unsupported channels"):
        read_sound(data, RATE, 2)
    assert read_sound(data, RATE, 1)[0].shape == (LENGTH, 1)


def test_a_wav_from_a_pipe_has_a_placeholder_for_its_length():
    data = bytearray(GOOD)
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(read_sound(bytes(data), RATE, 1)[0]) == LENGTH


def test_rejected_files_are_listed_and_the_others_kept(tmp_path):
    source = words(tmp_path / "sounds")
    write(source, {f"a/{name}": data for name, (data, _) in HOSTILE.items()})
    (source / "a" / "notes.doc").write_bytes(b"x")
    report = prepare(Folder(source), tmp_path / "data", AudioConfig(RATE, LENGTH))
    lines = [json.loads(line) for line in (report.path / "rejected.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {f"a/{name}" for name in HOSTILE}
    assert report.rejected == len(HOSTILE)
    assert report.ignored == {".doc": 1}
    assert report.class_names == ("a", "b")


def test_zip_and_tar_give_the_bytes_of_the_folder(tmp_path):
    source = words(tmp_path / "sounds")
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as archive, tarfile.open(tmp_path / "sounds.tgz", "w:gz") as tar:
        for path in sorted(source.rglob("*.wav")):
            archive.write(path, path.relative_to(source))
            tar.add(path, path.relative_to(source))
    prints = set()
    for name in ("sounds", "sounds.zip", "sounds.tgz"):
        out = tmp_path / f"{name}.data"
        prints.add(prepare(open_source(tmp_path / name), out, AudioConfig(RATE, LENGTH)).fingerprint)
    prints.add(prepare(open_source(tmp_path / "sounds.data"), tmp_path / "again", AS_IT_IS).fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_preparation_ends_with_the_same_bytes(tmp_path, monkeypatch, after):
    source = words(tmp_path / "sounds")
    write(source, {"a/bad.wav": b"x"})
    monkeypatch.setattr("vdiff.data.store.BATCH_IMAGES", 4)
    whole = prepare(Folder(source), tmp_path / "whole", AudioConfig(RATE, LENGTH)).path
    with killed_after(monkeypatch, preparation.StoreWriter, after):
        prepare(Folder(source), tmp_path / "data", AudioConfig(RATE, LENGTH))
    report = prepare(Folder(source), tmp_path / "data", AudioConfig(RATE, LENGTH))
    assert report.kept > 0
    for name in ("data.mdb", "rejected.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("after", [0, 2])
def test_tar_shards_of_sounds_end_with_the_same_bytes_after_a_kill(tmp_path, monkeypatch, after):
    """Long files are cut into pieces, which stay in the shard of their file."""
    pytest.importorskip("webdataset")
    source = words(tmp_path / "sounds", 14)
    write(source, {"a/bad.wav": b"x", "b/long.wav": file_of(noise(5 * LENGTH, 99))})
    monkeypatch.setattr("vdiff.data.preparation.IMAGES_PER_SHARD", 4)
    whole = prepare(Folder(source), tmp_path / "whole.tar", AudioConfig(RATE, LENGTH)).path
    with killed_after(monkeypatch, preparation.ShardWriter, after):
        prepare(Folder(source), tmp_path / "data.tar", AudioConfig(RATE, LENGTH))
    assert (prepare(Folder(source), tmp_path / "data.tar", AudioConfig(RATE, LENGTH)).kept > 0) == bool(after)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    parts = [
        prepare(Folder(source), tmp_path / f"{k}.tar", AudioConfig(RATE, LENGTH), part=Part(k, 2)).path for k in (1, 2)
    ]
    meta = merge(parts, tmp_path / "merged")
    assert (meta.rate, meta.counts["images"]) == (RATE, ShardStore(whole).meta.counts["images"])
    assert meta.fingerprint == ShardStore(whole).meta.fingerprint


def test_shards_give_the_sounds_of_an_lmdb(tmp_path):
    pytest.importorskip("webdataset")
    source = words(tmp_path / "sounds")
    lmdb = prepare(Folder(source), tmp_path / "lmdb", AudioConfig(RATE, LENGTH)).path
    tars = open_dataset(prepare(Folder(source), tmp_path / "tars.tar", AudioConfig(RATE, LENGTH)).path)
    assert (tars.meta.noun, tars.meta.key(LENGTH), len(tars)) == ("sound", f"audio-{RATE}", len(ImageStore(lmdb)))

    def seen(store, count):
        batches = open_batches(store, image_size=LENGTH, batch_size=4, seed=0, flip=False)
        with closing(batches.start_at(0)) as found:
            some = list(islice(found, count))
        assert some[0].images.shape == (4, 1, LENGTH)
        return {
            (row.numpy().tobytes(), int(label))
            for batch in some
            for row, label in zip(batch.images, batch.classes, strict=True)
        }

    assert seen(tars, 60) == seen(ImageStore(lmdb), 60)
    assert verify(tars).is_good
    with pytest.raises(OptionError, match="--flip True"):
        open_batches(tars, image_size=LENGTH, batch_size=2, seed=0, flip=True)
    with tarfile.open(next(Path(tars.path).glob("*.tar"))) as tar:
        assert any(name.endswith("-00001.flac") for name in tar.getnames())  # the second piece of a file


# Sources


def shards(folder: Path, samples: list[dict[str, bytes]], per_shard: int = 3) -> str:
    """WebDataset's shards of samples; names repeat from shard to shard."""
    folder.mkdir()
    for first in range(0, len(samples), per_shard):
        with tarfile.open(folder / f"s-{first // per_shard:03d}.tar", "w") as tar:
            for k, sample in enumerate(samples[first : first + per_shard]):
                for suffix, data in sample.items():
                    info = tarfile.TarInfo(f"{k:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"s-{{000..{(len(samples) - 1) // per_shard:03d}}}.tar")


def labelled(count: int = 8) -> list[dict[str, bytes]]:
    forms = ("WAV", "FLAC", "OGG")
    kinds = [("VORBIS" if form == "OGG" else "PCM_16") for form in forms]
    return [
        {
            forms[k % 3].lower(): file_of(noise(LENGTH, k), form=forms[k % 3], subtype=kinds[k % 3]),
            "cls": f"{10 - k % 2}\n".encode(),
            "json": b"{}",
        }
        for k in range(count)
    ]


@pytest.mark.parametrize("how", ["braces", "glob", "several"])
def test_shards_of_webdataset_give_sounds_and_classes(tmp_path, monkeypatch, how):
    pytest.importorskip("braceexpand")
    monkeypatch.chdir(tmp_path)
    pattern = shards(tmp_path / "shards", labelled())
    several = " ".join(f"shards/s-00{k}.tar" for k in range(3))
    places = {"braces": f"'{pattern}'", "glob": "'shards/s-*.tar'", "several": several}
    line = f"prepare_data.py {places[how]} --kind audio --rate {RATE} --length {LENGTH} --num_workers 0"
    result = run(line)
    assert result.exit_code == 0, result.output
    assert "8 sounds, 2 classes" in result.output
    assert "8 .json" in result.output
    store = ImageStore(tmp_path / f"data/s_{LENGTH}")
    assert store.meta.class_names == ("9", "10")  # numbers by value
    assert [store.label(k) for k in range(8)] == [1, 0, 1, 0, 1, 0, 1, 0]
    found = decode_sound(store.encoded(LENGTH, 3), 1, LENGTH, RATE, "it")
    due, _ = levelled(read_sound(labelled()[3]["wav"], RATE, 1)[0], AudioConfig(RATE, LENGTH))
    assert np.array_equal(found[0], to_int16(due[:, 0]))
    assert run(f"{line} --label_column none --overwrite").exit_code == 0
    assert ImageStore(tmp_path / f"data/s_{LENGTH}").meta.class_names == ()


def test_classes_of_a_tar_of_images(tmp_path):
    import PIL.Image

    def picture(k: int) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (4, 4), (k, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    classes = [b"dog", b"cat", b"", b"dog"]
    shards(tmp_path / "tars", [{"png": picture(k), "cls": name} for k, name in enumerate(classes)], per_shard=4)
    report = prepare(open_source(tmp_path / "tars" / "s-000.tar"), tmp_path / "out", ConversionConfig(sizes=(4,)))
    assert (report.class_names, report.images, report.ignored) == (("cat", "dog"), 3, {"without a class": 1})


def test_an_interrupted_preparation_of_shards_continues(tmp_path, monkeypatch):
    pytest.importorskip("braceexpand")
    pattern = shards(tmp_path / "shards", [*labelled(), {"wav": b"x", "cls": b"9"}])
    packed = tmp_path / "shards" / "s-001.tar"
    packed.write_bytes(gzip.compress(packed.read_bytes()))  # it is unpacked beside the journal
    monkeypatch.setattr("vdiff.data.store.BATCH_IMAGES", 2)
    whole = prepare(open_source(pattern), tmp_path / "whole", AudioConfig(RATE, LENGTH)).path
    with killed_after(monkeypatch, preparation.StoreWriter, 2):
        prepare(open_source(pattern), tmp_path / "data", AudioConfig(RATE, LENGTH))
    assert prepare(open_source(pattern), tmp_path / "data", AudioConfig(RATE, LENGTH)).kept == 4
    for name in ("data.mdb", "rejected.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((whole / "rejected.jsonl").read_text())["path"] == "s-002.002.wav"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("shards/s-{000..005}.tar", "shards/s-003.tar: no such file; give the tars that there are"),
        ("shards/none-*.tar", "shards/none-*.tar: no such file or folder"),
        ("shards/s-{000.tar", "shards/s-{000.tar"),
        ("shards/*", "is not a tar; give one folder or archive, or several tars"),
        ("shards/s-000.tar other/s-000.tar", "two tars are called s-000; rename one of them"),
        ("shards/s-000.tar speech", "speech is not a tar"),
        ("shards/cut.tar shards/s-000.tar", "cannot read shards/cut.tar"),
        ("shards/classes.tar", "classes.tar: 000.cls is not UTF-8"),
        ("shards/long.tar", "000.cls cannot be read: aaaa"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, monkeypatch, place, message):
    pytest.importorskip("braceexpand")
    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "shards", labelled())
    words(tmp_path / "speech", 2)
    first = (tmp_path / "shards/s-000.tar").read_bytes()
    sound = labelled(1)[0]["wav"]
    for name, text in (("classes", b"\xff\xfe"), ("long", b"a" * 5000)):
        shards(tmp_path / name, [{"wav": sound, "cls": text}])
        (tmp_path / name / "s-000.tar").rename(tmp_path / f"shards/{name}.tar")
    (tmp_path / "shards/readme.txt").write_text("hello")
    write(tmp_path, {"shards/cut.tar": first[:1000], "other/s-000.tar": first})
    result = run(f"prepare_data.py {place} --kind audio --rate {RATE} --length {LENGTH} --num_workers 0 --out x")
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("x*"))


def test_a_hostile_member_of_a_shard_is_one_line(tmp_path):
    samples = [
        {"wav" if name.endswith("wav") else name.rpartition(".")[2]: data} for name, (data, _) in HOSTILE.items()
    ]
    shards(tmp_path / "shards", [*samples, {"wav": GOOD}], per_shard=99)
    report = prepare(open_source(tmp_path / "shards" / "s-000.tar"), tmp_path / "out", AudioConfig(RATE, LENGTH))
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert report.rejected == len(lines) >= len(HOSTILE) - 2  # two may be read
    assert report.images >= 1


def test_shards_of_sounds_of_another_program_are_prepared_first(tmp_path):
    pattern = shards(tmp_path / "shards", labelled())
    with pytest.raises(VdiffError, match="holds sounds of any rate and length; make a dataset of them: python prepare"):
        open_dataset(pattern)


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_dataset_of_hugging_face(tmp_path, monkeypatch, form):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = words(tmp_path / "set", 6)
    if form == "parquet":
        files = sorted(source.rglob("*.wav"))
        rows = {
            "sound": [{"bytes": path.read_bytes(), "path": None} for path in files],
            "echo": [{"bytes": files[0].read_bytes(), "path": None}] * 6,
            "label": [int(path.parent.name == "b") for path in files],
        }
        kinds = {"sound": datasets.Audio(), "echo": datasets.Audio(), "label": datasets.ClassLabel(names=["a", "b"])}
        (tmp_path / "table").mkdir()
        made = pyarrow.Table.from_pydict(rows, schema=datasets.Features(kinds).arrow_schema)
        parquet.write_table(made, tmp_path / "table" / "train-00000.parquet")
        source = tmp_path / "table"
    due = prepare(Folder(tmp_path / "set"), tmp_path / "due", AudioConfig(RATE, LENGTH))
    options = SourceOptions(kind="audio")
    if form == "folder" and not find_spec("torchcodec"):  # which the library needs for folders of sounds
        with pytest.raises(VdiffError, match="No module named 'torchcodec'; pip install torchcodec, or give a folder"):
            open_source(f"hf:{source}", options).fetch(tmp_path)
        return
    report = prepare(open_source(f"hf:{source}", options), tmp_path / "out", AudioConfig(RATE, LENGTH))
    assert (report.class_names, report.images, report.fingerprint) == (("a", "b"), due.images, due.fingerprint)
    with pytest.raises(VdiffError, match="has no image column; give --kind audio for sounds"):
        open_source(f"hf:{source}").fetch(tmp_path)
    with pytest.raises(OptionError, match=r"--audio_column x: .* has no such column of sounds; choose from"):
        open_source(f"hf:{source}", SourceOptions(kind="audio", audio_column="x")).fetch(tmp_path)
    if form == "parquet":
        echo = SourceOptions(kind="audio", audio_column="echo")
        report = prepare(open_source(f"hf:{source}", echo), tmp_path / "echo", AudioConfig(RATE, LENGTH))
        assert len({ImageStore(report.path).encoded(LENGTH, k) for k in range(6)}) == 1


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_sets_of_images_hold_no_sounds(name):
    with pytest.raises(OptionError, match=f"--kind audio does not apply to {name}"):
        open_source(name, SourceOptions(kind="audio"))


def test_records_have_the_rate_in_their_key(tmp_path):
    import lmdb

    path = prepare(Folder(words(tmp_path / "sounds", 2)), tmp_path / "data", AudioConfig(RATE, LENGTH)).path
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        records = dict(transaction.cursor())
    assert records[b"audio-8000-00001"][:4] == b"fLaC"
    assert records[b"label-00001"] == b"1"


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words(tmp_path / "speech")
    result = run("prepare_data.py speech --kind audio --rate 8000 --length 400 --num_workers 0")
    assert result.exit_code == 0, result.output
    assert "400 samples at 8,000 Hz" in result.output
    assert "samples, 0.05 s at 8,000 Hz" in run("vdiff data info data/speech_400").output
    assert run("vdiff data verify data/speech_400 --num_workers 0").exit_code == 0
    shown = run("vdiff data show data/speech_400")
    assert shown.exit_code == 0, shown.output
    page = (tmp_path / "data/speech_400.html").read_text()
    assert page.count("<audio") == 16  # all pieces
    assert (tmp_path / "data/speech_400.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kind audio --size 8", "--size does not apply to audio data"),
        ("--kind audio --crop pad", "--crop does not apply to audio data"),
        ("--kind audio --channels 3", "--channels 3 does not apply to audio data"),
        ("--audio_column x", "--audio_column does not apply to image data"),
        ("--kind audio --audio_column x", "--audio_column x does not apply to speech"),
        ("--kind audio --image_column x", "--image_column does not apply to audio data"),
        ("--kind audio --loudness 5", "need none or a level from -70 to 0"),
        ("--rate 8000", "--rate does not apply to image data"),
        ("--channels 2", "--channels 2 does not apply to image data"),
        ("", "give --kind audio for sounds"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    words(tmp_path / "speech", 2)
    result = run(f"prepare_data.py speech --num_workers 0 {options}")
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_a_dataset_of_sounds_is_not_prepared_as_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(Folder(words(tmp_path / "sounds")), tmp_path / "data", AudioConfig(RATE, LENGTH, trim=30))
    assert "data holds sounds; give --kind audio" in run("prepare_data.py data").output
    assert "trim" in run("vdiff data info data").output


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "soxr", None)
    words(tmp_path / "speech", 2)
    result = run("prepare_data.py speech --kind audio")
    assert "sounds need the packages soundfile and soxr; pip install 'vdiff[audio]'" in " ".join(result.output.split())
    assert not (tmp_path / "data").exists()


def test_sounds_are_not_reversed(tmp_path):
    path = prepare(Folder(words(tmp_path / "sounds")), tmp_path / "data", AudioConfig(RATE, LENGTH)).path
    with pytest.raises(OptionError, match="--flip True"):
        ImageBatches(ImageStore(path), image_size=LENGTH, batch_size=2, seed=0, flip=True)


def test_a_damaged_sound_is_found(tmp_path):
    path = prepare(Folder(words(tmp_path / "sounds")), tmp_path / "data", AudioConfig(RATE, LENGTH)).path
    with pytest.raises(VdiffError, match="it cannot be decoded"):
        decode_sound(b"no sound", 1, LENGTH, RATE, "it")
    encoded = ImageStore(path).encoded(LENGTH, 0)
    with pytest.raises(VdiffError, match="not 401 of 1 at 8000"):
        decode_sound(encoded, 1, LENGTH + 1, RATE, "it")


def test_a_spectrogram_shows_a_sine_at_its_frequency():
    import torch

    x = torch.from_numpy(sine(8192, frequency=1000, amplitude=1.0)).float()[None, None]
    picture = spectrograms(x)
    assert picture.shape == (1, 3, 128, 128)
    row = int(picture[0].mean(0)[:, 64].argmax())
    assert 127 - row == pytest.approx(1000 / 4000 * 128 - 1, abs=1)  # frequency upwards
    assert float(spectrograms(torch.zeros(1, 1, 8192)).max()) < -0.95
