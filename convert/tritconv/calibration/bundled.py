"""The calibration text that comes with tritconv: `calibration_text/SOURCES.md` says what it is made of."""

from dataclasses import replace
from pathlib import Path

from tritconv.calibration.documents import Document, read

NAME = "the text of tritconv"

PATH = Path(__file__).parent.parent / "calibration_text" / "text.jsonl"


def documents() -> list[Document]:
    """Its documents. A conversation is there as text, too: not every model has a chat template."""
    return [
        replace(one, text="\n\n".join(message["content"] for message in one.messages)) if one.messages else one
        for one in read([PATH], 0)
    ]
