"""Import and export: checkpoints of the v-diffusion repositories, diffusers, ONNX, torch.export and the hub."""
