"""The model card, README.md: llama.cpp's converter takes names, authors and the licence from its YAML header."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import Metadata

from tritcore.console import note
from tritcore.errors import first_line


@contextmanager
def usable_card(folder: Path) -> Iterator[None]:
    """Within this context, the converter passes over a model card that it would fail on; a note says so."""
    problem = _problem(folder)
    if problem is None:
        yield
        return
    note(f"{folder / 'README.md'} is left out of the metadata: its YAML header makes no sense ({problem})")
    original = Metadata.load_model_card
    Metadata.load_model_card = staticmethod(lambda model_path=None: {})
    try:
        yield
    finally:
        Metadata.load_model_card = original


def _problem(folder: Path) -> str | None:
    try:
        found = Metadata.apply_metadata_heuristic(Metadata(), Metadata.load_model_card(folder))
    except Exception as error:  # of the YAML parser, or because something has another type than expected
        return first_line(error)
    return next((f"{key} is no text" for key, value in vars(found).items() if not _is_text(value)), None)


def _is_text(value: Any) -> bool:
    """Whether a value is text or none, or a list of texts or of records with texts."""
    if isinstance(value, list):
        return all(_is_text(part) and not isinstance(part, list) for part in value)
    if isinstance(value, dict):
        return all(isinstance(part, str) for part in value.values())
    return value is None or isinstance(value, str)
