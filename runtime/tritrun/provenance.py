"""Where a model comes from and how its file was made, as the header of the file says."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tritcore.gguf_header import ModelFile, raw_values
from tritcore.repository import REPO_ID, is_repo_id
from tritrun.naming import clean_name, clean_text

_LONGEST_TEXT = 300  # characters that are kept
_LONGEST_LIST = 64  # elements that are kept
_REPO_URL = re.compile(rf"https://huggingface\.co/({REPO_ID})/?", re.ASCII)
_LINK = re.compile(r"https://[\w./%~+-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class Provenance:
    """What a header says. Text from it is on one line and without control characters, and may be hostile otherwise.

    Attributes:
        name: the model's.
        license: None where the header does not say, as for all that follow.
        license_link: an https URL.
        base_model: the repository on the hub of the model that was quantized, or else of the one that it derives from.
        source: what was converted: a repository, or the name of a folder or file.
        revision: its commit on the hub.
        codec: the program that made the file.
        calibration: the texts, and how much of them.
    """

    name: str = ""
    license: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    source: str | None = None
    revision: str | None = None
    codec: str | None = None
    calibration: tuple[str, ...] = ()


def provenance(model: ModelFile) -> Provenance:
    """What the header of a file says of the model. Raises TritError if the file cannot be read any more."""
    link = _text(model, "general.license.link")
    wanted = ("general.languages", "general.tags", "trit.calibration")
    lists = {key: tuple(_texts(value)) for key, _, value in raw_values(model) if key in wanted}
    return Provenance(
        clean_name(model.name),
        _text(model, "general.license"),
        link if link and _LINK.fullmatch(link) else None,
        _base_model(model),
        lists.get("general.languages", ()),
        lists.get("general.tags", ()),
        _text(model, "trit.source"),
        _text(model, "trit.revision"),
        _text(model, "trit.codec"),
        lists.get("trit.calibration", ()),
    )


def _text(model: ModelFile, key: str) -> str | None:
    value = model.metadata.get(key)
    return clean_text(value)[:_LONGEST_TEXT] or None if isinstance(value, str) else None


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, list):
        for text in value[:_LONGEST_LIST]:
            if isinstance(text, bytes) and (cleaned := clean_text(text.decode(errors="replace"))[:_LONGEST_TEXT]):
                yield cleaned


def _base_model(model: ModelFile) -> str | None:
    source = _text(model, "trit.source")
    if source and _text(model, "trit.revision") and is_repo_id(source):
        return source
    for key in ("general.repo_url", "general.source.repo_url", "general.base_model.0.repo_url"):
        if found := _REPO_URL.fullmatch(_text(model, key) or ""):
            return found[1]
    return None
