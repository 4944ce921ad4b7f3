"""Writing a dataset: batched transactions into a map that grows as it fills."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import lmdb

from vdiff.data.store import LENGTH_KEY, META_KEY, DatasetMeta, image_key, label_key
from vdiff.errors import VdiffError

FIRST_MAP_BYTES = 16 * 2**20
BATCH_BYTES = 16 * 2**20
BATCH_RECORDS = 4096


class StoreWriter:
    """Appends images to a new LMDB in the existing, empty folder `path`; `finish` makes it a dataset.

    Batches end after a number of records or bytes, never after a time, so equal input makes equal files.

    Raises:
        VdiffError: the disk is full or refuses.
    """

    def __init__(self, path: Path, meta: DatasetMeta) -> None:
        self.path = path
        self.meta = replace(meta, complete=False)
        self.length = 0
        self.content_bytes = 0
        self._map_bytes = FIRST_MAP_BYTES
        self._records: list[tuple[bytes, bytes]] = []
        self._record_bytes = 0
        self._hash = hashlib.sha256()
        try:
            # nobody else sees the folder yet, so no lock file; `finish` syncs once instead of every transaction
            self._lmdb = lmdb.open(str(path), map_size=self._map_bytes, lock=False, sync=False)
        except lmdb.Error as error:
            raise self._refused(error) from None
        self._put(META_KEY, self.meta.to_json().encode())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lmdb.close()

    def add(self, images: Mapping[int, bytes], label: int | None) -> int:
        """Append one image in all its sizes (`{size: encoded}`) and its class; returns its index."""
        index = self.length
        for size, encoded in images.items():
            self._put_content(image_key(size, index), encoded)
        if label is not None:
            self._put_content(label_key(index), str(label).encode())
        self.length += 1
        return index

    def finish(self, counts: Mapping[str, object]) -> DatasetMeta:
        """Write the length and the complete description, and make everything durable."""
        self.meta = replace(self.meta, counts=counts, complete=True, fingerprint=self._hash.hexdigest())
        self._put(LENGTH_KEY, str(self.length).encode())
        self._put(META_KEY, self.meta.to_json().encode())
        self._flush()
        try:
            self._lmdb.sync(True)
        except lmdb.Error as error:
            raise self._refused(error) from None
        return self.meta

    def _put_content(self, key: bytes, value: bytes) -> None:
        # the lengths keep (key, value) pairs apart: no two contents feed the hash the same bytes
        self._hash.update(b"%d %d " % (len(key), len(value)))
        self._hash.update(key)
        self._hash.update(value)
        self.content_bytes += len(value)
        self._put(key, value)

    def _put(self, key: bytes, value: bytes) -> None:
        self._records.append((key, value))
        self._record_bytes += len(value)
        if len(self._records) >= BATCH_RECORDS or self._record_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the waiting records in one transaction; when the map is full, double it and write them again."""
        while True:
            try:
                with self._lmdb.begin(write=True) as transaction:
                    for key, value in self._records:
                        transaction.put(key, value)
                break
            except lmdb.MapFullError:
                self._map_bytes *= 2
                self._lmdb.set_mapsize(self._map_bytes)
            except lmdb.Error as error:
                raise self._refused(error) from None
        self._records.clear()
        self._record_bytes = 0

    def _refused(self, error: lmdb.Error) -> VdiffError:
        return VdiffError(f"cannot write {self.path}: {error}", "free space or choose another --out")
