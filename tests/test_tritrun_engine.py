"""tritrun's engine on a tiny model: prompts, templates, streaming."""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import TRAINED_CONTEXT, write_tiny_model

from tritconv.errors import TritError
from tritconv.model_file import read_model_file
from tritrun.engine import Engine, Message, Sampling, until

BOS = 1
GREEDY = Sampling(temperature=0, top_p=1, seed=1)
HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def load(path: Path, n_ctx: int | None = 512) -> Engine:
    return Engine(read_model_file(path), n_ctx=n_ctx, threads=1)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with load(tiny_model) as loaded:
        yield loaded


@given(before=st.text("\nUser:x"), after=st.text("\nUser:x"), cuts=st.lists(st.integers(0, 40)))
def test_until_finds_the_stop_wherever_it_is_cut(before: str, after: str, cuts: list[int]) -> None:
    text = before + "\nUser:" + after
    marks = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(marks)]
    assert "".join(until("\nUser:", pieces)) == text.partition("\nUser:")[0]


@given(pieces=st.lists(st.text("\nUse!")))
def test_until_passes_on_all_text_without_the_stop(pieces: list[str]) -> None:
    assert "".join(until("\nUser:", pieces)) == "".join(pieces)


def text_of(engine: Engine, tokens: list[int]) -> str:
    return b"".join(map(engine.piece, tokens)).decode()


def test_template_renders_with_one_bos(engine: Engine) -> None:
    prompt = engine.encode([{"role": "system", "content": "be good"}, *HELLO])
    assert prompt[0] == BOS
    assert BOS not in prompt[1:]
    assert text_of(engine, prompt) == "<system>be good\n<user>hello\n<assistant>"


def test_bos_is_added_if_the_template_forgets_it(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template="{{ messages[0].content }}")) as engine:
        prompt = engine.encode(HELLO)
        assert prompt[0] == BOS
        assert text_of(engine, prompt) == "hello"


def test_plain_lines_without_a_template(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=None)) as engine:
        assert not engine.has_chat_template
        prompt = engine.encode([{"role": "system", "content": "be good "}, *HELLO])
        assert prompt[0] == BOS
        assert text_of(engine, prompt) == "be good\nUser: hello\nAssistant:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses this chat: no system role"),
        ("{{ messages[7].content.upper() }}", "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", "refuses this chat"),  # the sandbox
    ],
)
def test_template_errors(tmp_path: Path, template: str, message: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=template)
    with load(path) as engine, pytest.raises(TritError, match=message):
        engine.encode(HELLO)


def test_template_that_does_not_parse(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template="{% for %}")
    with pytest.raises(TritError, match=r"m\.gguf: llama\.cpp cannot load it: "):
        load(path)


def test_answers_repeat_and_count(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    first = engine.answer(prompt, GREEDY, max_tokens=20)
    again = engine.answer(prompt, GREEDY, max_tokens=20)
    text = "".join(first)
    assert text
    assert text == "".join(again)
    assert (first.prompt_tokens, first.answer_tokens, first.finish) == (len(prompt), 20, "max-tokens")
    assert first.prompt_seconds > 0
    assert first.tokens_per_second > 0


def test_seed_decides(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    texts = ["".join(engine.answer(prompt, Sampling(1.5, 1.0, seed), 30)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_answer_ends_with_the_context(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    answer = engine.answer(prompt, GREEDY)
    assert "".join(answer)
    assert answer.finish == "context"
    assert len(prompt) + answer.answer_tokens == engine.n_ctx


def test_next_turn_reads_only_what_is_new(engine: Engine) -> None:
    long: list[Message] = [{"role": "user", "content": "x" * 300}]
    answer = engine.answer(engine.encode(long), GREEDY, 10)
    reply = "".join(answer)
    turn: list[Message] = [
        *long,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "go on"},
    ]
    read: list[int] = []
    evaluate = engine._llama.eval

    def spy(tokens: list[int]) -> None:
        read.append(len(tokens))
        evaluate(tokens)

    engine._llama.eval = spy
    try:
        assert next(iter(engine.answer(engine.encode(turn), GREEDY, 10)))
    finally:
        engine._llama.eval = evaluate
    assert read[0] < 100 < len(engine.encode(turn))


def test_an_answer_left_early_does_not_disturb_the_next(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    expected = "".join(engine.answer(prompt, GREEDY, 20))
    left = engine.answer(engine.encode([{"role": "user", "content": "else"}]), GREEDY, 20)
    assert list(islice(left, 3))
    assert "".join(engine.answer(prompt, GREEDY, 20)) == expected


@pytest.mark.parametrize(("asked", "context"), [(None, 4096), (0, TRAINED_CONTEXT), (100, 100)])
def test_context_length(tiny_model: Path, asked: int | None, context: int) -> None:
    with load(tiny_model, n_ctx=asked) as engine:
        assert engine.n_ctx == context


def test_context_that_is_no_multiple_of_256_can_be_filled(tiny_model: Path) -> None:
    with load(tiny_model, n_ctx=100) as engine:
        prompt = engine.encode(HELLO)
        answer = engine.answer(prompt, GREEDY)
        assert len("".join(answer)) == 100 - len(prompt)


def test_llama_cpp_says_why_it_refuses(tmp_path: Path, tiny_model: Path) -> None:
    # A sound file to our reader, but not a model: the architecture is one that llama.cpp does not know.
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_model.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lxama", 1))
    with pytest.raises(TritError, match=r"llama\.cpp cannot load it: .*unknown model architecture: 'lxama'"):
        load(path)
