"""A folder of results that took long, so that an interrupted or repeated run does not compute them again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritcore.files import sha256_of_json, write_text_atomically

Key = Mapping[str, Any]  # all that a result depends on; JSON holds it


class Kept:
    """Results and files in `folder`, which exists; each under the key that says what it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Key, suffix: str = "") -> Path:
        """Where the file of this kind and key belongs. Other keys have other names."""
        return self.folder / f"{kind}-{sha256_of_json(dict(key))[:16]}{suffix}"

    def load(self, kind: str, key: Key) -> Any:
        """The result stored under this key, None if there is none or it is damaged."""
        try:
            found = json.loads(self.path(kind, key, ".json").read_text(encoding="utf-8"))
            return found["value"] if found["key"] == dict(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, kind: str, key: Key, value: Any) -> None:
        """Keep a result, as JSON has it.

        Raises:
            TritError: it cannot be written.
        """
        text = json.dumps({"key": dict(key), "value": value}, indent=1)
        write_text_atomically(self.path(kind, key, ".json"), text + "\n")
