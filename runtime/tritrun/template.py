"""A model's chat template: a Jinja program from the model file, which is not trusted, and whose habits are found out.

Templates differ in what they take: contents as text or as lists of parts, system prompts or none, earlier answers. So a
template is tried with marked messages first; what shows the marks is what it takes.
"""

import datetime
import itertools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tritcore.errors import TritError, first_line
from tritrun.limits import limited_memory, limited_time

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a chat."""

    role: Role
    content: str


_LONGEST = 1 << 18  # characters; real ones have up to 30,000
_SECONDS = 2.0  # for one rendering, which usually takes milliseconds
_BYTES = 1 << 28
_MAX_REPEATED = 1 << 24  # elements that `text * n` may make
_MAX_BITS = 4096  # of a number that a template computes

# How templates are told that there are no tools: as transformers does, or as llama.cpp.
_NOTHING: tuple[dict[str, object], ...] = ({"tools": None, "documents": None}, {})

_Form = Callable[[str], object]


def _as_text(content: str) -> object:
    return content


def _as_parts(content: str) -> object:
    return [{"type": "text", "text": content}]


_FORMS: tuple[_Form, ...] = (_as_text, _as_parts)


class BadTemplateError(TritError):
    """A template that cannot be used, or not for this chat; the message says why."""


class _EndlessError(BadTemplateError):
    """A template that takes too long: it is not tried again."""


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt. `typed`: somebody or the model wrote it, so it is text whatever it looks like."""

    text: str
    typed: bool


@dataclass(frozen=True)
class Prompt:
    """A chat as the model reads it.

    Attributes:
        text: as a whole.
        pieces: the same in pieces; where a template changes what was written, they may differ from `text` in that.
    """

    text: str
    pieces: tuple[Piece, ...]

    @property
    def opening(self) -> str:
        """What stands after the last message: the beginning of the answer."""
        pieces = itertools.takewhile(lambda piece: not piece.typed, reversed(self.pieces))
        return "".join(piece.text for piece in reversed(tuple(pieces)))


class ChatTemplate:
    """A template that is compiled, and whose habits are known.

    Attributes:
        takes_system: False if it has no place for a system prompt: then that goes before the first question.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile and try a template.

        Args:
            special_tokens: what templates call `bos_token` and `eos_token`.

        Raises:
            BadTemplateError: it is not Jinja, it fails, or it leaves out what the user says.
        """
        if len(source) > _LONGEST:
            raise BadTemplateError(f"it has {len(source)} characters")
        self._variables: dict[str, object] = dict(special_tokens)
        self._forms: dict[Role, _Form] = dict.fromkeys(("system", "user", "assistant"), _as_text)
        self._needs_system = False
        self.takes_system = False
        try:
            with limited_memory(_BYTES):
                self._program = _environment().from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, TimeoutError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            raise BadTemplateError(f"line {line}: {first_line(error)}" if line else first_line(error)) from error
        self._find_forms()

    def render(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for the next answer.

        Raises:
            BadTemplateError: the template refuses the messages, or runs too long.
        """
        messages = self._arranged(messages)
        marks = {_mark(): message["content"].strip() for message in messages}
        marked: list[Message] = [
            {"role": message["role"], "content": message["content"].replace(core, mark, 1) if core else ""}
            for message, (mark, core) in zip(messages, marks.items(), strict=True)
        ]
        return Prompt(self._run(messages), tuple(_cut(self._run(marked), marks)))

    def _arranged(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: with or without one of the system."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        rest = [message for message in messages if message["role"] != "system"]
        if (system or self._needs_system) and self.takes_system:
            return [{"role": "system", "content": "".join(system)}, *rest]
        if system and system[0].strip() and rest:
            return [{"role": rest[0]["role"], "content": f"{system[0]}\n\n{rest[0]['content']}"}, *rest[1:]]
        return rest

    def _find_forms(self) -> None:
        """Find out which form each role's contents must have.

        Raises:
            BadTemplateError: no form shows what the user says.
        """
        problems = []
        variables = self._variables
        for nothing, self._needs_system, form in itertools.product(_NOTHING, (False, True), _FORMS):
            self._variables = variables | nothing
            self._forms = dict.fromkeys(self._forms, form)
            problem = self._problem(["system", "user"] if self._needs_system else ["user"], "user")
            if problem is None:
                break
            problems.append(problem)
        else:
            raise BadTemplateError(problems[0])
        start: list[Role] = ["system", "user"]
        self.takes_system = self._finds("system", start) or self._needs_system
        if not self._needs_system:
            start = ["user"]
        self._finds("assistant", [*start, "assistant", "user"])

    def _finds(self, role: Role, roles: list[Role]) -> bool:
        """Try the forms for `role` until the template shows it in a chat of `roles`."""
        for self._forms[role] in _FORMS:
            if self._problem(roles, role) is None:
                return True
        self._forms[role] = self._forms["user"]
        return False

    def _problem(self, roles: Sequence[Role], shown: Role) -> str | None:
        """Why a chat of `roles` does not show the contents of the role `shown`; None if it does."""
        messages: list[Message] = [{"role": role, "content": _mark()} for role in roles]
        try:
            text = self._run(messages)
        except _EndlessError:
            raise
        except BadTemplateError as error:
            return str(error)
        missing = any(m["role"] in (shown, "user") and m["content"] not in text for m in messages)
        return f"it leaves out the {shown}'s message" if missing else None

    def _run(self, messages: Sequence[Message]) -> str:
        formed = [{"role": m["role"], "content": self._forms[m["role"]](m["content"])} for m in messages]

        def raise_exception(message: object) -> None:
            raise BadTemplateError(first_line(TritError(message)))

        try:
            with limited_memory(_BYTES), limited_time(_SECONDS):
                return self._program.render(
                    **self._variables,
                    messages=formed,
                    add_generation_prompt=True,
                    raise_exception=raise_exception,
                    strftime_now=lambda form: datetime.datetime.now().strftime(form),
                )
        except BadTemplateError:
            raise
        except TimeoutError as error:
            raise _EndlessError(first_line(error)) from error
        except Exception as error:  # it may raise anything
            raise BadTemplateError(first_line(error)) from error


def plain_prompt(messages: Sequence[Message]) -> Prompt:
    """The chat as labelled lines, for a model without a template that can be used."""
    pieces: list[Piece] = []
    for message in messages:
        if content := message["content"].strip():
            if message["role"] != "system":
                pieces.append(Piece(f"{message['role'].capitalize()}: ", typed=False))
            pieces += [Piece(content, typed=True), Piece("\n", typed=False)]
    pieces.append(Piece("Assistant:", typed=False))
    return Prompt("".join(piece.text for piece in pieces), tuple(pieces))


def _mark() -> str:
    """A text that no chat has. Digits, as templates may change the case of letters."""
    return str(secrets.randbelow(10**24) + 10**24)


def _cut(text: str, marks: Mapping[str, str]) -> Iterator[Piece]:
    """`text` in pieces, with the contents in the places of their marks."""
    while text:
        found = [(text.find(mark), mark) for mark in marks if mark in text]
        at, mark = min(found, default=(len(text), ""))
        if at:
            yield Piece(text[:at], typed=False)
        if mark:
            yield Piece(marks[mark], typed=True)
        text = text[at + len(mark) :]


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """No access to Python's insides, no change to the messages, and no single step that takes for ever."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise ValueError("it computes numbers that are too large")
        elif operator == "*":
            times, whole = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(whole, "__len__") and len(whole) * times > _MAX_REPEATED:
                raise ValueError("it makes texts that are too long")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    """As the transformers library runs chat templates, which is what they are written for."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
