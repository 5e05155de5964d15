"""Repositories of models on the Hugging Face hub: the form of their names, and what their cards must say."""

import re

_WORD = r"[A-Za-z0-9_][\w.-]{0,95}"
REPO_ID = rf"{_WORD}/{_WORD}"
"""A regular expression for ids such as org/name, to be used with `re.ASCII`."""

CARD_KEYS = ("license", "base_model")
"""What the YAML header of a card must have before it is published."""


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of the id of a repository."""
    return re.fullmatch(REPO_ID, text, re.ASCII) is not None
