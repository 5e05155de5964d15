"""Calibration text: files to token sequences of equal length."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritconv.errors import TritError

_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TextOptions:
    """What the user asked to calibrate on.

    Attributes:
        files: plain text, or JSON lines with `text` or `messages` (role and content) in each.
        n_tokens: at most this many tokens in all.
        length: tokens of a sequence.
        seed: of what is drawn: which of the sequences, where there are more than needed.
    """

    files: tuple[Path, ...]
    n_tokens: int
    length: int = 512
    seed: int = 0


def read(files: Iterable[Path], tokenizer: Any) -> list[str]:
    """The texts that files hold.

    Args:
        tokenizer: of the transformers library. Messages go through its chat template.

    Raises:
        TritError: a file cannot be read or is malformed.
    """
    return [document for file in files for document in _documents(file, tokenizer)]


def sequences(documents: Iterable[str], options: TextOptions, tokenizer: Any) -> torch.Tensor:
    """Token sequences to calibrate on.

    The texts are joined and cut; each sequence starts with the token that the tokenizer starts a text with, if any,
    as llama.cpp's programs do it.

    Args:
        documents: what the files hold.
        tokenizer: of the transformers library.

    Returns:
        int64 (n, length).

    Raises:
        TritError: there is too little text.
    """
    tokens = torch.tensor(_tokens(documents, tokenizer), dtype=torch.int64)
    start = tokenizer("").input_ids[:1]
    body = options.length - len(start)
    n_there = len(tokens) // body
    wanted = max(1, options.n_tokens // options.length)
    if not n_there:
        names = ", ".join(str(file) for file in options.files)
        raise TritError(f"{names}: {len(tokens)} tokens are too few for one sequence of {options.length}: add text")
    chosen = torch.arange(n_there)
    if n_there > wanted:
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(n_there, generator=generator)[:wanted].sort().values
    cut = tokens[: n_there * body].view(n_there, body)[chosen]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(cut), -1), cut], dim=1)


def _tokens(documents: Iterable[str], tokenizer: Any) -> list[int]:
    return list(tokenizer(_SEPARATOR.join(documents), add_special_tokens=False, verbose=False).input_ids)


def _documents(file: Path, tokenizer: Any) -> Iterable[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TritError(
            f"{file} is not UTF-8 text (byte {error.start}): --calibrate takes text or JSON lines"
        ) from error
    except OSError as error:
        raise TritError(f"cannot read {file}: {error.strerror}") from error
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return [text]
    return [
        _document(line, f"{file}, line {number}", tokenizer)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _document(line: str, place: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TritError(f"{place} is not JSON: {error}") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise TritError(f"{place} holds messages, and the model has no chat template: give text")
        try:
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
        except Exception as error:  # templates are programs of their authors'
            raise TritError(f"{place}: the chat template refuses it: {error}") from error
    raise TritError(f'{place} has neither "text" nor "messages"')
