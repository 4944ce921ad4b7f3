"""`python distillate.py`: distill.py under the name that it has in the v-diffusion repositories."""

from vdiff.cli.distill import command

if __name__ == "__main__":
    command()
