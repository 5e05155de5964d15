"""`tritrun chat`: the interactive loop and the single answer."""

import secrets
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tritcore.console import err, error, note, without_controls
from tritcore.errors import TritError
from tritrun.conversation import Conversation
from tritrun.engine import Answer, Engine, Finish
from tritrun.sampling import Sampling

_HELP = """\
/help        this list
/reset       forget the chat, keep the system prompt
/save FILE   write the chat to FILE (JSON)
/load FILE   go on with the chat in FILE
/exit        leave, as Ctrl-D does
Ctrl-C stops an answer; a second Ctrl-C leaves."""

_PASTE_SECONDS = 0.03  # within which the lines of a pasted text follow each other; nobody types that fast
_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp draws a seed for this one

_ENDINGS: dict[Finish | None, str] = {
    "max-tokens": "; ended by --max-tokens",
    "context": "; the context is full",
    "interrupted": "; stopped",
}


@dataclass(frozen=True)
class ChatOptions:
    """Settings of the answers.

    Attributes:
        sampling: how tokens are drawn; each answer has a seed of its own.
        seed: that these come from; None draws one.
        max_tokens: of an answer; 0 means no limit.
        stops: texts that end an answer.
    """

    sampling: Sampling
    seed: int | None = None
    max_tokens: int = 0
    stops: tuple[str, ...] = ()


class Chat:
    """A conversation with a loaded model on the terminal."""

    def __init__(self, engine: Engine, options: ChatOptions, system: str | None = None) -> None:
        self._engine = engine
        self._options = options
        self._conversation = Conversation(system)
        self._seed = secrets.randbits(31) if options.seed is None else options.seed
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/exit": self._exit,
        }

    def answer_once(self, question: str) -> None:
        """Write one answer and a line feed to stdout; counters to stderr if that is a terminal.

        Raises:
            TritError: the question is empty or does not fit, or the model fails.
            KeyboardInterrupt: Ctrl-C.
        """
        if not question.strip():
            raise TritError("the prompt is empty")
        self._answer(question, report=err.is_terminal)

    def run(self) -> bool:
        """Read questions and commands until the end of input: one a line, or on a terminal a pasted text of several.

        Returns:
            Whether all of them succeeded.

        Raises:
            KeyboardInterrupt: Ctrl-C at the prompt, right after another one.
        """
        with suppress(ImportError):  # line editing and history at the prompt, where the platform has it
            import readline  # noqa: F401
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        interrupted = failed = False
        while True:
            try:
                text = (_read_pasted(prompt) if prompt else input()).strip()
                interrupted = False
                self._take(text)
            except EOFError:
                if prompt:
                    err.print()
                return not failed
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                err.print()
                note("Ctrl-C again, Ctrl-D or /exit leaves the chat")
            except TritError as problem:
                failed = True
                error(problem)

    def _take(self, text: str) -> None:
        """Obey a command, or answer a question."""
        if not text.startswith("/") or "\n" in text:
            if text:
                self._answer(text, report=True)
            return
        name, _, argument = text.partition(" ")
        if name not in self._commands:
            raise TritError(f"unknown command {name}; /help lists them")
        self._commands[name](argument.strip())

    def _answer(self, question: str, report: bool) -> None:
        """Stream the answer to stdout and keep it in the history; what Ctrl-C leaves of it, too."""
        conversation, options = self._conversation, self._options
        conversation.ask(question)
        try:
            room = min(options.max_tokens or self._engine.n_ctx, self._engine.n_ctx // 4)
            prompt, dropped = conversation.fit(self._engine.encode, self._engine.n_ctx, room)
        except BaseException:
            conversation.reply("")
            raise
        if dropped:
            note(f"the context is full: the model no longer sees the oldest {dropped} turn(s)")
        # Another seed for each turn, or the same words would come back; the same ones for the same --seed.
        seed = (self._seed + len(conversation.messages) // 2) % _RANDOM_SEED
        sampling = replace(options.sampling, seed=seed)
        answer = self._engine.answer(prompt, sampling, options.max_tokens, options.stops)
        said: list[str] = []
        reasoning = _Reasoning()
        try:
            for kind, piece in answer.parts():
                if kind == "reasoning":
                    reasoning.show(piece)
                    continue
                reasoning.end()
                piece = piece if said else piece.lstrip()
                if piece:
                    said.append(piece)
                    write_answer(piece)
        except KeyboardInterrupt:
            answer.finish = "interrupted"
            raise
        finally:
            conversation.reply("".join(said))
            reasoning.end()
            write_answer("\n")
            if reasoning.seen and not said:
                note(f"the model only reasoned and gave no answer{_ENDINGS.get(answer.finish, '')}")
            if report:
                note(_report(answer))

    def _help(self, _argument: str) -> None:
        err.print(_HELP, markup=False)

    def _reset(self, _argument: str) -> None:
        self._conversation.reset()
        note("the chat is forgotten")

    def _save(self, file: str) -> None:
        path = _required_path("/save", file)
        self._conversation.save(path)
        note(f"saved to {path}")

    def _load(self, file: str) -> None:
        path = _required_path("/load", file)
        self._conversation = Conversation.load(path)
        note(f"loaded {len(self._conversation.messages) // 2} turn(s) from {path}")

    def _exit(self, _argument: str) -> None:
        raise EOFError


class _Reasoning:
    """Reasoning as it comes: dim on a terminal, left out elsewhere. It goes to stderr, as stdout is for answers."""

    def __init__(self) -> None:
        self.seen = False
        self._in_line = False

    def show(self, text: str) -> None:
        """Write a piece of it."""
        text = text if self.seen else text.lstrip()
        if text:
            self.seen = True
            if err.is_terminal:
                self._in_line = not text.endswith("\n")
                shown = without_controls(text)
                err.print(shown, style="dim", end="", markup=False, emoji=False, soft_wrap=True)

    def end(self) -> None:
        """Let the answer begin on a line of its own."""
        if self._in_line:
            err.print()
            self._in_line = False


def _read_pasted(prompt: str) -> str:
    """A line of the terminal, or all lines of a text that is pasted there.

    GNU readline takes a pasted text for one line, if the terminal marks it. Elsewhere its lines come by themselves, but
    together. Lines that are there before the prompt were typed during an answer: each is a question.
    """
    typed_ahead = _is_waiting(0)
    lines = [input(prompt)]
    while not typed_ahead and _is_waiting(_PASTE_SECONDS):
        lines.append(input())
    return "\n".join(lines)


def _is_waiting(seconds: float) -> bool:
    """Whether the terminal has input, now or within this time."""
    if sys.platform == "win32":  # select knows only sockets there
        return False
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def write_answer(text: str) -> None:
    """Write a piece of an answer to stdout at once, without control characters."""
    sys.stdout.write(without_controls(text))
    sys.stdout.flush()


def _required_path(command: str, file: str) -> Path:
    if not file:
        raise TritError(f"{command} needs a file name: {command} FILE")
    return Path(file).expanduser()


def _report(answer: Answer) -> str:
    """Counters of one answer, for a line below it."""
    if not answer.answer_tokens:
        return "no answer" + _ENDINGS.get(answer.finish, "")
    counters = (
        f"{answer.answer_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s "
        f"(prompt: {answer.prompt_tokens} tokens, {answer.prompt_seconds:.2f} s)"
    )
    return counters + _ENDINGS.get(answer.finish, "")
