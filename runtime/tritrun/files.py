"""Write small files so that a reader never sees half of one."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from tritconv.errors import TritError


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8): a temporary file beside it, fsync, rename.

    Raises:
        TritError: the file cannot be written; `path` is as it was.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
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
