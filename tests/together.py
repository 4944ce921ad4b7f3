"""What processes that a launcher started do together: `torchrun … -m tests.together`, in a folder with `model`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vdiff.cli import sample
from vdiff.distributed import join
from vdiff.errors import OptionError, VdiffError


def main() -> None:
    """Draw into outputs of several kinds, then fail, in one process alone."""
    for line in ("--out two.npz --json", "--out two", "--out two.lmdb --batch_size 20 --trajectory", "--out two.npz"):
        words = ["--checkpoint", "model", "--num", "11", "--batch_size", "2", "--device", "cpu", *line.split()]
        sample.command.main(words, standalone_mode=False)
    processes = join("cpu")
    heard = []
    for failing in (1, 0, None):
        try:
            with processes.together():
                if processes.rank == failing:
                    raise OptionError(f"process {failing} fails", "mend it")
        except VdiffError as error:
            heard.append([type(error).__name__, error.cause, error.hint])
    Path(f"heard_{processes.rank}.json").write_text(json.dumps([os.environ["RANK"], processes.world_size, heard]))


if __name__ == "__main__":
    main()
