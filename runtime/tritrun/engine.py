"""A model loaded into llama.cpp: turns a chat into tokens and streams the answer."""

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tritcore.console import note
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile
from tritrun import reasoning
from tritrun.llama import Llama, Sampling, free_gpu_memory, has_gpu
from tritrun.machine import available_memory
from tritrun.memory import check_memory, layers_that_fit, n_layers
from tritrun.models import read_text
from tritrun.prompt import encode
from tritrun.template import BadTemplateError, ChatTemplate, Message, Prompt, plain_prompt

Finish = Literal["stop", "max-tokens", "context", "interrupted"]

_DEFAULT_CONTEXT = 4096
_TEMPLATE = "tokenizer.chat_template"
_PLAIN = "using plain 'User:' and 'Assistant:' lines"
_NEXT_QUESTION = "\nUser:"


@dataclass(frozen=True)
class Encoded:
    """A chat in tokens, ready for the next answer; `opening` is what of the answer the template has begun."""

    tokens: list[int]
    opening: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


class Engine:
    """A loaded model with one context. Close it, or use it in a `with` block."""

    def __init__(
        self, model: ModelFile, *, n_ctx: int | None, threads: int, gpu_layers: str = "auto", check: bool = True
    ) -> None:
        """Load `model`.

        Args:
            n_ctx: context in tokens; 0 takes all that the model was trained for, None at most 4096 of it.
            threads: CPU threads.
            gpu_layers: layers to keep on a GPU: a number, "all", or "auto" for as many as fit.
            check: see that all weights are valid.

        Raises:
            TritError: the model does not fit into memory, is damaged, or llama.cpp refuses it.
        """
        n_ctx = context_length(n_ctx, model.trained_context)
        n_on_gpu = _layers_on_gpu(gpu_layers, model, n_ctx)
        check_memory(model, n_ctx, available_memory(), on_gpu=n_on_gpu / n_layers(model))
        self._llama = Llama(model.path, n_ctx=n_ctx, threads=threads, gpu_layers=n_on_gpu, check=check)
        self.n_ctx = n_ctx
        self._merges_system = False
        try:
            if not self._llama.writes_by_decoder_alone:
                raise TritError(f"{model.path} cannot be run: it is not a model that writes text from left to right")
            self._template = self._chat_template(model)
        except BaseException:
            self._llama.close()
            raise

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    @property
    def has_chat_template(self) -> bool:
        """False if there is no template that can be used: then chats are plain `User:` and `Assistant:` lines."""
        return self._template is not None

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The whole chat in tokens. What people and the model wrote stays text, whatever it looks like."""
        llama = self._llama
        prompt = self._render(messages)
        tokens = encode(prompt, llama)
        if llama.adds_bos and tokens[:1] != [llama.bos]:
            tokens.insert(0, llama.bos)
        return Encoded(tokens, prompt.opening)

    def answer(self, prompt: Encoded, sampling: Sampling, max_tokens: int = 0) -> "Answer":
        """The answer to `prompt`, to be iterated; `max_tokens` 0 means as many as the context holds."""
        return Answer(self, prompt, sampling, max_tokens)

    def tokens(self, prompt: Encoded, sampling: Sampling) -> Iterator[int]:
        """Sample tokens after `prompt`, without end. What the last call has computed of it is used again."""
        return self._llama.generate(prompt.tokens, sampling)

    def ends_answer(self, token: int) -> bool:
        """True for an end-of-text or end-of-turn token."""
        return self._llama.ends_answer(token)

    def piece(self, token: int) -> bytes:
        """The token's bytes; they may be part of a character. Control tokens have none, but for marks of reasoning."""
        if self._llama.is_control(token) and reasoning.is_in_mark(name := self._llama.name(token)):
            return name.encode()
        return self._llama.piece(token)

    def _chat_template(self, model: ModelFile) -> ChatTemplate | None:
        """The template of the model file that chats use; None if there is none, or it is of no use."""
        source = read_text(model, _TEMPLATE)
        if source is None:
            note(f"the model has no chat template: {_PLAIN}")
            return None
        llama = self._llama
        try:
            return ChatTemplate(source, {"bos_token": llama.name(llama.bos), "eos_token": llama.name(llama.eos)})
        except BadTemplateError as error:
            note(f"the model's chat template ({_TEMPLATE}) cannot be used: {error}; {_PLAIN}")
            return None

    def _render(self, messages: Sequence[Message]) -> Prompt:
        if self._template is not None:
            try:
                if messages[0]["role"] == "system" and not self._template.takes_system and not self._merges_system:
                    self._merges_system = True
                    note("the model's chat template takes no system prompt: it goes before the first question")
                return self._template.render(messages)
            except BadTemplateError as error:
                note(f"the model's chat template ({_TEMPLATE}) refuses this chat: {error}; {_PLAIN}")
                self._template = None  # for the rest of the chat, or each turn would look another way
        return plain_prompt(messages)


class Answer:
    """One answer while it is generated: iterate for its text, read the counters at any time.

    Attributes:
        prompt_tokens, answer_tokens: counts, the end token not included.
        prompt_seconds: until the first token was there.
        answer_seconds: from then on.
        finish: what ended it, None if the caller stopped to iterate; the caller sets "interrupted".
    """

    def __init__(self, engine: Engine, prompt: Encoded, sampling: Sampling, max_tokens: int) -> None:
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
        """Pieces of the answer proper, without the reasoning before it; see `parts`."""
        return (text for kind, text in self.parts() if kind == "answer")

    def parts(self) -> Iterator[reasoning.Part]:
        """Pieces of reasoning and of the answer as they come, never half a character.

        Raises:
            TritError: llama.cpp failed.
        """
        text = self._text()
        if not self._engine.has_chat_template:
            text = until(_NEXT_QUESTION, text)
        return reasoning.split(text, self._prompt.opening)

    def _text(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self._sampled():
            if piece := decoder.decode(self._engine.piece(token)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _sampled(self) -> Iterator[int]:
        start = time.perf_counter()
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


def _layers_on_gpu(wanted: str, model: ModelFile, n_ctx: int) -> int:
    """The number that `--gpu-layers wanted` stands for."""
    if not has_gpu():
        if wanted not in ("0", "auto"):
            note("this build of llama.cpp has no GPU support: --gpu-layers is ignored")
        return 0
    if wanted == "auto":
        return layers_that_fit(model, n_ctx, free_gpu_memory())
    return n_layers(model) if wanted == "all" else min(int(wanted), n_layers(model))


def context_length(asked: int | None, trained: int) -> int:
    """Tokens of context for `--ctx asked` (0: as the model; None: not given), `trained` of the model (0: unknown)."""
    if asked:
        if trained and asked > trained:
            note(f"the model was trained for {trained} tokens of context: expect poor answers beyond")
        return asked
    if asked == 0 and trained:
        return trained
    return min(trained, _DEFAULT_CONTEXT) or _DEFAULT_CONTEXT
