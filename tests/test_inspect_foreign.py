"""`vdiff inspect` on files and folders of other programs: what they are, who reads them wrong, and repaired copies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from benchmarks.eps_or_v import KINDS, trained
from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import UNETS, pipeline, single_file
from vdiff.interop import predicts
from vdiff.interop.predicts import CONFIGS, measure
from vdiff.interop.recognition import readings, recognise
from vdiff.models.checkpoint import read_metadata

FAMILIES = {"sd15": "Stable Diffusion 1.5", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspected(path: Path | str, flags: str = "") -> dict[str, Any]:
    return dict(json.loads(done(f"vdiff inspect {path} --json {flags}").stdout))


def sparse(path: Path | str, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of fp16 zeros of any size that takes no space on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


XL = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}
ONE = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}
TWO = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "cond_stage_model.model.ln_final.weight": (1024,),
}
V_KEYS = {"v_pred": (0,), "ztsnr": (0,)}
SAYS_V = {"modelspec.prediction_type": "v"}
NAMES = ("diffusers", "ComfyUI", "A1111")
FILES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str], str | None, bool | None, str]] = {
    # file: shapes, metadata, prediction, zero terminal SNR, who is wrong (W), right (R), or unknown (?), in that order
    "XL": (XL, {}, None, None, "???"),
    "XL eps": (XL, {"modelspec.prediction_type": "epsilon"}, "eps", None, "RRR"),
    "XL v": (XL, SAYS_V, "v", None, "WWW"),
    "XL v with keys": ({**XL, **V_KEYS}, SAYS_V, "v", True, "WRR"),
    "1.5 v": (ONE, SAYS_V, "v", None, "WWW"),
    "1.5 v with keys": ({**ONE, **V_KEYS}, {}, "v", True, "WWW"),
    "1.5 eps": (ONE, {"modelspec.prediction_type": "epsilon"}, "eps", None, "RRR"),
    "2 v": (TWO, SAYS_V, "v", None, "RWR"),
    "2 v by its architecture": (TWO, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v", None, "RWR"),
    "2 eps": (TWO, {"modelspec.prediction_type": "epsilon"}, "eps", None, "WRR"),
    "XL v of kohya": (XL, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v", True, "WWW"),
}


@pytest.mark.parametrize("name", FILES)
def test_who_takes_a_file_for_what_it_is(name):
    """By the tables of ComfyUI and A1111, from keys, metadata, and for 2 the spread of a bias, which is 0 here."""
    shapes, metadata, prediction, zero_snr, expected = FILES[name]
    sparse("model.safetensors", shapes, metadata)
    model = recognise(Path("model.safetensors"))
    assert (model.prediction, model.zero_snr, model.kind, model.usual_sizes) == (prediction, zero_snr, "model", True)
    found = {each.program: each.is_wrong for each in readings(model)}
    assert "".join({True: "W", False: "R", None: "?"}[found[program]] for program in NAMES) == expected


def test_a_file_of_seven_gigabytes_is_answered_from_its_header():
    """Neither are its numbers read, nor is torch loaded."""
    big = {f"first_stage_model.decoder.{k}.weight": (1024, 1024, 1024) for k in range(4)}
    sparse("big.safetensors", {**XL, **V_KEYS, **big})
    assert Path("big.safetensors").stat().st_size > 7e9
    assert Path("big.safetensors").stat().st_blocks * 512 < 1e6
    code = (
        "import sys, time; from vdiff.cli.main import main\n"
        "try: main(['inspect', 'big.safetensors'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules; assert time.process_time() < 2  # 0.3 on a usual machine\n"
        "print(open('/proc/self/io').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "what       Stable Diffusion XL" in result.stdout or "what      Stable Diffusion XL" in result.stdout
    assert "takes it for v, zero terminal SNR (key v_pred)" in result.stdout
    assert int(result.stdout.partition("rchar: ")[2].split()[0]) < 5e8


def test_a_yaml_file_beside_it_decides_for_a1111():
    sparse("model.safetensors", {**ONE, "ztsnr": (0,)}, SAYS_V)
    Path("model.yaml").write_text("model:\n  params:\n    parameterization: v\n")
    found = {each["program"]: each for each in inspected("model.safetensors")["programs"]}
    assert found["A1111"] == {
        "program": "A1111", "says": "takes it for v, zero terminal SNR (model.yaml)", "is_wrong": False, "remedy": ""
    }  # fmt: skip
    assert "ModelSamplingDiscrete with v_prediction, zsnr on" in found["ComfyUI"]["remedy"]
    Path("model.yaml").write_text(
        "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n"
    )
    text = done("vdiff inspect model.safetensors").stdout
    assert "CONTRADICTION: metadata modelspec says v, model.yaml eps" in text


@pytest.mark.parametrize("kind", UNETS)
def test_tiny_files_and_folders_are_recognised(kind):
    single_file(kind, Path("model.safetensors"))
    found = inspected("model.safetensors")
    assert (found["family"], found["what"], found["prediction"]) == (FAMILIES[kind], FAMILIES[kind], None)
    assert found["parts"] == ["UNet", "autoencoder", "text encoders" if kind == "sdxl" else "text encoder"]
    folder = inspected(pipeline(kind))
    assert (folder["family"], folder["kind"]) == (FAMILIES[kind], "pipeline")
    assert (folder["prediction"], folder["zero_snr"]) == ("v" if kind == "sd2" else "eps", False)
    unet = inspected(pipeline(kind) / "unet/diffusion_pytorch_model.safetensors")
    assert unet["what"] == f"a UNet of {FAMILIES[kind]}, by the names of diffusers"


def test_a_folder_with_zero_terminal_snr_needs_trailing_timesteps():
    shutil.copytree(pipeline("sd2"), "folder")
    path = Path("folder/scheduler/scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    found = inspected("folder")
    assert (found["prediction"], found["zero_snr"]) == ("v", True)
    assert found["notes"] == ["zero terminal SNR with leading timesteps: sampling never begins at the last level"]


WIDTHS = {"Stable Diffusion 1.5": 768, "Stable Diffusion 2": 1024, "Stable Diffusion XL": 2048}
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def lora(layout: str, width: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on one layer, by the names of a program."""
    down, up = randn(4, width, dtype=torch.float32), randn(640, 4, seed=1, dtype=torch.float32)
    plain = LAYER.replace(".", "_")
    names = {
        "kohya's scripts": (f"lora_unet_{plain}.lora_down.weight", f"lora_unet_{plain}.lora_up.weight"),
        "diffusers": (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"),
        "peft": (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"),
        "diffusers of 2023": (
            f"unet.{LAYER.replace('to_k', 'processor.to_k_lora')}.down.weight",
            f"unet.{LAYER.replace('to_k', 'processor.to_k_lora')}.up.weight",
        ),
    }[layout]
    return dict(zip(names, (down, up), strict=True))


LOADED = {
    "kohya's scripts": (False, False, False), "diffusers": (False, True, True), "peft": (True, True, True),
    "diffusers of 2023": (False, False, True),
}  # fmt: skip


@pytest.mark.parametrize("layout", LOADED)
@pytest.mark.parametrize("family", WIDTHS)
def test_loras_are_recognised_by_their_names_and_widths(layout, family):
    """And who loads them, in the order diffusers, ComfyUI, A1111."""
    save_file(lora(layout, WIDTHS[family]), "my_8step_lora.safetensors")
    found = inspected("my_8step_lora.safetensors")
    assert (found["kind"], found["family"], found["layout"], found["rank"]) == ("LoRA", family, layout, 4)
    assert found["steps"] == 8
    by_name = {each["program"]: each["is_wrong"] for each in found["programs"]}
    assert tuple(by_name[program] for program in NAMES) == LOADED[layout]


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_repaired_lora_has_the_names_of_kohya(layout):
    """As diffusers converts them, with alpha, which this file says in its metadata."""
    note = json.dumps({"unet.lora_alpha": 2.0, "unet.r": 4})
    save_file(lora(layout, 2048), "lora.safetensors", {"lora_adapter_metadata": note})
    done("vdiff inspect lora.safetensors --repair out/lora.safetensors --prediction v --zero_snr")
    found, expected = load_file("out/lora.safetensors"), convert_state_dict_to_kohya(lora("diffusers", 2048))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(2.0) if name.endswith(".alpha") else tensor)
    said = inspected("out/lora.safetensors")
    assert (said["prediction"], said["zero_snr"], said["alpha"], said["layout"]) == ("v", True, 2.0, "kohya's scripts")
    assert not any(each["is_wrong"] for each in said["programs"])
    assert read_metadata(Path("out/lora.safetensors"))["ss_base_model_version"] == "sdxl_base_v1-0"
    done("vdiff inspect lora.safetensors --repair names.safetensors")  # what it predicts is the base's
    assert load_file("names.safetensors").keys() == expected.keys()
    assert inspected("names.safetensors")["prediction"] is None


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_repaired_file_is_read_right(family):
    """Its numbers are those of the file; the keys decide for XL, and the YAML file for 1.5."""
    single_file(family, Path("model.safetensors"))
    done("vdiff inspect model.safetensors --repair out.safetensors --prediction v --zero_snr")
    before, after = load_file("model.safetensors"), load_file("out.safetensors")
    assert after.keys() == before.keys() | {"v_pred", "ztsnr"}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    found = inspected("out.safetensors")
    assert (found["prediction"], found["zero_snr"], found["contradiction"]) == ("v", True, None)
    said = done(f"vdiff import diffusers out.safetensors --pipeline {pipeline(family)} --out sd").output
    assert "v-prediction, zero terminal SNR" in said
    done("vdiff inspect out.safetensors --repair back.safetensors --prediction eps --overwrite")
    assert not {"v_pred", "ztsnr"} & load_file("back.safetensors").keys()


def test_a_repaired_file_of_usual_sizes_gets_the_yaml_file_of_a1111():
    sparse("model.safetensors", ONE, SAYS_V)
    text = done("vdiff inspect model.safetensors --repair out/good.safetensors").stderr
    assert "out/good.safetensors: key v_pred, metadata" in text
    assert "good.yaml for A1111" in text
    values = json.loads(Path("out/good.yaml").read_text().partition("\n")[2])["model"]["params"]
    network = values["unet_config"]["params"]
    assert (values["parameterization"], network["num_heads"], network["context_dim"]) == ("v", 8, 768)
    assert network["channel_mult"] == [1, 2, 4, 4]
    found = {each["program"]: each["is_wrong"] for each in inspected("out/good.safetensors")["programs"]}
    assert found["A1111"] is False


def test_a_unet_is_evaluated_with_its_configuration():
    """A UNet whose output is its input, by a patch of its last layer, answers noise as an eps-prediction does."""
    single_file("sdxl", Path("model.safetensors"))
    said = error("vdiff inspect model.safetensors --test", 1)
    assert "has unusual sizes, and a file does not say how many heads it has; give --pipeline FOLDER" in said
    found = inspected("model.safetensors", f"--test --pipeline {pipeline('sdxl')}")
    assert found["prediction"] is None
    assert "cannot tell: the answer to noise has" in found["test"]  # its weights are random
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(pipeline("sdxl") / "unet").eval()
    plain = unet.forward
    unet.forward = lambda z, *args, **kwargs: (z + 0.1 * plain(z, *args, **kwargs)[0],)
    verdict = measure(unet)
    assert verdict.prediction == "eps"
    assert 0.9 < verdict.coefficient < 1.1


class PerfectUnet(torch.nn.Module):
    """The best prediction for Gaussian pictures, in closed form: x̂ = α C (α² C + σ²)⁻¹ z.

    Their covariance C, the same in each channel, is that of a random brightness, of smooth spots, and of fine grain.
    """

    def __init__(self, prediction: str, *, zero_snr: bool, size: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            sample_size=size, in_channels=4, cross_attention_dim=8, addition_embed_type=None
        )  # fmt: skip
        self.prediction, self.weight = prediction, torch.nn.Parameter(torch.zeros(()))
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
        )
        self.products = scheduler.alphas_cumprod
        spots = torch.nn.functional.interpolate(torch.eye(16).reshape(16, 1, 4, 4), size, mode="bicubic").reshape(
            16, -1
        )
        brightness = torch.full((size**2, size**2), 0.5)
        self.values, self.vectors = torch.linalg.eigh(brightness + spots.T @ spots + 0.01 * torch.eye(size**2))

    def forward(self, z: torch.Tensor, times: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        alpha, sigma = self.products[times[0]].sqrt(), (1 - self.products[times[0]]).sqrt()
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)
        x = (z.flatten(2) @ self.vectors * gain @ self.vectors.T).reshape(z.shape)
        eps = (z - alpha * x) / sigma
        return ({"eps": eps, "v": alpha * eps - sigma * x, "x": x}[self.prediction],)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_perfect_unets_are_told_apart(prediction, zero_snr):
    """ε and v with certainty, and zero terminal SNR of v; a prediction of x is not taken for one of v."""
    found = measure(PerfectUnet(prediction, zero_snr=zero_snr))
    assert found.prediction == (None if prediction == "x" else prediction)
    assert found.zero_snr == (zero_snr if prediction == "v" else None)
    assert abs(found.coefficient - (prediction == "eps")) < 0.1
    assert ("cannot tell" in str(found)) == (prediction == "x")


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "zero_snr"), KINDS)
def test_trained_unets_are_told_apart(prediction, zero_snr):
    """What benchmarks/eps_or_v.py counts on forty models: ε and v are right, and zero terminal SNR is not wrong."""
    found = measure(trained(prediction, zero_snr, seed=0, updates=160))
    assert found.prediction == prediction
    assert found.zero_snr in (zero_snr, None)


def test_the_configurations_for_the_test_are_those_of_the_families():
    """Their numbers of parameters are those of the published UNets."""
    expected = {
        "Stable Diffusion 1.5": 859_520_964,
        "Stable Diffusion 2": 865_910_724,
        "Stable Diffusion XL": 2_567_463_684,
    }
    for name, count in expected.items():
        with torch.device("meta"):
            unet: Any = diffusers.UNet2DConditionModel(**CONFIGS[name])
        assert sum(parameter.numel() for parameter in unet.parameters()) == count


def _inpainting() -> None:
    sparse("a.safetensors", {**ONE, "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)})


def _truncated() -> None:
    sparse("a.safetensors", ONE)
    Path("a.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-1])


def _xl() -> None:
    sparse("a.safetensors", XL)


def _lora() -> None:
    save_file(lora("peft", 768), "a.safetensors")


def _in_the_way() -> None:
    _xl()
    Path("b.safetensors").write_bytes(b"mine")


REPAIR = "--repair b.safetensors"
BAD: dict[str, tuple[Callable[[], None], str, int, str]] = {
    "truncated": (_truncated, "", 1, "a.safetensors cannot be read"),
    "nothing said": (_xl, REPAIR, 1, "nothing in a.safetensors says what it predicts"),
    "in place": (_xl, "--repair a.safetensors", 2, "need the name of another"),
    "eps, zero SNR": (_xl, f"{REPAIR} --prediction eps --zero_snr", 2, "says nothing at the last level"),
    "inpainting": (_inpainting, f"{REPAIR} --prediction v", 1, "Stable Diffusion 1.5, inpainting"),
    "test of inpainting": (_inpainting, "--test", 1, "only UNets of Stable Diffusion can be tested"),
    "test of a LoRA": (_lora, "--test", 1, "is a LoRA, which predicts what its base does"),
    "useless": (_xl, "--zero_snr", 2, "--zero_snr has no effect without --repair"),
    "not theirs": (_in_the_way, f"{REPAIR} --prediction v --overwrite", 1, "is not a repaired file that vdiff wrote"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(tmp_path, name):
    change, flags, code, message = BAD[name]
    change()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    assert message in error(f"vdiff inspect a.safetensors {flags}", code)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_the_configuration_of_a_family_loads_its_unet(monkeypatch):
    """A file alone is enough where its sizes are usual: here tiny ones stand for those of XL."""
    single_file("sdxl", Path("model.safetensors"))
    model = recognise(Path("model.safetensors"))
    monkeypatch.setitem(predicts.CONFIGS, "Stable Diffusion XL", json.loads(json.dumps(UNETS["sdxl"])))
    found = predicts.evaluated(replace(model, usual_sizes=True), None)
    assert found == predicts.evaluated(model, pipeline("sdxl"))


def test_other_files_are_named():
    save_file({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(2, 2)}, "lora.safetensors")
    assert inspected("lora.safetensors")["what"] == "a LoRA of FLUX, named as by kohya's scripts"
    assert inspected("lora.safetensors")["programs"] == []
    save_file({"network.unet.model.conv_in.lora_A.weight": torch.zeros(2, 2)}, "ours.safetensors")
    assert inspected("ours.safetensors")["what"] == "the weights of a vdiff checkpoint: inspect its folder"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, "flux.safetensors")
    assert inspected("flux.safetensors")["what"] == "FLUX"
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2)}, "text.safetensors")
    assert inspected("text.safetensors")["what"] == "a text encoder"
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    assert inspected("other.safetensors")["what"] == "unknown: 1 tensors, a, …"
