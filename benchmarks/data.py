"""Images a second, to a dataset and out of one, beside what this field's repositories do; and the memory it takes.

    python benchmarks/data.py                        # 1,200 images of 1024×1024 to 256×256, with 2 workers
    python benchmarks/data.py --only reading,memory

*Preparation*: beside the loop of the rosinality-style scripts (decode in full, Lanczos, JPEG of quality 100, an LMDB
transaction for each image), in one process and with a pool; and beside the least that can be done: as many loops as
workers, each with its share of the files, that decode at the same reduced scale and write JPEG files. *Reading*:
shuffled, mirrored batches of the same encoded images, normalised on the device, beside torchvision's `ImageFolder` and
an LMDB read with OpenCV, both in a `DataLoader` with the usual transforms. First epoch: nothing was decoded before;
later epochs: ours has kept what it decoded, the others decode again. The files are in the page cache for all. The
sides take turns, and medians are compared. *Memory*: of all processes of a preparation together, sampled while it
runs.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import lmdb
import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder
from vdiff.data.preparation import prepare
from vdiff.data.store import ImageStore, record_key

# torch is imported where it is used: the workers of a preparation, which import this file, need none of it
if TYPE_CHECKING:
    from torch import Tensor

    from vdiff.data.batches import ImageBatches

PARTS = ("preparation", "reading", "memory")
WARM_BATCHES = 4  # not timed: the start of the workers


def write_photographs(folder: Path, count: int, size: int) -> None:
    """JPEG files whose spectrum falls like 1/f, as that of photographs does; no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((8, size, size)))
    fields = np.fft.irfft2(noise / frequency, s=(size, size)).astype(np.float32)
    fields /= fields.std((1, 2), keepdims=True)
    for index in range(count):
        # fields are periodic: shifted and mixed anew they give another picture without another Fourier transform
        shifts = rng.integers(0, size, (4, 2))
        picked = rng.choice(len(fields), 4, replace=False)
        light, *colours = [np.roll(fields[k], shift, (0, 1)) for k, shift in zip(picked, shifts, strict=True)]
        pixels = np.stack([128 + 40 * light + 15 * colour for colour in colours], -1).clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=90)


# Preparation


def field_convert(size: int, path: Path) -> bytes:
    """What the scripts do with an image."""
    image = PIL.Image.open(path).convert("RGB").resize((size, size), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=100)
    return buffer.getvalue()


def field_prepare(source: Path, out: Path, size: int, num_workers: int) -> None:
    """The loop of rosinality's `prepare_data.py`."""
    out.mkdir()
    files, convert = sorted(source.iterdir()), partial(field_convert, size)
    with (
        lmdb.open(str(out), map_size=2**36, readahead=False) as environment,
        multiprocessing.Pool(max(num_workers, 1)) as pool,
    ):
        encoded = pool.imap(convert, files) if num_workers else map(convert, files)
        for index, each in enumerate(encoded):
            with environment.begin(write=True) as transaction:
                transaction.put(record_key(size, index), each)
        with environment.begin(write=True) as transaction:
            transaction.put(b"length", str(len(files)).encode())


def plain_loop(size: int, out: Path, files: list[Path]) -> None:
    """Decode at the scale that vdiff takes, Lanczos, JPEG files of quality 100; nothing else."""
    for path in files:
        image = PIL.Image.open(path)
        image.draft("RGB", (2 * size, 2 * size))
        image = image.convert("RGB").resize((size, size), PIL.Image.Resampling.LANCZOS)
        image.save(out / path.name, quality=100, subsampling=0)


def plain_prepare(source: Path, out: Path, size: int, num_workers: int) -> None:
    """Plain loops side by side."""
    out.mkdir()
    files = sorted(source.iterdir())
    with multiprocessing.Pool(num_workers) as pool:
        pool.map(partial(plain_loop, size, out), [files[k::num_workers] for k in range(num_workers)], chunksize=1)


def our_prepare(source: Path, out: Path, size: int, num_workers: int) -> None:
    """vdiff's preparation."""
    prepare(Folder(source), out, ConversionConfig(sizes=(size,)), num_workers=num_workers)


def preparation(source: Path, scratch: Path, *, size: int, num_workers: int, rounds: int) -> list[list[str]]:
    """Images a second from files to dataset, everything included."""
    count = len(list(source.iterdir()))
    sides = {
        f"vdiff, {num_workers} workers": partial(our_prepare, num_workers=num_workers),
        "Pillow loop, 1 process": partial(field_prepare, num_workers=0),
        f"Pillow loop, pool of {num_workers}": partial(field_prepare, num_workers=num_workers),
        f"plain loops at reduced scale, {num_workers} processes": partial(plain_prepare, num_workers=num_workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for place, (name, run) in enumerate(sides.items()):
            began = time.perf_counter()
            run(source, scratch / f"prepared_{turn}_{place}", size)
            rates[name].append(count / (time.perf_counter() - began))
    return table("preparation", rates)


# Reading


class LmdbImages:
    """The dataset class of the rosinality-style repositories, with OpenCV as decoder."""

    def __init__(self, path: Path, length: int, size: int, transform: Callable[[np.ndarray], Tensor]) -> None:
        self.path, self.length, self.size, self.transform = path, length, size, transform
        self.environment: lmdb.Environment | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        import cv2

        if self.environment is None:
            self.environment = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, meminit=False)
        with self.environment.begin() as transaction:
            encoded = transaction.get(record_key(self.size, index))
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        return self.transform(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def device() -> str:
    """Where batches are wanted."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def theirs(dataset: Any, batch_size: int, num_workers: int) -> Generator[Tensor, None, None]:
    """An epoch through a `DataLoader`, on the device."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, pin_memory=device() == "cuda"
    )
    for batch in loader:
        images = batch[0] if isinstance(batch, list) else batch
        yield images.to(device(), non_blocking=True)


def ours(batches: ImageBatches, start: int = 0) -> Generator[Tensor, None, None]:
    """The batches as the training loop takes them."""
    from vdiff.models.codec import from_uint8

    with closing(batches.start_at(start)) as found:
        for batch in found:
            yield from_uint8(batch.images.to(device(), non_blocking=True))


def images_per_second(batches: Generator[Tensor, None, None], limit: int) -> float:
    """Of the batches up to `limit` that come after the first few; ends the workers."""
    import torch

    for _ in islice(batches, WARM_BATCHES):
        pass
    count, began = 0, time.perf_counter()
    for images in islice(batches, limit - WARM_BATCHES):
        count += len(images)
    if device() == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    batches.close()
    return count / seconds


def reading(
    source: Path, scratch: Path, *, size: int, num_workers: int, rounds: int, batch_size: int
) -> list[list[str]]:
    """Images a second from a dataset to normalised batches on the device."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from vdiff.data.batches import ImageBatches

    path, folder = scratch / "dataset", scratch / "files" / "all"
    our_prepare(source, path, size, num_workers)
    store = ImageStore(path)
    folder.mkdir(parents=True)
    for index in range(len(store)):
        (folder / f"{index:05d}.jpg").write_bytes(store.encoded(size, index))
    epoch = len(store) // batch_size
    # loaders hold two batches a worker ready: as many are ready when the timing ends as when it began
    last = epoch - 2 * num_workers
    if last <= WARM_BATCHES:
        raise click.UsageError(f"{epoch} batches an epoch; give more --num_images, or a smaller --batch_size")
    normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
    files = ImageFolder(
        str(folder.parent), transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])
    )
    # a copy, because LMDB opens no file twice in a process, nor in its forks
    other = shutil.copytree(path, scratch / "copy")
    arrays = LmdbImages(
        other,
        len(store),
        size,
        transforms.Compose([transforms.ToTensor(), transforms.RandomHorizontalFlip(), normalise]),
    )
    rates: dict[str, list[float]] = {
        name: [] for name in ("vdiff, first epoch", "vdiff, later epochs", "ImageFolder", "LMDB + OpenCV")
    }
    for _ in range(rounds):
        batches = ImageBatches(
            store, image_size=size, batch_size=batch_size, seed=0, flip=True, num_workers=num_workers,
            pin_memory=device() == "cuda",
        )  # fmt: skip
        rates["vdiff, first epoch"].append(images_per_second(ours(batches), last))
        rates["ImageFolder"].append(images_per_second(theirs(files, batch_size, num_workers), last))
        if importlib.util.find_spec("cv2"):
            rates["LMDB + OpenCV"].append(images_per_second(theirs(arrays, batch_size, num_workers), last))
        with closing(ours(batches)) as rest:
            for _ in islice(rest, epoch + 2):  # to the end of the first epoch
                pass
        rates["vdiff, later epochs"].append(images_per_second(ours(batches), 4 * epoch))
    return table("reading", rates)


# Memory


def memory(scratch: Path, *, counts: list[int], num_workers: int) -> list[list[str]]:
    """The most that a preparation takes, main process and workers, for few images and for many."""
    originals = scratch / "originals"
    write_photographs(originals, 100, 512)  # large enough for the workers to be started for 1,000 of them
    rows = []
    for count in counts:
        folder = scratch / f"links_{count}"
        folder.mkdir()
        for index in range(count):
            os.link(originals / f"{index % 100:05d}.jpg", folder / f"{index:05d}.jpg")
        arguments = [str(folder), str(scratch / f"small_{count}"), "32", str(num_workers)]
        child = subprocess.Popen([sys.executable, __file__, "--prepare_only", *arguments])
        everything, private = peak_memory(child)
        if child.returncode:
            raise click.ClickException(f"a preparation of {count} images failed")
        taken = f"{private / 2**20:.0f} MiB" if private else "needs /proc"
        mapped = f"{everything / 2**20:.0f} MiB with mapped files" if private else ""
        rows.append(["memory", f"vdiff, {count} images, {num_workers} workers", taken, mapped, ""])
    return rows


def peak_memory(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Largest sums over a process and its descendants until it ends, in bytes: (resident, of it not mapped files)."""
    peaks = (0, 0)
    while child.poll() is None:
        found = [resident(process) for process in family(child.pid)]
        peaks = max(peaks[0], sum(all_of for all_of, _ in found)), max(peaks[1], sum(own for _, own in found))
        time.sleep(0.02)
    return peaks


def family(pid: int) -> list[int]:
    """A process and its descendants, as far as they still live."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def resident(pid: int) -> tuple[int, int]:
    """(all, without mapped files) of the memory of one process, in bytes; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return 1024 * kib.get("VmRSS", 0), 1024 * (kib.get("RssAnon", 0) + kib.get("RssShmem", 0))


# All together


def table(part: str, rates: dict[str, list[float]]) -> list[list[str]]:
    """A row for each side: median, least and most, and how many times as fast vdiff's sides are."""
    medians = {name: statistics.median(found) for name, found in rates.items() if found}
    rows = []
    for name, found in rates.items():
        if not found:
            rows.append([part, name, "not installed", "", ""])
            continue
        ratios = [median / medians[name] for ours, median in medians.items() if ours.startswith("vdiff")]
        times = "" if name.startswith("vdiff") else ", ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append([part, name, f"{medians[name]:.0f} images/s", f"{min(found):.0f} … {max(found):.0f}", times])
    return rows


def chosen(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    """The parts that `--only` names, in the order in which they run."""
    names = value.split(",")
    if wrong := [name for name in names if name not in PARTS]:
        raise click.BadParameter(f"{wrong[0]!r}; choose from {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


@click.command()
@click.option("--only", default=",".join(PARTS), show_default=True, callback=chosen, help="The parts to measure.")
@click.option("--num_images", default=1200, show_default=True, help="Photographs to prepare, and then to read.")
@click.option("--source_size", default=1024, show_default=True, metavar="PIXELS")
@click.option("--size", default=256, show_default=True, metavar="PIXELS")
@click.option("--batch_size", default=32, show_default=True)
@click.option("--num_workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, help="Turns of each side.")
@click.option("--memory_images", default="1000,50000", show_default=True, help="Numbers of images for the memory.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Where to work; default: the temporary folder.")
@click.option("--prepare_only", nargs=4, hidden=True, help="The child whose memory is measured.")
def main(
    only: list[str],
    num_images: int,
    source_size: int,
    size: int,
    batch_size: int,
    num_workers: int,
    rounds: int,
    memory_images: str,
    scratch: Path | None,
    prepare_only: tuple[str, str, str, str] | None,
) -> None:
    """Print the table and write it to benchmarks/results/data.md (of some parts: data_PART.md)."""
    if prepare_only:
        source, out, pixels, workers = prepare_only
        our_prepare(Path(source), Path(out), int(pixels), int(workers))
        return
    from benchmarks.report import machine, write_report

    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary)
        photographs = folder / "photographs"
        if only != ["memory"]:
            write_photographs(photographs, num_images, source_size)
        if "preparation" in only:
            rows += preparation(photographs, folder, size=size, num_workers=num_workers, rounds=rounds)
        if "reading" in only:
            rows += reading(
                photographs, folder, size=size, num_workers=num_workers, rounds=rounds, batch_size=batch_size
            )
        if "memory" in only:
            counts = [int(count) for count in memory_images.split(",")]
            rows += memory(folder, counts=counts, num_workers=num_workers)
    write_report(
        "data" if only == list(PARTS) else f"data_{'_'.join(only)}",
        f"Data: {num_images} images of {source_size}×{source_size} to {size}×{size}, batch {batch_size}, {device()}",
        ["part", "by", "median", f"of {rounds}", "vdiff is × as fast"],
        rows,
        machine(),
    )


if __name__ == "__main__":
    main()
