"""Digests of files; small files that are written so that a reader never sees half of one."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tritcore.errors import TritError

_PIECE = 1 << 20  # bytes read at a time


def sha256(path: Path) -> str:
    """Digest of what `path` holds, in hex.

    Raises:
        TritError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def sha256_of_all(paths: Sequence[Path]) -> str:
    """Digest of what all files hold, in hex; of one file it is that of `sha256`. Raises TritError as that does."""
    digests = [sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def check_writable(path: Path) -> None:
    """See that `write_text_atomically` can write to `path`, before long work.

    Raises:
        TritError: its folder is missing or read-only, or `path` is no regular file.
    """
    if path.exists() and not path.is_file():
        raise TritError(f"cannot write {path}: not a regular file")
    if not path.parent.is_dir():
        raise TritError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise TritError(f"cannot write {path}: no permission to write to {path.parent}")


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` in which it can be made, to be renamed when it is whole; gone afterwards.

    Raises:
        TritError: the folder, or something in it, cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".tritrun-", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise TritError(f"cannot write {target}: {error.strerror}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8): a temporary file beside it, fsync, rename.

    Raises:
        TritError: the file cannot be written; `path` is as it was.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                os.chmod(name, 0o666 & ~_umask())  # as open() would have made it; mkstemp lets nobody else read
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise TritError(f"cannot write {path}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
