"""Joining the parts that several machines prepared into the dataset that one run would have written."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vdiff.data.datasets import AnyStore, open_dataset
from vdiff.data.journal import REJECTED_FILE
from vdiff.data.shard_store import DATASET, ShardStore
from vdiff.data.shards import Shard, fingerprint_of, write_index
from vdiff.data.store import DatasetMeta, ImageStore
from vdiff.data.writer import StoreWriter
from vdiff.errors import VdiffError
from vdiff.files import write_whole
from vdiff.replacing import new_folder
from vdiff.reporting import Reporter, Silent


def merge(
    paths: Sequence[Path], out: Path, *, overwrite: bool = False, reporter: Reporter | None = None
) -> DatasetMeta:
    """Join all parts 1/n … n/n of one preparation, in any order, into the folder `out`.

    Equal to what one run over all images would have written, byte for byte; tar shards are linked or copied.

    Raises:
        VdiffError: a part is missing, given twice, incomplete or of another preparation; `out` exists; the disk
            refuses.
    """
    parts = in_order([open_dataset(str(path)) for path in paths])
    first = parts[0].meta
    counts = _sum([part.meta.counts for part in parts])
    reporter = reporter or Silent()
    with new_folder(out, DATASET, overwrite=overwrite) as folder:
        whole = replace(first, shard="", counts={}, fingerprint="")
        if stores := [part for part in parts if isinstance(part, ImageStore)]:
            meta = _join_stores(stores, folder, whole, counts, reporter)
        else:
            meta = _join_shards([part for part in parts if isinstance(part, ShardStore)], folder, whole, counts)
        if rejected := [path for part in parts if (path := Path(part.path) / REJECTED_FILE).exists()]:
            write_whole(folder / REJECTED_FILE, partial(_concatenate, rejected))
    return meta


def in_order(parts: Sequence[AnyStore]) -> list[AnyStore]:
    """The parts 1/n … n/n.

    Raises:
        VdiffError: they are not all parts of one preparation, or not each of them once.
    """
    for part in parts:
        if not part.meta.shard:
            raise VdiffError(f"{part.path} is no part of a dataset", "give folders that --shard i/n prepared")
        if (part.meta.origin, type(part)) != (parts[0].meta.origin, type(parts[0])):
            raise VdiffError(
                f"{part.path} and {parts[0].path} come from different images or settings",
                "prepare all parts from the same source with the same options",
            )
    count = int(parts[0].meta.shard.partition("/")[2])
    of_number: dict[int, AnyStore] = {}
    for part in parts:
        number, _, of = part.meta.shard.partition("/")
        if int(of) != count:
            raise VdiffError(f"{part.path} is part {part.meta.shard}, {parts[0].path} one of {count}", "cut alike")
        if int(number) in of_number:
            raise VdiffError(f"{part.path} and {of_number[int(number)].path} are both part {number}", "give each once")
        of_number[int(number)] = part
    if missing := [f"{number}/{count}" for number in range(1, count + 1) if number not in of_number]:
        raise VdiffError(f"part {', '.join(missing)} is missing", f"prepare it with --shard {missing[0]}")
    return [of_number[number] for number in range(1, count + 1)]


def _join_stores(
    parts: Sequence[ImageStore], folder: Path, meta: DatasetMeta, counts: dict[str, Any], reporter: Reporter
) -> DatasetMeta:
    with (
        StoreWriter(folder, meta) as writer,
        reporter.progress("merge", sum(map(len, parts)), "images") as progress,
    ):
        for part in parts:
            for index in range(len(part)):
                images = {size: part.encoded(size, index) for size in meta.sizes}
                writer.add(images, part.label(index))
                if writer.is_due:
                    writer.commit()
                    progress.update(writer.length)
            part.close()
        progress.update(writer.length)
        return writer.finish(counts)


def _join_shards(
    parts: Sequence[ShardStore], folder: Path, meta: DatasetMeta, counts: Mapping[str, object]
) -> DatasetMeta:
    """Link (or copy, across disks) the shards of parts in order into `folder` and write their common index.

    Raises:
        VdiffError: two parts have a shard of the same name; the disk refuses.
    """
    shards: list[Shard] = []
    for part in parts:
        for shard in part.shards:
            source, target = Path(part.place(shard)), folder / shard.file
            if target.exists():
                raise VdiffError(f"{part.path} has a shard {shard.file}, and so has another part", "give each once")
            try:
                os.link(source, target)
            except OSError:
                write_whole(target, partial(shutil.copyfile, source))
            shards.append(shard)
    meta = replace(meta, counts=counts, complete=True, fingerprint=fingerprint_of(shard.sha256 for shard in shards))
    write_index(folder, meta, shards)
    return meta


def _concatenate(paths: Sequence[Path], target: Path) -> None:
    with open(target, "wb") as joined:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, joined)


def _sum(all_counts: Sequence[Any]) -> dict[str, Any]:
    """The counts of all parts as one; every part saw the whole list of files, so `ignored` is that of any."""
    total = {key: Counter[str]() for key in ("skipped", "converted")}
    for counts in all_counts:
        for key, joined in total.items():
            joined.update(counts[key])
    images = sum(counts["images"] for counts in all_counts)
    sums = {key: dict(sorted(joined.items())) for key, joined in total.items()}
    return {"images": images, "ignored": all_counts[0]["ignored"], **sums}
