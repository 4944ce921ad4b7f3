"""`python train.py`: the same as `vdiff train`."""

from vdiff.cli.train import command

if __name__ == "__main__":
    command()
