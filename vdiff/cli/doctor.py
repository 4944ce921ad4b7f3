"""`vdiff doctor`: what this machine has, whether vdiff works on it, and how to fix what does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

import vdiff
from vdiff.cli.options import Command
from vdiff.cli.prepare import cpu_cores

WIDTH, COLUMN, PATIENCE = 80, 12, 120
MODULES = {
    "huggingface-hub": "huggingface_hub", "pillow": "PIL", "scikit-learn": "sklearn", "tomli-w": "tomli_w",
}  # fmt: skip
"""Packages with modules of another name, apart from dashes."""
EXTRAS = {
    "audio": (["soundfile", "soxr"], "sounds"),
    "diffusers": (["diffusers"], "networks of diffusers"),
    "fidelity": (["torch_fidelity"], "FID and KID on Inception"),
    "gs": (["gcsfs"], "tar shards on Google Cloud"),
    "heif": (["pillow_heif"], "HEIC and AVIF photographs"),
    "hf": (["datasets"], "hf: datasets"),
    "mlflow": (["mlflow"], "--tracker mlflow"),
    "onnx": (["onnx", "onnxruntime", "onnxscript"], "export to ONNX"),
    "optimizers": (["bitsandbytes", "prodigyopt"], "--optimizer adamw8bit and prodigy"),
    "s3": (["s3fs"], "tar shards on S3"),
    "text": (["peft", "sentencepiece", "transformers"], "text-to-image models and LoRA"),
    "wandb": (["wandb"], "--tracker wandb"),
    "web": (["starlette", "uvicorn"], "pages in the browser"),
    "webdataset": (["webdataset", "fsspec"], "tar shards"),
}
"""Extra → its modules, and what needs them."""
LITTLE_DISK, LITTLE_SHARED, LITTLE_MEMORY = 2 * 2**30, 2**28, 2**30
ILLEGAL = "this processor cannot run it: install a build for it"


@click.command(cls=Command, examples=["vdiff doctor", "vdiff doctor > report.txt   # for a bug report"])
def command() -> int:
    """Print what this machine has, run a self-test, and print how to fix what is broken.

    The self-test makes a dataset, a checkpoint and a few images in a temporary folder. The exit code is 1 if something
    is broken. Put the whole output into a bug report.
    """
    problems: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        trying = start(processes, "machine", folder)
        installed = {name: names for name, (names, _) in EXTRAS.items() if all(map(version_of, names))}
        importing = start(processes, "libraries", *(name for names in installed.values() for name in names))
        show("vdiff", f"{vdiff.__version__}, {Path(vdiff.__file__).parent}")
        show("python", f"{platform.python_version()}, {sys.executable}")
        show("system", f"{platform.platform()}, {platform.machine()}, {cpu_cores()} CPU cores")
        for name, text, problem in resources():
            show(name, text)
            problems += problem
        found, missing = packages()
        show("packages", ", ".join(found))
        problems += missing
        facts, failure = answers(trying)
        for name, text in facts.items():
            show(name, text)
        if failure:
            problems.append(f"{failure}\n{next_step(failure)}")
        if shutil.which("nvidia-smi") and "cuda" not in facts.get("devices", "cuda"):
            problems.append("an NVIDIA driver is here, but torch sees no GPU\n" + WITH_CUDA)
        imported, broken = answers(importing)
    for name, (_, purpose) in EXTRAS.items():
        state = f"not installed: {pip(name)}"
        if name in installed:
            wrong = [f"{module}: {imported[module]}" for module in installed[name] if imported.get(module)]
            is_tried = all(module in imported for module in installed[name])
            state = "broken" if wrong else "installed" if is_tried else "unknown"
            problems += [f"extra {name}, {each}\n{pip(name, again=True)}" for each in wrong]
        show(f"[{name}]", f"{purpose}, {state}")
    if broken:
        problems.append(f"{broken}\nreinstall that package: python -m pip install --force-reinstall PACKAGE")
    show("took", f"{time.monotonic() - started:.1f} s")
    for each in problems:
        cause, hint = each.split("\n")
        show("BROKEN", cause)
        show("  next", hint)
    if not problems:
        show("result", "everything works")
    return 1 if problems else 0


WITH_CUDA = "install torch with CUDA: see docs/install.md"


def show(name: str, text: str) -> None:
    """Print a fact: its name, then its text in lines that fit 80 columns."""
    lines = textwrap.wrap(text, WIDTH - COLUMN - 1, break_on_hyphens=False) or [""]
    for head, line in zip([name, *[""] * len(lines)], lines, strict=False):
        click.echo(f"{head:<{COLUMN}} {line}")


def pip(extra: str, *, again: bool = False) -> str:
    """The command that installs an extra."""
    root = Path(vdiff.__file__).parent.parent
    what = f"-e '.[{extra}]'" if (root / "pyproject.toml").is_file() else f"'vdiff[{extra}]'"
    return f"pip install {'--force-reinstall ' * again}{what}"


def version_of(module: str) -> str:
    """The version of a module's package; empty if it is not installed."""
    for name in (module, module.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def resources() -> Iterator[tuple[str, str, list[str]]]:
    """Name, text and problems of memory, disk and shared memory."""
    try:
        import psutil
    except ImportError as error:
        yield "memory", "unknown", [f"psutil: {error}\npython -m pip install --force-reinstall psutil"]
    else:
        memory = psutil.virtual_memory()
        little = memory.available < LITTLE_MEMORY
        note = "; little: end other programs" if little else ""
        yield "memory", f"{gib(memory.available)} of {gib(memory.total)} free{note}", []
    disk = shutil.disk_usage(".")
    note = "; little: checkpoints may not fit" if disk.free < LITTLE_DISK else ""
    is_writable = os.access(".", os.W_OK)
    problem = [] if is_writable else [f"{Path.cwd()} is not writable\nchange to a writable folder"]
    yield "disk", f"{gib(disk.free)} of {gib(disk.total)} free in {Path.cwd()}{note}", problem
    if (shared := Path("/dev/shm")).is_dir():
        usage = shutil.disk_usage(shared)
        note = "; little: start the container with --shm-size 1g" if usage.free < LITTLE_SHARED else ""
        yield "shared", f"{gib(usage.free)} of {gib(usage.total)} free in {shared}{note}", []


def gib(number: int) -> str:
    """Bytes as text."""
    return f"{number / 2**30:.1f} GiB"


def packages() -> tuple[list[str], list[str]]:
    """Names and versions of vdiff's dependencies, and the problems of those that are missing or too old."""
    try:
        needed = importlib.metadata.requires("vdiff") or []
    except importlib.metadata.PackageNotFoundError:
        return ["unknown"], ["vdiff itself is not installed\npython -m pip install -e . in its folder"]
    found, problems = [], []
    for requirement in needed:
        if "extra ==" in requirement:
            continue
        match = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", requirement)
        assert match
        name, least = match[1], match[2] or "0"
        version = version_of(name)
        found.append(f"{name} {version or 'MISSING'}")
        if not version or numbers(version) < numbers(least):
            problems.append(f"{name} {version or 'is missing'}, vdiff needs {least}\npip install '{name}>={least}'")
    return found, problems


def numbers(version: str) -> list[int]:
    """The leading numbers of a version: 2.13.0+cpu → 2, 13, 0."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split(".") if part]  # type: ignore[index]


def start(stack: ExitStack, *words: str) -> subprocess.Popen[str]:
    """Start the self-test's process, which a broken library may kill, and which ends with `stack`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vdiff.cli.self_test", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path()},
    )  # fmt: skip
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def path() -> str:
    """PYTHONPATH with the folder of this vdiff in front."""
    return os.pathsep.join([str(Path(vdiff.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def answers(process: subprocess.Popen[str]) -> tuple[dict[str, str], str]:
    """The facts that the self-test printed, by name, and how it failed: empty if it did not."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        stderr = f"{stderr}\ndid not end in {PATIENCE} s"
    facts = dict(json.loads(line) for line in stdout.splitlines() if line.startswith("["))
    if not process.returncode:
        return facts, ""
    trying = next((name for name, text in facts.items() if text == "?"), "python")
    facts.pop(trying, None)
    if process.returncode < 0 and "did not end" not in stderr:
        name = signal.Signals(-process.returncode).name
        return facts, f"{trying}: ended by {name}{f', {ILLEGAL}' if name == 'SIGILL' else ''}"
    return facts, f"{trying}: {(stderr.strip().splitlines() or ['failed'])[-1]}"


def next_step(failure: str) -> str:
    """What to do after a failed self-test."""
    trying = failure.partition(":")[0]
    if missing := re.search(r"No module named '(?!vdiff)(\w+)", failure):
        name = next((package for package, module in MODULES.items() if module == missing[1]), missing[1])
        return f"python -m pip install {name}"
    if trying == "torch":
        return "python -m pip install --force-reinstall torch torchvision; or see docs/install.md"
    return f"report it with this whole output; the step that failed is {trying}"
