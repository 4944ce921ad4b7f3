"""The command line: the only room that may import all others. Commands import torch inside their functions."""

# ruff: noqa: E402
from __future__ import annotations

import sys


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print one line after Ctrl-C while a command is still being imported; commands catch it later."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.excepthook is sys.__excepthook__:  # before all other imports, which take time
    sys.excepthook = _uncaught

import logging
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

if missing := [name for name in ("click", "msgspec", "rich") if find_spec(name) is None]:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(missing)}; activate the environment in which vdiff is installed "
        "(. .venv/bin/activate), or install vdiff: see docs/install.md"
    )

# messages of libraries in a terminal that no user of vdiff can act on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a missing kernel for 4 bits, when peft imports it
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA compiler without a GPU, when compiling
warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools\.lru_cache`", UserWarning)
