"""What answers look like: sampling, stops, grammars, adapters, types of the cache, and a model that guesses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import SMOLLM2_GGUF
from gguf import GGMLQuantizationType
from tiny_gguf import write_tiny_adapter, write_tiny_model

from tritcore.errors import TritError, UsageError
from tritcore.gguf_header import read_model_file
from tritrun.engine import Engine
from tritrun.grammar import grammar_of_schema
from tritrun.llama import Adapter
from tritrun.loading import Loading
from tritrun.memory import kv_cache_bytes
from tritrun.sampling import GREEDY, Sampling
from tritrun.template import Message

pytestmark = pytest.mark.build

DEFAULT = Loading(512)
HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def answer(
    model: Path,
    sampling: Sampling = GREEDY,
    loading: Loading = DEFAULT,
    max_tokens: int = 40,
    stops: tuple[str, ...] = (),
) -> str:
    with Engine(read_model_file(model), loading) as engine:
        return "".join(engine.answer(engine.encode(HELLO), sampling, max_tokens, stops))


def tritrun(*arguments: object, exit_code: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tritrun", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == exit_code, done.stderr
    return done


def test_one_token_to_draw_from_is_the_likeliest(tiny_model: Path) -> None:
    greedy = answer(tiny_model)
    assert answer(tiny_model, Sampling(2.0, top_k=1, seed=3)) == greedy
    assert answer(tiny_model, Sampling(2.0, top_k=0, top_p=1, min_p=1, seed=3)) == greedy
    assert answer(tiny_model, Sampling(2.0, top_k=0, top_p=1, min_p=0, seed=3)) != greedy


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0, repeat_penalty=50), Sampling(0, presence_penalty=50), Sampling(0, frequency_penalty=50)],
    ids=["repeat", "presence", "frequency"],
)
def test_penalties_keep_a_model_from_repeating_itself(tiny_model: Path, sampling: Sampling) -> None:
    assert len(set(answer(tiny_model, sampling))) > len(set(answer(tiny_model))) + 5


def test_an_answer_ends_before_a_stop(tiny_model: Path) -> None:
    whole = answer(tiny_model)
    assert answer(tiny_model, stops=("@" * 50,)) == whole
    stops = (whole[10:12], whole[20:22])
    assert answer(tiny_model, stops=stops) == whole[: min(whole.index(stop) for stop in stops)]


def test_an_answer_obeys_a_grammar(tiny_model: Path) -> None:
    text = answer(tiny_model, Sampling(0, grammar='root ::= [a-c]{3} "-" [0-9]{2}'))
    assert len(text) == 6
    assert set(text[:3]) <= set("abc")
    assert text[3] == "-"
    assert text[4:].isdecimal()


def test_an_answer_obeys_a_schema(tiny_model: Path) -> None:
    properties = {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["name", "age"]}
    text = answer(tiny_model, Sampling(0, grammar=grammar_of_schema(json.dumps(schema))), max_tokens=200)
    found = json.loads(text)
    assert found.keys() == properties.keys()
    assert 0 <= found["age"] <= 99


def test_what_is_no_grammar_and_no_schema(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TritError, match="not valid GBNF"):
        answer(tiny_model, Sampling(0, grammar="root ::= ("))
    with pytest.raises(UsageError, match="JSON schema cannot be used"):
        grammar_of_schema('{"type": ')
    with pytest.raises(UsageError, match="JSON schema cannot be used"):
        grammar_of_schema('{"type": "no such type"}')
    with pytest.raises(TritError, match="cannot be read"):
        grammar_of_schema(str(tmp_path / "none.json"))


def test_types_of_the_cache(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", hidden=256)  # heads of 64, as a block is 32 long
    default = answer(model, max_tokens=12)
    assert answer(model, loading=Loading(512, kv_type=GGMLQuantizationType.F32), max_tokens=12) == default
    rough = answer(model, loading=Loading(512, kv_type=GGMLQuantizationType.Q8_0), max_tokens=12)
    assert len(rough) == 12
    file = read_model_file(model)
    assert kv_cache_bytes(file, 64, GGMLQuantizationType.Q8_0) / kv_cache_bytes(file, 64) == 34 / 64


def test_a_cache_whose_heads_are_no_blocks(tiny_model: Path) -> None:
    done = tritrun("chat", tiny_model, "-p", "x", "--kv-type", "q8_0", exit_code=1)
    assert done.stderr.startswith(f"error: {tiny_model}: llama.cpp cannot load it: ")
    assert done.stderr.count("\n") == 1


def test_adapters_change_the_answer_by_their_scale(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "lora=1.gguf", scale=0.5)
    default = answer(tiny_model)
    assert answer(tiny_model, loading=Loading(512, adapters=(Adapter(adapter, 0.0),))) == default
    changed = answer(tiny_model, loading=Loading(512, adapters=(Adapter(adapter),)))
    assert changed != default
    options = ("--temp", 0, "--max-tokens", 40)
    assert tritrun("chat", tiny_model, "-p", "hello", "--lora", f"{adapter}=1", *options).stdout == changed + "\n"
    assert tritrun("chat", tiny_model, "-p", "hello", "--lora", f"{adapter}=0", *options).stdout == default + "\n"


def test_what_is_no_adapter_for_a_model(tiny_model: Path, tmp_path: Path) -> None:
    def refused(path: Path, exit_code: int = 1) -> str:
        return tritrun("chat", tiny_model, "-p", "x", "--lora", path, exit_code=exit_code).stderr

    assert "is no LoRA adapter" in refused(tiny_model)
    assert "another architecture: qwen2" in refused(write_tiny_adapter(tmp_path / "a.gguf", architecture="qwen2"))
    assert "cannot add it to this model" in refused(write_tiny_adapter(tmp_path / "b.gguf", hidden=128))
    assert "not of the form" in refused(Path("=2"), exit_code=2)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=5)], ids=["greedy", "drawn"])
def test_a_model_that_guesses_changes_nothing(
    tiny_model: Path, tmp_path: Path, noise: float, sampling: Sampling
) -> None:
    draft = read_model_file(write_tiny_model(tmp_path / "draft.gguf", noise=noise))
    assert answer(tiny_model, sampling, Loading(64, draft=draft)) == answer(tiny_model, sampling, Loading(64))


def test_guesses_in_a_chat_of_several_turns(tiny_model: Path, tmp_path: Path) -> None:
    draft = write_tiny_model(tmp_path / "draft.gguf", noise=0.2)
    options = ("--temp", 0, "--max-tokens", 20, "--ctx", 96)
    command = [sys.executable, "-m", "tritrun", "chat", str(tiny_model), *map(str, options)]

    def said(*more: str) -> str:
        turns = "hello\nand you?\nonce more\n"
        return subprocess.run([*command, *more], input=turns, capture_output=True, text=True, check=True).stdout

    assert said("--draft", str(draft)) == said()


def test_a_model_of_another_family_cannot_guess(tiny_model: Path) -> None:
    done = tritrun("chat", tiny_model, "-p", "x", "--draft", SMOLLM2_GGUF, exit_code=1)
    assert "their vocabularies differ" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--grammar", "a", "--json-schema", "{}"),
        ("--stop", ""),
        ("--kv-type", "q9_9"),
        ("--repeat-penalty", "0"),
        ("--json-schema", "{"),
    ],
)
def test_misuse(tiny_model: Path, arguments: tuple[str, ...]) -> None:
    done = tritrun("chat", tiny_model, "-p", "x", *arguments, exit_code=2)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
