"""Two processes draw what one draws."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests import together
from tests.commands import done
from tests.programs import ends, launch
from tests.toy import contents, write_checkpoint
from vdiff.distributed import join
from vdiff.errors import VdiffError


@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_draw_as_one(tmp_path, monkeypatch):
    """The same bytes in every kind of output, shares of both, one result; what fails in one process fails in both."""
    write_checkpoint(tmp_path / "model", channels=3, classes=3)
    codes, stdout, stderr = ends(launch(together.main, tmp_path))
    assert codes == [0, 0], stderr
    first, *lines = stdout.splitlines()
    result = json.loads(first)
    assert (result["num"], result["drawn"], result["processes"], result["evaluations"]) == (11, 11, 2, 8)
    assert [line.split()[0] for line in lines] == [
        "11",
        "picture",
        "11",
        "picture",
        *["trajectory"] * 2,
        "two.npz",
        "picture",
    ]
    assert "two.npz: 6/6 images" in stderr  # batches 0, 2 and 4 of six, the last of which has one image
    assert stderr.count("two.npz: ") == 1
    for number in (0, 1):
        rank, count, heard = json.loads((tmp_path / f"heard_{number}.json").read_text())
        assert (rank, count) == (str(number), 2)
        assert heard == [["OptionError", f"process {k} fails", "mend it"] for k in (1, 0)]
    monkeypatch.chdir(tmp_path)
    one = "sample.py --checkpoint model --num 11 --batch_size 2 --out one"
    for name, words in (("two.npz", ""), ("two", ""), ("two.lmdb", "--batch_size 20 --trajectory")):
        done(f"{one}/{name} {words}")
        alone = {path.name: path for path in (tmp_path / "one").iterdir()}
        assert name in alone
        for found in alone.values():
            if found.is_dir():
                assert contents(found) == contents(tmp_path / found.name)
            else:
                assert found.read_bytes() == (tmp_path / found.name).read_bytes()


def test_one_process_needs_no_launcher(monkeypatch):
    """And does not load Accelerate."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    alone = join("cpu")
    with alone.together():
        assert (alone.world_size, alone.is_main, alone.share([1, 2])) == (1, True, [1, 2])
    with pytest.raises(VdiffError, match="cause; hint"), alone.together():
        raise VdiffError("cause", "hint")
