"""Pictures of prompts: equal to those of diffusers' own pipelines, by sample.py and in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import vdiff
from tests.commands import done, error
from tests.oracles import randn
from tests.pipelines import pipeline
from vdiff.data.datasets import open_dataset
from vdiff.errors import VdiffError
from vdiff.interop.diffusers.reading import import_pipeline
from vdiff.models.wrapped import DiffusersBackbone

PROMPTS = ["a red fox, watercolour", "a happy face", "photo of a small house in the snow"]
SAMPLE = "sample.py --device cpu --num_timesteps 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imported pipelines."""
    folder = tmp_path_factory.mktemp("text")
    for kind in ("sd15", "sd2", "sdxl"):
        import_pipeline(str(pipeline(kind)), folder / kind)
    import_pipeline(str(pipeline("sd2")), folder / "zero", zero_snr=True)
    return folder


def theirs(kind: str, prompts: list[str], noise: Tensor, *, zero_snr: bool = False, **call: Any) -> Tensor:
    """Pictures (n, 3, 64, 64) in [−1, 1] of diffusers' pipeline, by DDIM with trailing timesteps."""
    whole = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    whole.set_progress_bar_config(disable=True)
    whole.scheduler = diffusers.DDIMScheduler.from_config(
        whole.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        rescale_betas_zero_snr=zero_snr,
    )
    drawn: Tensor = whole(prompts, latents=noise, output_type="pt", **call).images
    return drawn * 2 - 1


CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "guided": ("sd15", {"guidance": 4.0}, {"guidance_scale": 5.0}),
    "negative": (
        "sd15", {"guidance": 6.5, "negative_prompt": "a sad black cat"},
        {"guidance_scale": 7.5, "negative_prompt": ["a sad black cat"] * 3},
    ),
    "plain": ("sd2", {"guidance": 0.0}, {"guidance_scale": 1.0}),
    "v": (
        "sd2", {"guidance": 2.0, "negative_prompt": "rain"}, {"guidance_scale": 3.0, "negative_prompt": ["rain"] * 3}
    ),
    "zero": ("zero", {"guidance": 2.0}, {"guidance_scale": 3.0}),
    "xl": ("sdxl", {"guidance": 4.0}, {"guidance_scale": 5.0}),
    "xl negative": (
        "sdxl", {"guidance": 4.0, "negative_prompt": "a sad cat"},
        {"guidance_scale": 5.0, "negative_prompt": ["a sad cat"] * 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_pictures_equal_those_of_the_pipelines(place, name):
    """By DDIM from the same noise: prompts, negative prompts, pooled vectors, time ids, guidance, decoded latents."""
    kind, ours, call = CALLS[name]
    noise = randn(3, 4, 8, 8, dtype=torch.float32)
    drawn = vdiff.load(place / kind, device="cpu").sample(prompts=PROMPTS, noise=noise, steps=5, **ours)
    is_zero = kind == "zero"
    expected = theirs("sd2" if is_zero else kind, PROMPTS, noise, zero_snr=is_zero, num_inference_steps=5, **call)
    torch.testing.assert_close(torch.Tensor(drawn), expected, rtol=0, atol=1e-4)
    assert drawn.std() > 0.01


def test_pictures_depend_on_prompts_negative_prompts_and_seeds(place):
    """Image k has the seed's noise of number k, and the prompts in turn; the prompts are encoded once."""
    model = vdiff.load(place / "sd15", device="cpu")

    def draw(num: int | None = None, **options: Any) -> Tensor:
        return torch.Tensor(model.sample(num, steps=2, **options))

    drawn = draw(prompts=PROMPTS[:2])
    assert drawn.shape == (2, 3, 64, 64)
    four = draw(4, prompts=PROMPTS[:2], batch_size=3)
    torch.testing.assert_close(four[:2], drawn, rtol=0, atol=1e-4)
    again = draw(3, prompts=PROMPTS[0])
    torch.testing.assert_close(again[2], four[2], rtol=0, atol=1e-4)
    for other in (
        draw(prompts=PROMPTS[1:3]),
        draw(prompts=PROMPTS[:2], negative_prompt="rain"),
        draw(prompts=PROMPTS[:2], seed=1),
    ):
        assert (other - drawn).abs().mean() > 1e-3
    torch.testing.assert_close(draw(prompts=PROMPTS[:2], guidance=6.5), drawn, rtol=0, atol=0)


def test_what_a_text_model_predicts_of_noisy_latents(place):
    """`denoise` asks the network itself; a negative prompt is what guidance moves away from."""
    model, z = vdiff.load(place / "sd2", device="cpu"), randn(2, 4, 8, 8, dtype=torch.float32)
    v, v_other = (model.denoise(z, 0.5, prompts=[prompt]).v for prompt in PROMPTS[:2])
    guided = model.denoise(z, 0.5, prompts=PROMPTS[:1], negative_prompt=PROMPTS[1], guidance=2.0).v
    torch.testing.assert_close(guided, v + 2 * (v - v_other), rtol=0, atol=1e-5)
    assert isinstance(model.network.unet, DiffusersBackbone)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "heun"])
def test_every_sampler_draws_latents_without_clipping_them(place, sampler):
    model = vdiff.load(place / "sd2", device="cpu")
    drawn = torch.Tensor(model.sample(prompts=PROMPTS[:1], steps=3, sampler=sampler))
    assert drawn.isfinite().all()
    with pytest.raises(VdiffError, match="clipping_value is for pixels"):
        model.sample(prompts=PROMPTS[:1], steps=3, sampler=sampler, clipping_value=1.0)


def pixels(path: Path) -> Tensor:
    with PIL.Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_sample_py_draws_prompts_and_says_what_it_chose(place, tmp_path, monkeypatch):
    """The pictures are those of Python; the grid has the prompts; the captions lie beside the pictures."""
    monkeypatch.chdir(tmp_path)
    prompts = " ".join(f"--prompt '{prompt}'" for prompt in PROMPTS[:2])
    line = f"{SAMPLE} --checkpoint {place}/sdxl {prompts} --negative_prompt rain --num 4 --out drawn"
    said = done(line).output
    assert "guidance 4 as in diffusers' pipelines, scale 5; --guidance 0: none" in said
    drawn = vdiff.load(place / "sdxl", device="cpu").sample(4, prompts=PROMPTS[:2], negative_prompt="rain", steps=2)
    for k, image in enumerate(drawn.to_pil()):
        difference = pixels(Path(f"drawn/{k:05d}.png")).int() - torch.from_numpy(np.array(image)).permute(2, 0, 1).int()
        assert difference.abs().max() <= 1
    rows = [json.loads(line) for line in Path("drawn/metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"{k:05d}.png", "text": PROMPTS[k % 2]} for k in range(4)]
    assert json.loads(Path("drawn/samples.json").read_text())["prompts"] == PROMPTS[:2]
    assert Path("drawn.grid.png").exists()
    assert "already holds all 4 images" in done(line).output
    assert "with negative_prompt rain, not none" in error(line.replace("--negative_prompt rain", ""), 1)
    assert "with prompts" in error(line.replace(PROMPTS[1], "a dog"), 1)
    scale = line.replace("--num 4", "--guidance_scale 5 --json")
    result = json.loads(done(scale.replace("drawn", "scaled")).stdout)
    assert (result["guidance"], result["num"], result["prompts"]) == (4, 2, PROMPTS[:2])


def test_prompts_of_a_file_become_a_captioned_dataset(place, tmp_path, monkeypatch):
    """One image for each line that is not blank; paths and trajectories work too."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red fox\n\n  a happy face  \nein gelber Löwe\n", encoding="utf-8")
    flags = f"--checkpoint {place}/sd15 --prompts prompts.txt"
    done(f"{SAMPLE} {flags} --trajectory --out drawn.lmdb")
    dataset = open_dataset(Path("drawn.lmdb"))
    assert [dataset.caption(k) for k in range(3)] == ["a red fox", "a happy face", "ein gelber Löwe"]
    assert dataset.meta.num_captions == 3
    assert Path("drawn.lmdb.trajectory.png").exists()
    done(f"{SAMPLE} {flags} --out drawn.zip")
    done(f"{SAMPLE} {flags} --interpolate 0 1 --num 3 --out path")
    rows = [json.loads(line)["text"] for line in Path("path/metadata.jsonl").read_text().splitlines()]
    assert rows == ["a red fox", "a red fox", "a happy face"]


def test_a_long_prompt_is_cut_and_said(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = " ".join(["red"] * 75 + ["small", "fox"])
    said = done(f"{SAMPLE} --checkpoint {place}/sd15 --prompt '{prompt}' --num 1").output.splitlines()
    (line,) = (line for line in said if "cut off" in line)
    assert line == "prompt 'red red red red red …': 'small fox' is cut off (77 tokens)"
    assert max(len(line) for line in said if "cut off" in line or "--guidance" in line) <= 80
    with pytest.warns(UserWarning, match="'small fox' is cut off"):
        vdiff.load(place / "sd15", device="cpu").sample(prompts=[prompt], steps=1)


def test_another_autoencoder_and_moved_parts_may_be_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline("sd15"), "theirs")
    shutil.copytree(pipeline("sdxl") / "vae", "other")
    import_pipeline("theirs", Path("sd"))
    Path("theirs").rename("moved")
    line = f"{SAMPLE} --checkpoint sd --prompt 'a red fox' --num 1"
    assert "no such folder; restore the folder, or point to it with --components FOLDER" in error(line, 1)
    done(f"{line} --components moved --out one")
    done(f"{line} --components moved --vae other --out two")
    assert not torch.equal(pixels(Path("one/00000.png")), pixels(Path("two/00000.png")))
    assert "with vae" in error(f"{line} --components moved --out two", 1)


BAD = [
    ("--checkpoint sd15", 2, "--prompt: this is a text-to-image model, and no prompt is given"),
    ("--checkpoint sd15 --prompt a --prompts file", 2, "--prompt and --prompts exclude each other"),
    ("--checkpoint sd15 --prompts nowhere", 2, "--prompts nowhere cannot be read"),
    ("--checkpoint sd15 --prompts binary", 2, "--prompts binary cannot be read: it is not UTF-8 text"),
    ("--checkpoint sd15 --prompts empty", 2, "--prompts empty has no prompt"),
    ("--checkpoint sd15 --prompt a --sampler clipped", 2, "--sampler clipped: the sampler clipped is for pixels"),
    ("--checkpoint sd15 --prompt a --clipping_value 1", 2, "clipping_value is for pixels"),
    ("--checkpoint sd15 --prompt a --guidance 1 --guidance_scale 2", 2, "--guidance and --guidance_scale exclude"),
    ("--checkpoint sd15 --prompt a --classes 1", 2, "--classes"),
    ("--checkpoint sd15 --prompt a --vae empty_folder", 1, "empty_folder holds no autoencoder"),
    ("--checkpoint sd15 --prompt a --components empty_folder", 1, "empty_folder holds no text encoder"),
    ("--checkpoint zero --prompt a --num_timesteps 1001", 2, "1001"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD)
def test_bad_input_is_refused_in_one_line(place, tmp_path, monkeypatch, flags, code, message):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("empty").write_text("\n \n")
    Path("empty_folder").mkdir()
    line = f"{SAMPLE.replace(' --num_timesteps 2', '')} {flags.replace('--checkpoint ', f'--checkpoint {place}/')}"
    before = sorted(tmp_path.rglob("*"))
    assert message in error(line, code)
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_tells_what_a_text_model_is(place):
    said = done(f"vdiff inspect {place}/sdxl").output
    for words in ("UNet2DConditionModel", "CLIPTextModelWithProjection of 48", "4 × 8 × 8"):
        assert words in said
    values = json.loads(done(f"vdiff inspect {place}/sdxl --json").stdout)
    assert values["components"]["path"] == str(pipeline("sdxl"))
