"""The cache: a folder of entries. An entry holds the results of one calculation, complete or not.

An entry is a folder whose name is a hash of all inputs of the calculation. Its CACHEDIR.TAG marks it as an entry of
tritconv that backups may skip, describes it, has the time of its last use as modification time, and carries the lock of
the processes that use it. Only such entries are ever deleted.
"""

import os
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from tritcore import files, sizes
from tritcore.errors import TritError

if sys.platform != "win32":
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock

_PLACE = "TRITCONV_CACHE"
_LIMIT = "TRITCONV_CACHE_SIZE"
_MOST_BYTES, _MOST_OF_DISK = 20 * 10**9, 0.1  # the default limit: the smaller of the two

_TAG = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
_OURS = "# tritconv: "
_ENTRY = re.compile(r"[0-9a-f]{24}")
_FILE = re.compile(r"[a-z]+-\d{4}\.safetensors")
_DAY = 24 * 3600.0


def folder() -> Path:
    """The folder of the entries: TRITCONV_CACHE, or tritconv in the user's cache folder. Raises TritError."""
    if chosen := os.environ.get(_PLACE):
        return Path(chosen).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritconv"
    except RuntimeError as error:
        raise TritError(f"there is no home folder for the cache: set {_PLACE} to a folder") from error


def limit() -> int:
    """The maximum size of the cache in bytes. Raises TritError."""
    if chosen := os.environ.get(_LIMIT):
        size = sizes.parse(chosen)
        if size is None:
            raise TritError(f"{_LIMIT}={chosen} is no size: write 20GB, or 0 to keep nothing")
        return size
    try:
        return min(_MOST_BYTES, int(_MOST_OF_DISK * shutil.disk_usage(folder()).total))
    except OSError:
        return _MOST_BYTES


def check() -> None:
    """Check, before long work, that entries can be made. Raises TritError."""
    limit()
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _refused(place, error) from error


class Entry:
    """An entry in use. Other processes do not delete it until this object is closed or garbage-collected.

    Attributes:
        folder: the path of the entry.
    """

    def __init__(self, key: str, about: str) -> None:
        """Open or make an entry, then delete old entries beyond the limit of the cache.

        Args:
            key: 24 hexadecimal digits.
            about: description of the contents for people, in one line.

        Raises:
            TritError: the folder cannot be made.
        """
        assert _ENTRY.fullmatch(key)
        self.folder = folder() / key
        try:
            lock = _hold(self.folder, about)
        except OSError as error:
            raise _refused(self.folder, error) from error
        self._release = weakref.finalize(self, os.close, lock)
        prune()

    def close(self) -> None:
        """Allow other processes to delete the entry."""
        self._release()

    def check_space(self, n_bytes: int) -> None:
        """Check that the entry can grow to `n_bytes`. Raises TritError if the disk has too little room."""
        here = sum(path.stat().st_size for path in _files(self.folder))
        free = shutil.disk_usage(self.folder).free
        if n_bytes - here > free:
            raise _full(self.folder, n_bytes - here, f", {sizes.show(free)} are free")

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the entry, whole or not at all. Raises TritError."""
        target = self.folder / name
        assert _FILE.fullmatch(name)
        try:
            files.replace_content(target, data)
            os.utime(self.folder / _TAG)
        except OSError as error:
            if files.has_no_space(error):
                raise _full(target, len(data), "; another run will go on from here") from error
            raise _refused(target, error) from error
        prune()


def _hold(place: Path, about: str) -> int:
    """Make an entry if it is missing, remove partial files in it, and lock it. Returns the descriptor of its tag."""
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            tag = os.open(place / _TAG, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just deleted the folder
            continue
        except FileExistsError:
            if os.path.lexists(place) and not place.is_dir():
                raise
            continue  # deleted just when mkdir looked whether it is a folder
        try:
            if _lock(tag, exclusive=True) is not False and _is(tag, place / _TAG):  # nobody else is in it
                for path in place.glob(f"{files.PARTIAL}*"):
                    path.unlink()
            _lock(tag, exclusive=False)
            # another process may have deleted the entry between the calls
            if _is(tag, place / _TAG):
                if os.fstat(tag).st_size == 0:
                    os.write(tag, f"{_SIGNATURE}\n{_OURS}{' '.join(about.split())}\n".encode(errors="replace"))
                os.utime(place / _TAG)
                return tag
        except BaseException:
            os.close(tag)
            raise
        os.close(tag)


def _is(file: int, path: Path) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, exclusive: bool) -> bool | None:
    """Take a lock, an exclusive one without waiting. Returns whether it was free; None if the system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        flock(file, LOCK_EX | LOCK_NB if exclusive else LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


@dataclass(frozen=True)
class Listed:
    """Facts on an entry, for lists.

    Attributes:
        about: description of the contents.
        used: time of the last use, in seconds since 1970.
    """

    folder: Path
    about: str
    n_bytes: int
    used: float


def entries() -> list[Listed]:
    """All entries, the least recently used first. Raises TritError."""
    place, found = folder(), []
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _refused(place, error) from error
    for path in (place / name for name in names if _ENTRY.fullmatch(name)):
        with suppress(OSError):  # another process has just deleted it
            if (about := _about(path)) is not None:
                size = sum(file.stat().st_size for file in _files(path))
                found.append(Listed(path, about, size, (path / _TAG).stat().st_mtime))
    return sorted(found, key=lambda kept: kept.used)


def prune() -> None:
    """Delete the least recently used entries that no process uses, until the rest is within the limit."""
    kept, most = entries(), limit()
    total = sum(one.n_bytes for one in kept)
    for one in kept:
        if total <= most:
            return
        if _delete(one):
            total -= one.n_bytes


class Cleared(NamedTuple):
    """Result of `clear`: number and size of the deleted entries, and number of the entries in use, which stay."""

    n_deleted: int
    n_bytes: int
    n_in_use: int


def clear() -> Cleared:
    """Delete all entries that no process uses. Raises TritError."""
    kept = entries()
    gone = [one for one in kept if _delete(one)]
    return Cleared(len(gone), sum(one.n_bytes for one in gone), len(kept) - len(gone))


def table() -> Table:
    """A table of the entries, the most recently used first."""
    kept = entries()
    shown = Table("what", "folder", "size", "last used")
    shown.columns[2].justify = "right"
    for one in reversed(kept):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
        shown.add_row(Text(one.about), one.folder.name, sizes.show(one.n_bytes), used)
    shown.add_section()
    shown.add_row("total", str(len(kept)), sizes.show(sum(one.n_bytes for one in kept)), "", style="bold")
    return shown


def _about(place: Path) -> str | None:
    """The description in the tag of an entry; None if the folder is no entry of tritconv."""
    if place.is_symlink() or not (place / _TAG).is_file():
        return None
    with (place / _TAG).open("rb") as file:
        lines = file.read(4096).decode(errors="replace").split("\n")
    ours = len(lines) > 1 and lines[0] == _SIGNATURE and lines[1].startswith(_OURS)
    return lines[1].removeprefix(_OURS) if ours else None


def _files(place: Path) -> Iterator[Path]:
    """The files of an entry that tritconv wrote, without the tag."""
    return (path for path in place.iterdir() if _FILE.fullmatch(path.name) or path.name.startswith(files.PARTIAL))


def _delete(kept: Listed) -> bool:
    """Delete an entry. Returns False if a process uses it or it cannot be deleted."""
    try:
        tag = os.open(kept.folder / _TAG, os.O_RDWR)
    except OSError:
        return False
    try:
        free = _lock(tag, exclusive=True)
        if free is None:
            free = time.time() - kept.used > _DAY
        if not free or not _is(tag, kept.folder / _TAG):  # another process has deleted it, and perhaps made it anew
            return False
        for path in _files(kept.folder):
            path.unlink()
        (kept.folder / _TAG).unlink()
        with suppress(OSError):  # somebody has put another file there
            kept.folder.rmdir()
        return True
    except OSError:
        return False
    finally:
        os.close(tag)


def _full(place: Path, n_bytes: int, more: str) -> TritError:
    return TritError(
        f"no space left for the cache: {place} needs {sizes.show(n_bytes)}{more}: free some ('tritconv cache' shows "
        f"what is kept), or set {_PLACE} to a folder elsewhere"
    )


def _refused(place: Path, error: OSError) -> TritError:
    return TritError(f"cannot keep results in {place}: {error.strerror or error}; set {_PLACE} to a folder elsewhere")
