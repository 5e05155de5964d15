"""A question about images to a model that sees: llama.cpp's server answers it, and ends."""

import base64
import http.client
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile
from tritrun.chat import ChatOptions
from tritrun.server import ServerOptions, run_server

_MAX_BYTES = 64 << 20
_KINDS = {b"\x89PNG\r\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}  # by their first bytes
_EVENT, _LAST = b"data: ", b"[DONE]"  # of a stream of server-sent events


@dataclass(frozen=True)
class Question:
    """A text about images, and a system prompt; None leaves that to the chat template of the model."""

    text: str
    images: Sequence[Path]
    system: str | None = None


class _Answered(Exception):
    """Ends the server."""


def answer_about_images(
    model: ModelFile, options: ServerOptions, question: Question, chat: ChatOptions, say: Callable[[str], None]
) -> None:
    """Answer a question, with each piece of the answer given to `say` as it comes.

    Raises:
        TritError: an image cannot be read, or as `run_server`.
    """
    request = _request(question, chat)
    options = replace(options, api_key=secrets.token_hex())  # nobody else is to use this server

    def ask(url: str, _n_ctx: int) -> None:
        for piece in _answer(url, str(options.api_key), request):
            say(piece)
        raise _Answered

    try:
        run_server(model, options, ask)
    except _Answered:
        return


def _request(question: Question, chat: ChatOptions) -> bytes:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(path)}} for path in question.images
    ]
    content.append({"type": "text", "text": question.text})
    system = [{"role": "system", "content": question.system}] if question.system is not None else []
    sampling = chat.sampling
    request = {
        "messages": [*system, {"role": "user", "content": content}],
        "stream": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": secrets.randbits(31) if chat.seed is None else chat.seed,
        "stop": list(chat.stops),
        "max_tokens": chat.max_tokens or -1,
    }
    return json.dumps(request | ({"grammar": sampling.grammar} if sampling.grammar else {})).encode()


def _data_url(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TritError(f"{path}: larger than {_MAX_BYTES >> 20} MiB: make the image smaller")
        data = path.read_bytes()
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error
    kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise TritError(f"{path}: no image in PNG, JPEG, GIF or BMP")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _answer(url: str, key: str, request: bytes) -> Iterator[str]:
    """Pieces of the answer, reasoning left out."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", request, headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise TritError(f"the model does not answer: {_reason(response.read())}")
        for line in response:
            if not line.startswith(_EVENT) or (event := line[len(_EVENT) :].strip()) == _LAST:
                continue
            parsed = json.loads(event)
            if "error" in parsed:
                raise TritError(f"the model has stopped to answer: {_reason(event)}")
            for choice in parsed.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    yield piece
    except (OSError, http.client.HTTPException) as error:
        raise TritError("the server has ended before the answer did") from error
    finally:
        connection.close()


def _reason(answer: bytes) -> str:
    """What an error of the server says."""
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")
