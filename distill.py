"""`python distill.py`: the same as `vdiff distill`."""

from vdiff.cli.distill import command

if __name__ == "__main__":
    command()
