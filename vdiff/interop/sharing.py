"""A checkpoint's description as others may see it: without paths of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from vdiff.models.checkpoint import IMPORTED

PATHS = ("dataset", "path")
"""Keys of a checkpoint's description, or of a teacher's in it, that hold a path or an address."""


def last_name(path: str) -> str:
    """`/home/me/data/photos_64`, `https://me:word@host/photos_64?key=…` → `photos_64`; `imported:` stays before it."""
    if path.startswith(IMPORTED):
        return IMPORTED + last_name(path.removeprefix(IMPORTED))
    if "://" in path:
        path = urlsplit(path).path
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, teachers included, with the last part alone of every path and address."""
    shown: dict[str, Any] = {}
    for key, value in values.items():
        if key in PATHS:
            shown[key] = last_name(str(value))
        elif key == "teacher" and isinstance(value, Mapping):
            shown[key] = public(value)
        else:
            shown[key] = value
    return shown
