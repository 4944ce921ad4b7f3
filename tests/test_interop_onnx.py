"""`vdiff export onnx`: ONNX Runtime, without torch and vdiff, draws vdiff's images."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import vdiff
from tests.commands import done, error
from tests.exported import SIZE, programs, without, write_model
from tests.oracles import condition, randn
from tests.toy import contents
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import VdiffError
from vdiff.interop import graphs
from vdiff.interop import onnx as interop
from vdiff.interop.graphs import GraphOptions
from vdiff.models.checkpoint import load_checkpoint, weights_fingerprint
from vdiff.models.drawing import draw_from

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`told`: is told classes and guidance, predicts both; `guided`: knows no class, predicts x. Each exported once."""
    root = tmp_path_factory.mktemp("onnx")
    write_model(
        root / "told", prediction="both", schedule={"name": "ddpm_cosine", "num_levels": 16}, steps=STEPS,
        num_classes=3, null_class=True, guidance_input=True,
    )  # fmt: skip
    write_model(
        root / "guided", prediction="x", schedule={"name": "cosine"}, steps=STEPS, num_classes=3, null_class=True,
        multipliers=(1, 2),
    )  # fmt: skip
    said = done(f"vdiff export onnx {root / 'told'} {root / 'out/model.onnx'}").stdout
    assert said.startswith(f"{root / 'out/model.onnx'}: v by ONNX Runtime differ from vdiff's by at most ")
    done(f"vdiff export onnx {root / 'guided'} {root / 'more/sampler.onnx'} --sampler_graph --guided --no_clip")
    return root


@functools.cache
def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def shapes(values: Any) -> dict[str, list[Any]]:
    return {value.name: value.shape for value in values}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_evaluation_is_the_denoisers(folder, count):
    denoiser, _ = load_checkpoint(folder / "told")
    run = session(folder / "out/model.onnx")
    assert shapes(run.get_inputs()) == {
        "z": ["batch", 1, SIZE, SIZE], "label": ["batch"], "classes": ["batch"], "guidance": ["batch"],
    }  # fmt: skip
    assert shapes(run.get_outputs()) == {"v": ["batch", 1, SIZE, SIZE]}
    z = randn(count, 1, SIZE, SIZE, seed=count, dtype=torch.float32)
    t = torch.tensor([1, 0.5, 1 / 16, 0.3, 1.0], dtype=torch.float64)[:count]
    classes, guidance = torch.tensor([3, 0, 1, 2, 0])[:count], torch.tensor([0.0, 3.0, 1.5, 0.7, 2.0])[:count]
    named = {"z": z, "label": (16 * t - 1).float(), "classes": classes, "guidance": guidance}
    found = run.run(["v"], {name: value.numpy() for name, value in named.items()})[0]
    with torch.no_grad():
        due = denoiser(z, t, condition(classes, guidance)).v
    np.testing.assert_allclose(found, due, rtol=0, atol=1e-5)
    others = {**named, "classes": (classes + 1) % 4, "guidance": guidance + 1}
    for name in ("classes", "guidance"):
        changed = run.run(["v"], {key: (others if key == name else named)[key].numpy() for key in named})[0]
        assert np.abs(changed - found).max() > 1e-3, f"{name} is not heeded"


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("weight", [-1.0, 0.0, 12.0])
def test_the_sampler_draws_vdiffs_images(folder, count, weight):
    """Guidance, no clip inside, clamped at the end; noise that the check at the export has not seen."""
    denoiser, _ = load_checkpoint(folder / "guided")
    run = session(folder / "more/sampler.onnx")
    assert shapes(run.get_inputs()) == {
        "noise": ["batch", 1, SIZE, SIZE], "classes": ["batch"], "guidance": ["batch"],
    }  # fmt: skip
    assert shapes(run.get_outputs()) == {"images": ["batch", 1, SIZE, SIZE]}
    noise = randn(count, 1, SIZE, SIZE, seed=7, dtype=torch.float32)
    classes = torch.arange(count) % 3
    told = {"noise": noise, "classes": classes, "guidance": torch.full((count,), weight)}
    found = run.run(["images"], {name: value.numpy() for name, value in told.items()})[0]
    drawn = draw_from(
        denoiser,
        Ddim(clipping_value=None),
        noise=lambda: noise,
        num_steps=STEPS,
        condition=condition(classes),
        guidance=weight,
    )
    assert drawn.abs().max() > 1 or weight < 1
    np.testing.assert_allclose(found, drawn.clamp(-1, 1), rtol=0, atol=1e-5 * (1 + 2 * abs(weight)))


def test_each_image_has_its_own_guidance(folder):
    run = session(folder / "more/sampler.onnx")
    noise = randn(2, 1, SIZE, SIZE, dtype=torch.float32).numpy()
    classes = np.array([0, 2])

    def drawn(*weights: float) -> Any:
        return run.run(None, {"noise": noise, "classes": classes, "guidance": np.array(weights, np.float32)})[0]

    assert np.abs(drawn(0.5, 2.0)[1] - drawn(1.0, 2.0)[1]).max() < 1e-6
    assert np.abs(drawn(0.5, 2.0)[0] - drawn(1.0, 2.0)[0]).max() > 1e-3


def test_the_file_says_what_it_is(folder):
    about = session(folder / "out/model.onnx").get_modelmeta().custom_metadata_map
    assert about["vdiff_version"] == vdiff.__version__
    assert about["fingerprint"] == weights_fingerprint(folder / "told")
    assert json.loads(about["schedule"])["name"] == "ddpm_cosine"
    assert (about["num_steps"], about["prediction"], about["label"]) == ("4", "both", "16 * t - 1")
    grid = json.loads(about["grid"])
    assert [step["label"] for step in grid] == [15, 11, 7, 3]
    assert (grid[-1]["alpha_s"], grid[-1]["sigma_s"]) == (1, 0)
    for upper, lower in itertools.pairwise(grid):
        assert (upper["alpha_s"], upper["sigma_s"]) == (lower["alpha_t"], lower["sigma_t"])
    assert all(step["alpha_t"] ** 2 + step["sigma_t"] ** 2 == pytest.approx(1) for step in grid)
    about = session(folder / "more/sampler.onnx").get_modelmeta().custom_metadata_map
    assert (about["sampler"], about["clipping_value"], about["guided"], about["num_steps"]) == (
        "ddim",
        "null",
        "true",
        "4",
    )
    assert "grid" not in about


def test_the_file_says_nothing_of_this_machine(folder):
    for path in folder.glob("*/*.onnx"):
        data = path.read_bytes()
        for secret in (str(Path(vdiff.__file__).parent), "site-packages", "somebody", ".py", str(folder)):
            assert secret.encode() not in data


def test_weights_are_there_once_and_constants_are_computed(folder):
    model = onnx.load(folder / "more/sampler.onnx")
    denoiser, _ = load_checkpoint(folder / "guided")
    parameters = sum(p.numel() for p in denoiser.parameters())
    numbers = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert numbers < 1.7 * parameters  # kernels of upsampling are there in both forms
    kinds = {node.op_type for node in model.graph.node}
    assert {"Cos", "Sin"} & kinds == set()  # neither the time embedding nor α and σ
    assert all(tensor.data_type != onnx.TensorProto.DOUBLE for tensor in model.graph.initializer)


def test_the_programs_of_the_card_run_without_torch_and_vdiff(folder):
    """They are run as they stand in the card, but for where the noise comes from."""
    np.save(folder / "noise.npy", randn(16, 1, SIZE, SIZE, dtype=torch.float32).numpy())
    code = ""
    for name, result in (("out/model.onnx", "z"), ("more/sampler.onnx", "images")):
        program = programs((folder / name).with_name("README.md"))[Path(name).name]
        first = next(line for line in program.splitlines() if line.startswith("noise = "))
        program = program.replace(first, 'noise = np.load("noise.npy")').replace(Path(name).name, name)
        code += f'{program}\nnp.save("{Path(name).parent}.npy", {result})\n'
    with without(["vdiff", "torch"], folder):
        exec(code, {})
    noise = torch.from_numpy(np.load(folder / "noise.npy"))
    for name, out, clip, weight in (("told", "out", 1.0, 0.0), ("guided", "more", None, 1.0)):
        denoiser, _ = load_checkpoint(folder / name)
        due = draw_from(
            denoiser, Ddim(clipping_value=clip), noise=lambda: noise, num_steps=STEPS,
            condition=condition(torch.arange(16) % 3), guidance=weight,
        )  # fmt: skip
        np.testing.assert_allclose(np.load(folder / f"{out}.npy"), due.clamp(-1, 1), rtol=0, atol=1e-5)


def test_a_graph_that_answers_wrongly_leaves_no_file(folder, tmp_path, monkeypatch):
    wrong = onnx.load(folder / "out/model.onnx")
    (weight,) = (tensor for tensor in wrong.graph.initializer if tensor.name == "network.conv_out.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    monkeypatch.setattr(interop, "_traced", lambda *_, **__: wrong)
    line = error(f"vdiff export onnx {folder / 'told'} {tmp_path / 'new/model.onnx'}", 1)
    assert "the exported graph differs from vdiff by " in line
    assert "more than 0.0001" in line
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(folder / "out", tmp_path / "old")
    before = contents(tmp_path / "old")
    error(f"vdiff export onnx {folder / 'told'} {tmp_path / 'old/model.onnx'} --overwrite", 1)
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(name, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    line = error(f"vdiff export onnx {folder / 'told'} {tmp_path / 'model.onnx'}", 1)
    assert line == f"export to ONNX: {name} is not installed; pip install 'vdiff[onnx]'"


def test_a_network_too_large_for_the_format_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interop, "MAX_BYTES", 1000)
    line = error(f"vdiff export onnx {folder / 'told'} {tmp_path / 'model.onnx'}", 1)
    assert "2 GiB limit of ONNX files; use `vdiff export torch`" in line
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("model.pt2", "model.pt2 is not a name for an export of this kind; give FILE.onnx"),
    ("taken.onnx", "exists and is not an ONNX file that vdiff wrote"),
    ("s.onnx --sampler_graph --output x", "--output x is for evaluations"),
    ("s.onnx --no_clip", "--no_clip is for samplers"),
    ("s.onnx --clipping_value 1.2", "--clipping_value is for samplers"),
    ("s.onnx --guided", "--guided is for samplers"),
    ("s.onnx --sampler_graph --no_clip --clipping_value 1", "exclude each other"),
    ("s.onnx --sampler_graph --guided", "already takes a guidance weight"),
    ("s.onnx --num_timesteps 17", "--num_timesteps 17: the ddpm_cosine schedule has 16 levels"),
    ("s.onnx --card False --license mit", "--license needs a card"),
    ("s.onnx --license 'as you like'", "--license 'as you like' is not an identifier"),
    ("s.onnx --output w", "'w' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_cannot_be_done_is_said_in_a_line(words, message, folder, tmp_path):
    (tmp_path / "taken.onnx").write_text("mine")
    code = 1 if words == "taken.onnx" else 2
    assert message in error(f"vdiff export onnx {folder / 'told'} {tmp_path}/{words}", code)
    assert contents(tmp_path) == {"taken.onnx": b"mine"}


def test_long_samplers_are_refused(tmp_path):
    write_model(tmp_path / "long", schedule={"name": "cosine"}, steps=128)
    line = error(f"vdiff export onnx {tmp_path / 'long'} {tmp_path / 'out/s.onnx'} --sampler_graph", 2)
    assert line.startswith("a graph of 128 steps has 128 copies of the network; at most 64 are allowed; give --num_")
    assert not (tmp_path / "out").exists()


def test_nonsense_differs_from_everything(folder):
    """NaN must not pass for agreement."""
    denoiser, config = load_checkpoint(folder / "told")
    options = GraphOptions(sampler=False, output="v", num_steps=STEPS)
    due = {len(images): graphs.expected(denoiser, options, config, images) for images in graphs.BATCHES}
    assert graphs.check(lambda named: due[len(named["z"])], denoiser, options, config) == 0
    for wrong in (torch.nan, 1e-3):
        with pytest.raises(VdiffError, match="differs from vdiff"):
            graphs.check(lambda named, e=wrong: due[len(named["z"])] + e, denoiser, options, config)
    with pytest.raises(VdiffError, match="returns shape"):
        graphs.check(lambda named: due[len(named["z"])][:, :, :1], denoiser, options, config)
