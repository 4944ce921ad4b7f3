"""Pages that draw in the browser: what they hold, that they draw vdiff's images, and that nothing else is asked for."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vdiff
from tests.browser import PROGRAM, Tab, browser, check_accessible
from tests.commands import done, error
from tests.servers import request, running
from tests.toy import SIZE, write_checkpoint
from vdiff.errors import VdiffError
from vdiff.models.checkpoint import read_config, save_checkpoint
from vdiff.web.export import RUNTIME_FILES, _runtime, export_web
from vdiff.web.pages import MODELS
from vdiff.web.server import folder_app, load_server

pytest.importorskip("onnxscript")
SEEDS = [0, 7, 2**32, 2**64 - 1]
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not here: apt-get install chromium")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two steps with classes, one of a step, and their teacher."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, steps in (("base_0", 2), ("base_1", 1), ("original", 8)):
        write_checkpoint(root / name, num_timesteps=steps, classes=3)
    return root


@pytest.fixture(scope="module")
def empty_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    for name in RUNTIME_FILES:
        (folder / name).write_text("")
    return folder


@pytest.mark.slow
def test_numbers_of_fewer_bits_are_smaller_and_measured(models, empty_runtime, tmp_path):
    sizes, differences = {}, {}
    for precision in ("fp32", "fp16", "int8"):
        [made] = export_web(
            [models / "base_1"], tmp_path / precision, precision=precision, runtime=str(empty_runtime), title="<b>"
        )
        sizes[precision], differences[precision] = made.bytes, made.difference
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert differences["fp32"] < 1e-4 < differences["int8"]
    assert differences["fp32"] < differences["fp16"] < differences["int8"] < 0.5
    assert "&lt;b&gt;" in (tmp_path / "fp32/index.html").read_text()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take no time."""

    def write(denoiser: object, config: object, options: object, file: Path, *, fingerprint: str) -> float:
        del denoiser, config, options
        file.write_text(fingerprint)
        return 0.0

    monkeypatch.setattr("vdiff.web.export.export_onnx", write)


@pytest.mark.usefixtures("quick")
def test_only_a_page_is_replaced(models, empty_runtime, tmp_path):
    line = f"vdiff export web {models}/base_1 {tmp_path}/page --runtime {empty_runtime}"
    assert "next       python -m http.server" in done(line).stdout
    assert "--overwrite" in error(line, 1)
    done(f"{line} --overwrite")
    (tmp_path / "page" / "mine.txt").write_text("")
    assert "mine.txt" in error(f"{line} --overwrite", 1)
    assert (tmp_path / "page" / MODELS).exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("address", ["https://example.org/dist", "https://example.org/dist/"])
def test_a_runtime_on_a_server_is_allowed_and_not_copied(models, tmp_path, address):
    done(f"vdiff export web {models}/base_1 {tmp_path}/page --runtime {address}")
    assert json.loads((tmp_path / "page" / MODELS).read_text())["runtime"] == "https://example.org/dist"
    assert "connect-src 'self' https://example.org;" in (tmp_path / "page/index.html").read_text()
    assert not (tmp_path / "page/ort").exists()


@pytest.mark.usefixtures("quick")
def test_bad_input_is_refused_in_one_line(models, empty_runtime, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "wide", num_timesteps=1)
    write_checkpoint(tmp_path / "long", num_timesteps=1024)
    start, end = f"vdiff export web {models}/base_1", f"{tmp_path}/page"
    ready = f"--runtime {empty_runtime}"
    for line, code, said in (
        (f"{start} {tmp_path}/wide {end} {ready}", 2, "other sizes or classes"),
        (f"{start} {end} {ready} --teacher {tmp_path}/wide", 2, "--teacher"),
        (f"vdiff export web {tmp_path}/long {end} {ready}", 2, "at most 64"),
        (f"{start} {models}/base_1 {end} {ready}", 2, "two of the checkpoints have one name"),
        (f"{start} {end} --runtime {tmp_path}", 1, "holds no ort."),
        (f"{start} {end} {ready} --port 9000", 2, "--port is for the server of --serve; give --serve too"),
    ):
        assert said in error(line, code), line
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "npm, which downloads onnxruntime-web, is not installed" in error(f"{start} {end}", 1)
    (tmp_path / "npm").write_text("#!/bin/sh\necho the registry is away >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    assert "npm cannot download onnxruntime-web@" in (said := error(f"{start} {end}", 1))
    assert "the registry is away; give --runtime" in said
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def page(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A page with the real runtime, and its address."""
    folder = tmp_path_factory.mktemp("web") / "page"
    try:
        with _runtime(os.environ.get("VDIFF_ORT")) as runtime:
            export_web(
                [models / "base_0", models / "base_1"], folder, teacher=models / "original", runtime=str(runtime)
            )
    except VdiffError as error:
        pytest.skip(f"{error}")
    with running(folder_app(folder)) as port:
        yield folder, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


DRAWN = """new Promise((done, fail) => {
    const status = document.getElementById("status");
    const look = () => status.matches(".failed") ? fail(Error(status.textContent)) : self.vdiff?.drawn ? done(1) : 0;
    const again = () => { look(); setTimeout(again, 20); };
    again();
})"""


@needs_browser
@pytest.mark.slow
def test_the_page_draws_our_images_and_asks_nobody_else(page, models, tab):
    _, address = page
    tab.requests.clear()
    tab.open(f"{address}/", width=1280)
    tab.run(DRAWN)
    assert tab.run("document.getElementById('status').textContent") == "Drawn."
    for seed in SEEDS:
        tab.run(
            f"self.vdiff.drawn = 0; document.getElementById('seed').value = '{seed}';"
            "document.getElementById('seed').dispatchEvent(new Event('input', { bubbles: true })); " + DRAWN
        )
        for name in ("base_0", "base_1"):
            found = np.array(tab.run(f"Array.from(self.vdiff.images['{name}'])"))
            ours = vdiff.load(models / name).sample(4, seed=seed).numpy()
            assert np.abs(found - ours.ravel()).max() < 1e-4
    assert [each for each in tab.trouble if "No available adapters" not in each] == []  # a computer without a GPU
    assert [each for each in tab.requests if not each.startswith((address, "data:", "blob:"))] == []
    assert tab.run("document.querySelector('#grids figure:last-child canvas').width") > 0


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_its_noise_is_that_of_numpy(page, tab, seed):
    tab.open(f"{page[1]}/noise.js", width=1280)
    for image in (0, 3):
        found = tab.run(f"import('/noise.js').then(m => Array.from(m.noise({seed}n, {image}, 100000)))")
        philox = np.random.Philox(key=np.array([seed, image], np.uint64))
        numbers = np.random.Generator(philox).standard_normal(100000, dtype=np.float32)
        assert np.abs(np.array(found) - numbers).max() < 1e-6


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_everybody_can_use_the_page(page, tab, width, dark):
    tab.open(f"{page[1]}/", width=width, dark=dark)
    tab.run(DRAWN)
    assert tab.run("document.scrollingElement.scrollWidth") <= width
    check_accessible(tab)


PROMPTS = [
    "a red fox",
    "",
    "Don't  SHOUT,\tit's 42 o'clock!!",
    "Straße, naïve café, ΟΔΟΣ, I\u0307stanbul, e\u0301",
    "猫と犬 ❤️ 👩‍👩‍👧 \u00ad\u0000",
    "<|endoftext|> in the middle, and <|startoftext|>, <|ENDOFTEXT|>",
    "\ufeffx\u0085y\u2003z, ½ ٣ ⅷ 𝔘𝔫𝔦",
    "a long prompt about " + "many different things " * 40,
]


@pytest.fixture(scope="module")
def text_students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of two steps and of one of a tiny text-to-image model."""
    pytest.importorskip("transformers")
    from tests.text_training import write_text_checkpoint

    root = tmp_path_factory.mktemp("text")
    for name, steps in (("base_0", 2), ("base_1", 1)):
        denoiser = write_text_checkpoint(root / name, "sd2")
        config = dataclasses.replace(read_config(root / name), num_timesteps=steps, method="progressive")
        save_checkpoint(root / name, denoiser.state_dict(), config)
    write_text_checkpoint(root / "base", "sd2")
    write_text_checkpoint(root / "xl", "sdxl")
    return root


@pytest.fixture(scope="module")
def text_page(text_students: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Their page with the real runtime, and its address."""
    folder = tmp_path_factory.mktemp("text_web") / "page"
    try:
        with _runtime(os.environ.get("VDIFF_ORT")) as runtime:
            export_web([text_students / "base_0", text_students / "base_1"], folder, runtime=str(runtime))
    except VdiffError as error:
        pytest.skip(f"{error}")
    with running(folder_app(folder)) as port:
        yield folder, f"http://127.0.0.1:{port}"


@needs_browser
@pytest.mark.slow
def test_the_page_draws_our_images_of_a_prompt(text_page, text_students, tab):
    tab.open(f"{text_page[1]}/", width=1280)
    tab.run(DRAWN)
    for prompt in PROMPTS[:2]:
        tab.run(
            f"self.vdiff.drawn = 0; document.getElementById('prompt').value = {json.dumps(prompt)};"
            "document.getElementById('prompt').dispatchEvent(new Event('input', { bubbles: true })); " + DRAWN
        )
        for name in ("base_0", "base_1"):
            found = np.array(tab.run(f"Array.from(self.vdiff.images['{name}'])"))
            ours = vdiff.load(text_students / name).sample(4, prompts=[prompt]).numpy()
            assert np.abs(found - ours.ravel()).max() < 2 / 127.5
    check_accessible(tab)


@needs_browser
@pytest.mark.slow
def test_its_tokens_are_those_of_transformers(text_page, text_students, tab):
    due = vdiff.load(text_students / "base_0").prompting.tokenizers.tokens(PROMPTS).tolist()
    tab.open(f"{text_page[1]}/tokens.js", width=1280)
    found = tab.run(
        "Promise.all([import('/tokens.js'), fetch('/tokenizer.json').then(a => a.json())])"
        f".then(([m, words]) => {json.dumps(PROMPTS)}.map(m.tokenizer(words)))"
    )
    assert [each["tokens"] for each in found] == due
    assert [each["isCut"] for each in found] == [False] * 7 + [True]


@pytest.mark.usefixtures("quick")
def test_text_models_that_do_not_fit_a_browser_are_served(text_students, empty_runtime, tmp_path, monkeypatch):
    for name, said in (("base", "draws with guidance"), ("xl", "two text encoders")):
        line = f"vdiff export web {text_students}/{name} {tmp_path}/page --num_timesteps 2 --runtime {empty_runtime}"
        assert said in (message := error(line, 1))
        assert "vdiff serve" in message
    monkeypatch.setattr("vdiff.web.text.MAX_BYTES", 1000)
    line = f"vdiff export web {text_students}/base_0 {tmp_path}/page --runtime {empty_runtime}"
    assert "too much for a browser" in error(line, 1)


@pytest.mark.parametrize("path", ["/../secret", "/%2e%2e/secret", "/..%2fsecret", "//secret", "/ort/", "/%00"])
def test_nothing_outside_the_folder_is_served(tmp_path, path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "page" / "ort").mkdir(parents=True)
    (tmp_path / "page" / "index.html").write_text("hello")
    (tmp_path / "page" / "link").symlink_to(tmp_path / "secret")
    with running(folder_app(tmp_path / "page")) as port:
        for asked, status in ((path, 404), ("/link", 404), ("/", 200)):
            answer, body = request(port, "GET", asked)
            assert answer.status == status
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert b"secret" not in body


@needs_browser
@pytest.mark.slow
def test_the_same_page_shows_what_a_server_draws(models, tab):
    token = "a-token-of-24-characters"
    server = load_server([models / "base_0", models / "base_1"], teacher=models / "original", device="cpu", token=token)
    with running(server.app()) as port:
        address = f"http://127.0.0.1:{port}"
        tab.requests.clear()
        tab.open(f"{address}/#token={token}", width=1280)
        tab.run(DRAWN)
        assert tab.run("document.getElementById('status').textContent") == "Drawn."
        pixels = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        grids = tab.run(f"[...document.querySelectorAll('#grids canvas')].map({pixels})")
        assert [each for each in tab.requests if not each.startswith((address, "data:", "blob:"))] == []
        check_accessible(tab)
    scale, gap = 96 // SIZE, 4
    for grid, name in zip(grids, ("base_0", "base_1", "original"), strict=True):
        shown = np.array(grid).reshape(2 * 96 + gap, 2 * 96 + gap, 4)[..., 0]
        ours = (vdiff.load(models / name).sample(4).numpy() + 1) * 127.5
        for k in range(4):
            y, x = (96 + gap) * (k // 2), (96 + gap) * (k % 2)
            image = shown[y : y + 96 : scale, x : x + 96 : scale]
            assert np.abs(image - ours[k, 0]).max() <= 1
