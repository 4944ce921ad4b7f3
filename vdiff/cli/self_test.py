"""The self-test of `vdiff doctor`, run as `python -m` in a separate process that a broken library may kill.

Each fact is one line of JSON on stdout: a name and a text. After a failure, the last line names the step that failed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SIZE, IMAGES, STEPS = 8, 4, 2


def libraries(*modules: str) -> Iterator[tuple[str, str]]:
    """Import the modules; each name is reported before the import, and again with the error if it fails."""
    for name in modules:
        yield name, "?"
        try:
            importlib.import_module(name)
        except BaseException as error:
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            yield name, ""


def machine(folder: str) -> Iterator[tuple[str, str]]:
    """Test torch and its devices, then a dataset, a checkpoint and images of a tiny network in `folder`."""
    yield "torch", "?"
    import torch

    from vdiff.text import plural

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield "torch", f"{torch.__version__}, {plural(threads, 'thread')}, {capability}"
    yield "devices", "?"
    yield "devices", "; ".join(devices())
    yield "dataset", "?"
    yield "dataset", dataset(Path(folder, "data"))
    yield "drawing", "?"
    yield "drawing", drawing(Path(folder, "model"))


def devices() -> Iterator[str]:
    """The devices that torch can compute on."""
    import torch

    yield "cpu"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index} {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if torch.backends.mps.is_available():
        yield "mps"


def dataset(folder: Path) -> str:
    """Write an LMDB of noise and read it back.

    Raises:
        ValueError: the pixels differ.
    """
    import io

    import numpy as np
    import PIL.Image

    import vdiff
    from vdiff.data.store import ImageStore

    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    images = folder / "images"
    images.mkdir(parents=True)
    for k, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(images / f"{k}.png")
    store = ImageStore(vdiff.prepare(images, out=folder / "lmdb", size=SIZE, image_format="png"))
    files = [io.BytesIO(store.encoded(SIZE, k)) for k in range(len(store))]
    read = np.stack([np.asarray(PIL.Image.open(file)) for file in files])
    if not np.array_equal(read, pixels):
        raise ValueError("the pixels read differ from those written")
    return f"{IMAGES} images written to an LMDB and read"


def drawing(folder: Path) -> str:
    """Write and read the checkpoint of a tiny network, and draw images with it on the device of `auto`.

    Raises:
        ValueError: the weights differ, or an image is not finite.
    """
    import torch

    import vdiff
    from vdiff.distributed import pick_device
    from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
    from vdiff.models.unet_config import UNetConfig

    unet = UNetConfig(channels=8, embedding_channels=16, multipliers=(1, 2), num_blocks=1, attention_strides=())
    config = CheckpointConfig(
        unet=unet.to_dict(), schedule={"name": "cosine"}, prediction="v", num_timesteps=STEPS, image_size=SIZE,
        method="base", weights="raw", num_iters=0, target_iters=0, num_images=0, dataset="", dataset_fingerprint="",
    )  # fmt: skip
    weights = config.build().state_dict()
    save_checkpoint(folder, weights, config)
    read = load_checkpoint(folder)[0].state_dict()
    if not all(torch.equal(read[name], tensor) for name, tensor in weights.items()):
        raise ValueError("the weights read differ from those written")
    device = pick_device("auto")
    images = vdiff.load(folder, device=device.type).sample(num=IMAGES, steps=STEPS)
    if not torch.isfinite(images).all():
        raise ValueError("the network generated images that are not finite")
    return f"checkpoint written and read, {IMAGES} images drawn in {STEPS} steps on {device}"


if __name__ == "__main__":
    os.environ["CUDA_MODULE_LOADING"] = "LAZY"
    facts = machine(sys.argv[2]) if sys.argv[1] == "machine" else libraries(*sys.argv[2:])
    for name, text in facts:
        print(json.dumps([name, text]), flush=True)
