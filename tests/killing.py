"""Commands that are killed, each at up to a number of its file operations.

Every command runs in a fork of this process, where an audit hook ends it without a word before one of its operations on
files: opening to write, renaming, removing, linking, making a folder. Then the same command runs again. Printed are the
number of kills, and the cases that do not end with the files of a command that was never killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import PIL.Image

import vdiff.cli.ema
import vdiff.cli.evaluate
import vdiff.cli.export
import vdiff.cli.report
import vdiff.data.datasets
import vdiff.data.preparation
import vdiff.evaluation.measure
import vdiff.interop.hub
import vdiff.report.page  # noqa: F401 - all that is slow to import, once and not in every fork
from tests.commands import TINY, run, tree

EVENTS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
    "sqlite3.connect",
}
TRAIN = "train.py --config tiny.toml --out new --keep_every 2 --seed 1"
DISTILL = (
    "distill.py --config tiny.toml --base checkpoints/original --stages 1 --check_images 0 --out checkpoints/base_0"
)
SAMPLE = "sample.py --checkpoint checkpoints/original --num_timesteps 2 --num 5 --batch_size 3"
EVALUATE = (
    "vdiff evaluate checkpoints/original --data data/toy --num 32 --num_timesteps 2 --cache cache --out figures.json"
)
COMMANDS = {
    "prepare": "prepare_data.py photos --size 4 --out new --num_workers 0",
    "merge": "vdiff data merge parts/x.1of2 parts/x.2of2 --out new",
    "train": TRAIN,
    "distill": DISTILL,
    **{form: f"{SAMPLE} --format {form} --out new.{form}" for form in ("zip", "npz", "lmdb")},
    "png": f"{SAMPLE} --out new --trajectory",
    "ema": "vdiff ema checkpoints/original --decay 0.5 --out new",
    "weights": "vdiff export weights checkpoints/original new",
    "evaluate": EVALUATE,
    "report": "vdiff report --out page.html",
}
BEFORE = {
    "train": "train.py --config tiny.toml --out new",
    "png": f"{SAMPLE} --out new --seed 4",
    "evaluate": f"{EVALUATE} --seed 4",
    **{form: f"{SAMPLE} --format {form} --out new.{form} --seed 4" for form in ("zip", "npz", "lmdb")},
}
"""What makes the output that `--overwrite` replaces, where it is not the same command."""
TIMED = re.compile(r"(.*/)?((log|state)/.*|config\.json|ladder.*|figures\.json|(page|report)\.html|README\.md)")
"""Files that tell a time, or the name of one."""
UNKEPT = re.compile(r"cache/|(new|checkpoints/base_0)/samples/")
"""What may differ: the last picture of a run is drawn when all of it is saved."""


def forked(place: Path, act: Callable[[], int]) -> int:
    """The number of a process of its own that does `act` in the folder `place`."""
    pid = os.fork()
    if pid == 0:
        os.chdir(place)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            os._exit(act())
        finally:
            os._exit(70)
    return pid


def code_of(pid: int) -> int:
    """The exit code of a process, at its end."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def do(line: str, place: Path, note: Path | None = None, last: int = 0) -> int:
    """Run a command, killed before its file operation number `last` (0: never); how many it has goes to `note`."""

    def act() -> int:
        count, root = 0, os.getcwd()

        def hook(event: str, words: tuple[object, ...]) -> None:
            nonlocal count
            if event == "open":
                path, _, flags = words
                if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                    return
                if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(
                    root
                ):
                    return
            elif event not in EVENTS:
                return
            count += 1
            if count == last:
                os._exit(9)

        if note is not None or last:
            sys.addaudithook(hook)
        result = run(line)
        if note is not None:
            note.write_text(str(count))
        if result.exit_code and os.environ.get("KILLING_SHOWS"):
            print(place.name, line, result.output[-600:], repr(result.exception))
        return result.exit_code

    return code_of(forked(place, act))


def found(place: Path) -> dict[str, bytes | None]:
    """All files; those that tell a time without what they hold."""
    held = {re.sub(r"tfevents\..*", "tfevents", name): data for name, data in tree(place).items()}
    return {name: None if TIMED.fullmatch(name) else data for name, data in held.items() if not UNKEPT.match(name)}


def furnish(place: Path) -> None:
    """Photographs, a dataset, two parts of one, and a model with snapshots of its averages."""
    place.mkdir(parents=True)
    (place / "tiny.toml").write_text(TINY)
    (place / "photos").mkdir()
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 6), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(place / "photos" / f"{index:04d}.png")
    (place / "photos" / "text.png").write_text("text")
    prepare = "prepare_data.py photos --size 4 --channels 1 --num_workers 0"
    codes = [do(f"{prepare} --out data/toy", place)]
    codes += [do(f"{prepare} --shard {k}/2 --out parts/x.{k}of2", place) for k in (1, 2)]
    codes.append(do("train.py --config tiny.toml --ema_more 0.5 --data data/toy", place))
    assert codes == [3, 3, 0, 0] or codes == [3, 0, 3, 0], codes


def again(line: str, place: Path) -> int:
    """Give the command again; one that was told not to replace a run goes on with it."""
    code = do(line, place)
    if code and line == TRAIN and (place / "new" / "run.toml").exists():
        code = do(f"{line} --resume", place)
    return code


def main(folder: Path, most: int, *, both: bool, names: Collection[str] = COMMANDS) -> None:
    """Print the number of kills and the cases that went wrong.

    Args:
        both: each command with and without `--overwrite`; else with it or without it, in turn.
        names: the commands to try.
    """
    root = folder.resolve()
    furnish(root / "furnished")
    kills, wrong = 0, []
    for number, (name, command) in enumerate(COMMANDS.items()):
        if name not in names:
            continue
        for overwrite in (False, True) if both and name != "report" else (bool(number % 2) and name != "report",):
            line = f"{command} --overwrite" if overwrite else command
            case = f"{name}{'_overwrite' if overwrite else ''}"
            start = root / case
            shutil.copytree(root / "furnished", start)
            if overwrite:
                do(BEFORE.get(name, command), start)
            whole = root / f"{case}_whole"
            shutil.copytree(start, whole)
            expected = do(line, whole, root / "count")
            assert expected in (0, 3), (line, expected)
            count = int((root / "count").read_text())
            twice = root / f"{case}_twice"
            shutil.copytree(start, twice)
            pids = [forked(twice, lambda line=line: run(line).exit_code) for _ in range(2)]  # type: ignore[misc]
            codes = [code_of(pid) for pid in pids]
            if expected not in codes or not set(codes) <= {expected, 1} or found(twice) != found(whole):
                wrong.append([case, "two at once", codes, sorted(found(twice).keys() ^ found(whole).keys())[:5]])
            step = max(count / most, 1)
            for last in sorted({round(1 + k * step) for k in range(int(count / step))}):
                place = root / f"{case}_{last}"
                shutil.copytree(start, place)
                if do(line, place, last=last) == 9:
                    kills += 1
                    code = again(line, place)
                    same = found(place) == found(whole)
                    if not same or (code != expected and code != 1):
                        differing = {
                            k
                            for k in found(place).keys() | found(whole).keys()
                            if found(place).get(k, 0) != found(whole).get(k, 0)
                        }
                        wrong.append([case, last, count, code, sorted(differing)[:5]])
                shutil.rmtree(place)
            print(case, count, kills, file=sys.stderr, flush=True)
    print(json.dumps({"kills": kills, "wrong": wrong}))
