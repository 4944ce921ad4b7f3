"""`vdiff export torch`: a program that draws vdiff's images where vdiff is not installed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vdiff
from tests.commands import done, error
from tests.exported import SIZE, programs, without, write_model
from tests.oracles import condition, randn
from tests.toy import contents
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.interop import graphs
from vdiff.interop.graphs import FewSteps, GraphOptions, grid
from vdiff.models.checkpoint import load_checkpoint, weights_fingerprint
from vdiff.models.condition import Signature
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw_from

STEPS, COUNT = 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` predicts ε; `told` is told classes and guidance and predicts v. Each exported once."""
    root = tmp_path_factory.mktemp("torch")
    write_model(root / "plain", prediction="eps", schedule={"name": "linear", "num_levels": 8}, steps=STEPS)
    write_model(root / "told", schedule={"name": "cosine"}, steps=STEPS, num_classes=3, guidance_input=True)
    said = done(f"vdiff export torch {root / 'plain'} {root / 'out/model.pt2'}").stdout
    assert said.startswith(f"{root / 'out/model.pt2'}: eps by torch.export differ from vdiff's by at most ")
    done(f"vdiff export torch {root / 'told'} {root / 'more/sampler.pt2'} --sampler_graph --clipping_value 0.5")
    return root


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, torch.Tensor]:
    """What the files answer in a program that cannot import vdiff, and what the programs of the cards draw in it."""
    given = {
        "noise": randn(COUNT, 1, SIZE, SIZE, seed=7, dtype=torch.float32),
        "label": torch.arange(COUNT, dtype=torch.float32) % 8,
        "guidance": torch.linspace(0, 3, COUNT),
        "classes": torch.arange(COUNT) % 3,
    }
    save_file(given, folder / "given.safetensors")
    code = """
import torch
from safetensors.torch import load_file
given, found = load_file("given.safetensors"), {}
evaluate = torch.export.load("out/model.pt2").module()
sampler = torch.export.load("more/sampler.pt2").module()
with torch.no_grad():
    for n in (1, 5):
        z, label, classes, guidance = (given[name][:n] for name in ("noise", "label", "classes", "guidance"))
        found[f"eps{n}"] = evaluate(z=z, label=label)
        found[f"images{n}"] = sampler(noise=z, classes=classes, guidance=guidance)
"""
    for name, result in (("out/model.pt2", "z"), ("more/sampler.pt2", "images")):
        program = programs((folder / name).with_name("README.md"))[Path(name).name]
        first = next(line for line in program.splitlines() if line.startswith("noise = "))
        program = program.replace(first, 'noise = given["noise"]').replace(Path(name).name, name)
        code += f'{program}\nfound["{Path(name).parent}"] = {result}\n'
    names: dict[str, Any] = {}
    with without(["vdiff"], folder):
        exec(code, names)
        assert [name for name in sys.modules if name.startswith("vdiff.")] == []
    return {**given, **names["found"]}


@pytest.mark.parametrize("count", [1, 5])
def test_an_evaluation_is_the_denoisers(folder, answers, count):
    denoiser, _ = load_checkpoint(folder / "plain")
    z, label = answers["noise"][:count], answers["label"][:count]
    with torch.no_grad():
        due = denoiser(z, (label.double() + 1) / 8).eps
    torch.testing.assert_close(answers[f"eps{count}"], due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_the_sampler_draws_vdiffs_images(folder, answers, count):
    """Each image has its own class and weight of guidance, so vdiff draws them one by one."""
    denoiser, _ = load_checkpoint(folder / "told")
    for k in range(count):
        due = draw_from(
            denoiser, Ddim(clipping_value=0.5), noise=lambda k=k: answers["noise"][k : k + 1], num_steps=STEPS,
            condition=condition(answers["classes"][k : k + 1]), guidance=float(answers["guidance"][k]),
        )  # fmt: skip
        torch.testing.assert_close(answers[f"images{count}"][k : k + 1], due, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "out", "clip"), [("plain", "out", 1.0), ("told", "more", 0.5)])
def test_the_programs_of_the_card_draw_vdiffs_images(name, out, clip, folder, answers):
    denoiser, config = load_checkpoint(folder / name)
    due = draw_from(
        denoiser, Ddim(clipping_value=clip), noise=lambda: answers["noise"], num_steps=STEPS,
        condition=condition(answers["classes"] if config.class_names else None),
    )  # fmt: skip
    torch.testing.assert_close(answers[out], due, rtol=0, atol=1e-5)


def test_the_file_says_what_it_is_and_nothing_of_this_machine(folder):
    for path, name in ((folder / "out/model.pt2", "plain"), (folder / "more/sampler.pt2", "told")):
        with zipfile.ZipFile(path) as archive:
            held = {item.rpartition("/")[2]: archive.read(item) for item in archive.namelist()}
        about = json.loads(held["vdiff.json"])
        assert about["vdiff_version"] == vdiff.__version__
        assert about["fingerprint"] == weights_fingerprint(folder / name)
        assert about["num_steps"] == str(STEPS)
        for secret in (str(Path(vdiff.__file__).parent), "site-packages", "somebody", ".py", str(folder)):
            assert secret.encode() not in b"".join(held.values())


class Silent(nn.Module):
    """A network that answers 0."""

    signature = Signature(1, 1)

    def forward(self, z: torch.Tensor, *_: object) -> torch.Tensor:
        return 0 * z


@pytest.mark.parametrize("clip", [None, 0.25])
def test_steps_without_a_velocity_are_rotations(clip):
    """v̂ = 0: z turns by δ in each step, and only its projection is left; clipped, x̂ = clip(cos φ z) and ε̂ follows."""
    denoiser = Denoiser(Silent(), CosineSchedule(), "v")  # type: ignore[arg-type]
    noise = 0.7 * randn(4, 1, 2, 2, dtype=torch.float32)
    found = FewSteps(denoiser, GraphOptions(sampler=True, output="v", num_steps=3, clipping_value=clip))(noise)
    first = math.atan(math.exp(-10))
    angles = [*(math.pi / 2 * k / 3 + first * (1 - 2 * k / 3) for k in (3, 2, 1)), 0.0]
    z = noise.double()
    for t, s in itertools.pairwise(angles):
        t, s = torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        x, eps = t.cos() * z, t.sin() * z
        if clip is not None:
            x = x.clamp(-clip, clip)
            eps = (z - t.cos() * x) / t.sin()
        z = s.cos() * x + s.sin() * eps
    torch.testing.assert_close(found.double(), z.clamp(-1, 1), rtol=0, atol=1e-6)
    assert [float(step["label"]) for step in grid(denoiser, 4)] == [1023, 767, 511, 255]


@pytest.fixture(scope="module")
def program(folder: Path) -> torch.export.ExportedProgram:
    return torch.export.load(folder / "out/model.pt2")


@pytest.fixture
def traced(program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of `plain` take the program that is there."""
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: program)


@pytest.mark.usefixtures("traced")
def test_a_program_that_answers_wrongly_leaves_no_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "TOLERANCE", -1.0)
    line = f"vdiff export torch {folder / 'plain'} {tmp_path / 'out/model.pt2'} --overwrite"
    assert "the exported graph differs from vdiff by " in error(line, 1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.pt2").write_bytes(b"old")
    error(line, 1)
    assert contents(tmp_path) == {"out/model.pt2": b"old"}


@pytest.mark.usefixtures("traced")
def test_a_full_disk_leaves_no_file(folder, tmp_path, monkeypatch):
    def full(self: Path, _: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    line = error(f"vdiff export torch {folder / 'plain'} {tmp_path / 'out/model.pt2'}", 1)
    assert line.startswith(f"cannot write {tmp_path / 'out/model.pt2'}: No space left on device; free space")
    assert not (tmp_path / "out").exists()


def test_existing_files_stay_without_overwrite(folder, tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"old")
    (tmp_path / "folder.pt2").mkdir()
    for name, message in (
        ("model.pt2", "exists and is not a program that vdiff"),
        ("folder.pt2", "is a folder; give"),
    ):
        assert message in error(f"vdiff export torch {folder / 'plain'} {tmp_path / name}", 1)
    (tmp_path / "README.md").write_text("about something else")
    line = error(f"vdiff export torch {folder / 'plain'} {tmp_path / 'new.pt2'}", 1)
    assert "README.md is not the model card of " in line
    assert contents(tmp_path) == {"model.pt2": b"old", "README.md": b"about something else"}


BAD = [
    (
        "plain",
        "s.pt2 --sampler_graph --no_clip",
        "an eps-prediction at zero signal carries no information about the image",
    ),
    ("plain", "s.pt2 --sampler_graph --guided", "trained only with classes"),
    ("plain", "s.onnx", "give FILE.pt2"),
]


@pytest.mark.parametrize(("name", "words", "message"), BAD)
def test_what_cannot_be_done_is_said_in_a_line(name, words, message, folder, tmp_path):
    assert message in error(f"vdiff export torch {folder / name} {tmp_path}/{words}", 2)
    assert contents(tmp_path) == {}


def test_an_eps_prediction_at_zero_signal_is_refused(tmp_path):
    write_model(tmp_path / "m", prediction="eps", schedule={"name": "cosine", "logsnr_max": 100.0}, steps=2)
    line = error(f"vdiff export torch {tmp_path / 'm'} {tmp_path / 'out/m.pt2'}", 1)
    assert "this schedule's zero signal" in line
    assert not (tmp_path / "out").exists()
