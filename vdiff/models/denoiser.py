"""Network + schedule + parameterisation → `Prediction`: the only place where the three meet; and guidance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vdiff.diffusion.parameterisation import Parameterisation, Vp
from vdiff.diffusion.prediction import Prediction, from_v
from vdiff.diffusion.schedules import Schedule, coefficient, grid_angles
from vdiff.models.backbone import Backbone
from vdiff.models.condition import CLASSES, GUIDANCE, IMAGE, SECOND_TIME, Condition

NOTHING = Condition()


def device_of(network: nn.Module) -> torch.device:
    """The device of its weights; the CPU if it has none."""
    return next((weight.device for weight in network.parameters()), torch.device("cpu"))


class Denoiser(nn.Module):
    """(z, t[, condition]) → Prediction(x̂, ε̂, v̂): z (B, C, …), t ∈ (0, 1] (B,) float64, B rows of the condition.

    The network receives the state and the timestep of its parameterisation, also for a second time, and real
    conditions in at least float32, as half precision would round them. Its output is converted to the precision of
    z, so that mixed precision ends at the network.

    Args:
        parameterisation: a prediction type ("v", …) is `Vp` with it.

    Raises:
        ValueError: the prediction type is unknown, ε is combined with zero terminal SNR, or the network has the wrong
            number of output channels.
    """

    def __init__(self, network: Backbone, schedule: Schedule, parameterisation: Parameterisation | str) -> None:
        super().__init__()
        if isinstance(parameterisation, str):
            parameterisation = Vp(parameterisation)
        if parameterisation.predicts_noise and schedule.zero_snr:
            raise ValueError("eps prediction carries no information about the image at zero terminal SNR; predict v")
        expected = network.signature.channels * parameterisation.channel_factor
        if network.signature.out_channels != expected:
            raise ValueError(
                f"{parameterisation.prediction} prediction needs {expected} output channels, but the network has "
                f"{network.signature.out_channels}"
            )
        self.network = network
        self.schedule = schedule
        self.parameterisation = parameterisation

    def condition(self, **tensors: Tensor | None) -> Condition:
        """The network's condition: those of the named tensors that it takes."""
        return self.network.signature.condition(**tensors)

    def forward(self, z: Tensor, t: Tensor, condition: Condition = NOTHING) -> Prediction:
        precision, used = torch.promote_types(z.dtype, torch.float32), self.parameterisation
        angle = grid_angles(self.schedule, t)
        timestep = used.timestep(self.schedule, t).to(precision).to(z.device)
        if (second := condition.tensors.get(SECOND_TIME)) is not None:
            condition = condition.with_tensors(second_time=used.timestep(self.schedule, second))
        conditions = condition.to(z.device, precision).tensors
        output = self.network(used.state(z, angle), timestep, **conditions).to(z.dtype)
        return used.read(z, output, angle)


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance: x̂_w = (1 + w) x̂_c − w x̂_∅, of the network of `denoiser` (shared, not copied).

    w = 0 is the prediction with the condition, w = −1 that with its null, and w > 0 moves away from the latter. A scale
    s of other libraries means w = s − 1. Both predictions come from one batch of twice the size. For given z, x̂, ε̂
    and v̂ are affine in each other, so the same sum holds for all three; it is computed for v̂, which gives the other
    two without a division. Source: Ho & Salimans 2022, *Classifier-Free Diffusion Guidance*, eq. 6.

    Args:
        weight: w, unless the condition has one for each image (`guidance`).
        interval: the times, ends included, with guidance; elsewhere w is 0, and if the host knows this, the network is
            evaluated once (Kynkäänniemi et al. 2024, *Applying Guidance in a Limited Interval*).

    Raises:
        ValueError: the network was not trained with a null condition, or the interval is not in (0, 1].
    """

    def __init__(self, denoiser: Denoiser, weight: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(denoiser.network, denoiser.schedule, denoiser.parameterisation)
        takes = self.network.signature
        if not takes.null and set(takes.names) <= {CLASSES, GUIDANCE, SECOND_TIME, IMAGE}:
            raise ValueError("guidance needs a network that was trained with class dropout (null_class)")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"times of guidance must increase within 0 to 1, got {interval[0]} to {interval[1]}")
        self.weight = weight
        self.interval = interval

    def forward(self, z: Tensor, t: Tensor, condition: Condition = NOTHING) -> Prediction:
        weight = condition.tensors.get(GUIDANCE)
        condition = replace(
            condition.with_tensors(guidance=None), null={**self.network.signature.null, **condition.null}
        )
        first, last = self.interval
        guided = (first <= t) & (t <= last)
        # times on a device are not read, as that would sync
        nowhere = self.interval != (0.0, 1.0) and t.device.type == "cpu" and not guided.any()
        if not condition.can_drop or (weight is None and self.weight == 0) or nowhere:
            return super().forward(z, t, condition)
        pair = super().forward(torch.cat([z, z]), torch.cat([t, t]), condition.cat(condition.drop()))
        v, v_none = pair.v.chunk(2)
        w = coefficient((self.weight if weight is None else weight.to(guided.device)) * guided, z)
        return from_v(z, (1 + w) * v - w * v_none, grid_angles(self.schedule, t))
