"""A small text-to-image pipeline in the layout of Stable Diffusion 1.5, made from captioned images on two cores.

    python benchmarks/text_pipeline.py --set noto=noto.zip,noto.jsonl --set fluent=fluent.zip,fluent.jsonl --out emoji

It writes

    emoji/images/NAME/train, held_out   images on white, each with its caption in a .txt file beside it
    emoji/pipeline                      tokenizer, text_encoder, vae, scheduler and a unet with random weights
    emoji/matcher.pt                    two towers that say which caption fits an image, to measure models by

The models of results/text_prompts_noto.md and text_prompts_fluent.md come from it by

    vdiff import diffusers emoji/pipeline --out checkpoints/emoji0
    python train.py --base checkpoints/emoji0 --data data/noto_train --prediction v --zero_snr --flip False --lr 8e-4 \\
        --num_iters 3600 --batch_size 64 --warmup_iters 150 --ema 0.998 --precision bf16 --out checkpoints/emoji
    python train.py --base checkpoints/emoji --data data/fluent_train --lora_rank 8 --lora_targets conv --flip False \\
        --lr 1e-3 --num_iters 700 --batch_size 64 --ema 0.99 --precision bf16 --out checkpoints/fluent
    python distill.py --base checkpoints/emoji --data data/noto_train --guidance_scale 3 --teacher_steps 64 \\
        --to_steps 32 --lora_rank 16 --lora_alpha 16 --lora_targets conv --lr 1e-3 --num_iters 2000 --batch_size 32 \\
        --last_factor 1 --flip False --precision bf16 --name lora_guided
    python distill.py --base checkpoints/lora_guided/base_0 --data data/noto_train --phases 32,8,4,2,1 --lora_rank 16 \\
        --lora_alpha 16 --lora_targets conv --lr 5e-4 --num_iters 300 --last_factor 2 --batch_size 32 --flip False \\
        --precision bf16 --name lora

`fluent2` and `fluent3` each continue the LoRA before by `--lora`, for 1,500 updates at `--lr 3e-3`.

A tenth of the captions is held out, by a hash of the caption: nothing in the pipeline has seen them or their images.
The text encoder is the text tower of a contrastive model of images and captions (Radford et al. 2021), as in Stable
Diffusion, and frozen later. The autoencoder turns 32×32 pixels into 8×8 latents of 4 channels. The matcher has other
towers and another seed, and has seen all captions.

Each part that is finished is kept, and the same command continues with the next one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIZE, TOKENS, WIDTH, LATENTS = 32, 24, 128, 4
VOCABULARY = 2000
BATCH = 64


def is_held_out(caption: str) -> bool:
    """Whether a caption, in any case, belongs to the held-out tenth."""
    return hashlib.sha256(caption.lower().encode()).digest()[0] < 26


def images_of(archive: Path, captions: Path) -> Iterator[tuple[str, str, list[str], Image.Image]]:
    """Name, caption, tags and image on white, by the lines of a JSON file with `file_name`, `text` and `tags`."""
    with zipfile.ZipFile(archive) as file:
        names = {name.split("/", 1)[-1]: name for name in file.namelist()}
        for line in captions.read_text().splitlines():
            values = json.loads(line)
            with file.open(names[values["file_name"]]) as member:
                image = Image.open(member).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            yield values["file_name"], values["text"], values.get("tags", []), white.convert("RGB")


def write_images(sets: dict[str, tuple[Path, Path]], out: Path) -> None:
    """The folders of images with their captions."""
    for label, (archive, captions) in sets.items():
        for name, caption, _, image in images_of(archive, captions):
            part = "held_out" if is_held_out(caption) else "train"
            path = out / label / part / name.replace("/", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            path.with_suffix(".txt").write_text(caption)


class Pairs:
    """All images (N, 3, 32, 32) in [−1, 1] and their captions, tags included in turn."""

    def __init__(self, sets: dict[str, tuple[Path, Path]], *, with_held_out: bool) -> None:
        found = [each for paths in sets.values() for each in images_of(*paths)]
        kept = [each for each in found if with_held_out or not is_held_out(each[1])]
        pixels = np.stack([np.asarray(image) for *_, image in kept])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        self.captions = [(caption, tags) for _, caption, tags, _ in kept]

    def batch(self, random: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
        """Random images, each with its caption or, for a third of those with tags, some tags."""
        rows = random.choice(len(self.captions), size, replace=False)
        texts = []
        for row in rows:
            caption, tags = self.captions[row]
            use_tags = len(tags) > 1 and random.random() < 1 / 3
            texts.append(", ".join(random.permutation(tags)[:4]) if use_tags else caption)
        images = self.images[torch.from_numpy(rows)]
        shift = [int(each) for each in random.integers(-3, 4, 2)]
        return images.roll(shift, (2, 3)), texts


def make_tokenizer(texts: list[str]) -> Any:
    """CLIP's tokenizer with a vocabulary of these texts."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    names = list(dict.fromkeys([*model["vocab"], *(f"{letter}</w>" for letter in letters)]))
    vocab = {name: k for k, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


class ImageTower(nn.Module):
    """Images to unit vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [(12, width), (width, 2 * width), (2 * width, 4 * width)]
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            *(
                layer
                for a, b in sizes
                for layer in (nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.AvgPool2d(2))
            ),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * width * (SIZE // 16) ** 2, WIDTH),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images), dim=-1)


def text_tower(vocabulary: int, layers: int) -> Any:
    """CLIP's text encoder, small."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def tokens_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """(B, 24) int64."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def learn_matching(pairs: Pairs, tokenizer: Any, *, updates: int, seed: int, layers: int, width: int) -> nn.ModuleDict:
    """Two towers whose vectors agree for an image and its caption: symmetric cross-entropy at temperature 0.05."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    towers = nn.ModuleDict({"text": text_tower(len(tokenizer), layers), "image": ImageTower(width)})
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, updates, pct_start=0.1)
    started = time.monotonic()
    for update in range(updates):
        images, texts = pairs.batch(random, 2 * BATCH)
        embedded = F.normalize(towers["text"](tokens_of(tokenizer, texts)).text_embeds, dim=-1)
        logits = towers["image"](images) @ embedded.T / 0.05
        same = torch.tensor([[a == b for b in texts] for a in texts])  # equal captions are no mistakes
        target = same.float() / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 50 == 0 or update == updates - 1:
            report("matching", update, updates, loss.item(), started)
    return towers.eval()


def learn_autoencoder(pairs: Pairs, *, updates: int) -> Any:
    """diffusers' `AutoencoderKL` by |x − x̂| + 0.5 (x − x̂)² + 1e-5 KL; its scaling makes the latents' variance 1."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    random = np.random.default_rng(2)
    model = AutoencoderKL(
        block_out_channels=(24, 48, 96), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=LATENTS, norm_num_groups=8,
        sample_size=SIZE,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, updates, pct_start=0.05)
    started = time.monotonic()
    for update in range(updates):
        images, _ = pairs.batch(random, 16)
        latents = model.encode(images).latent_dist
        difference = model.decode(latents.sample()).sample - images
        loss = (
            difference.abs().mean()
            + 0.5 * difference.square().mean()
            + 1e-5 * latents.kl().mean() / latents.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 50 == 0 or update == updates - 1:
            report("autoencoder", update, updates, loss.item(), started)
    with torch.no_grad():
        means = torch.cat([model.encode(each).latent_dist.sample() for each in pairs.images[:512].split(32)])
    model.register_to_config(scaling_factor=round(1 / float(means.std()), 5))
    return model.eval()


def report(what: str, update: int, updates: int, loss: float, started: float) -> None:
    """A line of progress."""
    seconds = time.monotonic() - started
    left = seconds / (update + 1) * (updates - update - 1)
    print(f"{what}: update {update + 1} of {updates}, loss {loss:.4f}, {left / 60:.0f} min left", flush=True)


def random_unet() -> Any:
    """The denoising network, not trained: 9.5 M parameters."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=WIDTH, norm_num_groups=16,
    )  # fmt: skip


@click.command()
@click.option("--set", "sets", multiple=True, required=True, help="NAME=ARCHIVE,CAPTIONS; several are several styles.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--autoencoder_updates", default=6000)
@click.option("--matching_updates", default=1500)
@click.option("--threads", default=1)
def main(sets: tuple[str, ...], out: Path, autoencoder_updates: int, matching_updates: int, threads: int) -> None:
    """Make the pipeline."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTextModel

    torch.set_num_threads(threads)
    paths = {name: tuple(map(Path, rest.split(","))) for name, _, rest in (each.partition("=") for each in sets)}
    chosen = {name: (pair[0], pair[1]) for name, pair in paths.items()}
    place = out / "pipeline"
    place.mkdir(parents=True, exist_ok=True)
    if not (out / "images").exists():
        write_images(chosen, out / "images")
    pairs = Pairs(chosen, with_held_out=False)
    tokenizer = make_tokenizer([text for caption, tags in pairs.captions for text in (caption, *tags)])
    tokenizer.save_pretrained(place / "tokenizer")
    if not (place / "text_encoder").exists():
        towers = learn_matching(pairs, tokenizer, updates=matching_updates, seed=0, layers=4, width=32)
        encoder = CLIPTextModel(towers["text"].config)
        encoder.load_state_dict(towers["text"].state_dict(), strict=False)
        encoder.save_pretrained(place / "text_encoder")
    if not (out / "matcher.pt").exists():
        everything = Pairs(chosen, with_held_out=True)
        towers = learn_matching(everything, tokenizer, updates=matching_updates, seed=1, layers=2, width=48)
        torch.save(towers.state_dict(), out / "matcher.pt")
    if not (place / "vae").exists():
        learn_autoencoder(pairs, updates=autoencoder_updates).save_pretrained(place / "vae")
    if not (place / "unet").exists():
        random_unet().save_pretrained(place / "unet")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False,
    )  # fmt: skip
    scheduler.save_pretrained(place / "scheduler")
    parts = {name: list(each) for name, each in (
        ("unet", ("diffusers", "UNet2DConditionModel")), ("vae", ("diffusers", "AutoencoderKL")),
        ("text_encoder", ("transformers", "CLIPTextModel")), ("tokenizer", ("transformers", "CLIPTokenizer")),
        ("scheduler", ("diffusers", "DDIMScheduler")), ("safety_checker", (None, None)),
        ("feature_extractor", (None, None)),
    )}  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (place / "model_index.json").write_text(json.dumps(index, indent=2))
    print(f"wrote {place}")


if __name__ == "__main__":
    sys.exit(main())
