"""The output of a conversion, one file or the parts of a split model.

It is checked and locked before work begins, and renamed to its name when it is complete.
"""

import glob
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tritcore import files
from tritcore.errors import TritError
from tritcore.gguf_header import name_of_model, part_name

if sys.platform != "win32":
    from fcntl import LOCK_EX, LOCK_NB, flock


class Output:
    """An output that is being written.

    Attributes:
        target: the final path, as the user gave it. The names of parts derive from it.
        partial: the path to write a single file to, in the same folder. No other run writes to it.
        published: the final paths, once the files have them.
    """

    def __init__(self, target: Path, force: bool, may_split: bool = False) -> None:
        self.target = target
        self._place = Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
        self.partial = self._place.with_name(f".{self._place.name}.part")
        self.published: Sequence[Path] = ()
        self._force = force
        self._may_split = may_split
        self._parts_folder = self._place.with_name(f".{self._place.name}.parts")
        self._part_names: Sequence[str] = ()

    def check_place(self) -> None:
        """Check that `target`, or parts of its name, may be written. Raises TritError."""
        if self._place.is_dir():
            raise TritError(f"{self.target} is a folder: name a file with -o")
        if self._place.exists() and not self._place.is_file():
            raise TritError(f"{self.target} is no regular file: name another one with -o")
        if not self._force and (existing := next(self._existing(), None)) is not None:
            shown = self.target if existing == self._place else self.target.with_name(existing.name)
            raise TritError(f"{shown} exists: give --force to replace it, or another name with -o")
        if not self._place.parent.is_dir():
            raise TritError(f"cannot write {self.target}: the folder {self.target.parent} does not exist")

    def _existing(self) -> Iterator[Path]:
        """The files that are there already: `target`, and with parts in view all parts of its name."""
        if self._place.exists():
            yield self._place
        if self._may_split:
            digits = "[0-9]" * 5
            yield from self._place.parent.glob(f"{glob.escape(name_of_model(self._place))}-{digits}-of-{digits}.gguf")

    def may_replace(self, path: Path) -> bool:
        """Whether an existing file is one that `publish` may replace."""
        return any(other.samefile(path) for other in self._existing())

    def owns(self, path: object) -> bool:
        """Whether a path is `target`, a part, what is written for it, or their folder."""
        own = (self.partial, self._place, self._place.parent, self.target, self._parts_folder, *self._part_paths())
        return str(path) in map(str, own) or Path(str(path)).parent == self._parts_folder

    def check_space(self, n_bytes: int) -> None:
        """Check that the disk has room for `n_bytes`. Raises TritError."""
        free = shutil.disk_usage(self._place.parent).free
        if n_bytes > free:
            raise TritError(
                f"no space left for {self.target}: it needs {n_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
                "free some, or choose another folder with -o"
            )

    def partials(self, count: int) -> Sequence[Path]:
        """The paths to write so many files to: `partial`, or parts with their final names in a folder of their own."""
        if count == 1:
            return (self.partial,)
        stem = name_of_model(self._place)
        self._part_names = [part_name(stem, number, count) for number in range(count)]
        self.discard()
        self._parts_folder.mkdir()
        return [self._parts_folder / name for name in self._part_names]

    def _part_paths(self) -> Sequence[Path]:
        return [self._place.with_name(name) for name in self._part_names]

    def publish(self) -> None:
        """Rename the complete file to `target`, or all parts to theirs: all of them appear, or none.

        Raises:
            TritError: another file has appeared there meanwhile.
        """
        self.check_place()
        if not self._part_names:
            files.publish(self.partial, self._place)
            self.published = (self.target,)
            return
        places = self._part_paths()
        # no other part is used without the first, so old and new ones are never taken for one model
        places[0].unlink(missing_ok=True)
        done = []
        try:
            for place in reversed(places):
                files.publish(self._parts_folder / place.name, place)
                done.append(place)
        except BaseException:
            for place in done:
                place.unlink()
            raise
        self.published = places if self.target.is_symlink() else [self.target.with_name(p.name) for p in places]

    def discard(self) -> None:
        """Remove parts that have not been published, a killed run's too."""
        shutil.rmtree(self._parts_folder, ignore_errors=True)


@contextmanager
def reserve(target: Path, force: bool, may_split: bool = False) -> Iterator[Output]:
    """Check that `target` can be written, and lock it against other runs within the context.

    Without a call of `publish`, `target` stays as it was. No other file is left behind in either case.

    Args:
        force: replace an existing file.
        may_split: parts may be written in place of one file: none may be there without `force`.

    Raises:
        TritError: the file is there, another run writes it, or it cannot be written, now or within the context.
    """
    output = Output(target, force, may_split)
    try:
        output.check_place()
        lock = _lock(output.partial, target)
        try:
            yield output
        finally:
            output.discard()
            if list(output.published) != [target]:  # else `partial` is the name of another run's file
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
