"""Finished layers in the cache, so that an interrupted calibration goes on where it was."""

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from tritconv.calibration.inputs import Inputs
from tritcore import cache


class LayerStore:
    """The finished layers of one calibration.

    Attributes:
        entry: the place in the cache. No other process deletes it as long as the store is in use.
    """

    def __init__(self, inputs: Inputs, model: str) -> None:
        """Open the place of a result.

        Args:
            inputs: all that the result depends on.
            model: its name, for people who look into the cache.

        Raises:
            TritError: there is no such place.
        """
        self.entry = cache.Entry(inputs.key(), f"{inputs.kind}, {model}")

    def load(self, number: int, kind: str = "layer") -> dict[str, np.ndarray] | None:
        """The arrays that were saved under a number, of a layer or another kind; None if missing or damaged."""
        try:
            return load_file(self.entry.folder / _name(kind, number))
        except (OSError, SafetensorError):
            return None

    def load_one(self, number: int, kind: str, name: str) -> np.ndarray | None:
        """One array of those that were saved under a number; the others are not read. None if missing or damaged."""
        try:
            with safe_open(self.entry.folder / _name(kind, number), framework="np") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError):
            return None

    def save(self, number: int, arrays: Mapping[str, np.ndarray], kind: str = "layer") -> None:
        """Keep arrays. `kind` is of small letters. Raises TritError."""
        self.entry.write(_name(kind, number), save(dict(arrays)))

    def forget(self, kind: str) -> None:
        """Delete all arrays of a kind."""
        for path in self.entry.folder.glob(f"{kind}-*.safetensors"):
            path.unlink(missing_ok=True)


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:04}.safetensors"
