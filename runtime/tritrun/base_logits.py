"""The file of a base model's log-probabilities that llama-perplexity writes and reads for KL divergence.

llama.cpp's layout: `_logits_`, int32 context, int32 vocabulary, int32 chunks, int32 tokens of all chunks,
then for each chunk a uint16 row per scored token. It does not name the base model and the text: an old file
would be taken for another text without a word. A stamp at the end, where llama.cpp does not read, names them:
JSON, its length as a little-endian uint32, and a magic word.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

from tritconv.errors import TritError
from tritconv.model_file import ModelFile

_TAIL = struct.Struct("<I8s")
_MAGIC = b"tritrun1"

Stamp = dict[str, str | int | None]


def scored_tokens(n_ctx: int) -> int:
    """How many tokens of a chunk are scored: its second half."""
    return n_ctx - 1 - n_ctx // 2


def logits_bytes(n_ctx: int, chunks: int, vocabulary: int) -> int:
    """Size of the file in bytes, without the stamp."""
    row = 2 * ((vocabulary + 1) // 2) + 4  # uint16: scale and minimum of the row, then one per token
    return 20 + chunks * (4 * n_ctx + 2 * scored_tokens(n_ctx) * row)


def make_stamp(base: ModelFile | None, vocabulary: int, text: Path, n_ctx: int, chunks: int | None) -> Stamp:
    """What the logits depend on; of the base model its name and size. `base` None leaves it open."""
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    stamp: Stamp = {"vocabulary": vocabulary, "text_sha256": digest, "ctx": n_ctx, "chunks": chunks}
    if base is not None:
        stamp |= {"base": base.path.name, "base_bytes": base.size}
    return stamp


def append_stamp(path: Path, stamp: Stamp) -> None:
    """Finish a file that llama-perplexity has written: add the stamp and flush it to disk."""
    data = json.dumps(stamp).encode()
    with path.open("ab") as file:
        file.write(data + _TAIL.pack(len(data), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


def check_stamp(path: Path, wanted: Stamp) -> None:
    """See that the logits in `path` were made for what `wanted` says.

    Raises:
        TritError: they were not, or the file has no stamp.
    """
    found = _read_stamp(path)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TritError(f"{path} was made with {key} {found.get(key)}, not {value}; delete it or name another file")


def _read_stamp(path: Path) -> Stamp:
    try:
        with path.open("rb") as file:
            file.seek(-_TAIL.size, os.SEEK_END)
            length, magic = _TAIL.unpack(file.read(_TAIL.size))
            if magic == _MAGIC:
                file.seek(-_TAIL.size - length, os.SEEK_END)
                stamp = json.loads(file.read(length))
                if isinstance(stamp, dict):
                    return stamp
    except (OSError, ValueError):  # too short for a stamp, or the stamp is damaged
        pass
    raise TritError(f"{path} is not a file of `tritrun perplexity --logits`; delete it or name another file")
