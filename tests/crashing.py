"""A preparation that dies: `python -m tests.crashing FOLDER OUT [POINT NUMBER]` leaves without a word at a point.

POINT is `before:NAME` or `after:NAME`, at the NUMBER-th call of one of `POINTS`. Without POINT it runs to its end, each
image taking SECONDS (environment) longer than it must, so that it can be killed from outside.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.sudden_end import die_at
from vdiff.data import preparation, shards, store
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder, Tar
from vdiff.data.image_files import UnreadableImageError
from vdiff.data.listing import Item, ListingWriter
from vdiff.data.preparation import Journal
from vdiff.data.source import Sample

POINTS: dict[str, tuple[Any, str]] = {
    "begin": (Journal, "begin"),
    "listing": (ListingWriter, "finish"),
    "record": (Journal, "record"),
    "commit": (store.StoreWriter, "_write"),
    "commit_shard": (shards.ShardWriter, "commit"),
    "finish_shards": (shards.ShardWriter, "finish"),
    "place": (preparation, "take_place"),
    "rename": (os, "replace"),
    "sync": (os, "fsync"),
    "remove": (Journal, "remove"),
}
BATCH_IMAGES = 8
IMAGES_PER_SHARD = 10


class SlowFolder(Folder):
    """A folder on a slow disk."""

    def read(self, item: Item) -> Sample:
        time.sleep(float(os.environ.get("SECONDS", "0")))
        return super().read(item)


class OneWaits(Folder):
    """A folder whose second image waits until `others` have been read, for a minute at the most.

    Every process notes in the folder `notes` what it has read.
    """

    def __init__(self, path: Path, notes: Path, others: int) -> None:
        super().__init__(path)
        self.notes, self.others = notes, others

    def read(self, item: Item) -> Sample:
        end = time.monotonic() + 60
        while item.name == "001.png" and len(os.listdir(self.notes)) < self.others:
            if time.monotonic() > end:
                raise UnreadableImageError("unreadable", "the others wait for it")
            time.sleep(0.01)
        (self.notes / item.name).touch()
        return super().read(item)


def main(folder: str, out: str, point: str = "", number: str = "1") -> None:
    """Prepare, with small batches."""
    store.BATCH_IMAGES = BATCH_IMAGES
    preparation.IMAGES_PER_SHARD = IMAGES_PER_SHARD
    if "NO_SPACE_CHECK" in os.environ:
        preparation._check_space = lambda *_: None
    if point:
        die_at(POINTS, point, int(number))
    path = Path(folder)
    source = SlowFolder(path) if path.is_dir() else Tar(path)
    config = ConversionConfig(sizes=(4, 8), image_format="png")
    preparation.prepare(source, Path(out), config, overwrite="overwrite" in os.environ, command="the same again")


if __name__ == "__main__":
    main(*sys.argv[1:])
