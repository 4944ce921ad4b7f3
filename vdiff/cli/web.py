"""Pages of models: `vdiff export web`, which draw in the browser, and `vdiff serve`, which draw on this machine."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vdiff.cli.console import Console
from vdiff.cli.options import PATH, Checkpoint, Command, OneOf, option, project_option, switch
from vdiff.cli.sample import DEVICES, PRECISIONS
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.files import read_text

CHECKPOINTS = click.argument("checkpoints", type=Checkpoint(), nargs=-1, required=True, metavar="CHECKPOINT...")
MODEL_OPTIONS = [
    project_option(read=False),
    option(
        "--num_timesteps", group="Model", type=click.IntRange(1), metavar="STEPS", show_default="each model's own",
        help="Steps of every model.",
    ),
    option(
        "--components", group="Model", type=PATH, metavar="FOLDER", show_default="the folder that CHECKPOINT names",
        help="The folder of text encoders, tokenizers and autoencoder, if it has moved.",
    ),
    option(
        "--teacher", group="Page", type=Checkpoint(), metavar="CHECKPOINT", show_default="none",
        help="Generate images of seed 0 with CHECKPOINT now, and show them for comparison.",
    ),
    option(
        "--teacher_steps", group="Page", type=click.IntRange(1), metavar="STEPS", show_default="the teacher's own",
        help="Steps of --teacher.",
    ),
    option("--prompt", group="Page", metavar="TEXT", default="", help="First prompt of a text-to-image model."),
    option("--title", group="Page", metavar="TEXT", show_default="the dataset's name", help="Title of the page."),
]  # fmt: skip
PORT = option("--port", group="Server", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one.")
MIN_TOKEN = 16
"""Letters of a token from a file; a new one has 32."""


def _with(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A decorator that adds options, in the order of the help."""
    return lambda function: reduce(lambda inner, decorate: decorate(inner), reversed(options), function)


@click.command(
    cls=Command,
    examples=[
        "vdiff export web checkpoints/base_4 checkpoints/base_5 web --serve",
        "vdiff export web checkpoints/base_5 web --teacher checkpoints/original",
    ],
)
@CHECKPOINTS
@click.argument("folder", type=PATH)
@_with(MODEL_OPTIONS)
@option(
    "--precision", group="Output", type=OneOf(["fp32", "fp16", "int8"]), default="fp32",
    help="Precision of the stored weights: fp16 takes half the bytes, int8 a quarter.",
)  # fmt: skip
@option(
    "--runtime", group="Output", metavar="FOLDER|URL", show_default="npm downloads it",
    help="Folder of the npm package onnxruntime-web, or the URL of its folder dist, from which the page then loads "
    "it.",
)  # fmt: skip
@switch("--overwrite", group="Output", help="Replace an earlier page in FOLDER.")
@switch("--serve", group="Server", help="Serve FOLDER on this machine when it is written, until Ctrl-C.")
@PORT
def export_command(checkpoints: tuple[Path, ...], folder: Path, serve: bool, port: int, **options: Any) -> None:
    """Write FOLDER, a static web page that runs each CHECKPOINT in the browser, from the same noise.

    Any web server can serve the folder. Images equal those of sample.py at the same seed. With the server of --serve,
    WASM uses several threads. Needs `pip install 'vdiff[web]'`, and npm or --runtime.
    """
    _check_teacher(options)
    source = click.get_current_context().get_parameter_source("port")
    if not serve and source != ParameterSource.DEFAULT:
        raise OptionError("--port is for the server of --serve", "give --serve too")

    from vdiff.web.export import export_web
    from vdiff.web.server import LOOPBACK, folder_app, listen, require_server, server_of

    if serve:
        require_server()
    console = Console()
    for made in export_web(checkpoints, folder, report=console.line, **options):
        size = f"{made.bytes / 2**20:.1f} MiB"
        console.result(f"{folder / made.file}: {size}, results differ from vdiff's by at most {made.difference:.1e}")
    if not serve:
        console.result(f"next       {shell('python', '-m', 'http.server', '--directory', folder)}")
        return
    with listen(LOOPBACK[0], port) as listening:
        console.result(f"http://{LOOPBACK[0]}:{listening.getsockname()[1]}/ (Ctrl-C ends)")
        server_of(folder_app(folder)).run([listening])


@click.command(
    cls=Command,
    examples=[
        "vdiff serve checkpoints/base_4 checkpoints/base_5",
        "vdiff serve checkpoints/base_5 --teacher checkpoints/original --port 9000",
        "vdiff serve checkpoints/base_5 --host 0.0.0.0 --token_file token.txt",
    ],
)
@CHECKPOINTS
@_with(MODEL_OPTIONS)
@option("--device", group="Model", type=OneOf(DEVICES), default="auto", help="Auto takes a GPU if there is one.")
@option(
    "--precision", group="Model", type=OneOf(PRECISIONS), default="auto",
    help="Precision of the network; auto is fp32, on CUDA with TF32 products.",
)  # fmt: skip
@option(
    "--host", group="Server", default="127.0.0.1", metavar="ADDRESS",
    help="Address to listen at. With the default only this machine can connect; with any other address clients need a "
    "token.",
)  # fmt: skip
@PORT
@option(
    "--token_file", group="Server", type=PATH, metavar="FILE", show_default="no token on loopback, else a new one",
    help="A file that holds the token that clients send.",
)  # fmt: skip
@option("--max_images", group="Server", type=click.IntRange(1, 1024), default=16, help="Most images of a request.")
@option(
    "--max_waiting", group="Server", type=click.IntRange(1, 1000), default=256,
    help="Most requests that wait for the device; further ones are refused with status 503.",
)  # fmt: skip
def command(
    checkpoints: tuple[Path, ...],
    device: str,
    precision: str,
    host: str,
    port: int,
    token_file: Path | None,
    max_images: int,
    max_waiting: int,
    **options: Any,
) -> None:
    """Serve a web page that runs each CHECKPOINT on this machine, until Ctrl-C.

    The page is that of `vdiff export web`, but the models may be too large for a browser. Programs use POST /draw.
    Images equal those of sample.py at the same seed. Nothing is written to the disk. Needs `pip install 'vdiff[web]'`.
    """
    _check_teacher(options)
    token = "" if token_file is None else _token(token_file)

    from vdiff.web.server import LOOPBACK, RequestLimits, is_loopback, listen, load_server, require_server, server_of

    require_server()
    console = Console()
    if not token and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    with listen(host, port) as listening:
        limits = RequestLimits(max_images, max_waiting)
        served = load_server(
            checkpoints, device=device, precision=precision, limits=limits, token=token, report=console.line, **options
        )
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        secret = f"#token={'TOKEN' if token_file else token}" if token else ""
        console.result(f"http://{shown}:{listening.getsockname()[1]}/{secret} (Ctrl-C ends)")
        server_of(served.app(["*"] if token else LOOPBACK)).run([listening])


def _check_teacher(options: Mapping[str, Any]) -> None:
    """Refuse the steps of a teacher without a teacher.

    Raises:
        OptionError: as said.
    """
    if options["teacher_steps"] is not None and options["teacher"] is None:
        raise OptionError("--teacher_steps needs a teacher", "give --teacher CHECKPOINT too")


def _token(file: Path) -> str:
    """The token in a file.

    Raises:
        OptionError: it cannot be read, or holds no token that is hard to guess.
    """
    try:
        token = read_text(file).strip()
    except (OSError, ValueError, VdiffError) as error:
        raise OptionError(f"--token_file {file}: {getattr(error, 'strerror', None) or error}", "give a file") from None
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise OptionError(
            f"--token_file {file} holds no token", f"write one of {MIN_TOKEN} letters and digits or more into it"
        )
    return token
