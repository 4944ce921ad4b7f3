"""What a large set of images costs beside its decoding: listing, writing and reading it cold, LMDB beside tar shards.

    python benchmarks/scaling.py                     # 200,000 names; 60,000 images of 30 kB in both formats, 4 GB

Images are random bytes, so nothing is converted or decoded: what is left is what the formats cost. *Cold*: the files
are taken out of the page cache before they are read, as if the set were larger than memory. LMDB is read in random
order, image by image; shards from their beginning to their end, as training does.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.data.image_files import extensions
from vdiff.data.listing import ListingWriter
from vdiff.data.shards import ShardStore, ShardWriter
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter

SIZE = 64


def listing(folder: Path, count: int) -> list[list[str]]:
    """Names into their order, on disk: seconds and bytes; then again, for the most that Python held at a time."""

    def fill() -> None:
        with ListingWriter(folder / "listing", extensions()) as writer:
            for number in range(count):
                writer.add_file(f"class_{number % 1000:03d}/image_{number * 7919 % count:09d}.jpg")
            writer.finish().close()

    began = time.perf_counter()
    fill()
    seconds = time.perf_counter() - began
    tracemalloc.start()  # which makes it several times slower
    fill()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    num_bytes = (folder / "listing").stat().st_size
    return [
        ["listing, names a second", f"{count / seconds:,.0f}"],
        ["listing, bytes a name on disk", f"{num_bytes / count:.0f}"],
        ["listing, memory at most", f"{peak / 1e6:.1f} MB"],
    ]


def encoded(count: int, num_bytes: int) -> Iterator[bytes]:
    """Images that no compression makes smaller, of sizes around `num_bytes`."""
    rng = np.random.default_rng(0)
    pool = rng.bytes(2 * num_bytes + 4096)
    for length, start in zip(
        rng.integers(num_bytes // 2, num_bytes * 3 // 2, count), rng.integers(0, 4096, count), strict=True
    ):
        yield pool[start : start + length]


def write(folder: Path, count: int, num_bytes: int, images_per_shard: int) -> tuple[list[list[str]], int]:
    """Both formats from the same bytes: images a second, and bytes on disk beside those of the images."""
    meta = DatasetMeta("bytes", (SIZE,), 3, image_format="jpeg", class_names=("only",))
    rows, content = [], 0
    for name in ("lmdb", "shards"):
        (folder / name).mkdir()
        began = time.perf_counter()
        content = 0
        writer = (
            StoreWriter(folder / name, meta)
            if name == "lmdb"
            else ShardWriter(folder / name, meta, name="bytes", images_per_shard=images_per_shard)
        )
        with writer:
            for data in encoded(count, num_bytes):
                content += len(data)
                writer.add({SIZE: data}, 0)
                if writer.is_due:
                    writer.commit()
            writer.finish({"images": count})
        seconds = time.perf_counter() - began
        total = sum(file.stat().st_size for file in (folder / name).iterdir())
        rows.append([f"{name}, images written a second, durably", f"{count / seconds:,.0f}"])
        rows.append([f"{name}, bytes on disk for a byte of image", f"{total / content:.3f}"])
    return rows, content


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path, count: int, content: int) -> list[list[str]]:
    """Images a second and MB a second, cold and then from the page cache."""
    rows = []
    order = np.random.default_rng(1).permutation(count)[: min(count, 20_000)].tolist()
    forget(folder / "lmdb")
    store = ImageStore(folder / "lmdb")
    for state in ("cold", "cached"):
        began = time.perf_counter()
        read_bytes = sum(len(store.encoded(SIZE, index)) for index in order)
        seconds = time.perf_counter() - began
        rows.append(
            [f"lmdb, random, {state}", f"{len(order) / seconds:,.0f} images/s, {read_bytes / seconds / 1e6:,.0f} MB/s"]
        )
    store.close()
    forget(folder / "shards")
    shards = ShardStore(folder / "shards")
    for state in ("cold", "cached"):
        began = time.perf_counter()
        for number in range(len(shards.shards)):
            for _ in shards.samples(number, (SIZE,)):
                pass
        seconds = time.perf_counter() - began
        rows.append(
            [f"shards, in order, {state}", f"{count / seconds:,.0f} images/s, {content / seconds / 1e6:,.0f} MB/s"]
        )
    return rows


@click.command()
@click.option("--names", default=200_000, show_default=True, help="Names to put in order.")
@click.option("--num_images", default=60_000, show_default=True)
@click.option("--image_bytes", default=30_000, show_default=True, help="Their size on average.")
@click.option("--images_per_shard", default=10_000, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path), help="Where to work; default: the temporary folder.")
def main(names: int, num_images: int, image_bytes: int, images_per_shard: int, scratch: Path | None) -> None:
    """Measure what formats cost at scale."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        rows = listing(folder, names)
        written, content = write(folder, num_images, image_bytes, images_per_shard)
        rows += written + read(folder, num_images, content)
    finally:
        shutil.rmtree(folder)
    title = f"What formats cost: {names:,} names, {num_images:,} images of {image_bytes:,} bytes"
    write_report("scaling", title, ["what", "measured"], rows, machine())


if __name__ == "__main__":
    main()
