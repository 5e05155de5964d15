"""Turn a chat into tokens so that what people and models wrote stays text, whatever it looks like."""

from collections.abc import Iterator
from typing import Protocol

from tritrun.template import Prompt


class Vocabulary(Protocol):
    """What is needed of a model's vocabulary."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Tokens of `text`; where it spells a control token, that becomes one if `special`, else stays text."""

    def is_control(self, token: int) -> bool:
        """True for a token that stands for no text."""

    def name(self, token: int) -> str:
        """The token as a text spells it."""


def encode(prompt: Prompt, vocabulary: Vocabulary) -> list[int]:
    """The prompt's tokens. Control tokens come from the template only."""
    whole = vocabulary.tokenize(prompt.text, special=True)
    if _controls(whole, vocabulary) == [
        token
        for piece in prompt.pieces
        if not piece.typed
        for token in _controls(vocabulary.tokenize(piece.text, special=True), vocabulary)
    ]:
        return whole
    return [
        token for text, special in _between_controls(prompt, vocabulary) for token in vocabulary.tokenize(text, special)
    ]


def _controls(tokens: list[int], vocabulary: Vocabulary) -> list[int]:
    return [token for token in tokens if vocabulary.is_control(token)]


def _between_controls(prompt: Prompt, vocabulary: Vocabulary) -> Iterator[tuple[str, bool]]:
    """The prompt cut at the template's control tokens: texts that have them, and texts between them that must not.

    A tokenizer joins letters across the border of a template and a message, but not across control tokens.
    """
    plain = ""
    for piece in prompt.pieces:
        controls = [] if piece.typed else _controls(vocabulary.tokenize(piece.text, special=True), vocabulary)
        if not controls:
            plain += piece.text
            continue
        first, last = vocabulary.name(controls[0]), vocabulary.name(controls[-1])
        start, end = piece.text.find(first), piece.text.rfind(last) + len(last)
        if start < 0 or end <= start:  # the tokenizer changes texts before it looks for tokens
            start, end = 0, len(piece.text)
        if plain + piece.text[:start]:
            yield plain + piece.text[:start], False
        yield piece.text[start:end], True
        plain = piece.text[end:]
    if plain:
        yield plain, False
