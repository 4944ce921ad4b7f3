"""Drawing into outputs: small orders, and the one call that fulfils them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.toy import UNET, Watcher, contents, write_checkpoint
from vdiff.distributed import Processes
from vdiff.models.checkpoint import read_config, weights_fingerprint
from vdiff.models.checks import class_numbers
from vdiff.models.unet_config import UNetConfig
from vdiff.reporting import Reporter
from vdiff.sampling.job import RunOptions, SampleReport, draw_images
from vdiff.sampling.outputs import PICTURES, ImageKind, open_output
from vdiff.sampling.packing import file_name
from vdiff.sampling.spec import SampleSpec


def write_guided(folder: Path, *, told: bool = False, **changes: Any) -> None:
    """A checkpoint of three classes that can be guided; `told`: it takes the weight, 0 to 4, as an input."""
    shape = {"in_channels": 1, "out_channels": 1, "num_classes": 3, "null_class": True, "guidance_input": told}
    values = {"class_names": ["cat", "dog", "owl"], "guidance_range": [0.0, 4.0] if told else []}
    write_checkpoint(folder, classes=3, unet=UNetConfig.from_dict({**UNET, **shape}).to_dict(), **values | changes)


def spec(model: Path, **changes: Any) -> SampleSpec:
    """Four steps of DDIM, seed 3, with all classes that the model has."""
    values: dict[str, Any] = {
        "checkpoint": model.as_posix(),
        "fingerprint": weights_fingerprint(model),
        "sampler": "ddim",
        "options": {},
        "num_steps": 4,
        "seed": 3,
        "classes": class_numbers(read_config(model), None),
    }
    return SampleSpec(**values | changes)


def run(
    spec: SampleSpec,
    out: Path,
    *,
    form: str = "png",
    num: int = 7,
    batch_size: int = 3,
    reporter: Reporter | None = None,
    processes: Processes | None = None,
    **work: Any,
) -> SampleReport:
    """`draw_images` on the CPU."""
    config = read_config(Path(spec.checkpoint))
    kind = ImageKind(config.image_size, config.unet["in_channels"], config.class_names)
    processes = processes or Processes(torch.device("cpu"))
    return draw_images(
        spec,
        open_output(form, out, kind, processes.rank),
        RunOptions(num, batch_size, **work),
        processes=processes,
        reporter=reporter or Watcher(),
    )


def image_path(folder: Path, index: int) -> Path:
    """The file of image `index`."""
    return folder / file_name(index)


def written(out: Path) -> dict[str, bytes]:
    """What a folder of samples holds, and the pictures beside it, both by their names."""
    beside = {name: out.with_name(f"{out.name}.{name}") for name in PICTURES}
    return contents(out) | {f"beside/{name}": path.read_bytes() for name, path in beside.items() if path.exists()}
