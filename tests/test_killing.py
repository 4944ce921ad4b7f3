"""Killed before any of its operations on files, every command that writes ends the same when it is given again."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest

from tests import killing
from tests.programs import Forked, ends

MOST = int(os.environ.get("KILLS", "5"))
"""Of each command, for the slow test; `KILLS=1000` takes all of its operations, some 600 in all."""


@pytest.mark.skipif(os.name == "nt", reason="fork")
@pytest.mark.parametrize(
    ("names", "most", "least"),
    [(["prepare", "train", "png"], 3, 9), pytest.param(killing.COMMANDS, MOST, 60, marks=pytest.mark.slow)],
    ids=["three commands", "all commands"],
)
def test_killed_before_any_operation_on_files_the_same_command_ends_the_same(tmp_path, names, most, least):
    program = Forked(partial(killing.main, tmp_path, most, both=most == MOST, names=list(names)), tmp_path)
    (code,), stdout, stderr = ends([program], 1800)
    assert code == 0, stderr[-3000:]
    found = json.loads(stdout)
    assert found["wrong"] == []
    assert found["kills"] >= least
