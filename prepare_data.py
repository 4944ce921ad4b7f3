"""`python prepare_data.py`: the same as `vdiff prepare`."""

from vdiff.cli.prepare import command

if __name__ == "__main__":
    command()
