"""What the tests of exports share: small networks, and programs that cannot import vdiff."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from tests.toy import write_checkpoint
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.models.unet_config import UNetConfig

SIZE = 8


def write_model(folder: Path, *, prediction: str = "v", schedule: dict[str, Any], steps: int, **unet: Any) -> None:
    """A checkpoint of a network with attention, folded pixels, and what `unet` says besides."""
    config = UNetConfig(
        in_channels=1,
        out_channels=PREDICTION_TYPES[prediction].channel_factor,
        channels=4,
        embedding_channels=8,
        num_blocks=1,
        attention_strides=(),
        fold=2,
        **{"multipliers": (1,), **unet},
    )
    write_checkpoint(
        folder,
        unet=config.to_dict(),
        prediction=prediction,
        schedule=schedule,
        num_timesteps=steps,
        image_size=SIZE,
        class_names=[f"class {k}" for k in range(config.num_classes)],
        guidance_range=[0.0, 3.0] if config.guidance_input else [],
        dataset="/home/somebody/secret/digits_8",
    )


def programs(card: Path) -> dict[str, str]:
    """The programs of a model card by the name of their file."""
    found = re.findall(r"### `(.+?)`\n.*?```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return dict(found)


def run_without(modules: list[str], code: str, folder: Path) -> str:
    """Run a program in `folder` that cannot import `modules`, in a process of its own; its stdout."""
    blocked = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def without(modules: Collection[str], folder: Path) -> Iterator[None]:
    """In this process and in `folder`, where `modules` can be imported no more, nor what was imported of them found."""
    known = dict(sys.modules)
    hidden = [name for name in known if name.partition(".")[0] in modules]
    with chdir(folder):
        try:
            for name in hidden:
                del sys.modules[name]
            sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]
            yield
        finally:
            sys.modules.update({name: known[name] for name in hidden})
