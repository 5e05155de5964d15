"""A folder that the user chooses for results of long work: an interrupted or repeated run takes them from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritcore.files import sha256_of_json, write_text_atomically

Key = Mapping[str, Any]  # all inputs of a result, as JSON can hold them


class Kept:
    """Results and files in `folder`, which exists. The key of a result lists all its inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Key, suffix: str = "") -> Path:
        """The path of the file of this kind and key. Different keys have different names."""
        return self.folder / f"{kind}-{sha256_of_json(dict(key))[:16]}{suffix}"

    def load(self, kind: str, key: Key) -> Any:
        """The result that was stored under this key; None if it is missing or damaged."""
        try:
            found = json.loads(self.path(kind, key, ".json").read_text(encoding="utf-8"))
            return found["value"] if found["key"] == dict(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, kind: str, key: Key, value: Any) -> None:
        """Store a result that JSON can hold.

        Raises:
            TritError: it cannot be written.
        """
        text = json.dumps({"key": dict(key), "value": value}, indent=1)
        write_text_atomically(self.path(kind, key, ".json"), text + "\n")
