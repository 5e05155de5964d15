"""A model loaded into llama.cpp: turns a chat into tokens and streams the answer."""

import codecs
import ctypes
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from tritconv.console import note
from tritconv.errors import TritError
from tritconv.model_file import ModelFile
from tritrun.machine import available_memory

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "max-tokens", "context", "interrupted"]

_DEFAULT_CONTEXT = 4096
_CONTEXT_STEP = 256  # llama.cpp rounds the context up to this; the bindings' own buffers do not
_NEXT_QUESTION = "\nUser:"


class Message(TypedDict):
    """One message of a chat, in the form that chat templates take."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, after llama.cpp's top-k 40 and min-p 0.05. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    seed: int


class Engine:
    """A loaded model with one context. Close it, or use it in a `with` block."""

    def __init__(self, model: ModelFile, *, n_ctx: int | None, threads: int, gpu_layers: int = 0) -> None:
        """Load `model`.

        Args:
            n_ctx: context in tokens; 0 takes all that the model was trained for, None at most 4096 of it.
            threads: CPU threads.
            gpu_layers: layers to keep on a GPU, -1 for all.

        Raises:
            TritError: the model does not fit into memory or llama.cpp refuses it.
        """
        llama_cpp, log = _quiet_bindings()
        n_ctx = _context_length(n_ctx, model.trained_context)
        if gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            note("this build of llama.cpp has no GPU support: --gpu-layers is ignored")
            gpu_layers = 0
        model.check_memory(n_ctx, available_memory(), on_gpu=model.share_of_layers(gpu_layers))
        try:
            self._llama: Llama = llama_cpp.Llama(
                str(model.path),
                n_ctx=-(-n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=gpu_layers,
                verbose=False,
            )
        except Exception as error:  # the bindings raise whatever comes; the cause is in llama.cpp's log
            raise TritError(f"{model.path}: llama.cpp cannot load it: {log.first_error or error}") from error
        self._cpp = llama_cpp
        self._vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        self._template = self._chat_template()
        self.n_ctx = n_ctx

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    @property
    def has_chat_template(self) -> bool:
        """False if the model file has no template: then chats are plain `User:` and `Assistant:` lines."""
        return self._template is not None

    def encode(self, messages: list[Message]) -> list[int]:
        """Tokens of the whole chat, ready for the next answer.

        Raises:
            TritError: the model's chat template refuses the messages.
        """
        tokens: list[int] = self._llama.tokenize(
            self._render(messages).encode(errors="replace"), add_bos=False, special=True
        )
        bos = self._llama.token_bos()
        if self._cpp.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def answer(self, prompt: list[int], sampling: Sampling, max_tokens: int = 0) -> "Answer":
        """The answer to `prompt`, to be iterated; `max_tokens` 0 means as many as the context holds."""
        return Answer(self, prompt, sampling, max_tokens)

    def tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Sample tokens after `prompt`, without end. What the last call has computed of it is used again."""
        self._llama.set_seed(sampling.seed)
        yield from self._llama.generate(prompt, temp=sampling.temperature, top_p=sampling.top_p)

    def ends_answer(self, token: int) -> bool:
        """True for an end-of-text or end-of-turn token."""
        return bool(self._cpp.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """The token's bytes; they may be part of a character. Control tokens have none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _chat_template(self) -> "Jinja2ChatFormatter | None":
        """The template of the model file, as a sandboxed Jinja program."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text(token: int) -> str:
            if token < 0:
                return ""
            raw: bytes = self._cpp.llama_vocab_get_text(self._vocab, token)
            return raw.decode(errors="replace")

        template = self._llama.metadata.get("tokenizer.chat_template")
        if template is None:
            return None
        bos, eos = text(self._llama.token_bos()), text(self._llama.token_eos())
        return Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)

    def _render(self, messages: list[Message]) -> str:
        if self._template is None:
            return _plain_chat(messages)
        try:
            prompt: str = self._template(messages=messages).prompt
            return prompt
        except Exception as error:  # a template is a program from the model file: it may raise anything
            raise TritError(f"the model's chat template refuses this chat: {error}") from error


class Answer:
    """One answer while it is generated: iterate for its text, read the counters at any time.

    Attributes:
        prompt_tokens, answer_tokens: counts, the end token not included.
        prompt_seconds: until the first token was there.
        answer_seconds: from then on.
        finish: what ended it, None if the caller stopped to iterate; the caller sets "interrupted".
    """

    def __init__(self, engine: Engine, prompt: list[int], sampling: Sampling, max_tokens: int) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        room = engine.n_ctx - len(prompt)
        self._limit = min(max_tokens or room, room)
        self._at_limit: Finish = "context" if self._limit == room else "max-tokens"
        self.prompt_tokens = len(prompt)
        self.answer_tokens = 0
        self.prompt_seconds = 0.0
        self.answer_seconds = 0.0
        self.finish: Finish | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the first token belongs to the prompt's time."""
        return (self.answer_tokens - 1) / self.answer_seconds if self.answer_seconds > 0 else 0.0

    def __iter__(self) -> Iterator[str]:
        """Pieces of the answer's text as they come, never half a character.

        Raises:
            TritError: llama.cpp failed.
        """
        text = self._text()
        return text if self._engine.has_chat_template else until(_NEXT_QUESTION, text)

    def _text(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self._sampled():
            if piece := decoder.decode(self._engine.piece(token)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _sampled(self) -> Iterator[int]:
        start = time.perf_counter()
        try:
            for token in self._engine.tokens(self._prompt, self._sampling):
                if self.answer_tokens == 0:
                    self.prompt_seconds = time.perf_counter() - start
                self.answer_seconds = time.perf_counter() - start - self.prompt_seconds
                if self._engine.ends_answer(token):
                    self.finish = "stop"
                    return
                self.answer_tokens += 1
                yield token
                if self.answer_tokens >= self._limit:
                    self.finish = self._at_limit
                    return
        except RuntimeError as error:
            raise TritError(f"llama.cpp failed while answering: {error}") from error


def until(stop: str, pieces: Iterable[str]) -> Iterator[str]:
    """`pieces` up to the first `stop`, which may be spread over several of them."""
    held = ""
    for piece in pieces:
        held += piece
        before, found, _ = held.partition(stop)
        if found:
            yield before
            return
        # Hold back what may turn out to be the beginning of `stop`.
        keep = next(n for n in range(len(stop) - 1, -1, -1) if held.endswith(stop[:n]))
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _plain_chat(messages: list[Message]) -> str:
    """The chat as labelled lines, for a model without a template of its own."""
    lines = [
        content if message["role"] == "system" else f"{message['role'].capitalize()}: {content}"
        for message in messages
        if (content := message["content"].strip())
    ]
    return "\n".join([*lines, "Assistant:"])


class _ErrorLog:
    """Swallows llama.cpp's log and remembers the first error: later ones only repeat that loading failed."""

    _LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR; 3 is WARN

    def __init__(self) -> None:
        self.first_error = ""

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        if level == self._LEVEL_ERROR and not self.first_error:
            self.first_error = text.decode(errors="replace").strip()


# The C library keeps calling back until it is unloaded, so this must live as long.
_log_callback: Any = None


def _quiet_bindings() -> tuple[ModuleType, _ErrorLog]:
    """Import the bindings (half a second, hence here) and turn llama.cpp's log into an `_ErrorLog`.

    Raises:
        TritError: llama-cpp-python is missing or its library does not load.
    """
    global _log_callback
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise TritError(f"llama-cpp-python does not load ({error}); `make` builds and installs it") from error
    log = _ErrorLog()
    _log_callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    return llama_cpp, log


def _context_length(asked: int | None, trained: int) -> int:
    """Tokens of context for `--ctx asked` and a model trained for `trained` (0: unknown)."""
    if asked:
        if trained and asked > trained:
            note(f"the model was trained for {trained} tokens of context: expect poor answers beyond")
        return asked
    if asked == 0 and trained:
        return trained
    return min(trained, _DEFAULT_CONTEXT) or _DEFAULT_CONTEXT
