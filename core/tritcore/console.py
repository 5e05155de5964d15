"""Output of the command lines: results go to stdout; notes, progress, warnings and errors go to stderr."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

# emoji=False, as a file may be called ":x:".
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

# Text from a model, a model file or a tool is not ours: escape sequences in it could drive the terminal.
_CONTROL_CODES = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def without_controls(text: str) -> str:
    """`text` without control characters; line feeds and tabs stay."""
    return text.translate(_CONTROL_CODES)


def one_line(text: object) -> str:
    """`text` on one line, without control characters."""
    return " ".join(without_controls(str(text)).split())


def forgive_encodings() -> None:
    """Make stdin and stdout replace characters outside their encoding, instead of raising UnicodeError."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def note(text: str) -> None:
    """Write a dim line to stderr."""
    err.print(f"[dim]{escape(one_line(text))}[/dim]", soft_wrap=True)


def warning(text: str) -> None:
    """Write a warning to stderr, as one line."""
    err.print(f"[yellow]warning[/yellow]: {escape(one_line(text))}", soft_wrap=True)


def error(text: object) -> None:
    """Write an error to stderr, as one line."""
    err.print(f"[bold red]error[/bold red]: {escape(one_line(text))}", soft_wrap=True)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Shows what is done within the context, on a terminal only. What it gives changes the text."""
    if not err.is_terminal:
        yield lambda _: None
        return
    with err.status(escape(what)) as shown:
        yield lambda other: shown.update(escape(other))


def byte_bar() -> Progress:
    """A progress bar in bytes, shown on a terminal only. Descriptions of tasks are no markup."""
    return _bar(DownloadColumn(), style="dim")


def share_bar() -> Progress:
    """A progress bar in percent, shown on a terminal only. Descriptions of tasks are no markup."""
    return _bar(TaskProgressColumn())


def _bar(amount: ProgressColumn, style: str = "none") -> Progress:
    return Progress(
        TextColumn("{task.description}", style=style, markup=False),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
