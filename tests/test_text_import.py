"""`vdiff import diffusers` on pipelines of Stable Diffusion: folders, the hub, single files, contradictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import done, error
from tests.pipelines import pipeline, single_file
from vdiff.interop.diffusers import folders
from vdiff.models.checkpoint import COPIED, load_checkpoint, read_config
from vdiff.models.components import components_fingerprint

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
every_kind = pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
PREFLIGHT = {
    "sd15": "ε-prediction, leading, 1000 levels, latents 4×8×8, one text encoder",
    "sd2": "v-prediction, leading, 1000 levels, latents 4×8×8, one text encoder",
    "sdxl": "ε-prediction, leading, 1000 levels, latents 4×8×8, two text encoders",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def copied(kind: str, name: str = "theirs") -> Path:
    """A copy of a tiny pipeline, to be changed."""
    shutil.copytree(pipeline(kind), name)
    return Path(name)


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def scheduler(folder: Path, **values: Any) -> None:
    edited(folder / "scheduler/scheduler_config.json", **values)


def unchanged(_: Path) -> None:
    """Nothing."""


def with_keys(path: Path, *names: str, **metadata: str) -> None:
    """Empty tensors of these names in a file of weights, and its metadata."""
    tensors = load_file(path) | {name: torch.empty(0) for name in names}
    save_file(tensors, path, {"format": "pt", **metadata})


@every_kind
def test_a_pipeline_becomes_a_checkpoint_that_names_its_parts(kind):
    said = done(f"vdiff import diffusers {pipeline(kind)} --out sd").output
    assert f"sd: {PREFLIGHT[kind]}\n" in said
    assert "--prompt" in said
    assert sorted(path.name for path in Path("sd").iterdir()) == ["config.json", "model.safetensors"]
    denoiser, config = load_checkpoint("sd")
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline(kind) / "unet")
    own = denoiser.network.unet.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in unet.state_dict().items())
    assert config.components == {"path": str(pipeline(kind)), "fingerprint": components_fingerprint(pipeline(kind))}
    assert (config.codec, config.shape, config.num_timesteps) == ("autoencoder", (4, 8, 8), 50)
    theirs = diffusers.DDIMScheduler.from_pretrained(pipeline(kind) / "scheduler")
    own_products = torch.tensor(denoiser.schedule.alphas_cumprod())
    torch.testing.assert_close(own_products.float(), theirs.alphas_cumprod, rtol=1e-5, atol=0)


def test_copied_parts_make_the_checkpoint_whole(tmp_path):
    """It moves, and the pipeline may go; the copy is replaced with the checkpoint."""
    copied("sdxl")
    done("vdiff import diffusers theirs --out sd --copy")
    shutil.rmtree("theirs")
    Path("sd").rename("moved")
    config = load_checkpoint("moved")[1]
    assert config.components is not None
    assert config.components["path"] == str(tmp_path / "moved" / COPIED)
    done(f"vdiff import diffusers {pipeline('sd15')} --out moved --overwrite")
    assert not Path("moved", COPIED).exists()


def test_zero_terminal_snr_is_read_from_scheduler_keys_or_flag():
    """The schedule is that of diffusers' rescaled scheduler."""
    expected = None
    for name, change in {
        "scheduler": lambda folder: scheduler(folder, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        "key": lambda folder: with_keys(folder / UNET_FILE, "v_pred", "ztsnr"),
        "flag": unchanged,
    }.items():
        folder = copied("sd2", name)
        change(folder)
        flag = " --zero_snr" if name == "flag" else ""
        said = done(f"vdiff import diffusers {name} --out {name}_sd{flag}").output
        spacing = "trailing" if name == "scheduler" else "leading"
        assert f"v-prediction, zero terminal SNR, {spacing}, 1000 levels" in said
        config = read_config(f"{name}_sd")
        assert expected is None or config.schedule == expected
        expected = config.schedule
    theirs = diffusers.DDIMScheduler.from_pretrained("scheduler/scheduler")
    own = load_checkpoint("scheduler_sd")[0].schedule.alphas_cumprod()
    torch.testing.assert_close(torch.tensor(own).float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert own[-1] == 0


Change = Callable[[Path], object]
CONTRADICTIONS: dict[str, tuple[str, Change, str, str]] = {
    "key and scheduler": ("sd15", lambda f: with_keys(f / UNET_FILE, "v_pred"), "", "says prediction v, and"),
    "metadata and scheduler": (
        "sd2", lambda f: with_keys(f / UNET_FILE, **{"modelspec.prediction_type": "epsilon"}), "", "prediction eps",
    ),
    "metadata and key": (
        "sd15", lambda f: with_keys(f / UNET_FILE, "v_pred", **{"modelspec.prediction_type": "epsilon"}), "",
        "key v_pred says prediction v, and",
    ),
    "flag and scheduler": ("sd15", unchanged, " --prediction v", "--prediction v says prediction v, and"),
    "eps and zero SNR": ("sd15", unchanged, " --zero_snr", "zero terminal SNR with an eps-prediction"),
    "eps and ztsnr": ("sdxl", lambda f: scheduler(f, rescale_betas_zero_snr=True), "", "zero terminal SNR with an eps"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_in_one_line(tmp_path, name):
    kind, change, flags, message = CONTRADICTIONS[name]
    change(copied(kind))
    before = sorted(tmp_path.rglob("*"))
    assert message in error(f"vdiff import diffusers theirs --out sd{flags}", 1)
    assert sorted(tmp_path.rglob("*")) == before


BAD: dict[str, tuple[str, Change, str]] = {
    "no vae": ("sd15", lambda f: shutil.rmtree(f / "vae"), "theirs/vae is missing; a StableDiffusionPipeline needs it"),
    "no second encoder": ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), "theirs/text_encoder_2 is missing"),
    "damaged vae": (
        "sd15", lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x"), "holds no AutoencoderKL",
    ),
    "refiner": ("sdxl", lambda f: edited(f / "model_index.json", requires_aesthetics_score=True), "a refiner cannot"),
    "inpainting": (
        "sd15", lambda f: edited(f / "model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "_class_name is 'StableDiffus",
    ),
    "inpainting by its UNet": ("sd15", lambda f: edited(f / "unet/config.json", in_channels=9), "none for inpainting"),
    "other network": (
        "sd15", lambda f: edited(f / "model_index.json", unet=["diffusers", "UNet2DModel"]), "only UNet2DConditionModel"
    ),
    "guided": ("sd15", lambda f: edited(f / "unet/config.json", time_cond_proj_dim=32), "time_cond_proj_dim is 32"),
    "no size": ("sd15", lambda f: edited(f / "unet/config.json", sample_size=None), "has no sample_size"),
    "huge": ("sd15", lambda f: edited(f / "unet/config.json", cross_attention_dim=2**40), "more than any network has"),
    "wider": ("sd15", lambda f: edited(f / "unet/config.json", block_out_channels=[16, 16, 32, 64]), "does not fit"),
    "pickled weights": (
        "sd15", lambda f: (f / UNET_FILE).rename(f / "unet/diffusion_pytorch_model.bin"), "weights in pickles"
    ),
    "latents of others": (
        "sd15", lambda f: edited(f / "vae/config.json", latent_channels=16), "latents of 16 channels, and those"
    ),
    "text of others": (
        "sdxl", lambda f: shutil.copytree(pipeline("sd2") / "tokenizer", f / "tokenizer_2", dirs_exist_ok=True) and
        edited(f / "text_encoder/config.json", vocab_size=20), "holds no text encoder of CLIP",
    ),
    "other encoder": (
        "sd15", lambda f: edited(f / "text_encoder/config.json", architectures=["BertModel"]), "it is a BertModel"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_pipelines_are_refused_in_one_line(tmp_path, name):
    kind, change, message = BAD[name]
    change(copied(kind))
    before = sorted(tmp_path.rglob("*"))
    assert message in error("vdiff import diffusers theirs --out sd", 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_text_models_are_refused_elsewhere():
    copied("sd15")
    assert "--pipeline is for a single file" in error("vdiff import diffusers theirs --pipeline theirs", 2)
    done("vdiff import diffusers theirs --out sd --num_timesteps 8")
    assert read_config("sd").num_timesteps == 8
    assert "--num_timesteps 1001" in error("vdiff import diffusers theirs --out more --num_timesteps 1001", 2)


def test_names_of_the_hub_are_fetched_without_variants(monkeypatch):
    asked = []

    def fake(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, ignore_patterns))
        assert {"tokenizer_2/merges.txt", "text_encoder_2/model*.safetensors"} <= set(allow_patterns)
        return str(pipeline("sdxl"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(folders, "hub_answers", lambda: True)
    assert PREFLIGHT["sdxl"] in done("vdiff import diffusers stabilityai/stable-diffusion-xl-base-1.0").output
    assert asked == [("stabilityai/stable-diffusion-xl-base-1.0", folders.VARIANTS)]
    assert read_config("checkpoints/stable-diffusion-xl-base-1.0").dataset.endswith("stable-diffusion-xl-base-1.0")


def test_weights_in_half_precision_stay_so_and_variants_are_read():
    """As many models come: float16 in files with the name of their variant, which are computed with in float32."""
    folder = copied("sdxl")
    for path in folder.rglob("*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
    done("vdiff import diffusers theirs --out sd --copy")
    assert {tensor.dtype for tensor in load_file("sd/model.safetensors").values()} == {torch.float16}
    denoiser = load_checkpoint("sd")[0]
    assert {weight.dtype for weight in denoiser.parameters()} == {torch.float32}
    plain = load_file(pipeline("sdxl") / "text_encoder/model.safetensors")
    name = "embeddings.token_embedding.weight"
    expected = next(tensor for key, tensor in plain.items() if key.endswith(name)).half().float()
    found = denoiser.network.state_dict()[f"text_encoders.0.{name}"]
    assert torch.equal(found, expected)


@every_kind
def test_a_single_file_is_the_pipeline_that_it_was_made_of(tmp_path, kind):
    """Weights equal those of the folder; tokenizers and text encoders are copied."""
    single_file(kind, Path("model.safetensors"))
    said = done(f"vdiff import diffusers model.safetensors --pipeline {pipeline(kind)} --out sd").output
    assert PREFLIGHT[kind] in said
    done(f"vdiff import diffusers {pipeline(kind)} --out folder")
    one, other = (load_checkpoint(name)[0].network.state_dict() for name in ("sd", "folder"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    config = read_config("sd")
    assert config.components is not None
    assert config.components["path"] == str(tmp_path / "sd" / COPIED)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_single_file_says_more_than_the_configurations_of_its_family():
    """Its keys and its metadata count before the scheduler of another model; the flags before that, too."""
    single_file("sdxl", Path("v.safetensors"))
    plain = f"vdiff import diffusers v.safetensors --pipeline {pipeline('sdxl')}"
    assert "ε-prediction, leading" in done(f"{plain} --out plain").output
    assert "v-prediction, zero terminal SNR, leading" in done(f"{plain} --out flags --prediction v --zero_snr").output
    with_keys(Path("v.safetensors"), "v_pred", "ztsnr")
    assert "v-prediction, zero terminal SNR, leading" in done(f"{plain} --out keys").output
    assert "says prediction v, and --prediction eps says eps" in error(f"{plain} --out no --prediction eps", 1)
    single_file("sdxl", Path("v.safetensors"))
    with_keys(Path("v.safetensors"), **{"modelspec.prediction_type": "v"})
    assert "v-prediction, leading" in done(f"{plain} --out metadata").output


def test_single_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(folders, "hub_answers", lambda: False)
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    assert "holds no Stable Diffusion 1.5, 2 or XL; give --pipeline" in error(
        "vdiff import diffusers other.safetensors", 1
    )
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(2, 2048)}, "xl.safetensors")
    message = error("vdiff import diffusers xl.safetensors", 1)
    assert "stabilityai/stable-diffusion-xl-base-1.0: no such folder, and the hub does not answer" in message
    assert message.endswith("give --pipeline FOLDER: a pipeline of the same architecture, of which configurations and "
                            "tokenizers are taken")  # fmt: skip
    message = error(f"vdiff import diffusers xl.safetensors --pipeline {pipeline('sdxl')}", 1)
    assert "xl.safetensors does not fit the configurations in" in message
    lora = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(2, 1024)}
    save_file(lora, "lora.safetensors")
    message = error(f"vdiff import diffusers lora.safetensors --pipeline {pipeline('sd2')}", 1)
    assert "lora.safetensors is a LoRA of Stable Diffusion 2, named as by diffusers, which needs the model that it" in (
        message
    )
    attends = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}
    save_file({**inpainting, attends: torch.zeros(2, 768)}, "nine.safetensors")
    message = error(f"vdiff import diffusers nine.safetensors --pipeline {pipeline('sd15')}", 1)
    assert "nine.safetensors is Stable Diffusion 1.5, inpainting; import the base model" in message
    Path("model.ckpt").write_bytes(b"")
    assert "model.ckpt is a pickle, and pickles are never read" in error("vdiff import diffusers model.ckpt", 1)
    assert not list(tmp_path.glob(".*.tmp"))
