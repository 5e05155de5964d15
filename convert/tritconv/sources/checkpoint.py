"""Finds the folder of a checkpoint: a local one, or a snapshot from the Hugging Face hub."""

import re
from pathlib import Path

from tritconv.sources.hub import download
from tritconv.sources.model_config import read_config
from tritconv.sources.weights import find_weights
from tritcore.errors import TritError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if needed: it has a sound config.json, and all files of its weights.

    The folder of one from the hub is named after its commit.

    Args:
        source: a folder, or a hub id such as `Qwen/Qwen2.5-0.5B`.
        revision: branch, tag or commit on the hub.

    Raises:
        TritError: there is no such checkpoint, it cannot be had, or it is incomplete, or no model of its own.
    """
    folder = Path(source).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(source):
        folder = download(source, revision)
    elif not folder.exists():
        raise TritError(f"{source}: no such folder, and not a hub id of the form owner/name")
    elif not folder.is_dir():
        raise TritError(f"{source}: not a folder; for a GGUF file use `tritconv gguf-to-gguf`")
    elif revision is not None:
        raise TritError(f"{source} is a local folder: --revision goes with a hub id")
    find_weights(folder)
    read_config(folder)
    return folder
