"""The results of an evaluation: metrics with intervals, what was compared, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import vdiff
from vdiff.errors import VdiffError
from vdiff.files import parse, read_text, write_text
from vdiff.records import record_of
from vdiff.replacing import Kind, holds_keys
from vdiff.text import cause_of

FORMAT = 1
FILE = "evaluation.json"
"""File name of a ladder's evaluation, in the ladder's folder."""
QUALITY = "quality.json"
"""File name of a short evaluation of a single checkpoint, in its folder."""
NOT_TRAINED = "not trained yet"
ARTICLES = {"image": "an", "sound": "a"}
AGAIN = "evaluate again: vdiff evaluate"


@dataclass(frozen=True)
class Reference:
    """The dataset that samples were compared with.

    Attributes:
        name: the dataset's path.
        fingerprint: SHA-256 of its content; empty if another program wrote it.
        num_images: number of images in the statistics.
        split: `all`, or `i/n` for part i of a dataset prepared in n parts.
        resize, format: how the images were resized and encoded; empty if unknown.
    """

    name: str
    fingerprint: str
    num_images: int
    image_size: int
    channels: int
    split: str = "all"
    resize: str = ""
    format: str = ""

    @property
    def noun(self) -> str:
        """What one of its samples is called; only sounds are kept as FLAC."""
        return "sound" if self.format == "flac" else "image"


@dataclass(frozen=True)
class Metric:
    """A value and the bounds of its 95 % interval; None if there are no bounds."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def around(cls, value: float, half: float) -> Metric:
        """The interval value ± half."""
        return cls(value, value - half, value + half)

    def __str__(self) -> str:
        """`0.208 ± 0.012`: the value and half of its interval, which has two significant digits."""
        half = math.nan if self.low is None or self.high is None else (self.high - self.low) / 2
        if not math.isfinite(half) or half <= 0:
            return f"{self.value:.4g}"
        digits = min(max(0, 1 - math.floor(math.log10(half))), 7)
        return f"{self.value:.{digits}f} ± {half:.{digits}f}"


@dataclass(frozen=True)
class EvalRow:
    """The metrics of one checkpoint with one sampler and one number of steps.

    Attributes:
        checkpoint, checkpoint_fingerprint: its folder, and the SHA-256 of its weights.
        weights: "ema" or "raw".
        evaluations: counted network evaluations per image.
        n: number of samples.
        seconds: spent on this row, including measuring.
        ms_per_image: milliseconds of drawing per image.
        metrics: by name: `fd` and `kd`, Fréchet and kernel distance on the chosen features (`fid` and `kid` on
            Inception's); `fd_inf` (`fid_inf`), the first without its bias; `precision`, `recall`; `isc`, the Inception
            score; `clip`, the mean CLIP score of samples and prompts; `clip_data`, that of images of the data and their
            captions; `rmse`, `psnr`, `lsd` (of sounds, in dB) to the teacher from the same noise; `psnr_truth` to the
            images of the data whose condition images the samples were drawn from; `nearest`, the median distance of a
            sample to the nearest image of the data; `nearest_data`, the median distance of an image of the data to the
            nearest other one; both also with `_features`; `closest`, the smallest distance of any sample.
        guidance: the weight w of classifier-free guidance.
        closest: the samples nearest to an image of the data: sample number, image number, distance.
        is_time_doubtful: more evaluations of the same network took less time, even when measured again.
    """

    checkpoint: str
    checkpoint_fingerprint: str
    weights: str
    sampler: str
    grid: str
    num_steps: int
    evaluations: float
    n: int
    seed: int
    seconds: float
    ms_per_image: float
    metrics: dict[str, Metric] = field(default_factory=dict)
    guidance: float = 0.0
    closest: tuple[tuple[int, int, float], ...] = ()
    is_time_doubtful: bool = False


@dataclass(frozen=True)
class Scale:
    """Reference values for the Fréchet distances of samples: distances to the data without a model.

    Attributes:
        same: of other images of the data, as many as samples, so that of a perfect model.
        blurred: of images of the data, blurred by (1 2 1)/4 along the rows and columns that are compared; of sounds
            along the bands and the parts of the time.
        mean_image: of the repeated mean image: the trace of the data's covariance.
        noise: of pure noise.
        noun: what is compared: `image` or `sound`.
    """

    same: float
    blurred: float
    mean_image: float
    noise: float
    noun: str = "image"

    @property
    def good(self) -> float:
        """√(same · blurred): a distance below it has a smaller ratio to `same` than to `blurred`."""
        return math.sqrt(max(self.same * self.blurred, 0.0))

    def __str__(self) -> str:
        """`other images 0.17, blurred 7.9, mean image 18.6, noise 45`."""
        shown = (self.same, self.blurred, self.mean_image, self.noise)
        names = (f"other {self.noun}s", "blurred", f"mean {self.noun}", "noise")
        return ", ".join(f"{name} {value:.3g}" for name, value in zip(names, shown, strict=True))


@dataclass(frozen=True)
class Quality:
    """The quality of samples, in a word that follows from their distances and the `Scale`.

    `not trained yet`: not nearer to the data than blurred images. `memorises`: good, and the median distance of samples
    to their nearest images of the data is less than half of that between nearest images of the data.
    """

    distance: float
    scale: Scale
    nearest: float | None = None
    nearest_data: float | None = None

    @property
    def word(self) -> str:
        """`not trained yet`, `usable`, `good` or `memorises`."""
        if not self.distance < self.scale.blurred:
            return NOT_TRAINED
        if self.distance > self.scale.good:
            return "usable"
        if self.nearest is None or self.nearest_data is None or self.nearest >= self.nearest_data / 2:
            return "good"
        return "memorises"

    @property
    def short(self) -> str:
        """`good: distance to the data 0.21`."""
        text = f"{self.word}: distance to the data {self.distance:.3g}"
        if self.word == "memorises":
            noun = self.scale.noun
            text += f"; half of the samples are within {self.nearest:.3g} of {ARTICLES[noun]} {noun} of the data, "
            text += f"but the distance between nearest {noun}s of the data is {self.nearest_data:.3g}"
        return text

    def __str__(self) -> str:
        """`good: distance to the data 0.21 (other images 0.17, …)`."""
        return f"{self.short} ({self.scale})"


@dataclass(frozen=True)
class Evaluation:
    """Rows that one command measured against one dataset.

    Attributes:
        features: `pixels`, `inception`, or a feature network's file.
        device, date, command: where, when (ISO 8601) and with which command the rows were measured.
        pairs: file name of the picture of samples beside their nearest images, in the folder of this file, or None.
        teacher: the checkpoint that `rmse` and `psnr` compare with; empty if there is none.
        teacher_steps: its sampling steps.
        notes: notes for the reader of the metrics, one sentence each.
        job: the key of everything that determines the metrics.
        scale: the scale of Fréchet distances on pixels; None if there are none.
        prompts, negative_prompt: where the prompts of text-to-image models are from, and what guidance moves away from.
    """

    features: str
    device: str
    date: str
    command: str
    reference: Reference
    rows: tuple[EvalRow, ...]
    pairs: str | None = None
    teacher: str = ""
    teacher_steps: int | None = None
    notes: tuple[str, ...] = ()
    job: str = ""
    scale: Scale | None = None
    prompts: str = ""
    negative_prompt: str = ""
    vdiff_version: str = vdiff.__version__
    format: int = FORMAT

    def quality(self, row: EvalRow) -> Quality | None:
        """The quality of a row's samples; None if their distance has no scale."""
        if self.scale is None or "fd" not in row.metrics:
            return None
        names = (
            ["nearest", "nearest_data"] if "nearest" in row.metrics else ["nearest_features", "nearest_data_features"]
        )
        near = (row.metrics[name].value if name in row.metrics else None for name in names)
        return Quality(row.metrics["fd"].value, self.scale, *near)

    def to_json(self) -> str:
        """One JSON object; a value that is not finite becomes null."""
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            VdiffError: not JSON, another format, or keys are missing, unknown or of the wrong type.
        """
        try:
            values = parse(text)
            if isinstance(values, dict):
                if values.get("format") != FORMAT:
                    raise ValueError(f"its format is {values.get('format')!r}, but this vdiff reads {FORMAT}")
                if isinstance(values.get("rows"), list):
                    values["rows"] = list(map(with_infinity, values["rows"]))
            return record_of(cls, values, "it", AGAIN)
        except (ValueError, VdiffError) as error:
            cause = error.cause if isinstance(error, VdiffError) else error
            raise VdiffError(f"not an evaluation: {cause}", AGAIN) from None

    def write(self, path: Path) -> None:
        """Write the evaluation to `path`, whole or not at all.

        Raises:
            VdiffError: the file system refuses.
        """
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read the file of `write`.

        Raises:
            VdiffError: the file is missing or cannot be read.
        """
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise VdiffError(f"{path} cannot be read: {cause_of(error)}", AGAIN) from None
        try:
            return cls.from_json(text)
        except VdiffError as error:
            raise VdiffError(f"{path}: {error.cause}", error.hint) from None


def read_quality(folder: Path, fingerprint: str) -> Quality | None:
    """The result of `measure_quality` for the weights with this fingerprint; None if it is not known."""
    try:
        found = Evaluation.read(folder / QUALITY)
    except VdiffError:
        return None
    row = next(iter(found.rows), None)
    return found.quality(row) if row and row.checkpoint_fingerprint == fingerprint else None


EVALUATION = Kind("evaluation", lambda path: FILE if holds_keys(path, "reference", "rows", "vdiff_version") else "")


def plain(value: Any) -> Any:
    """The values, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def with_infinity(row: Any) -> Any:
    """The JSON object of a row, with infinity for metrics that are null: the PSNR of equal images."""
    if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict):
        return row
    metrics = {
        name: {**metric, "value": math.inf} if isinstance(metric, dict) and metric.get("value", 0) is None else metric
        for name, metric in row["metrics"].items()
    }
    return {**row, "metrics": metrics}
