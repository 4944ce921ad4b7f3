"""SD3, FLUX and PixArt of diffusers: their pipelines' pictures, ladders, and LoRAs and folders for diffusers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import TRANSFORMERS, transformer_pipeline
from tests.text_training import write_captioned
from vdiff import api
from vdiff.diffusion.parameterisation import Flow
from vdiff.diffusion.schedules import grid_times
from vdiff.errors import VdiffError
from vdiff.interop.diffusers.flow import read_flow
from vdiff.interop.diffusers.reading import import_pipeline
from vdiff.interop.foreign import JsonFile
from vdiff.models.adapters import ATTENTION, AdapterSettings, adapted_layers
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.components import T5
from vdiff.models.lora_files import read_lora
from vdiff.models.tokenizing import Tokenizers

PROMPTS = ["a red FOX ", "photo of a small house in the snow, blue, " * 8]
FAST = "--num_iters 2 --batch_size 2 --lr 1e-2 --device cpu --check_images 1 --distance_every 0"
NO_BINS = {"clean_caption": False, "use_resolution_binning": False}
SCHEDULER = "scheduler/scheduler_config.json"
SIZED = {"flux": 64, "alpha": 64}
"""Pictures of 64 pixels, where the network's own size is another one."""
SAID = {
    "sd3": "rectified flow, time shift 3, latents 4×8×8, three text encoders",
    "flux": "rectified flow, time shift 1.583, latents 4×8×8, two text encoders, guidance as an input",
    "alpha": "ε-prediction, trailing, 1000 levels, latents 4×8×8, one text encoder",
    "sigma": "ε-prediction, trailing, 1000 levels, latents 4×8×8, one text encoder",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    diffusers.utils.logging.set_verbosity_error()


def drawn_by(pipe: Any, noise: Tensor, monkeypatch: pytest.MonkeyPatch, steps: int, **call: Any) -> Tensor:
    """Pictures of a pipeline of diffusers, or of the one in a folder, from this noise and at our noise levels."""
    if isinstance(pipe, Path):
        lacks = {} if (pipe / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
        is_sd3 = "StableDiffusion3" in (pipe / "model_index.json").read_text()
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipe, **(lacks if is_sd3 else {}))
    pipe.set_progress_bar_config(disable=True)
    name = type(pipe).__name__
    call |= {"sigmas": np.linspace(1, 1 / steps, steps)} if name == "StableDiffusion3Pipeline" else {}
    call |= NO_BINS if name.startswith("PixArt") else {}
    monkeypatch.setattr(f"{type(pipe).__module__}.randn_tensor", lambda *_, **__: noise.clone())
    pictures: Any = pipe(num_inference_steps=steps, height=64, width=64, output_type="pt", **call).images
    return torch.as_tensor(pictures) * 2 - 1


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_prompts_draw_the_pictures_of_the_pipeline(kind, monkeypatch):
    root = transformer_pipeline(kind)
    made = import_pipeline(str(root), Path("model"), image_size=SIZED.get(kind))
    assert made.preflight == SAID[kind]
    assert any("learned variance is left out" in note for note in made.remarks) == (kind in ("alpha", "sigma"))
    model, noise = api.load("model"), randn(2, 4, 8, 8, dtype=torch.float32)
    ours = model.sample(noise=noise, steps=4, prompts=PROMPTS)  # guidance as in the pipeline
    assert (ours[0] - model.sample(noise=noise[:1], steps=4, prompts=PROMPTS[1:])[0]).abs().max() > 0.01
    theirs = drawn_by(root, noise, monkeypatch, 4, prompt=PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    other = model.sample(noise=noise, steps=4, prompts=PROMPTS, guidance=1.0)
    assert (other - ours).abs().max() > 1e-3
    torch.testing.assert_close(
        other, drawn_by(root, noise, monkeypatch, 4, prompt=PROMPTS, guidance_scale=2.0), rtol=0, atol=1e-4
    )
    if kind != "flux":
        ours = model.sample(noise=noise, steps=4, prompts=PROMPTS, negative_prompt="a sad cat")
        theirs = drawn_by(root, noise, monkeypatch, 4, prompt=PROMPTS, negative_prompt=["a sad cat"] * 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), [("sd3", {"has_t5": False}), ("flux", {"shards": True})])
def test_an_sd3_without_t5_and_a_t5_in_parts(kind, options, monkeypatch):
    """What is copied is enough: the parts are those of the published pipelines."""
    root = transformer_pipeline(kind, **options)
    import_pipeline(str(root), Path("model"), image_size=64, copy=True)
    noise = randn(1, 4, 8, 8, dtype=torch.float32)
    ours = api.load("model").sample(noise=noise, steps=2, prompts=PROMPTS[:1])
    theirs = drawn_by(root, noise, monkeypatch, 2, prompt=PROMPTS[:1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if options.get("shards"):
        parts = sorted(Path("model/components/text_encoder_2").glob("*-of-*.safetensors"))
        assert len(parts) > 1
        parts[0].unlink()
        with pytest.raises(VdiffError, match="other text encoders, tokenizers or autoencoder"):
            load_checkpoint("model")


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_loras_of_a_flow_go_to_diffusers(kind, monkeypatch):
    """A ladder by the commands to one step; plain diffusers draws the student with the LoRA, and as a whole."""
    root, noise = transformer_pipeline(kind), randn(1, 4, 8, 8, dtype=torch.float32)
    write_captioned(Path("data"), count=4)
    size = "--image_size 64" if kind in SIZED else ""
    assert f"base: {SAID[kind]}" in done(f"vdiff import diffusers {root} --out models/base {size}").output
    if kind == "flux":
        line = f"distill.py --base models/base --data data --lora_rank 2 --guidance_scale 3 {FAST}"
        assert "takes the scale as an input, 1 to 10" in error(line, 2)
    scale = "" if kind == "flux" else "--guidance_scale 3"
    done(f"distill.py --base models/base --data data {scale} --teacher_steps 4 --to_steps 1 --lora_rank 2 {FAST}")
    students = sorted(Path("models").glob("base_*"))
    assert [read_config(path).num_timesteps for path in students] == [2, 1]
    assert "SD3" in (said := done(f"vdiff inspect {students[-1]}").output) or "Flux" in said
    student = api.load(students[-1])
    ours = student.sample(noise=noise, prompts=PROMPTS[:1])
    assert (ours - api.load("models/base").sample(noise=noise, prompts=PROMPTS[:1], steps=1)).abs().max() > 1e-3

    done(f"vdiff export lora {students[-1]} fox.safetensors")
    assert "load_lora_weights" in (page := Path("README.md").read_text())
    assert "num_inference_steps=1" in page
    assert "DDIMScheduler" not in page
    pipe = diffusers.DiffusionPipeline.from_pretrained(root)
    pipe.load_lora_weights("fox.safetensors")
    call = {"prompt": PROMPTS[:1], **({} if kind == "flux" else {"guidance_scale": 1.0})}
    torch.testing.assert_close(ours, drawn_by(pipe, noise, monkeypatch, 1, **call), rtol=0, atol=1e-4)
    settings, tensors = read_lora(Path("fox.safetensors"), read_config("models/base"))
    assert settings.targets == (ATTENTION,)
    assert any("add_k_proj" in name for name in tensors)
    save_file({f"lora_{k}.alpha": torch.ones(1) for k in range(2)}, "kohya.safetensors")
    with pytest.raises(VdiffError, match="is not in the layout of diffusers, the only one"):
        read_lora(Path("kohya.safetensors"), read_config("models/base"))

    done(f"vdiff export diffusers {students[-1]} whole --merge")
    torch.testing.assert_close(ours, drawn_by(Path("whole"), noise, monkeypatch, 1, **call), rtol=0, atol=1e-4)
    done("vdiff import diffusers whole --out again")
    again = api.load("again")
    assert (again.config.num_timesteps, again.config.method) == (1, "progressive")
    assert torch.equal(torch.Tensor(again.sample(noise=noise, prompts=PROMPTS[:1])), torch.Tensor(ours))


def test_a_pixart_is_distilled_and_goes_to_diffusers(monkeypatch):
    """A LoRA as a folder of peft to 2 steps, and a whole student of v, with the sizes that the network takes."""
    root, noise = transformer_pipeline("alpha"), randn(1, 4, 8, 8, dtype=torch.float32)
    write_captioned(Path("data"), count=4)
    import_pipeline(str(root), Path("models/base"), image_size=64)
    ladder = f"distill.py --base models/base --data data --guidance_scale 3 --teacher_steps 4 {FAST}"
    done(f"{ladder} --to_steps 2 --lora_rank 2")
    ours = api.load("models/base_0").sample(noise=noise, prompts=PROMPTS[:1])
    said = error("vdiff export lora models/base_0 fox.safetensors", 1)
    assert "diffusers loads no LoRA file into a PixArtTransformer2DModel; give --format peft" in " ".join(said.split())
    done("vdiff export lora models/base_0 fox --format peft")
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(root)
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "fox/transformer", adapter_name="default")
    call = {"prompt": PROMPTS[:1], "guidance_scale": 1.0}
    torch.testing.assert_close(ours, drawn_by(pipe, noise, monkeypatch, 2, **call), rtol=0, atol=1e-4)
    assert read_lora(Path("fox"), read_config("models/base"))[0].rank == 2
    shutil.rmtree("models/base_0")

    done("vdiff data encode data --base models/base --device cpu --flip")
    assert "latents and text embeddings of" in done(f"{ladder} --to_steps 1").output
    student = max(Path("models").glob("base_*"), key=lambda path: path.name)
    assert (read_config(student).num_timesteps, read_config(student).prediction) == (1, "v")
    done(f"vdiff export diffusers {student} whole")
    ours = api.load(student).sample(noise=noise, prompts=PROMPTS[:1])
    torch.testing.assert_close(ours, drawn_by(Path("whole"), noise, monkeypatch, 1, **call), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [16, 256, 4096])
def test_a_dynamic_shift_is_that_of_the_scheduler(kind, tokens):
    options: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": kind, "max_shift": 1.3}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    shift = calculate_shift(tokens, 256, 4096, 0.5, 1.3)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=shift)
    values = {**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    schedule, _, notes = read_flow(JsonFile("scheduler", values), tokens, is_even=True)
    assert notes == []
    ours = Flow().level(schedule.angle(grid_times(5)[1:])).flip(0)
    torch.testing.assert_close(ours.float(), scheduler.sigmas[:5], rtol=1e-6, atol=0)


def test_the_projections_of_text_get_a_lora():
    import_pipeline(str(transformer_pipeline("sd3")), Path("model"))
    network = load_checkpoint("model")[0].network
    names = adapted_layers(network, AdapterSettings(2, 2.0))
    assert {re.sub(r".*\.attn2?\.", "", name) for name in names if ".transformer_blocks.0." in name} == {
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }


def test_a_tokenizer_of_t5_is_read_from_its_older_file(monkeypatch):
    """The published PixArt pipelines have spiece.model alone."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    root = transformer_pipeline("sigma")
    network = {"unet": {"class": "PixArtTransformer2DModel"}, "text_encoders": [{"class": T5}], "t5_length": 300}
    due = Tokenizers.read(root, network).tokens(PROMPTS)
    described = json.loads((root / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    model = protobuf.ModelProto()
    for k, (piece, score) in enumerate(described):
        model.pieces.add(piece=piece, score=score, type=3 if k < 2 else 2 if k == 2 else 1)
    model.trainer_spec.unk_id, model.trainer_spec.pad_id, model.trainer_spec.eos_id = 2, 0, 1
    shutil.copytree(root / "tokenizer", "theirs/tokenizer")
    Path("theirs/tokenizer/tokenizer.json").unlink()
    Path("theirs/tokenizer/spiece.model").write_bytes(model.SerializeToString())
    found = Tokenizers.read("theirs", network).tokens(PROMPTS)
    assert found.shape == (2, 300)
    assert torch.equal(found, due)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(VdiffError, match=r"need sentencepiece, which is not installed; pip install 'vdiff\[text\]'"):
        Tokenizers.read("theirs", network)


def edited(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("sd3", lambda f: edited(f / SCHEDULER, _class_name="DDIMScheduler"),
         "SD3Transformer2DModel needs FlowMatchEulerDiscreteScheduler: put the scheduler of its training there"),
        ("sigma", lambda f: edited(f / SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
         "needs a scheduler with betas, such as DDIMScheduler"),
        ("sd3", lambda f: shutil.rmtree(f / "text_encoder_3"), "text_encoder_3 is missing; a StableDiffusion3Pipeline"),
        ("sd3", lambda f: edited(f / "text_encoder_3/config.json", architectures=["T5Model"]), "it is a T5Model, only"),
        ("flux", lambda f: (f / "tokenizer_2/tokenizer.json").unlink(), "tokenizer_2 holds no tokenizer of T5"),
    ],
)  # fmt: skip
def test_pipelines_that_do_not_fit_are_refused(kind, change, words):
    shutil.copytree(transformer_pipeline(kind), "theirs")
    change(Path("theirs"))
    with pytest.raises(VdiffError, match=words):
        import_pipeline("theirs", Path("model"))


@pytest.mark.parametrize(("kind", "shift"), [("sd3", "is 3.0"), ("flux", "depends on the size of the picture")])
def test_a_pipeline_of_a_flow_is_inspected(kind, shift):
    said = done(f"vdiff inspect {transformer_pipeline(kind)}").output
    assert f"Pipeline, a rectified flow whose time shift {shift}" in " ".join(said.split())
    assert "eps" not in said


def test_sizes_and_text_encoders_that_a_model_does_not_take_are_refused():
    root = transformer_pipeline("sd3")
    for size in (72, 208):
        with pytest.raises(VdiffError, match=f"--image_size {size}: this model draws multiples of 16 up to 192"):
            import_pipeline(str(root), Path("model"), image_size=size)
    shutil.copytree(root, "theirs")
    other = load_file(root / "text_encoder_3/model.safetensors")
    assert other["shared.weight"].shape[1] == 48
    edited(Path("theirs/transformer/config.json"), joint_attention_dim=64)
    weights = Path("theirs/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    tensors["context_embedder.weight"] = torch.zeros(24, 64)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(VdiffError, match="takes text of 64 channels, its text encoders give 48"):
        import_pipeline("theirs", Path("model"))
    import_pipeline(str(root), Path("model"))
    write_captioned(Path("data"), count=4)
    said = error("train.py --base model --data data --train_text_encoder --num_iters 1 --device cpu --out out", 2)
    assert "takes prompts by T5, which is not trained" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "sigma"])
def test_a_thousand_levels_go_to_four_and_one_steps_as_typed(kind):
    """LoRAs of a flow, whole students of a PixArt, whose ε becomes v."""
    write_captioned(Path("data/pictures"), count=4)
    levels, more = (1024, "--lora_rank 2") if kind == "sd3" else (1000, "")
    done(f"vdiff import diffusers {transformer_pipeline(kind)} --num_timesteps {levels} --out checkpoints/base")
    fast = f"{FAST.replace('1e-2', '1e-6')} {more}"
    for steps in (4, 1):
        done(f"distill.py --base checkpoints/base --guidance_scale 3 --to_steps {steps} {fast}")
        students = {read_config(path).num_timesteps: path for path in Path("checkpoints").glob("base_*")}
        assert min(students) == steps
        assert max(students) >= 500
        assert api.load(students[steps]).sample(prompts=PROMPTS[:1]).isfinite().all()
