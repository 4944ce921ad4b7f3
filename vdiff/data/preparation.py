"""From a source of images to a finished dataset: convert, write in order, rename into place; cut short, go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vdiff import __version__
from vdiff.data.colour import NARROW, common_range
from vdiff.data.conversion import ConversionConfig, Converted, convert, value_extremes
from vdiff.data.image_files import UnreadableImageError
from vdiff.data.journal import REJECTED_FILE, Journal, Rejected
from vdiff.data.listing import Item, Listing, few, open_listing
from vdiff.data.shard_store import DATASET, ShardStore
from vdiff.data.shards import IMAGES_PER_SHARD, ShardWriter
from vdiff.data.source import Source
from vdiff.data.sources import build_listing
from vdiff.data.store import DatasetMeta, ImageStore
from vdiff.data.workers import ordered_map
from vdiff.data.writer import StoreWriter
from vdiff.errors import Interrupted, VdiffError
from vdiff.files import parse, write_text
from vdiff.replacing import check_free, take_place
from vdiff.reporting import Reporter, Silent
from vdiff.text import plural

T = TypeVar("T")

CHUNK_ITEMS = 8
# about the time that a pool takes to start: a job that ends within it is quicker without
SECONDS_ALONE = 0.5
TAR_SUFFIX = ".tar"
SAMPLED_ITEMS = 16
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` (1 … count): a machine's share of the images, a contiguous stretch of their order."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"part {self.number} of {self.count}; need 1 <= number <= count")

    def bounds(self, length: int, unit: int) -> tuple[int, int]:
        """The positions [start, stop) of the part; only whole units of `unit` images are shared out."""
        units = -(-length // unit)
        start, stop = (units * k // self.count * unit for k in (self.number - 1, self.number))
        return min(start, length), min(stop, length)


@dataclass(frozen=True)
class Report:
    """What a preparation did; `skipped`, `ignored` and `converted` count by reason, extension and kind.

    `images` and the counts are those of the dataset; `kept` of its images were there from an earlier, interrupted run.
    """

    path: Path
    images: int
    kept: int
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    rejected: int
    skipped: dict[str, int]
    ignored: dict[str, int]
    converted: dict[str, int]
    num_bytes: int
    seconds: float
    fingerprint: str

    @property
    def images_per_second(self) -> float:
        """Images written in each second of this run."""
        return (self.images - self.kept) / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {**asdict(self), "path": str(self.path), "images_per_second": self.images_per_second}


class Writer(Protocol):
    """Where converted images go: one LMDB, or tar shards."""

    meta: DatasetMeta
    num_committed: int

    @property
    def is_due(self) -> bool:
        """Whether a batch is full."""

    def add(self, images: Mapping[int, bytes], label: int | None) -> int:
        """Append an image."""

    def skip(self) -> None:
        """Pass over an image that was rejected."""

    def commit(self) -> None:
        """Make what waits durable, as one batch."""

    def finish(self, counts: Mapping[str, object]) -> DatasetMeta:
        """Commit what waits and complete the description."""


Result = tuple[Converted, int | None] | Rejected


@dataclass(frozen=True)
class _Extremes:
    """The least and the largest values of some items; a function that can be pickled."""

    source: Source

    def __call__(self, items: Sequence[Item]) -> list[tuple[float, float, bool] | None]:
        return [self._of(item) for item in items]

    def _of(self, item: Item) -> tuple[float, float, bool] | None:
        try:
            return value_extremes(self.source.read(item).data)
        except UnreadableImageError:
            return None


@dataclass(frozen=True)
class _Work:
    """What a worker does: read and convert some items; a function that can be pickled."""

    source: Source
    config: ConversionConfig

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        return [self.convert(item) for item in items]

    def convert(self, item: Item) -> Result:
        try:
            sample = self.source.read(item)
            return convert(sample.data, self.config, key=item.name), sample.label
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
    part: Part | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Report:
    """Write the images of `source` as a dataset to the folder `out`, which appears when it is whole.

    Until then everything is in `OUT.partial`. A run that is cut short, however hard, is gone on with by the same call,
    and ends with the same bytes as one that was not. Indices are dense and follow the order of the source, whatever
    `num_workers` (0 = in this process). Files that give no picture are skipped, counted, and listed in
    `rejected.jsonl` in the dataset. A script that asks for workers needs the usual `if __name__ == "__main__":`.

    Args:
        out: with the suffix `.tar`, a folder of tar shards is written, in shuffled order.
        part: only this part of the images, for `merging.merge` to join.
        command: what completes the dataset, for people who find it incomplete.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; all batches that were committed are kept.
        VdiffError: no usable image; `out` exists (unless `overwrite`, and then it must be a dataset); with `strict`,
            the first file that gives no picture; the disk is full or refuses; an unfinished run had other settings.
    """
    reporter = reporter or Silent()
    tars = out.suffix == TAR_SUFFIX
    folder = out.with_suffix("") if tars else out
    if folder.is_symlink():  # to another disk, say: the unfinished dataset must lie on it, too
        folder = folder.resolve()
    job = {
        "source": source.identity(),
        "conversion": asdict(config),
        "part": asdict(part or Part()),
        "tars": tars,
        "version": __version__,
    }
    began = time.monotonic()
    journal = Journal(folder)
    with journal.lock():
        if journal.is_over(job):
            journal.remove()
            meta = (ShardStore(str(folder)) if tars else ImageStore(folder)).meta
            return _report(meta, folder, meta.counts["images"], began)
        check_output(folder, source, overwrite=overwrite)
        try:
            journal.begin(job, command, overwrite=overwrite)
            preparation = _Preparation(source, folder, config, part or Part(), tars, journal, reporter)
            meta, kept = preparation.run(num_workers, strict=strict)
            return _report(meta, folder, kept, began)
        except (KeyboardInterrupt, Interrupted) as stop:
            code, word = (stop.exit_code, str(stop)) if isinstance(stop, Interrupted) else (130, "interrupted")
            raise Interrupted(f"{word}; {journal.kept} images are done, the same command goes on", code) from None
        except VdiffError:
            if journal.is_worthless:
                journal.remove()
            raise


class _Preparation:
    """One run of `prepare`, the journal being open."""

    def __init__(
        self,
        source: Source,
        out: Path,
        config: ConversionConfig,
        part: Part,
        tars: bool,
        journal: Journal,
        reporter: Reporter,
    ) -> None:
        self.source, self.out, self.config, self.part, self.tars = source, out, config, part, tars
        self.journal, self.reporter = journal, reporter

    def run(self, num_workers: int, *, strict: bool) -> tuple[DatasetMeta, int]:
        """Do what is left, and put the dataset in its place; answers how many of its images were there before."""
        self.source.fetch(self.journal.folder)
        listing = self._listing()
        with closing(listing):
            start, stop = self.part.bounds(len(listing), IMAGES_PER_SHARD if self.tars else 1)
            if not len(listing):
                raise self._no_images(listing)
            for remark in listing.remarks:
                self.reporter.line(remark)
            if self.config.value_range == "auto":
                self.config = replace(self.config, value_range=self._common_range(listing, num_workers))
            meta = self._describe(listing)
            writer: Writer = (
                ShardWriter(
                    self.journal.dataset, meta, name=self.source.name, images_per_shard=IMAGES_PER_SHARD, start=start
                )
                if self.tars
                else StoreWriter(self.journal.dataset, meta)
            )
            kept = 0
            if not writer.meta.complete:
                self.journal.restore(writer.num_committed)
                kept = self.journal.tally.images
                if kept:
                    self.reporter.line(f"going on after {self.journal.tally.position} images of an earlier run")
                self._convert(listing, writer, start, stop, num_workers, strict=strict)
                self.journal.record(writer.num_committed + 1)
                self._check_any(listing)
                self._say_empty_classes(listing, start, stop)
                self._say_narrow()
                writer.finish(self.journal.tally.counts(listing.ignored))
        take_place(self.journal.dataset, self.out)
        self.journal.remove()
        return writer.meta, kept

    def _listing(self) -> Listing:
        """The listing of an earlier run, or a new one: images that came since do not change what was begun."""
        file = self.journal.listing_file
        if not file.exists():
            return build_listing(self.source, file, shuffled=self.tars)
        return open_listing(file)

    def _common_range(self, listing: Listing, num_workers: int) -> str | tuple[float, float]:
        """The range of values of all images, by a look at every one; kept in the journal for a run that goes on."""
        file = self.journal.folder / "range.json"
        if not file.exists():
            found: list[tuple[float, float, bool]] = []
            with (
                self.reporter.progress("range", len(listing), "images") as progress,
                closing(_convert_all(_Extremes(self.source), listing.items(), num_workers, len)) as results,
            ):
                for done, extremes in enumerate(results, start=1):
                    found += [extremes] if extremes else []
                    progress.update(done)
            write_text(file, json.dumps(common_range(found) or "full"))
        limits = parse(file.read_text(encoding="utf-8"))
        if isinstance(limits, str):
            return limits
        self.reporter.line(f"range of values: {limits[0]:g},{limits[1]:g}")
        return limits[0], limits[1]

    def _convert(
        self, listing: Listing, writer: Writer, start: int, stop: int, num_workers: int, *, strict: bool
    ) -> None:
        work, journal = _Work(self.source, self.config), self.journal
        first = start + journal.tally.position
        self._check_space(work, listing, first, stop)
        with (
            self.reporter.progress("prepare", stop - start, "images", start=first - start) as progress,
            closing(_convert_all(work, listing.items(first, stop), num_workers, _num_bytes)) as results,
        ):
            for result in results:
                if isinstance(result, Rejected):
                    if strict:
                        raise VdiffError(
                            str(result), "mend it and give the same command again, or leave out --strict to skip it"
                        )
                    journal.add_rejected(result)
                    writer.skip()
                else:
                    converted, label = result
                    journal.add_image(converted.kinds)
                    writer.add(converted.images, label)
                if writer.is_due:
                    journal.record(writer.num_committed + 1)
                    writer.commit()
                skipped = journal.tally.skipped.total()
                progress.update(journal.tally.position, f"{skipped} skipped" if skipped else "")

    def _check_space(self, work: _Work, listing: Listing, start: int, stop: int) -> None:
        """Refuse what cannot fit, by the size of a few images that are converted for it.

        Raises:
            VdiffError: the rest of the images needs more than is free.
        """
        count = stop - start
        free = shutil.disk_usage(self.journal.folder).free
        at_most = count * sum(self.config.channels * size**2 + PAGE_BYTES for size in self.config.sizes)
        if at_most < free / 2:
            return
        tried = [next(listing.items(start + count * k // SAMPLED_ITEMS)) for k in range(min(SAMPLED_ITEMS, count))]
        good = [result[0] for item in tried if not isinstance(result := work.convert(item), Rejected)]
        sample = sum(_stored_bytes(len(data)) for converted in good for data in converted.images.values())
        needed = sample / len(tried) * count
        if needed > free:
            raise VdiffError(
                f"about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free where {self.out} goes",
                "free space, choose another --out, or a smaller --size or --quality",
            )

    def _describe(self, listing: Listing) -> DatasetMeta:
        config = self.config
        settings = json.dumps([listing.fingerprint, asdict(config), self.tars, __version__], sort_keys=True)
        return DatasetMeta(
            name=self.source.name,
            sizes=config.sizes,
            channels=config.channels,
            image_format=config.image_format,
            quality=config.quality if config.image_format == "jpeg" else None,
            crop=config.crop,
            resample=config.resample,
            background="#{:02x}{:02x}{:02x}".format(*config.background),
            value_range="" if isinstance(config.value_range, str) else "{:g},{:g}".format(*config.value_range),
            class_names=listing.class_names,
            origin=hashlib.sha256(settings.encode()).hexdigest(),
            shard=f"{self.part.number}/{self.part.count}" if self.part.count > 1 else "",
            vdiff_version=__version__,
        )

    def _no_images(self, listing: Listing) -> VdiffError:
        ignored = ", ".join(f"{count} {extension}" for extension, count in listing.ignored.items())
        found = f"; it holds {ignored}" if ignored else ""
        place = self.source.path or self.source.name
        return VdiffError(f"no images in {place}{found}", "give a folder or an archive with image files")

    def _check_any(self, listing: Listing) -> None:
        tally = self.journal.tally
        if not tally.images and self.part.count == 1:
            self.journal.kept = 0
            try:
                with open(self.journal.dataset / REJECTED_FILE, encoding="utf-8") as file:
                    first = str(Rejected(**parse(file.readline())))
            except (OSError, ValueError, TypeError) as error:
                first = f"{REJECTED_FILE} cannot be read: {error}"
            raise VdiffError(f"none of {len(listing)} images could be read", f"the first: {first}")

    def _say_narrow(self) -> None:
        """Say that most pictures of more than 8 bits are dark or flat."""
        converted = self.journal.tally.converted
        if (narrow := converted[NARROW]) * 2 > converted["16-bit"] + converted["float"]:
            what = f"{plural(narrow, 'image')} fill less than a quarter of the range of values"
            self.reporter.line(f"{what}, so they are dark or flat; spread them with --range auto --overwrite")

    def _say_empty_classes(self, listing: Listing, start: int, stop: int) -> None:
        """Name the classes of which no image could be read: they keep their numbers, which other parts share."""
        if not self.journal.tally.skipped or not listing.class_names or self.part.count > 1:
            return
        lines = (self.journal.dataset / REJECTED_FILE).read_text(encoding="utf-8").splitlines()
        rejected = {json.loads(line)["path"] for line in lines}
        empty = dict.fromkeys(range(len(listing.class_names)))
        for item in listing.items(start, stop):
            if item.label is None or not empty:
                return
            if item.name not in rejected:
                empty.pop(item.label, None)
        if empty:
            names = few([listing.class_names[label] for label in empty])
            self.reporter.line(f"no image could be read of {names}; prepare again without, or train an empty class")


def _report(meta: DatasetMeta, out: Path, kept: int, began: float) -> Report:
    counts = meta.counts
    return Report(
        path=out,
        images=counts["images"],
        kept=kept,
        sizes=meta.sizes,
        class_names=meta.class_names,
        rejected=sum(counts["skipped"].values()),
        skipped=counts["skipped"],
        ignored=counts["ignored"],
        converted=counts["converted"],
        num_bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.monotonic() - began,
        fingerprint=meta.fingerprint,
    )


def check_output(out: Path, source: Source, *, overwrite: bool) -> None:
    """Refuse, before any work, an output that must not be replaced.

    Raises:
        VdiffError: `out` exists and `overwrite` is off; it is no dataset; or the images to be read lie in it.
    """
    if source.path is not None and source.path.resolve().is_relative_to(out.resolve()):
        raise VdiffError(f"the images lie in the output folder {out}", "choose another --out")
    check_free(out, DATASET, overwrite=overwrite)


def _convert_all(
    work: Callable[[Sequence[Item]], list[T]], items: Iterator[Item], num_workers: int, size: Callable[[list[T]], int]
) -> Generator[T, None, None]:
    """The results in the order of `items`; a pool takes over from this process when the work proves long."""
    chunks = iter(lambda: list(islice(items, CHUNK_ITEMS)), [])
    alone_until = time.monotonic() + SECONDS_ALONE
    while (num_workers == 0 or time.monotonic() < alone_until) and (chunk := next(chunks, None)):
        yield from work(chunk)
    if num_workers and (chunk := next(chunks, None)):
        with closing(ordered_map(work, chain([chunk], chunks), num_workers, size)) as mapped:
            for results in mapped:
                yield from results


def _stored_bytes(num_bytes: int) -> float:
    """What a value takes in LMDB: pages of its own if it is large, else its share of pages that are seldom full."""
    return -(-(num_bytes + 16) // PAGE_BYTES) * PAGE_BYTES if num_bytes > PAGE_BYTES / 2 else 1.5 * (num_bytes + 64)


def _num_bytes(results: Sequence[Result]) -> int:
    return sum(len(data) for r in results if not isinstance(r, Rejected) for data in r[0].images.values())
