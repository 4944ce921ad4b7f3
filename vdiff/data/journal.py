"""An unfinished preparation: what it is of, how far it is, and what was skipped; whole after a kill at any moment."""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vdiff.data.store import JOB_FILE, partial_folder
from vdiff.errors import VdiffError, printable
from vdiff.files import make_folder, parse, read_json, refusal, write_text
from vdiff.records import check_same_settings
from vdiff.replacing import Kind, check_free, discard, holds_keys, locked

REJECTED_FILE = "rejected.jsonl"
DATASET_FOLDER = "dataset"


FILES = (
    r"lock|job\.json|(listing|journal)\.sqlite(-\w+)?|unpacked\.tar|arr_0\.npy|range\.json"
    r"|dataset/((data|lock)\.mdb|rejected\.jsonl|index\.json|[^/]+-\d{6,}\.tar)"
)
PREPARATION = Kind("preparation", lambda folder: FILES if holds_keys(folder / JOB_FILE, "job", "command") else "")


@dataclass(frozen=True)
class Rejected:
    """A file that was skipped: `reason` is one of a few words, `detail` what the decoder said."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Tally:
    """Where a preparation is: images of the source that are done, and what became of them."""

    position: int = 0
    images: int = 0
    rejected_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)

    def counts(self, ignored: Mapping[str, int]) -> dict[str, Any]:
        """What the dataset's description says of its source."""
        return {
            "images": self.images,
            "skipped": dict(sorted(self.skipped.items())),
            "ignored": dict(ignored),
            "converted": dict(sorted(self.converted.items())),
        }


class Journal:
    """The folder `OUT.partial` of an unfinished preparation.

    `record` comes before the commit of each batch of images. After a kill, the number of batches that the dataset
    itself has says which record holds; the list of rejected files is cut back to what it was then.

    `tally` counts what was done, `kept` is the position that a run which ends now would go on from.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, partial_folder(out)
        self.dataset = self.folder / DATASET_FOLDER
        self.listing_file = self.folder / "listing.sqlite"
        self.tally = Tally()
        self.kept = 0
        self._is_new = False
        self._database: sqlite3.Connection | None = None
        self._rejected: list[str] = []

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make sure that only one process works on it.

        Raises:
            VdiffError: another one does, or the folder holds something else.
        """
        with locked(self.out, self.folder):
            check_free(self.folder, PREPARATION, overwrite=True)
            try:
                yield
            finally:
                self.close()

    def is_over(self, job: Mapping[str, Any]) -> bool:
        """Whether this very job was finished and put in its place by a run that died before it could leave."""
        before = self._job()
        return bool(before and before["job"] == _plain(job) and not self.dataset.exists() and self.out.exists())

    def begin(self, job: Mapping[str, Any], command: str, *, overwrite: bool) -> None:
        """Go on with the same job, or begin it.

        Raises:
            VdiffError: another job is unfinished here, and `overwrite` is off.
        """
        job = _plain(job)
        before = self._job()
        if before and not overwrite:
            hint = f"go on with it: {before['command']}; or give --overwrite to begin anew"
            done = f"{self.folder} holds an unfinished preparation"
            check_same_settings(before["job"], job, done=done, hint=lambda _: hint)
        if before and before["job"] != job:
            self.remove()
        self._is_new = before is None or before["job"] != job
        make_folder(self.dataset)  # before the job: `is_over` relies on it
        write_text(self.folder / JOB_FILE, json.dumps({"job": job, "command": command}, indent=1))
        self._database = sqlite3.connect(self.folder / "journal.sqlite", isolation_level=None)
        self._execute("PRAGMA synchronous = FULL")
        self._execute("CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, tally TEXT)")

    def restore(self, num_committed: int) -> None:
        """Take up the tally after batch `num_committed`; what was noted later did not come to be."""
        self._execute("DELETE FROM batches WHERE number > ?", num_committed)
        rows = self._execute("SELECT tally FROM batches WHERE number = ?", num_committed)
        if num_committed and not rows:
            raise VdiffError(f"{self.folder} does not fit together", "give --overwrite to begin anew")
        if rows:
            try:
                text, _, check = rows[0][0].partition("\n")
                if check not in ("", _check_of(num_committed, text)):
                    raise ValueError
                values = parse(text)
                values |= {key: Counter(values[key]) for key in ("skipped", "converted")}
                self.tally = Tally(**values)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise VdiffError(f"{self.folder}/journal.sqlite is damaged", "give --overwrite to begin anew") from None
        self.kept = self.tally.position
        if self._rejected_file.exists():
            os.truncate(self._rejected_file, self.tally.rejected_bytes)

    def add_image(self, kinds: Sequence[str]) -> None:
        """Count an image that was converted."""
        self.tally.position += 1
        self.tally.images += 1
        self.tally.converted.update(kinds)

    def add_rejected(self, rejected: Rejected) -> None:
        """Note a file that was skipped."""
        self.tally.position += 1
        self.tally.skipped[rejected.reason] += 1
        self._rejected.append(printable(json.dumps(asdict(rejected), ensure_ascii=False)) + "\n")

    def record(self, number: int) -> None:
        """Make durable what will be true once batch `number` is committed."""
        if self._rejected:
            try:
                with open(self._rejected_file, "ab") as file:
                    file.write("".join(self._rejected).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    self.tally.rejected_bytes = file.tell()
            except OSError as error:
                raise refusal(self._rejected_file, error) from None
            self._rejected.clear()
        text = json.dumps(vars(self.tally))
        self._execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", number, f"{text}\n{_check_of(number, text)}")
        self.kept = self.tally.position

    @property
    def is_worthless(self) -> bool:
        """Whether this run began it and has kept nothing yet."""
        return self._is_new and not self.kept

    def remove(self) -> None:
        """Take the folder away."""
        self.close()
        discard(self.folder)

    def close(self) -> None:
        """Let go of the files."""
        if self._database is not None:
            self._database.close()
            self._database = None

    @property
    def _rejected_file(self) -> Path:
        return self.dataset / REJECTED_FILE

    def _job(self) -> dict[str, Any] | None:
        path, advice = self.folder / JOB_FILE, f"delete {self.folder}"
        if not path.exists():
            return None
        before = read_json(path, advice)
        if not (isinstance(before.get("job"), dict) and isinstance(before.get("command"), str)):
            raise VdiffError(f"{path} cannot be read: it describes no preparation", advice)
        return before

    def _execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        assert self._database is not None
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise VdiffError(f"cannot write {self.folder}: {error}", "free space or choose another --out") from None


def _check_of(number: int, text: str) -> str:
    return f"{zlib.crc32(f'{number} {text}'.encode()):08x}"


def _plain(job: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists, not tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(job))
    return plain
