"""Sounds through the four commands: a UNet of one dimension, its samples, its ladder, measures and exports."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks.distances import SoundDistance
from tests.commands import done, error, run
from vdiff.errors import VdiffError
from vdiff.evaluation.features import LogMel, load_features
from vdiff.evaluation.metrics import Moments, frechet_distance
from vdiff.evaluation.reference import DataStats, scale_of
from vdiff.evaluation.results import read_quality
from vdiff.evaluation.sounds import (
    BANDS,
    PARTS,
    decibels,
    floor_of,
    log_mel,
    log_mel_vectors,
    log_spectral_distance,
    mel_filters,
    power_spectra,
)
from vdiff.interop.card import new_card
from vdiff.models.checkpoint import CheckpointConfig, read_config, weights_fingerprint
from vdiff.models.codec import PIXEL_CODEC, WAVEFORM
from vdiff.models.unet import UNet, upsample_conv
from vdiff.models.unet_config import UNetConfig
from vdiff.training.presets import OF_SOUNDS, preset_for, read_preset

sf = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE, LENGTH = 8000, 256
SETTINGS = """
preset = "audio_tiny"
num_iters = 4
batch_size = 4
num_timesteps = 16
ckpt_interval = 2
sample_interval = 4

[unet]
channels = 8
embedding_channels = 16
multipliers = [1, 2]
attention_strides = [16]
head_channels = 8
fold = 8

[distill]
num_iters = 3
batch_size = 4
"""


def with_noise(network: UNet) -> UNet:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.double().eval()


CONFIG = UNetConfig(
    in_channels=2, out_channels=2, channels=8, embedding_channels=16, multipliers=(1, 2), num_blocks=1,
    attention_strides=(2,), dims=1,
)  # fmt: skip


@pytest.mark.parametrize("resample", ["block", "conv"])
@pytest.mark.parametrize("pad", ["sides", "end"])
def test_a_network_of_sounds_is_that_of_images_of_one_row(resample, pad):
    """The weights of a 1-D network in the middle row of 3 × 3 kernels, on images of rows that are all alike.

    Rows at the top and the bottom see zeros outside of the image, and attention sees every row, but the middle row of a
    kernel alone reads one row, and equal rows do not change a softmax.
    """
    config = replace(CONFIG, resample=resample, downsample_pad=pad if resample == "conv" else "sides")
    one, two = with_noise(UNet(config)), UNet(replace(config, dims=2)).double().eval()
    weights = {}
    for name, tensor in one.state_dict().items():
        due = two.state_dict()[name].shape
        if tensor.shape != due:
            wide = torch.zeros(due, dtype=torch.float64)
            wide[:, :, due[2] // 2] = tensor
            tensor = wide
        weights[name] = tensor
    two.load_state_dict(weights)
    z, t = torch.randn(3, 2, 32, dtype=torch.float64), torch.tensor([0.0, 300.0, 900.0])
    images = z[:, :, None].expand(-1, -1, 8, -1)
    with torch.no_grad():
        found, due = one(z, t), two(images, t)[:, :, 4]
    assert float(due.std()) > 0.1
    assert torch.allclose(found, due, atol=1e-9)


def test_folding_puts_values_in_a_row_into_channels_and_back():
    config = replace(CONFIG, fold=4, attention_strides=())
    network = with_noise(UNet(config))
    plain = UNet(replace(config, fold=1, in_channels=8, out_channels=8)).double().eval()
    plain.load_state_dict(network.state_dict())
    z, t = torch.randn(2, 2, 64, dtype=torch.float64), torch.zeros(2)
    folded = torch.stack([z[:, c, k::4] for c in range(2) for k in range(4)], 1)
    with torch.no_grad():
        due = plain(folded, t)
        found = network(z, t)
    assert torch.allclose(torch.stack([found[:, c, k::4] for c in range(2) for k in range(4)], 1), due)
    assert config.size_multiple == 8


def test_upsampling_and_convolution_in_one_dimension():
    conv = torch.nn.Conv1d(3, 5, 3, padding=1).double()
    h = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.allclose(upsample_conv(h, conv), conv(F.interpolate(h, scale_factor=2.0, mode="nearest")))


def test_descriptions_of_images_do_not_name_dims():
    assert "dims" not in UNetConfig().to_dict()
    assert UNetConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="dims must be 1 or 2"):
        replace(CONFIG, dims=3)


@pytest.mark.parametrize("name", OF_SOUNDS)
def test_presets_describe_networks_that_fit(name):
    settings = read_preset(name)
    unet = UNetConfig.from_dict({**settings.train["unet"], "in_channels": 1, "out_channels": 1, "dims": 1})
    assert settings.assumed["image_size"] % unet.size_multiple == 0


def test_the_preset_follows_from_the_shape():
    assert preset_for((1, 8192), 5000, "cpu") == preset_for((1, 8192), 500, "cuda") == "audio_tiny"
    assert preset_for((1, 8192), 5000, "cuda") == "audio_16k"


def test_the_codec_reads_16_bits_and_clips():
    stored = torch.tensor([[-32768, -1, 0, 16384, 32767]], dtype=torch.int16)
    assert WAVEFORM.encode(stored).tolist() == [[-1.0, -1 / 32768, 0.0, 0.5, 32767 / 32768]]
    assert torch.equal(WAVEFORM.store(WAVEFORM.encode(stored)), stored)
    assert WAVEFORM.store(torch.tensor([2.0, -2.0])).tolist() == [32767, -32768]
    assert not WAVEFORM.are_pictures((1, 8, 8))
    assert WAVEFORM.pictures(torch.zeros(0, 1, 500)).shape == (0, 3, 128, 128)
    picture = torch.rand(2, 1, 8, 8)
    assert PIXEL_CODEC.pictures(picture) is picture


# Measures


def test_power_is_that_of_a_direct_sum():
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2, 1000))
    size = 256  # 32 ms at 8 kHz
    found = power_spectra(torch.from_numpy(x), RATE)[0].numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    padded = np.pad(x[0].mean(0), size // 2)
    frames = np.stack([padded[k * 64 : k * 64 + size] for k in range(found.shape[1])], 1)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size)
    due = np.abs(waves @ (window[:, None] * frames)) ** 2 / (window.sum() / 2) ** 2
    assert np.allclose(found, due)


def test_mel_filters_are_triangles_in_the_formula_of_htk():
    filters = mel_filters(129, RATE).numpy()
    top = 2595 * math.log10(1 + 4000 / 700)
    edges = [700 * (10 ** (top * k / (BANDS + 1) / 2595) - 1) for k in range(BANDS + 2)]
    for band in (0, 7, BANDS - 1):
        due = np.interp(np.linspace(0, 4000, 129), edges[band : band + 3], [0, 1, 0])
        assert np.allclose(filters[band], due)


def test_a_level_is_in_decibels_of_full_scale():
    time = torch.arange(4000) / RATE
    sine = torch.sin(2 * math.pi * 1000 * time)[None, None]
    assert float(decibels(power_spectra(sine, RATE))[0, :, 20].max()) == pytest.approx(0, abs=0.01)
    assert float(log_mel(0.1 * sine, RATE)[0, :, 20].max() - log_mel(sine, RATE)[0, :, 20].max()) == pytest.approx(-20)
    assert float(log_mel(0 * sine, RATE).max()) == -80


def test_the_log_spectral_distance_of_a_gain_is_the_gain():
    loud = torch.rand(3, 1, 2000) - 0.5
    assert log_spectral_distance(loud, loud, RATE).tolist() == [0, 0, 0]
    assert log_spectral_distance(loud, 0.5 * loud, RATE).numpy() == pytest.approx(20 * math.log10(2), rel=1e-3)


def test_the_distance_of_sounds_grows_with_noise():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 1, LENGTH, generator=generator).cumsum(-1) / 40
    distance = SoundDistance(real[:200], RATE)
    others = [distance(real[200:] + level * torch.randn(200, 1, LENGTH, generator=generator)) for level in (0, 0.1, 1)]
    assert others == sorted(others)
    assert others[0] < others[2] / 5
    vectors = log_mel_vectors(real, RATE)
    assert vectors.shape == (400, LogMel.dim)
    assert vectors.min() < -2 == log_mel_vectors(real, RATE, floor=-40).min()  # units of 20 dB


def test_the_scale_of_sounds_blurs_bands_and_times():
    """‖μ_a − μ_b‖² + tr(A + B − 2 (AB)^½), of covariances that are written down, with the blur as a matrix."""
    generator, features = np.random.default_rng(0), LogMel(RATE, (1, LENGTH), -40)
    mean, deviations = generator.uniform(-2, 0, features.dim), generator.uniform(0.05, 0.3, features.dim)
    vectors = mean + deviations * generator.standard_normal((40_000, features.dim))
    stats = DataStats(Moments.of(vectors), vectors.astype(np.float32), np.arange(len(vectors)))
    found = scale_of(stats, 20_000, features)

    def smooth(count: int) -> np.ndarray:
        matrix = np.zeros((count, count))  # (1 2 1)/4, the border repeated
        for i in range(count):
            for j, weight in ((i - 1, 0.25), (i, 0.5), (i + 1, 0.25)):
                matrix[i, min(max(j, 0), count - 1)] += weight
        return matrix

    blur, covariance = np.kron(smooth(BANDS), smooth(PARTS)), np.diag(deviations**2)
    other, shift = blur @ covariance @ blur.T, blur @ mean - mean
    root = scipy.linalg.sqrtm(covariance @ other).real
    assert found.blurred == pytest.approx(float(shift @ shift + np.trace(covariance + other - 2 * root)), rel=0.02)
    assert found.mean_image == pytest.approx((deviations**2).sum(), rel=0.02)
    noise = torch.randn((2000, 1, LENGTH), generator=torch.Generator().manual_seed(5))
    assert found.noise == pytest.approx(frechet_distance(log_mel_vectors(noise, RATE, -40), vectors), rel=0.05)
    assert 0 < found.same < 0.01 * found.blurred
    assert str(found).startswith("other sounds ")


@pytest.mark.parametrize(("loudness", "floor"), [("-20", -40), ("-26", -46), ("-70", -80), ("none", -60), ("", -60)])
def test_levels_far_below_the_loudness_do_not_count(loudness, floor):
    assert floor_of(loudness) == floor
    features = load_features("pixels", image_size=LENGTH, channels=1, rate=RATE, loudness=loudness)
    x = 0.1 * torch.randn(4, 1, LENGTH, generator=torch.Generator().manual_seed(0))
    assert features(1e-6 * x).max() == floor / 20
    assert features.fingerprint.endswith(f" {floor}")


def test_features_of_the_other_kind_are_refused(tmp_path):
    shape = {"image_size": LENGTH, "channels": 1}
    assert isinstance(load_features("pixels", **shape, rate=RATE), LogMel)
    for wanted, rate in (("inception", RATE), ("log_mel", 0)):
        with pytest.raises(Exception, match="is for"):
            load_features(wanted, **shape, rate=rate)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.mean((1, 2)), x.std((1, 2))], 1)

    program = torch.export.export(Net(), (torch.rand(2, 1, LENGTH),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    features = load_features(str(tmp_path / "net.pt2"), **shape, rate=RATE)
    x = torch.rand(5, 1, LENGTH) - 0.5
    assert features.dim == 2
    assert features(x)[:, 0] == pytest.approx(x.mean((1, 2)).numpy(), abs=1e-6)


# The commands


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sounds in two classes, their dataset, a teacher and two students."""
    root = tmp_path_factory.mktemp("sounds")
    for k in range(120):
        path = root / "speech" / ("high", "low")[k % 2] / f"{k}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        pitch = (900, 250)[k % 2] * (1 + 0.2 * np.random.default_rng(k).random())
        sf.write(path, 0.5 * np.sin(2 * np.pi * pitch * np.arange(LENGTH) / RATE), RATE)
    (root / "tiny.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        done(f"prepare_data.py speech --kind audio --rate {RATE} --length {LENGTH} --num_workers 0 --out data")
        learn = "--config tiny.toml --device cpu --num_workers 0 --tracker none"
        done(f"train.py --data data --out models/original {learn}")
        done(f"distill.py --base models/original --teacher_steps 4 --to_steps 1 {learn} --check_images 64")
    return root


@pytest.fixture
def here(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ladder)
    return ladder


def test_checkpoints_describe_sounds(here):
    for name in ("original", "base_0", "base_1"):
        config = read_config(here / "models" / name)
        assert config.shape == (1, LENGTH)
        assert (config.codec, config.sample_rate, config.class_names) == ("waveform", RATE, ["high", "low"])
        assert CheckpointConfig(**{**config.to_dict(), "unet": {}, "image_size": 0}).unet == config.unet
    assert "256 samples, 0.032 s at 8,000 Hz" in done("vdiff inspect models/base_1").stdout


def test_a_ladder_of_sounds_has_pictures_and_players(here):
    folder = here / "models" / "base_1"
    assert (folder / "ladder.png").exists()
    page = (folder / "ladder.html").read_text()
    assert page.count("<audio") == 8  # eight noises; a short training compares only the last student
    assert "base_1, 1 step" in page
    assert "http" not in page  # it works offline
    assert "report.html" in done("vdiff report models").stdout
    report = (here / "models" / "report.html").read_text()
    assert "sounds of 256 samples at 8,000 Hz" in report
    for words in ("prepare_data.py speech", "--kind audio", "--rate 8000", "--length 256", "--loudness -20",
                  "Prepare the sounds", "Generate sounds", "generates a sound in 1 step", "sounds seen"):  # fmt: skip
        assert words in report
    card = new_card(here / "models" / "base_1", usage={}).text
    assert "- audio\n" in card
    assert "pipeline_tag" not in card
    assert list((here / "models" / "original" / "samples").glob("*.png"))


@pytest.mark.parametrize("form", ["wav", "flac"])
def test_samples_are_files_of_sound(here, form):
    line = f"sample.py --checkpoint models/base_1 --num 4 --out drawn_{form} --format {form} --device cpu"
    done(line)
    files = sorted((here / f"drawn_{form}").glob(f"*.{form}"))
    assert [path.stem for path in files] == ["00000", "00001", "00002", "00003"]
    sound, rate = sf.read(files[0])
    assert (len(sound), rate) == (LENGTH, RATE)
    assert (here / f"drawn_{form}.grid.png").exists()
    files[2].unlink()
    again = files[1].read_bytes()
    assert "1 sound in" in done(line).stdout  # the missing one alone
    assert "already holds all 4 sounds" in done(line).stdout
    assert files[1].read_bytes() == again
    assert files[2].exists()
    assert '["00001.' + form + '", 1]' in (here / f"drawn_{form}" / "dataset.json").read_text()


@pytest.mark.usefixtures("here")
def test_a_network_of_a_user_learns_sounds():
    import vdiff

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Conv1d(1, 1, 9, padding=4)

        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(z) + timestep[:, None, None] / 1000

    data = vdiff.prepare("speech", out="own", kind="audio", rate=RATE, length=LENGTH, overwrite=True)
    settings = {"num_iters": 2, "batch_size": 4, "flip": False, "device": "cpu", "num_workers": 0}
    model = vdiff.wrap(Net(), shape=(1, LENGTH), codec="waveform", num_timesteps=4)
    assert vdiff.train(model, data, **settings).finish().sample(num=2).shape == (2, 1, LENGTH)
    for wrong, message in (
        ({"size": 64}, "size 64 does not apply to sounds"),
        ({"condition": "models"}, "sounds have no"),
    ):
        with pytest.raises(VdiffError, match=message):
            vdiff.prepare("speech", out="wrong", kind="audio", rate=RATE, length=LENGTH, **wrong)
    other = vdiff.wrap(Net(), shape=(1, LENGTH // 2), codec="waveform", num_timesteps=4)
    with pytest.raises(VdiffError, match="own: 256×1 at 8,000 Hz, the model takes 1 × 128"):
        vdiff.train(other, data, **settings)


def test_samples_are_those_of_the_library(here):
    import vdiff

    done("sample.py --checkpoint models/base_1 --num 2 --out drawn --device cpu")
    due = vdiff.load("models/base_1", device="cpu").sample(num=2, seed=0)
    for k in range(2):
        sound, _ = sf.read(here / "drawn" / f"0000{k}.wav", dtype="int16")
        assert np.abs(sound - WAVEFORM.store(due[k, 0]).numpy().astype(int)).max() <= 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample.py --checkpoint models/base_1 --format png", "--format png: models/base_1 generates sounds"),
        ("sample.py --checkpoint models/base_1 --out x.lmdb", "--format lmdb: models/base_1 generates sounds"),
        ("train.py --data data --config tiny.toml --flip True --out x --device cpu", "--flip True: data has sounds"),
        (
            "vdiff evaluate models/base_1 --data data --metrics isc --num 100",
            "--metrics isc needs Inception's features",
        ),
        ("sample.py --checkpoint models/base_1 --condition speech", "this model takes no condition images"),
        ("sample.py --checkpoint models/base_1 --classes high,loud", "loud"),
        ("sample.py --checkpoint models/base_1 --prompt word", "this model takes no prompts"),
        ("vdiff serve models/base_1", "models/base_1 generates sounds, which pages do not play"),
        ("vdiff evaluate models/base_1 --data data --features inception --num 100", "inception is for images"),
        (
            "train.py --data data --config tiny.toml --image_size 128 --out y",
            "data has no sounds of length 128; it has 256",
        ),
        ("vdiff features --data data --out net.pt2", "data holds sounds, and feature networks are for images"),
        ("vdiff data encode data --base models/original", "data cannot be encoded"),
        ("vdiff export diffusers models/base_1 pipe", "does not support sounds"),
        ("vdiff export web models/base_1 page", "models/base_1 generates sounds, which pages do not play"),
    ],
)
def test_what_sounds_cannot_do_is_said_in_one_line(line, message):
    result = run(line)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_verdict_on_sounds(here, monkeypatch):
    """`train.py` at its end, `distill.py` of a teacher of noise, `vdiff inspect`, and the report."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "caches"))
    learn = "--config tiny.toml --device cpu --num_workers 0 --tracker none"
    text = done(f"train.py --data data --out judged/original --num_iters 140 --batch_size 100 {learn}").stdout
    found = read_quality(here / "judged/original", weights_fingerprint(here / "judged/original"))
    assert found is not None
    assert found.scale.noun == "sound"
    assert f"verdict    {found.short}\nscale      {found.scale}\n" in text
    assert found.nearest is not None
    assert str(found) in done("vdiff inspect judged/original").stdout
    (row,) = json.loads((here / "judged/original/quality.json").read_text())["rows"]
    assert row["metrics"]["nearest_features"]["value"] == found.nearest
    shutil.copytree("judged/original", "judged/noise")
    tensors = load_file("judged/noise/model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, "judged/noise/model.safetensors")
    monkeypatch.setattr("vdiff.training.stages.EVALUATIONS", 10**5)  # as after a long training
    line = f"distill.py --base judged/noise --teacher_steps 2 --to_steps 1 {learn} --check_images 64"
    result = done(f"{line} --out judged/base_0 --distance_every 1")
    assert "judged/noise is not trained yet: distance to the data" in result.stderr
    assert "a student cannot be better than its teacher" in result.stderr
    scale = json.loads(Path("judged/base_0/verdict.json").read_text())["scale"]
    assert f"\nscale      other sounds {scale['same']:.3g}, blurred {scale['blurred']:.3g}, " in result.stdout
    assert "ms/sound" in result.stdout
    done("vdiff report judged")
    report = Path("judged/report.html").read_text()
    for words in ("Fréchet distance on log_mel", "other sounds", "above blurred sounds", "Time per sound",
                  "shows the same sound"):  # fmt: skip
        assert words in report
    body = re.sub(r"<style>.*?</style>|<script>.*?</script>|src=\S+|<pre.*?</pre>", "", report, flags=re.S)
    assert not re.findall(r"[^<>]*\bimages?\b[^<>]*", body)


@pytest.mark.usefixtures("here")
def test_another_rate_is_not_the_teachers():
    done(f"prepare_data.py speech --kind audio --rate 4000 --length {LENGTH} --num_workers 0 --out slow --overwrite")
    line = "distill.py --base models/original --teacher_steps 4 --to_steps 2 --config tiny.toml --device cpu --out y"
    assert "at 4,000 Hz, but the teacher has samples of 1 × 256 at 8,000 Hz" in error(f"{line} --data slow", 2)
    message = error("vdiff evaluate models/base_1 --data slow --num 100 --device cpu", 1)
    assert "generates sounds at 8,000 Hz, but slow holds sounds at 4,000 Hz" in message


@pytest.mark.usefixtures("here")
def test_evaluation_compares_with_teacher_and_data():
    line = "vdiff evaluate models/base_1 --data data --teacher models/original --teacher_steps 4 --num 100 --device cpu"
    found = json.loads(done(f"{line} --cache cache --json").stdout)
    assert found["features"] == "log_mel"
    metrics = found["rows"][0]["metrics"]
    near = {"nearest_features", "nearest_data_features"}
    assert metrics.keys() == {"fd", "kd", "precision", "recall", "rmse", "psnr", "lsd", *near}
    assert found["scale"]["noun"] == "sound"
    assert 0 < metrics["lsd"]["value"] < 80
    shown = done(f"{line} --cache cache").stdout
    assert "256×1, flac" in shown
    assert "LSD dB" in shown
    assert "ms/sound" in shown
    assert "scale      other sounds " in shown
    assert "was trained on other" not in shown


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_more_samples_than_are_paired_and_shown():
    line = (
        "vdiff evaluate models/base_1 --data data --teacher models/original --teacher_steps 4 --num 1100 --device cpu"
    )
    found = json.loads(done(f"{line} --cache cache --overwrite --json").stdout)
    assert found["rows"][0]["n"] == 1100
    assert "lsd" in found["rows"][0]["metrics"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_export_to_torch_and_onnx():
    pytest.importorskip("onnxruntime")
    for kind, name in (("torch", "net.pt2"), ("onnx", "net.onnx")):
        for graph in ("", " --sampler_graph"):
            text = done(f"vdiff export {kind} models/base_1 {name}{graph} --overwrite").output
            assert float(text.rpartition("at most ")[2].split()[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_sounds_are_never_called_images():
    lines = [
        "prepare_data.py speech --kind audio --rate 8000 --length 256 --num_workers 0 --out called",
        "vdiff data info called", "vdiff data verify called --num_workers 0", "vdiff data show called",
        "train.py --data data --config tiny.toml --device cpu --out x --dry_run",
        "train.py --data data --config tiny.toml --device cpu --out x --tracker none --num_workers 0",
        "train.py --data data --config tiny.toml --device cpu --out x --tracker none --num_workers 0 --resume",
        "distill.py --base models/original --config tiny.toml --device cpu --teacher_steps 4 --to_steps 1 --dry_run",
        "distill.py --base models/original --config tiny.toml --device cpu --teacher_steps 2 --to_steps 1 --out one",
        "vdiff inspect models/base_1", "vdiff data verify called --json",
        "sample.py --checkpoint models/base_1 --num 3 --device cpu --out some",
        "sample.py --checkpoint models/base_1 --num 3 --device cpu --out some --format flac",
        "sample.py --checkpoint models/base_1 --num 3 --device cpu --out path --interpolate 0 1",
        "sample.py --checkpoint models/base_1 --num 3 --device cpu --out some --seed 3",
        "vdiff evaluate models/base_1 --data data --num 100 --device cpu --cache cache --out found.json",
        "vdiff evaluate models/base_1 --data data --num 10 --device cpu --cache cache --out few.json",
        "vdiff report models",
    ]  # fmt: skip
    for line in lines:
        result = run(line)
        said = re.sub(r"vdiff\S* .*|python .*|next .*", "", result.output + result.stderr)
        assert not re.search(r"\bimages?\b", said), (line, said)
