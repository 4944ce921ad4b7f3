"""`vdiff push`: upload a model to a hub."""

from __future__ import annotations

from pathlib import Path

import click

from vdiff.cli.console import Console
from vdiff.cli.export import LICENSE_HELP
from vdiff.cli.options import Command, option, project_option, switch
from vdiff.errors import OptionError
from vdiff.files import read_text
from vdiff.projects import Project
from vdiff.text import cause_of, megabytes


@click.command(
    cls=Command,
    examples=[
        "vdiff push checkpoints/base_6 me/digits-2-steps --license mit --dry_run",
        "vdiff push exports/base_6 me/digits-2-steps --private",
    ],
)
@click.argument("folder", metavar="CHECKPOINT_OR_EXPORT", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@project_option()
@switch("--private", group="Repository", help="Create a private repository.")
@switch("--overwrite", group="Repository", help="Commit to an existing repository; equal names are replaced.")
@option("--license", "license_name", group="Repository", metavar="NAME", show_default="unknown", help=LICENSE_HELP)
@option(
    "--endpoint",
    group="Hub",
    metavar="URL",
    show_default="HF_ENDPOINT, or the Hugging Face hub",
    help="Another hub with the same interface.",
)
@option(
    "--token_file",
    group="Hub",
    type=click.Path(path_type=Path),
    metavar="FILE",
    show_default="HF_TOKEN, or the token of `hf auth login`",
    help="A file that holds the token. There is no flag for the token itself, as shells store command lines.",
)
@switch("--dry_run", group="Hub", help="Print what would be uploaded, then stop.")
def command(
    folder: Path,
    repository: str,
    project: Project,
    private: bool,
    overwrite: bool,
    license_name: str | None,
    endpoint: str | None,
    token_file: Path | None,
    dry_run: bool,
) -> None:
    """Upload a checkpoint, or an export of `vdiff export`, to a model hub.

    Only the model is uploaded: weights or graphs, the configuration without paths of this machine, and the model card.
    Training state, logs, previews and settings are not.
    """
    import tempfile

    from vdiff.interop.hub import NAME, collect, push

    if not NAME.fullmatch(repository):
        raise OptionError(f"{repository!r} is not the name of a repository", "give OWNER/NAME")
    token = _token(token_file)
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        upload = collect(project.inside(folder), Path(scratch), license_name=license_name)
        if dry_run:
            rows = [[name, _shown(upload.size(name))] for name in upload.files]
            console.table(f"To {repository}", ["file", "size"], rows)
            if upload.left:
                console.line(f"not uploaded: {', '.join(upload.left)}")
            return
        console.line(f"uploading {len(upload.files)} files, {megabytes(sum(map(upload.size, upload.files)))}")
        address = push(upload, repository, private=private, endpoint=endpoint, token=token, overwrite=overwrite)
    console.result(address)


def _shown(num_bytes: int) -> str:
    """`1234` → `1.2 kB`; megabytes for larger numbers."""
    return f"{num_bytes / 1e3:.1f} kB" if num_bytes < 1e5 else megabytes(num_bytes)


def _token(path: Path | None) -> str | None:
    """The token in a file.

    Raises:
        OptionError: the file cannot be read, or does not hold one token.
    """
    if path is None:
        return None
    try:
        token = read_text(path).strip()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--token_file {path} cannot be read: {cause_of(error)}", "give a file with one token"
        ) from None
    if not token or len(token.split()) != 1:
        raise OptionError(f"--token_file {path} holds no token", "give a file with one token and nothing else")
    return token
