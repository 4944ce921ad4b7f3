"""Command lines of the v-diffusion repositories, translated to vdiff; `--help` does not list their options.

python train.py --module celeba_u --name celeba --dname original --batch_size 1
python distillate.py --module celeba_u --name celeba --dname base_0 --base_checkpoint original/checkpoint.pt
python sample.py --module celeba_u --out_file images/x.png --checkpoint base_6/checkpoint.pt --batch_size 1
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vdiff.errors import OptionError, shell
from vdiff.projects import Project
from vdiff.records import CONFIG

MODULE, PRESET = "celeba_u", "celebahq256"
THEIRS = {
    "train": "module dname diffusion scheduler checkpoint_to_continue",
    "distill": "module dname diffusion scheduler checkpoint_to_continue base_checkpoint gamma",
    "sample": "module diffusion out_file",
    "prepare": "n_worker",
}
"""Options that only those repositories have, by command."""
DIFFUSIONS = ("GaussianDiffusion", "GaussianDiffusionDefault")
SCHEDULES = {"StrategyConstantLR": "constant", "StrategyLinearLR": "linear"}
PICKLES = (".pt", ".pth")


def translated(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command line; options of a v-diffusion repository become vdiff's.

    Raises:
        OptionError: vdiff has no such option; the hint names the alternative.
    """
    theirs = THEIRS.get(command, "").split()
    options = _options(words)
    if not any(name in theirs for name, _ in options):
        return list(words)
    given = {name: value for name, value in options if name}
    made: list[str] = []
    for name, value in options:
        if name in theirs or name in ("checkpoint", "num_workers"):
            made += _one(command, name, value, given)
        else:
            made += [f"--{name}"] * bool(name) + [value] * bool(value)
    if command == "sample" and "num" not in given:
        made += ["--num", given.get("batch_size", "1")]
    return made


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values; other words are values without a name."""
    found: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), value))
        elif found and found[-1][0] and not found[-1][1]:
            found[-1] = (found[-1][0], word)
        else:
            found.append(("", word))
    return found


def _one(command: str, name: str, value: str, given: dict[str, str]) -> list[str]:
    """vdiff's words for one of their options."""
    if name == "module":
        return _module(command, value, given)
    if name == "dname":
        return ["--out", str(Project(given.get("name", os.environ.get("VDIFF_NAME", ""))).checkpoints / value)]
    if name in ("checkpoint", "base_checkpoint"):
        folder = Path(value).parent
        is_folder = not Path(value).exists() and (folder / CONFIG).is_file()
        return ["--base" if name == "base_checkpoint" else "--checkpoint", str(folder if is_folder else Path(value))]
    if name == "num_workers":
        return [] if value == "-1" else ["--num_workers", value]
    if name == "out_file":
        return ["--out", str(Path(value))]
    if name == "n_worker":
        return ["--num_workers", value]
    if name == "diffusion":
        if value not in DIFFUSIONS:
            raise OptionError(f"--diffusion {value}: vdiff does not load your classes", "see --method and --sampler")
        return []
    if name == "scheduler":
        if value not in SCHEDULES:
            raise OptionError(f"--scheduler {value} is not in vdiff", "give --lr_schedule constant, linear or cosine")
        return ["--lr_schedule", SCHEDULES[value]]
    if name == "gamma":
        if value.strip("0.") or "0" not in value:
            raise OptionError(f"--gamma {value}: vdiff lacks this weighting", "choose another with --weighting")
        return ["--weighting", "snr_plus_one"]  # their error of v, per pixel
    raise OptionError(f"--{name}: vdiff continues its own runs", "leave it out, and give --resume to train.py")


def _module(command: str, value: str, given: dict[str, str]) -> list[str]:
    """Their network and dataset: only celeba_u has a preset in vdiff; vdiff's checkpoints contain theirs."""
    if value != MODULE and command == "sample":
        model = given.get("checkpoint", "FILE.pt")
        if Path(model).suffix in PICKLES and Path(model).is_file():
            line = f"vdiff import reference {shell(model)} --image_size PIXELS --attention_heads HEADS"
            raise OptionError(f"--module {value}: vdiff does not read networks in Python", f"import it first: {line}")
    elif value != MODULE:
        hint = "leave it out, and give --preset NAME or a table [unet] in --config FILE.toml"
        raise OptionError(f"--module {value}: vdiff does not read networks in Python", hint)
    return [] if command == "sample" or "preset" in given else ["--preset", PRESET]


def home_of(checkpoint: Path, project: Project) -> Path:
    """The folder of a checkpoint: students go beside it, samples into its project."""
    if checkpoint.suffix not in PICKLES:
        return checkpoint
    return checkpoint.parent if checkpoint.stem == "checkpoint" else project.checkpoints / checkpoint.stem


def imported(checkpoint: Path, say: Callable[[str], object]) -> Path:
    """A checkpoint's folder; a checkpoint.pt of those repositories is imported into the user's cache, keyed by content.

    Args:
        say: receives a line about what was assumed of a file.

    Raises:
        VdiffError: the file is not such a checkpoint.
    """
    if checkpoint.suffix not in PICKLES or not checkpoint.is_file():
        return checkpoint
    from filelock import FileLock

    from vdiff.evaluation.reference import cache_folder
    from vdiff.files import make_folder, sha256_of
    from vdiff.interop.reference import import_reference

    name = home_of(checkpoint.resolve(), Project()).name
    folder = cache_folder() / "imported" / sha256_of(checkpoint)[:16] / name
    with FileLock(make_folder(folder.parent) / ".lock"):  # of the processes of a launcher, one imports
        if not (folder / CONFIG).is_file():
            import_reference(checkpoint, folder)
    line = f"vdiff import reference {shell(checkpoint)} --image_size PIXELS --attention_heads HEADS"
    say(f"{checkpoint} is read as the network of {MODULE}: 256 pixels, 4 heads; for others: {line}")
    return folder
