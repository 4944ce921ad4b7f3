"""Training that starts from a LoRA of another tool: its weights are those that diffusers and peft load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from tests.commands import done
from tests.oracles import randn
from tests.pipelines import pipeline
from tests.text_training import write_captioned, write_text_checkpoint
from tests.toy import Watcher
from vdiff.errors import OptionError, VdiffError
from vdiff.models.adapters import ENCODER_LAYERS
from vdiff.models.checkpoint import ADAPTER, load_adapted, read_config, read_tensors, save_checkpoint, write_tensors
from vdiff.models.lora_files import read_lora
from vdiff.models.prompting import Prompting
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import begin, train
from vdiff.training.finetuning import with_fingerprint

PARTS = ("unet", "text_encoder", "text_encoder_2")
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def adapted(kind: str) -> Any:
    """The pipeline with a LoRA of the UNet and the text encoders, which peft injects."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    for part in PARTS:
        if (module := getattr(pipe, part, None)) is None:
            continue
        names = UNET_LAYERS if part == "unet" else list(ENCODER_LAYERS)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=names), module)
        for k, (name, weight) in enumerate(module.named_parameters()):
            if "lora_" in name:
                weight.data.copy_(0.2 * randn(*weight.shape, seed=k))
    return pipe


@pytest.fixture(scope="module")
def place(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a LoRA in three layouts, as the functions of diffusers and peft write them."""
    folder = tmp_path_factory.mktemp(kind)
    write_text_checkpoint(folder / "base", kind)
    write_captioned(folder / "data")
    pipe = adapted(kind)
    layers = {part: get_peft_model_state_dict(getattr(pipe, part)) for part in PARTS if getattr(pipe, part, None)}
    type(pipe).save_lora_weights(
        folder / "saved",
        **{f"{part}_lora_layers": tensors for part, tensors in layers.items()},
        **{f"{part}_lora_adapter_metadata": {"r": 2, "lora_alpha": 3} for part in layers},
    )
    (folder / "saved/pytorch_lora_weights.safetensors").rename(folder / "diffusers.safetensors")
    kohya = {}
    for part, tensors in layers.items():
        if part != "unet":  # kohya's names have text_model, which newer transformers leave out
            tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        kohya |= convert_state_dict_to_kohya({f"{part}.{name}": tensor for name, tensor in tensors.items()})
    if kind == "sd15":  # with one text encoder, kohya's scripts do not number it
        kohya = {name.replace("lora_te1", "lora_te"): tensor for name, tensor in kohya.items()}
    kohya = {name: torch.tensor(3.0) if name.endswith(".alpha") else x.contiguous() for name, x in kohya.items()}
    save_file(kohya, folder / "kohya.safetensors")
    for part, name in zip(PARTS, ("unet", "text_encoder_one", "text_encoder_two"), strict=True):
        if part in layers:
            named = {f"base_model.model.{layer}": tensor for layer, tensor in layers[part].items()}
            (folder / "peft" / name).mkdir(parents=True)
            save_file(named, folder / "peft" / name / "adapter_model.safetensors")
            (folder / "peft" / name / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3}')
    return folder


@pytest.mark.parametrize("layout", ["diffusers.safetensors", "kohya.safetensors", "peft"])
def test_a_lora_of_another_tool_changes_the_model_as_it_changes_a_pipeline(place, kind, layout):
    base = read_config(place / "base")
    settings, tensors = read_lora(place / layout, base)
    assert (settings.rank, settings.alpha, settings.text_encoder) == (2, 3.0, True)
    config = replace(base, adapter=settings, base={"path": str(place / "base"), "fingerprint": ""})
    own, pipe = load_adapted(with_fingerprint(config), place, tensors), adapted(kind)
    condition = Prompting.read(base).condition(base.signature.names, ["a red fox", "snow"])
    found = own.network.encode(condition).tensors
    encoded = pipe.encode_prompt(
        ["a red fox", "snow"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(found["text"], encoded[0], rtol=1e-4, atol=1e-5)
    added = None
    if kind == "sdxl":
        torch.testing.assert_close(found["text_pooled"], encoded[2], rtol=1e-4, atol=1e-5)
        added = {"text_embeds": encoded[2], "time_ids": found["time_ids"]}
    z, timestep = randn(2, 4, 8, 8, dtype=torch.float32), torch.tensor([7.0, 900.0])
    with torch.no_grad():
        expected = pipe.unet(z, timestep, encoded[0], added_cond_kwargs=added).sample
        torch.testing.assert_close(own.network(z, timestep, **found), expected, rtol=1e-4, atol=1e-4)


def comfyui_layers(kind: str) -> set[str]:
    """The layers of text encoders that ComfyUI's loader of LoRAs knows: `model_lora_keys_clip` in comfy/lora.py."""
    parts = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{name}_proj" for name in ("k", "q", "v", "out")))
    prefixes = ("lora_te1", "lora_te2") if kind == "sdxl" else ("lora_te",)
    return {f"{prefix}_text_model_encoder_layers_{k}_{part}" for prefix in prefixes for k in range(3) for part in parts}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_exported_lora_of_text_encoders_has_the_names_of_other_tools(place, kind, tmp_path):
    base = read_config(place / "base")
    settings, tensors = read_lora(place / "peft", base)
    config = replace(base, adapter=settings, base={"path": str(place / "base"), "fingerprint": ""})
    save_checkpoint(tmp_path / "lora", tensors, with_fingerprint(config))
    done(f"vdiff export lora {tmp_path}/lora {tmp_path}/a.safetensors --format both")
    done(f"vdiff export lora {tmp_path}/lora {tmp_path}/step1 --format peft")
    for made, theirs in (("a", "diffusers"), ("a_kohya", "kohya")):
        keys, expected = (
            {name.replace("text_model.", "") for name in load_file(file)}
            for file in (tmp_path / f"{made}.safetensors", place / f"{theirs}.safetensors")
        )
        unused = {key for key in expected - keys if "layers.2" in key or "layers_2" in key}
        assert (keys | unused, bool(unused)) == (expected, kind == "sdxl")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "a_kohya.safetensors") if "lora_te" in name}
    assert names
    assert names <= comfyui_layers(kind)
    for layout in ("a.safetensors", "a_kohya.safetensors", "step1"):
        described, again = read_lora(tmp_path / layout, base)
        assert described == settings
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    pipe, expected = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind)), adapted(kind)
    folders = ("text_encoder_one", "text_encoder_two") if kind == "sdxl" else ("text_encoder",)
    for part, folder in zip(PARTS[1:], folders, strict=False):
        setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), tmp_path / "step1" / folder))
        assert f'"{tmp_path.name}' not in (page := (tmp_path / "step1/README.md").read_text())
        assert f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "step1/{folder}"' in page
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found, wanted = (each.encode_prompt(["a red fox"], **options) for each in (pipe, expected))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)


def resolved(place: Path, lora: Path, **flags: Any) -> tuple[Any, Any, Watcher]:
    watcher = Watcher()
    values = {
        "base": str(place / "base"), "data": str(place / "data"), "lora": str(lora), "num_iters": 2, "batch_size": 2,
        "device": "cpu", "num_workers": 0, "tracker": "none", "threads": 1, "sample_interval": 9, **flags,
    }  # fmt: skip
    return *resolve_training(values, None, folder=Path("none"), resume=False, reporter=watcher), watcher


def test_a_run_starts_from_a_lora_and_its_checkpoint_starts_another(place, tmp_path):
    config, images, watcher = resolved(place, place / "kohya.safetensors", ema=0.0)
    assert config.train_text_encoder
    assert f"{place}/kohya.safetensors: LoRA of rank 2, alpha 3, conv1,to_k,to_out.0,to_q,to_v" in watcher.lines
    description = with_fingerprint(describe(config, images))
    started = begin(description, lora=config.lora)
    _, tensors = read_lora(place / "kohya.safetensors", read_config(place / "base"))
    save_checkpoint(tmp_path / "start", started.state_dict(), description)
    saved = read_tensors(tmp_path / "start" / ADAPTER)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    train(config, images, folder=tmp_path / "run", resume=False, overwrite=False, reporter=Watcher())
    again, _, _ = resolved(place, tmp_path / "run")
    assert (again.lora_rank, again.lora_alpha, again.train_text_encoder) == (2, 3.0, True)
    trained = read_tensors(tmp_path / "run" / ADAPTER)
    assert any(not torch.equal(trained[name], tensor) for name, tensor in tensors.items())


def spoiled(place: Path, file: Path, change: Any) -> Path:
    tensors = load_file(place / "diffusers.safetensors")
    write_tensors(file, change(tensors), {"format": "pt"})
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()},
            "of another base: its",
        ),
        (
            lambda t: {k.replace("down_blocks", "down_bricks"): v for k, v in t.items()},
            "of another base, which has",
        ),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "of another base, which has"),
        (lambda _: {"a": torch.zeros(2)}, "holds no LoRA"),
        (
            lambda t: {k: torch.cat([v, v], dim=int("lora_B" in k)) if "to_q" in k else v for k, v in t.items()},
            "has layers of ranks 2 and 4; only LoRAs with one of each are read",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_one_line(place, tmp_path, change, message):
    with pytest.raises(VdiffError) as caught:
        resolved(place, spoiled(place, tmp_path / "other.safetensors", change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_other_than_those_of_the_lora_and_a_missing_file_are_refused(place, tmp_path):
    with pytest.raises(OptionError, match=r"--lora_rank 4: .*diffusers.safetensors has 2; leave it out"):
        resolved(place, place / "diffusers.safetensors", lora_rank=4)
    with pytest.raises(OptionError, match=r"--lora .*none\.safetensors: no such file or folder; give a LoRA, or a"):
        resolved(place, tmp_path / "none.safetensors")
