"""Free memory in containers, told by files like those of the kernel."""

from __future__ import annotations

import math
from types import SimpleNamespace

import psutil
import pytest
import torch

from vdiff import distributed
from vdiff.distributed import free_memory, left_in_cgroups

V1 = "12:pids:/\n5:cpu,memory:/docker/a\n1:name=systemd:/docker/a\n0::/docker/a\n"
NONE = 9223372036854771712
"""What version 1 says of a group without a limit."""


def files(limit: object, used: int, cached: int, version: int) -> dict[str, str]:
    if version == 2:
        stat = f"anon 5\ninactive_file {cached}\nactive_file 7\n"
        return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    stat = f"inactive_file 1\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


@pytest.mark.parametrize(
    ("lines", "groups", "left"),
    [
        ("0::/\n", {"": files(1000, 400, 100, 2)}, 700),
        ("0::/\n", {"": files("max", 400, 100, 2)}, math.inf),
        ("0::/user/job\n", {"user/job": files("max", 1, 0, 2), "user": files(900, 600, 0, 2)}, 300),
        ("0::/user/job\n", {"user/job": files(500, 350, 0, 2), "user": files(900, 600, 0, 2)}, 150),
        ("0::/docker/a\n", {"": files(1000, 400, 0, 2)}, 600),  # the container sees its own group at the top
        ("0::/../b\n", {"": files(1000, 400, 0, 2)}, 600),
        ("0::/\n", {"": files(1000, 1200, 0, 2)}, 0),  # swapped out, or lowered later
        (V1, {"memory/docker/a": files(1000, 700, 200, 1), "memory": files(NONE, 0, 0, 1)}, 500),
        (V1, {"memory": files(1000, 700, 200, 1)}, 500),
        (V1, {}, math.inf),
        ("", {}, math.inf),
    ],
)  # fmt: skip
def test_the_limits_of_all_groups_count_and_cached_files_are_free(tmp_path, lines, groups, left):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for group, texts in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    found = left_in_cgroups(tmp_path)
    assert found == left or (left == math.inf and found > 2**62)


def test_without_cgroups_the_machine_decides(tmp_path, monkeypatch):
    assert left_in_cgroups(tmp_path / "no linux") == math.inf
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    for left, free in ((math.inf, 800), (300, 300)):
        monkeypatch.setattr(distributed, "left_in_cgroups", lambda left=left: left)
        assert free_memory(torch.device("cpu")) == free
