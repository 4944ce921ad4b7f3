"""Networks of NVlabs/edm2: the magnitude-preserving UNet, as a file of NVlabs/edm is (`vdiff.interop.teachers.edm`).

{"class_name": "Precond", "img_resolution": 64, "img_channels": 3, "label_dim": 1000, …}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdiff.interop.foreign import JsonFile
from vdiff.interop.teachers.weights import same_weights
from vdiff.models.checkpoint import MAX_IMAGE_SIZE
from vdiff.models.edm2_config import BALANCES, Edm2Config
from vdiff.models.edm2_unet import Edm2UNet

WITHOUT_EFFECT = {"class_name", "use_fp16", "dropout", "logvar_channels", "sigma_data"}
"""Options of training, of the estimate of the uncertainty, and of the parameterisation, which the caller reads."""
COUNTS = {
    "img_resolution": (0, 1, MAX_IMAGE_SIZE), "img_channels": (0, 1, 4096), "label_dim": (0, 0, 10**7),
    "model_channels": (192, 1, 2**14), "channel_mult_noise": (0, 0, 64), "channel_mult_emb": (0, 0, 64),
    "num_blocks": (3, 1, 64), "channels_per_head": (64, 1, 2**14),
}  # fmt: skip
"""Name → (default, least, most)."""
READ = {*COUNTS, *BALANCES, "channel_mult", "attn_resolutions", "clip_act", "resample_filter"}
UNCERTAINTY = "logvar_"


def edm2_config(file: JsonFile) -> Edm2Config:
    """The configuration of a network of EDM2.

    Raises:
        VdiffError: a value that vdiff does not support; the file and key are named.
        ValueError: values of no network.
    """
    values: dict[str, Any] = {
        name: file.whole(name, usual, low=low, high=high) for name, (usual, low, high) in COUNTS.items()
    }
    values |= {name: file.number(name, getattr(Edm2Config, name), low=-1e-9, high=1 + 1e-9) for name in BALANCES}
    if file.get("resample_filter", [1, 1]) != [1, 1]:
        raise file.refusal("resample_filter", "only [1, 1] can be read")
    values |= {name: file.items(name, int, high=16) for name in ("channel_mult", "attn_resolutions") if file.get(name)}
    if file.get("attn_resolutions") == []:
        values["attn_resolutions"] = []
    is_open = "clip_act" in file.values and file.values["clip_act"] is None
    clip = 0.0 if is_open else file.number("clip_act", 256, low=0, high=1e9)
    return Edm2Config(**values, clip_act=clip)


def edm2_weights(path: Path, config: Edm2Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `Edm2UNet(config)`, whose names are theirs after the prefix `unet.`."""
    kept = {name.removeprefix("unet."): x for name, x in tensors.items() if not name.startswith(UNCERTAINTY)}
    return same_weights(path, lambda: Edm2UNet(config), kept)
