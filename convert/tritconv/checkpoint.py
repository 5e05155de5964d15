"""Finds the folder of a checkpoint: a local one, or a snapshot from the Hugging Face hub."""

import json
import re
import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError, safe_open

from tritconv.errors import TritError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]


def find_checkpoint(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if needed and checked for what a conversion reads.

    Args:
        source: a folder, or a hub id such as `Qwen/Qwen2.5-0.5B`.
        revision: branch, tag or commit on the hub.

    Raises:
        TritError: there is no such checkpoint, it cannot be had, or it is incomplete or damaged.
    """
    folder = Path(source).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(source):
        folder = _download(source, revision)
    elif not folder.exists():
        raise TritError(f"{source}: no such folder, and not a hub id of the form owner/name")
    elif not folder.is_dir():
        raise TritError(f"{source}: not a folder; for a GGUF file use `tritconv gguf-to-gguf`")
    elif revision is not None:
        raise TritError(f"{source} is a local folder: --revision goes with a hub id")
    _check(folder)
    return folder


def _download(hub_id: str, revision: str | None) -> Path:
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # consolidated.safetensors, where there is one, holds the same weights in another layout
        folder = _snapshot(hub_id, revision, [*_TEXT_FILES, "model*.safetensors"])
        if not list(folder.glob("*.safetensors")):
            folder = _snapshot(hub_id, revision, ["pytorch_model*.bin"])
        return folder
    except GatedRepoError as error:
        raise TritError(
            f"{hub_id} is gated: accept its terms on the hub, then set HF_TOKEN to a token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise TritError(f"{hub_id} has no revision {revision!r} on {constants.ENDPOINT}") from error
    except RepositoryNotFoundError as error:
        raise TritError(
            f"{hub_id} is not on {constants.ENDPOINT}: check the id (a private model needs HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise TritError(f"{hub_id} is no hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TritError(
            f"{hub_id} is not in the cache and {constants.ENDPOINT} was not asked or does not answer: "
            "check the network and HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise TritError(f"{constants.ENDPOINT} refused {hub_id}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise TritError(f"cannot download {hub_id} from {constants.ENDPOINT}: {error}") from error


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


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
