"""The device to compute on."""

from __future__ import annotations

import torch

from vdiff.errors import OptionError


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `mps`; `auto` takes the first of cuda, mps and cpu that this machine has.

    Raises:
        OptionError: this machine has no such device.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in has.items() if is_there))
    if not has[name]:
        raise OptionError(f"--device {name}: this machine has no {name} device", "give --device auto")
    return torch.device(name)
