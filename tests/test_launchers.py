"""torchrun and accelerate take a command as it is typed: neither reads an option of it for one of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import parse_args

from tests.commands import PROGRAMS, ROOT
from vdiff.cli.main import main
from vdiff.cli.options import NUM, OLD_NUM

LAUNCHERS = {"torchrun": parse_args, "accelerate": lambda words: launch_command_parser().parse_args(words[1:])}
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"(?:^ +|`)((?:torchrun|accelerate launch) --[^`\n]+)", re.MULTILINE)
LINES = sorted({line.split("  ")[0] for text in TEXTS for line in SHOWN.findall(text.read_text("utf-8"))})


def parsed(name: str, words: list[str]) -> dict[str, object]:
    """The options of a command as it reads them, by their names."""
    command = PROGRAMS[name]
    if isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(click.Context(command), name)
    return command.make_context(name, words).params


def started(line: str) -> list[str]:
    """The command that a launcher starts: `train.py --preset imagenet64` in words."""
    launcher, *words = shlex.split(line)
    found = LAUNCHERS[launcher](words)
    return [found.training_script, *found.training_script_args]


@pytest.mark.parametrize("line", LINES)
def test_a_launcher_takes_the_lines_of_the_documents(line):
    """And what it starts is a command with these options."""
    name, *words = started(line)
    assert parsed(name, words)


def test_the_documents_show_launchers():
    assert {line.split()[0] for line in LINES} == set(LAUNCHERS)
    assert len(LINES) >= 5


def commands(command: click.Command) -> Iterator[click.Command]:
    context = click.Context(command)
    if not isinstance(command, click.Group):
        yield command
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found)


@pytest.mark.parametrize("start", ["torchrun", "accelerate launch"])
def test_every_option_is_the_commands_own(start):
    """But --num, which torchrun takes for --numa-binding since it has that; it is called -n and --num_images too."""
    names = {name for command in commands(main) for option in command.params for name in option.opts if name[0] == "-"}
    assert len(names) > 100
    assert names >= {*NUM, *OLD_NUM}
    for name in sorted(names - {"--num"}):
        for word in {name, name[:2] + name[2:].replace("_", "-")}:
            assert started(f"{start} sample.py {word} 5") == ["sample.py", word, "5"]


@pytest.mark.parametrize("name", ["sample.py", "vdiff evaluate", "vdiff report"])
def test_the_number_of_images_has_three_names(name):
    program, *words = name.split()
    for number in (*NUM, *OLD_NUM):
        assert parsed(program, [*words, number, "7"])["num"] == 7
