"""From a source of images to a finished dataset: convert, write in order, rename into place."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vdiff import __version__
from vdiff.data.conversion import ConversionConfig, Converted, UnreadableImageError, convert
from vdiff.data.sources import Item, Listing, Source
from vdiff.data.store import DATA_FILE, DatasetMeta, is_dataset
from vdiff.data.workers import ordered_map
from vdiff.data.writer import StoreWriter
from vdiff.errors import VdiffError
from vdiff.files import new_folder, write_text
from vdiff.reporting import Reporter, Silent

REJECTED_FILE = "rejected.jsonl"
CHUNK_ITEMS = 8
# the time a pool takes to start: a job that ends within it is quicker without
SECONDS_ALONE = 1.0


@dataclass(frozen=True)
class Rejected:
    """A file that was skipped: `reason` is one of a few words, `detail` what the decoder said."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Report:
    """What a preparation did; `skipped`, `ignored` and `converted` count by reason, extension and kind."""

    path: Path
    images: int
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    skipped: dict[str, int]
    rejected: tuple[Rejected, ...]
    ignored: dict[str, int]
    converted: dict[str, int]
    num_bytes: int
    seconds: float
    fingerprint: str

    @property
    def images_per_second(self) -> float:
        """Images written in each second of the whole preparation."""
        return self.images / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {**asdict(self), "path": str(self.path), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class _Work:
    """What a worker does: read and convert some items; a function that can be pickled."""

    source: Source
    config: ConversionConfig

    def __call__(self, items: Sequence[Item]) -> list[Converted | Rejected]:
        return [self.convert(item) for item in items]

    def convert(self, item: Item) -> Converted | Rejected:
        try:
            return convert(self.source.read(item.name), self.config)
        except UnreadableImageError as error:
            return Rejected(item.name, error.reason, error.detail)


def prepare(
    source: Source,
    out: Path,
    config: ConversionConfig,
    *,
    num_workers: int = 0,
    overwrite: bool = False,
    strict: bool = False,
    reporter: Reporter | None = None,
) -> Report:
    """Write the images of `source` as a dataset to the folder `out`, which appears when it is whole.

    Indices are dense and follow the order of the source, whatever `num_workers` (0 = in this process). Files that give
    no picture are skipped, reported, and listed in `rejected.jsonl` in the dataset. A script that asks for workers
    needs the usual `if __name__ == "__main__":`.

    Raises:
        VdiffError: no usable image; `out` exists (unless `overwrite`, and then it must be a dataset); with `strict`,
            the first file that gives no picture; the disk refuses.
    """
    reporter = reporter or Silent()
    began = time.monotonic()
    check_output(out, source, overwrite=overwrite)
    listing = source.list()
    if not listing.items:
        ignored = ", ".join(f"{count} {extension}" for extension, count in listing.ignored.items())
        found = f"; it holds {ignored}" if ignored else ""
        raise VdiffError(f"no images in {source.path or source.name}{found}", "give a folder or a zip with image files")
    if listing.remark:
        reporter.line(listing.remark)
    with new_folder(out, overwrite=overwrite) as folder:
        rejected: list[Rejected] = []
        kinds = Counter[str]()
        meta = _describe(source, config, listing)
        with (
            StoreWriter(folder, meta) as writer,
            reporter.progress("prepare", len(listing.items), "images") as progress,
            closing(_convert_all(_Work(source, config), listing.items, num_workers)) as results,
        ):
            for done, (item, result) in enumerate(zip(listing.items, results, strict=True), start=1):
                if isinstance(result, Converted):
                    writer.add(result.images, item.label)
                    kinds.update(result.kinds)
                elif strict:
                    raise VdiffError(str(result), "mend or remove the file, or leave out --strict to skip such files")
                else:
                    rejected.append(result)
                progress.update(done, f"{len(rejected)} skipped" if rejected else "")
            if not writer.length:
                raise VdiffError(f"none of {len(rejected)} images could be read", f"the first: {rejected[0]}")
            counts: dict[str, Any] = {
                "images": writer.length,
                "skipped": len(rejected),
                "ignored": dict(listing.ignored),
                "converted": dict(sorted(kinds.items())),
            }
            meta = writer.finish(counts)
        if rejected:
            lines = [json.dumps(asdict(each), ensure_ascii=False) for each in rejected]
            write_text(folder / REJECTED_FILE, "\n".join(lines) + "\n")
        num_bytes = (folder / DATA_FILE).stat().st_size
    return Report(
        path=out,
        images=meta.counts["images"],
        sizes=meta.sizes,
        class_names=meta.class_names,
        skipped=dict(Counter(each.reason for each in rejected).most_common()),
        rejected=tuple(rejected),
        ignored=meta.counts["ignored"],
        converted=meta.counts["converted"],
        num_bytes=num_bytes,
        seconds=time.monotonic() - began,
        fingerprint=meta.fingerprint,
    )


def check_output(out: Path, source: Source, *, overwrite: bool) -> None:
    """Refuse, before any work, an output that must not be replaced.

    Raises:
        VdiffError: `out` exists and `overwrite` is off; it is no dataset; or the images to be read lie in it.
    """
    if not out.exists():
        return
    if source.path is not None and source.path.resolve().is_relative_to(out.resolve()):
        raise VdiffError(f"the images lie in the output folder {out}", "choose another --out")
    empty = out.is_dir() and not any(out.iterdir())
    if not (empty or is_dataset(out)):
        raise VdiffError(f"{out} exists and is not a dataset", "choose another --out; only datasets are ever replaced")
    if not overwrite:
        raise VdiffError(f"{out} exists already", "give --overwrite to replace it, or another --out")


def _describe(source: Source, config: ConversionConfig, listing: Listing) -> DatasetMeta:
    return DatasetMeta(
        name=source.name,
        sizes=config.sizes,
        channels=config.channels,
        image_format=config.image_format,
        quality=config.quality if config.image_format == "jpeg" else None,
        crop=config.crop,
        resample=config.resample,
        background="#{:02x}{:02x}{:02x}".format(*config.background),
        class_names=listing.class_names,
        vdiff_version=__version__,
    )


def _convert_all(
    work: Callable[[Sequence[Item]], list[Converted | Rejected]], items: Sequence[Item], num_workers: int
) -> Generator[Converted | Rejected, None, None]:
    """The results in the order of `items`; a pool takes over from this process when the work proves long."""
    chunks = (items[start : start + CHUNK_ITEMS] for start in range(0, len(items), CHUNK_ITEMS))
    alone_until = time.monotonic() + SECONDS_ALONE
    while (num_workers == 0 or time.monotonic() < alone_until) and (chunk := next(chunks, None)):
        yield from work(chunk)
    if num_workers and (chunk := next(chunks, None)):
        with closing(ordered_map(work, chain([chunk], chunks), num_workers)) as mapped:
            for results in mapped:
                yield from results
