"""Find and run llama.cpp's own programs, which the patched llama-cpp-python brings along."""

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritcore.errors import TritError
from tritcore.files import sha256, sha256_of_json
from tritrun.aborts import NO_BACKTRACE, failed_check

_SECONDS_TO_DRAIN = 5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BIN_DIR = "TRITRUN_BIN_DIR"  # for developers of llama.cpp: a build folder to take the programs from


@dataclass(frozen=True)
class Finished:
    """How a program ended. `last_words` is the check that failed in it, else the last line it wrote to stderr."""

    exit_code: int
    last_words: str

    @property
    def reason(self) -> str:
        """The reason of the failure, as far as the program named it."""
        if self.exit_code >= 0:
            return self.last_words or f"exit code {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        if name == "SIGKILL":  # no program says so of itself
            return f"killed by {name}: is there too little memory?"
        return f"killed by {name}: {self.last_words}" if self.last_words else f"killed by {name}"


def find_tool(name: str, folder: Path | None = None) -> Path:
    """The program `name`, without loading the library beside it.

    Args:
        folder: to take it from; None for the installed one, or that of TRITRUN_BIN_DIR.

    Raises:
        TritError: it is not there.
    """
    if chosen := folder or os.environ.get(_BIN_DIR):
        tool = Path(chosen) / name
    else:
        bindings = importlib.util.find_spec("llama_cpp")
        if bindings is None or bindings.origin is None:
            raise TritError("llama-cpp-python is not installed; `make` builds and installs it")
        tool = Path(bindings.origin).parent / "bin" / name
    if not os.access(tool, os.X_OK):
        raise TritError(f"{tool} is missing; `make` installs the patched llama-cpp-python, which has it")
    return tool


def library_folder() -> Path:
    """The folder of the libraries that the programs use: beside them in a build folder, ../lib where installed.

    Raises:
        TritError: the programs are not there.
    """
    folder = find_tool("llama-bench").parent
    return folder if any(folder.glob("libggml-base.*")) else folder.parent / "lib"


def fingerprint(pattern: str = "lib*") -> str:
    """SHA-256, in hex, of the names and contents of llama.cpp's libraries whose names match `pattern`.

    Raises:
        TritError: the libraries are not there, or one cannot be read.
    """
    return sha256_of_json([(library.name, sha256(library)) for library in sorted(library_folder().glob(pattern))])


def run_tool(
    name: str,
    arguments: list[str],
    on_stdout: Callable[[str], None],
    on_stderr: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds_to_end: float = 0,
) -> Finished:
    """Run llama.cpp's program `name` (see `find_tool`) to its end, giving each line of its output to a callback.

    Args:
        environment: variables for the program besides those of this process.
        seconds_to_end: how long the program may take to end by itself when Ctrl-C or a callback ends it.

    Raises:
        TritError: the program is not there or cannot be started.
        KeyboardInterrupt: Ctrl-C; the program is gone by then. So it is if a callback raises.
    """
    command = [str(find_tool(name, folder)), *arguments]
    # Options come from the command line only; llama.cpp would also take them from the environment.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_")}
    try:
        process = subprocess.Popen(
            command,
            env={**inherited, **NO_BACKTRACE, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_end_with_parent(),
        )
    except OSError as error:
        raise TritError(f"{command[0]} cannot be started: {error.strerror}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    stderr = process.stderr
    failed = last_line = ""

    def drain() -> None:
        nonlocal failed, last_line
        for line in stderr:
            failed = failed or failed_check(line) or ""
            last_line = line.strip() or last_line
            on_stderr(line)

    drainer = threading.Thread(target=drain, daemon=True)
    drainer.start()
    try:
        for line in process.stdout:
            on_stdout(line)
        exit_code = process.wait()
        drainer.join(_SECONDS_TO_DRAIN)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds_to_end)  # its last lines fit into the pipe
        process.kill()
        process.wait()
        process.stdout.close()
        drainer.join(_SECONDS_TO_DRAIN)
        if not drainer.is_alive():  # a child of the program may hold the other end
            stderr.close()
    return Finished(exit_code, failed if exit_code < 0 and failed else last_line)


def _end_with_parent() -> Callable[[], None] | None:
    """A function that a child runs before its program, so that it ends with this process, even with a killed one."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found here, as little may be done between fork and exec
    parent = os.getpid()

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)

    return ask_for_signal
