"""Behaviour that tritconv and tritrun share: errors in one line, exit codes, signals, examples in the help, options."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from types import FrameType
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from tritcore.console import error, forgive_encodings
from tritcore.errors import Terminated, TritError, UsageError, first_line

_FAILED, _MISUSED = 1, 2
_KILLED = 128  # plus the number of the signal, as shells do
_TRACEBACK = "TRIT_TRACEBACK"  # for developers: shows where an unexpected error came from

_ParserError: Any = typer.BadParameter.__mro__[1]  # click's UsageError, which typer does not name


class Commands(TyperGroup):
    """A group of commands that turns exceptions into one line on stderr and an exit code.

    2 for misuse of the command line, 128 plus the number of a signal, 1 for everything else.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        forgive_encodings()
        with _one_line(), _signals_raise():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UsageError as problem:
        raise _stopped(problem, _MISUSED) from problem
    except TritError as problem:
        raise _stopped(problem, _FAILED) from problem
    except KeyboardInterrupt as interrupt:
        raise _stopped("interrupted", _KILLED + signal.SIGINT) from interrupt
    except Terminated as end:
        raise _stopped(f"ended by {end.signal.name}", _KILLED + end.signal) from end
    except _ParserError as problem:
        message = problem.format_message()
        if not message:  # no arguments at all: typer shows the help
            raise
        command = problem.ctx.command_path if problem.ctx else ""
        raise _stopped(f"{message} See {command} --help" if command else message, _MISUSED) from problem
    except MemoryError as problem:
        raise _stopped(
            "out of memory: close other programs, or take a smaller model or fewer tokens", _FAILED
        ) from problem
    except (typer.Exit, typer.Abort):
        raise
    except Exception as problem:
        if os.environ.get(_TRACEBACK) or (isinstance(problem, OSError) and problem.errno == errno.EPIPE):
            raise
        where = f"{problem.filename}: " if isinstance(problem, OSError) and problem.filename else ""
        what = problem.strerror if isinstance(problem, OSError) and problem.strerror else first_line(problem)
        advice = (
            "" if isinstance(problem, OSError) else f"; this is a bug: {_TRACEBACK}=1 shows where, please report it"
        )
        raise _stopped(f"{where}{what} ({type(problem).__name__}){advice}", _FAILED) from problem


def _stopped(what: object, exit_code: int) -> typer.Exit:
    error(what)
    return typer.Exit(exit_code)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP within the context, so that files and children are cleaned up.

    Ignored signals, such as SIGHUP under nohup, stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    names = ("SIGTERM", "SIGHUP")
    wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
    changed = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) is signal.SIG_DFL}

    def end(number: int, _frame: FrameType | None) -> None:
        for other in changed:
            signal.signal(other, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise Terminated(signal.Signals(number))

    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def new_app(name: str, summary: str, version: Callable[[], str]) -> typer.Typer:
    """A command line with `--version` and `-h`, to which commands can be added."""
    app = typer.Typer(
        name=name,
        cls=Commands,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version()}")
            raise typer.Exit

    @app.callback(help=summary)
    def main(
        version: Annotated[
            bool, typer.Option("--version", "-V", help="Show the version.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    return app


def examples(*lines: str) -> str:
    """Text with examples for the end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{line}[/cyan]" for line in lines)])


def with_options(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command the options that a dataclass describes.

    They stand where the command has its parameter `options`, which gets an instance of that class.
    """
    hints = get_type_hints(options, include_extras=True)
    shared = [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(options)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            chosen = options(**{one.name: given.pop(one.name) for one in shared})
            command(**given, options=chosen)

        parameters: list[Parameter] = []
        for own in signature(command, eval_str=True).parameters.values():
            parameters += shared if own.name == "options" else [own.replace(kind=Parameter.KEYWORD_ONLY)]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate
