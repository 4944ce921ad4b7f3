"""Network + schedule + prediction type → `Prediction`: the only place where the three meet."""

from __future__ import annotations

from torch import Tensor, nn

from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction
from vdiff.diffusion.schedules import Schedule, grid_angles
from vdiff.models.unet import UNet


class Denoiser(nn.Module):
    """(z, t [, classes]) → Prediction(x̂, ε̂, v̂): z (B, C, H, W), t ∈ (0, 1] (B,) float64.

    The network is told label(t); its output is brought to the precision of z before it is read, so that mixed precision
    ends at the network.

    Raises:
        ValueError: an unknown prediction type, or a network whose output has the wrong number of channels for it.
    """

    def __init__(self, network: UNet, schedule: Schedule, prediction_type: str) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {prediction_type!r}, choose from {', '.join(PREDICTION_TYPES)}")
        expected = network.config.in_channels * PREDICTION_TYPES[prediction_type].channel_factor
        if network.config.out_channels != expected:
            raise ValueError(
                f"{prediction_type} prediction needs {expected} output channels, the network has "
                f"{network.config.out_channels}"
            )
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type

    def forward(self, z: Tensor, t: Tensor, classes: Tensor | None = None) -> Prediction:
        label = self.schedule.label(t).to(z.dtype).to(z.device)
        output = self.network(z, label, classes).to(z.dtype)
        return PREDICTION_TYPES[self.prediction_type].read(z, output, grid_angles(self.schedule, t))
