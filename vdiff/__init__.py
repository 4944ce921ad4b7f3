"""vdiff: train a diffusion model, then distil it until 1 to 8 network evaluations draw an image.

>>> import vdiff
>>> vdiff.__version__.count(".")
2
"""

__version__ = "0.1.0"
