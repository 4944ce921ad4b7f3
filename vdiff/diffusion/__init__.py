"""The mathematics of diffusion and of its distillation.

Everything here is arithmetic on the tensors that it is given: no I/O, no device choice, no hidden randomness. The
modules are written in tensor methods and import torch only inside the functions that create tensors, so that the
command line can list the registries (schedules, samplers, weightings, …) in `--help` without loading torch.
"""
