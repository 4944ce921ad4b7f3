"""Reading an LMDB file that may be damaged or forged: every offset is checked before it is used.

The library maps the file and trusts it: a damaged page, or a file that is cut short meanwhile, crashes the process.

    page  = number u64, –, flags u16 at 10, end of the offsets u16 at 12; for a large value: pages u32 at 12
    node  = low u16, high u16, flags u16, length of the key u16, key, value
    leaf  : value of low + 2¹⁶ high bytes, or (flag 1) the number of its first page
    branch: no value; low, high and flags are the number of the page below

(https://github.com/LMDB/lmdb, libraries/liblmdb/mdb.c)
"""

from __future__ import annotations

import os
import struct
import weakref
from bisect import bisect_left, bisect_right
from pathlib import Path

from vdiff.errors import VdiffError

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER_BYTES, NODE_BYTES, SMALLEST_ENTRY = 16, 8, 10
BRANCH, LEAF, OVERFLOW, KINDS = 1, 2, 4, 0x6F
NO_PAGE = 2**64 - 1
MAX_LEVELS = 32
KNOWN_PAGES = 1024
# magic, version, address, size of the map; the tree of free pages (its first word is the page size); the main tree's
# entries and root; the last page, the transaction
_META = struct.Struct("=IIQQ I44x 32xQQ QQ")


class LmdbFile:
    """The newest state of an LMDB file with one database without duplicate keys. It may be used across a fork.

    Raises:
        VdiffError: the file is damaged, or ends before a page that it should hold; `advice` is the hint.
    """

    def __init__(self, path: Path, advice: str) -> None:
        self.path, self._advice = path, advice
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._page_bytes = 0
        self._known: dict[int, tuple[bool, bytes, tuple[int, ...]]] = {}
        metas = [self._meta(0), self._meta(1)]
        _, self.entries, self._root, self.last_page = max(metas)
        needed, size = (self.last_page + 1) * self._page_bytes, os.fstat(self._file).st_size
        if size < needed:
            raise VdiffError(f"{path} is truncated: {size} of {needed} bytes", advice)
        if self.entries * SMALLEST_ENTRY > size:
            raise self._damaged("it claims to hold more than it can")

    @property
    def used_bytes(self) -> int:
        """The size of all pages."""
        return (self.last_page + 1) * self._page_bytes

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if there is none."""
        found = self._seek(self._root, key)
        return self._value(*found) if found and self._key(*found) == key else None

    def first_key(self, start: bytes) -> bytes | None:
        """The first key from `start` on; None if there is none."""
        if not (found := self._seek(self._root, start)):
            return None
        if (key := self._key(*found)) < start:
            raise self._damaged("its keys are out of order")
        return key

    def _seek(self, number: int, start: bytes, level: int = 0) -> tuple[bytes, int] | None:
        """The page and the node of the first key from `start` on, in the tree below page `number`."""
        if number == NO_PAGE:
            return None
        if level >= MAX_LEVELS:
            raise self._damaged(f"its tree has more than {MAX_LEVELS} levels")
        is_leaf, page, nodes = self._nodes(number)
        if is_leaf:
            place = bisect_left(nodes, start, key=lambda node: self._key(page, node))
            return (page, nodes[place]) if place < len(nodes) else None
        # the key of the first node of a branch counts as the smallest of all
        place = bisect_right(nodes, start, lo=1, key=lambda node: self._key(page, node)) - 1
        found = self._seek(self._below(page, nodes[place]), start, level + 1)
        if found is None and place + 1 < len(nodes):
            return self._seek(self._below(page, nodes[place + 1]), b"", level + 1)
        return found

    def _meta(self, number: int) -> tuple[int, int, int, int]:
        """Transaction, entries, root and last page of one of the two descriptions."""
        data = self._read(number * self._page_bytes + HEADER_BYTES, _META.size)
        magic, version, _, _, page_bytes, entries, root, last_page, transaction = _META.unpack(data)
        if (magic, version) != (MAGIC, VERSION) or page_bytes not in (2**k for k in range(8, 17)):
            raise self._damaged("it does not begin like an LMDB file")
        if self._page_bytes not in (0, page_bytes):
            raise self._damaged("it has pages of two sizes")
        self._page_bytes = page_bytes
        return transaction, entries, root, last_page

    def _nodes(self, number: int) -> tuple[bool, bytes, tuple[int, ...]]:
        """Whether a page of the tree is a leaf, the page, and the offsets of its nodes."""
        if number in self._known:
            return self._known[number]
        page = self._page(number, self._page_bytes)
        flags, end = struct.unpack_from("=HH", page, 10)
        count = (end - HEADER_BYTES) // 2
        if flags & KINDS not in (BRANCH, LEAF) or not 0 < count <= len(page) // 2 - HEADER_BYTES:
            raise self._damaged(f"page {number} is not a page of its tree")
        nodes = struct.unpack_from(f"={count}H", page, HEADER_BYTES)
        if max(nodes) > len(page) - NODE_BYTES:
            raise self._damaged(f"page {number} has a node beyond its end")
        if len(self._known) >= KNOWN_PAGES:
            self._known.clear()
        self._known[number] = flags & LEAF != 0, page, nodes
        return self._known[number]

    def _key(self, page: bytes, node: int) -> bytes:
        (length,) = struct.unpack_from("=H", page, node + 6)
        return page[node + NODE_BYTES : node + NODE_BYTES + length]

    def _below(self, page: bytes, node: int) -> int:
        low, high, top = struct.unpack_from("=HHH", page, node)
        return int(low | high << 16 | top << 32)

    def _value(self, page: bytes, node: int) -> bytes:
        low, high, flags, length = struct.unpack_from("=HHHH", page, node)
        start, size = node + NODE_BYTES + length, low | high << 16
        if flags == 0 and start + size <= len(page):
            return page[start : start + size]
        if flags != 1 or start + 8 > len(page):
            raise self._damaged("it has a value beyond the end of its page")
        (number,) = struct.unpack_from("=Q", page, start)
        large = self._page(number, HEADER_BYTES + size)
        flags, count = struct.unpack_from("=HI", large, 10)
        if flags & KINDS != OVERFLOW or HEADER_BYTES + size > count * self._page_bytes:
            raise self._damaged(f"page {number} does not hold its value")
        return large[HEADER_BYTES:]

    def _page(self, number: int, size: int) -> bytes:
        """The first `size` bytes of a page, after checking its number."""
        if not 1 < number <= self.last_page or number * self._page_bytes + size > self.used_bytes:
            raise self._damaged(f"it refers to page {number} of {self.last_page}")
        page = self._read(number * self._page_bytes, size)
        if struct.unpack_from("=Q", page)[0] != number:
            raise self._damaged(f"page {number} has another number")
        return page

    def _read(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self._file, size, offset)
        else:
            os.lseek(self._file, offset, os.SEEK_SET)
            data = os.read(self._file, size)
        if len(data) < size:
            raise VdiffError(f"{self.path} is truncated: it ends before byte {offset + size}", self._advice)
        return data

    def _damaged(self, reason: str) -> VdiffError:
        return VdiffError(f"{self.path} is damaged: {reason}", self._advice)
