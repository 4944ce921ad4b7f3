"""What the tests of exports share: small networks, and programs that cannot import vdiff."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.toy import write_checkpoint
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.models.unet import UNetConfig

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
    """Run a program in `folder` that cannot import `modules`; its stdout."""
    blocked = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
