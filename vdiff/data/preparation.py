"""Preparing a dataset from a source of images: convert, write in order, rename into place; resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vdiff import __version__
from vdiff.data.audio import EXTENSIONS as SOUNDS
from vdiff.data.audio import AudioConfig, EncodedSound
from vdiff.data.buckets import name_of
from vdiff.data.colour import NARROW, common_range
from vdiff.data.conversion import ConversionConfig, Converted, value_extremes
from vdiff.data.image_files import UnreadableImageError
from vdiff.data.listing import Item, Listing, few, open_listing
from vdiff.data.shards import DATASET, IMAGES_PER_SHARD, ShardStore, ShardWriter
from vdiff.data.source import Source
from vdiff.data.sources import build_listing
from vdiff.data.store import (
    BEGIN_ANEW,
    JOB_FILE,
    PAGE_BYTES,
    REJECTED_FILE,
    DatasetMeta,
    ImageStore,
    StoreWriter,
    partial_folder,
)
from vdiff.data.workers import ordered_map
from vdiff.errors import OptionError, VdiffError, explained, printable, stop_explained
from vdiff.files import make_folder, parse, read_json, write_text, writing
from vdiff.records import check_same_settings
from vdiff.replacing import Kind, check_free, discard, holds_keys, locked, take_place
from vdiff.reporting import Reporter, Silent
from vdiff.text import plural

T = TypeVar("T")

CHUNK_ITEMS = 8
TAR_SUFFIX = ".tar"
SAMPLED_ITEMS = 16
FILES = (
    r"lock|job\.json|(listing|journal)\.sqlite(-\w+)?|unpacked(-\d+)?\.tar|arr_0\.npy|range\.json"
    r"|dataset/((data|lock)\.mdb|rejected\.jsonl|index\.json|[^/]+-\d{6,}\.tar)"
)
PREPARATION = Kind("preparation", lambda folder: FILES if holds_keys(folder / JOB_FILE, "job", "command") else "")


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` (1 … count): a machine's share of the images, contiguous in their order."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"part {self.number} of {self.count}; need 1 <= number <= count")

    def bounds(self, length: int, unit: int) -> tuple[int, int]:
        """The positions [start, stop) of the part; images are divided in whole units of `unit` images."""
        units = -(-length // unit)
        start, stop = (min(units * k // self.count * unit, length) for k in (self.number - 1, self.number))
        return start, stop


@dataclass(frozen=True)
class Report:
    """The report of a preparation; `skipped`, `ignored` and `converted` count by reason, extension and kind.

    `images` and the counts are those of the dataset; `kept` of its images come from an earlier, interrupted run.
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
    captions: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    has_conditions: bool = False
    rate: int = 0

    @property
    def images_per_second(self) -> float:
        """Images that this run wrote per second."""
        return (self.images - self.kept) / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {**asdict(self), "path": str(self.path), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Rejected:
    """A skipped file: `reason` is one of a few phrases, `detail` the decoder's message."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


Config = ConversionConfig | AudioConfig
Encoded = Converted | EncodedSound
Result = tuple[list[Encoded], int | None, str] | Rejected
"""The samples of an item of the source, their class and captions."""


@dataclass
class Tally:
    """The progress of a preparation: finished images of the source, and what happened to them."""

    position: int = 0
    images: int = 0
    captions: int = 0
    rejected_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)


class Journal:
    """The folder `OUT.partial` of an unfinished preparation: its job, its progress, and the skipped files.

    `record` comes before the commit of each batch of images. After a kill, the number of batches in the dataset
    determines which record is valid; the list of rejected files is cut back accordingly.

    `tally` counts what was done, `kept` is the position where the next run continues if this one ends now.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, partial_folder(out)
        self.dataset = self.folder / "dataset"
        self.tally = Tally()
        self.kept = 0
        self.is_new = False
        self._rejected: list[str] = []
        self._rejected_file = self.dataset / REJECTED_FILE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for one process. Raises VdiffError: another process has it, or it holds something else."""
        with locked(self.out, self.folder):
            check_free(self.folder, PREPARATION, overwrite=True)
            yield

    def is_over(self, job: Mapping[str, Any]) -> bool:
        """Whether a run finished this job and moved it to its place, but died before it could exit."""
        before = self._job()
        return bool(before and before["job"] == job and not self.dataset.exists() and self.out.exists())

    def begin(self, job: Mapping[str, Any], command: str, *, overwrite: bool) -> None:
        """Continue the same job, or begin it.

        Raises:
            VdiffError: another job is unfinished here, and `overwrite` is off.
        """
        before = self._job()
        if before and not overwrite:
            hint = f"continue it: {before['command']}; or {BEGIN_ANEW}"
            done = f"{self.folder} holds an unfinished preparation"
            check_same_settings(before["job"], job, done=done, hint=lambda _: hint)
        self.is_new = before is None or before["job"] != job
        if before and self.is_new:
            self.remove()
        make_folder(self.dataset)  # before the job file, as `is_over` relies on it
        write_text(self.folder / JOB_FILE, json.dumps({"job": job, "command": command}, indent=1))
        self._execute("CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, tally TEXT)")

    def restore(self, num_committed: int) -> None:
        """Restore the tally after batch `num_committed`; later records were never committed."""
        self._execute("DELETE FROM batches WHERE number > ?", num_committed)
        rows = self._execute("SELECT tally FROM batches WHERE number = ?", num_committed)
        if num_committed and not rows:
            raise VdiffError(f"{self.folder} is inconsistent", BEGIN_ANEW)
        if rows:
            try:
                text, _, check = rows[0][0].partition("\n")
                if check not in ("", _check_of(num_committed, text)):
                    raise ValueError
                values = parse(text)
                counters = {key: Counter(values[key]) for key in ("skipped", "converted", "buckets")}
                self.tally = Tally(**values | counters)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise VdiffError(f"{self.folder}/journal.sqlite is damaged", BEGIN_ANEW) from None
        self.kept = self.tally.position
        if self._rejected_file.exists():
            os.truncate(self._rejected_file, self.tally.rejected_bytes)

    def add_image(self, converted: Encoded, caption: str) -> None:
        """Count a converted sample."""
        self.tally.images += 1
        self.tally.captions += bool(caption)
        self.tally.converted.update(converted.kinds)
        if converted.shape:
            self.tally.buckets[name_of(*converted.shape[-2:])] += 1

    def add_rejected(self, rejected: Rejected) -> None:
        """Record a skipped file."""
        self.tally.skipped[rejected.reason] += 1
        self._rejected.append(printable(json.dumps(asdict(rejected), ensure_ascii=False)) + "\n")

    def record(self, number: int) -> None:
        """Write, durably, the state after the coming commit of batch `number`."""
        if self._rejected:
            with writing(self._rejected_file), open(self._rejected_file, "ab") as file:
                file.write("".join(self._rejected).encode())
                file.flush()
                os.fsync(file.fileno())
                self.tally.rejected_bytes = file.tell()
            self._rejected.clear()
        text = json.dumps(vars(self.tally))
        self._execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", number, f"{text}\n{_check_of(number, text)}")
        self.kept = self.tally.position

    def remove(self) -> None:
        """Remove the folder."""
        discard(self.folder)

    def rejected(self) -> Iterator[Rejected]:
        """The skipped files, as far as they are recorded.

        Raises:
            OSError, ValueError, TypeError: the list cannot be read.
        """
        with open(self._rejected_file, encoding="utf-8") as file:
            yield from (Rejected(**parse(line)) for line in file)

    def _job(self) -> dict[str, Any] | None:
        path, advice = self.folder / JOB_FILE, f"delete {self.folder}"
        if not path.exists():
            return None
        before = read_json(path, advice)
        if not (isinstance(before.get("job"), dict) and isinstance(before.get("command"), str)):
            raise VdiffError(f"{path} cannot be read: it is not a record of a preparation", advice)
        return before

    def _execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        file, hint = self.folder / "journal.sqlite", "free space or choose another --out"
        with (
            explained(f"cannot write {self.folder}", hint, sqlite3.Error),
            closing(sqlite3.connect(file, isolation_level=None)) as database,
        ):
            database.execute("PRAGMA synchronous = FULL")
            return database.execute(statement, values).fetchall()


def _check_of(number: int, text: str) -> str:
    return f"{zlib.crc32(f'{number} {text}'.encode()):08x}"


def prepare(
    source: Source,
    out: Path,
    config: Config,
    *,
    num_workers: int = 0,
    overwrite: bool = False,
    strict: bool = False,
    part: Part | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Report:
    """Write the images of `source` as a dataset to the folder `out`, which appears when it is complete.

    Until then everything is in `OUT.partial`. The same call continues an interrupted run, even after a kill, and ends
    with the same bytes as an uninterrupted one. Indices are dense and follow the order of the source, for any
    `num_workers` (0 = in this process). Unreadable files are skipped, counted, and listed in the dataset's
    `rejected.jsonl`. A script with workers needs the usual `if __name__ == "__main__":`.

    Args:
        out: the suffix `.tar` means a folder of tar shards, in shuffled order.
        part: prepare only this part of the images, for `datasets.merge`.
        command: the command that completes the dataset, for errors about an incomplete dataset.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; all committed batches are kept.
        VdiffError: there is no usable image; `out` exists (unless `overwrite`, and then it must be a dataset); with
            `strict`, the first unreadable file; the disk is full or refuses; or an unfinished run had other settings.
    """
    if source.has_conditions and config.noun == "sound":
        raise OptionError("sounds have no condition images", "leave the condition out")
    reporter, part = reporter or Silent(), part or Part()
    tars = out.suffix == TAR_SUFFIX
    folder = out.with_suffix("") if tars else out
    if folder.is_symlink():  # for example to another disk: the unfinished dataset must be on it too
        folder = folder.resolve()
    settings = {"conversion": config.to_dict(), "part": asdict(part), "tars": tars, "version": __version__}
    job = json.loads(json.dumps({"source": source.identity(), **settings}))  # with lists for tuples, as it is read
    began = time.monotonic()
    journal = Journal(folder)
    with journal.lock():
        if journal.is_over(job):
            journal.remove()
            meta = (ShardStore(folder) if tars else ImageStore(folder)).meta
            return _report(meta, folder, meta.counts["images"], began)
        if source.path is not None and source.path.resolve().is_relative_to(folder.resolve()):
            raise VdiffError(f"the {config.noun}s lie in the output folder {folder}", "choose another --out")
        check_free(folder, DATASET, overwrite=overwrite, flag="another --name or --out")
        try:
            done = f"{config.items} are done, the same command continues"
            with stop_explained(lambda word: f"{word}; {journal.kept} {done}"):
                journal.begin(job, command, overwrite=overwrite)
                source.fetch(journal.folder)
                file = journal.folder / "listing.sqlite"
                # images added since an interruption are not included
                found = open_listing(file) if file.exists() else build_listing(source, file, config.noun, shuffled=tars)
                with closing(found):
                    meta, kept = _convert_all(source, found, config, part, tars, journal, reporter, num_workers, strict)
                take_place(journal.dataset, folder)
                journal.remove()
                return _report(meta, folder, kept, began)
        except VdiffError:
            if journal.is_new and not journal.kept:
                journal.remove()
            raise


def _convert_all(
    source: Source, listing: Listing, config: Config, part: Part, tars: bool,
    journal: Journal, reporter: Reporter, num_workers: int, strict: bool,
) -> tuple[DatasetMeta, int]:  # fmt: skip
    """Convert the remaining items into `journal.dataset`; returns its description and its earlier number of items."""
    noun = config.noun
    if not len(listing):
        ignored = ", ".join(f"{count} {extension}" for extension, count in listing.ignored.items())
        what = f"no {noun}s in {source.path or source.name}{f'; it holds {ignored}' if ignored else ''}"
        is_other = noun == "image" and not SOUNDS.isdisjoint(listing.ignored)
        hint = "give --kind audio for sounds" if is_other else f"give a folder or an archive with {noun} files"
        raise VdiffError(what, hint)
    if config.buckets and tars:
        raise OptionError("--buckets: tar shards are read in their order", "give an --out without .tar")
    if source.has_conditions and tars:
        raise OptionError("tar shards hold no condition images", "give an --out without .tar")
    if source.has_conditions and config.buckets:
        raise OptionError("--buckets: condition images are prepared as squares", "leave one of the two out")
    if listing.repeats and tars:
        raise OptionError("--repeats: tar shards are read in their order", "give an --out without .tar")
    for remark in listing.remarks:
        reporter.line(remark)
    if isinstance(config, ConversionConfig) and config.value_range == "auto":
        config = replace(config, value_range=_common_range(source, listing, journal, reporter, num_workers))
    meta = _describe(source, listing, config, part, tars)
    start, stop = part.bounds(len(listing), IMAGES_PER_SHARD if tars else 1)
    writer = (
        ShardWriter(journal.dataset, meta, name=source.name, images_per_shard=IMAGES_PER_SHARD, start=start)
        if tars
        else StoreWriter(journal.dataset, meta)
    )
    if writer.meta.complete:
        return writer.meta, 0
    journal.restore(writer.num_committed)
    tally, kept = journal.tally, journal.tally.images
    if kept:
        reporter.line(f"continuing after {tally.position} {config.items} of an earlier run")
    work = partial(_convert, source, config)

    def num_bytes(result: Result) -> int:
        return 0 if isinstance(result, Rejected) else sum(map(len, _encoded(result[0])))

    first = start + tally.position
    _check_space(work, listing, config, first, stop, journal, 1 + source.has_conditions)
    with (
        reporter.progress("prepare", stop - start, config.items, start=tally.position) as progress,
        closing(_map(work, listing, num_workers, first, stop, num_bytes)) as results,
    ):
        for result in results:
            if not isinstance(result, Rejected):
                samples, label, caption = result
                for piece, sample in enumerate(samples):
                    journal.add_image(sample, caption)
                    writer.add(sample.images, label, caption, sample.shape, sample.conditions, piece)
            elif strict:
                hint = "fix it and run the same command again, or leave out --strict to skip it"
                raise VdiffError(str(result), hint)
            else:
                journal.add_rejected(result)
                writer.skip()
            tally.position += 1
            if writer.is_due:
                journal.record(writer.num_committed + 1)
                writer.commit()
            skipped = tally.skipped.total()
            progress.update(tally.position, f"{skipped} skipped" if skipped else "")
    journal.record(writer.num_committed + 1)
    if part.count == 1:
        if not tally.images:
            journal.kept = 0
            try:
                said = str(next(journal.rejected()))
            except (OSError, ValueError, TypeError, StopIteration) as error:
                said = f"{REJECTED_FILE} cannot be read: {error}"
            raise VdiffError(
                f"none of {len(listing)} {config.items} could be read, the first: {said}", "give other files"
            )
        _say_empty_classes(listing, journal, noun, reporter)
    if (narrow := tally.converted[NARROW]) * 2 > tally.converted["16-bit"] + tally.converted["float"]:
        what = f"{plural(narrow, 'image')} fill less than a quarter of the range of values"
        reporter.line(
            f"{what}, so they are dark or flat; spread them with --range auto and another --out, or --overwrite"
        )
    skips, kinds = (dict(sorted(counts.items())) for counts in (tally.skipped, tally.converted))
    counts: dict[str, Any] = {"images": tally.images, "skipped": skips, "ignored": listing.ignored, "converted": kinds}
    if tally.captions:
        counts["captions"] = tally.captions
    if tally.buckets:
        counts["buckets"] = dict(sorted(tally.buckets.items()))
    return writer.finish(counts), kept


def _map(
    work: Callable[[Item], T],
    listing: Listing,
    num_workers: int,
    start: int,
    stop: int,
    num_bytes: Callable[[T], int] = lambda _: 0,
) -> Generator[T, None, None]:
    """The results of the images `start` … `stop` − 1, in order."""
    items, count = listing.items(start, stop), stop - start
    return ordered_map(work, items, num_workers, num_items=count, chunk_items=CHUNK_ITEMS, num_bytes=num_bytes)


def _convert(source: Source, config: Config, item: Item) -> Result:
    try:
        sample = source.read(item)
        return list(config.convert(sample, item.name)), sample.label, item.caption
    except UnreadableImageError as error:
        return Rejected(item.name, error.reason, error.detail)


def _encoded(samples: list[Encoded]) -> list[bytes]:
    """All that is stored of an item."""
    return [data for each in samples for data in (*each.images.values(), *each.conditions.values())]


def _extremes(source: Source, item: Item) -> tuple[float, float, bool] | None:
    """The least and the largest value of an image, see `colour.extremes`."""
    try:
        return value_extremes(source.read(item).data)
    except UnreadableImageError:
        return None


def _common_range(
    source: Source, listing: Listing, journal: Journal, reporter: Reporter, num_workers: int
) -> str | tuple[float, float]:
    """The range of values of all images, from reading every one; stored in the journal for a resumed run."""
    file = journal.folder / "range.json"
    if not file.exists():
        found = []
        with (
            reporter.progress("range", len(listing), "images") as progress,
            closing(_map(partial(_extremes, source), listing, num_workers, 0, len(listing))) as results,
        ):
            for done, extremes in enumerate(results, start=1):
                found += [extremes] if extremes else []
                progress.update(done)
        write_text(file, json.dumps(common_range(found) or "full"))
    limits = parse(file.read_text(encoding="utf-8"))
    if isinstance(limits, str):
        return limits
    reporter.line(f"range of values: {limits[0]:g},{limits[1]:g}")
    return limits[0], limits[1]


def _check_space(
    work: Callable[[Item], Result], listing: Listing, config: Config, start: int, stop: int, journal: Journal,
    files: int,
) -> None:  # fmt: skip
    """Raise VdiffError if the images, in `files` files each, need more than the free space, by converting a few."""
    count = stop - start
    free = shutil.disk_usage(journal.folder).free
    if files * count * config.most_bytes < free / 2:
        return
    tried = [work(next(listing.items(start + count * k // SAMPLED_ITEMS))) for k in range(min(SAMPLED_ITEMS, count))]
    encoded = [data for result in tried if not isinstance(result, Rejected) for data in _encoded(result[0])]
    needed = sum(_stored_bytes(len(data)) for data in encoded) / len(tried) * count
    if needed > free:
        raise VdiffError(
            f"about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free for {journal.out}",
            "free space, choose another --out, or a smaller --size or --quality",
        )


def _stored_bytes(num_bytes: int) -> float:
    """The bytes of a value in LMDB: whole pages if it is large, else its share of pages, which are seldom full."""
    return -(-(num_bytes + 16) // PAGE_BYTES) * PAGE_BYTES if num_bytes > PAGE_BYTES / 2 else 1.5 * (num_bytes + 64)


def _describe(source: Source, listing: Listing, config: Config, part: Part, tars: bool) -> DatasetMeta:
    facts = [listing.fingerprint, config.to_dict(), tars, __version__, *(["conditions"] * source.has_conditions)]
    settings = json.dumps(facts, sort_keys=True)
    return DatasetMeta(
        name=source.name,
        **config.meta_fields(),
        class_names=listing.class_names,
        repeats=listing.repeats,
        has_conditions=source.has_conditions,
        origin=hashlib.sha256(settings.encode()).hexdigest(),
        shard=f"{part.number}/{part.count}" if part.count > 1 else "",
        vdiff_version=__version__,
    )


def _say_empty_classes(listing: Listing, journal: Journal, noun: str, reporter: Reporter) -> None:
    """Report classes without a readable image: they keep their numbers, which other parts share."""
    if not journal.tally.skipped or not listing.class_names:
        return
    rejected = {each.path for each in journal.rejected()}
    empty = dict.fromkeys(range(len(listing.class_names)))
    for item in listing.items():
        if item.label is None or not empty:
            return
        if item.name not in rejected:
            empty.pop(item.label, None)
    if empty:
        names = few([listing.class_names[label] for label in empty])
        reporter.line(f"no readable {noun}s in {names}; prepare again without these classes, or train with them empty")


def _report(meta: DatasetMeta, out: Path, kept: int, began: float) -> Report:
    return Report(
        path=out,
        kept=kept,
        sizes=meta.sizes,
        class_names=meta.class_names,
        rejected=sum(meta.counts["skipped"].values()),
        num_bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.monotonic() - began,
        fingerprint=meta.fingerprint,
        has_conditions=meta.has_conditions,
        rate=meta.rate,
        **meta.counts,
    )
