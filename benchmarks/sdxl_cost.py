"""What training and distilling a LoRA of Stable Diffusion XL at 1024² cost: memory and operations by counting.

No GPU and no weights are needed: the published configuration is built without values (`training.estimate`), and one
update of it is counted: bytes of weights, gradients, moments and activations, and floating-point operations by torch's
counter. A multiply-add counts as two operations; checkpointing computes the forward pass twice, and a frozen weight has
no gradient. Not counted are the CUDA context, workspaces of kernels, and the fragments of the allocator: add 1 to
3 GiB. The time is operations divided by an assumed share of the GPU's peak, which was not measured.

Two settings are stages of a ladder. In the first one the teacher is the base, whose guidance takes two evaluations for
each of its two steps. In a later one it is the base with the LoRA of the stage before.

Numbers of the configuration: the public files of stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import write_report
from vdiff.files import write_json
from vdiff.models.adapters import AdapterSettings
from vdiff.models.backbone import parameter_count
from vdiff.models.checkpoint import CONFIG, CheckpointConfig
from vdiff.models.codec import UNBOUNDED
from vdiff.models.text import TextBackbone
from vdiff.training.base_training import memory_of_base
from vdiff.training.config import DistillConfig, TrainConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import build_engine
from vdiff.training.estimate import LiveBytes, Memory, num_bytes
from vdiff.training.stages import Stage
from vdiff.training.student import memory_of_stage

GIB, TERA = 2**30, 1e12
PEAK = 989.0
"""Dense bf16 TFLOP/s of one H200, by its data sheet."""
UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
    "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
FIRST = {
    **TEXT, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "pad_token_id": 49407,
}  # fmt: skip
SECOND = {
    **TEXT, "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One row; `rank` 0: all weights of the UNet learn; `stage` is the number of a stage of a ladder, 0 a training."""

    rank: int
    batch_size: int
    checkpointing: bool
    stage: int = 0

    def __str__(self) -> str:
        what = f"LoRA, rank {self.rank}" if self.rank else "whole UNet"
        return what + ("", ", first stage, guided", ", a later stage")[self.stage]

    @property
    def evaluations(self) -> int:
        """Passes through the UNet for one sample of an update; a gradient of all weights counts as two."""
        teacher = (0, 4, 2)[self.stage]
        return 1 + self.checkpointing + (1 if self.rank else 2) + teacher


SETTINGS = [
    *(Setting(8, batch, checkpointing) for checkpointing in (True, False) for batch in (1, 2, 4)),
    Setting(64, 2, True),
    Setting(64, 2, False),
    *(Setting(64, 2, checkpointing, stage) for stage in (1, 2) for checkpointing in (True, False)),
    Setting(0, 2, True),
]


def description(rank: int) -> CheckpointConfig:
    """Stable Diffusion XL that predicts v, with a LoRA on the projections of attention; x is given as latents."""
    empty = [49406, *[49407] * 76, 49406, 49407, *[0] * 75]
    encoders = [
        {"class": "CLIPTextModel", "config": FIRST},
        {"class": "CLIPTextModelWithProjection", "config": SECOND},
    ]
    network = {
        "unet": {"class": "UNet2DConditionModel", "config": UNET},
        "text_encoders": encoders,
        "empty_tokens": empty,
        "zero_empty": True,
    }
    return CheckpointConfig(
        backbone={"kind": "text", "config": network}, sample_shape=[4, 128, 128], codec=UNBOUNDED.name,
        schedule={"name": "scaled_linear", "num_levels": 1000, "first_beta": 0.00085, "last_beta": 0.012},
        prediction="v", num_timesteps=50, method="base", weights="raw", num_iters=0, target_iters=1, num_images=0,
        dataset="", dataset_fingerprint="", adapter=AdapterSettings(rank, float(rank)) if rank else None,
        base={"path": "base", "fingerprint": ""} if rank else None,
    )  # fmt: skip


def memory(setting: Setting) -> Memory:
    """The bytes of one update in bf16, without an average of the weights."""
    values: dict[str, Any] = {"lr": 1e-5, "num_iters": 1, "ema": 0.0, "device": "cpu", "precision": "bf16"}
    values |= {"batch_size": setting.batch_size, "checkpointing": setting.checkpointing}
    images = TrainingData(1024, 3)
    if not setting.stage:
        config = TrainConfig(data="", num_timesteps=50, prediction="v", **values)
        return memory_of_base(config, images, description(setting.rank), build_engine(config))
    with TemporaryDirectory() as folder:
        before, rank = Path(folder), 0 if setting.stage == 1 else setting.rank
        steps, method = (32, "base") if setting.stage == 1 else (16, "progressive")
        taught = replace(description(rank), num_timesteps=steps, method=method)
        write_json(before / CONFIG, taught.to_dict())
        student = DistillConfig(
            data="", base=str(before), lora_rank=setting.rank, guidance_scale=6.0, check_images=0, **values
        )
        stage = Stage(before, steps, before, steps // 2, is_guided=setting.stage == 1)
        return memory_of_stage(stage, student, images, build_engine(student))


def encoding(batch_size: int) -> tuple[int, int]:
    """Bytes of the autoencoder, and the most bytes while it encodes pictures of 1024² one after the other."""
    with FakeTensorMode():
        model = AutoencoderKL(**VAE).eval()
        live = LiveBytes()
        for tensor in model.parameters():
            live.known(tensor)
        picture = torch.zeros(1, 3, 1024, 1024)
        with live, torch.no_grad():
            model.encode(picture)
    return num_bytes(model.parameters()), live.peak + batch_size * picture.numel()


def network_costs() -> tuple[int, int, int]:
    """Parameters of the UNet, operations of one evaluation of it, and parameters of the text encoders."""
    with torch.device("meta"):
        network = description(0).build().network
        assert isinstance(network, TextBackbone)
        condition = {
            "text": torch.zeros(1, 77, 2048),
            "text_pooled": torch.zeros(1, 1280),
            "time_ids": torch.zeros(1, 6),
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.unet(torch.zeros(1, 4, 128, 128), torch.zeros(1), **condition)
    return parameter_count(network.unet), int(counter.get_total_flops()), parameter_count(network.text_encoders)


@click.command()
@click.option("--utilisation", default=40.0, show_default=True, help="Assumed share of the GPU's peak, in per cent.")
def main(utilisation: float) -> None:
    """Print the table and write it to benchmarks/results/sdxl_cost.md."""
    parameters, flops, encoders = network_costs()
    vae, encode = encoding(1)
    rows = []
    for setting in SETTINGS:
        found = memory(setting)
        learns = found.weights + found.gradients + found.moments
        cached = learns + found.frozen + found.activations
        whole = cached + vae + max(0, encode - found.activations)
        update = setting.evaluations * flops * setting.batch_size / TERA
        rows.append(
            [
                str(setting),
                str(setting.batch_size),
                "yes" if setting.checkpointing else "no",
                *(f"{value / GIB:.1f}" for value in (found.frozen, learns, found.activations, cached, whole)),
                f"{update:.1f}",
                f"{update / (PEAK * utilisation / 100):.2f}",
                f"{found.gradients / 1e6:,.0f} MB",
            ]
        )
        print(rows[-1], flush=True)
    columns = [
        *(
            "trains",
            "batch",
            "checkpointing",
            "frozen",
            "learns",
            "activations",
            "encoded before",
            "encoded on the fly",
        ),
        *("TFLOP", "seconds", "checkpoint"),
    ]
    title = "LoRAs of Stable Diffusion XL at 1024², bf16, GiB of one process: counted, not measured"
    where = (
        f"UNet {parameters / 1e9:.3f} B parameters, {flops / TERA:.2f} TFLOP an evaluation; text encoders "
        f"{encoders / 1e6:.0f} M; autoencoder {vae / GIB:.2f} GiB, {encode / GIB:.1f} GiB while it encodes a picture; "
        f"seconds at {utilisation:g} % of {PEAK:g} TFLOP/s (bf16 of an H200), torch {torch.__version__}"
    )
    write_report("sdxl_cost", title, columns, rows, where)


if __name__ == "__main__":
    main()
