"""Chats with models that reason: what is shown where, and what goes back into the history."""

from collections.abc import Iterator, Sequence
from typing import cast

import pytest
from rich.console import Console

from tritrun.chat import Chat, ChatOptions
from tritrun.engine import Answer, Encoded, Engine
from tritrun.sampling import GREEDY, Sampling
from tritrun.template import BadTemplateError, ChatTemplate, Message

HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' and '<|channel|>' in m.content %}"
    "{{ raise_exception('channels in an answer') }}{% endif %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}<|start|>assistant"
)
THINK = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant><think>\n"
ANSWERS = {
    HARMONY: "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>final<|message|>So\nit is.",
    THINK: "They ask.\n</think>\n\nSo\nit is.",
}


class FakeEngine:
    """A model that gives the same answer to everything, a letter a token, and remembers what it was asked."""

    has_chat_template = True
    n_ctx = 4096

    def __init__(self, template: str, answer: str) -> None:
        self.asked: list[str] = []
        self._template = ChatTemplate(template, {})
        self._answer = answer

    def encode(self, messages: Sequence[Message]) -> Encoded:
        prompt = self._template.render(messages)
        self.asked.append(prompt.text)
        return Encoded([0] * len(prompt.text), prompt.opening)

    def answer(self, prompt: Encoded, sampling: Sampling, max_tokens: int = 0, stops: Sequence[str] = ()) -> Answer:
        return Answer(cast(Engine, self), prompt, sampling, max_tokens, stops)

    def tokens(self, prompt: Encoded, sampling: Sampling) -> Iterator[int]:
        yield from map(ord, self._answer)
        yield 0

    def ends_answer(self, token: int) -> bool:
        return token == 0

    def piece(self, token: int) -> bytes:
        return chr(token).encode()


def chat(engine: FakeEngine, max_tokens: int = 0) -> Chat:
    return Chat(cast(Engine, engine), ChatOptions(GREEDY, 1, max_tokens))


@pytest.mark.parametrize("template", ANSWERS, ids=["harmony", "think"])
def test_reasoning_is_left_out_of_a_pipe_and_of_the_history(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(template, ANSWERS[template])
    session = chat(engine)
    for question in ("why?", "and now?"):
        session.answer_once(question)
        assert capsys.readouterr() == ("So\nit is.\n", "")
    assert "They ask" not in engine.asked[-1]
    assert "So\nit is." in engine.asked[-1]


@pytest.mark.parametrize("template", ANSWERS, ids=["harmony", "think"])
def test_reasoning_is_dim_on_a_terminal(
    template: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tritrun.chat.err", Console(stderr=True, force_terminal=True, color_system="standard", highlight=False)
    )
    chat(FakeEngine(template, ANSWERS[template].replace("They", "[b]\x1b[2J"))).answer_once("why?")
    out, err = capsys.readouterr()
    assert out == "So\nit is.\n"
    assert "\x1b[2J" not in err
    assert err.startswith("\x1b[2m[")
    shown = "".join(err.split("\x1b[2m")).replace("\x1b[0m", "")
    assert shown.startswith("[b][2J ask.\n")


@pytest.mark.parametrize("template", ANSWERS, ids=["harmony", "think"])
def test_an_answer_that_ends_within_the_reasoning(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(template, ANSWERS[template])
    session = chat(engine, max_tokens=ANSWERS[template].index(" ask"))
    session.answer_once("why?")
    out, err = capsys.readouterr()
    assert out == "\n"
    assert err == "the model only reasoned and gave no answer; ended by --max-tokens\n"
    session.answer_once("and now?")
    assert "why?" not in engine.asked[-1]  # no question without an answer


def test_the_template_of_gpt_oss_refuses_what_a_careless_history_holds() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": ANSWERS[HARMONY]},
        {"role": "user", "content": "q"},
    ]
    with pytest.raises(BadTemplateError, match="channels in an answer"):
        ChatTemplate(HARMONY, {}).render(messages)
