"""The loop: the textbook's updates, the average that is saved, what is recorded, and every entry of every registry."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cases import all_cases
from tests.oracles import condition
from tests.toy import (
    SIZE,
    Watcher,
    assert_equal_bits,
    assert_equal_tensors,
    assert_same_run,
    contents,
    fit_run,
    run_of,
    run_training,
    scalars,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.images import grid_picture
from vdiff.diffusion.multistep import Dpmpp2m
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import SCHEDULES
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.errors import OptionError, VdiffError
from vdiff.models.checkpoint import CONFIG, WEIGHTS, load_checkpoint, read_config, read_metadata, read_tensors
from vdiff.models.drawing import draw
from vdiff.training.config import TrainConfig
from vdiff.training.engine import build_engine
from vdiff.training.loop import Run
from vdiff.training.objectives import DenoisingObjective, StudentState, TrainBatch, TrainTarget
from vdiff.training.run_log import PICTURE_SHARE, preview, preview_size, preview_steps
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep, seed_update


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loop") / "toy_4")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates without a break."""
    folder = tmp_path_factory.mktemp("whole") / "original"
    run_training(train_config(data), folder)
    return folder


class Recorder:
    """An objective in float64 that keeps what it is given."""

    def __init__(self, objective: DenoisingObjective) -> None:
        self.objective = objective
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, draws: TrainBatch, pupil: StudentState) -> TrainTarget:
        exact = dataclasses.replace(draws, images=draws.images.double(), noise=draws.noise.double())
        self.calls.append((exact.images, exact.noise, exact.u))
        return self.objective(exact, pupil)


# What an update is


def test_the_loop_is_the_textbook_s(data, tmp_path, monkeypatch):
    """In float64: the weights of AdamW written out, on v-MSE, with clipped gradients and a plain moving average."""
    lr, decay, betas, clip, average_decay = 3e-3, 0.1, (0.9, 0.999), 0.5, 0.7
    config = train_config(
        data, weighting="snr_plus_one", dropout=0.0, lr=lr, weight_decay=decay, clip_norm=clip, ema=average_decay,
        lr_schedule="linear", warmup_iters=3, log_interval=2,
    )  # fmt: skip
    run = run_of(config, tmp_path / "run")
    recorder = Recorder(run.objective)
    reference = run_of(config, tmp_path / "run").denoiser.double().train()
    monkeypatch.setattr("vdiff.training.loop.preview", lambda *_, **__: PIL.Image.new("L", (1, 1)))
    fit_run(dataclasses.replace(run, objective=recorder, denoiser=run.denoiser.double()))

    names = [name for name, _ in reference.named_parameters()]
    weights = list(reference.parameters())
    mean, square = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    average = [torch.zeros_like(w) for w in weights]
    losses, norms, rates, levels = [], [], [], []
    for n, (x, noise, u) in enumerate(recorder.calls):
        angle = (0.5 * math.pi - 2 * math.atan(math.exp(-10))) * (1 - u) + math.atan(math.exp(-10))
        alpha, sigma = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        v = alpha * noise - sigma * x
        each = (reference(alpha * x + sigma * noise, 1 - u).v - v).square().mean((1, 2, 3))
        levels.append(list(zip((-2 * angle.tan().log()).tolist(), each.tolist(), strict=True)))
        loss = each.mean()
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        rate = lr * min(1, (n + 1) / 3) * (1 - n / 6)
        with torch.no_grad():
            for k, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                g = g * min(1, clip / (norm + 1e-6))  # as torch does
                mean[k] = betas[0] * mean[k] + (1 - betas[0]) * g
                square[k] = betas[1] * square[k] + (1 - betas[1]) * g**2
                w *= 1 - rate * decay
                w -= (
                    rate
                    * (mean[k] / (1 - betas[0] ** (n + 1)))
                    / ((square[k] / (1 - betas[1] ** (n + 1))).sqrt() + 1e-8)
                )
                average[k] = average_decay * average[k] + (1 - average_decay) * w
        losses.append(loss.item())
        norms.append(norm.item())
        rates.append(rate)

    assert len(losses) == 6
    assert max(norms) > clip
    saved = read_tensors(tmp_path / "run" / WEIGHTS)
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(saved[name], expected / (1 - average_decay**6), rtol=1e-6, atol=1e-9)
    shown = scalars(tmp_path / "run")
    pairs = [(0, 1), (2, 3), (4, 5)]
    for name, values in (("loss", losses), ("grad_norm", norms)):
        means = [(values[a] + values[b]) / 2 for a, b in pairs]
        assert list(shown[name]) == [2, 4, 6]
        assert list(shown[name].values()) == pytest.approx(means, rel=1e-6)
    assert list(shown["lr"].values()) == pytest.approx([rates[b] for _, b in pairs], rel=1e-6)
    assert min(shown["images_per_second"].values()) > 0
    for low in range(-20, 20, 5):
        name = f"loss_by_logsnr/{low}_{low + 5}"
        for a, b in pairs:
            inside = [error for level, error in levels[a] + levels[b] if low <= level < low + 5]
            assert shown.get(name, {}).get(b + 1) == (pytest.approx(np.mean(inside), rel=1e-6) if inside else None)
    assert list(shown["ema_decay"].values()) == pytest.approx(
        [(0.7 - 0.7 ** (b + 1)) / (1 - 0.7 ** (b + 1)) for _, b in pairs]
    )
    assert set(shown["bad_updates"].values()) == {0.0}
    assert all(0 <= waited <= 1 for waited in shown["data_wait"].values())
    assert min(shown["update_ms"].values()) > 0
    assert min(shown["memory_gib"].values()) > 0.01


def test_randomness_of_an_update_is_a_function_of_seed_and_update():
    def drawn(seed: int, step: int) -> float:
        seed_update(seed, step)
        return torch.rand(1).item()

    places = list(itertools.product((0, 1, 2**32 - 1), (0, 1, 2, 10**6)))
    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [drawn(*place) for place in reversed(places)] == first[::-1]


def test_another_seed_is_another_run(data, whole, tmp_path):
    run_training(train_config(data, seed=1), tmp_path / "other")
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()


def test_what_is_saved_is_the_average_of_the_weights(data, tmp_path):
    """Σₖ d^(N − k) θₖ / Σₖ d^(N − k) of the raw weights θₖ after update k = 1 … N."""
    run = run_of(train_config(data, num_iters=30, ema=0.6), tmp_path / "run")
    average = {name: torch.zeros_like(w).double() for name, w in run.denoiser.named_parameters()}
    total = sum(0.6 ** (30 - k) for k in range(1, 31))

    def follow(bar: str, completed: int) -> None:
        if bar != "run":  # samples are drawn at the end
            return
        for name, weight in run.denoiser.named_parameters():
            average[name] += 0.6 ** (30 - completed) / total * weight.detach().double()

    answer = fit_run(run, Watcher(follow))
    saved = read_tensors(tmp_path / "run" / WEIGHTS)
    assert_equal_tensors(saved, answer.state_dict())
    assert not answer.training
    differs = 0
    for name, raw in run.denoiser.named_parameters():
        torch.testing.assert_close(saved[name].double(), average[name], rtol=1e-5, atol=1e-6)
        differs += not torch.allclose(saved[name], raw, rtol=1e-3, atol=1e-4)
    assert differs > len(saved) / 2


@pytest.mark.parametrize(
    ("changes", "said"), [({"ema": 0.9}, True), ({"ema": 0.1}, False), ({"ema_remainder": 0.5}, False)]
)
def test_an_average_over_the_whole_training_is_reported(data, tmp_path, monkeypatch, changes, said):
    """The first weights count 0.9⁶ = 0.53 of the last ones: more than a tenth."""
    monkeypatch.setattr("vdiff.training.loop.SHORT_RUN", 6)
    watcher = Watcher()
    fit_run(run_of(train_config(data, num_iters=6, **changes), tmp_path / "run"), watcher)
    line = "the average spans all 6 updates, even the first; --ema 0.3 forgets them"
    assert (line in watcher.lines) == said


def test_without_an_average_the_weights_themselves_are_saved(data, tmp_path):
    run = run_of(train_config(data, ema=0.0), tmp_path / "run")
    answer = fit_run(run)
    assert_equal_tensors(read_tensors(tmp_path / "run" / WEIGHTS), run.denoiser.state_dict())
    assert answer is run.denoiser
    assert not any(name.startswith("ema.") for name in read_tensors(state_path(tmp_path / "run")))


def test_a_checkpoint_loads_by_its_path_alone(data, whole, tmp_path, monkeypatch):
    """Moved to another folder, without run.toml, state, data set or working directory."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in (WEIGHTS, CONFIG):
        (moved / name).write_bytes((whole / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    denoiser, config = load_checkpoint(Path("elsewhere"))
    assert_equal_tensors(denoiser.state_dict(), read_tensors(whole / WEIGHTS))
    assert not denoiser.training
    described = (config.method, config.weights, config.prediction, config.schedule["name"], config.num_timesteps)
    assert described == ("base", "ema", "v", "cosine", 8)
    assert (config.image_size, config.num_iters, config.num_images) == (SIZE, 6, 6 * 4)
    assert config.dataset == str(data)
    assert len(config.dataset_fingerprint) == 64
    assert config.unet["dropout"] == 0.2


@pytest.mark.parametrize("kind", ["nan", "infinite", "gradient"])
def test_a_diverged_run_leaves_the_previous_checkpoint_as_it_was(data, tmp_path, kind):
    folder = tmp_path / "original"
    run = run_of(train_config(data, ckpt_interval=2, num_iters=8, max_bad_steps=0), folder)
    calls, before = itertools.count(1), {}

    def spoil(draws: TrainBatch, pupil: StudentState) -> TrainTarget:
        example, number = run.objective(draws, pupil), next(calls)
        if number == 5:
            before.update(contents(folder))
        if number < 6:
            return example
        if kind == "gradient":
            run.denoiser.network.conv_out.weight.register_hook(lambda gradient: gradient * math.inf)
        factor = {"nan": math.nan, "infinite": 1e30, "gradient": 1.0}[kind]
        return dataclasses.replace(example, x=example.x * factor)

    message = r"no finite gradient in 1 updates in a row, up to update 6: .* diverged; \S*original holds update 4;"
    with pytest.raises(VdiffError, match=message):
        fit_run(dataclasses.replace(run, objective=spoil))
    after = contents(folder)
    kept = [WEIGHTS, CONFIG, str(state_path(folder).relative_to(folder))]
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert read_config(folder).num_iters == 4
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(folder)[0].state_dict().values())


def spoiled(run: Run, updates: set[int]) -> Run:
    """The run whose images are no numbers in some updates (from 1)."""
    calls = itertools.count(load_position(run.folder) + 1)

    def spoil(draws: TrainBatch, pupil: StudentState) -> TrainTarget:
        example = run.objective(draws, pupil)
        return dataclasses.replace(example, x=example.x * (math.nan if next(calls) in updates else 1.0))

    return dataclasses.replace(run, objective=spoil)


def load_position(folder: Path) -> int:
    return int(read_metadata(state_path(folder))["step"]) if state_path(folder).exists() else 0


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_bad_update_changes_nothing_and_is_counted(data, tmp_path, optimizer):
    folder = tmp_path / "original"
    config = train_config(data, ckpt_interval=1, keep_every=1, log_interval=2, num_iters=7, ema=0.0, max_bad_steps=3)
    config = dataclasses.replace(config, optimizer=optimizer)
    fit_run(spoiled(run_of(config, folder), {3, 5, 6}))
    weights = [read_tensors(folder / "history" / f"{n:09d}" / WEIGHTS) for n in range(1, 8)]
    for n, (before, after) in enumerate(itertools.pairwise(weights), start=2):
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (n in {3, 5, 6})
    assert load_position(folder) == 7
    assert float(read_metadata(state_path(folder))["optimizer_step"]) == 4
    shown = scalars(folder)
    assert [shown["bad_updates"][n] for n in (1, 2, 3, 4, 5, 6, 7)] == [0, 0, 1, 0, 1, 1, 0]
    for metric, values in shown.items():
        for n, value in values.items():
            nothing_good = metric in ("loss", "grad_norm") and n in {3, 5, 6}
            assert math.isnan(value) if nothing_good else math.isfinite(value)


def test_a_run_whose_updates_were_all_bad_has_diverged(data, tmp_path):
    """Also one of fewer updates than may be bad in a row, and one that was cut; a single good update is enough."""
    config = train_config(data, num_iters=4, max_bad_steps=10, log_interval=4, ckpt_interval=4)
    with pytest.raises(VdiffError, match=r"in 4 updates in a row, up to update 4: .*; nothing is saved; train again"):
        fit_run(spoiled(run_of(config, tmp_path / "bad"), {1, 2, 3, 4}))
    fit_run(spoiled(run_of(config, tmp_path / "good"), {1, 2, 3}))
    assert read_config(tmp_path / "good").num_iters == 4
    cut = dataclasses.replace(config, ckpt_interval=2)
    for _ in range(2):
        with pytest.raises(VdiffError, match=r"up to update 4: .* holds update 2; train again"):
            fit_run(spoiled(run_of(cut, tmp_path / "cut"), {1, 2, 3, 4}))


def test_a_run_with_bad_updates_resumes_to_the_same_bits(data, tmp_path):
    config = train_config(data, ckpt_interval=2, num_iters=7)
    fit_run(spoiled(run_of(config, tmp_path / "whole"), {3, 4}))
    short = dataclasses.replace(config, num_iters=4)
    fit_run(spoiled(run_of(short, tmp_path / "cut"), {3, 4}))
    fit_run(spoiled(run_of(config, tmp_path / "cut"), {3, 4}))
    assert_equal_bits(tmp_path / "whole" / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    assert_equal_bits(state_path(tmp_path / "whole"), state_path(tmp_path / "cut"))


def test_bad_updates_apart_do_not_stop_a_run_but_in_a_row_they_do(data, tmp_path):
    """At once, whenever the log is due; without a checkpoint the message says so."""
    config = train_config(data, num_iters=9, max_bad_steps=3, log_interval=9, ckpt_interval=9)
    fit_run(spoiled(run_of(config, tmp_path / "apart"), {1, 2, 4, 5, 7, 8}))
    with pytest.raises(VdiffError, match=r"in 3 updates in a row, up to update 4: .*; nothing is saved; train again"):
        fit_run(spoiled(run_of(config, tmp_path / "row"), {2, 3, 4, 5, 6}))


# Parts


def fit_in_float64(config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of a run in which rounding plays no part."""
    monkeypatch.setattr("vdiff.training.loop.preview", lambda *_, **__: PIL.Image.new("L", (1, 1)))
    run = run_of(config, folder)
    fit_run(dataclasses.replace(run, objective=Recorder(run.objective), denoiser=run.denoiser.double()))
    return read_tensors(folder / WEIGHTS)


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_parts_make_the_same_update(data, tmp_path, monkeypatch, grad_accum):
    config = train_config(data, grad_accum=grad_accum, dropout=0.0, ema=0.0)
    parts = fit_in_float64(config, tmp_path / "parts", monkeypatch)
    one = fit_in_float64(dataclasses.replace(config, grad_accum=1), tmp_path / "one", monkeypatch)
    for name, tensor in one.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-6, atol=1e-9)
    for name in ("loss", "grad_norm", "loss_by_logsnr/0_5"):
        expected = scalars(tmp_path / "one")[name]
        assert scalars(tmp_path / "parts")[name] == pytest.approx(expected, rel=1e-6)


def test_parts_must_share_the_batch(data, tmp_path):
    with pytest.raises(OptionError, match=r"batch of 4 cannot be shared equally by 1 processes in 3 parts"):
        run_training(train_config(data, grad_accum=3), tmp_path / "three")


# Memory


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 139.81 GiB of which 2 are free"),
            r"^out of GPU memory \(it has 139\.81 GiB\); give --grad_accum 2 .*--checkpointing True.*--batch_size",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            r"^out of memory; give --grad_accum",
        ),
    ],
)
def test_where_memory_ends_is_said_with_what_helps(data, tmp_path, failure, message):
    run = run_of(train_config(data), tmp_path / "original")
    with pytest.raises(VdiffError, match=message):
        fit_run(dataclasses.replace(run, objective=raising(failure)))
    with pytest.raises(RuntimeError, match="something else"):
        fit_run(dataclasses.replace(run, objective=raising(RuntimeError("something else"))))


def raising(error: Exception) -> Callable[..., TrainTarget]:
    def objective(*_: object) -> TrainTarget:
        raise error

    return objective


# History


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(0, 0, []), (2, 0, [5, 6, 7]), (0, 3, [3, 6]), (1, 3, [3, 6, 7]), (9, 0, [1, 2, 3, 4, 5, 6, 7])],
)
def test_what_is_kept_of_older_checkpoints(data, tmp_path, last, every, kept):
    folder = tmp_path / "original"
    run_training(train_config(data, ckpt_interval=1, num_iters=7, keep_last=last, keep_every=every), folder)
    history = folder / "history"
    found = sorted(int(path.name) for path in history.iterdir()) if history.exists() else []
    assert found == kept
    for number in found:
        denoiser, config = load_checkpoint(history / f"{number:09d}")
        assert config.num_iters == number
        assert all(tensor.isfinite().all() for tensor in denoiser.state_dict().values())
    if 7 in found:
        assert_equal_bits(history / "000000007" / WEIGHTS, folder / WEIGHTS)


# Records


class Tracker:
    """A tracker of Accelerate's that keeps what it is given."""

    name = "fake"

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.said.append(("start", None))

    def log(self, values: dict[str, float], step: int) -> None:
        self.said.append(("log", (step, set(values))))

    def log_images(self, values: dict[str, np.ndarray], step: int) -> None:
        self.said.append(("images", (step, values["samples"].shape[-1], values["samples"].dtype)))

    def finish(self) -> None:
        self.said.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_are_told_the_same(data, tmp_path, monkeypatch, name):
    from accelerate import tracking

    tracker = Tracker()
    made = []
    monkeypatch.setattr("vdiff.training.config.find_spec", lambda _: "a package")
    kind = {"wandb": "WandBTracker", "mlflow": "MLflowTracker"}[name]
    monkeypatch.setattr(tracking, kind, lambda *words, **options: made.append((words, options)) or tracker)
    run_training(train_config(data, tracker=name, log_interval=3), tmp_path / "original")
    assert [what for what, _ in tracker.said] == ["start", "log", "log", "images", "finish"]
    assert tracker.said[2][1][0] == 6
    assert {"loss", "grad_norm", "lr", "ema_decay"} <= tracker.said[2][1][1]
    assert tracker.said[3][1] == (6, 3, np.dtype("uint8"))
    assert "original" in (*made[0][0], *made[0][1].values())
    assert not (tmp_path / "original" / "log").exists()


def test_trackers_that_are_not_there(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("vdiff.training.config.find_spec", lambda _: None)
        with pytest.raises(
            OptionError, match=r"--tracker wandb needs wandb, which is not installed; pip install 'vdif"
        ):
            run_training(train_config(data, tracker="wandb"), tmp_path / "original")
    assert not (tmp_path / "original").exists()
    run_training(train_config(data, tracker="none"), tmp_path / "silent")
    assert sorted(path.name for path in (tmp_path / "silent").iterdir() if path.is_dir()) == ["samples", "state"]


class Failing(Tracker):
    """A tracker that fails when it is told a certain thing."""

    def __init__(self, at: str) -> None:
        super().__init__()
        setattr(self, at, self.fail)

    def fail(self, *_: object, **__: object) -> None:
        raise RuntimeError("no connection to\nhttp://there")


@pytest.mark.parametrize("at", ["start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_one_line(data, tmp_path, monkeypatch, at):
    """At its start it ends the run before anything is trained; later the run goes on without it."""
    from accelerate import tracking

    monkeypatch.setattr("vdiff.training.config.find_spec", lambda _: "a package")
    monkeypatch.setattr(tracking, "MLflowTracker", lambda *_, **__: Failing(at))
    config, watcher = train_config(data, tracker="mlflow", log_interval=3), Watcher()
    if at == "start":
        with pytest.raises(OptionError, match=r"--tracker mlflow: no connection to http://there; .*--tracker none"):
            run_training(config, tmp_path / "original")
        return
    run_training(config, tmp_path / "original", reporter=watcher)
    assert read_config(tmp_path / "original").is_finished
    said = "the tracker failed, so nothing more is logged (no connection to http://there)"
    assert watcher.lines.count(said) == 1


@pytest.mark.parametrize(
    ("theirs", "said"), [("fp16", ", fp32, not Accelerate's fp16, which --precision overrides"), ("no", ", fp32")]
)
def test_accelerate_s_precision_is_not_ignored_silently(data, monkeypatch, theirs, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", theirs)
    assert build_engine(train_config(data)).description == f"cpu{said}"


def test_samples_are_pictures_of_the_average_from_the_same_noise(data, tmp_path):
    folder = tmp_path / "original"
    run_training(train_config(data, batch_size=1000, sample_interval=4, ckpt_interval=3), folder)
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["0000004.png", "0000006.png"]
    denoiser, _ = load_checkpoint(folder)
    images = draw(denoiser, Dpmpp2m(), indices=range(64), image_size=SIZE, num_steps=8, seed=0)
    with PIL.Image.open(folder / "samples" / "0000006.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).float()[..., 0]
    pitch, head = 76, pixels.shape[0] - 16 - (8 * 76 - 4)
    assert pixels.shape[1] == 2 * 16 + 8 * pitch - 4
    assert (pixels[16:head] < 128).any(), "a title"
    for k in range(64):
        top, left = head + k // 8 * pitch, 16 + k % 8 * pitch
        cell = pixels[top : top + 72 : 18, left : left + 72 : 18]
        torch.testing.assert_close(cell / 127.5 - 1, images[k, 0], rtol=0, atol=0.5 / 127.5 + 1e-4)
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [4, 6]


def test_samples_without_bounds_are_not_drawn_as_pictures(data, tmp_path):
    run = run_of(train_config(data, sample_interval=4), tmp_path / "run")
    fit_run(dataclasses.replace(run, description=dataclasses.replace(run.description, codec="unbounded")))
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_what_was_trained_is_saved_before_samples_are_drawn(data, whole, tmp_path, monkeypatch):
    """A kill while the last samples are drawn, or those on the way, loses nothing."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    folder, config = tmp_path / "original", train_config(data, sample_interval=3, ckpt_interval=3)
    with monkeypatch.context() as patch:
        patch.setattr("vdiff.training.loop.preview", killed)
        for _ in range(2):  # at update 3, then at the last one
            with pytest.raises(KeyboardInterrupt):
                run_training(config, folder, resume=folder.exists())
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("changes", "steps", "sampler"),
    [
        ({"num_timesteps": 1024}, 32, Dpmpp2m),
        ({"num_timesteps": 1024, "method": "guided", "teacher": {"method": "base", "teacher": None}}, 32, Dpmpp2m),
        ({"num_timesteps": 8}, 8, Dpmpp2m),
        ({"num_timesteps": 48, "schedule": {"name": "ddpm_cosine", "num_levels": 48}}, 32, Dpmpp2m),
        ({"num_timesteps": 512, "method": "progressive"}, 32, Dpmpp2m),
        ({"num_timesteps": 48, "method": "progressive"}, 24, Dpmpp2m),
        ({"num_timesteps": 4, "method": "progressive"}, 4, Ddim),
    ],
)
def test_a_preview_takes_few_evaluations(tmp_path, changes, steps, sampler):
    """At most 32 of the network; a student of few steps takes its own."""
    denoiser = write_checkpoint(tmp_path / "model", **changes)
    description = read_config(tmp_path / "model")
    seen, told = [], []
    denoiser.register_forward_hook(lambda *_: seen.append(1))
    found = preview(denoiser, description, num=64, steps=steps, seed=2, title="model", on_step=told.append)
    assert (len(seen), told, preview_steps(description)) == (steps, list(range(1, steps + 1)), steps)
    images = draw(denoiser, sampler(), indices=range(64), image_size=SIZE, num_steps=steps, seed=2)
    expected = grid_picture(images, title=f"model · {steps} steps · seed 2")
    assert np.array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("student", [{}, {"num_timesteps": 2, "method": "progressive"}])
def test_grids_take_a_small_part_of_a_run(data, tmp_path, student):
    """Counted in evaluations of the network, of which an update takes three per image; few samples remain anyway."""
    write_checkpoint(tmp_path / "model", **{"num_timesteps": 1024, **student})
    description, sizes = read_config(tmp_path / "model"), []
    for updates in (2, 200, 500, 2000, 20_000, 200_000):
        config = train_config(data, num_iters=updates, batch_size=8, sample_interval=max(1, updates // 10))
        num, steps, is_small = preview_size(config, description)
        assert 12 * num * steps <= updates * 8 * 3 / PICTURE_SHARE or (num, steps) == (4, 2 if student else 8)
        sizes.append((num, steps, is_small))
    usual = (64, 2, False) if student else (64, 32, False)
    assert sizes == sorted(sizes, key=lambda size: size[:2])
    assert len(set(sizes)) > 2
    assert (sizes[0][2], sizes[-1]) == (True, usual)


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, [2, 40]), (61.0, [1, 2, 40])])
def test_the_first_samples_come_early(data, tmp_path, monkeypatch, seconds, expected):
    """After a twentieth of the updates, or a minute; the place is told once, also where the run is resumed."""
    now = 0.0

    def later(*args: Any) -> Any:
        nonlocal now
        now += seconds
        return step(*args)

    step = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", later)
    monkeypatch.setattr("vdiff.training.loop.time", types.SimpleNamespace(monotonic=lambda: now))
    config, watcher, folder = train_config(data, num_iters=40, sample_interval=100), Watcher(), tmp_path / "original"
    run_training(config, folder, reporter=watcher)
    assert sorted(int(path.stem) for path in (folder / "samples").iterdir()) == expected
    told = [line for line in watcher.lines if line.startswith("samples")]
    size = ", 4 in 8 steps: a short run"
    assert told == [f"samples are saved in {folder / 'samples'}{size}; curves: tensorboard --logdir {tmp_path}"]


def test_pictures_change_nothing(data, whole, tmp_path):
    run_training(train_config(data, sample_interval=1, log_interval=1, ckpt_interval=1), tmp_path / "original")
    assert_same_run(tmp_path / "original", whole)


# Registries


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_every_prediction_and_schedule_makes_a_checkpoint(data, tmp_path, prediction, schedule):
    if prediction == "eps" and SCHEDULES[schedule].zero_snr:
        pytest.skip("eps carries no information at zero SNR; test_training_config: it is refused")
    config = train_config(
        data, prediction=prediction, schedule=schedule, weighting="snr", num_iters=2, log_interval=1, num_timesteps=2
    )
    done = run_training(config, tmp_path / "original")
    assert done.is_finished
    losses = list(scalars(tmp_path / "original")["loss"].values())
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    denoiser, found = load_checkpoint(tmp_path / "original")
    assert (found.prediction, found.schedule["name"]) == (prediction, schedule)
    assert denoiser.schedule.num_levels in (None, 2)
    assert denoiser.network.config.out_channels == (2 if prediction == "both" else 1)


@pytest.mark.parametrize(
    ("schedule", "prediction", "weighting"),
    all_cases(lambda i, j, k: (i + j + k) % 3 == 0, list(SCHEDULES), list(PREDICTION_TYPES), list(WEIGHTINGS)),
)
def test_every_combination_trains(data, tmp_path, prediction, schedule, weighting):
    """Two updates with finite answers, that move every weight they can reach."""
    values = {"prediction": prediction, "schedule": schedule, "weighting": weighting, "num_timesteps": 16}
    if (prediction, weighting) == ("eps", "truncated_snr"):
        with pytest.raises(OptionError, match="--weighting snr"):
            train_config(data, **values)
        return
    if prediction == "eps" and SCHEDULES[schedule].zero_snr:
        with pytest.raises(OptionError, match="zero SNR"):
            train_config(data, **values)
        return
    config = train_config(data, **values, ema=0.0)
    run = run_of(config, tmp_path)
    before = {name: w.detach().clone() for name, w in run.denoiser.named_parameters()}
    engine = build_engine(config)
    update = TrainStep(run, engine)
    answers = [update(step, batch) for step, batch in zip(range(2), run.batches.start_at(0), strict=False)]
    for answer in answers:
        assert answer.losses.shape == answer.logsnr.shape == (config.batch_size,)
        assert answer.losses.isfinite().all()
        assert answer.losses.mean() > 0
        assert 0 < answer.norm < math.inf
        assert not answer.is_bad
    assert all(w.isfinite().all() for w in run.denoiser.parameters())
    assert all(not torch.equal(w, before[name]) for name, w in run.denoiser.named_parameters() if "conv_out" in name)


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_and_colours(tmp_path, channels):
    """The network is told the class where the data have classes: another class, another answer."""
    data = write_dataset(tmp_path / "data", channels=channels, classes=("a", "b", "c"))
    run_training(train_config(data, class_conditional=True, num_iters=3, dropout=0.0), tmp_path / "original")
    denoiser, config = load_checkpoint(tmp_path / "original")
    assert config.class_names == ["a", "b", "c"]
    assert config.unet["num_classes"] == 3
    z, t = torch.ones(3, channels, SIZE, SIZE), torch.full((3,), 0.5, dtype=torch.float64)
    said = denoiser(z, t, condition(torch.tensor([0, 1, 2]))).x
    assert not torch.allclose(said[0], said[1])
    assert not torch.allclose(said[1], said[2])


def test_network_and_objective_are_told_the_classes_of_their_images(tmp_path):
    data = write_dataset(tmp_path / "data", classes=("a", "b", "c"))
    run = run_of(train_config(data, class_conditional=True, num_iters=3), tmp_path / "original")
    told, taught = [], []
    run.denoiser.register_forward_pre_hook(lambda _, arguments: told.append(arguments[2].tensors["classes"]))

    def teach(draws: TrainBatch, pupil: StudentState) -> TrainTarget:
        taught.append(draws.condition.tensors["classes"])
        return run.objective(draws, pupil)

    fit_run(dataclasses.replace(run, objective=teach))
    expected = [batch.classes.tolist() for batch in itertools.islice(run.batches.start_at(0), 3)]
    assert len({tuple(classes) for classes in expected}) > 1
    assert [classes.tolist() for classes in told[:3]] == expected
    assert [classes.tolist() for classes in taught] == expected


def test_low_precision_is_of_the_network_only(data, tmp_path):
    run_training(train_config(data, precision="bf16", ema=0.0), tmp_path / "original")
    weights = read_tensors(tmp_path / "original" / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
