"""Writing an LMDB dataset so that it may be cut short at any moment and gone on with."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import lmdb

from vdiff.data.lmdb_file import LmdbFile
from vdiff.data.store import (
    CHECK_KEY,
    DATA_FILE,
    FIRST_LINK,
    LENGTH_KEY,
    META_KEY,
    DatasetMeta,
    check_key,
    check_of,
    digest_of,
    image_key,
    label_key,
    next_link,
)
from vdiff.errors import VdiffError

FIRST_MAP_BYTES = 16 * 2**20
BATCH_BYTES = 16 * 2**20
BATCH_IMAGES = 1024
STATE_KEY = b"state"
FULL_DISK_BYTES = 2**20
BEGIN_ANEW = "give --overwrite to begin anew"


class StoreWriter:
    """Appends images to the LMDB in the existing folder `path`; `finish` makes it a dataset.

    What `commit` has written is durable, and a writer that is opened later goes on after it. Every transaction is a
    function of the file before it and of its images alone: LMDB is opened anew for each, as it would otherwise leave
    traces of earlier ones in unused bytes. So the same images in the same batches make the same file, byte for byte,
    however often the work was cut short. A batch is due after a number of images or bytes, never after a time.

    Raises:
        VdiffError: the disk is full or refuses.
    """

    def __init__(self, path: Path, meta: DatasetMeta) -> None:
        self.path = path
        self.meta = replace(meta, complete=False)
        self.num_committed, self.length, self.link = 0, 0, FIRST_LINK
        self._records: list[tuple[bytes, bytes]] = []
        self._record_bytes = 0
        self._begun_at = 0
        self._map_bytes = FIRST_MAP_BYTES
        if (path / DATA_FILE).exists():
            self._go_on()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._records.clear()

    @property
    def is_due(self) -> bool:
        """Whether enough images wait for the next batch."""
        return self.length - self._begun_at >= BATCH_IMAGES or self._record_bytes >= BATCH_BYTES

    def add(self, images: Mapping[int, bytes], label: int | None) -> int:
        """Append one image in all its sizes (`{size: encoded}`) and its class; returns its index."""
        index = self.length
        records = {image_key(size, index): encoded for size, encoded in images.items()}
        if label is not None:
            records[label_key(index)] = str(label).encode()
        records[check_key(index)] = b" ".join(map(check_of, records.values()))
        self._records += records.items()
        self._record_bytes += sum(map(len, records.values()))
        self.link = next_link(self.link, digest_of(images, label))
        self.length += 1
        return index

    def skip(self) -> None:
        """Pass over an image that was rejected: indices are dense."""

    def commit(self) -> None:
        """Write the waiting images, and how far the writer is, in one transaction."""
        if self.length == self._begun_at:
            return
        self.num_committed += 1
        # of the same length in every batch, so that it moves nothing else in the file
        state = f"{self.num_committed:012d} {self.length:012d} {self.link.hex()}".encode()
        first = [(META_KEY, self.meta.to_json().encode())] if self.num_committed == 1 else []
        self._write([*first, *self._records, (STATE_KEY, state)])
        self._records.clear()
        self._record_bytes, self._begun_at = 0, self.length

    def finish(self, counts: Mapping[str, object]) -> DatasetMeta:
        """Write what waits, the length and the complete description."""
        self.commit()
        self.meta = replace(self.meta, counts=counts, complete=True, fingerprint=self.link.hex())
        length, meta = str(self.length).encode(), self.meta.to_json().encode()
        self._write([(LENGTH_KEY, length), (META_KEY, meta), (CHECK_KEY, check_of(length, meta))], done=True)
        return self.meta

    def _go_on(self) -> None:
        file = LmdbFile(self.path / DATA_FILE, BEGIN_ANEW)
        meta, state = file.get(META_KEY), file.get(STATE_KEY)
        while self._map_bytes <= file.used_bytes:
            self._map_bytes *= 2  # as a writer that was never cut short would have done
        if meta is not None:
            self.meta = DatasetMeta.from_json(meta)
        if state is not None:
            found = re.fullmatch(rb"(\d{12}) (\d{12}) ([0-9a-f]{64})", state)
            if found is None:
                raise VdiffError(f"{self.path} is damaged: it does not say how far it is", BEGIN_ANEW)
            number, length, link = found.groups()
            self.num_committed, self.length, self.link = int(number), int(length), bytes.fromhex(link.decode())
            self._begun_at = self.length

    def _write(self, records: list[tuple[bytes, bytes]], *, done: bool = False) -> None:
        """Write records in one durable transaction; when the map is full, double it and write them again."""
        while True:
            try:
                with lmdb.open(str(self.path), map_size=self._map_bytes, lock=False) as environment:
                    with environment.begin(write=True) as transaction:
                        for key, value in records:
                            transaction.put(key, value)
                        if done:
                            transaction.delete(STATE_KEY)
                    return
            except lmdb.MapFullError:
                self._map_bytes *= 2
            except lmdb.Error as error:
                # LMDB calls it an input/output error when the last bytes of a disk take a part of a page
                full = shutil.disk_usage(self.path).free < sum(len(value) for _, value in records) + FULL_DISK_BYTES
                reason = os.strerror(errno.ENOSPC) if full else error
                raise VdiffError(f"cannot write {self.path}: {reason}", "free space or choose another --out") from None
