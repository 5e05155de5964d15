"""Checkpoints of the Hugging Face hub: all files from one commit."""

import glob
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from tritconv.sources.foreign_code import is_trusted
from tritconv.sources.weight_files import INDEXES, indexed, no_weights
from tritconv.sources.weights import refuse_adapter
from tritcore.errors import TritError
from tritcore.hub import one_line_errors

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]

# consolidated.safetensors, where there is one, holds the same weights in another layout
_WEIGHTS_WITHOUT_INDEX = ("model*.safetensors", "pytorch_model*.bin")


def download(hub_id: str, revision: str | None) -> Path:
    """The folder of a checkpoint's snapshot, with what a conversion reads. The folder's name is the commit.

    Args:
        hub_id: such as `Qwen/Qwen2.5-0.5B`.
        revision: branch, tag or commit; None stands for the main branch.

    Raises:
        TritError: there is no such checkpoint, it cannot be had, or it has no weights that can be converted.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    files = [*_TEXT_FILES, "*.py"] if is_trusted() else _TEXT_FILES
    with one_line_errors(hub_id, revision):
        folder = _snapshot(hub_id, revision, files)
        commit = folder.name  # what comes from here on is of this commit, whatever is pushed meanwhile
        for index in INDEXES:
            if (names := indexed(folder / index)) is not None:
                return _snapshot(hub_id, commit, [*files, *map(glob.escape, names)])
        for pattern in _WEIGHTS_WITHOUT_INDEX:
            _snapshot(hub_id, commit, [*files, pattern])
            if any(folder.glob(pattern)):
                return folder
        refuse_adapter(folder, hub_id)
        raise TritError(no_weights(hub_id, HfApi().list_repo_files(hub_id, revision=commit)))


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
