"""What both pages share: the files of the page, the description of its models, and pictures made beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

import vdiff
from vdiff.data.images import make_grid, to_pil
from vdiff.errors import OptionError, VdiffError
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import CODECS
from vdiff.models.condition import IMAGE, TOKENS
from vdiff.models.prompting import has_surroundings

PAGE_FILES = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "browser.js": "text/javascript",
    "server.js": "text/javascript",
    "noise.js": "text/javascript",
    "tokens.js": "text/javascript",
    "style.css": "text/css",
}
"""Files of the page and their media types."""
MODELS, TEACHER, FORMAT = "models.json", "teacher.png", "vdiff web page"
NUM_IMAGES = 16
"""The most images that the page shows of a model, and those in the teacher's picture."""


@dataclass(frozen=True)
class PageModel:
    """A model of the page.

    Attributes:
        steps: its sampling steps on the page.
    """

    path: Path
    config: CheckpointConfig
    steps: int

    @property
    def name(self) -> str:
        """`base_4`, as a file name."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in self.path.resolve().name)

    @property
    def title(self) -> str:
        """Of a page, if none is given: the name of its dataset."""
        return Path(self.config.dataset).name or self.name

    @property
    def takes_prompts(self) -> bool:
        """Whether it is a text-to-image model."""
        return TOKENS in self.config.signature.names

    def described(self) -> dict[str, Any]:
        """Its entry in `models.json`."""
        return {"name": self.name, "steps": self.steps, "guidance": self.config.guidance_range or None}


def page_model(path: Path, config: CheckpointConfig, num_timesteps: int | None) -> PageModel:
    """A checkpoint as a model of a page.

    Raises:
        VdiffError: it does not draw pictures from noise alone, or with a prompt.
        OptionError: the number of steps does not fit.
    """
    model = PageModel(path, config, num_timesteps or config.num_timesteps)
    if IMAGE in config.signature.names:
        raise VdiffError(f"{path} draws from condition images", "use sample.py --condition")
    if config.space.is_sound:
        raise VdiffError(f"{path} generates sounds, which pages do not play", "use sample.py, or `vdiff export onnx`")
    if not has_surroundings(config) and not CODECS[config.codec].are_pictures(config.shape):
        raise VdiffError(f"{path} draws no pictures of 1 or 3 channels", "use `vdiff export onnx`")
    try:
        config.check_num_steps(model.steps)
    except ValueError as error:
        raise OptionError(f"{path}, {model.steps} steps: {error}", "give another --num_timesteps") from None
    return model


def check_same_page(models: Sequence[PageModel]) -> None:
    """Refuse models that cannot be compared on one page.

    Raises:
        OptionError: as said.
    """
    if len({model.name for model in models}) < len(models):
        raise OptionError("two of the checkpoints have one name", "give checkpoints of different names")
    first = models[0]
    for model in models:
        if _draws(model.config) != _draws(first.config):
            raise OptionError(
                f"{model.path} and {first.path} draw images of other sizes or classes", "make a page for each"
            )


def _draws(config: CheckpointConfig) -> tuple[object, ...]:
    """What models of one page have in common."""
    tokens = (config.components or {}).get("fingerprint") if TOKENS in config.signature.names else None
    return config.shape, config.codec, config.class_names, tokens


def description(models: Sequence[PageModel], shape: Sequence[int], prompt: str = "") -> dict[str, Any]:
    """What `models.json` says about models with one page; the page's back end adds its own.

    Args:
        shape: (C, H, W) of a picture.
        prompt: the first one of text-to-image models.
    """
    first = models[0]
    return {
        "format": FORMAT,
        "shape": list(shape),
        "classes": first.config.class_names,
        "prompt": prompt if first.takes_prompts else None,
        "max_images": NUM_IMAGES,
        "models": [model.described() for model in models],
    }


def teacher_picture(
    teacher: Path, page: PageModel, steps: int | None, prompt: str, components: Path | None
) -> tuple[PIL.Image.Image, dict[str, Any]]:
    """Images of seed 0 by a teacher, each with the next class, and their description.

    Args:
        steps: None: its own.

    Raises:
        VdiffError: the checkpoint cannot be read.
        OptionError: it draws other images than the page, or does not take this number of steps.
    """
    model = vdiff.load(teacher, components=components)
    if _draws(model.config) != _draws(page.config):
        raise OptionError(
            f"--teacher {teacher} generates images of other sizes or classes", "give the students' teacher"
        )
    steps = steps or model.config.num_timesteps
    try:
        images = model.sample(NUM_IMAGES, steps=steps, prompts=[prompt] if page.takes_prompts else [])
    except VdiffError as error:
        raise OptionError(f"--teacher {teacher}, {steps} steps: {error.cause}", error.hint) from None
    described = {"name": teacher.resolve().name, "steps": steps}
    return to_pil(sheet(images)), described


def sheet(images: Tensor) -> Tensor:
    """(N, C, H, W) as one picture without gaps: ⌈√N⌉ images a row, as the page reads them."""
    return make_grid(images, columns=math.isqrt(len(images) - 1) + 1, padding=0)


def page_texts(title: str, origin: str = "") -> Mapping[str, str]:
    """The page's files by name.

    Args:
        origin: a server besides its own that the page may ask: `https://example.org`.
    """
    texts = {name: (resources.files("vdiff.web") / "page" / name).read_text(encoding="utf-8") for name in PAGE_FILES}
    page = texts["index.html"].replace("TITLE", escape(title)).replace(" RUNTIME", f" {origin}".rstrip())
    return {**texts, "index.html": page}
