"""Export to a web page: few-step samplers as ONNX files, and a static page that draws with them in the browser."""

from __future__ import annotations

import functools
import http.server
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from vdiff.diffusion.samplers import Ddim
from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder, read_json, write_json, write_text, writing
from vdiff.interop.graphs import MAX_STEPS, GraphOptions, check_exportable
from vdiff.interop.onnx import export_onnx, require_packages
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, weights_fingerprint
from vdiff.models.codec import CODECS, to_uint8
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw
from vdiff.replacing import Kind, new_folder
from vdiff.text import plural

RUNTIME = "1.30.0"
"""The version of onnxruntime-web that is downloaded."""
RUNTIME_FILES = (
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
)
PAGE_FILES = ("index.html", "app.js", "noise.js", "style.css")
MODELS, TEACHER, FORMAT = "models.json", "teacher.png", "vdiff web page"
NUM_IMAGES = 4
"""Images in the teacher's picture, and those that the page shows first."""


def _is_page(folder: Path) -> str:
    if read_json(folder / MODELS, "").get("format") != FORMAT:
        return ""
    return r"index\.html|app\.js|noise\.js|style\.css|models\.json|teacher\.png|[^/]+\.onnx|ort/[^/]+"


PAGE = Kind("web page", _is_page)


@dataclass(frozen=True)
class WebModel:
    """A model of the page.

    Attributes:
        difference: the largest difference between images by ONNX Runtime and by vdiff.
    """

    file: str
    steps: int
    bytes: int
    difference: float


def export_web(
    checkpoints: Sequence[Path],
    folder: Path,
    *,
    num_timesteps: int | None = None,
    precision: str = "fp32",
    teacher: Path | None = None,
    runtime: str | None = None,
    title: str = "",
    overwrite: bool = False,
    report: Callable[[str], object] = str,
) -> list[WebModel]:
    """Write a static page that draws in the browser with the samplers of checkpoints, whole or not at all.

    Args:
        num_timesteps: steps of every model; None: each model's own.
        precision: of the stored weights, "fp32", "fp16" or "int8"; the page computes in float32.
        teacher: a checkpoint of which images of seed 0 are drawn now, for comparison.
        runtime: a folder of onnxruntime-web, or the address of its `dist` on a server; None: npm downloads it.
        report: receives a line before each slow part; by default nothing is shown.

    Raises:
        VdiffError: a model cannot be drawn in a browser, or draws other images there than here; a package or npm is
            missing; the folder exists or cannot be written.
        OptionError: models do not belong on one page, or the number of steps does not fit.
    """
    require_packages()
    models = [_Model.load(path, num_timesteps) for path in checkpoints]
    if len({model.name for model in models}) < len(models):
        raise OptionError("two of the checkpoints have one name", "give checkpoints of different names")
    first = models[0].config
    for model in models:
        if (model.config.shape, model.config.class_names) != (first.shape, first.class_names):
            raise OptionError(
                f"{model.path} and {models[0].path} draw images of other sizes or classes", "make a page for each"
            )
    with new_folder(folder, PAGE, overwrite=overwrite, flag="another folder") as temporary:
        place = runtime.rstrip("/") if runtime and _is_address(runtime) else "./ort"
        if place == "./ort":
            report("copying ONNX Runtime" if runtime else f"npm downloads onnxruntime-web {RUNTIME}")
            with _runtime(runtime) as source, writing(temporary / "ort"):
                for name in RUNTIME_FILES:
                    shutil.copyfile(source / name, make_folder(temporary / "ort") / name)
        written, entries = [], []
        for model in models:
            report(f"exporting {model.path}, {plural(model.steps, 'step')}")
            file = temporary / f"{model.name}.onnx"
            difference = model.export(file, precision)
            written.append(WebModel(file.name, model.steps, file.stat().st_size, difference))
            entries.append({**vars(written[-1]), "name": model.name, "guidance": model.config.guidance_range or None})
        described: dict[str, Any] = {
            "format": FORMAT,
            "shape": first.shape,
            "classes": first.class_names,
            "runtime": place,
        }
        if teacher is not None:
            report(f"drawing with {teacher}")
            described["teacher"] = _draw_teacher(teacher, first, temporary / TEACHER)
        write_json(temporary / MODELS, {**described, "models": entries})
        for name in PAGE_FILES:
            text = resources.files("vdiff.web").joinpath("page", name).read_text(encoding="utf-8")
            origin = "" if place == "./ort" else "{0.scheme}://{0.netloc}".format(urlsplit(place))
            text = text.replace("TITLE", escape(title or first.dataset)).replace(" RUNTIME", f" {origin}".rstrip())
            write_text(temporary / name, text)
    return written


@dataclass(frozen=True)
class _Model:
    """A checkpoint that becomes a part of the page."""

    path: Path
    denoiser: Denoiser
    config: CheckpointConfig
    steps: int

    @classmethod
    def load(cls, path: Path, num_timesteps: int | None) -> _Model:
        """Load a checkpoint and check that a browser can draw with it."""
        denoiser, config = load_checkpoint(path)
        steps = num_timesteps or config.num_timesteps
        check_exportable(denoiser)
        if not CODECS[config.codec].are_pictures(config.shape):
            raise VdiffError(f"{path} draws no pictures of 1 or 3 channels", "use `vdiff export onnx`")
        try:
            config.check_num_steps(steps)
        except ValueError as error:
            raise OptionError(f"{path}, {steps} steps: {error}", "give another --num_timesteps") from None
        if steps > MAX_STEPS:
            raise OptionError(
                f"{path} takes {steps} steps; a browser draws with at most {MAX_STEPS}",
                "give distilled checkpoints, or --num_timesteps",
            )
        return cls(path, denoiser, config, steps)

    @property
    def name(self) -> str:
        """`base_4`, as a file name."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in self.path.resolve().name)

    def export(self, file: Path, precision: str) -> float:
        """Write the sampler; returns its difference to vdiff's."""
        options = GraphOptions(sampler=True, output="v", num_steps=self.steps, precision=precision)
        fingerprint = weights_fingerprint(self.path)
        return export_onnx(self.denoiser, self.config, options, file, fingerprint=fingerprint)


def _draw_teacher(path: Path, page: CheckpointConfig, file: Path) -> Mapping[str, object]:
    """Draw the first images of seed 0, each with the next class, as a square picture; returns its description."""
    denoiser, config = load_checkpoint(path)
    if (config.shape, config.class_names) != (page.shape, page.class_names):
        raise OptionError(f"--teacher {path} draws images of other sizes or classes", "give the students' teacher")
    images = to_uint8(
        draw(
            denoiser,
            Ddim(clipping_value=1.0),
            indices=range(NUM_IMAGES),
            image_size=config.shape[1:],
            num_steps=config.num_timesteps,
        )
    )
    side = math.isqrt(NUM_IMAGES)
    _, channels, height, width = images.shape
    grid = images.reshape(side, side, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = np.ascontiguousarray(grid.reshape(side * height, side * width, channels).numpy())
    Image.fromarray(picture.squeeze(2) if channels == 1 else picture).save(file)
    return {"name": path.resolve().name, "steps": config.num_timesteps}


def _is_address(runtime: str) -> bool:
    return urlsplit(runtime).scheme in ("http", "https")


@contextmanager
def _runtime(given: str | None) -> Iterator[Path]:
    """The folder with `RUNTIME_FILES`: that of `given`, or of a download by npm that is removed afterwards.

    Raises:
        VdiffError: npm is not installed or fails, or files are missing.
    """
    if given is not None:
        root = Path(given)
        folder = next((each for each in (root / "dist", root / "package" / "dist", root) if each.is_dir()), root)
        yield _complete(folder)
        return
    hint = "give --runtime FOLDER, the package onnxruntime-web, or --runtime https://…/dist/"
    if (npm := shutil.which("npm")) is None:
        raise VdiffError("the page needs onnxruntime-web, and npm, which downloads it, is not installed", hint)
    with tempfile.TemporaryDirectory() as temporary:
        words = [npm, "pack", "--silent", f"onnxruntime-web@{RUNTIME}"]
        try:
            subprocess.run(words, cwd=temporary, check=True, capture_output=True, text=True, timeout=300)
            with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
                archive.extractall(temporary, filter="data")
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            raise VdiffError(f"npm cannot download onnxruntime-web: {lines[-1]}", hint) from None
        except (subprocess.TimeoutExpired, StopIteration, tarfile.TarError) as error:
            raise VdiffError(f"npm cannot download onnxruntime-web: {type(error).__name__}", hint) from None
        yield _complete(Path(temporary) / "package" / "dist")


def _complete(folder: Path) -> Path:
    """`folder`, if it has all files of the runtime."""
    if missing := [name for name in RUNTIME_FILES if not (folder / name).is_file()]:
        raise VdiffError(
            f"{folder} holds no {missing[0]}", f"give a folder of the npm package onnxruntime-web {RUNTIME}"
        )
    return folder


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with the headers that allow threads in WASM."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def send_head(self) -> Any:
        """A file, or 404 for a name that no file can have."""
        try:
            return super().send_head()
        except ValueError:  # a zero byte
            self.send_error(404)
            return None

    def list_directory(self, path: object) -> None:
        """No listings."""
        del path
        self.send_error(404)

    def log_message(self, *values: object) -> None:
        """No line for each request."""


class _Server(http.server.ThreadingHTTPServer):
    """A server to which it is no error if a browser closes a connection."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def page_server(folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of a page on this machine only; port 0 takes a free one.

    Raises:
        VdiffError: the port is in use.
    """
    try:
        handler = functools.partial(_Handler, directory=str(folder))
        return _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise VdiffError(f"port {port}: {error.strerror or error}", "give another --port") from None
