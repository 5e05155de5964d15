"""Finished layers on disk, so that an interrupted calibration goes on where it was.

A folder for each calibration, named after all that its result depends on; a file for each finished layer.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tritconv.errors import TritError

_CACHE = "TRITCONV_CACHE"


def cache_folder() -> Path:
    """Where calibrations are kept: TRITCONV_CACHE, or tritconv in the user's cache folder."""
    if chosen := os.environ.get(_CACHE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritconv"


def digest_of_files(files: list[Path]) -> str:
    """SHA-256, in hex, of the contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        one = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                one.update(part)
        total.update(one.digest())
    return total.hexdigest()


def digest_of_tokens(tokens: torch.Tensor) -> str:
    """SHA-256, in hex, of token ids on the CPU."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class LayerStore:
    """The finished layers of one calibration."""

    def __init__(self, depends_on: Mapping[str, Any]) -> None:
        """Open the folder for a calibration.

        Args:
            depends_on: all that the result depends on, as JSON knows it.

        Raises:
            TritError: the folder cannot be made.
        """
        text = json.dumps(depends_on, sort_keys=True)
        self.folder = cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TritError(f"cannot keep layers in {self.folder}: {error.strerror}; set {_CACHE}") from error

    def load(self, layer: int) -> dict[str, np.ndarray] | None:
        """What was saved of a layer; None if it is not there or damaged."""
        try:
            return load_file(self._path(layer))
        except (OSError, SafetensorError):
            return None

    def save(self, layer: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep what belongs to a layer. Raises TritError."""
        path = self._path(layer)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(arrays, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise TritError(f"cannot keep a layer in {path}: {error.strerror}; set {_CACHE}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04}.safetensors"
