"""The mathematics of diffusion and of its distillation.

Everything here is arithmetic on given tensors: no I/O, no choice of device, no hidden randomness. The modules use
tensor methods, and import torch only inside functions that create tensors, so that `--help` can list the registries
(schedules, samplers, weightings, …) without loading torch.
"""
