"""Whether prompts steer a model of `text_pipeline.py`, how much it memorises, and in which style it draws.

    python benchmarks/text_prompts.py checkpoints/emoji checkpoints/base_* --work emoji --style noto --solver_steps 4,2

With each checkpoint one image is drawn for each of `--num` captions that training has seen, and for each held-out
caption of the style, up to `--num`. The captions are in groups of 100; seen captions fill up the last group, and their
images are not counted. Columns:

    evaluations of the network for one image; with guidance each step takes two
    found       the part of images whose own caption the matcher ranks first among the 100 of its group; chance is 1 %
    among 5     the same for the first five
    Fréchet     between these images and all real training images, in the features of the matcher's image tower (only of
                seen captions: there are too few others)
    copies      the part of images that are a copy of a training image: the RMSE to the nearest one is less than a third
                of that one's RMSE to its own nearest neighbour (criterion of Yoon et al. 2023, *Diffusion Probabilistic
                Models Generalize when They Fail to Memorize*)
    style       the part that a classifier of the styles, trained on real images, assigns to each style

Rows "real images" are those of the style, for comparison. The title says how often the classifier of styles is right on
held-out images that went through the autoencoder, as all drawn images do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.report import RESULTS, machine, write_report
from benchmarks.text_pipeline import SIZE, ImageTower, text_tower, tokens_of
from vdiff.evaluation.metrics import frechet_distance
from vdiff.models.codec import to_uint8

GROUP = 100  # captions among which the matcher chooses
SHOWN = 16  # captions in the picture


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
        ranks = []
        for k in range(0, len(images), GROUP):
            tokens = tokens_of(self.tokenizer, captions[k : k + GROUP])
            texts = F.normalize(self.towers["text"](tokens).text_embeds, dim=-1)
            scores = self.towers["image"](images[k : k + GROUP]) @ texts.T
            ranks.append((scores > scores.diagonal()[:, None]).sum(1))
        return torch.cat(ranks)

    @torch.inference_mode()
    def features(self, images: Tensor) -> np.ndarray:
        """(N, WIDTH)."""
        return torch.cat([self.towers["image"](part) for part in images.split(GROUP)]).numpy()


def learn_styles(styles: dict[str, Tensor], reconstructed: dict[str, Tensor], *, updates: int = 2000) -> nn.Module:
    """A classifier of the styles by their training images, before and after the autoencoder, shifted and mirrored."""
    torch.manual_seed(5)
    random = torch.Generator().manual_seed(5)
    blocks = [_block(3, 24), _block(24, 48), _block(48, 96)]
    model = nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96, len(styles))
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, updates)
    for update in range(updates):
        source = styles if update % 2 else reconstructed
        images = torch.cat([each[torch.randint(len(each), (32,), generator=random)] for each in source.values()])
        x, y, mirrored = torch.randint(0, 7, (3,), generator=random).tolist()
        images = F.pad(images, (3, 3, 3, 3), value=1.0)[:, :, y : y + SIZE, x : x + SIZE]
        loss = F.cross_entropy(
            model(images.flip(3) if mirrored % 2 else images), torch.arange(len(styles)).repeat_interleave(32)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _block(channels: int, width: int) -> nn.Module:
    """Two convolutions, and half of the size."""
    first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    norms = [nn.GroupNorm(8, width) for _ in range(2)]
    return nn.Sequential(first, norms[0], nn.SiLU(), second, norms[1], nn.SiLU(), nn.MaxPool2d(2))


@torch.inference_mode()
def reconstruct(work: Path, images: Tensor) -> Tensor:
    """What the autoencoder makes of images: (N, 3, 32, 32) in [−1, 1]."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(work / "pipeline" / "vae").eval()
    parts = [autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample for part in images.split(64)]
    return torch.cat(parts).clamp(-1, 1)


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


def drawn(model: vdiff.Model, prompts: list[str], **how: Any) -> Tensor:
    """One image a prompt: (N, 3, 32, 32) in [−1, 1], of 8 bits."""
    images = model.sample(prompts=prompts, batch_size=GROUP, **how).to_pil()
    return as_x(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))


def numbers(text: str) -> list[int]:
    """`8,4` → [8, 4]."""
    return [int(word) for word in text.split(",") if word]


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--work", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of text_pipeline.py.")
@click.option("--style", required=True, help="The set that the models were trained on last.")
@click.option("--steps", default="64", help="DDIM steps of models that are not distilled; others take theirs.")
@click.option("--solver_steps", default="", help="Of those models with DPM-Solver++ (2M), too: 8,4,2.")
@click.option("--sampler_steps", default="", help="Of students with the sampler consistency, too: 8,4,2.")
@click.option("--guidance_scale", default=3.0, help="Of models that are not distilled.")
@click.option("--num", default=1000, help="Images of seen captions for a row; a multiple of 100.")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
@click.option("--name", default="text_prompts", help="Of the table in results/, and of the picture with its rows.")
def main(
    checkpoints: tuple[Path, ...],
    work: Path,
    style: str,
    steps: str,
    solver_steps: str,
    sampler_steps: str,
    guidance_scale: float,
    num: int,
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
    matcher, training = Matcher(work), {label: sets[label]["train"][1] for label in labels}
    classifier = learn_styles(training, {label: reconstruct(work, images) for label, images in training.items()})
    right = [style_of(classifier, reconstruct(work, sets[label]["held_out"][1])) == k for k, label in enumerate(labels)]
    random, rows, real = np.random.default_rng(seed), [], matcher.features(training[style])
    chosen, counted = {}, {}
    for part in ("train", "held_out"):
        texts = [str(each) for each in random.permutation(sorted(set(sets[style][part][0])))][:num]
        more = [str(each) for each in random.permutation(sorted(set(sets[style]["train"][0])))]
        chosen[part], counted[part] = texts + more[: -len(texts) % GROUP], len(texts)

    shown: list[Tensor] = []

    def measure(title: str, evaluations: str, part: str, images: Tensor, *, are_real: bool = False) -> None:
        """Add a row to the table; seen captions also give a row of the picture."""
        number = counted[part]
        if part == "train":
            shown.append(images[:SHOWN])
        ranks, styles = matcher.ranks(images, chosen[part])[:number], style_of(classifier, images[:number])
        rows.append([
            title, evaluations, "seen" if part == "train" else "held out", str(number),
            _percent(ranks < 1), _percent(ranks < 5),
            f"{frechet_distance(matcher.features(images), real):.4f}" if part == "train" else "–",
            "–" if are_real else _percent(are_copies(images[:number], training[style])),
            ", ".join(f"{label} {_percent(styles == k)}" for k, label in enumerate(labels)),
        ])  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)

    for part, texts in chosen.items():
        images = torch.stack([_real(sets[style], text) for text in texts])
        measure("real images", "–", part, images, are_real=True)
        measure("real images, autoencoder", "–", part, reconstruct(work, images), are_real=True)
    for checkpoint in checkpoints:
        model = vdiff.load(checkpoint)
        title, guided = f"{checkpoint.parent.name}/{checkpoint.name}", {"guidance": guidance_scale - 1}
        if model.config.teacher is None:
            ways: list[tuple[str, int, dict[str, Any]]] = [
                *(("DDIM", 2, {"steps": count, **guided}) for count in numbers(steps)),
                *(
                    ("DPM-Solver++", 2, {"steps": count, "sampler": "dpmpp_2m", **guided})
                    for count in numbers(solver_steps)
                ),
            ]
        else:
            ways = [("DDIM", 1, {"steps": model.config.num_timesteps})]
            ways += [("consistency", 1, {"steps": count, "sampler": "consistency"}) for count in numbers(sampler_steps)]
        for sampler, each, how in ways:
            for part, texts in chosen.items():
                images = drawn(model, texts, seed=seed, **how)
                measure(f"{title}, {sampler}, {how['steps']}", str(each * how["steps"]), part, images)
    title = f"Prompts; guidance scale {guidance_scale:g}; styles recognised in {_percent(torch.cat(right))}"
    columns = ["images of", "evaluations", "captions", "number", "found", "among 5", "Fréchet", "copies", "style"]
    write_report(name, title, columns, rows, machine())
    picture = torch.stack(shown).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(to_uint8(picture).numpy()).resize(
        (picture.shape[1] * 2, picture.shape[0] * 2), Image.Resampling.NEAREST
    ).save(RESULTS / f"{name}.png")
    print("columns of the picture:", *chosen["train"][:SHOWN], sep="\n    ")


def _percent(these: Tensor) -> str:
    """The part that is true."""
    return f"{100 * float(these.float().mean()):.0f} %"


def _real(sets: dict[str, tuple[list[str], Tensor]], text: str) -> Tensor:
    """The first image with a caption."""
    captions, images = next(each for each in sets.values() if text in each[0])
    return images[captions.index(text)]


if __name__ == "__main__":
    sys.exit(main())
