"""The `vdiff` command: one subcommand for each script."""

from __future__ import annotations

import importlib

import click

import vdiff
from vdiff.cli.options import CONTEXT, ProgramGroup

COMMANDS = {
    "prepare": ("vdiff.cli.prepare", "Turn images into an LMDB dataset."),
    "train": ("vdiff.cli.train", "Train the base model, the first teacher."),
    "distill": ("vdiff.cli.distill", "Halve the sampling steps of a model, stage by stage."),
    "sample": ("vdiff.cli.sample", "Generate images from a checkpoint."),
    "evaluate": ("vdiff.cli.evaluate", "Measure how good checkpoints are."),
    "features": ("vdiff.cli.features", "Train a feature network on your images, for measuring distances."),
    "report": ("vdiff.cli.report", "Write one HTML page about a ladder."),
    "ema": ("vdiff.cli.ema", "Compute EMAs of other lengths after a training."),
    "inspect": ("vdiff.cli.inspect", "Describe a checkpoint and its teachers."),
    "import": ("vdiff.cli.import_", "Import models of other tools."),
    "export": ("vdiff.cli.export", "Write checkpoints for other programs."),
    "serve": ("vdiff.cli.web", "Serve a web page whose models run on this machine."),
    "push": ("vdiff.cli.push", "Upload a model to a hub."),
    "data": ("vdiff.cli.data", "Show, check and merge datasets."),
    "doctor": ("vdiff.cli.doctor", "Check this machine and this installation."),
}


class LazyGroup(ProgramGroup):
    """A group that imports a subcommand only when it runs, so that `--help` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The subcommands, in the order of a typical workflow."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand's module and return its `command`."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(vdiff.__version__, prog_name="vdiff")
def main() -> None:
    """Train a diffusion model, then distil it to sample in 1 to 8 network evaluations."""
