"""What a ladder left on the disk: models, verdicts, logs and pictures, read by the names of their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdiff.errors import VdiffError
from vdiff.evaluation.results import FILE as EVALUATION
from vdiff.evaluation.results import Evaluation
from vdiff.files import parse, read_json, read_text
from vdiff.models.checkpoint import CONFIG, WEIGHTS, CheckpointConfig, read_config, weights_fingerprint
from vdiff.text import cause_of

RUN_FILE, VERDICT, COMPARISON = "run.toml", "verdict.json", "ladder.json"
PICTURE, IMAGES, SAMPLES = "ladder.png", "ladder_images.png", "samples"
FAILED = re.compile(r".*\.failed_\d+")
AGAIN = "move it away: the same distill.py command writes it again"


@dataclass(frozen=True)
class Model:
    """One model of a ladder: the first teacher, or a student.

    Attributes:
        name: of its folder, as the ladder called it.
        folder: None where only what its student says of it is left.
        description: its `config.json`, without that of its teacher.
        fingerprint: SHA-256 of its weights; empty where nobody knows.
        verdict: what was found of it after its stage; empty where nothing was.
        settings: its `run.toml`.
    """

    name: str
    folder: Path | None
    description: Mapping[str, Any]
    fingerprint: str
    verdict: Mapping[str, Any]
    settings: str

    @property
    def steps(self) -> int:
        """The steps that it samples with by default."""
        return int(self.description["num_timesteps"])

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the others: a student that stays as it began has its teacher's weights."""
        return self.fingerprint, self.steps

    def number(self, key: str) -> float:
        """A number of its description, 0 where there is none."""
        value = self.description.get(key)
        return value if isinstance(value, int | float) else 0


@dataclass(frozen=True)
class Compared:
    """A model drawn from the noise that all models of the ladder were drawn from; a line of `ladder.json`.

    A model that was not drawn has no figures.
    """

    name: str
    steps: int
    ms_per_image: float | None
    rmse_to_teacher: float | None
    rmse_to_first: float | None
    is_time_doubtful: bool = False


@dataclass(frozen=True)
class LadderRun:
    """All that a report tells of.

    Attributes:
        folder: that was asked for.
        root: that holds the ladder; the same, unless one checkpoint was asked for.
        models: the first teacher, then its students in their order.
        compared: what was drawn from the same noise; empty where nothing was.
        images: the picture of those drawings, a row for each of `compared`; None where there is none.
        picture: the same with captions, as `distill.py` writes it.
        samples: the newest grid of samples of the last model.
        evaluation: of these and other models; None where none was made.
        pairs: samples beside their nearest images of the data.
        others: the last students of other ladders in the folder.
    """

    folder: Path
    root: Path
    models: tuple[Model, ...]
    compared: tuple[Compared, ...]
    images: Path | None
    picture: Path | None
    samples: Path | None
    evaluation: Evaluation | None
    pairs: Path | None
    others: tuple[Path, ...]

    @property
    def first(self) -> Model:
        """The first teacher."""
        return self.models[0]

    @property
    def last(self) -> Model:
        """The student at the end; the first teacher, where nothing was distilled."""
        return self.models[-1]

    @property
    def students(self) -> tuple[Model, ...]:
        """All but the first."""
        return self.models[1:]


def read_ladder(folder: Path, *, last: Path | None = None) -> LadderRun:
    """The ladder in `folder`: one that holds checkpoints, or the checkpoint at a ladder's end.

    Where several ladders lie together, it is the one whose last student was written last; the others are named.

    Args:
        last: the last student of the ladder that is meant.

    Raises:
        VdiffError: no such folder, no checkpoint in it, or a file that cannot be read.
    """
    if not folder.exists():
        raise VdiffError(f"{folder}: no such folder", "give the one that holds original, base_0, base_1 …")
    if not folder.is_dir():
        raise VdiffError(f"{folder} is a file", "give the folder that holds original, base_0, base_1 …")
    root = folder
    if (folder / CONFIG).is_file():
        last, root = folder, folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    found = {path: read_config(path) for path in _checkpoints(root)}
    if not found:
        raise VdiffError(f"{folder} holds no checkpoint", "run `python train.py` first, or give another folder")
    fingerprints = {path: weights_fingerprint(path) for path in found}
    ends = _ends(found, fingerprints)
    chosen = _same(last, ends) if last else None
    if last and chosen is None:
        chosen = _same(last, list(found)) or last
    chosen = chosen or ends[-1]
    models = _lineage(chosen, found, fingerprints)
    holder = models[-1].folder or chosen
    compared = _compared(holder / COMPARISON)
    evaluation = next((Evaluation.read(path) for path in _either(folder, root, EVALUATION)), None)
    pairs = _either(folder, root, Path(evaluation.pairs).name) if evaluation and evaluation.pairs else []
    return LadderRun(
        folder=folder,
        root=root,
        models=models,
        compared=compared,
        images=_file(holder / IMAGES) if compared else None,
        picture=_file(holder / PICTURE),
        samples=max((holder / SAMPLES).glob("*.png"), default=None),
        evaluation=evaluation,
        pairs=pairs[0] if pairs else None,
        others=tuple(path for path in ends if path != chosen),
    )


def _checkpoints(root: Path) -> list[Path]:
    """The folders below `root` that hold a checkpoint; students set aside are none."""
    folders = (path.parent for path in root.glob(f"*/{CONFIG}"))
    return sorted(path for path in folders if not FAILED.fullmatch(path.name) and not path.name.startswith("."))


def _ends(found: Mapping[Path, CheckpointConfig], fingerprints: Mapping[Path, str]) -> list[Path]:
    """The checkpoints that no other was distilled from, in the order of their time; students after all base models."""
    teachers = [config.teacher or {} for config in found.values()]
    # a student that stays as it began has its teacher's weights, and other steps
    known = {(str(teacher.get("fingerprint")), teacher.get("num_timesteps")) for teacher in teachers}
    ends = [path for path in found if (fingerprints[path], found[path].num_timesteps) not in known]

    def age(path: Path) -> tuple[bool, int, str]:
        return found[path].teacher is not None, (path / CONFIG).stat().st_mtime_ns, str(path)

    return sorted(ends, key=age)


def _same(path: Path, among: Sequence[Path]) -> Path | None:
    return next((other for other in among if other.resolve() == path.resolve()), None)


def _lineage(last: Path, found: Mapping[Path, CheckpointConfig], fingerprints: Mapping[Path, str]) -> tuple[Model, ...]:
    """The models from the first teacher to `last`; a teacher is known by its weights and steps, wherever it lies."""
    config = found[last] if last in found else read_config(last)
    fingerprint = fingerprints[last] if last in found else weights_fingerprint(last)
    models = [_model(last.name, last, vars(config), fingerprint)]
    teacher = config.teacher
    while teacher:
        wanted, path = str(teacher.get("fingerprint") or ""), Path(str(teacher.get("path") or "?"))
        same = [other for other in found if wanted and fingerprints[other] == wanted]
        steps = teacher.get("num_timesteps")
        folder = next((other for other in same if found[other].num_timesteps == steps), same[0] if same else None)
        if folder is None and wanted and (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            folder = path if weights_fingerprint(path) == wanted else None
        models.append(_model(folder.name if folder else path.name, folder, teacher, wanted))
        teacher = teacher.get("teacher")
    return tuple(reversed(models))


def _model(name: str, folder: Path | None, description: Mapping[str, Any], fingerprint: str) -> Model:
    steps = description.get("num_timesteps")
    if not isinstance(steps, int) or steps < 1:  # a teacher's description is written by others than its own run
        raise VdiffError(f"{name}: the description of a teacher tells no number of steps", "restore the student")
    own = {key: value for key, value in description.items() if key not in ("teacher", "path", "fingerprint")}
    verdict = read_json(folder / VERDICT, AGAIN) if folder and (folder / VERDICT).is_file() else {}
    return Model(name, folder, own, fingerprint, verdict, _text(folder / RUN_FILE) if folder else "")


def _compared(path: Path) -> tuple[Compared, ...]:
    """The lines of `ladder.json`.

    Raises:
        VdiffError: it is there, and cannot be read.
    """
    if not path.is_file():
        return ()
    try:
        return tuple(
            Compared(
                name=Path(str(row["checkpoint"])).name,
                steps=int(row["num_steps"]),
                ms_per_image=_number(row["ms_per_image"]),
                rmse_to_teacher=_number(row.get("rmse_to_teacher")),
                rmse_to_first=_number(row.get("rmse_to_first")),
                is_time_doubtful=row.get("is_time_doubtful") is True,
            )
            for row in parse(_text(path))
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VdiffError(f"{path} holds no comparison: {type(error).__name__} {error}", AGAIN) from None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(path: Path) -> str:
    """A text file; empty where there is none.

    Raises:
        VdiffError: it cannot be read.
    """
    if not path.is_file():
        return ""
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise VdiffError(f"{path} cannot be read: {cause_of(error)}", AGAIN) from None


def _either(folder: Path, root: Path, name: str) -> list[Path]:
    """The files of that name in the folder that was given, then in the one that holds the ladder."""
    return [path for path in dict.fromkeys((folder / name, root / name)) if path.is_file()]


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None
