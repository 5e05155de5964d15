"""Programs that say their first word, and go on."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def started(command: Sequence[object], n_characters: int = -1) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """What a program first writes to stdout, a line or so many characters, and the program; in the end it is killed."""
    pipe = subprocess.PIPE
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline().strip() if n_characters < 0 else process.stdout.read(n_characters)
            if not first:
                raise AssertionError(process.communicate()[1])
            yield first, process
        finally:
            process.kill()
