"""tritrun's chat history: what is sent, what is dropped, what is saved."""

import json
from pathlib import Path

import pytest

from tritcore.errors import TritError
from tritrun.conversation import Conversation
from tritrun.template import Message


def encode(messages: list[Message]) -> list[int]:
    """One token a character, and one for each message."""
    return [0] * sum(1 + len(message["content"]) for message in messages)


def chat(n_turns: int, system: str | None = None) -> Conversation:
    """Turns of ten tokens each."""
    conversation = Conversation(system)
    for _ in range(n_turns):
        conversation.ask("quest")
        conversation.reply("ans")
    return conversation


def test_everything_is_sent_while_it_fits() -> None:
    conversation = chat(3, "be good")
    conversation.ask("q")
    prompt, dropped = conversation.fit(encode, n_ctx=60, room=20)
    assert (len(prompt), dropped) == (8 + 30 + 2, 0)


def test_oldest_turns_go_in_pairs_and_the_system_prompt_stays() -> None:
    conversation = chat(9, "be good")
    conversation.ask("q")
    prompt, dropped = conversation.fit(encode, n_ctx=100, room=20)
    sent = conversation.sent(conversation.first)
    assert len(prompt) <= 60  # three quarters of what is left beside the answer
    assert dropped == 4
    assert [message["role"] for message in sent[:3]] == ["system", "user", "assistant"]
    assert sent[-1] == {"role": "user", "content": "q"}
    conversation.reply("a")
    assert len(conversation.messages) == 20  # what is not sent is still part of the chat


def test_after_dropping_the_next_turns_fit_as_they_are() -> None:
    conversation = chat(9)
    conversation.ask("q")
    conversation.fit(encode, 100, 20)
    conversation.reply("a")
    conversation.ask("another")
    _, dropped = conversation.fit(encode, 100, 20)
    assert dropped == 0


def test_one_question_too_long() -> None:
    conversation = chat(2, "be good")
    conversation.ask("x" * 100)
    with pytest.raises(TritError, match="takes 109 tokens, the context holds 100"):
        conversation.fit(encode, 100, 20)
    assert conversation.first == 0


def test_a_question_may_use_the_room_for_the_answer_but_not_all() -> None:
    conversation = chat(2)
    conversation.ask("x" * 90)
    prompt, dropped = conversation.fit(encode, 100, 20)
    assert (len(prompt), dropped) == (91, 2)


def test_an_empty_answer_takes_the_question_back() -> None:
    conversation = chat(1)
    conversation.ask("q")
    conversation.reply("")
    assert conversation == chat(1)


def test_reset_keeps_the_system_prompt() -> None:
    conversation = chat(3, "be good")
    conversation.reset()
    assert conversation == Conversation("be good")


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = chat(2, "sei höflich 🙂")
    conversation.save(path)
    assert Conversation.load(path) == conversation
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_save_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(TritError, match=r"cannot write .*No such file or directory"):
        chat(1).save(tmp_path / "missing" / "chat.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TritError, match="cannot write"):
        chat(1).save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def saved(**changes: object) -> str:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return json.dumps({"format": "tritrun-chat", "version": 1, "system": None, "messages": messages} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a chat of tritrun"),
        ("[" * 100_000, "not a chat of tritrun"),
        ("[]", "its format is not 'tritrun-chat'"),
        (saved(format="other"), "its format is not 'tritrun-chat'"),
        (saved(version=2), "chat version 2 is not known, only 1"),
        (saved(system=5), "system prompt is not text"),
        (saved(messages={}), "not questions and answers in pairs"),
        (saved(messages=[{"role": "user", "content": "q"}]), "not questions and answers in pairs"),
        (saved(messages=[{"role": "assistant", "content": "q"}] * 2), "message 1 has not the role 'user'"),
        (saved(messages=[{"role": "user", "content": 1}] * 2), "message 1 has no text"),
        (saved(messages=[1, 2]), "message 1 has not the role 'user'"),
    ],
)
def test_load_checks_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(TritError, match=message):
        Conversation.load(path)


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(TritError, match="No such file or directory"):
        Conversation.load(tmp_path / "chat.json")


def test_load_refuses_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TritError, match="not a chat of tritrun"):
        Conversation.load(path)
