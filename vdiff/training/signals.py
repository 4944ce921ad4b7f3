"""Stopping politely: Ctrl-C and SIGTERM let the update end and be saved; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vdiff.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Whether a signal asked to stop, and the exit code that it means.

    `alone`: no launcher is there that answers a Ctrl-C, which every process gets, with a SIGTERM to each of them.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.exit_code: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; unwind at the second (under a launcher, of the same kind)."""
        del frame
        code = EXIT_CODES[signal.Signals(signum)]
        if self.exit_code is not None:
            if not self.alone and code != self.exit_code:
                return
            raise Interrupted("stopped at once; the last checkpoint is on disk", code)
        self.exit_code = code


@contextmanager
def stop_requests(*, alone: bool = True) -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM inside the block (in the main thread; elsewhere none arrive)."""
    request = StopRequest(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
