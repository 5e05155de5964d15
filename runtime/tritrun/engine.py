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
from tritrun.llama import Llama
from tritrun.loading import Loading
from tritrun.models import read_text
from tritrun.prompt import encode
from tritrun.sampling import Sampling
from tritrun.template import BadTemplateError, ChatTemplate, Message, Prompt, plain_prompt

Finish = Literal["stop", "max-tokens", "context", "interrupted"]

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

    def __init__(self, model: ModelFile, loading: Loading) -> None:
        """Load `model`.

        Raises:
            TritError: the model does not fit into memory, is damaged, or llama.cpp refuses it.
        """
        n_ctx = loading.context(model)
        on_gpu = loading.layers_on_gpu(model, n_ctx)
        loading.check_memory(model, n_ctx, on_gpu)
        settings = {"n_ctx": n_ctx, "threads": loading.threads, "check": loading.check, "kv_type": loading.kv_type}
        self._llama = Llama(
            model.path, gpu_layers=on_gpu, adapters=loading.adapters, servers=loading.addresses, **settings
        )
        self._draft: Llama | None = None
        self.n_ctx = n_ctx
        self._merges_system = False
        try:
            if not self._llama.writes_by_decoder_alone:
                raise TritError(f"{model.path} cannot be run: it is not a model that writes text from left to right")
            if loading.draft is not None:
                self._draft = Llama(loading.draft.path, gpu_layers=0, **settings)
                if not self._draft.has_vocabulary_of(self._llama):
                    raise TritError(
                        f"{loading.draft.path} cannot guess for {model.path}: their vocabularies differ; "
                        "take a model of the same family"
                    )
            self._template = self._chat_template(model)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._llama.close()
        if self._draft is not None:
            self._draft.close()

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

    def answer(self, prompt: Encoded, sampling: Sampling, max_tokens: int = 0, stops: Sequence[str] = ()) -> "Answer":
        """The answer to `prompt`, to be iterated.

        Args:
            max_tokens: 0 means as many as the context holds.
            stops: texts that end the answer and are left out of it.
        """
        return Answer(self, prompt, sampling, max_tokens, stops)

    def tokens(self, prompt: Encoded, sampling: Sampling) -> Iterator[int]:
        """Sample tokens after `prompt`, without end. What the last call has computed of it is used again."""
        return self._llama.generate(prompt.tokens, sampling, self._draft)

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

    def __init__(
        self, engine: Engine, prompt: Encoded, sampling: Sampling, max_tokens: int, stops: Sequence[str]
    ) -> None:
        self._engine = engine
        self._stops = stops if engine.has_chat_template else (*stops, _NEXT_QUESTION)
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
        return reasoning.split(until(self._stops, self._text()), self._prompt.opening)

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


def until(stops: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """`pieces` up to the first of `stops`, which may be spread over several of them."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
            yield held[: min(found)]
            return
        # Hold back what may turn out to be the beginning of one.
        keep = max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held
