"""The file of a base model's log-probabilities that llama-perplexity writes and reads for KL divergence.

llama.cpp's layout: `_logits_`, int32 context, int32 vocabulary, int32 chunks, int32 tokens of all chunks,
then for each chunk a uint16 row per scored token. It does not name the base model and the text: an old file
would be taken for another text without a word. A stamp at the end, where llama.cpp does not read, names them:
JSON, its length as a little-endian uint32, and a magic word. Files are named by their digests, as many have one name.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from tritcore.errors import TritError

_TAIL = struct.Struct("<I8s")
_MAGIC, _OLD_MAGIC = b"tritrun2", b"tritrun1"
_MAX_STAMP = 1 << 16  # bytes

Stamp = Mapping[str, str | int | None]
"""All inputs of the logits, by name."""


def scored_tokens(n_ctx: int) -> int:
    """How many tokens of a chunk are scored: its second half."""
    return n_ctx - 1 - n_ctx // 2


def logits_bytes(n_ctx: int, chunks: int, vocabulary: int) -> int:
    """Size of the file in bytes, without the stamp."""
    row = 2 * ((vocabulary + 1) // 2) + 4  # uint16: scale and minimum of the row, then one per token
    return 20 + chunks * (4 * n_ctx + 2 * scored_tokens(n_ctx) * row)


def append_stamp(path: Path, stamp: Stamp) -> None:
    """Finish a file that llama-perplexity has written: add the stamp and flush it to disk."""
    data = json.dumps(dict(stamp)).encode()
    with path.open("ab") as file:
        file.write(data + _TAIL.pack(len(data), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


def check_stamp(path: Path, wanted: Stamp) -> None:
    """Check that the logits in `path` were made from the inputs in `wanted`, which may be some of all inputs.

    Raises:
        TritError: they were not, or the file has no stamp.
    """
    found = _read_stamp(path)
    for key, value in wanted.items():
        if found.get(key) != value:
            difference = f"{key} {_shown(found.get(key))}, not {_shown(value)}"
            raise TritError(f"{path} was made with {difference}; delete it or name another file")


def _shown(value: object) -> str:
    """A value of a stamp: digests are cut, as nobody compares all of one."""
    text = "all" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _read_stamp(path: Path) -> Stamp:
    try:
        with path.open("rb") as file:
            file.seek(-_TAIL.size, os.SEEK_END)
            length, magic = _TAIL.unpack(file.read(_TAIL.size))
            if magic == _OLD_MAGIC:
                raise TritError(
                    f"{path} was made by an older tritrun, which did not record the content of the base; "
                    "delete it or name another file"
                )
            if magic == _MAGIC and length <= _MAX_STAMP:
                file.seek(-_TAIL.size - length, os.SEEK_END)
                stamp = json.loads(file.read(length))
                if isinstance(stamp, dict):
                    return stamp
    except (OSError, ValueError, RecursionError):  # too short for a stamp, or the stamp is damaged
        pass
    raise TritError(f"{path} is not a file of `tritrun perplexity --logits`; delete it or name another file")
