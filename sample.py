"""`python sample.py`: the same as `vdiff sample`."""

from vdiff.cli.sample import command

if __name__ == "__main__":
    command()
