"""Image-conditioned models: pairs of images, the network's further channels, training, students, samples, distances."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import vdiff
from tests.commands import TINY, done, run
from tests.oracles import column
from tests.oracles import randn as randn_double
from tests.programs import command, ends, launch
from tests.toy import SIZE, UNET, Watcher, distill_config, run_ladder, run_of, signal_at, train_config
from vdiff.data import store as store_module
from vdiff.data.conversion import ConversionConfig, convert
from vdiff.data.datasets import merge, verify
from vdiff.data.disk_sources import Folder
from vdiff.data.preparation import Part, prepare
from vdiff.data.source import SourceOptions
from vdiff.data.store import DATA_FILE, DatasetMeta, ImageStore, StoreWriter
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import CosineSchedule, diffuse
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.evaluation.measure import evaluate
from vdiff.evaluation.reference import ReferenceImages
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config, save_checkpoint
from vdiff.models.codec import from_uint8
from vdiff.models.condition import IMAGE, Condition, Signature
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw_from
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.base import describe, resolve_training
from vdiff.training.dataset import open_images
from vdiff.training.engine import build_engine
from vdiff.training.objectives import DistillationObjective, StudentState, TrainBatch
from vdiff.training.sample_conditions import sample_conditions
from vdiff.training.step import TrainStep

CONFIG = ConversionConfig(sizes=(4,), channels=1, image_format="png")


def randn(*shape: int, seed: int) -> Tensor:
    return randn_double(*shape, seed=seed).float()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def write_pairs(folder: Path, *, count: int = 12, classes: Sequence[str] = ()) -> Path:
    """A dataset in which each condition is the negative of its image."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    meta = DatasetMeta("pairs", (SIZE,), 1, class_names=tuple(classes), has_conditions=True)
    writer = StoreWriter(folder, meta)
    for k in range(count):
        pixels = generator.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
        label = k % len(classes) if classes else None
        writer.add({SIZE: png(pixels)}, label, conditions={SIZE: png(255 - pixels)})
    writer.finish({"images": count, "skipped": {}, "ignored": {}, "converted": {}})
    return folder


def write_model(folder: Path, data: Path, **changes) -> Denoiser:
    """A checkpoint of a conditioned network with random weights."""
    described = describe(train_config(data, num_timesteps=8), open_images(str(data), SIZE))
    described = CheckpointConfig(**{**vars(described), "num_iters": 6, **changes})
    denoiser = described.build().eval()
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=i))
    save_checkpoint(folder, denoiser.state_dict(), described)
    return denoiser


# Pairs in folders


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """24 images of 8 × 8 pixels in two classes, and the same at a quarter of the pixels, with other suffixes."""
    sharp, small = tmp_path / "sharp", tmp_path / "small"
    for k in range(24):
        name = f"{'ab'[k % 2]}/{k:02d}"
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        for root, suffix, image in (
            (sharp, "png", PIL.Image.fromarray(pixels)),
            (small, "bmp", PIL.Image.fromarray(pixels).resize((4, 4), PIL.Image.Resampling.BOX)),
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / f"{name}.{suffix}")
    return sharp, small


def paired(sharp: Path, small: Path) -> Folder:
    return Folder(sharp, SourceOptions(condition=str(small)))


def test_pairs_are_matched_by_name_and_the_rest_is_counted(folders, tmp_path):
    """A missing, an ambiguous, a damaged condition and one of another shape reject their images, and say why."""
    sharp, small = folders
    (small / "a/00.bmp").unlink()
    PIL.Image.new("L", (4, 4)).save(small / "b/01.png")
    (small / "a/02.bmp").write_bytes(b"BM")
    PIL.Image.new("L", (4, 6)).save(small / "b/03.bmp")
    PIL.Image.new("L", (4, 4)).save(small / "a/99.bmp")
    (small / "notes.txt").write_text("no image")
    report = prepare(paired(sharp, small), tmp_path / "data", CONFIG)
    reasons = {"no condition": 1, "several conditions": 1, "condition not an image": 1, "condition of another shape": 1}
    assert report.skipped == reasons
    assert (report.images, report.ignored["conditions without an image"], report.has_conditions) == (20, 1, True)
    store = ImageStore(tmp_path / "data")
    for k, image in enumerate(store.stretch(0, len(store))):
        number = k + 2 + (k >= 10) * 2  # classes come one after the other, without the four images
        whole = pixels_of((sharp / f"{'ab'[k >= 10]}").joinpath(names(sharp)[k]).read_bytes())
        theirs = PIL.Image.fromarray(whole).resize((4, 4), PIL.Image.Resampling.BOX)
        assert np.array_equal(pixels_of(image.conditions[4]), np.array(theirs)), number  # its own size: not resized
    assert verify(store).is_good
    listed = [json.loads(line) for line in (tmp_path / "data/rejected.jsonl").read_text().splitlines()]
    assert [(each["path"], each["detail"]) for each in listed if each["reason"] == "condition of another shape"] == [
        ("b/03.png", "4×6 for an image of 8×8")
    ]
    with pytest.raises(VdiffError, match=r"a/00.png: no condition; fix it"):
        prepare(paired(sharp, small), tmp_path / "strict", CONFIG, strict=True)


def names(sharp: Path) -> list[str]:
    """The images with one good condition, in the dataset's order."""
    lost = {"a/00.png", "b/01.png", "a/02.png", "b/03.png"}
    found = sorted(path.relative_to(sharp).as_posix() for path in sharp.rglob("*.png"))
    return [name.split("/")[1] for name in found if name not in lost]


@pytest.mark.parametrize(
    ("condition", "cause"),
    [
        ("nowhere", r"--condition .*nowhere is not a folder; give a folder"),
        ("sharp/a", r"--condition .*sharp/a and .*sharp are not separate folders"),
        ("others", r"--condition .*others holds no image that is named like one of PATH; names without suffix"),
    ],
)
def test_folders_that_are_no_pairs_are_refused(folders, tmp_path, condition, cause):
    (tmp_path / "others").mkdir()
    PIL.Image.new("L", (4, 4)).save(tmp_path / "others/00.png")
    with pytest.raises(OptionError, match=cause):
        prepare(paired(folders[0], tmp_path / condition), tmp_path / "data", CONFIG)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "data.partial").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--out data.tar", "tar shards hold no condition images; give an --out without .tar"),
        ("--buckets --bucket_step 4", "--buckets: condition images are prepared as squares"),
    ],
)
@pytest.mark.usefixtures("folders")
def test_datasets_that_hold_no_pairs_refuse_them(monkeypatch, tmp_path, words, cause):
    monkeypatch.chdir(tmp_path)
    result = run(f"prepare_data.py sharp --condition small --size 8 {words}")
    assert result.exit_code == 2
    assert cause in result.stderr


def test_numbered_images_have_no_conditions(tmp_path):
    result = run(f"prepare_data.py digits --condition {tmp_path}")
    assert f"--condition {tmp_path} does not apply to digits; leave it out" in result.stderr


@pytest.mark.parametrize("crop", ["center", "pad", "stretch", "random_resized"])
def test_the_same_part_is_cut_from_both(crop):
    """Both are the same ramps, of two sizes: so are their crops, except for the width of a pixel."""
    config = ConversionConfig(sizes=(8,), channels=3, crop=crop, image_format="png", resample="box", crop_scale=0.6)

    def ramps(width: int, height: int) -> bytes:
        x, y = ((np.arange(n) + 0.5) / n * 250 for n in (width, height))
        return png(np.stack(np.broadcast_arrays(x[None], y[:, None], 100.0), -1).astype(np.uint8))

    for key in "abc":
        found = convert(ramps(96, 64), config, key=key, condition=ramps(48, 32))
        image, condition = (pixels_of(each[8]).astype(int) for each in (found.images, found.conditions))
        assert np.abs(image - condition).max() <= 8
        other = convert(ramps(96, 64), config, key=key, condition=ramps(96, 64))
        assert other.images == other.conditions


def test_a_condition_is_resized_once_from_its_own_pixels():
    """Of 12 × 8 pixels and a condition of 6 × 4, the centre is columns 1 to 4 of the condition."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    for size in (4, 8):
        config = ConversionConfig(sizes=(size,), channels=1, image_format="png", resample="bicubic")
        found = convert(png(np.zeros((8, 12), np.uint8)), config, condition=png(small))
        cut = PIL.Image.fromarray(small).resize((size, size), PIL.Image.Resampling.BICUBIC, box=(1, 0, 5, 4))
        assert np.array_equal(pixels_of(found.conditions[size]), np.array(cut))


def test_a_preparation_of_pairs_continues_with_the_same_bytes(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 5)
    sharp, small = folders
    vdiff.prepare(sharp, out=tmp_path / "whole", size=4, condition=small, channels=1, image_format="png")
    for update in (7, 16):
        with pytest.raises(Interrupted):
            prepare(paired(*folders), tmp_path / "cut", CONFIG, reporter=signal_at(update))
    report = prepare(paired(*folders), tmp_path / "cut", CONFIG)
    assert report.kept
    assert (tmp_path / "cut" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()
    for number in (1, 2):
        prepare(paired(*folders), tmp_path / f"part.{number}", CONFIG, part=Part(number, 2))
    merge([tmp_path / "part.2", tmp_path / "part.1"], tmp_path / "merged")
    assert (tmp_path / "merged" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()
    prepare(Folder(folders[0]), tmp_path / "other", CONFIG, part=Part(2, 2))
    with pytest.raises(VdiffError, match="come from different images or settings"):
        merge([tmp_path / "part.1", tmp_path / "other"], tmp_path / "wrong")


@pytest.mark.usefixtures("folders")
def test_a_dataset_of_pairs_can_be_prepared_again(monkeypatch, tmp_path):
    """With its conditions; `info` and `show` show them."""
    monkeypatch.chdir(tmp_path)
    first = done("prepare_data.py sharp --condition small --size 8 --channels 1 --format png --num_workers 0").stdout
    assert "24 images, each with a condition image, 2 classes, size 8" in first
    done("prepare_data.py data/sharp_8 --size 4 --out data/again --num_workers 0")
    store = ImageStore("data/again")
    assert store.meta.has_conditions
    assert pixels_of(store.condition(4, 0)).shape == (4, 4)
    assert "every image has a condition image" in done("vdiff data info data/again").stdout
    done("vdiff data show data/again --columns 2 --rows 1 --out one.png")
    done("vdiff data show data/sharp_8 --columns 2 --rows 1 --out both.png")
    with PIL.Image.open("one.png") as one, PIL.Image.open("both.png") as both:
        assert one.width > 4 * 72  # two pairs of cells
        assert both.size[0] > 4 * 72


# Batches


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_and_crops_apply_to_both(tmp_path, workers):
    """Each condition is the negative of its image, so it stays that if both are mirrored and cut alike."""
    from vdiff.data.batches import ImageBatches

    store = ImageStore(write_pairs(tmp_path / "pairs", count=20))
    options = {"image_size": SIZE, "batch_size": 8, "seed": 3, "flip": True, "crop": 3, "num_workers": workers}
    batches = ImageBatches(store, **options).start_at(0)
    shares = [ImageBatches(store, **options, rank=k, world_size=2).start_at(0) for k in range(2)]
    for _ in range(4):
        batch, parts = next(batches), [next(share) for share in shares]
        assert batch.images.shape == batch.conditions.shape == (8, 1, 3, 3)
        assert torch.equal(batch.conditions, 255 - batch.images)
        assert torch.equal(torch.cat([part.conditions for part in parts]), batch.conditions)
    for each in (batches, *shares):
        each.close()


# The network


SMALL = {**UNET, "channels": 8, "multipliers": [1, 2], "fold": 2}


def networks(channels: int = 1) -> tuple[UNet, UNet]:
    """A conditioned network, and one whose images have twice the channels, with the same weights."""
    ours = UNet(UNetConfig(channels, channels, image_input=True, **SMALL))
    plain = UNet(UNetConfig(2 * channels, channels, **SMALL))
    for i, parameter in enumerate(ours.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=i))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_the_condition_is_concatenated_to_the_channels():
    ours, plain = networks(3)
    z, image, timestep = randn(2, 3, 8, 8, seed=1), randn(2, 3, 8, 8, seed=2), torch.tensor([3.0, 500.0])
    assert torch.equal(ours(z, timestep, condition_image=image), plain(torch.cat([z, image], 1), timestep))
    assert ours.signature == Signature(3, 3, (IMAGE,), {}, 0, 4)
    with pytest.raises(ValueError, match="needs a condition image"):
        ours(z, timestep)
    again = UNetConfig.from_dict(json.loads(json.dumps(ours.describe())))
    assert again == ours.config
    assert "image_input" not in plain.describe()  # as in earlier versions


def test_one_update_equals_a_hand_written_concatenation(tmp_path):
    """The gradient of an update is that of the mean of w ‖x − x̂‖², with the network called by hand."""
    config = train_config(write_pairs(tmp_path / "pairs"), dropout=0.0, weighting="snr", clip_norm=1e9, unet=SMALL)
    run = run_of(config, tmp_path / "run")
    step = TrainStep(run, build_engine(config))
    denoiser, schedule = step.denoiser, step.denoiser.schedule
    ours, plain = networks()
    denoiser.network.load_state_dict(ours.state_dict())
    batches = run.batches.start_at(0)
    batch = next(batches)
    batches.close()
    given = step.draw(0, batch)
    x, y = (from_uint8(pixels) for pixels in (batch.images, batch.conditions))
    torch.testing.assert_close(y, -x)
    angle = schedule.angle(1 - given.u)
    alpha, sigma = (column(f(angle), x).float() for f in (torch.cos, torch.sin))
    z = alpha * x + sigma * given.noise
    v = plain(torch.cat([z, y], 1), (schedule.label_scale * (1 - given.u) - 1).float())
    snr = (angle.cos() / angle.sin()).square().float()
    (snr * (x - (alpha * z - sigma * v)).square().flatten(1).mean(1)).mean().backward()
    seen = {}
    step.optimizer.step = lambda *_: seen.update(  # the gradient, before an update changes anything
        {name: weight.grad.clone() for name, weight in denoiser.network.named_parameters() if weight.grad is not None}
    )
    step(0, batch)
    assert seen.keys() == {name for name, weight in plain.named_parameters() if weight.grad is not None}
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(seen[name], weight.grad, rtol=2e-3, atol=1e-5)


# A Gaussian pair: x = a y + s ε


SLOPE, SPREAD = 0.7, 0.25


def posterior(schedule, z: Tensor, t: Tensor, y: Tensor) -> Prediction:
    """E[x | z, y] of x ~ N(a y, s²): x̂ = a y + α s² (z − α a y)/(α² s² + σ²), ε̂ = σ (z − α a y)/(α² s² + σ²)."""
    alpha, sigma = (column(f(schedule.angle(t)), z) for f in (torch.cos, torch.sin))
    share = (z - alpha * SLOPE * y) / (alpha**2 * SPREAD**2 + sigma**2)
    x, eps = SLOPE * y + alpha * SPREAD**2 * share, sigma * share
    return Prediction(x, eps, alpha * eps - sigma * x)


class Exact(nn.Module):
    """The network that answers `posterior` of its condition image."""

    signature = Signature(1, 1, (IMAGE,))

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, z: Tensor, timestep: Tensor, condition_image: Tensor) -> Tensor:
        return posterior(self.schedule, z, (timestep + 1) / self.schedule.label_scale, condition_image).v

    def encode(self, condition: Condition) -> Condition:
        return condition


def exact() -> Denoiser:
    schedule = CosineSchedule()
    return Denoiser(Exact(schedule), schedule, "v")  # type: ignore[arg-type]


def test_samples_of_a_gaussian_pair_have_the_closed_form():
    """The flow of N(a y, s²) takes z at t = 1 to a y + s z; the mean over many is a y, the standard deviation s."""
    y = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 64, 64)
    noise = ImageNoise(seed=0, indices=range(5), shape=(1, 64, 64))
    condition = Condition({IMAGE: y})
    drawn = draw_from(exact(), Ddim(None), noise=noise, condition=condition, num_steps=1024)
    z = ImageNoise(seed=0, indices=range(5), shape=(1, 64, 64))()
    assert (drawn - (SLOPE * y + SPREAD * z)).abs().max() < 0.01
    assert (drawn.mean((1, 2, 3)) - SLOPE * y[:, 0, 0, 0]).abs().max() < 4 * SPREAD / 64
    assert drawn.std((1, 2, 3)) == pytest.approx(SPREAD, rel=0.05)


def test_a_student_learns_from_an_exact_conditional_teacher():
    """The target of each row is where two DDIM steps by the posterior of its own condition lead."""
    teacher, batch = exact(), 6
    y, noise = randn(batch, 1, 4, 4, seed=5), randn(batch, 1, 4, 4, seed=6)
    x = SLOPE * y + SPREAD * randn(batch, 1, 4, 4, seed=7)
    given = TrainBatch(x, noise, (torch.arange(batch) + 0.5).double() / batch, Condition({IMAGE: y}))
    objective = DistillationObjective(teacher, METHODS["progressive"](), num_steps=4, teacher_steps=8)
    target = objective(given, StudentState(teacher, teacher, 0.0))
    schedule = teacher.schedule

    def ddim(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        found, angle = posterior(schedule, z, t, y), schedule.angle(s)
        return column(angle.cos(), z) * found.x + column(angle.sin(), z) * found.eps

    z, t = target.z.double(), target.t
    assert torch.allclose(z, diffuse(x, noise, schedule.angle(t)).double(), atol=1e-6)
    half, end = t - 1 / 8, t - 2 / 8
    through = ddim(ddim(z, t, half), half, end)
    angles = schedule.angle(t), schedule.angle(end)
    eps = (z - column(angles[0].cos(), z) * target.x.double()) / column(angles[0].sin(), z)
    landed = column(angles[1].cos(), z) * target.x.double() + column(angles[1].sin(), z) * eps
    assert torch.allclose(landed, through, atol=1e-5)


# Training and students


def test_training_finds_the_conditions_in_the_dataset_and_says_so(tmp_path):
    data, watcher = write_pairs(tmp_path / "pairs"), Watcher()
    flags = {"data": str(data), "preset": "toy"}
    config, images = resolve_training(flags, None, folder=tmp_path / "run", resume=False, reporter=watcher)
    assert "the dataset has condition images: the network gets them as further input channels" in watcher.lines
    described = describe(config, images)
    assert described.signature.names == (IMAGE,)
    assert described.condition_images == {"crop": "", "resample": "", "background": ""}
    assert CheckpointConfig(**described.to_dict()) == described


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"guided"}))  # which needs a null, as images have none
def test_every_method_passes_the_condition(tmp_path, method, monkeypatch):
    """Teacher and student get a condition image for each row of z in every evaluation."""
    data = write_pairs(tmp_path / "pairs")
    write_model(tmp_path / "original", data)
    kind = METHODS[method]
    short = {} if kind.keeps_steps else {"to_steps": 4}
    config = distill_config(data, tmp_path / "original", method=method, num_iters=2, **short)
    calls: list[Tensor] = []
    forward = UNet.forward

    def watched(self, z, timestep, *args, **named):
        assert named[IMAGE].shape == z.shape
        calls.append(named[IMAGE])
        return forward(self, z, timestep, *args, **named)

    monkeypatch.setattr(UNet, "forward", watched)
    stages = run_ladder(config, read_config(tmp_path / "original"), out=None)
    assert read_config(stages[-1].folder).signature.names[-1] == IMAGE
    assert calls


@pytest.mark.parametrize("command_of", ["fine-tuning", "distilling"])
def test_a_conditioned_model_needs_pairs(tmp_path, command_of):
    from tests.toy import write_dataset

    write_model(tmp_path / "original", write_pairs(tmp_path / "pairs"))
    plain, base = write_dataset(tmp_path / "plain"), tmp_path / "original"
    words = {
        "fine-tuning": f"train.py --base {base} --data {plain} --out {tmp_path / 'tuned'}",
        "distilling": f"distill.py --base {base} --data {plain}",
    }
    result = run(words[command_of])
    assert result.exit_code == 1
    assert "plain: the network needs a condition image with each image, and there are none" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "pairs", "plain"]


def test_samples_of_a_run_have_conditions_of_their_classes(tmp_path):
    images = open_images(str(write_pairs(tmp_path / "pairs", count=30, classes="abc")), SIZE)
    config = train_config(images.store.path, class_conditional=True)
    denoiser = describe(config, images).build()
    found = sample_conditions(describe(config, images), images)(denoiser, range(9))
    store, known = images.store, {}
    for k in range(len(store)):
        known[pixels_of(store.condition(SIZE, k)).tobytes()] = store.label(k)
    shown = ((found.tensors[IMAGE] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert [known[image.tobytes()] for image in shown] == [0, 1, 2] * 3 == found.tensors["classes"].tolist()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs"))
    Path("tiny.toml").write_text(TINY)
    line = "train.py --data pairs --config tiny.toml --device cpu --num_workers 0 --dropout 0 --out"
    codes, stdout, stderr = ends(launch(command(f"{line} two"), tmp_path))
    assert codes == [0, 0], stdout + stderr
    done(f"{line} one")
    z, t, y = randn(4, 1, SIZE, SIZE, seed=0), torch.full((4,), 0.5).double(), randn(4, 1, SIZE, SIZE, seed=1)
    one, two = (load_checkpoint(name)[0](z, t, Condition({IMAGE: y})).v for name in ("one", "two"))
    assert (one - two).norm() < 1e-3 * one.norm()


# Samples and distances


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a model, and a folder of two condition images, one in a subfolder."""
    place = tmp_path_factory.mktemp("trained")
    write_model(place / "checkpoints/original", write_pairs(place / "pairs", count=40))
    (place / "given/sub").mkdir(parents=True)
    for k, name in enumerate(("b.bmp", "sub/a.png")):
        PIL.Image.fromarray(np.random.default_rng(k).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(
            place / "given" / name
        )
    return place


def test_one_sample_is_drawn_from_each_condition_image(trained, monkeypatch):
    """In a folder they have the names of their conditions; Python draws the same; the grid shows both."""
    monkeypatch.chdir(trained)
    line = "sample.py --checkpoint checkpoints/original --condition given --out drawn"
    done(line)
    files = sorted(path.relative_to("drawn").as_posix() for path in Path("drawn").rglob("*.png"))
    assert files == ["b.png", "sub/a.png"]
    given = [pixels_of(Path("given", name).read_bytes()) for name in ("b.bmp", "sub/a.png")]
    condition = torch.from_numpy(np.stack(given))[:, None]
    model = vdiff.load("checkpoints/original", device="cpu")
    drawn = model.sample(condition=condition)
    assert len(drawn) == 2
    for image, name in zip(drawn.to_pil(), files, strict=True):
        assert np.array_equal(np.array(image), pixels_of(Path("drawn", name).read_bytes()))
    with PIL.Image.open("drawn.grid.png") as grid:
        assert grid.width > 4 * 72
    Path("drawn/sub/a.png").unlink()
    assert "1 image in" in done(line).stdout
    assert "already holds all 2 images" in done(line).stdout
    Path("drawn/mine.txt").write_text("mine")
    assert "holds mine.txt" in run(f"{line} --seed 1 --overwrite").stderr.replace("drawn/", "")
    Path("drawn/mine.txt").unlink()
    done(f"{line} --seed 1 --overwrite")
    assert sorted(path.name for path in Path("drawn").rglob("*.png")) == ["a.png", "b.png"]
    PIL.Image.new("L", (SIZE, SIZE)).save("given/b.bmp")
    assert "drawn with" in run(f"{line} --seed 1").stderr  # another condition


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("", "--condition: this model needs condition images, and none are given; give a folder of them"),
        ("--condition nowhere", "--condition nowhere is not a folder"),
        ("--condition checkpoints", "--condition checkpoints holds no images"),
        ("--condition twice", "twice holds two images whose samples would be called x.png; rename one of them"),
        ("--condition given --num 3", "--num 3: given holds 2 images; leave --num out"),
        ("--condition given --interpolate 0 1 --num 2", "--interpolate does not apply to --condition"),
        ("--condition broken", "broken/x.png cannot be read"),
    ],
)
def test_conditions_that_cannot_be_drawn_from_are_refused(trained, monkeypatch, words, cause):
    monkeypatch.chdir(trained)
    for name in ("twice", "broken"):
        Path(name).mkdir(exist_ok=True)
    for name in ("twice/x.png", "twice/x.bmp"):
        PIL.Image.new("L", (SIZE, SIZE)).save(name)
    Path("broken/x.png").write_bytes(b"\x89PNG")
    result = run(f"sample.py --checkpoint checkpoints/original --out refused {words}")
    assert result.exit_code in (1, 2)
    assert cause in result.stderr
    assert result.stderr.count("\n") <= 3


def test_python_refuses_conditions_of_another_shape(trained):
    model = vdiff.load(trained / "checkpoints/original", device="cpu")
    with pytest.raises(VdiffError, match="needs condition images, and none are given"):
        model.sample(2)
    with pytest.raises(ValueError, match=r"condition images of shape \(2, 1, 8, 8\); need \(N, 1, 4, 4\)"):
        model.sample(condition=torch.zeros(2, 1, 8, 8))
    z, y = randn(3, 1, SIZE, SIZE, seed=0), randn(3, 1, SIZE, SIZE, seed=1)
    found = model.denoise(z, 0.5, condition=y)
    known = load_checkpoint(trained / "checkpoints/original")[0](
        z, torch.full((3,), 0.5).double(), Condition({IMAGE: y})
    )
    torch.testing.assert_close(found.v, known.v)
    torch.manual_seed(0)
    first = model.loss(z, condition=y)
    torch.manual_seed(0)
    assert first != model.loss(z, condition=-y)


def test_the_psnr_to_the_truth_is_that_of_the_samples(trained):
    """10 log₁₀(4 / mean squared error) of samples and the images of their conditions, drawn by `vdiff.load`."""
    base, data, n = trained / "checkpoints/original", trained / "pairs", 24
    found = evaluate([base], data, n=n, seed=5, device="cpu", cache=trained / "cache")
    images, conditions, _ = ReferenceImages(data, SIZE).pairs(range(n), 5)
    assert torch.equal(images, 255 - conditions)
    drawn = vdiff.load(base, device="cpu").sample(n, seed=5, condition=conditions)
    error = ((drawn - from_uint8(images)) ** 2).mean()
    metrics = found.rows[0].metrics
    assert metrics["psnr_truth"].value == pytest.approx(float(10 * torch.log10(4 / error)), rel=1e-4)
    assert "fd" in metrics
    assert any("condition images of the data" in note for note in found.notes)


def test_models_without_conditions_have_no_truth(trained, tmp_path):
    from tests.toy import write_checkpoint, write_dataset

    plain = write_dataset(tmp_path / "plain", count=30)
    write_checkpoint(tmp_path / "free")
    with pytest.raises(OptionError, match="psnr_truth needs image-conditioned models"):
        evaluate([tmp_path / "free"], plain, n=20, metrics=("psnr_truth",), device="cpu")
    assert "psnr_truth" not in evaluate([tmp_path / "free"], trained / "pairs", n=20, device="cpu").rows[0].metrics
    with pytest.raises(VdiffError, match="has no condition images, which the models need"):
        evaluate([trained / "checkpoints/original"], plain, n=20, device="cpu")
    result = run(f"sample.py --checkpoint {tmp_path / 'free'} --condition {trained / 'given'}")
    assert "--condition: this model takes no condition images; leave it out" in result.stderr


# Other programs


@pytest.mark.parametrize("form", ["onnx model.onnx", "torch model.pt2", "diffusers folder"])
def test_exports_that_cannot_hold_the_condition_refuse(trained, monkeypatch, tmp_path, form):
    monkeypatch.chdir(tmp_path)
    kind, target = form.split()
    result = run(f"vdiff export {kind} {trained / 'checkpoints/original'} {target}")
    assert result.exit_code in (1, 2)
    assert re.search("condition image", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_published_with_the_command_that_draws(trained, tmp_path):
    done(f"vdiff export weights {trained / 'checkpoints/original'} {tmp_path / 'folder'}")
    card = (tmp_path / "folder/README.md").read_text()
    assert "--condition FOLDER" in card
    assert "image_input True" in done(f"vdiff inspect {trained / 'checkpoints/original'}").stdout
