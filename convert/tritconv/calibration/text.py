"""Calibration text: documents to token sequences of equal length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from tritconv.calibration.documents import Document
from tritcore.errors import TritError, first_line

_SEPARATOR = "\n\n"
_HELD_OUT = 16  # one sequence in so many
_MOST_HELD_OUT = 16  # sequences


@dataclass(frozen=True)
class TextOptions:
    """What the user asked to calibrate on.

    Attributes:
        documents: what the files hold.
        names: of the files, for people.
        n_tokens: at most this many tokens in all.
        length: tokens of a sequence.
        seed: of what is drawn: which of the sequences, where there are more than needed.
    """

    documents: Sequence[Document]
    names: tuple[str, ...]
    n_tokens: int
    length: int = 512
    seed: int = 0


class Text(NamedTuple):
    """A document as a string. `control` says whether names of control tokens in it stand for these tokens.

    They do in what a chat template has written. In a user's text they are text, as llama.cpp's programs take it.
    """

    text: str
    control: bool = False


def render(documents: Iterable[Document], tokenizer: Any) -> list[Text]:
    """The texts of documents; conversations as the model's chat template writes them.

    Args:
        tokenizer: of the transformers library.

    Raises:
        TritError: the template refuses a conversation, or the model has none.
    """
    return [_rendered(document, tokenizer) for document in documents]


def sequences(texts: Sequence[Text], options: TextOptions, tokenizer: Any) -> torch.Tensor:
    """Token sequences to calibrate on.

    The texts are joined and cut; each sequence starts with the token that the tokenizer starts a text with, if any,
    as llama.cpp's programs do it. Where there are more than needed, they are drawn from all of the texts, by the seed.

    Args:
        texts: of the options' documents.
        tokenizer: of the transformers library.

    Returns:
        int64 (n, length).

    Raises:
        TritError: there is too little text, or the tokenizer fails on it.
    """
    try:
        tokens = torch.tensor(_tokens(texts, tokenizer), dtype=torch.int64)
        start = tokenizer("").input_ids[:1]
    except Exception as error:  # the library raises whatever its many authors chose
        raise TritError(f"{', '.join(options.names)}: the tokenizer fails on it: {first_line(error)}") from error
    body = options.length - len(start)
    n_there = len(tokens) // body
    wanted = max(1, options.n_tokens // options.length)
    if not n_there:
        names = ", ".join(options.names)
        raise TritError(
            f"{names}: {len(tokens)} tokens are too few for one sequence of {options.length}: add text, "
            "or lower --calib-seq"
        )
    chosen = torch.arange(n_there)
    if n_there > wanted:
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(n_there, generator=generator)[:wanted].sort().values
    cut = tokens[: n_there * body].view(n_there, body)[chosen]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(cut), -1), cut], dim=1)


def hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split int64 (sequences, length): most to calibrate on, and few, from all parts of the text, to judge by.

    A single sequence is both.
    """
    numbers = torch.arange(len(tokens))
    every = min(max(_HELD_OUT, len(tokens) // _MOST_HELD_OUT), len(tokens))
    mine = numbers % every == every - 1
    return (tokens[~mine], tokens[mine]) if len(tokens) > 1 else (tokens, tokens)


def _rendered(document: Document, tokenizer: Any) -> Text:
    if not document.messages:
        return Text(document.text)
    if not getattr(tokenizer, "chat_template", None):
        if document.text:
            return Text(document.text)
        raise TritError(f"{document.place} holds messages, and the model has no chat template: give text")
    try:
        return Text(_by_template(document, tokenizer), control=True)
    except TritError:
        if document.text:
            return Text(document.text)
        raise


def _by_template(document: Document, tokenizer: Any) -> str:
    """A conversation as the template writes it, given strings or, where it passes over those, lists of parts."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in document.messages]
    problem = None
    for messages in (document.messages, parts):
        try:
            text = tokenizer.apply_chat_template(list(messages), tools=list(document.tools) or None, tokenize=False)
        except Exception as error:  # templates are programs of their authors'
            problem = problem or error
            continue
        if any(message["content"].strip() in text for message in document.messages if message["content"].strip()):
            return text
    reason = "it leaves out what the messages say" if problem is None else first_line(problem)
    raise TritError(f"{document.place}: the chat template refuses it: {reason}")


def _tokens(texts: Sequence[Text], tokenizer: Any) -> list[int]:
    tokens: list[int] = []
    groups = [(control, [one.text for one in some]) for control, some in groupby(texts, key=lambda one: one.control)]
    for number, (control, some) in enumerate(groups, 1):
        joined = _SEPARATOR.join(some) + (_SEPARATOR if number < len(groups) else "")
        tokens += tokenizer(
            joined,
            add_special_tokens=False,
            split_special_tokens=not control,
            return_attention_mask=False,
            verbose=False,
        ).input_ids
    return tokens
