"""What the commands of tritconv and tritrun share: errors in one line, exit codes, examples in the help."""

from typing import Any

import typer
from typer.core import TyperGroup

from tritconv.console import error
from tritconv.errors import TritError

_INTERRUPTED = 130  # 128 + SIGINT, as shells do


class Commands(TyperGroup):
    """Turns what stops a command into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TritError as problem:
            error(problem)
            raise typer.Exit(1) from problem
        except KeyboardInterrupt as interrupt:
            error("interrupted")
            raise typer.Exit(_INTERRUPTED) from interrupt


def examples(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{line}[/cyan]" for line in lines)])
