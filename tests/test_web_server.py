"""`vdiff serve`: images of sample.py over HTTP, many clients at once, hostile ones, and that nothing else is served."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import vdiff
from tests.commands import done, error, tree
from tests.programs import ends, start
from tests.servers import request, running
from tests.toy import SIZE, write_checkpoint
from vdiff.web.server import LOOPBACK, MAX_BODY, RequestLimits, load_server

pytest.importorskip("starlette")
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of two steps and of one, in colour and with classes, and their teacher."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, steps in (("base_0", 2), ("base_1", 1), ("original", 8)):
        write_checkpoint(root / name, num_timesteps=steps, classes=3, channels=3)
    return root


def served(models: Path, *names: str, **options: Any) -> Any:
    """The application of checkpoints."""
    return load_server([models / name for name in names], device="cpu", **options)


@pytest.fixture(scope="module")
def port(models: Path) -> Iterator[int]:
    """A server of both students on loopback."""
    with running(served(models, "base_0", "base_1").app(LOOPBACK)) as port:
        yield port


def drawn(port: int, count: int, **asked: Any) -> list[np.ndarray]:
    """The images of a request, taken out of their picture."""
    answer, body = request(port, "POST", "/draw", json.dumps({"count": count, **asked}).encode(), JSON)
    assert answer.status == 200, body
    assert float(answer.headers["Server-Timing"].removeprefix("draw;dur=")) > 0
    picture = np.array(Image.open(io.BytesIO(body)))
    columns = int(np.ceil(np.sqrt(count)))
    assert picture.shape == (-(-count // columns) * SIZE, min(columns, count) * SIZE, 3)
    places = [(SIZE * (k // columns), SIZE * (k % columns)) for k in range(count)]
    return [picture[y : y + SIZE, x : x + SIZE] for y, x in places]


@pytest.mark.parametrize(
    ("seed", "flags", "asked"),
    [
        (2**64 - 1, "", {}),
        (7, "--classes 2,0", {"classes": ["2", 0]}),
        (2**53 + 1, "--num_timesteps 1", {"steps": 1}),
    ],
)
def test_images_are_those_of_sample_py(port, models, tmp_path, seed, flags, asked):
    done(f"sample.py --checkpoint {models}/base_0 --num 5 --seed {seed} --out {tmp_path}/out {flags}")
    ours = drawn(port, 5, model="base_0", seed=str(seed), **asked)
    for k, image in enumerate(ours):
        [path] = (tmp_path / "out").glob(f"*{k:05d}.png")
        assert np.array_equal(image, np.array(Image.open(path)))
    numbers = drawn(port, 5, model="base_0", seed=seed, **asked)
    assert np.array_equal(ours, numbers)


def test_a_blend_goes_from_one_seed_to_the_other(port, models):
    ends_of_blend = [drawn(port, 3, seed=1, second_seed=2, blend=blend) for blend in (0, 1)]
    for found, seed in zip(ends_of_blend, (1, 2), strict=True):
        plain = np.array(drawn(port, 3, seed=seed), int)
        assert np.abs(np.array(found, int) - plain).max() <= 1  # cos(π/2) is not 0 in float
    [model, *_] = [vdiff.load(models / "base_0")]
    noises = [
        np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).standard_normal(
            (3, SIZE, SIZE), np.float32
        )
        for seed in (1, 2)
    ]
    between = (np.sqrt(0.75) * noises[0] + 0.5 * noises[1]).astype(np.float32)  # cos and sin of 30°
    [due] = (model.sample(noise=torch.from_numpy(between)[None]) + 1).numpy() * 127.5
    [found] = drawn(port, 1, seed=1, second_seed=2, blend=1 / 3)
    assert np.abs(found.transpose(2, 0, 1).astype(float) - due).max() <= 1


def test_the_page_describes_its_models_and_limits(models):
    with running(
        served(models, "base_0", "base_1", teacher=models / "original", limits=RequestLimits(9, 1)).app()
    ) as port:
        _, body = request(port, "GET", "/models.json")
        answer, teacher = request(port, "GET", "/teacher.png")
    page = json.loads(body)
    assert [(each["name"], each["steps"]) for each in page["models"]] == [("base_0", 2), ("base_1", 1)]
    assert (page["shape"], page["classes"], page["max_images"]) == ([3, SIZE, SIZE], ["0", "1", "2"], 9)
    assert page["teacher"] == {"name": "original", "steps": 8}
    assert answer.headers["Content-Type"] == "image/png"
    due = vdiff.load(models / "original").sample(16)[0]
    found = np.array(Image.open(io.BytesIO(teacher)))[:SIZE, :SIZE]
    assert np.abs(found.transpose(2, 0, 1) - (due.numpy() + 1) * 127.5).max() <= 1


def test_two_hundred_clients_at_once_get_their_own_images(port):
    due = {seed: drawn(port, 2, seed=seed)[1] for seed in range(10)}
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda k: drawn(port, 2, seed=k % 10)[1], range(200)))
    assert all(np.array_equal(image, due[k % 10]) for k, image in enumerate(found))


BAD = [
    (b"", JSON, 400, "not valid JSON"),
    (b"[]", JSON, 400, "not a JSON object"),
    (b'{"seed": 7', JSON, 400, "not valid JSON"),
    (b"\xff\xfe", JSON, 400, "not valid JSON"),
    (b"[" * 60_000, JSON, 400, "nested too deeply"),
    (b"9" * 60_000, JSON, 400, "not valid JSON"),
    (b"{}" + b" " * MAX_BODY, JSON, 413, "larger than 64 KiB"),
    (b"{}", {}, 415, "Content-Type: application/json"),
    (b"seed=7", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
    (b"{}", {**JSON, "Host": "evil.example"}, 400, "Invalid host header"),
    (b"{}", {**JSON, "Host": ""}, 400, ""),
    *(
        (json.dumps(asked).encode(), JSON, 400, said)
        for asked, said in (
            ({"sed": 7}, "did you mean 'seed'?"),
            ({"seed": -1}, "whole number from 0"),
            ({"seed": 2**64}, "whole number from 0"),
            ({"seed": "9" * 1000}, "whole number from 0"),
            ({"seed": "٣"}, "whole number from 0"),
            ({"seed": 1.5}, "'seed' must be"),
            ({"seed": True}, "'seed' must be"),
            ({"seed": None}, "'seed' must be"),
            ({"second_seed": "x", "blend": 0.5}, "whole number from 0"),
            ({"count": 0}, "'count' must be at least 1"),
            ({"count": 17}, "at most 16 images"),
            ({"count": 10**30}, "at most 16 images"),
            ({"blend": float("nan")}, "'blend' must be"),
            ({"blend": 1.01}, "'blend' must be at most 1"),
            ({"steps": 3}, "2 at most"),
            ({"steps": 0}, "'steps' must be at least 1"),
            ({"model": "../base_0"}, "unknown model"),
            ({"classes": []}, "no class is given"),
            ({"classes": ["cat"]}, "unknown class 'cat'"),
            ({"classes": ["0"] * 17}, "more than 16"),
            ({"classes": [[]]}, "'classes' must be"),
            ({"prompts": ["a"]}, "takes no prompts"),
            ({"prompts": ["a" * 2001]}, "prompts"),
            ({"guidance": 1e400}, "guidance"),
            ({"guidance": 2}, "without a class"),
        )
    ),
]


@pytest.mark.parametrize(("body", "headers", "status", "said"), BAD)
def test_bad_requests_are_refused_in_one_line(port, body, headers, status, said, capfd):
    answer, found = request(port, "POST", "/draw", body, headers)
    assert answer.status == status
    assert said in found.decode()
    assert b"Traceback" not in found
    assert b"\n" not in found
    assert drawn(port, 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", path, 404) for path in ("/secret", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/%00")),
        *(("GET", path, 404) for path in ("/teacher.png", "/page/app.js", "/docs", "/openapi.json", "/" + "a" * 9000)),
        *((method, "/draw", 405) for method in ("PUT", "DELETE", "OPTIONS", "TRACE")),
        ("GET", "/draw", 404),
        ("POST", "/models.json", 405),
        ("GET", "/", 200),
        ("HEAD", "/app.js", 200),
    ],
)
def test_nothing_but_the_page_is_served(port, method, path, status):
    answer, body = request(port, method, path)
    assert answer.status == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert b"root:" not in body


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_ends_only_its_own_connection(port, sent):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        said = b""
        with suppress(OSError):  # the server has closed it
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            said = client.recv(2**16)
    assert not said or said.startswith(b"HTTP/1.1 4")
    assert drawn(port, 1)


@pytest.mark.slow
def test_prompts_draw_the_pictures_of_sample(tmp_path):
    pytest.importorskip("transformers")
    from tests.text_training import write_text_checkpoint

    write_text_checkpoint(tmp_path / "base", "sd2")
    server = load_server([tmp_path / "base"], num_timesteps=2, prompt="a cat", device="cpu")
    with running(server.app()) as port:
        page = json.loads(request(port, "GET", "/models.json")[1])
        assert (page["prompt"], page["shape"]) == ("a cat", [3, 64, 64])
        asked = {"prompts": ["a red fox " * 99, "a cat"], "count": 2, "guidance": 2.0}
        answer, body = request(port, "POST", "/draw", json.dumps(asked).encode(), JSON)
        assert answer.status == 200
        assert "is cut off" in json.loads(answer.headers["X-Notes"])[0]
        with pytest.warns(UserWarning, match="is cut off"):
            due = vdiff.load(tmp_path / "base").sample(2, steps=2, prompts=asked["prompts"], guidance=2.0)
        found = np.array(Image.open(io.BytesIO(body))).transpose(2, 0, 1)
        assert np.abs(found - (torch.cat(list(due), dim=-1).numpy() + 1) * 127.5).max() <= 1
        answer, body = request(port, "POST", "/draw", b"{}", JSON)
        assert (answer.status, b"no prompt is given" in body) == (400, True)


class Slow:
    """Replaces drawing in a model: each step waits until the test lets it go on."""

    def __init__(self) -> None:
        self.started, self.go_on, self.steps = threading.Semaphore(0), threading.Event(), 0

    def sample(self, model: Any, num: int, *, on_step: Any, **options: Any) -> Any:
        del options
        self.started.release()
        for step in range(1, 1000):
            if self.go_on.wait(0.01):
                break
            self.steps = step
            on_step(step)
        return torch.zeros(num, *model.shape)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow()
    monkeypatch.setattr("vdiff.api.Model.sample", lambda model, num, **options: found.sample(model, num, **options))
    yield found
    found.go_on.set()


def test_drawing_ends_when_its_client_is_gone(port, slow):
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
            assert slow.started.acquire(timeout=30)
    assert slow.started.acquire(timeout=0.5) is False
    before = slow.steps
    time.sleep(0.1)
    assert slow.steps == before  # nobody draws
    slow.go_on.set()
    assert drawn(port, 1)


def test_too_many_requests_are_refused_and_may_try_again(models, slow):
    server = served(models, "base_0", limits=RequestLimits(4, 3))
    with running(server.app()) as port, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(request, port, "POST", "/draw", b"{}", JSON) for _ in range(3)]
        while server.waiting < 3:
            time.sleep(0.01)
        answer, _ = request(port, "POST", "/draw", b"{}", JSON)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert request(port, "GET", "/models.json")[0].status == 200
        slow.go_on.set()
        assert [each.result()[0].status for each in waiting] == [200] * 3
        assert request(port, "POST", "/draw", b"{}", JSON)[0].status == 200


def test_a_token_protects_models_but_not_the_page(models):
    with running(served(models, "base_0", token=TOKEN).app()) as port:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer \xe9"}, 401),
            ({"Authorization": TOKEN}, 401),
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ):
            assert request(port, "GET", "/models.json", headers=headers)[0].status == status
            assert request(port, "POST", "/draw", b"{}", {**JSON, **headers})[0].status == status
        assert request(port, "GET", "/app.js")[0].status == 200


def test_a_slow_body_is_given_up(port, monkeypatch):
    monkeypatch.setattr("vdiff.web.server.BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(
            b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert client.recv(2**16).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_memory_stays_flat(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = psutil.Process()
    with running(served(models, "base_0", "base_1").app()) as port, ThreadPoolExecutor(8) as pool:
        sizes = []
        for _ in range(4):
            list(pool.map(lambda k: drawn(port, 16, seed=k), range(200)))
            sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[1] < 10 * 2**20
    assert tree(tmp_path) == {}


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_writes_nothing(models, tmp_path):
    before = tree(models)
    program = start(f"vdiff serve {models}/base_0 --port 0", tmp_path)
    while not (said := program.said[0].read_text() if program.said[0].exists() else "").endswith("\n"):
        assert program.returncode is None
        time.sleep(0.05)
    port = int(said.rsplit(":", 1)[1].partition("/")[0])
    assert drawn(port, 1)
    assert request(port, "GET", "/", headers={"Host": f"localhost:{port}"})[0].status == 200
    program.send_signal(signal.SIGINT)
    codes, stdout, stderr = ends([program])
    assert (codes, stdout) == ([130], f"http://127.0.0.1:{port}/ (Ctrl-C ends)\n")
    assert "Traceback" not in stderr
    assert tree(tmp_path) == {}
    assert tree(models) == before


def test_bad_options_are_refused_in_one_line(models, tmp_path):
    (tmp_path / "token").write_text("short\n")
    write_checkpoint(tmp_path / "wide", image_size=8)
    write_checkpoint(tmp_path / "two" / "base_0")
    table = {"name": "linear", "num_levels": 8}
    write_checkpoint(tmp_path / "few", classes=3, channels=3, schedule=table)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, code, said in (
            (f"--token_file {tmp_path}/none", 2, "--token_file"),
            (f"--token_file {tmp_path}/token", 2, "holds no token"),
            (f"--port {taken.getsockname()[1]}", 1, "give another --port"),
            ("--host 203.0.113.7", 1, "203.0.113.7"),
            (f"{tmp_path}/wide", 2, "other sizes or classes"),
            (f"{tmp_path}/two/base_0", 2, "two of the checkpoints have one name"),
            (f"--teacher {tmp_path}/wide", 2, "--teacher"),
            (f"--teacher {tmp_path}/few --teacher_steps 9", 2, "few, 9 steps"),
            ("--teacher_steps 3", 2, "--teacher_steps needs a teacher"),
        ):
            assert said in error(f"vdiff serve {models}/base_0 {flags}", code), flags


def test_a_missing_package_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'vdiff[web]'" in error(f"vdiff serve {models}/base_0", 1)
