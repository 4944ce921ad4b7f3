"""Files that one room writes and another reads: JSON objects become dataclasses with checked keys and values."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from vdiff.errors import VdiffError, suggestion
from vdiff.files import parse, read_json, read_text

T = TypeVar("T")
CONFIG, AVERAGE = "config.json", "average.json"
"""File names in a checkpoint's folder."""
RUN_FILE, STATE, VERDICT = "run.toml", "state/state.safetensors", "verdict.json"
SAMPLES_FOLDER, LOG_FOLDER, FAILED = "samples", "log", ".failed_"
LADDER, LADDER_PICTURE, LADDER_IMAGES = "ladder.json", "ladder.png", "ladder_images.png"
LADDER_SOUNDS = "ladder.html"
"""File names in a run's folder; the ladder's files are in the folder of its last student."""
WEB_PAGE = "web/index.html"
"""The page of `vdiff export web` beside the checkpoints of a ladder, to which its report links."""
KINDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
"""The types of JSON values: msgspec's names → the words of an error."""
BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
MISMATCH = re.compile(r"Expected `(?P<kinds>.+?)`(?: (?P<sign>[<>]=?) (?P<bound>\S+))?(?:, got .*)?")


@dataclass(frozen=True)
class LadderRow:
    """One model of a ladder, in `ladder.json`; None where the model was not drawn.

    Attributes:
        seed: of the comparison's noise.
        train_seconds: of its own training.
        ms_per_image: milliseconds to draw one image in the batch of the comparison.
        rmse_to_teacher: `vdiff.models.drawing.rmse` of a student to its teacher: its verdict's if it has one, else over
            the images of the comparison.
        rmse_to_first: the RMSE to the first model, over the images of the comparison.
        distance: to the data, if a verdict measured it.
        is_time_doubtful: more evaluations of the same network took less time, even when measured again.
        prompts: SHA-256 of the prompts of the comparison; empty for a model without prompts.
    """

    checkpoint: str
    num_steps: int
    seed: int = -1
    num_iters: int = 0
    train_seconds: float = 0.0
    ms_per_image: float | None = None
    rmse_to_teacher: float | None = None
    rmse_to_first: float | None = None
    distance: float | None = None
    kept_start: bool = False
    is_time_doubtful: bool = False
    prompts: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """The folder's name, and the steps."""
        return Path(self.checkpoint).name, self.num_steps


def read_ladder_rows(path: Path) -> list[LadderRow]:
    """The rows of `ladder.json`, from the first teacher to the last student.

    Raises:
        OSError, ValueError: the file is missing or holds something else.
    """
    import msgspec

    return msgspec.convert(parse(read_text(path)), list[LadderRow])


def read_record(path: Path, kind: type[T], advice: str) -> T:
    """The dataclass that a JSON file from an untrusted source describes.

    Raises:
        VdiffError: the file cannot be read (see `files.read_json`) or does not fit `kind` (see `record_of`).
    """
    return record_of(kind, read_json(path, advice), str(path), advice)


def record_of(kind: type[T], values: object, where: str, advice: str, *, needed: Collection[str] = ()) -> T:
    """The object `values` from JSON or TOML as the dataclass `kind`; only lists and floats are converted.

    Bounds are annotations: `Annotated[int, msgspec.Meta(ge=1)]`.

    Args:
        where: the name of the file in an error.
        advice: the error's hint.
        needed: keys that must be present although their fields have defaults.

    Raises:
        VdiffError: a key is unknown or missing, or a value has the wrong type or is out of bounds.
    """
    import msgspec

    if not isinstance(values, dict):
        raise VdiffError(f"{where} is not a JSON object", advice)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            hint = suggestion(str(key), known, only_near=True) or advice
            raise VdiffError(f"{where} has an unknown key {key!r}", hint)
    required = {key for key, item in known.items() if item.default is MISSING and item.default_factory is MISSING}
    if missing := sorted((required | set(needed)) - values.keys()):
        raise VdiffError(f"{where} lacks the key {', '.join(map(repr, missing))}", advice)
    try:
        record = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise VdiffError(f"{where}: {_reason(str(error), values)}", advice) from None
    if unknown := next(_unknown(values, record), ""):
        raise VdiffError(f"{where} has an unknown key {unknown!r}", advice)
    return record


def check_same_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    done: str,
    hint: Callable[[str], str],
    but: Collection[str] = (),
    error: type[VdiffError] = VdiffError,
) -> None:
    """Refuse to continue work that was begun with other settings.

    Args:
        before, now: the settings by name, as JSON values.
        done: the beginning of the message, such as `data/x holds images drawn`.
        hint: maps the name of the differing setting to the error's hint.
        but: settings that may differ.

    Raises:
        error: names the first setting that differs, and its two values.
    """
    for name in {**before, **now}:
        if name not in but and before.get(name) != now.get(name):
            was, wanted = ("none" if value in ("", None) else value for value in (before.get(name), now.get(name)))
            raise error(f"{done} with {name} {was}, not {wanted}", hint(name))


def _reason(message: str, values: Any) -> str:
    """The error of msgspec in plain words: `'image_size' must be at least 1, not -8`."""
    reason, _, place = message.partition(" - at `$.")
    place = place.rstrip("`")
    found = MISMATCH.fullmatch(reason)
    if found is None:
        return f"{place!r}: {reason}"
    if found["sign"]:
        for part in re.findall(r"[^.\[\]]+", place):
            values = values[int(part) if isinstance(values, list) else part] if part != "..." else next(iter(values))
        bound = float(found["bound"])
        shown = f"{bound:.0f}" if bound.is_integer() else f"{bound:g}"
        return f"{place!r} must be {BOUNDS[found['sign']]} {shown}, not {reprlib.repr(values)}"
    kinds = " or ".join(KINDS.get(name, name) for name in found["kinds"].split(" | "))
    if item := re.fullmatch(r"(.*)\[\d+\]", place):
        place, kinds = item[1], f"a list of {kinds.removeprefix('a ').removeprefix('an ')}s"
    return f"{place!r} must be {kinds}"


def _unknown(values: Any, record: Any) -> Iterator[str]:
    """Keys of nested objects in `values` that their dataclasses lack; msgspec ignores them."""
    if is_dataclass(record):
        yield from values.keys() - {item.name for item in fields(record)}
        for key, value in values.items():
            yield from _unknown(value, getattr(record, key, None))
    elif isinstance(record, dict):
        for key, value in values.items():
            yield from _unknown(value, record[key])
    elif isinstance(record, list | tuple):
        for value, item in zip(values, record, strict=False):  # a record may shorten a list that repeats itself
            yield from _unknown(value, item)
