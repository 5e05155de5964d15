"""The output file of a conversion: checked and locked before work begins, renamed to its name when it is complete."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tritcore import files
from tritcore.errors import TritError

if sys.platform != "win32":
    from fcntl import LOCK_EX, LOCK_NB, flock


class Output:
    """An output file that is being written.

    Attributes:
        target: the final path, as the user gave it.
        partial: the path to write to, in the same folder. No other run writes to it.
        published: whether the file has its final name.
    """

    def __init__(self, target: Path, force: bool) -> None:
        self.target = target
        self._place = Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
        self.partial = self._place.with_name(f".{self._place.name}.part")
        self.published = False
        self._force = force

    def check_place(self) -> None:
        """Check that the file may be written to `target`. Raises TritError."""
        if self._place.is_dir():
            raise TritError(f"{self.target} is a folder: name a file with -o")
        if self._place.exists() and not self._place.is_file():
            raise TritError(f"{self.target} is no regular file: name another one with -o")
        if self._place.exists() and not self._force:
            raise TritError(f"{self.target} exists: give --force to replace it, or another name with -o")
        if not self._place.parent.is_dir():
            raise TritError(f"cannot write {self.target}: the folder {self.target.parent} does not exist")

    def owns(self, path: object) -> bool:
        """Whether a path is `target`, `partial` or their folder."""
        return str(path) in (str(self.partial), str(self._place), str(self._place.parent), str(self.target))

    def check_space(self, n_bytes: int) -> None:
        """Check that the disk has room for `n_bytes`. Raises TritError."""
        free = shutil.disk_usage(self._place.parent).free
        if n_bytes > free:
            raise TritError(
                f"no space left for {self.target}: it needs {n_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
                "free some, or choose another folder with -o"
            )

    def publish(self) -> None:
        """Rename the complete file to `target`. Raises TritError if another file has appeared there meanwhile."""
        self.check_place()
        files.publish(self.partial, self._place)
        self.published = True


@contextmanager
def reserve(target: Path, force: bool) -> Iterator[Output]:
    """Check that `target` can be written, and lock it against other runs within the context.

    Without a call of `publish`, `target` stays as it was. No other file is left behind in either case.

    Args:
        force: replace an existing file.

    Raises:
        TritError: the file is there, another run writes it, or it cannot be written, now or within the context.
    """
    output = Output(target, force)
    try:
        output.check_place()
        lock = _lock(output.partial, target)
        try:
            yield output
        finally:
            if not output.published:
                with suppress(OSError):  # on a file system that fails, what stopped the work is told
                    output.partial.unlink()
            if lock is not None:
                os.close(lock)
    except OSError as error:
        if error.filename is not None and not output.owns(error.filename):
            raise  # of another file
        if files.has_no_space(error):
            raise TritError(f"no space left for {target}: free some, or choose another folder with -o") from error
        raise TritError(f"cannot write {target}: {error.strerror or error}; choose another place with -o") from error


def _lock(partial: Path, target: Path) -> int | None:
    """Open and lock `partial`, which a killed run may have left. Returns its descriptor; None on Windows."""
    while True:
        file = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        if sys.platform == "win32":
            os.close(file)  # an open file could not be renamed there
            return None
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise TritError(f"another run is writing {target}: wait for it, or choose another name with -o") from None
        except OSError:
            return file  # the file system has no locks
        # another run may have published or removed the file between the two calls
        if partial.exists() and os.path.samestat(os.fstat(file), partial.stat()):
            return file
        os.close(file)
