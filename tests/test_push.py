"""`vdiff push`: what reaches a hub, which is a fake one on this machine, and what keeps it from getting there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load

from tests.commands import done, error
from tests.test_model_card import student
from tests.toy import contents
from vdiff.files import parse
from vdiff.models.checkpoint import read_tensors

TOKEN = "hf_secret"
LARGE = (".safetensors", ".onnx", ".png")

# the library's own way of sending large files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Hub:
    """What arrives at the hub, and how it answers.

    Attributes:
        files: repository → name → content, of what was committed.
        made: the request that made each repository.
        asked: method and path of each request.
        answers: path's beginning → status and message, instead of doing what is asked.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    url: str = ""

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Make a repository, say how files are to be sent, take a commit."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            if name in self.made:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.made[name], self.files[name] = request, {}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            assert match[1] in self.made
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            return 200, {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": upload}
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[match[1]][value["path"]] = self.large[value["oid"]]
            oid = "0" * 40
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/{oid}", "commitOid": oid, "success": True}
        return 404, {"error": f"no such path {path}"}

    def put(self, path: str, body: bytes) -> tuple[int, Any]:
        """Take a large file."""
        oid = path.removeprefix("/put/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return 200, {}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            body = self.body()
            said = next((told for beginning, told in hub.answers.items() if path.startswith(beginning)), None)
            if said is not None:
                status, answer = said[0], {"error": said[1]}
            elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"error": "Invalid username or password."}
            else:
                status, answer = (hub.post if self.command == "POST" else hub.put)(path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_GET = answer  # noqa: N815

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on the loopback device, with HF_TOKEN set for it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with all that a training leaves beside it."""
    folder = student(tmp_path / "base_1")
    beside = ("run.toml", "ladder.json", "notes.txt", ".hidden")
    below = ("state/state.safetensors", "log/events.out", "samples/0000001.png", "history/9/config.json")
    for name in (*beside, *below):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("/home/me")
    return folder


def test_a_checkpoint_arrives_without_anything_private(hub, checkpoint):
    before = contents(checkpoint)
    result = done(f"vdiff push {checkpoint} me/digits --license mit --endpoint {hub.url}")
    assert result.stdout == f"{hub.url}/me/digits\n"
    files = hub.files["me/digits"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert files["model.safetensors"] == before["model.safetensors"]
    assert load(files["model.safetensors"]).keys() == read_tensors(checkpoint / "model.safetensors").keys()
    assert files["samples.png"].startswith(b"\x89PNG")
    assert b"license: mit\n" in files["README.md"]
    assert json.loads(files["config.json"])["teacher"]["teacher"]["path"] == "original"
    assert b"/home" not in b"".join(files.values())
    assert TOKEN.encode() not in b"".join(files.values())
    assert hub.made["me/digits"].get("private") in (None, False)
    assert hub.made["me/digits"].get("visibility") in (None, "public")
    assert contents(checkpoint) == before
    assert TOKEN not in result.output


def test_what_is_exported_arrives_as_it_is(hub, tmp_path):
    out = tmp_path / "out"
    done(f"vdiff export weights {student(tmp_path / 'base_1')} {out} --license mit")
    (out / "sampler.onnx").write_bytes(b"graph")
    for name in ("run.toml", "state/state.safetensors", "evil.pt", "unet/config.json", "unet/weights.bin"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / "link.onnx").symlink_to(tmp_path / "base_1/config.json")
    described = parse((out / "config.json").read_text())
    (out / "vdiff").mkdir()
    (out / "vdiff/config.json").write_text(json.dumps({**described, "dataset": "/home/me/photos"}))
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy words.\n")
    done(f"vdiff push {out} me/digits --private --endpoint {hub.url}")
    files = hub.files["me/digits"]
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", "samples.png", "sampler.onnx", "unet/config.json",
        "vdiff/config.json",
    }  # fmt: skip
    assert files["README.md"].endswith(b"\nMy words.\n")
    assert parse(files["config.json"]) == described
    assert parse(files["vdiff/config.json"]) == {**described, "dataset": "photos"}
    made = hub.made["me/digits"]
    assert made.get("private") is True or made["visibility"] == "private"
    line = error(f"vdiff push {out} me/other --license mit --endpoint {hub.url}", 2)
    assert line.startswith("--license: an export has its licence in its README.md; ")


def test_a_dry_run_sends_nothing(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = done(f"vdiff push {checkpoint} me/digits --dry_run --endpoint {hub.url}")
    listed = [line.split()[0] for line in result.stdout.splitlines()[2:]]
    assert listed == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert all(re.search(r" [1-9]\d*\.\d kB$", line) for line in result.stdout.splitlines()[2:])
    (left,) = (line for line in result.stderr.splitlines() if line.startswith("not uploaded: "))
    assert left == "not uploaded: .hidden, history, ladder.json, log, notes.txt, run.toml, samples, state"
    assert hub.asked == []


def test_an_existing_repository_is_left_alone_unless_told(hub, checkpoint):
    done(f"vdiff push {checkpoint} me/digits --endpoint {hub.url}")
    before = dict(hub.files["me/digits"])
    line = error(f"vdiff push {checkpoint} me/digits --license mit --endpoint {hub.url}", 1)
    assert line == "me/digits exists already; give another name, or --overwrite to commit to it"
    assert hub.files["me/digits"] == before
    done(f"vdiff push {checkpoint} me/digits --license mit --overwrite --endpoint {hub.url}")
    assert b"license: mit" in hub.files["me/digits"]["README.md"]


def test_the_token_may_stand_in_a_file(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    done(f"vdiff push {checkpoint} me/digits --token_file {tmp_path / 'token'} --endpoint {hub.url}")
    assert hub.files["me/digits"]
    for content in ("", "two words", None):
        path = tmp_path / "wrong"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        line = error(f"vdiff push {checkpoint} me/other --token_file {path} --endpoint {hub.url}", 2)
        assert line.startswith(f"--token_file {path} ")
    assert "me/other" not in hub.made


def test_without_a_token_nothing_is_asked(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    line = error(f"vdiff push {checkpoint} me/digits --endpoint {hub.url}", 1)
    assert line == f"no token for {hub.url}; set HF_TOKEN, give --token_file, or run `hf auth login`"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("path", "status", "said", "message"),
    [
        ("/api/repos", 401, "Invalid token.", "rejects the token (Invalid token.); set HF_TOKEN to a"),
        (
            "/api/repos",
            403,
            "Forbidden.",
            "the token may not write to me/digits (Forbidden.); use a token of its owner",
        ),
        ("/api/repos", 404, "Not here.", "refuses me/digits: Not here.; nothing was uploaded"),
        ("/api/repos", 500, "Broken\nhere.", "refuses me/digits: Broken here.; nothing was uploaded"),
        (
            "/api/validate",
            400,
            "license must be one of …",
            "license must be one of …; run the same command with --over",
        ),
        ("/api/models/me/digits/commit", 403, "No.", "the token may not write to me/digits (No.); use a token"),
        (
            "/put/",
            400,
            "Too large.",
            "refuses me/digits: Too large.; run the same command with --overwrite to continue",
        ),
    ],
)
def test_refusals_are_one_line(path, status, said, message, hub, checkpoint):
    hub.answers[path] = (status, said)
    assert message in error(f"vdiff push {checkpoint} me/digits --endpoint {hub.url}", 1)
    assert not hub.files.get("me/digits")


def test_a_hub_that_is_not_there_is_one_line(hub, checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = error(f"vdiff push {checkpoint} me/digits --endpoint {url}", 1)
    assert line.startswith(f"cannot upload to {url}: ")
    assert line.endswith("; check the network and --endpoint; nothing was uploaded")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["digits", "me/", "me/a/b", "../x", "me/x y", "me/" + "x" * 97])
def test_a_repository_has_an_owner_and_a_name(name, hub, checkpoint):
    line = error(f"vdiff push {checkpoint} '{name}' --endpoint {hub.url}", 2)
    assert line == f"{name!r} is not the name of a repository; give OWNER/NAME"


def test_only_models_are_uploaded(hub, checkpoint, tmp_path):
    (tmp_path / "card").mkdir()
    line = error(f"vdiff push {tmp_path / 'card'} me/digits --endpoint {hub.url}", 1)
    assert line.startswith(f"{tmp_path / 'card'} holds no config.json; ")
    done(f"vdiff export weights {checkpoint} {tmp_path / 'out'}")
    (tmp_path / "out/model.safetensors").unlink()
    line = error(f"vdiff push {tmp_path / 'out'} me/digits --endpoint {hub.url}", 1)
    assert line.startswith(f"{tmp_path / 'out'} holds a model card but no model; ")
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    error(f"vdiff push {checkpoint} me/digits --endpoint {hub.url}", 1)
    assert hub.asked == []
