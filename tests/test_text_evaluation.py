"""Evaluation of text-to-image models: prompts and captions, guidance, several processes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import vdiff
from tests.commands import done, error, image_of
from tests.evaluating import figures
from tests.pipelines import pipeline
from tests.programs import ends, launch
from tests.text_training import CAPTIONS, PIXELS, write_captioned, write_text_checkpoint
from tests.toy import Watcher, signal_at, write_checkpoint, write_dataset
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter
from vdiff.distributed import Processes, join
from vdiff.errors import Interrupted, VdiffError
from vdiff.evaluation import samples
from vdiff.evaluation.clip import ClipScore
from vdiff.evaluation.features import pixel_vectors
from vdiff.evaluation.measure import evaluate, measure_quality
from vdiff.evaluation.metrics import KernelDistance
from vdiff.evaluation.reference import ReferenceImages
from vdiff.evaluation.results import Evaluation
from vdiff.models.codec import from_uint8, to_uint8

NUM = 12
PROMPTS = ("a red fox", "a sad cat, watercolour", "photo of the sea")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data, prompts and one evaluation."""
    folder = tmp_path_factory.mktemp("text-evaluation")
    for kind in ("sd15", "sdxl"):
        write_text_checkpoint(folder / kind, kind)
    write_captioned(folder / "data", count=20)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    measured(folder)
    return folder


def measured(folder: Path, **changes: Any) -> Evaluation:
    """`evaluate` sd15 in 2 steps on captions, in pieces of about 4 samples."""
    samples.SLOW_IMAGES = 4
    values: dict[str, Any] = {
        "num_timesteps": (2,), "n": NUM, "seed": 3, "metrics": ("kd", "nearest"), "device": "cpu",
        "cache": folder / "cache", "out": folder / "out.json",
    }  # fmt: skip
    checkpoints = changes.pop("checkpoints", [folder / "sd15"])
    data = changes.pop("data", folder / "data")
    return evaluate(checkpoints, data, **values | changes)


def main() -> None:
    """One of several processes."""
    measured(Path(), processes=join("cpu"), reporter=Watcher())


def pictures_of(folder: Path, prompts: tuple[str, ...], **options: Any) -> torch.Tensor:
    """Decoded samples, rounded as in PNG files."""
    drawn = vdiff.load(folder, device="cpu").sample(
        NUM, prompts=prompts, steps=2, seed=3, batch_size=samples.SLOW_BATCH_SIZE, **options
    )
    return from_uint8(to_uint8(torch.Tensor(drawn)))


def kernel_distance(images: torch.Tensor, data: Path) -> float:
    store = ImageStore(data)
    pixels = np.stack([np.array(image_of(store, PIXELS, k)) for k in range(len(store))])
    reference = pixel_vectors(from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    return KernelDistance(reference)(pixel_vectors(images)).value


def test_samples_are_decoded_pictures_of_the_captions_with_the_usual_guidance(place):
    found = Evaluation.read(place / "out.json")
    (row,) = found.rows
    captions = tuple(ReferenceImages(place / "data", PIXELS).captions(NUM, 3).values())
    expected = kernel_distance(pictures_of(place / "sd15", captions), place / "data")
    assert row.metrics["kd"].value == pytest.approx(expected, rel=1e-5)
    assert (row.guidance, row.evaluations) == (6.5, 4)
    assert found.prompts == "12 captions of the data, in random order"
    other = kernel_distance(pictures_of(place / "sd15", captions[::-1]), place / "data")
    assert abs(other / expected - 1) > 1e-3, "the order of the prompts matters"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd15", {"guidance": 0.0}),
        ("sdxl", {"negative_prompt": "a sad cat"}),
        ("sdxl", {"guidance": 1.5}),
    ],
)
def test_prompts_are_drawn_in_turn_as_by_sample_py(place, tmp_path, kind, options):
    found = measured(place, checkpoints=[place / kind], prompts=PROMPTS, out=tmp_path / "out.json", **options)
    expected = kernel_distance(pictures_of(place / kind, PROMPTS, **options), place / "data")
    assert found.rows[0].metrics["kd"].value == pytest.approx(expected, rel=1e-5)
    assert found.prompts == "3 prompts in turn"


def test_checkpoints_are_compared_with_the_same_prompts_and_noise(place, tmp_path):
    """The teacher is the model itself: no sample differs from it."""
    found = measured(place, metrics=("kd", "rmse"), teacher=place / "sd15", teacher_steps=2, out=tmp_path / "out.json")
    assert found.rows[0].metrics["rmse"].value < 1e-5
    both = measured(place, checkpoints=[place / "sdxl", place / "sd15"], out=tmp_path / "both.json")
    assert [row.guidance for row in both.rows] == [4, 6.5]
    assert both.rows[1].metrics["kd"] == Evaluation.read(place / "out.json").rows[0].metrics["kd"]


def test_captions_are_a_seeded_order_of_the_images_that_have_one(tmp_path):
    data = tmp_path / "some"
    data.mkdir()
    writer, plain = StoreWriter(data, DatasetMeta("some", (PIXELS,), 3)), write_captioned(tmp_path / "plain", count=1)
    for k in range(40):
        image = {PIXELS: ImageStore(plain).encoded(PIXELS, 0)}
        writer.add(image, None, f"first {k}\nsecond {k}" if k % 4 else "")
    writer.finish({"images": 40, "captions": 30})
    images = ReferenceImages(data, PIXELS)
    found = images.captions(100, 0)
    assert sorted(found) == [k for k in range(40) if k % 4]
    assert list(found) != sorted(found), "in random order"
    assert {text.split()[0] for text in found.values()} == {"first", "second"}
    assert all(text.split()[1] == str(k) for k, text in found.items())
    assert images.captions(100, 0) == found
    assert list(images.captions(7, 0)) == list(found)[:7]
    assert list(images.captions(100, 1)) != list(found)


def test_a_signal_leaves_what_the_same_call_goes_on_with(place, tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(Interrupted, match="the same command continues"):
        measured(place, out=out, reporter=signal_at(8, bar="sd15, ddim, 2 steps"))
    watcher = Watcher()
    assert figures(measured(place, out=out, reporter=watcher).rows) == figures(Evaluation.read(place / "out.json").rows)
    assert ("sd15, ddim, 2 steps", NUM, 4) in watcher.bars


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place, tmp_path):
    for name in ("sd15", "data"):
        (tmp_path / name).symlink_to(place / name)
    codes, _, stderr = ends(launch(main, tmp_path))
    assert codes == [0, 0], stderr
    one, two = (Evaluation.read(folder / "out.json") for folder in (place, tmp_path))
    assert figures(two.rows) == [{**row, "checkpoint": "sd15"} for row in figures(one.rows)]


# CLIP score


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with random weights, and its processor."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(pipeline("sd15") / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 12}
    vision = {**size, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def clip_scores(folder: Path, pictures: list[PIL.Image.Image], prompts: list[str]) -> np.ndarray:
    """By transformers: 100 · the cosine of projected and normalised features of one picture and one text at a time."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    found = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        pixels = processor(images=picture, return_tensors="pt")
        words = processor(text=prompt, return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(**pixels).pooler_output)[0]
            b = model.text_projection(model.text_model(**words).pooler_output)[0]
        found.append(100 * max(float(torch.cosine_similarity(a, b, dim=0)), 0))
    return np.array(found)


def pil(image: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy())


def mean_and_half(scores: np.ndarray) -> tuple[float, float]:
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
    return pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half), abs=1e-3)


LONG = "a small red fox and a large blue bird in the snow with a happy cat on a boat"


def test_clip_scores_are_those_of_transformers(place, clip):
    """For each picture: of a long prompt, and where the cosine is negative."""
    prompts = [*PROMPTS, *CAPTIONS, LONG, "", "rain", "boat"]
    images = pictures_of(place / "sd15", tuple(prompts))
    scores = ClipScore(clip)(to_uint8(images), prompts)
    expected = clip_scores(clip, list(map(pil, images)), prompts)
    assert 0 < (expected == 0).sum() < len(expected)
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_the_clip_score_of_a_model_and_of_its_data(place, clip, tmp_path):
    found = measured(place, metrics=("clip",), clip=clip, out=tmp_path / "out.json").rows[0].metrics
    captions = ReferenceImages(place / "data", PIXELS).captions(NUM, 3)
    images = pictures_of(place / "sd15", tuple(captions.values()))
    scores = clip_scores(clip, list(map(pil, images)), list(captions.values()))
    assert (found["clip"].value, found["clip"].low, found["clip"].high) == mean_and_half(scores)
    store = ImageStore(place / "data")
    pictures = [PIL.Image.fromarray(np.array(image_of(store, PIXELS, k))) for k in captions]
    of_data = clip_scores(clip, pictures, list(captions.values()))
    assert found["clip_data"].value == pytest.approx(of_data.mean(), abs=1e-3)
    assert abs(scores.mean() - of_data.mean()) > 0.01
    other = shutil.copytree(clip, tmp_path / "other")
    (other / "added_tokens.json").write_text("{}")
    with pytest.raises(VdiffError, match="another evaluation"):
        measured(place, metrics=("clip",), clip=other, out=tmp_path / "out.json")


def test_samples_made_earlier_are_scored(place, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--device cpu --num_timesteps 2 --seed 3 --num 5 --guidance 0 --out drawn"
    done(f"sample.py --checkpoint {place}/sd15 --prompts {place}/prompts.txt {flags}")
    pictures = [PIL.Image.open(f"drawn/{k:05d}.png").convert("RGB") for k in range(5)]
    scores = clip_scores(clip, pictures, [PROMPTS[k % 3] for k in range(5)])
    (row,) = json.loads(done(f"vdiff evaluate drawn --clip {clip} --device cpu --json").stdout)["rows"]
    assert (row["samples"], row["n"]) == ("drawn", 5)
    assert tuple(row["clip"].values()) == mean_and_half(scores)
    assert re.search(rf"drawn +5 +{scores.mean():.0f} ±", done(f"vdiff evaluate drawn --clip {clip}").stdout)
    for line, message in {
        "vdiff evaluate drawn": "drawn holds samples, which only a CLIP model can score; give --clip FOLDER",
        f"vdiff evaluate drawn {place}/sd15 --clip {clip}": "drawn holds samples, and",
        f"vdiff evaluate drawn --clip {clip} --seed 1": "--seed does not apply to the samples in drawn",
        "vdiff evaluate drawn --clip nowhere": "--clip nowhere: no such folder; give a folder with a CLIPModel",
    }.items():
        assert message in error(line, 2 if "nowhere" not in line else 1)
    Path("drawn/00002.png").write_bytes(b"no picture")
    assert "drawn/00002.png cannot be read" in error(f"vdiff evaluate drawn --clip {clip}", 1)


# Bad input and the command


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("sd15 --data plain", 1, "plain has no captions to use as prompts; give --prompts FILE"),
        ("sd15 --prompts nowhere", 2, "--prompts nowhere cannot be read"),
        ("sd15 --prompts empty", 2, "--prompts empty has no prompt"),
        ("sd15 --samplers ddim,clipped", 2, "--samplers clipped: sd15: the sampler clipped is for pixels"),
        ("sd15 --guidance 1 --guidance_scale 2", 2, "--guidance and --guidance_scale exclude each other"),
        ("sd15 --metrics clip", 2, "--metrics clip needs a CLIP model; give --clip FOLDER"),
        ("sd15 --clip nowhere --metrics kd,clip", 1, "--clip nowhere: no such folder"),
        ("sd15 --clip plain --metrics kd,clip", 1, "--clip plain cannot be used: it has no weights in safetensors"),
        ("sd15 --clip clip --metrics kd", 2, "--clip has no effect, as --metrics leaves clip out; add clip"),
        ("sd15 --components plain", 1, "plain holds no text encoder"),
        ("sd15 --vae plain", 1, "plain holds no autoencoder"),
        ("sd15 toy", 1, "sd15 generates images of 64×64 with 3 channels, but toy of 4×4"),
        ("sd15 --data small", 1, "has no images of size 64"),
        ("toy --data small --negative_prompt rain", 2, "--negative_prompt: toy takes no prompts; leave it out"),
        ("toy --data small --prompts prompts.txt", 2, "--prompts: toy takes no prompts; leave it out"),
        ("toy --data small --clip clip", 2, "--clip: toy takes no prompts; leave it out"),
    ],
)
def test_bad_input_is_refused_in_one_line(place, clip, tmp_path, monkeypatch, flags, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("sd15", "data", "prompts.txt"):
        Path(name).symlink_to(place / name)
    Path("clip").symlink_to(clip)
    write_checkpoint(Path("toy"))
    write_dataset(Path("small"), count=20)
    write_captioned(Path("plain"), captions=False)
    Path("empty").write_text(" ")
    data = "" if "--data" in flags else "--data data"
    metrics = "" if "--metrics" in flags or "--clip" in flags else "--metrics kd"
    assert message in error(f"vdiff evaluate {flags} {data} {metrics} --num 10 --out out.json", code)
    assert not list(Path().glob("*out.json*"))


def test_the_command_says_what_was_drawn(place, clip, tmp_path):
    line = f"vdiff evaluate {place}/sd15 --data {place}/data --clip {clip} --metrics kd,clip --num 10 --device cpu"
    (place / "long.txt").write_text(f"a red fox\n{LONG * 6}\n")
    flags = f"--num_timesteps 1 --prompts {place}/long.txt --negative_prompt rain --out {tmp_path}/a.json"
    said = done(f"{line} {flags}").stdout
    assert "samples    10 a row, seed 0, uniform grid, guidance 6.5, cpu" in said
    assert "prompts    2 prompts in turn; negative prompt 'rain'" in said
    assert "note       1 of 2 prompts are longer than 77 tokens and are cut." in said
    assert "CLIP score" in said
    scaled = done(f"{line} --num_timesteps 1 --guidance_scale 1 --out {tmp_path}/b.json").stdout
    assert "prompts    10 captions of the data, in random order" in scaled
    assert "guidance" not in scaled
    assert "data       CLIP score of images and their captions: " in scaled


def test_the_quality_of_a_text_model_is_that_of_captions(monkeypatch, tmp_path):
    """As soon as the budget allows as many samples as the pixels have dimensions; guidance counts twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_text_checkpoint(tmp_path / "sd2", "sd2")
    few = write_captioned(tmp_path / "few", count=10)
    cpu = Processes(torch.device("cpu"))
    assert measure_quality(tmp_path / "sd2", few, 191 * 64, processes=cpu, reporter=Watcher()) is None
    with pytest.raises(VdiffError, match="few holds 10 images, fewer than the 192 dimensions"):
        measure_quality(tmp_path / "sd2", few, 192 * 64, processes=cpu, reporter=Watcher())
    plain = write_captioned(tmp_path / "plain", count=200, captions=False)
    with pytest.raises(VdiffError, match="has no captions to use as prompts"):
        measure_quality(tmp_path / "sd2", plain, 192 * 64, processes=cpu, reporter=Watcher())


def test_other_prompts_or_guidance_are_another_evaluation(place, tmp_path):
    values: dict[str, Any] = {"out": tmp_path / "out.json", "metrics": ("kd",)}
    measured(place, prompts=PROMPTS, **values)
    for changes in ({"prompts": PROMPTS[:2]}, {}, {"negative_prompt": "rain"}, {"guidance": 6.0}):
        with pytest.raises(VdiffError, match="another evaluation"):
            measured(place, **{"prompts": PROMPTS, **changes} if changes else {}, **values)
    assert measured(place, prompts=PROMPTS, guidance=6.5, **values).rows
