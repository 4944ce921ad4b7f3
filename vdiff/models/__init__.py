"""Networks, the denoiser that joins one to a schedule, and the folder it is kept in."""
