"""Names of files in a report: shortened, and without characters that could harm a terminal or a page."""

from collections.abc import Sequence
from pathlib import Path

from tritcore.console import one_line
from tritcore.reference import find_model

_LONGEST_NAME = 80  # letters


def clean_text(text: str) -> str:
    """Text from outside, fit to be shown: on one line, only what UTF-8 and XML can hold."""
    text = one_line(text.encode("utf-8", "replace").decode())
    return text.translate(dict.fromkeys((0xFFFE, 0xFFFF)))


def clean_name(text: str) -> str:
    """`clean_text`, and not too long."""
    text = clean_text(text)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def split_label(model: str) -> tuple[str | None, Path]:
    """The label, if any, and the file of a "FILE" or "LABEL=FILE"."""
    label, separator, file = model.partition("=")
    if separator and label and file and not Path(model).exists():
        return label, Path(file)
    return None, Path(model)


def find_labelled(model: str) -> str:
    """The same "FILE" or "LABEL=FILE" with the path of the model, where it names one of the hub. Raises TritError."""
    label, file = split_label(model)
    path = find_model(str(file))
    return f"{label}={path}" if label is not None else str(path)


def labels_of(base: str, names: Sequence[str]) -> list[str]:
    """Short names for a base and other files, the base first.

    They are without ".gguf", and without what they begin with in common, up to a "-", "." or "_"; the base keeps its
    own name if only the others have something in common.
    """
    first, *stems = (name.removesuffix(".gguf") for name in (base, *names))
    if shared := _shared([first, *stems]):
        return [stem[shared:] or stem for stem in (first, *stems)]
    shared = _shared(stems)
    return [first, *(stem[shared:] or stem for stem in stems)]


def _shared(stems: Sequence[str]) -> int:
    """Number of letters, up to a separator, that all of two or more names begin with."""
    shared = 0
    for i, letters in enumerate(zip(*stems, strict=False) if len(stems) > 1 else ()):
        if len(set(letters)) > 1:
            break
        if letters[0] in "-._":
            shared = i + 1
    return shared
