"""The files of a pipeline folder.

model_index.json                            the pipeline's class and parts
unet/config.json                            `UNet2DModel`; in old folders these two lie beside model_index.json
unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json             in old folders beside model_index.json, too
vdiff/config.json                           ours: the checkpoint's own description, which diffusers does not read
"""

from __future__ import annotations

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NOTE = f"vdiff/{CONFIG}"
FILES = [INDEX, CONFIG, WEIGHTS, f"unet/{CONFIG}", f"unet/{WEIGHTS}", SCHEDULER, f"scheduler/{SCHEDULER}", NOTE]
"""All that is ever read, and so all that is fetched: JSON and safetensors, no pickle."""
