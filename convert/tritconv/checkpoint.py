"""Finds the folder of a checkpoint: a local one, or a snapshot from the Hugging Face hub."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tritconv.errors import TritError
from tritconv.hub import download

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if needed and checked for what a conversion reads.

    The folder of one from the hub is named after its commit.

    Args:
        source: a folder, or a hub id such as `Qwen/Qwen2.5-0.5B`.
        revision: branch, tag or commit on the hub.

    Raises:
        TritError: there is no such checkpoint, it cannot be had, or it is incomplete or damaged.
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
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """Check that a checkpoint is whole, as far as that is cheap."""
    config = folder / "config.json"
    if not config.is_file():
        raise TritError(f"{folder}: no config.json: not a checkpoint of the transformers library")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TritError(f"{config} is not valid JSON: {error}") from error

    shards = sorted(folder.glob("*.safetensors"))
    if not shards and not list(folder.glob("pytorch_model*.bin")):
        raise TritError(f"{folder}: no weights (*.safetensors or pytorch_model*.bin)")
    for shard in shards:
        try:
            with safe_open(shard, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise TritError(f"{shard} is truncated or damaged ({error}): download it again") from error
