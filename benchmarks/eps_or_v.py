"""Whether `vdiff inspect --test` tells ε from v, and zero terminal SNR: on small UNets trained with each.

    python benchmarks/eps_or_v.py --models 40

Each model is a UNet2DConditionModel of diffusers, trained on smooth pictures of random brightness. The table has one
row for each kind: how many verdicts are right, wrong, or "cannot tell", and the range of the coefficient b.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.interop.predicts import EpsOrV, measure

KINDS = list(product(("eps", "v"), (False, True)))
SIZE = 16


def pictures(count: int, generator: torch.Generator, channels: int) -> Tensor:
    """Smooth latents: a colour for the whole picture, and large spots, with a variance of about 1."""
    colour = torch.randn(count, channels, 1, 1, generator=generator)
    spots = torch.randn(count, channels, 4, 4, generator=generator)
    return 0.7 * colour + F.interpolate(spots, SIZE, mode="bicubic", align_corners=False)


def trained(prediction: str, zero_snr: bool, seed: int, updates: int) -> diffusers.UNet2DConditionModel:
    """A UNet trained to predict ε or v on the noise levels of Stable Diffusion."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=16, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    optimiser = torch.optim.Adam(unet.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=updates)
    for _ in range(updates):
        x = pictures(16, generator, 4)
        noise = torch.randn(x.shape, generator=generator)
        level = torch.randint(0, 1000, (len(x),), generator=generator)
        target = noise if prediction == "eps" else scheduler.get_velocity(x, noise, level)
        text = torch.zeros(len(x), 1, 16)
        loss = F.mse_loss(unet(scheduler.add_noise(x, noise, level), level, text).sample, target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        rate.step()
    return unet.eval()


def word(found: object, expected: object) -> str:
    """`right`, `wrong` or `cannot tell`."""
    return "cannot tell" if found is None else "right" if found == expected else "wrong"


def main() -> None:
    """Train the models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=40, help="how many models, a quarter of each kind")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first model; the others follow")
    parser.add_argument("--updates", type=int, default=300, help="updates of each model")
    options = parser.parse_args()
    verdicts: dict[tuple[str, bool], list[EpsOrV]] = defaultdict(list)
    for k in range(options.first, options.first + options.models):
        kind = KINDS[k % len(KINDS)]
        verdict = measure(trained(*kind, seed=k, updates=options.updates))
        verdicts[kind].append(verdict)
        print(f"seed {k}: {kind[0]}{', zero SNR' * kind[1]} → {verdict}", flush=True)
    print("\n| trained to predict | zero terminal SNR | models | eps or v | zero SNR | b |\n|---|---|---|---|---|---|")
    for (prediction, zero_snr), found in verdicts.items():
        columns = []
        for name, expected in (("prediction", prediction), ("zero_snr", zero_snr)):
            words = [word(getattr(each, name), expected) for each in found]
            columns.append(", ".join(f"{words.count(each)} {each}" for each in dict.fromkeys(sorted(words))))
        lowest, highest = (bound(each.coefficient for each in found) for bound in (min, max))
        print(
            f"| {prediction} | {'yes' if zero_snr else 'no'} | {len(found)} | {columns[0]} | "
            f"{columns[1] if prediction == 'v' else 'not asked'} | {lowest:.2f} to {highest:.2f} |"
        )


if __name__ == "__main__":
    main()
