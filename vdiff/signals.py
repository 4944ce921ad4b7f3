"""Ctrl-C and SIGTERM: answered at once, even while the main thread computes; the second one ends the process.

Python runs signal handlers only between two of its own instructions. The backward pass of a network is a single
instruction, however long it takes. So a separate thread answers; `signal.set_wakeup_fd` tells it about signals.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vdiff.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SECONDS_TO_LEAVE = 0.6
"""Time for the main thread to clean up after a second signal."""
SHOW_CURSOR = "\x1b[?25h"
AT_ONCE = "stopped at once; the last checkpoint is on disk"


class StopRequest:
    """Whether a signal asked to stop, and its exit code.

    Attributes:
        answer: printed at once after the first signal.

    Args:
        alone: no launcher is running. A launcher answers Ctrl-C, which reaches every process, with SIGTERM to each.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.exit_code: int | None = None
        self.answer: Callable[[], object] = lambda: None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; raise at the second (under a launcher, at a second one of the same kind)."""
        del frame
        code = EXIT_CODES[signal.Signals(signum)]
        if self.exit_code is not None:
            if not self.alone and code != self.exit_code:
                return
            raise Interrupted(AT_ONCE, code)
        self.exit_code = code


@contextmanager
def stop_requests(*, alone: bool = True) -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM inside the block (in the main thread; other threads receive none)."""
    request = StopRequest(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in EXIT_CODES}
    try:
        with answered(lambda _: request.answer(), AT_ONCE, alone=alone):
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def answered(first: Callable[[threading.Event], object], last: str, *, alone: bool) -> Iterator[None]:
    """In a block of the main thread, call `first` at the first signal, and end the process after the second.

    Both happen in another thread. After the second signal the block has `SECONDS_TO_LEAVE` to end by itself. Then the
    process ends as if it were killed, and prints `last`.

    Args:
        first: receives an event that is set when the block ends.
        alone: as in `StopRequest`.
    """
    over = threading.Event()
    receiving, sending = socket.socketpair()
    sending.setblocking(False)

    def watch() -> None:
        if hasattr(
            signal, "pthread_sigmask"
        ):  # or the kernel gives them to this thread while the main thread blocks them
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
        seen: list[int] = []
        while number := receiving.recv(1):
            if number[0] not in EXIT_CODES:
                continue
            seen.append(number[0])
            if len(seen) == 1:
                first(over)
            elif (alone or seen.count(number[0]) > 1) and not over.wait(SECONDS_TO_LEAVE):
                cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
                os.write(2, f"{cursor}{last}\n".encode())
                os._exit(EXIT_CODES[signal.Signals(number[0])])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        sending.close()
        thread.join()
        receiving.close()


if hasattr(os, "register_at_fork"):  # signals to a forked process are not this process's
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
