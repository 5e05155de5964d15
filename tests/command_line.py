"""The command line of tritconv in the test's own process: another one takes seconds to load torch."""

from subprocess import CompletedProcess

from typer.testing import CliRunner

from tritconv.cli import app


def tritconv(*arguments: object, **environment: str) -> CompletedProcess[str]:
    """Run it to the end, with some environment variables."""
    words = [str(argument) for argument in arguments]
    done = CliRunner().invoke(app, words, env=environment)
    return CompletedProcess(words, done.exit_code, done.stdout, done.stderr)
