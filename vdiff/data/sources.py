"""The door to all sources of images: a path or a name in, a source out."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from vdiff.data.disk_sources import ON_DISK
from vdiff.data.image_files import extensions
from vdiff.data.listing import Listing, ListingWriter
from vdiff.data.named_sources import BUILT_IN, TORCHVISION, HuggingFace, Torchvision
from vdiff.data.source import Source, SourceOptions
from vdiff.data.store import is_dataset, is_lmdb
from vdiff.errors import VdiffError, shell, suggestion
from vdiff.files import check_regular, elsewhere


def open_source(place: Path | str | None, options: SourceOptions | None = None) -> Source:
    """The source at a path or of a name; None is the digits. What lies on the disk goes before a name.

    Raises:
        VdiffError: no such path or name, or nothing that can be read as images.
        OptionError: an option that the source knows nothing of.
    """
    options = options or SourceOptions()
    if place is None:
        place = "digits"
    if str(place).startswith("hf:"):
        return HuggingFace(str(place), options)
    path = Path(place)
    if not path.exists():
        if str(place) in TORCHVISION:
            return Torchvision(str(place), options)
        if str(place) not in BUILT_IN:
            raise VdiffError(f"{place}: no such file or folder", _nearest(path))
    check_regular(path)
    if not path.exists():
        options.refuse(str(place), "split", "image_column", "label_column")
        return BUILT_IN[str(place)]()
    if is_dataset(path) and not is_lmdb(path):
        raise VdiffError(f"{path} holds tar shards already", f"train on them: python train.py {shell('--data', path)}")
    for accepts, make in ON_DISK:
        if accepts(path):
            return make(path, options)
    raise VdiffError(f"{path} is no folder, zip, tar or dataset", "give a folder of images, or an archive of them")


def _nearest(path: Path) -> str:
    if found := elsewhere(path):
        return found
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := get_close_matches(path.name, siblings, n=1):
        return f"did you mean {path.parent / near[0]}?"
    named = suggestion(str(path), [*TORCHVISION, *BUILT_IN], only_near=True)
    return named or "give a folder of images, a zip or tar, or the name of a set (see --help)"


def build_listing(source: Source, path: Path | None = None, *, shuffled: bool = False) -> Listing:
    """All images of a source in order, kept in the file `path` or in memory."""
    with ListingWriter(path, extensions(), shuffled=shuffled) as listing:
        source.fill(listing)
        return listing.finish()
