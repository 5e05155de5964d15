"""Finished layers in the cache, so that an interrupted calibration goes on where it was."""

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tritconv.calibration.inputs import Inputs
from tritcore import cache


class LayerStore:
    """The finished layers of one calibration.

    Attributes:
        inputs: all that the result depends on.
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
        self.inputs = inputs
        self.entry = cache.Entry(inputs.key(), f"{inputs.kind}, {model}")

    def load(self, layer: int) -> dict[str, np.ndarray] | None:
        """What was saved of a layer; None if it is not there or damaged."""
        try:
            return load_file(self.entry.folder / _name(layer))
        except (OSError, SafetensorError):
            return None

    def save(self, layer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what belongs to a layer. Raises TritError."""
        self.entry.write(_name(layer), save(dict(arrays)))


def _name(layer: int) -> str:
    return f"layer-{layer:04}.safetensors"
