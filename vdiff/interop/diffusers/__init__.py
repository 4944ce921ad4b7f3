"""Checkpoints as diffusers' pipeline folders, both ways; diffusers itself is not needed."""
