"""What every command shares, on a small command of its own: spelling, help, exit codes, one line for each failure."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from vdiff.cli import main as cli
from vdiff.cli.options import MPI, Command, Names, option, switch
from vdiff.errors import Interrupted, OptionError, VdiffError

EXAMPLES = ["python toy.py", "python toy.py photos " + "--clipped_sampling False " * 8 + "# longer than any line"]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("path", required=False)
@switch("--clipped_sampling", group="Sampling", default=None, help="Keep x in range.")
@option("--num_steps", group="Sampling", type=int, default=8, help="Network evaluations.")
@option("--size", group="Output", type=Names(click.IntRange(1, 64), "PIXELS[,PIXELS…]"), help="Width and height.")
@switch("--strict", group="Output", help="Stop at the first surprise.")
@click.pass_obj
def command(action: Callable[[], Any] | None, **values: Any) -> Any:
    """Play in PATH."""
    if action is not None:
        return action()
    for key, value in values.items():
        click.echo(f"{key}={value}")
    return None


@pytest.fixture
def in_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vdiff toy` is the command."""
    monkeypatch.setitem(cli.COMMANDS, "toy", (__name__, "Play."))


def run(*words: str, action: Callable[[], Any] | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(command, list(words), prog_name="toy.py", obj=action, env=env)


def run_in_group(*words: str, action: Callable[[], Any] | None = None) -> Result:
    return CliRunner().invoke(cli.main, ["toy", *words], prog_name="vdiff", obj=action)


def values(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return dict(line.split("=") for line in result.stdout.splitlines())


def error(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


def fails(failure: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise failure

    return action


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "None"),
        ("--clipped_sampling True", "True"),
        ("--clipped_sampling False", "False"),
        ("--clipped_sampling=False", "False"),
        ("--clipped_sampling false", "False"),
        ("--clipped_sampling", "True"),
        ("--clipped-sampling", "True"),
        ("--clipped-sampling False", "False"),
        ("--clipped_sampling --num_steps 4", "True"),
        ("--clipped-sampling --num-steps 4", "True"),
        ("photos --clipped_sampling", "True"),
        ("--clipped_sampling False photos", "False"),
        ("--clipped_sampling -- photos", "True"),
    ],
)
def test_a_switch_takes_true_false_or_nothing(words, expected):
    found = values(run(*words.split()))
    assert found["clipped_sampling"] == expected
    assert found["num_steps"] == ("4" if "4" in words else "8")
    assert found["path"] == ("photos" if "photos" in words else "None")
    assert found["strict"] == "False"


@pytest.mark.parametrize(("value", "expected"), [("True", "True"), ("False", "False"), ("1", "True"), ("", "None")])
def test_a_switch_from_the_environment(value, expected):
    env = {"VDIFF_CLIPPED_SAMPLING": value}
    assert values(run(env=env))["clipped_sampling"] == expected
    assert values(run("--clipped_sampling", "False", env=env))["clipped_sampling"] == "False"


def test_a_switch_refuses_what_is_neither():
    for words in (["--clipped_sampling", "banana"], ["--clipped_sampling=banana"], ["--clipped_sampling", "photos"]):
        message = error(run(*words))
        assert "'--clipped_sampling'" in message
        assert "it accepts True, False or no value, not '" in message
        assert message.endswith("; see toy.py --help")
    assert "no value, not 'banana'" in error(run(env={"VDIFF_CLIPPED_SAMPLING": "banana"}))


def test_several_values_in_one_word():
    assert values(run("--size", "8, 64"))["size"] == "(8, 64)"
    assert "'x' is not a whole number" in error(run("--size", "8,x"))
    assert "65 is not in the range" in error(run("--size", "8,65"))


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--num_step", "--num_steps"),
        ("--num-step", "--num_steps"),
        ("--clipped_samplin", "--clipped_sampling"),
        ("--clipped-samplin=True", "--clipped_sampling"),
        ("--no_clipped_sampling", "--clipped_sampling"),
    ],
)
def test_an_unknown_option_with_a_suggestion(word, near):
    name = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
    assert error(run(word)) == f"unknown option {name}; did you mean '{near}'?; see toy.py --help"


def test_an_unknown_option_like_no_other():
    assert error(run("--zzz")) == "unknown option --zzz; see toy.py --help"


def test_the_help_lists_options_under_their_headings_and_no_arguments():
    result = run("--help")
    assert result.exit_code == 0
    headings = [line for line in result.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Sampling:", "Output:", "Options:", "Examples:"]
    assert result.stdout.startswith("Usage: toy.py [OPTIONS] [PATH]\n")
    assert result.stdout.count("[PATH]") == 1
    assert "--size PIXELS[,PIXELS…]" in result.stdout


def test_examples_stand_in_the_help_as_they_are_typed():
    assert run("--help").stdout.endswith("\nExamples:\n" + "".join(f"  {example}\n" for example in EXAMPLES))


@pytest.mark.parametrize(
    ("action", "code", "stderr"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (fails(VdiffError("data: no such folder", "give another")), 1, "error: data: no such folder; give another\n"),
        (fails(OptionError("--size 3 is odd", "give 4")), 2, "error: --size 3 is odd; give 4\n"),
        (fails(Interrupted("stopped at 7", 130)), 130, "stopped at 7\n"),
        (fails(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "terminated\n"),
    ],
)
@pytest.mark.parametrize("run", [run, run_in_group])
@pytest.mark.usefixtures("in_group")
def test_exit_codes_and_the_one_line(run, action, code, stderr):
    result = run(action=action)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", stderr)


@pytest.mark.usefixtures("in_group")
def test_the_group_takes_the_same_words_and_an_interrupt_while_it_imports(monkeypatch):
    assert values(run_in_group("--clipped-sampling"))["clipped_sampling"] == "True"
    assert error(run_in_group("--num-step")).endswith("did you mean '--num_steps'?; see vdiff toy --help")
    assert error(CliRunner().invoke(cli.main, ["toi"], prog_name="vdiff")).startswith("unknown command 'toi'; did you")

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt(name)

    monkeypatch.setattr(importlib, "import_module", interrupted)
    result = run_in_group()
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.usefixtures("in_group")
def test_a_caller_within_python_gets_values_and_errors():
    for program, words in ((command, []), (cli.main, ["toy"])):
        assert program.main(words, standalone_mode=False, obj=lambda: "done") == "done"
        with pytest.raises(VdiffError, match="mine"):
            program.main(words, standalone_mode=False, obj=fails(VdiffError("mine")))
        with pytest.raises(Interrupted, match="interrupted"):
            program.main(words, standalone_mode=False, obj=fails(KeyboardInterrupt()))


def test_processes_of_mpirun_are_those_of_torchrun_and_the_first_alone_speaks(monkeypatch):
    """What Open MPI says of a process, where nothing else did; errors of the others are their exit code alone."""
    for name in MPI.values():
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", "7")
    for mpi, value in zip(MPI, "1234", strict=True):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{mpi}", value)
    result = run(action=fails(VdiffError("mine")))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")
    assert [os.environ[name] for name in MPI.values()] == ["1", "2", "7", "4"]
    monkeypatch.setenv("RANK", "0")
    assert run(action=fails(VdiffError("mine"))).stderr == "error: mine\n"


def test_sigterm_is_given_back():
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        within = []
        for action in (lambda: within.append(signal.getsignal(signal.SIGTERM)), fails(VdiffError("mine"))):
            run(action=action)
            assert signal.getsignal(signal.SIGTERM) is own
        assert len(within) == 1
        assert within != [own]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_python_does_not_know_becomes_the_default(monkeypatch):
    handlers = []
    monkeypatch.setattr(signal, "signal", lambda _, handler: handlers.append(handler))
    assert run().exit_code == 0
    assert handlers[1:] == [signal.SIG_DFL]


def test_a_command_runs_in_any_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run("--num_steps", "4")))
    thread.start()
    thread.join()
    assert values(results[0])["num_steps"] == "4"
