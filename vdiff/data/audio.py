"""The one conversion from any sound file to the pieces of a dataset.

In this order: decode (libsndfile); channels mixed; resampled (soxr, "HQ"); silence at both ends trimmed, if asked;
loudness normalised; cut into pieces of `length` samples; encoded as FLAC of 16 bits.

| file | becomes |
|---|---|
| 8, 16, 24, 32 bits, µ-law, …, floating point | numbers in [−1, 1), then 16 bits: round(32768 x), clipped |
| several channels, `channels` 1 | their mean |
| one channel, `channels` 2 | the same twice; more than two channels are rejected |
| shorter than `length` | zeros follow |
| longer | pieces from the beginning; zeros follow the rest if it is more than half a piece, else it is left out |
| a silent piece of a longer file | left out |
| silent everywhere, NaN, infinity, no samples, fewer samples than its header says | rejected |

Loudness: the level of a sound is the RMS of those frames of 50 ms (all channels together) that are less than 40 dB
below the loudest one, so pauses do not count. The whole file gets one gain, which brings this level to `loudness` dBFS,
or less where the largest sample would exceed −1 dBFS. Without it, a file of 16 bits at this rate keeps all its bits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vdiff.data.image_files import UnreadableImageError
from vdiff.data.store import MAX_LENGTH, MAX_RATE
from vdiff.errors import VdiffError

if TYPE_CHECKING:
    from vdiff.data.source import Sample

EXTENSIONS = frozenset(
    [".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".w64", ".wav"]
)
"""Of the files that are read, lower case; the formats are recognised by content."""
SIGNATURES = (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"\xff\xfb", b"\xff\xf3")
RATES = (1_000, MAX_RATE)
FILE_RATES = (1_000, 1_000_000)
MAX_SAMPLES, MAX_FRAMES = 2**28, 2**31
"""A file of more resampled numbers (1 GiB of float32), or of more frames as it is, is not read."""
BLOCK_NUMBERS = 2**20
STREAMED = 0x7FFF0000
"""A WAV whose data claim at least so many bytes was written to a pipe, by a program that did not know its length."""
FRAME_SECONDS, ACTIVE_DB, PEAK_DB, SILENT = 0.05, 40.0, -1.0, 1e-4
"""The frames and the limits of the loudness rule; and the largest sample of a silent sound, −80 dBFS."""


@dataclass(frozen=True)
class AudioConfig:
    """The form of a dataset's sounds.

    Attributes:
        rate: samples per second.
        length: samples of a piece.
        channels: 1 or 2.
        trim: silence before the first and after the last frame that is at most so many dB below the loudest one is cut
            off; 0: nothing is.
        loudness: the level of every file in dBFS; None: as it is.
    """

    rate: int = 16_000
    length: int = 16_384
    channels: int = 1
    trim: float = 0.0
    loudness: float | None = -20.0

    noun, items = "sound", "files"
    buckets = None
    value_range = "full"
    most_bytes = math.inf  # a file has any number of pieces

    def __post_init__(self) -> None:
        rules = {
            "rate": (RATES[0] <= self.rate <= RATES[1], "{} to {}".format(*RATES)),
            "length": (1 <= self.length <= MAX_LENGTH, f"1 to {MAX_LENGTH}"),
            "channels": (self.channels in (1, 2), "1 or 2"),
            "trim": (0 <= self.trim <= 120, "0 to 120"),
            "loudness": (self.loudness is None or -70 <= self.loudness <= 0, "-70 to 0"),
        }
        for name, (is_good, need) in rules.items():
            if not is_good:
                raise ValueError(f"{name} {getattr(self, name)!r}; need {need}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The length, which has the place of an image's size."""
        return (self.length,)

    def to_dict(self) -> dict[str, Any]:
        """All settings."""
        return {"kind": "audio", **asdict(self)}

    def meta_fields(self) -> dict[str, Any]:
        """Its part of a dataset's description."""
        loudness = "none" if self.loudness is None else f"{self.loudness:g}"
        how = {"image_format": "flac", "rate": self.rate, "trim": self.trim, "loudness": loudness}
        return {"sizes": self.sizes, "channels": self.channels, **how}

    def convert(self, sample: Sample, key: str) -> list[EncodedSound]:
        """The pieces of a sound file.

        Raises:
            UnreadableImageError: it is no sound, damaged, silent, or of a kind that is not supported.
        """
        del key
        assert isinstance(sample.data, bytes)
        x, kinds = read_sound(sample.data, self.rate, self.channels)
        x, more = levelled(x, self)
        return pieces(x, self, (*kinds, *more))


@dataclass(frozen=True)
class EncodedSound:
    """One piece as FLAC, under its length, and the kinds of conversion it took (`resampled`, `padded`, …)."""

    images: dict[int, bytes]
    kinds: tuple[str, ...]
    shape: tuple[int, ...] = ()

    @property
    def conditions(self) -> dict[int, bytes]:
        """None: sounds have no condition images."""
        return {}


def soundfile() -> Any:
    """The package of this name.

    Raises:
        VdiffError: it, or soxr, is not installed.
    """
    try:
        import soundfile as package
        import soxr  # noqa: F401
    except (ImportError, OSError):  # without libsndfile, an OSError
        raise VdiffError("sounds need the packages soundfile and soxr", "pip install 'vdiff[audio]'") from None
    return package


def read_sound(data: bytes, rate: int, channels: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """A sound file's samples (n, channels) float32 at `rate`, and the kinds of conversion.

    Raises:
        UnreadableImageError: see `AudioConfig.convert`.
    """
    sf = soundfile()
    if not data:
        raise UnreadableImageError("empty file")
    if missing := _missing_bytes(data):
        raise UnreadableImageError("damaged", f"{missing:,} bytes fewer than its header says")
    try:
        with sf.SoundFile(io.BytesIO(data)) as file:
            if not FILE_RATES[0] <= file.samplerate <= FILE_RATES[1]:
                raise UnreadableImageError("unsupported rate", f"{file.samplerate:,} Hz")
            if channels == 2 < file.channels:
                raise UnreadableImageError("unsupported channels", f"{file.channels}; --channels 1 takes their mean")
            x = np.concatenate(list(_resampled(file, rate, channels)))
            kinds = {
                f"{file.subtype[-2:]}-bit": file.subtype in ("PCM_24", "PCM_32"),
                "8-bit": file.subtype in ("PCM_S8", "PCM_U8"),
                "float": file.subtype in ("FLOAT", "DOUBLE"),
                "mixed channels": file.channels > channels,
                "doubled channel": file.channels < channels,
                "resampled": file.samplerate != rate,
            }
    except sf.LibsndfileError as error:
        reason = "damaged" if data.startswith(SIGNATURES) else "not a sound"
        raise UnreadableImageError(reason, str(error.error_string)) from None
    if not len(x):
        raise UnreadableImageError("no samples")
    return x, tuple(kind for kind, holds in kinds.items() if holds)


def _resampled(file: Any, rate: int, channels: int) -> Iterator[np.ndarray]:
    """The samples of an open file in blocks (n, channels), so that only the result is in memory as a whole."""
    import soxr

    stream = soxr.ResampleStream(file.samplerate, rate, channels, dtype="float32", quality="HQ")
    num_read, num_made = 0, 0
    while len(block := file.read(max(BLOCK_NUMBERS // file.channels, 1), dtype="float32", always_2d=True)):
        num_read += len(block)
        if not np.isfinite(block).all():
            raise UnreadableImageError("unsupported values", "NaN or infinity")
        if num_read > MAX_FRAMES or num_made * channels > MAX_SAMPLES:
            raise UnreadableImageError("too long", f"more than {num_read:,} samples at {file.samplerate:,} Hz")
        block = block.mean(1, keepdims=True) if channels == 1 else np.broadcast_to(block, (len(block), channels))
        block = np.ascontiguousarray(block)
        block = block if file.samplerate == rate else stream.resample_chunk(block)
        num_made += len(block)
        yield block
    if num_read < file.frames and file.format != "MP3":  # whose length is estimated
        raise UnreadableImageError("damaged", f"{num_read:,} of {file.frames:,} samples can be read")
    yield stream.resample_chunk(np.empty((0, channels), np.float32), last=True)


def _missing_bytes(data: bytes) -> int:
    """How many bytes of its data a WAV lacks, by its header: libsndfile would read it as a shorter one."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return max(at + 8 + size - len(data), 0) if size < STREAMED else 0
        at += 8 + size + size % 2
    return 0


def levelled(x: np.ndarray, config: AudioConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sounds (n, channels) with trimmed silence and normalised loudness, and the kinds of conversion.

    Raises:
        UnreadableImageError: the sound is silent.
    """
    if (peak := float(np.abs(x).max())) < SILENT:
        raise UnreadableImageError("silent", f"no sample above {SILENT:g}")
    kinds = []
    frame = round(FRAME_SECONDS * config.rate)
    power = frame_powers(x, frame)
    loudest = float(power.max())
    if config.trim:
        loud = np.flatnonzero(power >= loudest * 10 ** (-config.trim / 10))
        first, last = int(loud[0]) * frame, min((int(loud[-1]) + 1) * frame, len(x))
        kinds += ["trimmed"] if (first, last) != (0, len(x)) else []
        x = x[first:last]
    if config.loudness is not None:
        level = math.sqrt(power[power > loudest * 10 ** (-ACTIVE_DB / 10)].mean())
        wanted, most = 10 ** (config.loudness / 20) / level, 10 ** (PEAK_DB / 20) / peak
        kinds += ["limited by its peak"] if wanted > most else []
        x = x * np.float32(min(wanted, most))
    elif peak > 1:
        kinds += ["clipped"]
    return x, tuple(kinds)


def frame_powers(x: np.ndarray, frame: int) -> np.ndarray:
    """The mean square of each frame of `frame` samples, all channels together: (n, channels) → (⌈n/frame⌉,) float64."""
    sums = np.add.reduceat(np.square(x, dtype=np.float64).mean(1), np.arange(0, len(x), frame))
    counts = np.full(len(sums), frame)
    counts[-1] = len(x) - frame * (len(sums) - 1)
    result: np.ndarray = sums / counts
    return result


def pieces(x: np.ndarray, config: AudioConfig, kinds: tuple[str, ...] = ()) -> list[EncodedSound]:
    """The pieces of a sound (n, channels), encoded; silent ones are left out, and counted with the first piece."""
    found, length = [], config.length
    for start in range(0, max(len(x) - length // 2, 1), length):
        part = x[start : start + length]
        if np.abs(part).max() < SILENT:
            kinds = (*kinds, "silent piece left out")
            continue
        added = ("padded",) if len(part) < length else ()
        part = np.pad(part, ((0, length - len(part)), (0, 0)))
        found.append(EncodedSound({length: encode(part, config.rate)}, (*kinds, *added)))
        kinds = tuple(kind for kind in kinds if kind != "silent piece left out")
    return found


def to_int16(x: np.ndarray) -> np.ndarray:
    """round(32768 x), clipped to the range of 16 bits."""
    result: np.ndarray = np.clip(np.rint(x * 32768.0), -32768, 32767).astype(np.int16)
    return result


def encode(x: np.ndarray, rate: int, form: str = "FLAC") -> bytes:
    """Sounds (n, channels) in [−1, 1], or int16, as the bytes of a file of 16 bits, FLAC or WAV."""
    samples = x if x.dtype == np.int16 else to_int16(x)
    buffer = io.BytesIO()
    soundfile().write(buffer, samples, rate, format=form, subtype="PCM_16")
    return buffer.getvalue()


def decode_sound(encoded: bytes, channels: int, length: int, rate: int, where: str) -> np.ndarray:
    """The samples of a stored sound: (channels, length) int16; x = samples/32768.

    Raises:
        VdiffError: the file is no sound, damaged, or of another form; `where` names it.
    """
    sf = soundfile()
    try:
        samples, found = sf.read(io.BytesIO(encoded), dtype="int16", always_2d=True)
    except sf.LibsndfileError as error:
        raise VdiffError(f"{where} cannot be decoded: {error.error_string}", "prepare the sounds again") from None
    if (*samples.shape, found) != (length, channels, rate):
        what = f"{len(samples)} samples of {samples.shape[1]} channels at {found} Hz"
        raise VdiffError(f"{where} has {what}, not {length} of {channels} at {rate}", "prepare the sounds again")
    return np.ascontiguousarray(samples.T)
