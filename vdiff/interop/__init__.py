"""Other people's formats: checkpoints of the v-diffusion repositories, and whatever else comes in or goes out."""
