"""Transformers on latents, pipelines of diffusers: imported, they draw diffusers' pictures; trained, they go back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import autoencoder
from tests.servers import request, running
from tests.toy import write_dataset
from vdiff import api
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.web.server import LOOPBACK, load_server

LABELS = {0: "tench, Tinca tinca", 1: "goldfish"}
BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 4}
DIT = {**BLOCKS, "in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 1000}
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_dit(folder: Path) -> None:
    """A tiny pipeline with random weights; its configuration has the names and fields of the published ones of 2023."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.DiTTransformer2DModel(**DIT)
        for parameter in network.parameters():  # the output of new networks is nearly 0
            torch.nn.init.normal_(parameter, std=0.1)
        scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing")
        pipe = diffusers.DiTPipeline(network, autoencoder(), scheduler)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"id2label": LABELS, "transformer": ["diffusers", "Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    path = folder / "transformer/config.json"
    values = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}
    path.write_text(json.dumps(values))


def drawn_by(folder: Path, noise: Tensor, monkeypatch: pytest.MonkeyPatch, *args: Any, **call: Any) -> Tensor:
    """Pictures of diffusers' pipeline from this noise."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    module = type(pipe).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise.clone())
    pictures: Tensor = pipe(*args, output_type="np", **call).images
    return torch.as_tensor(pictures).permute(0, 3, 1, 2) * 2 - 1


def test_a_dit_is_imported_drawn_distilled_evaluated_and_exported(monkeypatch):
    write_dit(Path("theirs"))
    said = done("vdiff import diffusers theirs --out dit").output
    assert "dit: ε-prediction, trailing, 1000 levels, latents 4×4×4, 1000 classes" in said
    assert "next       python sample.py --checkpoint dit --num 4" in said
    noise = randn(2, 4, 4, 4, dtype=torch.float32)
    model = api.load("dit")
    ours = model.sample(noise=noise, steps=5, classes=[1, 7])  # guidance as in the pipeline
    theirs = drawn_by(Path("theirs"), noise, monkeypatch, class_labels=[1, 7], num_inference_steps=5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    plain = model.sample(noise=noise, steps=5, classes=[1, 7], guidance=0.0)
    assert (plain - ours).abs().max() > 0.01
    theirs = drawn_by(
        Path("theirs"), noise, monkeypatch, class_labels=[1, 7], num_inference_steps=5, guidance_scale=1.0
    )
    torch.testing.assert_close(plain, theirs, rtol=0, atol=1e-4)

    said = done("sample.py --checkpoint dit --num 2 --num_timesteps 2 --classes 0,999 --out drawn.npz").output
    assert "guidance 3 as in diffusers' pipelines, scale 4" in said
    write_dataset(Path("data/pictures"), size=32, channels=3, classes=[str(k) for k in range(1000)])
    toy = "--num_iters 2 --batch_size 2 --lr 1e-3 --device cpu --check_images 2 --distance_every 0"
    said = error(f"distill.py --base dit --data data/pictures --method guided --to_steps 1 {toy}", 2)
    assert "cannot take a guidance weight as an input; give --guidance_scale" in said
    line = f"distill.py --base dit --data data/pictures --guidance_scale 3 --teacher_steps 4 --to_steps 1 {toy}"
    assert "picture" in done(line).output
    assert [read_config(path).num_timesteps for path in sorted(Path().glob("base_*"))] == [4, 2, 1]
    done("vdiff evaluate dit base_1 --data data/pictures --num_images 10 --num_timesteps 2 --metrics kd --out e.json")
    said = done("vdiff export diffusers base_1 exported").output
    assert "exported: DiTPipeline, predicts v, 2 steps" in said
    assert json.loads(Path("exported/model_index.json").read_text())["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    student = api.load("base_1").sample(noise=noise, classes=[1, 7])
    theirs = drawn_by(
        Path("exported"), noise, monkeypatch, class_labels=[1, 7], num_inference_steps=2, guidance_scale=1.0
    )
    torch.testing.assert_close(student, theirs, rtol=0, atol=1e-4)
    done("vdiff import diffusers exported --out again")
    again, config = load_checkpoint("again")
    assert (config.num_timesteps, config.method, config.prediction) == (2, "progressive", "v")
    before = load_checkpoint("base_1")[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_page_of_a_dit_is_served_with_its_classes():
    """The server draws the pictures of `Model.sample`; the browser alone cannot."""
    pytest.importorskip("starlette", reason="the extra web is not installed")
    write_dit(Path("theirs"))
    done("vdiff import diffusers theirs --out dit")
    server = load_server([Path("dit")], num_timesteps=2, device="cpu")
    with running(server.app(LOOPBACK)) as port:
        asked = {"seed": 3, "count": 1, "classes": [7]}
        answer, body = request(port, "POST", "/draw", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        assert answer.status == 200, body
    found = torch.from_numpy(np.array(Image.open(io.BytesIO(body)))).permute(2, 0, 1)
    [due] = api.load("dit").sample(1, steps=2, seed=3, classes=[7])
    assert due.std() > 0.01
    assert (found - (due + 1) * 127.5).abs().max() <= 0.51
    assert "dit generates latents from classes, which a page does not support; use `vdiff serve`" in error(
        "vdiff export web dit page --num_timesteps 2", 1
    )
