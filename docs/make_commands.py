"""Write docs/commands.md, the help texts of all commands: `python docs/make_commands.py`."""

from __future__ import annotations

from pathlib import Path

import click

from vdiff.cli.main import COMMANDS, main
from vdiff.cli.options import ALL

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 80
OTHER_NAMES = {"prepare": "prepare_data"}

INTRO = """# Commands

This page has the output of `--help_all` of all commands; `python docs/make_commands.py` writes it. `--help` shows at
most 25 options of a command. `vdiff prepare`, `vdiff train`, `vdiff distill` and `vdiff sample` are the same commands
as the scripts below, and so are `python -m vdiff prepare` and the others.

- Option names may also be written with dashes: `--batch-size`.
- `[True|False]`: the option takes True, False, or nothing after it, which means True.
- An environment variable can set every option: `VDIFF_BATCH_SIZE=64`. Flags override environment variables, which
  override `--config`, which overrides the preset.
- Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some files were skipped, 130 and 143 interrupted by Ctrl-C and
  SIGTERM.
"""


def program(name: str) -> str:
    """How the command is typed: by its script at the top of the repository, or as a part of `vdiff`."""
    script = f"{OTHER_NAMES.get(name, name)}.py"
    return f"python {script}" if (ROOT / script).exists() else f"vdiff {name}"


def help_text(command: click.Command, typed: str) -> str:
    """What `--help_all` prints in a terminal of `WIDTH` columns."""
    context = command.make_context(
        typed, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH, color=False
    )
    context.meta[ALL] = True
    return command.get_help(context)


def page() -> str:
    """The page: what all commands share, then a section for each."""
    context = click.Context(main)
    parts = [INTRO]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts.append(section("##", program(name), command, COMMANDS[name][1]))
        if isinstance(command, click.Group):
            parts += [section("###", f"{program(name)} {sub}", each) for sub, each in command.commands.items()]
    return "\n".join(parts)


def section(level: str, typed: str, command: click.Command, summary: str = "") -> str:
    """A heading, what the command is for, and its help text."""
    head = f"{level} {typed}\n\n" + (f"{summary}\n\n" if summary else "")
    return f"{head}```text\n{help_text(command, typed).rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
