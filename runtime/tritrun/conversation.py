"""The history of a chat: what was said, what still fits into the context, and the file it is saved in."""

import json
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tritcore.errors import TritError
from tritcore.files import write_text_atomically
from tritrun.template import Message, Role

_FILE_FORMAT = "tritrun-chat"
_FILE_VERSION = 1
_MAX_FILE_BYTES = 64 * 1024 * 1024

Encoded = TypeVar("Encoded", bound=Sized)


@dataclass
class Conversation:
    """User and assistant messages in turns, after an optional system prompt.

    Attributes:
        system: the system prompt; None leaves it to the model's chat template, which may have one of its own.
        messages: all turns since the start; the last one is the user's while its answer is awaited.
        first: index of the oldest message that is still sent to the model; always even.
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    first: int = 0

    def ask(self, text: str) -> None:
        """Append the user's message."""
        self.messages.append({"role": "user", "content": text})

    def reply(self, text: str) -> None:
        """Append the model's answer to it. An empty one takes the question back: templates trip over it."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages.clear()
        self.first = 0

    def sent(self, first: int) -> list[Message]:
        """What the model gets: the system prompt and the messages from index `first` on."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        return system + self.messages[first:]

    def fit(self, encode: Callable[[list[Message]], Encoded], n_ctx: int, room: int) -> tuple[Encoded, int]:
        """Drop the oldest turns until prompt and answer fit into the context.

        Once it has to drop, it makes a quarter more space than needed: every drop changes the beginning of
        the prompt, and the model must then read all of it again.

        Args:
            encode: gives the prompt for a list of messages; its length is in tokens.
            n_ctx: context in tokens.
            room: tokens to leave for the answer.

        Returns:
            The prompt and the number of turns dropped.

        Raises:
            TritError: the last question alone does not fit; nothing is dropped then.
        """
        limit, first = n_ctx - room, self.first
        prompt = encode(self.sent(first))
        if len(prompt) > limit:
            while len(prompt) > limit * 3 // 4 and first < len(self.messages) - 1:
                first += 2
                prompt = encode(self.sent(first))
        if len(prompt) >= n_ctx:
            raise TritError(
                f"the message is too long: with the system prompt it takes {len(prompt)} tokens, the context "
                f"holds {n_ctx}; shorten it or raise --ctx"
            )
        dropped, self.first = (first - self.first) // 2, first
        return prompt, dropped

    def save(self, path: Path) -> None:
        """Write the chat to `path` as JSON.

        Raises:
            TritError: the file cannot be written.
        """
        chat = {"format": _FILE_FORMAT, "version": _FILE_VERSION} | {
            "system": self.system,
            "messages": self.messages,
        }
        write_text_atomically(path, json.dumps(chat, ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a chat that `save` wrote.

        Raises:
            TritError: there is no such file, or it is not such a chat.
        """
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise TritError(f"{path}: larger than any chat of tritrun")
            chat = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TritError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise TritError(f"{path}: not a chat of tritrun: {error}") from error
        if not isinstance(chat, dict) or chat.get("format") != _FILE_FORMAT:
            raise TritError(f"{path}: not a chat of tritrun (its format is not '{_FILE_FORMAT}')")
        if chat.get("version") != _FILE_VERSION:
            raise TritError(f"{path}: chat version {chat.get('version')} is not known, only {_FILE_VERSION}")
        system = chat.get("system")
        if not isinstance(system, str | None):
            raise TritError(f"{path}: its system prompt is not text")
        return cls(system, _checked_turns(path, chat.get("messages")))


def _checked_turns(path: Path, messages: object) -> list[Message]:
    """`messages` as pairs of a user's and an assistant's message."""
    if not isinstance(messages, list) or len(messages) % 2:
        raise TritError(f"{path}: its messages are not questions and answers in pairs")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        role: Role = "assistant" if index % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise TritError(f"{path}: message {index + 1} has not the role '{role}'")
        if not isinstance(content := message.get("content"), str):
            raise TritError(f"{path}: message {index + 1} has no text")
        checked.append({"role": role, "content": content})
    return checked
