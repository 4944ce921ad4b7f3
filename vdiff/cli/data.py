"""`vdiff data`: show, check and merge datasets."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import CONTEXT, Command, OneOf, ProgramGroup, option, project_option, switch
from vdiff.cli.prepare import counted, cpu_cores
from vdiff.errors import OptionError, VdiffError, printable, shell
from vdiff.projects import Project
from vdiff.text import megabytes, plural


@click.group(cls=ProgramGroup, context_settings=CONTEXT)
def command() -> None:
    """Show, check and merge datasets.

    DATASET is a folder that prepare_data.py wrote, a rosinality-style LMDB, or tar shards: a folder, a URL, or a
    pattern such as 'x-{000000..000009}.tar'.
    """


@command.command(cls=Command, examples=["vdiff data info data/photos_64", "vdiff data info data/photos_64 --json"])
@click.argument("dataset", required=False)
@project_option()
@switch("--json", group="Output", help="Print one JSON object.")
def info(dataset: str | None, project: Project, json: bool) -> None:
    """Print what DATASET holds and how it was made. Default: the only dataset under data/."""
    from vdiff.data.datasets import facts

    values = facts(_open(dataset, project))
    Console().result(*([jsonlib.dumps(values, ensure_ascii=False)] if json else _rows(values)), is_json=json)


@command.command(cls=Command, examples=["vdiff data verify data/photos_64"])
@click.argument("dataset", required=False)
@project_option()
@option("--num_workers", group="Work", type=click.IntRange(min=0), show_default="CPU cores", help="Worker processes.")
@switch("--json", group="Output", help="Print one JSON object.")
def verify(dataset: str | None, project: Project, num_workers: int | None, json: bool) -> int:
    """Decode every image of DATASET and compare its checksum; exit code 1 if anything is wrong."""
    from dataclasses import asdict

    from vdiff.data.datasets import verify as check

    console = Console()
    workers = cpu_cores() if num_workers is None else num_workers
    opened = _open(dataset, project)
    verdict, nouns = check(opened, num_workers=workers, reporter=console), f"{opened.meta.noun}s"
    if json:
        console.result(jsonlib.dumps({**asdict(verdict), "is_good": verdict.is_good}, ensure_ascii=False), is_json=True)
        return 0 if verdict.is_good else 1
    checksum = {
        "equal": "checksum equal",
        "unequal": "checksum unequal",
        "none": "no checksum: another program wrote it",
    }[verdict.fingerprint]
    for problem in verdict.problems:
        console.line(problem)
    if not verdict.is_good:
        count = verdict.num_problems
        what = f"{plural(count, 'problem')} in {verdict.checked} {nouns}, {checksum}"
        raise VdiffError(f"{verdict.path}: {what}", "copy it again, or prepare it again with --overwrite")
    console.result(f"{verdict.path}: {verdict.checked} {nouns} decoded in every size, {checksum}")
    return 0


@command.command(
    cls=Command, examples=["vdiff data show data/photos_64", "vdiff data show --out sheet.png --columns 16"]
)
@click.argument("dataset", required=False)
@project_option()
@option(
    "--out",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    show_default="DATASET.png",
    help="The PNG file to write; an earlier sheet is replaced.",
)
@option("--image_size", group="Output", type=click.IntRange(min=1), show_default="the largest", help="Image size.")
@option("--columns", group="Output", type=click.IntRange(1, 100), default=10, help="Images in a row.")
@option("--rows", group="Output", type=click.IntRange(1, 99), default=20, help="Rows at most.")
def show(
    dataset: str | None, project: Project, out: Path | None, image_size: int | None, columns: int, rows: int
) -> None:
    """Draw a contact sheet of DATASET, with a row for each class; print some of its captions.

    Of sounds, the sheet shows spectrograms, and a page beside it, DATASET.html, plays them.
    """
    from vdiff.data.datasets import SHOWN_CAPTIONS, sheet, some_captions, write_players
    from vdiff.data.images import PICTURE, save_png
    from vdiff.data.sound_page import PAGE
    from vdiff.replacing import check_free, locked

    opened = _open(dataset, project)
    if out is None:
        out = Path(f"{Path(str(opened.path)).name}.png") if "://" in str(opened.path) else Path(f"{opened.path}.png")
    if out.suffix.lower() != ".png":
        raise VdiffError(f"{out} is not a name for a PNG file", "give --out FILE.png")
    with locked(out):
        check_free(out, PICTURE, overwrite=True)
        save_png(sheet(opened, size=image_size, columns=columns, max_rows=rows), out)
    if opened.meta.rate:
        page = out.with_suffix(".html")
        with locked(page):
            check_free(page, PAGE, overwrite=True)
            write_players(opened, page, columns=columns, max_rows=rows)
        Console().result(f"{page}  plays them")
    captions = some_captions(opened, SHOWN_CAPTIONS)
    Console().result(str(out), *(f"{name:>9}  {printable(caption)}" for name, caption in captions))


@command.command(
    cls=Command,
    examples=["vdiff data merge data/photos_64.*of4", "vdiff data merge part_1 part_2 --out data/photos_64"],
)
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--out",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="the parts' name without .IofN",
    help="The folder of the merged dataset.",
)
@switch("--overwrite", group="Output", help="Replace an existing dataset, once the new one is complete.")
def merge(parts: tuple[Path, ...], out: Path | None, overwrite: bool) -> None:
    """Merge all PARTS that --shard prepared. The result equals the dataset of a single run."""
    from vdiff.data.datasets import merge as join

    if out is None:
        name, dot, suffix = parts[0].name.rpartition(".")
        if not (dot and "of" in suffix):
            raise VdiffError(f"{parts[0]} is not called NAME.IofN", "name the merged dataset with --out")
        out = parts[0].with_name(name)
    console = Console()
    meta = join(parts, out, overwrite=overwrite, reporter=console)
    console.result(f"{out}: {meta.counts['images']} {meta.noun}s of {len(parts)} parts")
    console.result(f"next       python train.py {shell('--data', out)}")


@command.command(
    cls=Command,
    examples=[
        "vdiff data encode data/photos_512 --base checkpoints/sd",
        "vdiff data encode data/photos_512 --base checkpoints/sd --flip",
    ],
)
@click.argument("dataset", required=False)
@project_option()
@option(
    "--base",
    group="Model",
    type=click.Path(path_type=Path),
    required=True,
    metavar="CHECKPOINT",
    help="A text-to-image model, whose autoencoder and text encoders are used.",
)
@option(
    "--components",
    group="Model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="the folder that the model names",
    help="The folder of its text encoders, tokenizers and autoencoder.",
)
@switch("--flip", group="Output", help="Encode mirrored images too, as training with --flip needs them.")
@option("--image_size", group="Output", type=click.IntRange(min=1), show_default="the largest", help="Image size.")
@switch("--overwrite", group="Output", help="Replace an encoding that was made with other settings.")
@option(
    "--batch_size", group="Work", type=click.IntRange(1), default=8, metavar="IMAGES", help="Images encoded at once."
)
@option(
    "--device", group="Work", type=OneOf(["auto", "cpu", "cuda", "mps"]), default="auto",
    help="Auto takes a GPU if there is one.",
)  # fmt: skip
def encode(
    dataset: str | None,
    project: Project,
    base: Path,
    components: Path | None,
    flip: bool,
    image_size: int | None,
    overwrite: bool,
    batch_size: int,
    device: str,
) -> None:
    """Compute the latents and the text embeddings of DATASET once, into DATASET.encoded.

    Mean and standard deviation of each latent are stored, so that training still samples from the posterior. Training
    uses them if images, captions, autoencoder and text encoders are still the same. After any interruption the same
    command continues.
    """
    import torch

    from vdiff.data.encoded import EncodedKey, encode_dataset
    from vdiff.data.store import ImageStore
    from vdiff.distributed import pick_device
    from vdiff.models.autoencoder import Autoencoder
    from vdiff.models.checkpoint import load_checkpoint
    from vdiff.models.text import TextBackbone
    from vdiff.models.tokenizing import Tokenizers

    store, console = _open(dataset, project), Console()
    size = image_size or store.meta.sizes[-1]
    store.check_size(size)
    if not isinstance(store, ImageStore) or not store.meta.fingerprint or store.meta.channels != 3:
        raise VdiffError(f"{store.path} cannot be encoded", "prepare an LMDB of colour images with prepare_data.py")
    place = pick_device(device)
    model, description = load_checkpoint(base, place, components=components)
    backbone = model.network
    if not isinstance(backbone, TextBackbone) or description.components is None:
        raise VdiffError(f"{base} is not a text-to-image model", "give one of vdiff import diffusers")
    folder = Path(description.components["path"])
    autoencoder, tokenizers = Autoencoder.read(folder, place), Tokenizers.read(folder, backbone.describe())
    if size % autoencoder.factor:
        raise OptionError(f"--image_size {size}: the autoencoder needs multiples of {autoencoder.factor}", "choose one")

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> dict[str, torch.Tensor]:
        return backbone.embed(tokenizers.tokens(texts).to(place))

    key = EncodedKey(store.meta.fingerprint, description.components["fingerprint"], size, flip)
    out = encode_dataset(
        store, key, autoencoder.encode, embed, batch_size=batch_size, overwrite=overwrite, reporter=console
    )
    console.result(f"{out}: {len(store)} images encoded")


def _open(dataset: str | None, project: Project) -> Any:
    from vdiff.data.datasets import open_dataset

    return open_dataset(dataset or project.dataset())


def _rows(values: dict[str, Any]) -> list[str]:
    """The facts as rows."""
    counts = values.pop("counts")
    classes = values.pop("classes", None) or dict.fromkeys(values["class_names"])
    names, repeats, buckets = (values.pop(key) for key in ("class_names", "repeats", "buckets"))
    has_conditions, trim = values.pop("has_conditions"), values.pop("trim")
    rows = {key: value for key, value in values.items() if value not in ("", None)}
    noun = "sound" if values["rate"] else "image"
    rows = {f"{noun}s" if key == "images" else key: value for key, value in rows.items()}
    rows[f"{noun}s"] = f"{values['images']:,}"
    rows["sizes"] = ", ".join(map(str, values["sizes"]))
    if rate := rows.pop("rate", 0):
        rows |= {"trim": f"{trim:g} dB"} if trim else {}
        rows["sizes"] += f" samples, {values['sizes'][0] / rate:.3g} s at {rate:,} Hz"
    rows["bytes"] = f"{megabytes(values['bytes'])}, {values['bytes'] / max(values['images'], 1):,.0f} bytes per {noun}"
    if captions := counts.get("captions"):
        without = values["images"] - captions
        rows["captions"] = f"{captions:,} {noun}s have one" + (f", {without:,} have none" if without else "")
    if has_conditions:
        rows["conditions"] = "every image has a condition image"
    if buckets:
        rows["buckets"] = f"{counted(counts['buckets'])} (height×width)"
    if repeats:
        rows["repeats"] = ", ".join(f"{name} {count}" for name, count in zip(names, repeats, strict=True))
    for key in ("skipped", "ignored", "converted"):
        if counts.get(key):
            rows[key] = counted(counts[key])
    if classes:
        names = ", ".join(name if count is None else f"{name} {count}" for name, count in classes.items())
        rows["classes"] = f"{len(classes)}: {names}"
    return aligned(rows)
