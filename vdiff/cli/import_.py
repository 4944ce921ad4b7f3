"""`vdiff import`: import models of other tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console
from vdiff.cli.options import CONTEXT, Command, OneOf, ProgramGroup, option, project_option, switch
from vdiff.errors import shell
from vdiff.projects import Project
from vdiff.text import plural

if TYPE_CHECKING:
    from vdiff.models.checkpoint import CheckpointConfig
    from vdiff.models.unet_config import UNetConfig


def out_option(default: str) -> Callable[[Any], Any]:
    """`--out` of every import."""
    return option(
        "--out", group="Output", type=click.Path(path_type=Path), metavar="FOLDER", show_default=default,
        help="The new checkpoint's folder.",
    )  # fmt: skip


FILE = click.argument("file", type=click.Path(path_type=Path))
OVERWRITE = switch("--overwrite", group="Output", help="Replace an imported model.")


def network_config(default: str, content: str) -> Callable[[Any], Any]:
    """The option for the JSON file that describes a network, whose weights are in another file."""
    return option(
        "--network_config", "config", group="Model", type=click.Path(path_type=Path), metavar="JSON",
        show_default=default, help=content,
    )  # fmt: skip


@click.group(cls=ProgramGroup, context_settings=CONTEXT)
def command() -> None:
    """Import a model of another tool, for sample.py, distill.py and the exports.

    Code in foreign files is never run. Files that claim impossible sizes are refused before memory is allocated.
    """


@command.command(
    cls=Command,
    examples=[
        "vdiff import reference checkpoint.pt --out checkpoints/celebahq",
        "vdiff import reference celeba_u/base_6/checkpoint.pt   # to checkpoints/base_6",
        "vdiff import reference digits.pt --image_size 32 --image_channels 1",
    ],
)
@FILE
@project_option()
@option(
    "--image_size", group="Model", type=click.IntRange(1, 2**13), default=256, metavar="PIXELS",
    help="Width and height of its images; the file does not record it.",
)  # fmt: skip
@option(
    "--attention_heads", group="Model", type=click.IntRange(1), default=4, metavar="HEADS",
    help="Its attn_heads; the file does not record it.",
)  # fmt: skip
@option(
    "--image_channels", group="Model", type=click.IntRange(1, 4096), metavar="CHANNELS",
    show_default="3, or 1 if 3 is impossible", help="Channels of its images.",
)  # fmt: skip
@option(
    "--channel_order", group="Model", type=OneOf(["bgr", "rgb"]), default="bgr",
    help="Channel order of its training images: those repositories read images with OpenCV, blue first.",
)  # fmt: skip
@out_option("checkpoints/NAME after the file, or after its folder for a checkpoint.pt")
@OVERWRITE
def reference(file: Path, project: Project, out: Path | None, **options: Any) -> None:
    """Import FILE, the checkpoint.pt of a v-diffusion repository.

    It holds {"G", "n_timesteps", "time_scale"} with the weights of rosinality's UNet. The architecture is inferred from
    their shapes; the options below give the rest, by default as in the CelebA-HQ model. From the same noise (with its
    channels in --channel_order), sample.py --clipped_sampling draws the same images as the clipped sampling of that
    repository.
    """
    from vdiff.interop.reference import import_reference
    from vdiff.models.unet_config import UNetConfig

    console = Console()
    target = out or project.checkpoints / (file.resolve().parent.name if file.stem == "checkpoint" else file.stem)
    config = import_reference(file, target, **options)
    unet = UNetConfig.from_dict(config.unet)
    console.result(
        f"{target}: {_shape(config, unet)}, {plural(unet.num_blocks, 'block')} a level, "
        f"attention at {list(unet.attention_strides)}, {plural(unet.num_heads, 'head')}"
    )
    console.result(f"next       python sample.py {shell('--checkpoint', target)} --clipped_sampling True")


@command.command(
    "diffusers",
    cls=Command,
    examples=[
        "vdiff import diffusers google/ddpm-cifar10-32    # from the hub",
        "vdiff import diffusers exports/base_6 --out checkpoints/again",
        "vdiff import diffusers stabilityai/stable-diffusion-xl-base-1.0",
        "vdiff import diffusers model.safetensors --pipeline sdxl --prediction v",
    ],
)
@click.argument("source")
@project_option()
@option(
    "--num_timesteps", group="Model", type=click.IntRange(1), metavar="STEPS",
    show_default="as in its training; latents: as in diffusers", help="Sampling steps of the checkpoint.",
)  # fmt: skip
@option(
    "--prediction", group="Model", type=OneOf(["v", "eps", "x"]), show_default="what its files say",
    help="What the network predicts; needed where its files do not say it.",
)  # fmt: skip
@switch("--zero_snr", group="Model", help="Its betas were rescaled to zero terminal SNR, which its files do not say.")
@option(
    "--image_size", group="Model", type=click.IntRange(1), metavar="PIXELS",
    show_default="as in its training; FLUX 1024",
    help="Size of the pictures that a model of latents draws; the time shift of a flow may depend on it.",
)  # fmt: skip
@option(
    "--pipeline", group="Model", metavar="FOLDER", show_default="that of its family, from the hub",
    help="For a .safetensors file: a pipeline whose configurations and tokenizers are those of the file.",
)  # fmt: skip
@switch("--copy", group="Output", help="Copy text encoders, tokenizers and autoencoder; else SOURCE is needed later.")
@out_option("checkpoints/NAME after the source")
@OVERWRITE
def diffusers(source: str, project: Project, out: Path | None, **options: Any) -> None:
    """Import SOURCE, a pipeline of diffusers: a folder, OWNER/NAME of the Hugging Face hub, or a .safetensors file.

    It is Stable Diffusion 1.5, 2, XL (base) or 3, FLUX, PixArt, a DiTPipeline, or a DDPMPipeline, DDIMPipeline or
    PNDMPipeline with a UNet2DModel. Only JSON, tokenizers and safetensors are read. A folder from
    `vdiff export diffusers` becomes the original checkpoint again.
    """
    from vdiff.interop.diffusers.reading import import_pipeline
    from vdiff.models.condition import TOKENS
    from vdiff.models.unet_config import UNetConfig

    console = Console()
    name = Path(source).resolve().name.removesuffix(".safetensors")
    target = out or project.checkpoints / name
    made = import_pipeline(source, target, **options)
    config = made.config
    for remark in made.remarks:
        console.line(remark)
    if made.preflight:
        console.result(f"{target}: {made.preflight}")
        prompt = ("--prompt", "a red fox, watercolour") if TOKENS in config.signature.names else ("--num", 4)
        console.result(f"next       python sample.py {shell('--checkpoint', target, *prompt)}")
        return
    shape = _shape(config, UNetConfig.from_dict(config.unet))
    console.result(f"{target}: predicts {config.prediction}, schedule {config.schedule['name']}, {shape}")
    console.result(f"next       python sample.py {shell('--checkpoint', target)}")


@command.command(
    cls=Command,
    examples=[
        "vdiff import edm edm.pt    # reads edm.json beside it",
        "vdiff import edm net.safetensors --network_config edm.json",
    ],
)
@FILE
@project_option()
@network_config("FILE with .json", "Class and arguments of its constructor.")
@out_option("checkpoints/NAME after the file")
@OVERWRITE
def edm(file: Path, project: Project, out: Path | None, config: Path | None, overwrite: bool) -> None:
    """Import FILE, a network of NVlabs/edm or NVlabs/edm2 as a .pt or .safetensors state dict.

    It is a SongUNet (DDPM++, NCSN++) or a DhariwalUNet (ADM) with EDMPrecond, VPPrecond or VEPrecond, or EDM2's UNet
    with Precond. A .pkl of NVIDIA is code and is not read: the refusal prints three lines that convert it.
    """
    from vdiff.interop.teachers.edm import import_edm

    target = out or project.checkpoints / file.stem
    _report(target, import_edm(file, target, config=config, overwrite=overwrite))


@command.command(
    "k-diffusion",
    cls=Command,
    examples=[
        "vdiff import k-diffusion model_00100000.pth",
        "vdiff import k-diffusion model.safetensors --network_config config.json",
    ],
)
@FILE
@project_option()
@network_config("that in FILE, or FILE with .json", "The configuration that it was trained with.")
@out_option("checkpoints/NAME after the file")
@OVERWRITE
def k_diffusion(file: Path, project: Project, out: Path | None, config: Path | None, overwrite: bool) -> None:
    """Import FILE, a UNet image_v1 of k-diffusion, with its average if FILE has one.

    FILE is a .pth of its train.py, a .safetensors of its convert_for_inference.py, or a state dict. Networks with
    conditions, and transformers, are refused.
    """
    from vdiff.interop.teachers.k_diffusion import import_k_diffusion

    target = out or project.checkpoints / file.stem
    _report(target, import_k_diffusion(file, target, config=config, overwrite=overwrite))


@command.command(
    cls=Command,
    examples=[
        "vdiff import openai 64x64_diffusion.pt    # published: its flags are known",
        'vdiff import openai ema.pt --flags "--image_size 64 --num_channels 128"',
        'vdiff import openai ema.pt --repository improved-diffusion --flags "…"',
    ],
)
@FILE
@project_option()
@option(
    "--flags", group="Model", metavar="TEXT", show_default="those of the published file of this name",
    help="The flags that the repository's scripts take for this model.",
)  # fmt: skip
@option(
    "--repository", group="Model", type=OneOf(["improved-diffusion", "guided-diffusion", "consistency_models"]),
    show_default="that of the published file, or guided-diffusion", help="Whose defaults complete the flags.",
)  # fmt: skip
@out_option("checkpoints/NAME after the file")
@OVERWRITE
def openai(file: Path, project: Project, out: Path | None, **options: Any) -> None:
    """Import FILE, a network of OpenAI's improved-diffusion, guided-diffusion (ADM) or consistency_models (EDM).

    The file holds the weights alone; the flags of the repository's scripts give the rest. A learned variance is
    ignored.
    """
    from vdiff.interop.teachers.openai import import_openai

    target = out or project.checkpoints / file.stem
    config, remarks = import_openai(file, target, **options)
    _report(target, config, remarks)


@command.command(
    cls=Command,
    examples=[
        "vdiff import lucidrains results/model-100.pt --image_size 64",
        "vdiff import lucidrains model-10.pt --image_size 128 --out checkpoints/flowers",
    ],
)
@FILE
@project_option()
@option(
    "--image_size", group="Model", type=click.IntRange(1, 2**13), required=True, metavar="PIXELS",
    help="Width and height of its images; the file does not record it.",
)  # fmt: skip
@out_option("checkpoints/NAME after the file")
@OVERWRITE
def lucidrains(file: Path, project: Project, out: Path | None, **options: Any) -> None:
    """Import FILE, a model-N.pt of lucidrains' denoising-diffusion-pytorch; its EMA weights are used.

    The sizes of the network, its schedule and what it predicts follow from the file. Its images must be in [-1, 1] in
    training, as auto_normalize does.
    """
    from vdiff.interop.teachers.lucidrains import import_lucidrains

    target = out or project.checkpoints / file.stem
    _report(target, import_lucidrains(file, target, **options))


@command.command(
    cls=Command,
    examples=[
        "vdiff import google cifar_original",
        "vdiff import google checkpoint_7 --image_size 128 --out checkpoints/x",
    ],
)
@FILE
@project_option()
@option(
    "--image_size", group="Model", type=click.IntRange(1, 2**13), metavar="PIXELS",
    show_default="32 and 64 for the shapes of CIFAR-10 and ImageNet", help="Width and height of its images.",
)  # fmt: skip
@option(
    "--prediction", group="Model", type=OneOf(["x", "eps", "v"]), default="x",
    help="What a network with as many outputs as inputs predicts; one with twice as many predicts x and eps.",
)  # fmt: skip
@out_option("checkpoints/NAME after the file")
@OVERWRITE
def google(file: Path, project: Project, out: Path | None, **options: Any) -> None:
    """Import FILE, a teacher or student of Google's diffusion_distillation (a flax checkpoint; JAX is not needed)."""
    from vdiff.interop.teachers.google import import_google

    target = out or project.checkpoints / file.name
    _report(target, import_google(file, target, **options))


def _report(target: Path, config: CheckpointConfig, remarks: Sequence[str] = ()) -> None:
    """What a teacher is, what was chosen, and the next command."""
    console = Console()
    if config.space.limit is None:
        remarks = [
            *remarks,
            f"its samples are latents of {config.shape[0]} channels, which vdiff.load generates as tensors",
        ]
    for remark in (*remarks, *config.approximated):
        console.line(remark)
    size, family = " × ".join(map(str, config.shape)), config.family.summary()
    console.result(f"{target}: {plural(config.num_timesteps, 'step')}, {size}, {family}")
    if config.space.limit is None:
        return
    edm_sampler = ("--num_timesteps", 18, "--sampler", "heun", "--frame", "eps", "--grid", "karras")
    words = edm_sampler if config.prediction == "edm" else ()
    console.result(f"next       python sample.py {shell('--checkpoint', target, *words)}")


def _shape(config: CheckpointConfig, unet: UNetConfig) -> str:
    """`8 steps, 32 × 32 × 3, 64 channels × [1, 2, 4]`."""
    size = config.image_size
    images = f"{size} × {size} × {unet.in_channels}"
    return f"{plural(config.num_timesteps, 'step')}, {images}, {unet.channels} channels × {list(unet.multipliers)}"
