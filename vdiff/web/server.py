"""Servers of pages: of an exported folder, and of models that run on this machine."""

from __future__ import annotations

import asyncio
import hmac
import io
import ipaddress
import json
import math
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from msgspec import Meta

import vdiff
from vdiff.api import Model
from vdiff.data.images import to_pil
from vdiff.diffusion.noise import ImageNoise
from vdiff.errors import VdiffError, require
from vdiff.files import parse
from vdiff.models.checkpoint import read_config
from vdiff.models.drawing import images_at_once
from vdiff.models.prompting import has_surroundings
from vdiff.records import record_of
from vdiff.text import plural
from vdiff.web.pages import (
    MODELS,
    NUM_IMAGES,
    PAGE_FILES,
    TEACHER,
    check_same_page,
    description,
    page_model,
    page_texts,
    sheet,
    teacher_picture,
)

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

T = TypeVar("T")
MAX_BODY = 2**16
"""Bytes of a request's body."""
BODY_SECONDS = 10
"""Time for a client to send its body."""
MAX_CONNECTIONS = 1024
MAX_PROMPT = 2000
"""Letters of a prompt."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself."""
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every response; the first two allow threads in WASM."""


def require_server() -> None:
    """Check that everything for a server is installed.

    Raises:
        VdiffError: a package is missing.
    """
    require("serving a page", "web", "starlette", "uvicorn")


@dataclass(frozen=True)
class DrawRequest:
    """The JSON object of `POST /draw`.

    Attributes:
        model: a name in `models.json`; empty: the first one.
        seed, second_seed: 0 to 2⁶⁴ − 1, also as a string, because numbers of JavaScript have 53 bits.
        blend: the noise is cos(φ) a + sin(φ) b of the two seeds, with φ = blend · π/2.
        steps: None: the model's own.
        classes, prompts: of the images in turn.
        guidance: None: the default of sample.py.
    """

    model: str = ""
    count: Annotated[int, Meta(ge=1)] = 1
    seed: int | str = 0
    second_seed: int | str = 0
    blend: Annotated[float, Meta(ge=0, le=1)] = 0.0
    steps: Annotated[int, Meta(ge=1)] | None = None
    classes: list[str | int] | None = None
    prompts: list[Annotated[str, Meta(max_length=MAX_PROMPT)]] = field(default_factory=list)
    negative_prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] = ""
    guidance: float | None = None


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request, and of all requests together.

    Attributes:
        images: of a request.
        waiting: requests that wait for the device or use it.
    """

    images: int = NUM_IMAGES
    waiting: int = 256


@dataclass(frozen=True)
class Drawing:
    """What a request gets.

    Attributes:
        png: the images in one picture, ⌈√count⌉ a row.
        notes: about prompts that are too long.
    """

    png: bytes
    seconds: float
    notes: Sequence[str]


@dataclass(frozen=True)
class Served:
    """A model and its default number of steps, which is also the largest number that a request may ask for."""

    model: Model
    steps: int


class StoppedError(Exception):
    """The client has disconnected, so its images are not finished."""


def draw_png(models: Mapping[str, Served], asked: DrawRequest, limits: RequestLimits, stop: threading.Event) -> Drawing:
    """Draw what a request asks for; `stop` ends it after the next step.

    Raises:
        VdiffError, ValueError: the model cannot draw this.
        StoppedError: `stop` was set.
    """

    def check_stopped(step: int = 0) -> None:
        del step
        if stop.is_set():
            raise StoppedError

    check_stopped()
    name = asked.model or next(iter(models))
    if name not in models:
        raise VdiffError(f"unknown model {name!r}", f"choose from {', '.join(models)}")
    if asked.count > limits.images:
        raise VdiffError(f"count = {asked.count}; at most {limits.images} images are drawn at once", "ask for fewer")
    if max(len(asked.prompts), len(asked.classes or ())) > limits.images:
        raise VdiffError(f"more than {limits.images} prompts or classes", "give one for each image")
    model, seed, second = models[name].model, _seed(asked.seed), _seed(asked.second_seed)
    steps = asked.steps or models[name].steps
    if steps > models[name].steps:
        raise VdiffError(f"steps = {steps}; {name} is served with {models[name].steps} at most", "ask for fewer")
    noise = None
    if asked.blend:
        a, b = (ImageNoise(seed=each, indices=range(asked.count), shape=model.shape)() for each in (seed, second))
        angle = asked.blend * math.pi / 2
        noise = math.cos(angle) * a + math.sin(angle) * b
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client gets them as notes
        images = model.sample(
            asked.count,
            seed=seed,
            noise=noise,
            steps=steps,
            classes=asked.classes,
            prompts=asked.prompts,
            negative_prompt=asked.negative_prompt,
            guidance=asked.guidance,
            batch_size=images_at_once(model.config.signature, model.shape),
            on_step=check_stopped,
        )
    seconds = time.perf_counter() - began
    file = io.BytesIO()
    to_pil(sheet(images)).save(file, format="PNG")
    notes = model.prompting.notes([*asked.prompts, asked.negative_prompt]) if asked.prompts else []
    return Drawing(file.getvalue(), seconds, notes)


def _seed(value: int | str) -> int:
    """A seed, also from a string.

    Raises:
        VdiffError: it is not a whole number of 64 bits.
    """
    is_number = isinstance(value, int) or (value.isascii() and value.isdecimal() and len(value) <= 20)
    if not is_number or not 0 <= int(value) < 2**64:
        raise VdiffError(f"seed = {str(value)[:25]!r}", "give a whole number from 0 to 18446744073709551615")
    return int(value)


def load_server(
    checkpoints: Sequence[Path],
    *,
    num_timesteps: int | None = None,
    components: Path | None = None,
    teacher: Path | None = None,
    teacher_steps: int | None = None,
    prompt: str = "",
    title: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    limits: RequestLimits | None = None,
    token: str = "",
    report: Callable[[str], object] = str,
) -> ModelServer:
    """A server of checkpoints; its arguments are those of `vdiff serve`.

    Raises:
        VdiffError: a model generates no pictures, or this machine cannot load it.
        OptionError: models do not belong on one page, or the number of steps does not fit.
    """
    pages = [page_model(path, read_config(path), num_timesteps) for path in checkpoints]
    check_same_page(pages)
    served = {}
    for page in pages:
        report(f"loading {page.path}, {plural(page.steps, 'step')}")
        loaded = vdiff.load(page.path, device=device, precision=precision, components=components)
        served[page.name] = Served(loaded, page.steps)
    first = served[pages[0].name].model
    shape = first.prompting.shape if has_surroundings(first.config) else first.shape
    described, picture = description(pages, shape, prompt), io.BytesIO()
    if teacher is not None:
        report(f"drawing with {teacher}")
        drawn, described["teacher"] = teacher_picture(teacher, pages[0], teacher_steps, prompt, components)
        drawn.save(picture, format="PNG")
    texts = page_texts(title or pages[0].title)
    return ModelServer(
        served, texts, described, teacher=picture.getvalue(), limits=limits or RequestLimits(), token=token
    )


class ModelServer:
    """The page with models of this machine; they process one request after the other, in one thread.

    Args:
        models: by the names in `models.json`.
        texts: the page's files.
        described: `models.json`.
        teacher: the bytes of `teacher.png`.
        token: what clients send as `Authorization: Bearer TOKEN`; empty: nothing.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        texts: Mapping[str, str],
        described: Mapping[str, Any],
        *,
        teacher: bytes = b"",
        limits: RequestLimits,
        token: str = "",
    ) -> None:
        self.models, self.limits, self.token = models, limits, token
        self.files = {name: (text.encode(), PAGE_FILES[name]) for name, text in texts.items()}
        self.files[""] = self.files["index.html"]
        device = next(iter(models.values())).model.device.type
        more = {"draw": "draw", "device": device, "max_images": min(limits.images, NUM_IMAGES)}
        self.secret = {MODELS: (json.dumps({**described, **more}).encode(), "application/json")}
        if teacher:
            self.secret[TEACHER] = (teacher, "image/png")
        self.waiting = 0
        self.thread = ThreadPoolExecutor(1, "drawing")

    def app(self, hosts: Sequence[str] = ("*",)) -> Starlette:
        """The ASGI application.

        Args:
            hosts: the names of this server that are answered; others could be those of a foreign page (DNS rebinding).
        """
        from starlette.routing import Route

        return _app(
            [Route("/draw", self.draw, methods=["POST"]), Route("/{name:path}", self.file, methods=["GET"])], hosts
        )

    async def file(self, request: Request) -> Response:
        """A file of the page, which is public, or what the token protects."""
        from starlette.exceptions import HTTPException
        from starlette.responses import Response

        name = request.path_params["name"]
        if name in self.secret:
            self._check_token(request)
        elif name not in self.files:
            raise HTTPException(404, "no such page")
        content, media = (self.secret if name in self.secret else self.files)[name]
        return Response(content, media_type=media, headers={"Cache-Control": "no-cache"})

    async def draw(self, request: Request) -> Response:
        """Images as a PNG; the time of drawing is in the header `Server-Timing`, notes are in `X-Notes`."""
        from starlette.exceptions import HTTPException
        from starlette.responses import Response

        self._check_token(request)
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the body is not declared as JSON; send Content-Type: application/json")
        asked = _read(await _body(request))
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, f"{self.waiting} requests wait already; try again", {"Retry-After": "1"})
        self.waiting += 1
        try:
            drawn = await self._while_connected(request, lambda stop: draw_png(self.models, asked, self.limits, stop))
        except (VdiffError, ValueError) as error:
            raise HTTPException(400, str(error)) from None
        finally:
            self.waiting -= 1
        if drawn is None:
            return Response(status_code=499)
        headers = {"Server-Timing": f"draw;dur={1000 * drawn.seconds:.1f}", "Cache-Control": "no-store"}
        if drawn.notes:
            headers["X-Notes"] = json.dumps(drawn.notes)
        return Response(drawn.png, media_type="image/png", headers=headers)

    def _check_token(self, request: Request) -> None:
        """Refuse a request without the token."""
        from starlette.exceptions import HTTPException

        given = request.headers.get("Authorization", "").encode("latin-1", "replace")
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(
                401, "the token is missing or wrong; send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    async def _while_connected(self, request: Request, job: Callable[[threading.Event], T]) -> T | None:
        """The result of `job` in the thread that draws; None if the client leaves before."""

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        stop = threading.Event()
        drawing = asyncio.wrap_future(self.thread.submit(job, stop))
        gone = asyncio.ensure_future(leaves())
        try:
            await asyncio.wait((drawing, gone), return_when=asyncio.FIRST_COMPLETED)
            return drawing.result() if drawing.done() else None
        finally:
            stop.set()
            gone.cancel()
            drawing.cancel()


async def _body(request: Request) -> bytes:
    """The body of a request, limited in size and time."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY // 1024} KiB")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client has gone") from None
    return bytes(body)


def _read(body: bytes) -> DrawRequest:
    """The request that a body describes."""
    from starlette.exceptions import HTTPException

    try:
        return record_of(DrawRequest, parse(body), "the body", 'send such as {"seed": 7, "count": 4}')
    except VdiffError as error:
        raise HTTPException(400, str(error)) from None
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def folder_app(folder: Path, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The ASGI application of an exported page: the files of its folder and nothing else."""
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    return _app([Mount("/", StaticFiles(directory=folder, html=True))], hosts)


def _app(routes: Sequence[Any], hosts: Sequence[str]) -> Starlette:
    """An application whose responses have `HEADERS` and whose errors are JSON objects."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse

    async def refuse(request: Request, error: Exception) -> Response:
        del request
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: refuse},
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        VdiffError: this machine has no such address, or the port is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise VdiffError(f"{host}, port {port}: {error.strerror or error}", "give another --port or --host") from None


def server_of(app: Starlette) -> uvicorn.Server:
    """The server of an application: `run(sockets=[listen(…)])` serves until Ctrl-C or SIGTERM."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # below are lines about requests that are not HTTP
            access_log=False,
            server_header=False,
            proxy_headers=False,
            headers=list(HEADERS.items()),
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )
    )
