"""A process that ends at a chosen moment, as SIGKILL would end it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any


def die_at(points: Mapping[str, tuple[Any, str]], point: str, number: int) -> None:
    """Replace a function by one that ends the process at its `number`-th call: `before:NAME` or `after:NAME`.

    It may be called in several threads at once.

    Args:
        points: name → the module or class that has the function, and what it is called there.
    """
    moment, _, name = point.partition(":")
    owner, attribute = points[name]
    real: Callable[..., Any] = getattr(owner, attribute)
    calls = count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        is_last = next(calls) == number
        if is_last and moment == "before":
            os._exit(9)
        result = real(*args, **kwargs)
        if is_last:
            os._exit(9)
        return result

    setattr(owner, attribute, dying)
