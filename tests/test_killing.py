"""Killed before any of its operations on files, every command that writes ends the same when it is given again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.commands import ROOT

MOST = os.environ.get("KILLS", "5")
"""Of each command, for the slow test; `KILLS=1000` takes all of its operations, some 600 in all."""


@pytest.mark.skipif(os.name == "nt", reason="fork")
@pytest.mark.parametrize(("most", "least"), [("3", 40), pytest.param(MOST, 60, marks=pytest.mark.slow)])
def test_killed_before_any_operation_on_files_the_same_command_ends_the_same(tmp_path, most, least):
    process = subprocess.run(
        [sys.executable, "-m", "tests.killing", str(tmp_path), most],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout)
    assert found["wrong"] == []
    assert found["kills"] >= least
