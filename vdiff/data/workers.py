"""Many processes, one order: a pool that maps chunks and hands the results back as they were put in."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

from vdiff.errors import VdiffError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

CHUNKS_AHEAD = (3, 64)
BUFFER_BYTES = 128 * 2**20


def ordered_map(
    function: Callable[[Chunk], Result],
    chunks: Iterable[Chunk],
    num_workers: int,
    num_bytes: Callable[[Result], int],
) -> Generator[Result, None, None]:
    """`map(function, chunks)` in `num_workers` processes, which run ahead of the consumer.

    So one slow chunk holds nobody up: 64 chunks a worker may wait behind it, fewer where results of `num_bytes` would
    fill more than 128 MiB. Processes are spawned, so threads and locks of the caller are not copied. They ignore
    SIGINT, which is for the caller to handle, and end with the caller, however that ends.

    Raises:
        VdiffError: a worker died.
    """
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_begin)
    waiting: deque[Future[Result]] = deque()
    count, total_bytes = 0, 0
    something_is_done = threading.Condition()

    def note(future: Future[Result]) -> None:
        nonlocal count, total_bytes
        with something_is_done:
            if not future.cancelled() and future.exception() is None:
                count, total_bytes = count + 1, total_bytes + num_bytes(future.result())
            something_is_done.notify()

    def ahead() -> int:
        """How many chunks may be under way: few until it is known how large results are."""
        fewest, most = (each * num_workers for each in CHUNKS_AHEAD)
        return max(fewest, min(most, BUFFER_BYTES * count // max(total_bytes, 1)))

    try:
        for chunk in chunks:
            future = _submit(pool, function, chunk)
            future.add_done_callback(note)
            waiting.append(future)
            while len(waiting) > ahead():
                with something_is_done:
                    something_is_done.wait_for(lambda: waiting[0].done() or len(waiting) <= ahead())
                if waiting[0].done():
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise VdiffError(
            "a worker process was killed, most likely for want of memory", "use fewer --num_workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Chunk], Result], chunk: Chunk) -> Future[Result]:
    """Submit with signals held back: the pool starts its processes here, which must not be cut in half."""
    if os.name == "nt":
        return pool.submit(function, chunk)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return pool.submit(function, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # inherited from `_submit`
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed outright cannot stop its workers, which would wait for it forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
