"""Text-to-image models as single files and as pipeline folders: names, round trips, pictures, A1111's configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vdiff
from tests.commands import done, error, full_disk
from tests.oracles import randn
from tests.pipelines import UNETS, pipeline, single_file
from tests.test_export_kohya import drawn_by_the_readme, student, write_lora
from tests.text_training import write_text_checkpoint
from tests.toy import write_checkpoint
from vdiff.models.checkpoint import load_checkpoint, read_config, read_metadata, save_checkpoint

PROMPTS = ["a red fox", "a happy face"]
every_kind = pytest.mark.parametrize("kind", UNETS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of the tiny pipelines, and `zero`: v with zero terminal SNR on the shape of XL."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in UNETS:
        write_text_checkpoint(folder / kind, kind)
    denoiser, config = load_checkpoint(folder / "sdxl")
    schedule = {**config.schedule, "zero_snr": True}
    save_checkpoint(folder / "zero", denoiser.state_dict(), replace(config, prediction="v", schedule=schedule))
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(checkpoint: Path | str, noise: Tensor, *, guidance: float = 0.0, steps: int = 4) -> Tensor:
    """By vdiff."""
    model = vdiff.load(checkpoint, device="cpu")
    return torch.Tensor(model.sample(prompts=PROMPTS, noise=noise, steps=steps, guidance=guidance))


@every_kind
def test_names_and_numbers_of_a_single_file_are_those_of_the_original_code(bases, kind):
    """Those of a file that the tests convert by a table of their own; diffusers' reader takes every tensor."""
    done(f"vdiff export single_file {bases / kind} out.safetensors --card False")
    single_file(kind, Path("expected.safetensors"))
    found, expected = load_file("out.safetensors"), load_file("expected.safetensors")
    assert found.keys() == expected.keys() | ({"v_pred"} if kind == "sd2" else set())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    done(f"vdiff import diffusers out.safetensors --pipeline {pipeline(kind)} --out again")
    one, other = (load_checkpoint(place)[0].state_dict() for place in ("again", bases / kind))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert read_config("again").prediction == read_config(bases / kind).prediction


def test_keys_and_metadata_say_v_and_zero_terminal_snr(bases):
    done(f"vdiff export single_file {bases}/zero zero.safetensors --precision fp16 --license mit")
    tensors = load_file("zero.safetensors")
    assert (tensors["v_pred"].numel(), tensors["ztsnr"].numel()) == (0, 0)
    assert {tensor.dtype for tensor in tensors.values() if tensor.numel()} == {torch.float16}
    said = read_metadata(Path("zero.safetensors"))
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert (said["modelspec.prediction_type"], said["modelspec.license"]) == ("v", "mit")
    said = done(f"vdiff import diffusers zero.safetensors --pipeline {pipeline('sdxl')} --out again").output
    assert "v-prediction, zero terminal SNR" in said
    done(f"vdiff export single_file {bases}/sdxl eps.safetensors --card False")
    assert not {"v_pred", "ztsnr"} & load_file("eps.safetensors").keys()


@pytest.mark.parametrize("kind", ["sd15", "sd2", "zero"])
def test_a_merged_student_draws_in_diffusers_by_the_program_in_the_readme(bases, kind):
    """From one file, and from a folder, whose scheduler is set; both with `guidance_scale=0` and exactly four steps."""
    student(Path("sd_1"), bases / kind)
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    expected = drawn("sd_1", noise)
    assert (drawn(bases / kind, noise) - expected).abs().max() > 0.01
    done("vdiff export single_file sd_1 out/sd.safetensors --merge")
    program = Path("out/README.md").read_text().replace('"sd.safetensors"', '"out/sd.safetensors"')
    parts = pipeline("sdxl" if kind == "zero" else kind)
    torch.testing.assert_close(drawn_by_the_readme(program, parts, noise), expected, rtol=0, atol=1e-4)
    done("vdiff export diffusers sd_1 folder --merge")
    program = Path("folder/README.md").read_text()
    torch.testing.assert_close(drawn_by_the_readme(program, parts, noise), expected, rtol=0, atol=1e-4)


def test_a_folder_is_imported_as_the_student_that_it_was(bases):
    """Its steps and its prediction; a plain pipeline would be a base model of 50 steps."""
    student(Path("sd_1"), bases / "zero", num_timesteps=2)
    done("vdiff export diffusers sd_1 folder --merge")
    done("vdiff import diffusers folder --out again")
    config = read_config("again")
    assert (config.num_timesteps, config.method, config.prediction) == (2, "progressive", "v")
    assert config.schedule["zero_snr"] is True
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(drawn("again", noise, steps=2), drawn("sd_1", noise, steps=2), rtol=0, atol=1e-5)


def test_a_single_file_is_imported_as_the_student_that_it_was(bases):
    """By its metadata; a base model could be guided once more."""
    student(Path("sd_1"), bases / "zero", num_timesteps=2, guidance_scale=6.0)
    done("vdiff export single_file sd_1 one.safetensors --merge")
    done(f"vdiff import diffusers one.safetensors --pipeline {pipeline('sdxl')} --out again")
    config = read_config("again")
    assert (config.num_timesteps, config.method, config.prediction) == (2, "progressive", "v")
    assert config.guidance_scale == 6
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(drawn("again", noise, steps=2), drawn("sd_1", noise, steps=2), rtol=0, atol=1e-5)


@every_kind
def test_the_configuration_for_a1111_describes_the_network(bases, kind):
    """Its sizes are those of the tensors that A1111 then loads; the first line says who wrote it."""
    done(f"vdiff export single_file {bases / kind} out.safetensors --card False")
    first, _, text = Path("out.yaml").read_text().partition("\n")
    assert first.startswith("# Written by vdiff")
    params = json.loads(text)["model"]["params"]
    tensors = load_file("out.safetensors")
    network = params["network_config" if kind == "sdxl" else "unet_config"]["params"]
    prefix = "model.diffusion_model."
    assert network["model_channels"] == tensors[f"{prefix}input_blocks.0.0.weight"].shape[0]
    deepest = network["model_channels"] * network["channel_mult"][-1]
    assert deepest == tensors[f"{prefix}middle_block.0.in_layers.2.weight"].shape[0]
    assert network["context_dim"] == tensors[f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    depths = network["transformer_depth"]
    deep = {int(name.split(".")[5]) + 1 for name in tensors if f"{prefix}middle_block.1.transformer_blocks." in name}
    assert max(deep) == (depths[-1] if kind == "sdxl" else depths)
    if kind == "sdxl":
        assert network["adm_in_channels"] == tensors[f"{prefix}label_emb.0.0.weight"].shape[1]
        assert params["denoiser_config"]["params"]["scaling_config"]["target"].endswith("EpsScaling")
        assert (network["attention_resolutions"], params["scale_factor"]) == ([4, 2], 0.13025)
    else:
        assert params["parameterization"] == ("v" if kind == "sd2" else "eps")
        assert (network["attention_resolutions"], params["scale_factor"]) == ([4, 2, 1], 0.18215)
    dd = params["first_stage_config"]["params"]["ddconfig"]
    assert dd["ch"] * dd["ch_mult"][-1] == tensors["first_stage_model.encoder.mid.block_1.conv1.weight"].shape[0]


def _plain(_: Path) -> None:
    write_checkpoint(Path("plain"))


def _lora(bases: Path) -> None:
    write_lora(Path("lora"), bases / "sd15")


def _guided(bases: Path) -> None:
    student(Path("guided"), bases / "sd2", guidance_range=[1.0, 8.0])


def _truncated(bases: Path) -> None:
    shutil.copytree(bases / "sd15", "cut")
    data = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(data[:-100])


BAD: dict[str, tuple[Callable[[Path], None], str, int, str]] = {
    "pixels": (_plain, "single_file plain a.safetensors", 1, "plain is not a text-to-image model of latents"),
    "a LoRA": (_lora, "single_file lora a.safetensors", 1, "lora is a LoRA; add --merge to merge it into its base"),
    "a LoRA to a folder": (_lora, "diffusers lora folder", 1, "lora is a LoRA; add --merge"),
    "a guided student": (_guided, "single_file guided a.safetensors", 1, "takes the guidance as an input, which"),
    "truncated": (_truncated, "single_file cut a.safetensors", 1, "cut/model.safetensors cannot be read"),
    "a name": (_lora, "single_file lora a.ckpt", 2, "a.ckpt is not a name for a single file; give FILE.safetensors"),
    "options of pixels": (_lora, "diffusers lora folder --clip False", 2, "--clip: lora is a latent model"),
    "options of text": (_plain, "diffusers plain folder --merge", 2, "--merge: plain is no latent model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(bases, tmp_path, name):
    change, line, code, message = BAD[name]
    change(bases)
    before = sorted(tmp_path.rglob("*"))
    assert message in error(f"vdiff export {line}", code)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_in_the_way_is_left_alone_and_merging_needs_a_lora(bases):
    line = f"vdiff export single_file {bases}/sd15 sd.safetensors"
    Path("sd.yaml").write_text("mine: true\n")
    assert "sd.yaml exists and is not a configuration that vdiff wrote" in error(f"{line} --overwrite", 1)
    Path("sd.yaml").unlink()
    assert "is not a LoRA: it has all weights; leave it out" in error(f"{line} --merge", 2)
    done(line)
    assert "sd.safetensors exists already" in error(line, 1)
    done(f"{line} --overwrite")
    folder = f"vdiff export diffusers {bases}/sd15 folder"
    done(folder)
    assert "folder exists already" in error(folder, 1)
    done(f"{folder} --overwrite")
    Path("folder/mine.txt").write_text("mine")
    assert "folder also holds mine.txt" in error(f"{folder} --overwrite", 1)


@pytest.mark.parametrize("line", ["diffusers {base} out", "single_file {base} out/a.safetensors"])
def test_a_full_disk_is_one_line(bases, tmp_path, line):
    with full_disk(20_000):
        assert "cannot write out" in error(f"vdiff export {line.format(base=bases / 'sd15')}", 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_moved_components_may_be_pointed_to(bases):
    """Also those of a LoRA, whose base names the same folder."""
    shutil.copytree(pipeline("sd2"), "parts")
    config = read_config(bases / "sd2")
    denoiser = load_checkpoint(bases / "sd2")[0]
    parts = {**(config.components or {}), "path": str(Path("parts").absolute())}
    save_checkpoint(Path("base"), denoiser.state_dict(), replace(config, components=parts))
    student(Path("sd_1"), Path("base").absolute())
    Path("parts").rename("moved")
    line = "vdiff export single_file sd_1 out.safetensors --merge --card False"
    assert "no such folder; restore the folder, or point to it with --components FOLDER" in error(line, 1)
    done(f"{line} --components moved")
    assert "first_stage_model.decoder.conv_in.weight" in load_file("out.safetensors")


def test_all_that_was_exported_is_published(bases):
    """A pipeline with all its parts, single files and LoRAs with their configurations; files of others stay here."""
    student(Path("sd_1"), bases / "sdxl")
    done("vdiff export diffusers sd_1 folder --merge")
    said = done("vdiff push folder me/fox --dry_run").output
    parts = [path.relative_to("folder").as_posix() for path in Path("folder").rglob("*") if path.is_file()]
    assert {"text_encoder_2/model.safetensors", "vae/config.json", "vdiff/config.json"} <= set(parts)
    assert [part for part in parts if part not in said] == []
    done("vdiff export single_file sd_1 out/fox.safetensors --merge")
    done("vdiff export lora sd_1 out --format both")
    Path("out/mine.safetensors").write_bytes(Path("sd_1/adapter.safetensors").read_bytes())
    said = done("vdiff push out me/fox --dry_run").stdout
    for name in ("fox.safetensors", "fox.yaml", "sd_1_4step_lora.safetensors", "sd_1_4step_lora_kohya.safetensors"):
        assert name in said
    assert "mine.safetensors" not in said


def test_a_folder_draws_as_its_base_with_guidance(bases):
    """A model that is no student, by the pipeline's call as it is."""
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    done(f"vdiff export diffusers {bases}/sd2 folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained("folder")
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        PROMPTS, latents=noise, num_inference_steps=5, guidance_scale=3.0, height=64, width=64, output_type="pt"
    ).images
    expected = drawn(bases / "sd2", noise, guidance=2.0, steps=5)
    torch.testing.assert_close(found * 2 - 1, expected, rtol=0, atol=1e-4)
