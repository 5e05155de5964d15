"""SHA-256 digests, and files that appear whole or not at all.

A file is written under a temporary name in the same folder, flushed to disk and renamed. It gets the permissions that
`open` would give it. A failed write leaves the target as it was and removes the temporary file; a killed process may
leave one, whose name begins with `PARTIAL`.
"""

import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tritcore.errors import TritError

PARTIAL = ".part-"  # how the names of temporary files begin

_PIECE = 1 << 20  # bytes read at a time
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    """SHA-256, in hex, of the content of a file.

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
    """SHA-256, in hex, of the contents of files in this order. The digest of a single file is that of `sha256`.

    Raises:
        TritError: a file cannot be read.
    """
    return sha256_of_digests([sha256(path) for path in paths])


def sha256_of_digests(digests: Sequence[str]) -> str:
    """SHA-256, in hex, of what has these digests, as `sha256_of_all` has it."""
    return digests[0] if len(digests) == 1 else sha256_of_bytes("".join(digests).encode())


def sha256_of_bytes(*parts: bytes) -> str:
    """SHA-256, in hex, of bytes, part after part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256, in hex, of a value that JSON can hold. The order of the keys of a mapping does not matter."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


def has_no_space(error: OSError) -> bool:
    """Whether a write failed because the disk, a quota or the largest size of a file was reached."""
    return error.errno in _NO_SPACE


def cannot_write(path: Path, error: OSError) -> TritError:
    """The error for users when `path` cannot be written."""
    if has_no_space(error):
        return TritError(f"no space left for {path}: free some, or choose another folder")
    return TritError(f"cannot write {path}: {error.strerror or error}")


def check_writable(path: Path) -> None:
    """Check, before long work, that `write_atomically` can write to `path`.

    Raises:
        TritError: the folder is missing or read-only, or `path` is no regular file.
    """
    if path.exists() and not path.is_file():
        raise TritError(f"cannot write {path}: not a regular file")
    if not path.parent.is_dir():
        raise TritError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise TritError(f"cannot write {path}: no permission to write to {path.parent}")


def publish(partial: Path, target: Path) -> None:
    """Flush a finished file to disk and rename it to `target`, in the same file system. Raises OSError."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def replace_content(path: Path, data: bytes) -> None:
    """Replace the content of a file, whole or not at all. A symbolic link stays, and its target gets the content.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    with open(partial, "xb") as file:
        try:
            file.write(data)
            file.close()
            publish(partial, target)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of a file, whole or not at all.

    Raises:
        TritError: the file cannot be written; it is as it was.
    """
    try:
        replace_content(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text, in UTF-8. Characters that UTF-8 does not have are replaced."""
    write_atomically(path, text.encode(errors="replace"))


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, for a file that is made there and then published.

    Raises:
        TritError: the folder, or a file in it, cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise cannot_write(target, error) from error
