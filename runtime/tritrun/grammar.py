"""Grammars for answers, in GBNF: from a file, or made of a JSON schema."""

import json
from pathlib import Path

from tritcore.errors import TritError, UsageError, first_line

_MAX_BYTES = 1 << 20


def read_grammar(path: Path) -> str:
    """The grammar of a file. Raises TritError if it cannot be read."""
    return _read(path)


def grammar_of_schema(schema: str) -> str:
    """The grammar of a JSON schema: the schema itself, or the name of a file that holds it.

    Raises:
        UsageError: it is no JSON, or holds what the converter of llama-cpp-python does not know.
        TritError: the file cannot be read.
    """
    text = schema if schema.lstrip().startswith("{") else _read(Path(schema))
    from llama_cpp.llama_grammar import json_schema_to_gbnf  # half a second

    try:
        json.loads(text)
        return json_schema_to_gbnf(text)
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deeply") from error
    except Exception as error:  # the converter asserts, and looks up what may not be there
        raise UsageError(f"the JSON schema cannot be used: {type(error).__name__}: {first_line(error)}") from error


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TritError(f"{path}: larger than any grammar")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TritError(f"{path}: not UTF-8") from error
