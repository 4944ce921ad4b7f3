"""The files of a pipeline folder.

model_index.json                            the pipeline's class and parts
unet/config.json                            `UNet2DModel`; in old folders these two lie beside model_index.json
unet/diffusion_pytorch_model.safetensors   with a variant (….fp16.safetensors) or in parts with an index, too
scheduler/scheduler_config.json             in old folders beside model_index.json, too
vdiff/config.json                           ours: the checkpoint's own description, which diffusers does not read
"""

from __future__ import annotations

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_PATTERN = "diffusion_pytorch_model*.safetensors"
"""Weights, their variants, and the parts of either."""
PARTS_PATTERN = "diffusion_pytorch_model.safetensors.index*.json"
"""What says which tensor is in which part."""
NOTE = f"vdiff/{CONFIG}"
FILES = [INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", NOTE]
FILES += [f"{place}{name}" for place in ("", "unet/") for name in (CONFIG, WEIGHTS_PATTERN, PARTS_PATTERN)]
"""All that is ever read, and so all that is fetched: JSON and safetensors, no pickle."""
