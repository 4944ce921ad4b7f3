"""What every benchmark does with its table: print it, and keep it beside the machine and the command it came from."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import torch

import vdiff

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))


def machine() -> str:
    """Processor or GPU, cores, and the versions that matter."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {cores}, Python {platform.python_version()}, torch {torch.__version__}, vdiff {vdiff.__version__}"


def _processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_report(name: str, title: str, columns: list[str], rows: list[list[str]], where: str) -> Path:
    """Print a Markdown table, and write it to `results/NAME.md` (`NAME-cuda.md` on a GPU), which is returned."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = [f"# {title}", "", f"`{command}`, {datetime.date.today()}, {where}", ""]
    lines += ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-cuda' if torch.cuda.is_available() else ''}.md"
    path.write_text(text, encoding="utf-8")
    return path
