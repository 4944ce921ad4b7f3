"""A LoRA in diffusers and in peft: without vdiff, it changes a pipeline's UNet as vdiff does."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.commands import done, error
from tests.exported import without
from tests.oracles import randn
from tests.pipelines import UNETS, pipeline
from tests.text_training import write_text_checkpoint
from tests.toy import write_checkpoint
from vdiff.models.adapters import AdapterSettings, is_adapter_weight
from vdiff.models.checkpoint import (
    ADAPTER,
    WEIGHTS,
    load_base,
    load_checkpoint,
    read_config,
    save_checkpoint,
    weights_fingerprint,
)

LOAD = {
    "diffusers": "pipe.load_lora_weights(file)",
    "peft": "from peft import PeftModel\npipe.unet = PeftModel.from_pretrained(pipe.unet, file + '/unet')",
}
PROGRAM = """
import sys
import torch
from diffusers import DiffusionPipeline
folder, file, inputs = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
{load}
given = torch.load(inputs)
with torch.no_grad():
    output = pipe.unet(given["z"], given["timestep"], given["text"], added_cond_kwargs=given["added"]).sample
torch.save(output, inputs)
"""


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lora(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a LoRA whose alpha is not its rank, in attention and in convolutions."""
    folder = tmp_path_factory.mktemp(kind)
    write_text_checkpoint(folder / "base", kind)
    base = read_config(folder / "base")
    config = replace(
        base,
        adapter=AdapterSettings(2, 3.0, targets=("attention", "conv1")),
        base={"path": str(folder / "base"), "fingerprint": weights_fingerprint(folder / "base")},
    )
    state = config.build().state_dict()
    weights = {
        name: 0.2 * randn(*tensor.shape, seed=k, dtype=torch.float32)
        for k, (name, tensor) in enumerate(state.items())
        if is_adapter_weight(name)
    }
    save_checkpoint(folder / "lora", weights, config)
    return folder / "lora"


@pytest.mark.parametrize("layout", LOAD)
def test_a_lora_changes_a_pipeline_of_diffusers_as_it_changes_the_model(lora, kind, layout, tmp_path, monkeypatch):
    target = tmp_path / ("lora.safetensors" if layout == "diffusers" else "step2000")
    text = done(f"vdiff export lora {lora} {target} --format {layout}").stdout
    assert "LoRA of rank 2 on" in text
    z, timestep = randn(2, 4, 8, 8, dtype=torch.float32), torch.tensor([7, 900])
    unet = UNETS[kind]
    pooled_width = unet.get("projection_class_embeddings_input_dim", 0) - 6 * unet.get("addition_time_embed_dim", 0)
    embeddings = randn(2, 77, unet["cross_attention_dim"], seed=1, dtype=torch.float32)
    added = {"text_embeds": randn(2, pooled_width, seed=2, dtype=torch.float32), "time_ids": torch.full((2, 6), 64.0)}
    inputs = tmp_path / "inputs.pt"
    torch.save({"z": z, "timestep": timestep, "text": embeddings, "added": added if kind == "sdxl" else None}, inputs)
    monkeypatch.setattr(sys, "argv", ["program", str(pipeline(kind)), str(target), str(inputs)])
    with without(["vdiff"], tmp_path):
        exec(PROGRAM.format(load=LOAD[layout]), {})
    found = torch.load(inputs)
    pooled = {"text_pooled": added["text_embeds"], "time_ids": added["time_ids"]} if kind == "sdxl" else {}
    condition = {"text": embeddings, **pooled}
    with torch.no_grad():
        expected = load_checkpoint(lora)[0].network(z, timestep.float(), **condition)
        before = load_base(read_config(lora)).eval().network(z, timestep.float(), **condition)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_lora_of_diffusers_and_what_is_there_is_refused(lora, tmp_path):
    write_checkpoint(tmp_path / "plain")
    export = f"vdiff export lora {lora} {tmp_path}"
    plain = f"vdiff export lora {tmp_path / 'plain'} {tmp_path / 'a.safetensors'}"
    assert "is not a LoRA: it has all weights" in error(plain, 1)
    assert "give FILE.safetensors or a folder, or --format peft" in error(f"{export}/a.bin", 2)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    assert "mine.safetensors" in error(f"{export}/mine.safetensors --overwrite", 1)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    done(f"{export}/step1 --format peft")
    assert "exists" in error(f"{export}/step1 --format peft", 1)
    done(f"{export}/step1 --format peft --overwrite")


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers'
@pytest.mark.parametrize("layout", LOAD)
def test_the_programs_of_the_docs_draw_where_vdiff_is_not(lora, kind, layout, tmp_path):
    programs = re.findall(r"```python\n(.*?)```", Path("docs/text_to_image.md").read_text(encoding="utf-8"), re.DOTALL)
    [program] = [text for text in programs if ("PeftModel" in text) == (layout == "peft") and "yoda" in text]
    (tmp_path / "models").mkdir()
    (tmp_path / "models/my_pipeline").symlink_to(pipeline(kind))
    target = tmp_path / "exports" / ("pokemon.safetensors" if layout == "diffusers" else "step20850")
    done(f"vdiff export lora {lora} {target} --format {layout}")
    program = program.replace('("yoda pokemon")', '("yoda pokemon", num_inference_steps=2, height=64, width=64)')
    with without(["vdiff"], tmp_path):
        exec(program, {})
    assert len(list(tmp_path.glob("yoda*.png"))) == 1


def test_a_merged_lora_is_published_where_the_lora_alone_is_refused(lora, kind, tmp_path):
    """Its weights are those that every command computes with, and its description has no base."""
    merged = tmp_path / "merged"
    message = error(f"vdiff push {lora} me/pokemon --dry_run", 1)
    assert "holds a LoRA alone; push what `vdiff export weights` writes" in message
    done(f"vdiff export weights {lora} {merged}")
    assert not (merged / ADAPTER).exists()
    assert 'vdiff sample --checkpoint lora --prompt "a red fox" --components' in (merged / "README.md").read_text()
    said = json.loads((merged / "config.json").read_text())
    assert not {"adapter", "base"} & said.keys()
    assert said["components"]["path"] == pipeline(kind).name
    found = load_checkpoint(merged, components=pipeline(kind))[0].state_dict()
    expected = load_checkpoint(lora)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    before = load_base(read_config(lora)).state_dict()
    assert sum(not torch.equal(tensor, found[name]) for name, tensor in before.items()) > 1
    assert WEIGHTS in done(f"vdiff push {merged} me/pokemon --dry_run").output
