"""An ordered map over worker processes: results come in the order of the items."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from vdiff.errors import VdiffError

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]

SECONDS_ALONE = 0.1
"""How long this process works alone; it starts workers only if all work takes more than ten times as long."""
CHUNKS_AHEAD = (3, 64)
BUFFER_BYTES = 128 * 2**20


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    *,
    num_items: float = math.inf,
    chunk_items: int = 1,
    num_bytes: Callable[[Result], int] = lambda _: 0,
) -> Generator[Result, None, None]:
    """`map(function, items)` in `num_workers` processes (0: in this one), which run ahead of the consumer.

    A slow item does not stop the others: 64 chunks of `chunk_items` per worker may wait behind it, or fewer if results
    of `num_bytes` would fill more than 128 MiB. This process works alone while the work looks short, and until the
    first worker has started; if `num_items` is infinite (unknown, or few long items) only the workers work. Workers are
    spawned, so threads and locks of the caller are not copied. They ignore SIGINT, which the caller handles, and they
    end with the caller in any case.

    Raises:
        VdiffError: a worker died, or could not start.
    """
    rest = iter(items)
    count, total_bytes, began = 0, 0, time.monotonic()
    helps = num_workers == 0 or num_items < math.inf
    for result in map(function, rest if helps else ()):
        count, total_bytes = count + 1, total_bytes + num_bytes(result)
        yield result
        seconds = time.monotonic() - began
        if num_workers and seconds > SECONDS_ALONE and seconds * num_items / count > 10 * SECONDS_ALONE:
            break
    else:
        if helps:
            return
    chunks: Iterator[list[Item]] = iter(lambda: list(islice(rest, chunk_items)), [])
    fewest, most = (each * num_workers for each in CHUNKS_AHEAD)

    def ahead() -> int:
        """How many chunks may be in progress."""
        return max(fewest, min(most, BUFFER_BYTES * count // max(total_bytes * chunk_items, 1)))

    spawn = get_context("spawn")
    has_begun = spawn.Event()
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_begin, initargs=(function, has_begun))
    is_over = False
    try:
        first = [_submit(pool, chunk) for chunk in islice(chunks, fewest)]
        waiting = deque(first)
        while helps and len(waiting) < ahead() and not any(map(Future.done, first)) and (chunk := next(chunks, [])):
            waiting.append(Future())
            waiting[-1].set_result([function(item) for item in chunk])
        while True:
            waiting.extend(_submit(pool, chunk) for chunk in islice(chunks, max(ahead() - len(waiting), 0)))
            if not waiting:
                is_over = True
                return
            for result in waiting.popleft().result():
                count, total_bytes = count + 1, total_bytes + num_bytes(result)
                yield result
    except BrokenProcessPool:
        if not has_begun.is_set():
            raise VdiffError(
                "the worker processes ended during their start, for the reason above",
                'a script that asks for workers needs `if __name__ == "__main__":`, since each worker imports it',
            ) from None
        raise VdiffError(
            "a worker process was killed, probably for lack of memory", "use fewer --num_workers"
        ) from None
    finally:
        if not is_over:  # an interruption is not to wait for workers that start, nor for what they compute
            for worker in list(pool._processes.values()):
                worker.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: list[Any]) -> Future[list[Any]]:
    """Submit with signals blocked: the pool starts its processes here, which must not be interrupted."""
    if os.name == "nt":
        return pool.submit(_work, chunk)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return pool.submit(_work, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(function: Callable[[Any], Any], has_begun: Event) -> None:
    """Prepare a worker process; the function is sent once, not with every chunk."""
    global _function
    _function = function
    has_begun.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # inherited from `_submit`
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(chunk: list[Any]) -> list[Any]:
    return [_function(item) for item in chunk]


def _end_with_parent() -> None:
    """End this worker if the parent was killed, which cannot stop its workers; they would wait forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
