"""A server of ours, for as long as something is measured."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tritcore.errors import TritError


@contextmanager
def served(*words: object) -> Iterator[str]:
    """The address of a server that these words of tritrun start.

    Raises:
        TritError: it does not start.
    """
    command = [sys.executable, "-m", "tritrun", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if not (address := process.stdout.readline().strip()):
                raise TritError("the server does not start")
            yield address
        finally:
            process.send_signal(signal.SIGINT)
