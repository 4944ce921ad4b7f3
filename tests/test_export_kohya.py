"""LoRAs for other programs: names in both layouts, what the files say of themselves, students, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file
from torch import Tensor

import vdiff
from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import UNETS, pipeline
from tests.text_training import write_text_checkpoint
from vdiff.models.adapters import AdapterSettings, is_adapter_weight
from vdiff.models.checkpoint import (
    CheckpointConfig,
    load_checkpoint,
    read_config,
    read_metadata,
    save_checkpoint,
    weights_fingerprint,
)

TARGETS = ("attention", "conv1", "ff.net.0.proj", "proj_in", "downsamplers.0.conv", "conv_shortcut")


def write_lora(folder: Path, base: Path, *, rank: int = 2, alpha: float = 3.0, **changes: Any) -> CheckpointConfig:
    """A checkpoint of a LoRA with random weights on the checkpoint `base`."""
    config = replace(
        read_config(base),
        adapter=AdapterSettings(rank, alpha, targets=TARGETS),
        base={"path": str(base), "fingerprint": weights_fingerprint(base)},
        **changes,
    )
    state = config.build().state_dict()
    weights = {
        name: 0.1 * randn(*tensor.shape, seed=k, dtype=torch.float32)
        for k, (name, tensor) in enumerate(state.items())
        if is_adapter_weight(name)
    }
    save_checkpoint(folder, weights, config)
    return config


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of the tiny pipelines."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in UNETS:
        write_text_checkpoint(folder / kind, kind)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def student(folder: Path, base: Path, **changes: Any) -> CheckpointConfig:
    return write_lora(folder, base, **{"method": "progressive", "num_timesteps": 4, **changes})


ATTENTION = ("norm", "proj_in", "proj_out")
BLOCK = (
    *("norm1", "norm2", "norm3", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q"),
    *("attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
)
RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut", "norm1", "norm2")
OUTER = ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
SUFFIXES = ("lora_up.weight", "lora_down.weight", "alpha")


def comfyui_keys(unet: dict[str, Any]) -> set[str]:
    """The names that ComfyUI's loader of LoRAs maps to layers of the UNet, if it has the shape `unet`.

    From `unet_to_diffusers` in comfy/utils.py, which lists the layers, and `model_lora_keys_unet` and `load_lora` in
    comfy/lora.py, which join them with underscores behind `lora_unet_`, of github.com/comfyanonymous/ComfyUI.
    """
    layers = list(OUTER)
    depths = unet.get("transformer_layers_per_block", 1)
    levels, per_level = len(unet["block_out_channels"]), unet["layers_per_block"]
    depths = list(depths) if isinstance(depths, tuple) else [depths] * levels

    def transformer(place: str, depth: int) -> list[str]:
        blocks = [f"transformer_blocks.{k}.{name}" for k in range(depth) for name in BLOCK]
        return [f"{place}.{name}" for name in (*ATTENTION, *blocks)]

    for direction, more, sampler in (("down", 0, "downsamplers"), ("up", 1, "upsamplers")):
        for level in range(levels):
            depth = depths[level if direction == "down" else levels - 1 - level]
            attends = "CrossAttn" in unet[f"{direction}_block_types"][level]
            for k in range(per_level + more):
                layers += [f"{direction}_blocks.{level}.resnets.{k}.{name}" for name in RESNET]
                layers += transformer(f"{direction}_blocks.{level}.attentions.{k}", depth) if attends else []
            layers.append(f"{direction}_blocks.{level}.{sampler}.0.conv")
    layers += [f"mid_block.resnets.{k}.{name}" for k in (0, 1) for name in RESNET]
    layers += transformer("mid_block.attentions.0", depths[-1])
    return {f"lora_unet_{layer.replace('.', '_')}.{suffix}" for layer in layers for suffix in SUFFIXES}


@pytest.mark.parametrize("kind", UNETS)
def test_the_names_of_kohya_are_those_that_diffusers_gives_and_comfyui_maps(bases, kind):
    """In a pipeline that has the LoRA, saved by diffusers, which writes the rank as alpha."""
    write_lora(Path("lora"), bases / kind)
    said = done("vdiff export lora lora out --format both").stdout
    assert said.splitlines() == [
        f"out/lora_lora{name}.safetensors: LoRA of rank 2 on {bases / kind}, predicts {'v' if kind == 'sd2' else 'eps'}"
        for name in ("", "_kohya")
    ]
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    pipe.load_lora_weights("out/lora_lora.safetensors")
    pipe.save_lora_weights("saved", unet_lora_layers=_layers(pipe.unet))
    expected = convert_state_dict_to_kohya(load_file("saved/pytorch_lora_weights.safetensors"))
    found = load_file("out/lora_lora_kohya.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(".alpha"):
            assert found[name] == 3
        else:
            assert torch.equal(found[name], tensor)
    unknown = found.keys() - comfyui_keys(UNETS[kind])
    assert unknown == set()


def _layers(unet: Any) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(unet, adapter_name="default_0"))


PROGRAM = """
import sys
sys.modules["vdiff"] = None
import torch
noise = torch.load(sys.argv[1])
{program}
pipe.set_progress_bar_config(disable=True)
images = pipe(["a red fox", "a happy face"], latents=noise, num_inference_steps={steps}, guidance_scale={scale},
              height=64, width=64, output_type="pt").images
torch.save(images * 2 - 1, sys.argv[1])
"""


def drawn_by_the_readme(readme: str, base: Path, noise: Tensor, *, steps: int = 4, scale: float = 0) -> Tensor:
    """What diffusers draws with the program in a README.md, in a process without vdiff.

    The last line draws and saves one image; its call is replaced by one from given noise.
    """
    [program] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    *lines, last = program.strip().splitlines()
    assert last.startswith('pipe("a red fox"')
    if steps == 4:
        assert "num_inference_steps=4, guidance_scale=0)" in last
    torch.save(noise, "noise.pt")
    text = PROGRAM.format(program="\n".join(lines).replace('"BASE"', f'"{base}"'), steps=steps, scale=scale)
    subprocess.run([sys.executable, "-c", text, "noise.pt"], check=True)
    return torch.load("noise.pt")


@pytest.mark.parametrize(
    ("kind", "layout"), [("sd15", "kohya"), ("sdxl", "kohya"), ("sdxl", "diffusers"), ("sd2", "peft")]
)
def test_diffusers_draws_what_vdiff_draws_by_the_program_in_the_readme(bases, kind, layout):
    """With a student of four steps, by the layouts of all formats."""
    student(Path("sd_1"), bases / kind)
    done(f"vdiff export lora sd_1 out --format {layout}")
    name = "out" if layout == "peft" else "out/sd_1_4step_lora.safetensors"
    readme = Path("out/README.md").read_text()
    assert f'"{name.removeprefix("out/")}' in readme
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    program = readme.replace('"sd_1_4step', '"out/sd_1_4step')
    found = drawn_by_the_readme(program, pipeline(kind), noise)
    model = vdiff.load("sd_1", device="cpu")
    expected = torch.Tensor(model.sample(prompts=["a red fox", "a happy face"], noise=noise, steps=4, guidance=0.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = vdiff.load(bases / kind, device="cpu")
    before = torch.Tensor(plain.sample(prompts=["a red fox", "a happy face"], noise=noise, steps=4, guidance=0.0))
    assert (before - expected).abs().max() > 0.01


def test_files_say_what_they_are(bases):
    """Metadata of modelspec and of kohya's scripts, without paths; README.md has the settings of each program."""
    student(Path("sd_1"), bases / "sdxl", guidance_scale=6.0)
    done("vdiff export lora sd_1 out --format both --license mit")
    for layout, name in (("diffusers", "sd_1_4step_lora"), ("kohya", "sd_1_4step_lora_kohya")):
        said = read_metadata(Path(f"out/{name}.safetensors"))
        expected = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": layout,
            "modelspec.title": name,
            "modelspec.prediction_type": "epsilon",
            "modelspec.resolution": "64x64",
            "modelspec.license": "mit",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_dim": "2",
            "ss_network_alpha": "3",
            "ss_v_parameterization": "False",
            "vdiff.num_timesteps": "4",
            "vdiff.guidance_scale": "1",
            "vdiff.learned_guidance_scale": "6",
        }
        assert {key: said.get(key) for key in expected} == expected
        assert "exactly 4 steps" in said["modelspec.usage_hint"]
        assert str(bases) not in json.dumps(said)
    readme = Path("out/README.md").read_text()
    assert "license: mit" in readme
    assert "pipeline_tag: text-to-image" in readme
    for words in (
        "Steps: 4,",
        "CFG 1: it has learned the guidance scale 6",
        "`sgm_uniform`",
        "`SGM Uniform`",
        'timestep_spacing="trailing"',
    ):
        assert words in readme
    assert "ModelSamplingDiscrete" not in readme


def test_a_licence_is_taken_from_the_pipeline_of_the_base(bases, tmp_path):
    config = write_lora(Path("lora"), bases / "sd15")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Model\n")
    values = json.loads(Path("lora/config.json").read_text())
    values["components"] = {**(config.components or {}), "path": str(parts)}
    values.pop("vdiff_crc32")
    Path("lora/config.json").write_text(json.dumps(values))
    done("vdiff export lora lora out")
    assert read_metadata(Path("out/lora_lora.safetensors"))["modelspec.license"] == "creativeml-openrail-m"


def test_a_fine_tuning_to_another_prediction_says_what_programs_must_be_told(bases):
    schedule = {**read_config(bases / "sd15").schedule, "zero_snr": True}
    write_lora(Path("lora"), bases / "sd15", prediction="v", schedule=schedule)
    result = done("vdiff export lora lora lora.safetensors --format kohya")
    assert "it predicts v with zero terminal SNR, other than its base" in result.stderr
    readme = Path("README.md").read_text()
    for words in ("`ModelSamplingDiscrete` with `v_prediction` and zsnr on", "`Zero Terminal SNR`", '="v_prediction"'):
        assert words in readme
    said = read_metadata(Path("lora.safetensors"))
    assert (said["modelspec.prediction_type"], said["ss_zero_terminal_snr"]) == ("v", "True")


def run_commands_of(message: str, count: int) -> None:
    """The commands that a refusal recommends work."""
    commands = message.partition("export it whole: ")[2].split(", or ")
    assert len(commands) == count
    for command in commands:
        done(command.replace("FILE", "whole/file"))


REFUSED = {
    "v": ({"prediction": "v"}, "predicts v, its base eps"),
    "one step": ({"num_timesteps": 1}, "draws in one step and predicts eps"),
    "guidance": ({"guidance_range": [1.0, 8.0]}, "takes the guidance as an input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_students_that_work_only_whole_are_refused(bases, tmp_path, name):
    changes, message = REFUSED[name]
    student(Path("sd_1"), bases / "sd15", **changes)
    before = sorted(tmp_path.rglob("*"))
    said = error("vdiff export lora sd_1 out", 1)
    assert message in said
    assert sorted(tmp_path.rglob("*")) == before
    run_commands_of(said, 1 if name == "guidance" else 2)
    student(Path("v_1"), bases / "sd2", **{**changes, "prediction": "v", "guidance_range": []})
    done("vdiff export lora v_1 out")


WHOLE = {
    "guidance": (
        {"guidance_range": [1.0, 8.0]},
        "it takes the guidance as an input, which no LoRA can add to its base",
    ),
    "v": ({"prediction": "v"}, "it predicts v, its first teacher eps, and programs would read a LoRA's as eps"),
    "one step": (
        {"prediction": "v", "num_timesteps": 1},
        "it predicts v so as to draw in 1 step, its first teacher eps",
    ),
    "by choice": ({}, "it has all weights, as it was trained without --lora_rank"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_of_a_whole_student_the_reason_and_the_command_that_works_are_given(bases, name):
    changes, reason = WHOLE[name]
    first = read_config(bases / "sd15")
    between = replace(first, **{**changes, "num_timesteps": 4}, method="match", teacher=first.to_dict()).to_dict()
    config = replace(first, **{"num_timesteps": 2, **changes}, method="progressive", teacher=between)
    save_checkpoint(Path("sd 1"), load_checkpoint(bases / "sd15")[0].state_dict(), config)
    said = error("vdiff export lora 'sd 1' out", 1)
    assert f"sd 1 is not a LoRA: {reason}" in said
    run_commands_of(said, 1 if name == "guidance" else 2)


def test_what_is_in_the_way_is_left_alone(bases):
    write_lora(Path("lora"), bases / "sd15")
    Path("out").mkdir()
    Path("out/README.md").write_text("mine")
    assert "out/README.md is not the model card of lora" in error("vdiff export lora lora out", 1)
    done("vdiff export lora lora out --card False")
    assert Path("out/README.md").read_text() == "mine"
    assert "exists already" in error("vdiff export lora lora out --card False", 1)
    Path("out/lora_lora_kohya.safetensors").write_bytes(b"mine")
    assert "is not a LoRA that vdiff wrote" in error("vdiff export lora lora out --format both --overwrite", 1)
    assert Path("out/lora_lora_kohya.safetensors").read_bytes() == b"mine"
