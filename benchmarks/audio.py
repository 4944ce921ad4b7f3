"""Spoken digits: a class-conditional teacher and its few-step students, on the words of a speech synthesiser.

    apt-get install espeak-ng
    python benchmarks/audio.py           # about an hour of one core; results/audio.md and .png
    python benchmarks/audio.py --quick   # minutes, to see that it runs; writes nothing

espeak-ng speaks zero to nine in 40 voices (4 accents, 10 variants), 3 speeds and 3 pitches: 3,600 words; 8 kHz, 6,144
samples (0.77 s). After an interruption the same command continues: words, dataset, models, recogniser and samples that
exist in --work are kept.

Every row draws the same noises. Fréchet distance: on the mel spectrograms of `vdiff evaluate`, to all words, with its
floor of −80 dB, and with one of −40 dB, as the first one measures noise in the silence more than the words. LSD: the
log-spectral distance to the teacher's samples by DDIM in 64 steps from the same noise. Right: how many digits a small
recogniser names right; it learns on the words of 32 voices and is tested on the other 8. Level, clipped and silent say
how loud samples are (RMS), how many values are at ±1, and how many samples have an RMS below −60 dBFS.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.distances import SoundDistance
from benchmarks.report import RESULTS, machine, write_report
from vdiff.data.batches import decode_stored
from vdiff.data.images import captioned_grid, save_png
from vdiff.data.sound_page import write_page
from vdiff.data.store import ImageStore
from vdiff.evaluation.sounds import log_mel, log_spectral_distance
from vdiff.models.codec import WAVEFORM, spectrograms

ROOT = Path(__file__).parent.parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("m1", "m2", "m3", "m5", "m7", "f1", "f2", "f3", "f4", "f5")
HELD_OUT = ("m7", "f5")
"""The variants on whose words the recogniser is tested."""
SPEEDS, PITCHES = (140, 165, 190), (35, 50, 65)
RATE, LENGTH, TEACHER_STEPS, STEPS = 8_000, 6_144, 64, (8, 4, 2, 1)
SHOWN = 10


def speak(folder: Path, variants: Sequence[str]) -> None:
    """Write the words that are missing in `folder`, a folder for each digit."""
    for digit, word in enumerate(WORDS):
        (folder / f"{digit}").mkdir(parents=True, exist_ok=True)
        for accent, variant, speed, pitch in itertools.product(ACCENTS, variants, SPEEDS, PITCHES):
            path = folder / f"{digit}" / f"{accent}-{variant}-{speed}-{pitch}.wav"
            if not path.exists():
                part = path.with_suffix(".part")
                voice = ["-v", f"{accent}+{variant}", "-s", str(speed), "-p", str(pitch)]
                subprocess.run(["espeak-ng", *voice, "-w", str(part), word], check=True)
                part.rename(path)


def vdiff_program(program: str, *options: object) -> None:
    """Run one of the four commands; it ends with 3 if files were skipped."""
    command = [sys.executable, str(ROOT / program), *map(str, options)]
    if subprocess.run(command).returncode not in (0, 3):
        sys.exit(f"{program} failed")


def sounds_of(dataset: Path) -> tuple[Tensor, Tensor]:
    """All sounds (N, 1, L) in [−1, 1] and their digits (N,)."""
    store = ImageStore(dataset)
    sides = (LENGTH,)
    sounds = [torch.from_numpy(decode_stored(store, store.encoded(LENGTH, k), sides, "it")) for k in range(len(store))]
    labels = torch.tensor([int(store.meta.class_names[store.label(k) or 0]) for k in range(len(store))])
    return WAVEFORM.encode(torch.stack(sounds)), labels


class Recogniser(nn.Module):
    """Three convolutions on a mel spectrogram (n, 20, times), whose mean over the time gives ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(20, 64, 5, 2), nn.ReLU(), nn.Conv1d(64, 64, 5, 2), nn.ReLU(), nn.Conv1d(64, 64, 5), nn.ReLU()
        )
        self.last = nn.Linear(2 * 64, len(WORDS))

    def forward(self, sounds: Tensor) -> Tensor:
        hidden = self.layers(log_mel(sounds, RATE).float() / 20 + 2)
        logits: Tensor = self.last(torch.cat([hidden.mean(2), hidden.amax(2)], 1))
        return logits


def right(recogniser: Recogniser, sounds: Tensor, digits: Tensor) -> float:
    """The fraction of digits that are named right."""
    with torch.no_grad():
        return float((recogniser(sounds).argmax(1) == digits).float().mean())


def train_recogniser(path: Path, sounds: Tensor, digits: Tensor, updates: int) -> Recogniser:
    """The recogniser in a file, or a new one; words are shifted by up to 50 ms, scaled, and get noise."""
    torch.manual_seed(0)
    found = Recogniser()
    if path.exists():
        found.load_state_dict(torch.load(path, weights_only=True))
        return found.eval()
    optimiser = torch.optim.Adam(found.parameters(), 1e-3)
    for _ in range(updates):
        rows = torch.randint(len(sounds), (64,))
        x = torch.roll(sounds[rows], int(torch.randint(0, RATE // 20, ())), -1)
        x = x * (0.5 + torch.rand(64, 1, 1)) + 10 ** (-2 - 2 * torch.rand(64, 1, 1)) * torch.randn_like(x)
        optimiser.zero_grad()
        F.cross_entropy(found(x), digits[rows]).backward()
        optimiser.step()
    torch.save(found.state_dict(), path)
    return found.eval()


def drawn(path: Path, model: Path, count: int, sampler: str, steps: int) -> Tensor:
    """Samples 0 … count − 1 of a model, kept in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = vdiff.load(model, device="cpu").sample(num=count, sampler=sampler, steps=steps, seed=0)
        torch.save(torch.as_tensor(found).clone(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    sounds: Tensor = torch.load(path, weights_only=True)
    return sounds


def decibels(power: Tensor) -> Tensor:
    """10 log₁₀ of a power."""
    return 10 * power.clamp(min=1e-12).log10()


@click.command()
@click.option("--quick", is_flag=True, help="Few words, updates and samples; nothing is written to results.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("audio"), show_default=True)
@click.option("--updates", type=click.IntRange(1), default=3000, show_default=True, help="Of the teacher.")
@click.option("--part", type=click.IntRange(1), default=100, show_default=True, help="Updates a halving.")
@click.option("--batch_size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--num", type=click.IntRange(100), default=200, show_default=True, help="Samples a row.")
def main(quick: bool, work: Path, updates: int, part: int, batch_size: int, num: int) -> None:
    """Print the table and write it to benchmarks/results/audio.md, the spectrograms beside it."""
    if shutil.which("espeak-ng") is None:
        raise click.UsageError("espeak-ng is missing: apt-get install espeak-ng")
    torch.set_num_threads(1)
    updates, part, num = (4, 1, 100) if quick else (updates, part, num)
    speak(work / "words", ("m1", *HELD_OUT) if quick else VARIANTS)
    form = ("--kind", "audio", "--rate", RATE, "--length", LENGTH, "--trim", 40, "--num_workers", 1)
    if not (data := work / "data").exists():
        vdiff_program("prepare_data.py", work / "words", *form, "--out", data)
    learning = ("--device", "cpu", "--threads", 1, "--tracker", "none", "--num_workers", 0, "--batch_size", batch_size)
    teacher, models = work / "models" / "original", work / "models"
    if not (teacher / "config.json").exists() or not vdiff.load(teacher, device="cpu").config.is_finished:
        resume = ("--resume",) if (teacher / "run.toml").exists() else ()
        own = (
            "--preset",
            "audio_tiny",
            "--num_iters",
            updates,
            "--num_timesteps",
            TEACHER_STEPS,
            "--sample_interval",
            500,
        )
        vdiff_program("train.py", "--data", data, "--out", teacher, *learning, *(own if not resume else ()), *resume)
    ladder = ("--teacher_steps", TEACHER_STEPS, "--to_steps", 1, "--num_iters", part, "--report", False)
    vdiff_program("distill.py", "--base", teacher, *ladder, *learning, "--check_images", 64, "--distance_images", 100)

    sounds, digits = sounds_of(data)
    names = [path.stem for digit in range(10) for path in sorted((work / "words" / f"{digit}").glob("*.wav"))]
    tested = torch.tensor([name.split("-")[-3] in HELD_OUT for name in names])
    recogniser = train_recogniser(work / "recogniser.pt", sounds[~tested], digits[~tested], 50 if quick else 1500)
    distance, loud = SoundDistance(sounds, RATE), SoundDistance(sounds, RATE, floor=-40)
    asked = torch.arange(num) % 10
    students = {
        int(vdiff.load(path, device="cpu").config.num_timesteps): path for path in sorted(models.glob("base_?"))
    }
    entries = [("teacher, DDIM", teacher, "ddim", TEACHER_STEPS)]
    for steps in STEPS:
        entries += [("teacher, DPM-Solver++", teacher, "dpmpp_2m", steps), ("student", students[steps], "ddim", steps)]
    samples = {
        (name, steps): drawn(work / "samples" / f"{path.name}-{sampler}-{steps}-{num}.pt", path, num, sampler, steps)
        for name, path, sampler, steps in entries
    }
    truth = samples["teacher, DDIM", TEACHER_STEPS]
    rows = [["words of the data", "", "", "", "", f"{100 * right(recogniser, sounds[tested], digits[tested]):.1f} %"]]
    rows[0] += facts(sounds[tested])
    for (name, steps), found in samples.items():
        lsd = f"{float(log_spectral_distance(found, truth, RATE).mean()):.2f}" if found is not truth else ""
        share = f"{100 * right(recogniser, found, asked):.1f} %"
        rows.append([name, str(steps), f"{distance(found):.2f}", f"{loud(found):.2f}", lsd, share, *facts(found)])
    columns = [
        "sounds",
        "steps",
        "Fréchet distance",
        "above −40 dB",
        "LSD, dB",
        "digit right",
        "level, dBFS",
        "clipped",
        "silent",
    ]
    print("\n".join(" | ".join(row) for row in [columns, *rows]))
    chosen = [int(torch.nonzero(tested & (digits == k))[0]) for k in range(SHOWN)]
    grid = {
        "words": sounds[chosen],
        **{f"{name}\n{steps} steps": found[:SHOWN] for (name, steps), found in samples.items()},
    }
    cells = [[spectrograms(each[k : k + 1])[0] for each in grid.values()] for k in range(SHOWN)]
    save_png(captioned_grid(cells, list(grid), [WORDS[k] for k in range(SHOWN)]), work / "audio.png")
    table = [(WORDS[k], [("", each[k]) for each in grid.values()]) for k in range(SHOWN)]
    write_page(work / "audio.html", "Spoken digits from the same noise", list(grid), table, RATE)
    print(f"{work / 'audio.html'} plays them")
    if quick:
        return
    title = (
        f"Spoken digits of {RATE} Hz: teacher of {updates:,} updates, students of {part} a halving, batch "
        f"{batch_size}; {num} samples a row, distance to {len(sounds):,} words"
    )
    write_report("audio", title, columns, rows, machine())
    save_png(captioned_grid(cells[::2], list(grid), WORDS[::2]).quantize(24), RESULTS / "audio.png")


def facts(sounds: Tensor) -> list[str]:
    """Mean level, the share of values at ±1, and of silent sounds."""
    levels = decibels(sounds.square().mean((1, 2)))
    clipped, silent = (sounds.abs() >= 1 - 1 / 32768).float().mean(), (levels < -60).float().mean()
    mean = float(levels.mean())
    return [
        f"{mean:.1f}" if math.isfinite(mean) else "",
        f"{100 * float(clipped):.2f} %",
        f"{100 * float(silent):.1f} %",
    ]


if __name__ == "__main__":
    main()
