"""Teachers from the repositories that published them: EDM, ADM, consistency models and diffusion_distillation."""
