"""Text-to-image networks: prompts as tokens and embeddings, and checkpoints that name their components."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.oracles import randn
from tests.pipelines import autoencoder, pipeline
from vdiff.errors import VdiffError
from vdiff.models.autoencoder import Autoencoder, picture_shape
from vdiff.models.backbone import Backbone, count_flops
from vdiff.models.checkpoint import (
    WEIGHTS,
    CheckpointConfig,
    load_checkpoint,
    read_config,
    read_tensors,
    save_checkpoint,
)
from vdiff.models.codec import from_uint8
from vdiff.models.components import ENCODERS, components_fingerprint, read_encoder, text_libraries
from vdiff.models.condition import POOLED, TEXT, TIME_IDS, TOKENS, Condition
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.kinds import build_network, signature_of
from vdiff.models.text import TextBackbone
from vdiff.models.tokenizing import Tokenizers
from vdiff.models.wrapped import DiffusersBackbone

KINDS = ["sd15", "sd2", "sdxl"]
every_kind = pytest.mark.parametrize("kind", KINDS)
PROMPTS = ["a red fox", "", "a small house in the snow"]


def theirs(kind: str) -> Any:
    """diffusers' own pipeline."""
    found = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    found.set_progress_bar_config(disable=True)
    return found


def backbone(kind: str, **options: bool) -> TextBackbone:
    """The network of a pipeline."""
    folder = pipeline(kind)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    encoders = [read_encoder(folder, part) for part in ENCODERS if (folder / part).is_dir()]
    empty = Tokenizers.read(folder).tokens([""])[0].tolist()
    return TextBackbone(
        DiffusersBackbone(unet), encoders, empty_tokens=empty, zero_empty=kind == "sdxl", **options
    ).eval()


def tokens(kind: str, texts: list[str]) -> Tensor:
    return Tokenizers.read(pipeline(kind)).tokens(texts)


def sizes(rows: int, kind: str) -> dict[str, Tensor]:
    """SDXL's time ids."""
    return {TIME_IDS: torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, 6)} if kind == "sdxl" else {}


@every_kind
def test_embeddings_are_those_of_the_pipelines(kind):
    """Of prompts, of the empty prompt as the negative one, and the zeros of XL where no negative prompt is given."""
    network, whole = backbone(kind), theirs(kind)
    condition = Condition({TOKENS: tokens(kind, PROMPTS)}, network.signature.null)
    with torch.no_grad():
        found = network.encode(condition)
        for k, prompt in enumerate(PROMPTS):
            if not prompt:
                continue
            text, none, *pooled = whole.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            torch.testing.assert_close(found.tensors[TEXT][k], text[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(found.null[TEXT], none[0], rtol=0, atol=1e-6)
            if pooled:
                torch.testing.assert_close(found.tensors[POOLED][k], pooled[0][0], rtol=0, atol=1e-6)
                torch.testing.assert_close(found.null[POOLED], pooled[1][0], rtol=0, atol=1e-6)
    assert (POOLED in found.tensors) == (kind == "sdxl")
    assert torch.equal(found.tensors[TEXT][1], found.null[TEXT])  # the empty prompt is the null
    assert bool(found.null[TEXT].abs().max() == 0) == (kind == "sdxl")


@every_kind
def test_the_network_answers_the_same_to_tokens_and_to_their_embeddings(kind):
    network, z, timestep = backbone(kind), randn(3, 4, 8, 8, dtype=torch.float32), torch.full((3,), 500.0)
    condition = Condition({TOKENS: tokens(kind, PROMPTS), **sizes(3, kind)}, network.signature.null)
    with torch.no_grad():
        by_tokens = network(z, timestep, **condition.tensors)
        known = network.encode(condition)
        by_embeddings = network(z, timestep, **known.tensors)
        dropped = network(z, timestep, **condition.drop().tensors)
        none = network(z, timestep, **known.drop().tensors)
    torch.testing.assert_close(by_tokens, by_embeddings, rtol=0, atol=1e-6)
    torch.testing.assert_close(dropped, none, rtol=0, atol=1e-6)
    assert (by_tokens[0] - none[0]).abs().max() > 1e-3 * none[0].abs().max()


def test_guidance_moves_away_from_the_negative_prompt():
    """v̂_w = v̂ + w (v̂ − v̂_negative): from the network's own answers to the two prompts."""
    network, t = backbone("sd2"), torch.full((1,), 0.5, dtype=torch.float64)
    from vdiff.diffusion.schedules import ScaledLinearSchedule

    denoiser = Denoiser(network, ScaledLinearSchedule(1000, 0.00085, 0.012), "v")
    z = randn(1, 4, 8, 8, dtype=torch.float32)
    positive, negative = tokens("sd2", ["a red fox", "a blue cat"])
    with torch.no_grad():
        v, v_none = (denoiser(z, t, Condition({TOKENS: each[None]})).v for each in (positive, negative))
        condition = network.encode(Condition({TOKENS: positive[None]}, {TOKENS: negative}))
        guided = GuidedDenoiser(denoiser, 3.0)(z, t, condition).v
    torch.testing.assert_close(guided, v + 3 * (v - v_none), rtol=0, atol=1e-5)


def test_the_operations_of_an_evaluation_are_counted_without_weights():
    """More than the first and the last convolution of the UNet take by hand."""
    described = {kind: backbone(kind).describe() for kind in ("sd15", "sdxl")}
    counts = {
        kind: count_flops(partial(build_network, "text", config), (4, 8, 8)) for kind, config in described.items()
    }
    for kind, (parameters, flops) in counts.items():
        assert parameters == sum(weight.numel() for weight in backbone(kind).parameters())
        assert flops > 2 * 8 * 8 * 4 * 16 * 9 * 2
    assert counts["sdxl"][1] > counts["sd15"][1]


@every_kind
def test_a_description_builds_the_network_again(kind):
    network = backbone(kind)
    config = network.describe()
    again = build_network("text", config)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    assert again.describe() == config
    assert signature_of("text", config) == network.signature
    assert network.signature.names[0] == TOKENS
    assert not any(weight.requires_grad for weight in network.text_encoders.parameters())
    assert all(weight.requires_grad for weight in network.unet.parameters())


def described(network: Backbone, folder: Path | None) -> CheckpointConfig:
    """A checkpoint's description of a network, whose components are in a folder."""
    components = folder and {"path": str(folder), "fingerprint": components_fingerprint(folder)}
    return CheckpointConfig(
        backbone={"kind": "text", "config": network.describe()}, sample_shape=[4, 8, 8], codec="unbounded",
        schedule={"name": "scaled_linear", "num_levels": 1000, "first_beta": 0.00085, "last_beta": 0.012},
        prediction="v", num_timesteps=50, method="base", weights="raw", num_iters=0, target_iters=0, num_images=0,
        dataset="", dataset_fingerprint="", components=components,
    )  # fmt: skip


def saved(network: TextBackbone, folder: Path, components: Path | None) -> None:
    save_checkpoint(
        folder, {f"network.{name}": x for name, x in network.state_dict().items()}, described(network, components)
    )


@every_kind
def test_a_checkpoint_holds_the_unet_and_names_its_text_encoders(kind, tmp_path):
    network = backbone(kind)
    saved(network, tmp_path / "model", pipeline(kind))
    assert all(name.startswith("network.unet.") for name in read_tensors(tmp_path / "model" / WEIGHTS))
    denoiser, config = load_checkpoint(tmp_path / "model")
    again = denoiser.network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
    assert config.components == {"path": str(pipeline(kind)), "fingerprint": components_fingerprint(pipeline(kind))}


def test_own_text_encoders_are_in_the_checkpoint(tmp_path):
    network = backbone("sdxl", own_text_encoders=True)
    fixed = {name.rpartition(".")[0] for name, weight in network.named_parameters() if not weight.requires_grad}
    assert fixed
    assert all(name.startswith(network.unused_layers) for name in fixed)
    with torch.no_grad():
        for weight in network.text_encoders.parameters():
            weight.add_(1)
    saved(network, tmp_path / "model", None)
    assert not any(".text_model." in name for name in read_tensors(tmp_path / "model" / WEIGHTS))
    again = load_checkpoint(tmp_path / "model")[0].network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())


def test_components_may_move_with_the_checkpoint_or_be_pointed_to(tmp_path):
    """Within a project the path is relative; a missing folder and one with other weights are refused."""
    components = tmp_path / "project" / "parts"
    shutil.copytree(pipeline("sd15"), components)
    saved(backbone("sd15"), tmp_path / "project" / "model", components)
    moved = tmp_path / "elsewhere"
    (tmp_path / "project").rename(moved)
    assert read_config(moved / "model").components["path"] == str(moved / "parts")
    load_checkpoint(moved / "model")
    (moved / "parts").rename(tmp_path / "parts")
    with pytest.raises(VdiffError, match=r"no such folder; .* --components FOLDER"):
        load_checkpoint(moved / "model")
    config = load_checkpoint(moved / "model", components=tmp_path / "parts")[1]
    assert config.components["path"] == str(tmp_path / "parts")
    config_file = tmp_path / "parts" / "text_encoder" / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    with pytest.raises(VdiffError, match="holds other text encoders"):
        load_checkpoint(moved / "model", components=tmp_path / "parts")
    saved(backbone("sd15"), tmp_path / "nowhere", None)
    with pytest.raises(VdiffError, match="with --components FOLDER"):
        load_checkpoint(tmp_path / "nowhere")


@every_kind
def test_prompts_are_cut_as_the_pipelines_cut_them(kind):
    """The tokens are theirs, and what does not fit is the end of the text."""
    tokenizers, whole = Tokenizers.read(pipeline(kind)), theirs(kind)
    long = " ".join(["red"] * 75 + ["small", "fox"])
    texts = ["a red fox", "", long]
    parts = [part for part in (whole.tokenizer, getattr(whole, "tokenizer_2", None)) if part is not None]
    expected = [
        part(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt") for part in parts
    ]
    assert torch.equal(tokenizers.tokens(texts), torch.cat([each.input_ids for each in expected], dim=1))
    assert [tokenizers.cut(text) for text in texts] == ["", "", "small fox"]


def test_folders_without_the_parts_are_refused(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline("sd15"), folder)
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(VdiffError, match="holds no text encoder of CLIP"):
        read_encoder(folder, "text_encoder")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(VdiffError, match=r"model\.safetensors is missing; weights in pickles"):
        read_encoder(folder, "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(VdiffError, match="has no folder tokenizer"):
        Tokenizers.read(folder)
    (folder / "tokenizer").mkdir()
    with pytest.raises(VdiffError, match="holds no tokenizer of CLIP"):
        Tokenizers.read(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_encoders": []}, "one to three"),
        ({"text_encoders": [{"class": "BertModel", "config": {}}]}, "BertModel"),
        ({"text_encoders": [{"class": "CLIPTextModel", "config": {"num_hidden_layers": 10**9}}]}, "num_hidden_layers"),
        ({"text_encoders": [{"class": "CLIPTextModel", "config": {"auto_map": 1}}]}, "auto_map"),
        ({"empty_tokens": []}, "empty_tokens"),
        ({"empty_tokens": [-1]}, "whole numbers"),
    ],
)
def test_impossible_descriptions_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        signature_of("text", {**backbone("sd15").describe(), **changes})


def test_a_description_is_as_it_was_without_components():
    config = replace(described(backbone("sd15"), None), components=None)
    assert not {"components", "adapter", "base"} & config.to_dict().keys()


PIXELS = torch.arange(2 * 3 * 32 * 64, dtype=torch.int32).mul(37).remainder(256).to(torch.uint8).reshape(2, 3, 32, 64)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_latents_are_scaled_as_the_pipelines_scale_them(kind):
    """Encoding as diffusers' training scripts do it, and decoding as its image processor does, pictures by fours."""
    vae, own = theirs(kind).vae, Autoencoder.read(pipeline(kind))
    with torch.no_grad():
        posterior = vae.encode(from_uint8(PIXELS)).latent_dist
        scale = {"sd15": 0.18215, "sdxl": 0.13025}[kind]
        mean, std = own.encode(PIXELS)
        torch.testing.assert_close(mean, posterior.mean * scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(std, posterior.std * scale, rtol=0, atol=1e-6)
        noise = randn(2, 4, 4, 8, dtype=torch.float32)
        z = own.sample(mean, std, noise)
        torch.testing.assert_close(z, (posterior.mean + posterior.std * noise) * scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(own.decode(z), vae.decode(z / scale).sample.clamp(-1, 1), rtol=0, atol=1e-5)
    assert (own.factor, own.channels) == (8, 4)
    assert picture_shape((4, 4, 8), pipeline(kind)) == (3, 32, 64)


def test_latents_of_a_mean_and_deviation_for_each_channel():
    """z = (raw − mean)/std · scale: raw · std/scale + mean is what the decoder gets."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.5]
    vae = autoencoder(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    own, plain = Autoencoder(vae), Autoencoder(autoencoder(scaling_factor=1.0))
    plain.model.load_state_dict(vae.state_dict())
    raw = plain.encode(PIXELS)[0]
    rows = [torch.tensor(values).reshape(1, 4, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(own.encode(PIXELS)[0], (raw - rows[0]) / rows[1] * 0.5, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.decode(own.encode(PIXELS)[0]), plain.decode(raw), rtol=0, atol=1e-5)


def test_pictures_do_not_depend_on_how_many_are_decoded_at_once(monkeypatch):
    own, z = Autoencoder.read(pipeline("sd15")), randn(3, 4, 4, 4, dtype=torch.float32)
    together = own.decode(z)
    monkeypatch.setattr("vdiff.models.autoencoder.PIXELS_AT_ONCE", 32 * 32)
    torch.testing.assert_close(own.decode(z), together, rtol=0, atol=1e-5)


def test_the_autoencoder_computes_in_float32_where_half_precision_is_on():
    """Of weights in float16 too: as in the files of many models."""
    own, z = Autoencoder.read(pipeline("sd15")), randn(1, 4, 4, 4, dtype=torch.float32)
    expected = own.decode(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(own.decode(z), expected)
        assert own.encode(PIXELS)[0].dtype == torch.float32
    assert next(Autoencoder(own.model.half()).model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "not finite"), (-9.0, "black")])
def test_a_black_picture_is_an_error_as_one_that_is_not_finite(value, said):
    own, z = Autoencoder.read(pipeline("sd15")), randn(2, 4, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        own.model.decoder.conv_out.weight.zero_()
        own.model.decoder.conv_out.bias.fill_(value)
    with pytest.raises(VdiffError, match=f"picture 1 of 2 is {said}; give --precision fp32"):
        own.decode(z)
    own.model.decoder.conv_out.bias.fill_(-0.9)  # dark is not black
    own.decode(z)


def test_folders_without_an_autoencoder_are_refused(tmp_path):
    with pytest.raises(VdiffError, match="holds no autoencoder"):
        Autoencoder.read(tmp_path)
    shutil.copytree(pipeline("sd15") / "vae", tmp_path / "mine")
    assert Autoencoder.read(tmp_path / "mine").factor == 8
    with pytest.raises(VdiffError, match="latents of 4 channels, and those of the model have 16"):
        picture_shape((16, 8, 8), tmp_path / "mine")
    with pytest.raises(ValueError, match="need multiples of 8"):
        Autoencoder.read(tmp_path / "mine").encode(PIXELS[..., :60])
    (tmp_path / "mine" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(VdiffError, match="holds no AutoencoderKL"):
        Autoencoder.read(tmp_path / "mine")


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_missing_library_is_named_with_the_extra(monkeypatch, library):
    config = backbone("sd15").describe()
    monkeypatch.setitem(sys.modules, library, None)
    expected = f"need {library}, which is not installed; pip install 'vdiff\\[text\\]'"
    for use in (lambda: build_network("text", config), lambda: Tokenizers.read(pipeline("sd15"))):
        with pytest.raises(VdiffError, match=expected):
            use()
    with pytest.raises(VdiffError, match=expected):
        Autoencoder.read(pipeline("sd15"))


def test_libraries_log_as_before_afterwards():
    """Their bars and messages are off while vdiff uses them, and then as the caller had them."""
    logs = diffusers.utils.logging
    before = (logs.get_verbosity(), logs.is_progress_bar_enabled())
    with text_libraries():
        assert not logs.is_progress_bar_enabled()
    assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == before
