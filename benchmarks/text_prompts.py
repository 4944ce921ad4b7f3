"""Whether prompts steer a model of `text_pipeline.py`, how much it memorises, and in which style it draws.

    python benchmarks/text_prompts.py checkpoints/emoji checkpoints/base_* --work emoji --style noto

With each checkpoint one image is drawn for each of 100 captions that training has seen, and for each of 100 held-out
captions of the style. If there are fewer, seen captions fill up the hundred, and their images are not counted.
Columns:

    found       the part of images whose own caption the matcher ranks first among the 100; chance is 1 %
    among 5     the same for the first five
    copies      the part of images that are a copy of a training image: the RMSE to the nearest one is less than a third
                of that one's RMSE to its own nearest neighbour (criterion of Yoon et al. 2023, *Diffusion Probabilistic
                Models Generalize when They Fail to Memorize*)
    style       the part that a classifier of the styles, trained on real images, assigns to each style

Rows "real images" are those of the style, for comparison. The title says how often the classifier of styles is right on
held-out real images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.report import machine, write_report
from benchmarks.text_pipeline import WIDTH, ImageTower, text_tower, tokens_of

GROUP = 100  # captions among which the matcher chooses


def real_images(folder: Path) -> tuple[list[str], Tensor]:
    """The captions in a folder of images with .txt files, and the images (N, 3, 32, 32) in [−1, 1]."""
    paths = sorted(folder.glob("*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return [path.with_suffix(".txt").read_text() for path in paths], as_x(torch.from_numpy(images).permute(0, 3, 1, 2))


def as_x(images: Tensor) -> Tensor:
    """uint8 to [−1, 1]."""
    return images.float().div(127.5).sub(1)


class Matcher:
    """The two towers of `text_pipeline.py` that have seen every caption."""

    def __init__(self, work: Path) -> None:
        from transformers import CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(work / "pipeline" / "tokenizer")
        self.towers = nn.ModuleDict({"text": text_tower(len(self.tokenizer), 2), "image": ImageTower(48)})
        self.towers.load_state_dict(torch.load(work / "matcher.pt", weights_only=True))
        self.towers.eval()

    @torch.inference_mode()
    def ranks(self, images: Tensor, captions: list[str]) -> Tensor:
        """The place of each image's own caption, from 0, among those of its group of 100."""
        texts = F.normalize(self.towers["text"](tokens_of(self.tokenizer, captions)).text_embeds, dim=-1)
        scores = torch.cat([self.towers["image"](part) for part in images.split(64)]) @ texts.T
        own = scores.diagonal()
        return (scores > own[:, None]).sum(1)


def learn_styles(styles: dict[str, Tensor], *, updates: int = 600) -> nn.Module:
    """A classifier of the styles by their training images, shifted by some pixels."""
    torch.manual_seed(5)
    random = torch.Generator().manual_seed(5)
    model = nn.Sequential(ImageTower(16), nn.Linear(WIDTH, len(styles)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(updates):
        parts = [images[torch.randint(len(images), (32,), generator=random)] for images in styles.values()]
        images = torch.cat(parts)
        shift = torch.randint(-3, 4, (2,), generator=random).tolist()
        images = images.roll(shift, (2, 3)) + 0.1 * torch.randn(images.shape, generator=random)
        loss = F.cross_entropy(model(images), torch.arange(len(styles)).repeat_interleave(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def style_of(model: nn.Module, images: Tensor) -> Tensor:
    """The number of each image's style."""
    return torch.cat([model(part).argmax(1) for part in images.split(64)])


def are_copies(images: Tensor, training: Tensor) -> Tensor:
    """Which images are copies of training images: (N,) bool."""
    flat = training.flatten(1)
    near, which = torch.cdist(images.flatten(1), flat).min(1)
    own = torch.cdist(flat[which], flat)
    own[torch.arange(len(which)), which] = torch.inf
    return near < own.min(1).values / 3


def drawn(model: vdiff.Model, prompts: list[str], *, steps: int, guidance_scale: float, seed: int) -> Tensor:
    """One image a prompt: (N, 3, 32, 32) in [−1, 1], of 8 bits."""
    samples = model.sample(prompts=prompts, steps=steps, guidance=guidance_scale - 1, seed=seed)
    return as_x(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in samples.to_pil()]))


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--work", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of text_pipeline.py.")
@click.option("--style", required=True, help="The set that the models were trained on last.")
@click.option("--steps", default=64, help="Of models that are not distilled; others take theirs.")
@click.option("--guidance_scale", default=3.0, help="Of models that are not distilled.")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
@click.option("--name", default="text_prompts", help="Of the table in results/.")
def main(
    checkpoints: tuple[Path, ...],
    work: Path,
    style: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    threads: int,
    name: str,
) -> None:
    """Measure models."""
    torch.set_num_threads(threads)
    labels = sorted(path.name for path in (work / "images").iterdir())
    sets = {
        label: {part: real_images(work / "images" / label / part) for part in ("train", "held_out")} for label in labels
    }
    matcher, classifier = Matcher(work), learn_styles({label: sets[label]["train"][1] for label in labels})
    right = [style_of(classifier, sets[label]["held_out"][1]) == k for k, label in enumerate(labels)]
    random, rows, (captions, training) = np.random.default_rng(seed), [], sets[style]["train"]
    chosen, counted = {}, {}
    for part in ("train", "held_out"):
        texts = [str(each) for each in random.permutation(sorted(set(sets[style][part][0])))]
        more = [str(each) for each in random.permutation(sorted(set(captions)))]
        chosen[part], counted[part] = (texts + more)[:GROUP], min(len(texts), GROUP)

    def measure(title: str, part: str, images: Tensor, *, real: bool = False) -> None:
        """Add a row."""
        number = counted[part]
        ranks, styles = matcher.ranks(images, chosen[part])[:number], style_of(classifier, images[:number])
        rows.append([
            title, "seen" if part == "train" else "held out", str(number), _percent(ranks < 1), _percent(ranks < 5),
            "–" if real else _percent(are_copies(images[:number], training)),
            ", ".join(f"{label} {_percent(styles == k)}" for k, label in enumerate(labels)),
        ])  # fmt: skip

    for part, texts in chosen.items():
        measure("real images", part, torch.stack([_real(sets[style], text) for text in texts]), real=True)
    for checkpoint in checkpoints:
        model = vdiff.load(checkpoint)
        distilled = model.config.teacher is not None
        count, scale = (model.config.num_timesteps, 1.0) if distilled else (steps, guidance_scale)
        for part, texts in chosen.items():
            images = drawn(model, texts, steps=count, guidance_scale=scale, seed=seed)
            measure(f"{checkpoint.name}, {count} steps", part, images)
    title = f"Prompts; guidance scale {guidance_scale:g}; styles recognised in {_percent(torch.cat(right))}"
    columns = ["images of", "captions", "number", "found", "among 5", "copies", "style"]
    write_report(name, title, columns, rows, machine())


def _percent(these: Tensor) -> str:
    """The part that is true."""
    return f"{100 * float(these.float().mean()):.0f} %"


def _real(sets: dict[str, tuple[list[str], Tensor]], text: str) -> Tensor:
    """The first image with a caption."""
    captions, images = next(each for each in sets.values() if text in each[0])
    return images[captions.index(text)]


if __name__ == "__main__":
    sys.exit(main())
