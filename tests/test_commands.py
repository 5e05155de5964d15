"""What stops a command: one line on stderr, an exit code, no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from tritcore.commands import new_app
from tritcore.errors import TritError, UsageError

run = CliRunner()


def _raise(problem: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise problem

    return command


@pytest.mark.parametrize(
    ("problem", "exit_code", "line"),
    [
        (TritError("a file is wrong"), 1, "error: a file is wrong"),
        (UsageError("two options at odds"), 2, "error: two options at odds"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 1, "error: out of memory: close other programs, or take a smaller model or fewer tokens"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory"),
        (ValueError("odd\nthing"), 1, "error: odd (ValueError); this is a bug"),
        (AssertionError(), 1, "error: AssertionError (AssertionError); this is a bug"),
    ],
)
def test_one_line(problem: BaseException, exit_code: int, line: str) -> None:
    app = new_app("name", "help", lambda: "1")
    app.command("go")(_raise(problem))
    done = run.invoke(app, ["go"])
    assert done.exit_code == exit_code
    assert done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize("arguments", [["--none"], ["nothing"], ["go", "--none"], ["go", "too", "many"], ["go", "x"]])
def test_misuse_is_one_line_and_2(arguments: list[str]) -> None:
    app = new_app("name", "help", lambda: "1")

    @app.command("go")
    def go(number: int) -> None:
        pass

    app.command("other")(lambda: None)
    done = run.invoke(app, arguments)
    assert done.exit_code == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert said.endswith("--help")


def test_no_arguments_show_the_help() -> None:
    app = new_app("name", "what it is", lambda: "1")
    app.command("go")(lambda: None)
    done = run.invoke(app, [])
    assert "what it is" in done.output


_PROGRAM = """
import pathlib, sys, time
from tritcore.commands import new_app
from tritcore.output import reserve
app = new_app("name", "help", lambda: "1")

@app.command("go")
def go() -> None:
    with reserve(pathlib.Path(sys.argv[0] + ".gguf"), False) as output:
        print("ready", flush=True)
        time.sleep(60)

app.command("other")(lambda: None)
sys.argv[0] = "{target}"
app(["go"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_clean_up(number: signal.Signals, tmp_path: os.PathLike[str]) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.replace("{target}", os.path.join(tmp_path, "x"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 1
    program.send_signal(number)
    _, stderr = program.communicate(timeout=30)
    assert program.returncode == 128 + number
    assert len(stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []
