"""Words made up for a text that has `<unk>` in place of its rare ones, as WikiText and the Penn Treebank have.

A model that has never met the pieces of rare words while it was quantized has nothing to show that they matter: half
of its divergence then sits on the names of the texts that it reads later. What the words are counts for little, so
they are made of the vocabulary's pieces at random; a model's own guesses gain no more and take minutes.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tritconv.calibration.text import Text

PLACEHOLDER = "<unk>"

_WORD_STARTS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write the space before a word
_MOST_PIECES = 4


def fill(texts: Iterable[Text], tokenizer: Any, seed: int) -> tuple[list[Text], int]:
    """Put a made-up name in place of each placeholder.

    Args:
        texts: of the user's documents.
        tokenizer: of the transformers library.
        seed: of what is drawn.

    Returns:
        The texts, and how many words have been made up. Where the vocabulary has no pieces to make words of, the texts
        are as they were.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    beginnings, endings = _pieces(vocabulary)
    if not beginnings or not endings:
        return list(texts), 0
    draw = random.Random(seed)
    filled, n_words = [], 0
    for one in texts:
        text, n_here = re.subn(PLACEHOLDER, lambda _: _name(draw, beginnings, endings), one.text)
        filled.append(one._replace(text=text))
        n_words += n_here
    return filled, n_words


def _pieces(vocabulary: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of a vocabulary that begin a name, and those that go on with a word; English ones, as the corpora are."""
    beginnings, endings = [], []
    for piece in sorted(vocabulary):
        if piece.startswith(_WORD_STARTS) and piece[1:].isascii() and piece[1:].isalpha() and piece[1:].istitle():
            beginnings.append(piece[1:])
        elif piece.isascii() and piece.isalpha() and piece.islower():
            endings.append(piece)
    return beginnings, endings


def _name(draw: random.Random, beginnings: Sequence[str], endings: Sequence[str]) -> str:
    pieces = draw.choices(endings, k=draw.randrange(_MOST_PIECES))
    return draw.choice(beginnings) + "".join(pieces)
