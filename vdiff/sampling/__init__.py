"""Sampling any number of images into files, with one process or several, and resuming after interruptions."""
