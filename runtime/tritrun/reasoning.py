"""Tell a model's reasoning from its answer, while the text comes piece by piece.

Models that reason mark it, each family in its own way: with a pair of tags before the answer, or with channels as
gpt-oss has them. The tags may be control tokens or plain text, and the prompt may have opened the first one already.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["reasoning", "answer"]
Part = tuple[Kind, str]


@dataclass(frozen=True)
class _Tags:
    """What begins the reasoning, what ends it, and what may stand around the answer after it."""

    begin: str
    end: str
    around: tuple[str, ...] = ()


_TAGS = (
    _Tags("<think>", "</think>", ("<answer>", "</answer>", "<response>", "</response>")),
    _Tags("<thinking>", "</thinking>", ("<output>", "</output>")),
    _Tags("<thought>", "</thought>"),
    _Tags("<reasoning>", "</reasoning>"),
    _Tags("<seed:think>", "</seed:think>"),
    _Tags("<mm:think>", "</mm:think>"),
    _Tags("<think:opensource>", "</think:opensource>"),
    _Tags("[THINK]", "[/THINK]"),
    _Tags("◁think▷", "◁/think▷"),
    _Tags("<|channel>", "<channel|>"),
    _Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    _Tags("<|begin_of_thought|>", "<|end_of_thought|>", ("<|begin_of_solution|>", "<|end_of_solution|>")),
    _Tags("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    _Tags("<|think|>", "<|content|>", ("<|end|>",)),
    _Tags("<|open|>think<|sep|>", "<|close|>think<|sep|>", ("<|open|>response<|sep|>", "<|close|>response<|sep|>")),
    _Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", ("[END FINAL RESPONSE]",)),
    _Tags("Here is my thought process:", "Here is my response:"),
)

# gpt-oss: <|channel|>analysis<|message|>..<|end|><|start|>assistant<|channel|>final<|message|>..<|return|>
_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_HEADS = (_CHANNEL, _MESSAGE, _START)
_ENDS = (_START, _CHANNEL, "<|end|>", "<|return|>", "<|call|>")
_ANSWERING = ("", "final")  # channels
_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w*)")

_BEGINS = (*(tags.begin for tags in _TAGS), *_HEADS)
_MARKS = frozenset({*_BEGINS, *_ENDS, *(mark for tags in _TAGS for mark in (tags.end, *tags.around))})


def is_in_mark(token: str) -> bool:
    """Whether a control token must be read as text, or the parts of an answer could not be told apart."""
    return bool(token) and any(token in mark for mark in _MARKS)


def split(pieces: Iterable[str], opening: str = "") -> Iterator[Part]:
    """Cut the pieces of an answer into reasoning and what is said.

    Args:
        opening: the end of the prompt, in which the template may have begun the reasoning.

    Yields:
        Parts in their order, without the marks; never empty.
    """
    reader = _Reader(opening)
    for piece in pieces:
        yield from _joined(reader.feed(piece))
    yield from _joined(reader.finish())


class _Reader:
    """Reads the text after `opening`. What may be the beginning of a mark is held back until that is known."""

    def __init__(self, opening: str) -> None:
        self._held = ""
        self._state: Literal["begin", "head", "reasoning", "after", "answer"] = "begin"
        self._tags: _Tags | None = None
        self._channel: str | None = None  # None: not a model with channels
        place, mark = max((opening.rfind(mark), mark) for mark in _BEGINS)
        if place < 0:
            return
        if mark in _HEADS:
            self._state = "head"
            self._held = opening[place:]
            tuple(self.feed(""))
            return
        tags = next(tags for tags in _TAGS if tags.begin == mark)
        if tags.end not in opening[place:]:
            self._state, self._tags = "reasoning", tags

    def feed(self, piece: str) -> Iterator[Part]:
        """Take more text; parts that are sure."""
        self._held += piece
        while True:
            before = self._state, self._held
            step = {
                "begin": self._in_begin,
                "head": self._in_head,
                "reasoning": self._in_reasoning,
                "after": self._after_reasoning,
                "answer": self._in_answer,
            }[self._state]
            yield from step()
            if (self._state, self._held) == before:
                return

    def finish(self) -> Iterator[Part]:
        """What is left at the end, which is no mark."""
        if self._state == "reasoning":
            yield "reasoning", self._held
        elif self._state != "head":
            yield "answer", self._held
        self._held = ""

    def _in_begin(self) -> Iterator[Part]:
        """Nothing but white space so far: the answer may begin with a mark."""
        text = self._held.lstrip()
        mark = next((mark for mark in _BEGINS if text.startswith(mark)), None)
        if mark in _HEADS:
            self._state, self._held = "head", text
        elif mark is not None:
            self._tags = next(tags for tags in _TAGS if tags.begin == mark)
            self._state, self._held = "reasoning", text[len(mark) :]
        elif not any(mark.startswith(text) for mark in _BEGINS):
            self._state = "answer"
        yield from ()

    def _in_head(self) -> Iterator[Part]:
        """Between messages of a model with channels: what is written here names the next one."""
        head, found, rest = self._held.partition(_MESSAGE)
        if found:
            name = _NAME.search(head)
            self._channel = name[1] if name else ""
            self._state = "answer" if self._channel in _ANSWERING else "reasoning"
            self._held = rest
        yield from ()

    def _in_reasoning(self) -> Iterator[Part]:
        ends = _ENDS if self._tags is None else (self._tags.end,)
        text, end = self._up_to(ends)
        yield "reasoning", text
        if end:
            self._state = "head" if self._tags is None else "after"
            self._held = end + self._held if self._tags is None else self._held

    def _after_reasoning(self) -> Iterator[Part]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = "answer"
        yield from ()

    def _in_answer(self) -> Iterator[Part]:
        marks = _ENDS if self._channel is not None else self._tags.around if self._tags else ()
        text, mark = self._up_to(marks)
        yield "answer", text
        if mark and self._channel is not None:
            self._state, self._held = "head", mark + self._held

    def _up_to(self, marks: tuple[str, ...]) -> tuple[str, str]:
        """Take the held text up to the first of `marks`, and that too; as much as is sure if there is none."""
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        at, mark = min(found, default=(len(self._held) - _unsure(self._held, marks), ""))
        text, self._held = self._held[:at], self._held[at + len(mark) :]
        return text, mark


def _unsure(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    lengths = range(min(len(text), max(map(len, marks), default=0)), 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Parts that follow each other put together, empty ones left out."""
    kind: Kind = "answer"
    text = ""
    for next_kind, more in parts:
        if more and next_kind != kind:
            if text:
                yield kind, text
            kind, text = next_kind, ""
        text += more
    if text:
        yield kind, text
