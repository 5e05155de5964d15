"""What the commands of tritconv and tritrun share: errors in one line, exit codes, examples in the help."""

from collections.abc import Callable
from typing import Annotated, Any

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


def new_app(name: str, summary: str, version: Callable[[], str]) -> typer.Typer:
    """A command line without commands yet, with `--version` and `-h`."""
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
    """The examples at the end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{line}[/cyan]" for line in lines)])
