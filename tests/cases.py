"""Combinations of parameters, of which `make test` takes a part and `make test_all` takes all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest


def all_cases(is_fast: Callable[..., bool], *choices: Sequence[Any]) -> list[Any]:
    """Every combination, for `parametrize`; `is_fast` tells by the number of each choice which ones are not slow."""
    return [
        pytest.param(*case, marks=[] if is_fast(*numbers) else pytest.mark.slow)
        for numbers, case in zip(product(*map(range, map(len, choices))), product(*choices), strict=True)
    ]
