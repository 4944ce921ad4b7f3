"""`vdiff ema`: compute other averages of the weights after a training."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import PATH, Checkpoint, Command, Names, option, project_option, switch
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.text import megabytes, plural

if TYPE_CHECKING:
    from torch import Tensor

    from vdiff.models.checkpoint import CheckpointConfig
    from vdiff.training.posthoc import Snapshot


@click.command(
    cls=Command,
    examples=[
        "vdiff ema checkpoints/original                   # list the averages",
        "vdiff ema checkpoints/original --sigma_rel 0.1   # original_ema0.100",
        "vdiff ema checkpoints/original --sigma_rel 0.05,0.1,0.15",
        "vdiff ema checkpoints/original --sigma_rel 0.1 --at 40000 --out early",
    ],
)
@click.argument("run", type=Checkpoint())
@project_option(read=False)
@option(
    "--sigma_rel", group="Average", type=Names(click.FLOAT, "LENGTH[,LENGTH…]"),
    help="Power-function averages of these lengths. A length is the standard deviation of the profile as a fraction of "
    "the training. Needs a run with --ema_more profiles.",
)  # fmt: skip
@option(
    "--decay", group="Average", type=Names(click.FLOAT, "DECAY[,DECAY…]"),
    help="Exponential averages that --ema_more stored.",
)  # fmt: skip
@option(
    "--at", group="Average", type=click.IntRange(min=1), metavar="UPDATE", show_default="the last snapshot",
    help="Update of the snapshot.",
)  # fmt: skip
@option(
    "--out", group="Output", type=PATH, metavar="FOLDER", help="The new checkpoint's folder.",
    show_default="RUN_emaLENGTH or RUN_decayDECAY, beside RUN",
)  # fmt: skip
@switch("--overwrite", group="Output", help="Replace what an earlier `vdiff ema` wrote there.")
@switch("--json", group="Output", help="Print one JSON object.")
def command(
    run: Path,
    sigma_rel: tuple[float, ...] | None,
    decay: tuple[float, ...] | None,
    at: int | None,
    out: Path | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Make checkpoints with EMAs of other lengths from the snapshots in RUN. Without options, list the stored averages.

    This is the post-hoc EMA of Karras et al. 2024: snapshots of two power-function averages are combined into an
    approximation of any length. Each EMA gets a folder that sample.py and distill.py use like any other checkpoint. Its
    average.json records how it was made.
    """
    from vdiff.models.checkpoint import AVERAGED, read_config
    from vdiff.replacing import check_free
    from vdiff.training.averages import gamma_of
    from vdiff.training.posthoc import find_snapshots, read_exponential, reconstruct, snapshot_at

    console = Console()
    config, snapshots = read_config(run), find_snapshots(run)
    end = snapshot_at(run, snapshots, at)
    kept = [snapshot for snapshot in snapshots if snapshot.step <= end.step]
    if not sigma_rel and not decay:
        if out or overwrite:
            name = "--out" if out else "--overwrite"
            raise OptionError(f"{name} needs an average to write", "give --sigma_rel or --decay")
        values = _facts(run, kept)
        console.result(*([jsonlib.dumps(values, ensure_ascii=False)] if json else _rows(values)), is_json=json)
        return

    lengths, decays = list(dict.fromkeys(sigma_rel or ())), list(dict.fromkeys(decay or ()))
    for length in lengths:
        gamma_of(length)
    suffixes = [*(f"_ema{_digits(length)}" for length in lengths), *(f"_decay{value}" for value in decays)]
    folders = _folders(run, suffixes, at, out)
    for folder in folders:
        if folder.resolve() == run.resolve():
            raise OptionError(f"--out {folder} is the run itself", "choose another --out")
        check_free(folder, AVERAGED, overwrite=overwrite)
    origin = {"run": run.as_posix(), "update": end.step}
    made: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []
    for found in reconstruct(run, lengths, at) if lengths else []:
        note = {"gamma": gamma_of(found.sigma_rel), "snapshots": found.snapshots, "misfit": found.misfit}
        made.append(({**origin, "profile": "power function", "sigma_rel": found.sigma_rel, **note}, found.weights))
    for value in decays:
        made.append(({**origin, "profile": "exponential", "decay": value}, read_exponential(run, value, at)))
    for folder, (note, weights) in zip(folders, made, strict=True):
        _write(folder, note, weights, config, end, overwrite=overwrite)
        if not json:
            console.result(f"{folder}: {_told(note)}")
    if json:
        written = [{"path": folder.as_posix(), **note} for folder, (note, _) in zip(folders, made, strict=True)]
        console.result(jsonlib.dumps({"written": written}, ensure_ascii=False), is_json=True)
    else:
        console.result(f"next       python sample.py {shell('--checkpoint', folders[0])}")


def _facts(run: Path, snapshots: list[Snapshot]) -> dict[str, Any]:
    """The averages and snapshots of the run, and the lengths that can be computed."""
    from vdiff.training.posthoc import reachable

    last = snapshots[-1]
    return {
        "run": run.as_posix(),
        "updates": [snapshot.step for snapshot in snapshots],
        "images": last.images,
        "tracked": last.sigma_rels,
        "sigma_rel": list(reachable(snapshots, last.step)) if last.sigma_rels else None,
        "decays": last.decays,
        "bytes": sum(snapshot.path.stat().st_size for snapshot in snapshots),
    }


def _rows(facts: dict[str, Any]) -> list[str]:
    """The facts as rows."""
    updates, tracked = facts["updates"], facts["tracked"]
    span = (
        f"after update {updates[0]}" if len(updates) == 1 else f"{len(updates)}, updates {updates[0]} to {updates[-1]}"
    )
    rows = {"run": facts["run"], "snapshots": f"{span}, {megabytes(facts['bytes'])}"}
    if tracked:
        low, high = facts["sigma_rel"]
        rows["power functions"] = (
            f"stored with σ_rel {', '.join(map(str, tracked))}; --sigma_rel can be {low} to {high}"
        )
    if facts["decays"]:
        rows["exponential"] = f"--decay {', '.join(map(str, facts['decays']))}"
    return aligned(rows)


def _told(note: dict[str, Any]) -> str:
    """One average, described in a line."""
    when = f"at update {note['update']}"
    if "decay" in note:
        return f"decay {note['decay']} {when}"
    count = note["snapshots"]
    return (
        f"σ_rel {note['sigma_rel']} (γ {note['gamma']:.2f}) {when}, from {plural(count, 'snapshot')}, "
        f"profile {note['misfit']:.2%} off"
    )


def _digits(length: float) -> str:
    """`0.1` → `0.100`; more than three digits if lengths would look equal otherwise."""
    return f"{length:.3f}" if float(f"{length:.3f}") == length else str(length)


def _folders(run: Path, suffixes: list[str], at: int | None, out: Path | None) -> list[Path]:
    """The folder of each average.

    Raises:
        OptionError: `--out` is one name, and there are several averages.
    """
    if out is not None:
        if len(suffixes) > 1:
            raise OptionError(f"--out names one checkpoint, but there are {len(suffixes)}", "leave --out out")
        return [out]
    base = run.resolve() if run.name in ("", "..") else run  # the averages go beside the run, so it needs a name
    when = "" if at is None else f"_at{at}"
    return [base.with_name(f"{base.name}{suffix}{when}") for suffix in suffixes]


def _write(
    folder: Path,
    note: dict[str, Any],
    weights: Mapping[str, Tensor],
    config: CheckpointConfig,
    end: Snapshot,
    *,
    overwrite: bool,
) -> None:
    """Write one checkpoint, whole or not at all.

    Raises:
        VdiffError: the weights do not fit the run's model, or the file system refuses.
    """
    from dataclasses import replace

    from vdiff.files import write_text
    from vdiff.models.checkpoint import AVERAGE, AVERAGED, load_stored, save_checkpoint
    from vdiff.replacing import new_folder

    try:
        load_stored(config.build(), config, weights)
    except (RuntimeError, ValueError, TypeError):
        raise VdiffError(
            f"the snapshots in {note['run']} do not fit its config.json", "restore both from one copy of the run"
        ) from None
    seconds = round(config.train_seconds * end.step / max(config.num_iters, 1), 1)
    described = replace(config, weights="ema", num_iters=end.step, num_images=end.images, train_seconds=seconds)
    with new_folder(folder, AVERAGED, overwrite=overwrite) as temporary:
        save_checkpoint(temporary, weights, described)
        write_text(temporary / AVERAGE, jsonlib.dumps(note, indent=2, ensure_ascii=False) + "\n")
