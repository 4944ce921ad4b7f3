"""Networks of lucidrains' denoising-diffusion-pytorch: the files of its `Trainer`, or a state of `GaussianDiffusion`.

    {"step": …, "model": state of GaussianDiffusion, "ema": {"ema_model.model.init_conv.weight": …}, "opt": …, …}

The state has tables beside the weights: the betas give the schedule, and the weights of the loss the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vdiff.diffusion.parameterisation import Vp
from vdiff.diffusion.schedules import DdpmCosineSchedule, LinearSchedule, SigmoidSchedule, TableSchedule
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import sha256_of
from vdiff.interop.foreign import IMPORTED_MODEL, NO_DROPOUT, imported_fields, write_model
from vdiff.interop.pickles import check_backed, read_pt
from vdiff.interop.teachers.weights import same_weights
from vdiff.models.checkpoint import CheckpointConfig, read_tensors
from vdiff.models.kinds import LUCIDRAINS
from vdiff.models.lucid_config import LucidConfig
from vdiff.models.lucid_unet import LucidUNet
from vdiff.replacing import check_free

WRAPPERS = re.compile(r"^(ema_model\.)?(module\.|_orig_mod\.)*")
UNET = "model."
ADVICE = "give the model-N.pt that its Trainer wrote, by a version of 2023 or later"


def import_lucidrains(path: Path, out: Path, *, image_size: int, overwrite: bool = False) -> CheckpointConfig:
    """Convert a file to the checkpoint folder `out`; returns its description.

    Args:
        image_size: width and height of its images, which the file does not record.

    Raises:
        VdiffError: the file is not of this kind, or `out` exists.
        OptionError: the network does not take images of this size.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    state, weights = _state(path)
    tables = {name: state.get(name) for name in ("betas", "alphas_cumprod", "loss_weight")}
    network = {name.removeprefix(UNET): tensor for name, tensor in state.items() if name.startswith(UNET)}
    missing = next((name for name, tensor in tables.items() if tensor is None), None)
    if missing or "init_conv.weight" not in network:
        raise VdiffError(f"{path} lacks {missing or f'{UNET}init_conv.weight'}", ADVICE)
    with explained(f"{path} is of another network", ADVICE, KeyError, IndexError, ValueError, TypeError):
        config = _config(path, network)
    schedule = _schedule(path, tables["betas"])  # type: ignore[arg-type]
    prediction = _prediction(path, tables["alphas_cumprod"], tables["loss_weight"])  # type: ignore[arg-type]
    if image_size % config.signature.size_multiple:
        raise OptionError(
            f"--image_size {image_size}: this network takes multiples of {config.signature.size_multiple}",
            "give the size of the images that it was trained on",
        )
    description = CheckpointConfig(
        backbone={"kind": LUCIDRAINS, "config": config.to_dict()},
        sample_shape=[config.channels, image_size, image_size],
        schedule=schedule.to_dict(),
        **Vp(prediction).config_fields(),
        num_timesteps=schedule.num_levels,
        **imported_fields(
            f"lucidrains/{path.name} sha256:{sha256_of(path)}", weights=weights, approximated=[NO_DROPOUT]
        ),
    )
    write_model(out, same_weights(path, lambda: LucidUNet(config), network), description, overwrite=overwrite)
    return description


def _state(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state of the average if the file has one, else of the model; and "ema" or "raw"."""
    values: Mapping[str, object] = read_tensors(path) if path.suffix == ".safetensors" else read_pt(path)
    parts = [values[name] for name in ("ema", "model") if isinstance(values.get(name), Mapping)]
    chosen = parts[0] if parts else values
    assert isinstance(chosen, Mapping)
    averaged = {str(name): x for name, x in chosen.items() if str(name).startswith("ema_model.")}
    tensors = {WRAPPERS.sub("", str(n)): x for n, x in (averaged or chosen).items() if isinstance(x, Tensor)}
    check_backed(path, tensors)
    return tensors, "ema" if averaged else "raw"


def _config(path: Path, network: Mapping[str, Tensor]) -> LucidConfig:
    """The sizes, by the shapes of the weights."""
    first, last = network["init_conv.weight"].shape, network["final_conv.weight"].shape
    if "time_mlp.0.weights" in network or first[1] != last[0]:
        what = (
            "random Fourier features" if "time_mlp.0.weights" in network else "self-conditioning or a learned variance"
        )
        raise VdiffError(f"{path} is a network with {what}, which vdiff does not have", "wrap it in Python: vdiff.wrap")
    levels = 1 + max(int(name.split(".")[1]) for name in network if name.startswith("downs."))
    resampled = [network.get(f"downs.{k}.3.1.weight", network.get(f"downs.{k}.3.weight")) for k in range(levels)]
    memories = [network[f"downs.{k}.2.mem_kv"].shape for k in range(levels)]
    is_full = [f"downs.{k}.2.to_out.weight" in network for k in range(levels)]
    return LucidConfig(
        channels=last[0],
        dim=network["time_mlp.1.weight"].shape[1],
        init_dim=first[0],
        widths=tuple(len(weight) for weight in resampled if weight is not None),
        full_attention=tuple(is_full),
        heads=tuple(shape[1] for shape in memories),
        head_channels=tuple(shape[3 if full else 2] for shape, full in zip(memories, is_full, strict=True)),
    )


def _schedule(path: Path, betas: Tensor) -> TableSchedule:
    """The schedule with these betas."""
    count = len(betas) if betas.ndim == 1 else 0
    scale = 1000 / max(count, 1)
    known: list[TableSchedule] = []
    if 1 < count <= 10**5:
        known = [SigmoidSchedule(count), DdpmCosineSchedule(count)]
        if 0.02 * scale < 1:
            known.append(LinearSchedule(count, 1e-4 * scale, 0.02 * scale))
    for schedule in known:
        ours = torch.tensor(schedule.betas())
        if (ours - betas).abs().max() < 1e-3 and (ours - betas).abs().mean() < 1e-5:
            return schedule
    raise VdiffError(
        f"{path} has betas that are none of sigmoid, cosine and linear as in denoising-diffusion-pytorch",
        "wrap it in Python: vdiff.wrap",
    )


def _prediction(path: Path, alphas_cumprod: Tensor, weight: Tensor) -> str:
    """What the network predicts, by the weight of its loss at SNR about ½: 1 of ε, SNR of x, SNR/(SNR + 1) of v."""
    if alphas_cumprod.shape != weight.shape or alphas_cumprod.ndim != 1:
        raise VdiffError(f"{path}: loss_weight and alphas_cumprod have different lengths", ADVICE)
    snr = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    k = int((snr.log() - snr.new_tensor(0.5).log()).abs().nan_to_num(1e9).argmin())
    due = {"eps": 1.0, "x": float(snr[k]), "v": float(snr[k] / (snr[k] + 1))}
    return min(due, key=lambda name: abs(due[name] - float(weight[k])))
