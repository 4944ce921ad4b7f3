"""Common parts of all commands: spelling of options, exit codes, one-line errors."""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TextIO

import click

from vdiff.cli.vdiffusion import PICKLES, imported, translated
from vdiff.data.labels import SAMPLES_FILE
from vdiff.errors import MAX_WHOLE, Interrupted, VdiffError, printable, suggestion
from vdiff.projects import Project, check_checkpoint
from vdiff.signals import answered
from vdiff.text import folded

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["--help", "-h"],
    "show_default": True,
}

NUM, OLD_NUM = ("--num", "-n"), ["--num_images"]
"""torchrun rejects a word after the script that abbreviates two of its own options, such as --num."""
ELSEWHERE = {
    "to_steps": "steps num_steps",
    "num_iters": "epochs num_epochs num_train_epochs iterations steps max_train_steps",
    "num_timesteps": "num_inference_steps sampling_steps ddpm_num_steps steps",
    "num": "num_samples samples",
    "data": "dataset data_dir data_path dataset_name train_data_dir",
    "out": "output output_dir outdir save_dir",
    "checkpoint": "model ckpt model_path pretrained_model_name_or_path",
    "base": "teacher model checkpoint",
    "image_size": "resolution size",
    "size": "resolution image_size",
    "lr": "learning_rate",
    "precision": "mixed_precision",
    "grad_accum": "gradient_accumulation_steps",
}
"""Options, and their names in other tools or commands."""
ALL = "vdiff.help_all"
MAX_SHOWN = 10**6
LONG, LONGEST_METAVAR = 300, 50
"""A list of choices with more characters goes into the help text of its option."""
WORDS, PROJECT = "vdiff.words", "vdiff.project"
PATH = click.Path(path_type=Path)
SECONDS_UNTIL_SAID = 0.8
BUSY, SPINS = 0.5, "1000"
"""Programs that want to compute per core, and how often a thread polls for another one."""
MPI = {"RANK": "RANK", "SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_SIZE": "LOCAL_WORLD_SIZE"}
"""Names of Open MPI (OMPI_COMM_WORLD_…) → names of torchrun."""


class Program(click.Command):
    """A command or group that reports failures as one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run; Ctrl-C is handled here, as Click would print an empty line first."""
        project = ctx.meta.get(PROJECT, Project())
        for param in self.params:
            if isinstance(kind := param.type, Checkpoint) and (given := ctx.params[str(param.name)]):
                found = [kind.find(each, project) for each in (given if param.nargs == -1 else [given])]
                ctx.params[str(param.name)] = tuple(found) if param.nargs == -1 else found[0]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", 130) from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; adds the command to errors of Click that lack it."""
        words = translated(getattr(self, "theirs", ""), args)
        if words != args and not ctx.resilient_parsing and speaks():
            print(f"read as: {shlex.join([*_program(ctx), *words])}", file=sys.stderr, flush=True)
        args = words
        ctx.meta[WORDS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, `--help`, and `--help_all`, which is listed if it shows more."""
        more = click.Option(
            ["--help_all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
            hidden=not getattr(self, "first", ()), help="Show all options and exit.",
        )  # fmt: skip
        return [*super().get_params(ctx), more]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program."""
        standalone = kwargs.pop("standalone_mode", True)
        main = partial(super().main, *args, **{**kwargs, "standalone_mode": False})
        return run_as_program(main) if standalone else main()


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """`--help_all`: print the help with all options and exit."""
    del parameter
    if value and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


class Command(Program):
    """A command with examples in its help, and options under headings.

    Args:
        examples: command lines, as typed.
        first: names of the options in `--help`, without dashes; the others are in `--help_all`. Empty: all are in both.
        theirs: the command of the v-diffusion repositories; its lines are also accepted.
    """

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), first: str = "", theirs: str = "", **kwargs: Any
    ) -> None:
        kwargs["context_settings"] = {**CONTEXT, **kwargs.get("context_settings", {})}
        super().__init__(*args, **kwargs)
        self.examples = list(examples)
        self.first = first.split()
        self.theirs = theirs

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as typed."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(" " * formatter.current_indent + example + "\n")
        super().format_epilog(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings from `option(group=…)`."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            names = {name.removeprefix("--") for name in parameter.opts}  # of --help in any order, before click 8.5
            if self.first and ALL not in ctx.meta and names.isdisjoint({*self.first, "help", "help_all"}):
                continue
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class ProgramGroup(Program, click.Group):
    """A group of commands that report failures as one line and an exit code."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; the error about an unknown name has a suggestion."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command {args[0]!r}; {suggestion(args[0], names)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands, each with its whole first sentence."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(LONG)) for name, each in self.commands.items()])


class GroupedOption(click.Option):
    """An option with a heading in `--help`.

    Args:
        old: earlier names, which still work but are not shown.
    """

    def __init__(
        self, names: Sequence[str], *args: Any, group: str = "Options", old: Sequence[str] = (), **kwargs: Any
    ):
        super().__init__([*names, *old], *args, **kwargs)
        self.group = group
        self.old = old

    @property
    def long_choices(self) -> list[str]:
        """The choices, if they are too many for one line."""
        choices = list(map(str, self.type.choices)) if isinstance(self.type, click.Choice) else []
        return choices if len("|".join(choices)) > LONGEST_METAVAR else []

    def make_metavar(self, ctx: click.Context) -> str:
        """The placeholder after the option in `--help`."""
        if self.metavar is None and isinstance(self.type, click.IntRange | click.FloatRange):
            return "INTEGER" if isinstance(self.type, click.IntRange) else "NUMBER"
        return "NAME" if self.long_choices else super().make_metavar(ctx)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Names and help text, without the old names."""
        names, help_text = self.opts, self.help
        self.opts = [name for name in names if name not in self.old]
        if self.long_choices:
            self.help = f"{help_text} NAME: {', '.join(self.long_choices)}."
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts, self.help = names, help_text

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Defaults that are words are shown unchanged; the default "off" of switches and usual bounds are not shown."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        if extra.get("default") == "False":
            del extra["default"]
        if not 0 < (getattr(self.type, "max", None) or 0) <= MAX_SHOWN:
            extra.pop("range", None)
        return extra

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert; refuse a whole number that could overflow."""
        found = super().type_cast_value(ctx, value)
        if getattr(getattr(self.type, "item", self.type), "max", None) is None:
            for number in found if isinstance(found, tuple) else (found,):
                if type(number) is int and number > MAX_WHOLE:
                    raise click.BadParameter(f"{str(number)[:20]} is more than {MAX_WHOLE:,}", ctx, self)
        return found

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Name the option only by its first name."""
        del ctx
        return f"'{self.opts[0]}'"


def option(*names: str, group: str, old: Sequence[str] = (), **attributes: Any) -> Callable[[Any], Any]:
    """`click.option`, under the heading `group` of the help; the environment variable `VDIFF_NAME` also sets it."""
    envvar = [f"VDIFF_{name.removeprefix('--').upper()}" for name in (names[0], *old)]
    return click.option(*names, cls=GroupedOption, group=group, old=old, envvar=envvar, **attributes)


class OneOf(click.Choice[str]):
    """One word of a list; the error about another word names the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The error about `value`."""
        del ctx
        return f"{value!r} is unknown; {suggestion(str(value), self.choices)}"


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class TrueOrFalse(click.ParamType):
    """True or False, in all common spellings."""

    name = "boolean"
    words: ClassVar = {
        **dict.fromkeys(("true", "yes", "on", "1"), True),
        **dict.fromkeys(("false", "no", "off", "0"), False),
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """Read one word."""
        if isinstance(value, bool):
            return value
        answer = self.words.get(str(value).strip().lower())
        if answer is None:
            self.fail(f"it accepts True, False or no value, not {value!r}", param, ctx)
        return answer


def switch(*names: str, group: str, default: bool | None = False, **attributes: Any) -> Callable[[Any], Any]:
    """An option that accepts True, False, or no value (which means True)."""
    return option(
        *names,
        group=group,
        type=TrueOrFalse(),
        is_flag=False,
        flag_value="True",
        default=default,
        metavar="[True|False]",
        **attributes,
    )


class ProjectName(click.ParamType):
    """The name of a project."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Project:
        """The project of this name; `Command.invoke` looks for checkpoints in it."""
        del param
        project = value if isinstance(value, Project) else Project(value)
        if ctx is not None:
            ctx.meta[PROJECT] = project
        return project


class Checkpoint(click.ParamType):
    """The folder of a checkpoint, or its name in the project; it is checked before the command begins."""

    name = "CHECKPOINT"

    def __init__(
        self, kind: type[Path] | type[str] = Path, *, imports: bool = True, takes_samples: bool = False
    ) -> None:
        self.kind, self.imports, self.takes_samples = kind, imports, takes_samples

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """A path; for a setting, as text."""
        del param, ctx
        return self.kind(value)

    def find(self, value: Path | str, project: Project) -> Path | str:
        """The checkpoint's folder.

        Raises:
            VdiffError: it is not a checkpoint.
        """
        found = project.inside(Path(value))
        if self.takes_samples and (Path(value) / SAMPLES_FILE).is_file():
            return self.kind(value)
        if not (found.suffix in PICKLES and found.is_file()):
            check_checkpoint(found, project)
        elif self.imports:
            from vdiff.cli.console import Console

            found = imported(found, Console().line)
        return self.kind(found)


def project_option(*, read: bool = True) -> Callable[[Any], Any]:
    """The option `--name` of every command.

    Args:
        read: whether the command receives the project; otherwise the name only affects names of checkpoints.
    """
    return option(
        "--name",
        "project",
        group="Project",
        type=ProjectName(),
        default="",
        metavar="NAME",
        show_default="none",
        expose_value=read,
        help="Work in a separate project: data/NAME_SIZE, checkpoints/NAME, samples/NAME. Its checkpoints may be given "
        "as base_5."
        if read
        else "The checkpoint's project: base_5 then means checkpoints/NAME/base_5.",
    )


class Names(click.ParamType):
    """Several values in one word, separated by commas: `64,128`."""

    def __init__(self, item: click.ParamType, metavar: str) -> None:
        self.item = item
        self.name = metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split at the commas and convert each part."""
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in str(value).split(","))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The placeholder after the option in `--help`."""
        del param, ctx
        return self.name


def typed_command() -> str:
    """The running command as it was typed: `python train.py --seed 1`."""
    context = click.get_current_context()
    return shlex.join([*_program(context), *context.meta[WORDS]])


def _program(context: click.Context) -> list[str]:
    """`python train.py` or `vdiff train`, in words."""
    program = context.command_path.replace("distillate.py", "distill.py")
    return ["python", program] if program.endswith(".py") else program.split()


def one_line_usage_error(error: click.ClickException) -> str:
    """Click's message as one line, with a hint at its end."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None:
        options = [name for p in context.command.params if isinstance(p, click.Option) for name in p.opts]
        message = f"unknown option {error.option_name}"
        name = error.option_name.replace("-", "_").replace("__", "--", 1)
        known = (f"--{here}" for here, words in ELSEWHERE.items() if name[2:] in words.split())
        if near := suggestion(next((here for here in known if here in options), name), options, only_near=True):
            message += f"; {near}"
    message = re.sub(r"is not a valid integer( range)?", "is not a whole number", message)
    message = re.sub(r"is not a valid float( range)?", "is not a number", message)
    if square := re.search(r"'(\d+)[x×]\1'", message):
        message += f"; did you mean {square[1]}?"
    path = context.command_path if context is not None else "vdiff"
    return f"{message}; see {path} --help"


def speaks() -> bool:
    """Whether this is the only process, or rank 0 under a launcher."""
    return os.environ.get("RANK", "0") == "0"


def print_folded(text: str, stream: TextIO) -> None:
    """Print one line; on a terminal as many lines as its width needs."""
    text = printable(text)
    lines = folded(text, shutil.get_terminal_size().columns) if stream.isatty() else [text]
    print(*lines, sep="\n", file=stream, flush=True)


def fail(message: str, code: int, notes: Iterable[str] = ()) -> None:
    """Print one error line to stderr, the lines of its notes to be copied from there, and exit."""
    if speaks():
        print_folded(f"error: {message}", sys.stderr)
        for line in (line for note in notes for line in note.splitlines()):
            print(printable(line), file=sys.stderr, flush=True)
    sys.exit(code)


def run_as_program(run: Callable[[], Any]) -> None:
    """Run a command and exit with its exit code.

    0 done, 1 failed, 2 usage, 3 finished with skipped inputs, 130 Ctrl-C, 143 SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # if × and → cannot be written, ? replaces them
    wait_briefly()
    for mpi, name in MPI.items():  # if accelerate launches by mpirun
        if value := os.environ.get(f"OMPI_COMM_WORLD_{mpi}"):
            os.environ.setdefault(name, value)
    try:
        with _terminable():
            result = run()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        fail(one_line_usage_error(error), error.exit_code)
    except VdiffError as error:
        fail(str(error), error.exit_code, getattr(error, "__notes__", ()))
    except Interrupted as error:
        if speaks():
            print_folded(str(error), sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            _discard_output()
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        fail(f"{where}{error.strerror or error}; fix this, then run the same command again", 1)
    sys.exit(result if isinstance(result, int) else 0)


def wait_briefly() -> None:
    """Make waiting threads release the processor quickly if other programs need it.

    OpenMP lets them spin for milliseconds, which made two threads 50 times slower when other programs ran. OpenMP reads
    this setting when torch is loaded.
    """
    is_chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not is_chosen and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _discard_output() -> None:
    """If stdout is closed or its disk is full, discard the rest, so that it does not fail again when Python exits."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """In the block, SIGTERM raises `Interrupted`, and a second signal ends the process within a second.

    Only the main thread can do this.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = partial(_raise_again, hook)
    try:
        with answered(_stopping, "stopped at once", alone=int(os.environ.get("WORLD_SIZE", "1")) == 1):
            yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _raise_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    """Raise an interruption a moment later if a finaliser or the callback of a weak reference swallowed it."""
    stop = unraisable.exc_value
    if not isinstance(stop, (KeyboardInterrupt, Interrupted)) or not hasattr(signal, "setitimer"):
        hook(unraisable)
        return

    def again(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise stop

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _stopping(over: threading.Event) -> None:
    """Print that a signal was received, if stopping takes longer than a moment."""
    if not over.wait(SECONDS_UNTIL_SAID) and speaks():
        print("stopping; press again to leave now", file=sys.stderr, flush=True)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, so that partial output is removed, and exits with 143."""
    del signum, frame
    raise Interrupted("terminated", 143)
