"""Where a project keeps datasets, models and samples, and which of them a command uses by default.

--name photos:   data/photos_64   checkpoints/photos/original, base_0, …   samples/photos/…
without a name:  data/…           checkpoints/original, base_0, …          samples/…
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdiff.data.store import PARTIAL_SUFFIX, incomplete, is_dataset
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.files import elsewhere
from vdiff.records import AVERAGE, CONFIG, FAILED, RUN_FILE

DATA, CHECKPOINTS, SAMPLES, ORIGINAL = Path("data"), Path("checkpoints"), Path("samples"), "original"
OF_MODELS = re.compile(rf"{ORIGINAL}|base_\d+")
SHOWN = 12
"""How many models a message lists at most."""
PIPELINE = "model_index.json"
"""The file in the folder of a pipeline of diffusers."""


@dataclass(frozen=True)
class Project:
    """The project called `name`; an empty name means the shared folders of all work without a name.

    Raises:
        OptionError: the name is not valid.
    """

    name: str = ""

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise OptionError(f"--name {self.name!r}: not a valid project name", "use only letters, digits, _, - and .")
        if OF_MODELS.fullmatch(self.name) or (self.name and (self.checkpoints / CONFIG).is_file()):
            raise OptionError(f"--name {self.name}: {self.checkpoints} is a model's folder", "give another name")

    @property
    def checkpoints(self) -> Path:
        """The folder of its models."""
        return CHECKPOINTS / self.name

    @property
    def original(self) -> Path:
        """Its base model."""
        return self.checkpoints / ORIGINAL

    @property
    def samples(self) -> Path:
        """The folder of its samples."""
        return SAMPLES / self.name

    @property
    def _flag(self) -> str:
        return f" --name {self.name}" if self.name else ""

    @classmethod
    def of_model(cls, folder: Path) -> Project:
        """The project of a model's folder; the one without a name for models elsewhere."""
        above = folder.resolve().parent
        return cls(above.name if above.parent == CHECKPOINTS.resolve() else "")

    def new_dataset(self, source: str, sizes: tuple[int, ...]) -> Path:
        """`data/NAME_64`, or `data/NAME_64_128` for several sizes; without a name, the source's name is used."""
        return DATA / "_".join([self.name or source, *map(str, sizes)])

    def name_beside(self, dataset: Path) -> str:
        """The project for a new dataset: this one, or one named after the dataset if this one has a base model."""
        if self.name or not (self.original / CONFIG).is_file():
            return self.name
        name = re.sub(r"(_\d+)+$", "", dataset.name)
        return name if re.fullmatch(r"\w[\w.-]*", name) else ""

    def datasets(self) -> list[Path]:
        """Its datasets, finished and unfinished."""
        mine = rf"{re.escape(self.name)}(_\d+)*(\.tar)?({re.escape(PARTIAL_SUFFIX)})?"
        named = re.compile(mine if self.name else ".*")
        found = [path for path in sorted(DATA.glob("*")) if not path.name.startswith(".")]
        return [path for path in found if named.fullmatch(path.name) and (is_dataset(path) or _is_partial(path))]

    def dataset(self) -> Path:
        """Its only dataset.

        Raises:
            VdiffError: there is none, or there are several.
        """
        found = [path for path in self.datasets() if not _is_partial(path)]
        if not found and (unfinished := self.datasets()):
            raise incomplete(unfinished[0])
        if len(found) > 1:
            raise VdiffError(f"{DATA}/ holds several datasets", f"choose with --data: {', '.join(map(str, found))}")
        if found:
            return found[0]
        if not self.name:
            raise VdiffError(
                f"no dataset under {DATA}/",
                "make one: python prepare_data.py, or python prepare_data.py FOLDER_OF_IMAGES",
            )
        others = [path for path in [*Path().glob(f"{self.name}_*"), *Project().datasets()] if is_dataset(path)]
        hint = f"make one: python prepare_data.py FOLDER_OF_IMAGES --name {self.name}"
        choice = f", or choose with --data: {', '.join(map(str, others))}" if others else ""
        raise VdiffError(f"{DATA}/ holds no dataset of the project {self.name}", hint + choice)

    def dataset_of(self, recorded: str) -> str:
        """The dataset that a model was trained on, as its checkpoint records it; if it is gone, the only dataset.

        Raises:
            VdiffError: it is gone, and there is not exactly one other.
        """
        return recorded if "://" in recorded or (recorded and Path(recorded).exists()) else str(self.dataset())

    def newest(self, say: Callable[[str], object]) -> Path:
        """The model that was written last; a model made by `vdiff ema` only if there is no other.

        Args:
            say: receives two lines if there are several models: the choice, and the others.

        Raises:
            VdiffError: there is none.
        """
        if found := models_in(self.checkpoints):
            newest = max(found, key=_age)
            if others := [path.name for path in found if path != newest]:
                say(f"{newest} is the newest model in {self.checkpoints}/")
                say(f"others: {_listed(others)}")
            return newest
        inside = sorted({path.parent.name for path in _below(self.checkpoints)})
        ways = [f"give --name {name}" for name in inside] or [
            f"run `python train.py{self._flag}` first, or give --checkpoint"
        ]
        raise VdiffError(f"no checkpoint under {self.checkpoints}/", ", or ".join(ways))

    def teacher(self, say: Callable[[str], object]) -> Path:
        """The base model of the project.

        Args:
            say: receives a line about other possible teachers: models that are not students of this one.

        Raises:
            VdiffError: there is none.
        """
        if not self.original.is_dir() and (found := [*models_in(self.checkpoints), *_below(self.checkpoints)]):
            hint = f"choose the teacher with --base: {_listed(found)}"
            raise VdiffError(f"{self.original}: no such checkpoint", hint)
        check_checkpoint(self.original, self)
        others = [path for path in models_in(self.checkpoints) if not OF_MODELS.fullmatch(path.name)]
        others += [] if self.name else [path for path in _below(self.checkpoints) if path.name == ORIGINAL]
        if others:
            say(f"the teacher is {self.original}; --base chooses another: {_listed(others)}")
        return self.original

    def students_beside(self, teacher: Path) -> Path:
        """The path that gives students their names and folder: the teacher's, or one in the named project."""
        return self.checkpoints / teacher.name if self.name else teacher

    def inside(self, path: Path) -> Path:
        """A path from the command line; `base_5` may be the name of a checkpoint in the project."""
        found = self.checkpoints / path
        return found if len(path.parts) == 1 and not path.exists() and (self.name or found.is_dir()) else path

    def first_step(self) -> str:
        """The hint for a project without models: how to train one, and which other projects have one."""
        names = sorted({path.parent.name for path in _below(CHECKPOINTS)} - {self.name}) if self.name else []
        choice = f", or choose with --name: {_listed(names)}" if names else ""
        return f"run `python train.py{self._flag}` first{choice}"


def models_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, `base_9` before `base_10`, without students that were set aside."""
    found = (path.parent for path in folder.glob(f"*/{CONFIG}"))
    shown = [path for path in found if FAILED not in path.name and not path.name.startswith(".")]
    return sorted(shown, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(9), path.name))


def check_checkpoint(folder: Path, project: Project | None = None) -> None:
    """Check that a checkpoint is at `folder`, without reading it.

    Args:
        project: the command's project.

    Raises:
        VdiffError: `folder` is missing or not a checkpoint; the error lists checkpoints nearby.
    """
    if not folder.exists():
        beside = _listed([path.name for path in models_in(folder.parent)])
        hint = f"{folder.parent} holds {beside}" if beside else (project or Project()).first_step()
        raise VdiffError(f"{folder}: no such checkpoint", elsewhere(folder) or hint)
    if not folder.is_dir():
        inside = folder.parent if (folder.parent / CONFIG).is_file() else None
        which = shell(inside) if inside else "the one that holds config.json"
        if folder.suffix == ".safetensors" and inside is None:
            raise VdiffError(f"{folder} is a file of weights", _how_to_import(folder))
        raise VdiffError(f"{folder} is a file", f"give the checkpoint's folder, {which}")
    if (folder.parent / PIPELINE).is_file() and folder.name != "vdiff":  # where an export leaves its description
        raise VdiffError(f"{folder} is a part of a pipeline of diffusers", _how_to_import(folder.parent))
    if not (folder / CONFIG).is_file():
        if (folder / PIPELINE).is_file():
            raise VdiffError(f"{folder} is a pipeline of diffusers", _how_to_import(folder))
        if (folder / RUN_FILE).is_file():
            raise VdiffError(f"{folder} is a run that has saved no checkpoint yet", "wait until it has, or resume it")
        found = models_in(folder) or _below(folder)
        listed = _listed([path.relative_to(folder).as_posix() for path in found])
        hint = "give a folder that train.py or distill.py wrote"
        if found:
            hint = f"give one of the checkpoints in it: {listed}; the newest is {shell(max(found, key=_age))}"
        raise VdiffError(f"{folder} holds no {CONFIG}", hint)


def _how_to_import(source: Path) -> str:
    """The command that makes a checkpoint of a model of diffusers."""
    return f"import it: {shell('vdiff', 'import', 'diffusers', source, '--out', 'checkpoints/NAME')}"


def _age(model: Path) -> tuple[bool, int, str]:
    """The sort key of which the newest model has the largest."""
    return not (model / AVERAGE).exists(), (model / CONFIG).stat().st_mtime_ns, str(model)


def _below(folder: Path) -> list[Path]:
    """The checkpoints in the subfolders of a folder, which are projects."""
    return [model for inside in sorted(folder.glob("*/")) for model in models_in(inside)]


def _listed(names: Sequence[object]) -> str:
    """Names, as a message lists them."""
    return ", ".join(map(str, names[:SHOWN])) + ", …" * (len(names) > SHOWN)


def _is_partial(path: Path) -> bool:
    """Whether a folder belongs to an unfinished dataset."""
    return path.name.endswith(PARTIAL_SUFFIX)
