"""Networks, the denoiser that combines one with a schedule, and the folder of a checkpoint."""
