"""The log of llama.cpp's programs as they print it with --log-jsonl: one JSON object per line."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A piece of the log. `level` is "info", "warn", "error" .."""

    level: str
    message: str


def read_record(line: str) -> Record | None:
    """A line of a program's stdout; None if it is no piece of its log."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(message := record.get("msg"), str):
        return None
    return Record(str(record.get("level")), message)
