"""tritrun serve: the server as programs use it, by OpenAI's client, and what it refuses."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
from browser import Page, find_browser, open_browser
from checkpoints import ROOT
from started import started
from tiny_gguf import damaged, write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.build

KEY = "secret"
NO_SYSTEM = {"role": "system", "content": ""}  # with that of its template this small model rambles in French
QUESTION = {"role": "user", "content": "What is the capital of France?"}

# The model's own knows no tools.
WITH_TOOLS = ROOT / "build/src/vendor/llama.cpp/models/templates/Qwen-Qwen2.5-7B-Instruct.jinja"


SCREENSHOT = ROOT / "build" / "screenshots" / "serve.png"  # for people to look at


def shown(page: Page, until: Callable[[str], bool], seconds: float = 60) -> Iterator[str]:
    """What a page shows, again and again, until it is what was waited for."""
    for _ in range(int(10 * seconds)):
        yield (text := page.evaluate("document.body.innerText"))
        if until(text):
            return
        time.sleep(0.1)
    raise AssertionError(text)


def tritrun(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tritrun", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def serving(*arguments: object) -> "AbstractContextManager[tuple[str, subprocess.Popen[str]]]":
    """A server with these arguments, and its address."""
    return started([sys.executable, "-m", "tritrun", "serve", *arguments, "--port", "0"])


@pytest.fixture(scope="module")
def server(smollm2_trit3: Path) -> Iterator[str]:
    """It serves eight users."""
    with serving(smollm2_trit3, "--parallel", 8, "--ctx", 1024, "--api-key", KEY) as (url, _):
        yield url


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    request: Any = {"model": "any", "messages": [NO_SYSTEM, QUESTION], "temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(**request)


def test_an_answer_at_once_and_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    assert "Paris" in whole
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_completions_and_embeddings(client: openai.OpenAI) -> None:
    done = client.completions.create(model="any", prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in done.choices[0].text
    vectors = client.embeddings.create(model="any", input=["a cat", "a kitten", "the stock exchange"])
    cat, kitten, exchange = (one.embedding for one in vectors.data)
    assert len(cat) == 576

    def product(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert product(cat, kitten) > product(cat, exchange)


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "rivers": {"type": "integer"}},
        "required": ["city", "rivers"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    answer = json.loads(ask(client, response_format=wanted, max_tokens=100).choices[0].message.content)
    assert set(answer) == {"city", "rivers"}
    assert isinstance(answer["rivers"], int)


def test_a_tool_is_called(smollm2_trit3: Path) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    function = {"name": "weather", "description": "The weather of a city", "parameters": parameters}
    chat: list[dict[str, Any]] = []
    for city in ("Rome", "Oslo", "Madrid"):  # without examples this small model would only talk
        call = {"name": "weather", "arguments": json.dumps({"city": city})}
        chat += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "tool_calls": [{"id": city, "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": city, "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    chat.append({"role": "user", "content": "What is the weather in Paris?"})
    with (
        serving(smollm2_trit3, "--", "--chat-template-file", WITH_TOOLS) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = ask(client, messages=chat, tools=[{"type": "function", "function": function}], max_tokens=100).choices[
            0
        ]
    (called,) = answer.message.tool_calls
    assert (answer.finish_reason, called.function.name) == ("tool_calls", "weather")
    assert json.loads(called.function.arguments) == {"city": "Paris"}


def test_eight_clients_at_once(client: openai.OpenAI) -> None:
    alone = ask(client).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client).choices[0].message.content, range(8)))
    assert all("Paris" in answer for answer in answers), (alone, answers)


def test_a_client_that_hangs_up_leaves_its_place(client: openai.OpenAI, server: str) -> None:
    for _ in range(16):  # more than there are places
        stream = ask(client, stream=True, max_tokens=900)
        next(iter(stream))
        stream.close()
    assert "Paris" in ask(client).choices[0].message.content


def test_a_client_without_the_key(server: str) -> None:
    with (
        openai.OpenAI(base_url=f"{server}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        ask(client)


def test_a_question_longer_than_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, messages=[{"role": "user", "content": "word " * 2000}])
    assert "Paris" in ask(client).choices[0].message.content


@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm, so the build has no web page")
def test_a_chat_in_the_browser(smollm2_trit3: Path) -> None:
    """The page is upstream's, so this looks only for what any page of a chat has."""
    with (
        serving(smollm2_trit3, "--ctx", 1024, "--", "--predict", 48) as (url, process),
        open_browser(str(find_browser()), online=True) as page,
    ):
        page.open(url, 1000)
        list(shown(page, until=lambda _: page.evaluate("document.querySelector('textarea') !== null")))
        page.evaluate("document.querySelector('textarea').focus()")
        question = "What is the capital of France?"
        page.write(question)
        page.press("Enter")
        texts = list(shown(page, until=lambda text: question in text and "t/s" in text and "Stop" not in text))
        SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(SCREENSHOT)
        assert len({text.partition(question)[2] for text in texts}) > 5  # the answer, as it grows
        own = [address for address in page.requests if not address.startswith(("data:", "blob:"))]
        assert all(address.startswith(f"{url}/") for address in own), own
        process.send_signal(signal.SIGINT)
        assert "no web page" not in process.communicate(timeout=30)[1]


def test_ctrl_c_ends_it(tiny_model: Path) -> None:
    with serving(tiny_model) as (url, process):
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0
        assert stderr.endswith("Ctrl-C ends it\nthe server has ended\n")
        with pytest.raises(OSError, match=r"refused|reset"):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)


def test_the_server_ends_with_a_killed_tritrun(tiny_model: Path) -> None:
    with serving(tiny_model) as (url, process):
        process.kill()
        process.wait()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(100):
            try:
                socket.create_connection(address, timeout=0.1).close()
            except OSError:
                return
            time.sleep(0.1)
        raise AssertionError("it still answers")


def test_options_of_llama_server(tiny_model: Path) -> None:
    with (
        serving(tiny_model, "--verbose", "--", "--alias", "mine") as (url, process),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        assert [model.id for model in client.models.list()] == ["mine"]
        process.send_signal(signal.SIGINT)
        assert "listening on" in process.communicate(timeout=30)[1]


def test_what_a_chat_loads_a_server_loads_too(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "lora.gguf", scale=0.5)
    draft = write_tiny_model(tmp_path / "draft.gguf", noise=0.1)
    loading = ("--lora", f"{adapter}=0.8", "--draft", draft, "--kv-type", "f32", "--ctx", 512)

    def served(*more: object) -> str:
        with (
            serving(tiny_model, *more) as (url, _),
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            return ask(client, messages=[QUESTION]).choices[0].message.content

    answer = served(*loading)
    assert answer != served()
    chat = tritrun("chat", tiny_model, *loading, "-p", QUESTION["content"], "--temp", 0, "--max-tokens", 24)
    assert chat.stdout == answer + "\n"


def test_an_address_in_use(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tritrun("serve", tiny_model, "--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: 127.0.0.1:{port} cannot be listened on: is it in use? Choose another --port\n"


def test_a_server_for_everybody_is_warned_of(tiny_model: Path) -> None:
    with serving(tiny_model, "--host", "0.0.0.0") as (url, process):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        process.send_signal(signal.SIGINT)
        assert "warning: anybody who reaches 0.0.0.0 can use this server: give --api-key\n" in process.communicate()[1]


def test_damaged_models(tmp_path: Path) -> None:
    model = damaged(write_tiny_model(tmp_path / "bad.gguf"))
    done = tritrun("serve", model, "--port", 0)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {model}: damaged: ")
    assert done.stderr.count("\n") == 1
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-1000])
    assert tritrun("serve", cut, "--port", 0).returncode == 1


@pytest.mark.parametrize("arguments", [("--gpu-layers", "many"), ("nonsense",), ("--parallel", 0)])
def test_misuse(tiny_model: Path, arguments: tuple[object, ...]) -> None:
    done = tritrun("serve", tiny_model, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_an_option_that_llama_server_does_not_know(tiny_model: Path) -> None:
    done = tritrun("serve", tiny_model, "--port", 0, "--", "--nonsense")
    assert done.returncode == 1
    assert "--nonsense" in done.stderr
    assert done.stderr.count("\n") == 1
