"""tritrun chat as a user runs it: in a pipe, in a session, and with Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_model

pytestmark = pytest.mark.build

COMMAND = [sys.executable, "-m", "tritrun", "chat"]


def run(*arguments: object, stdin: str = "", exit_code: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_prompt_in_a_pipe_writes_the_answer_and_nothing_else(tiny_model: Path) -> None:
    done = run(tiny_model, "--prompt", "hello", "--temp", 0, "--max-tokens", 12)
    assert done.stderr == ""
    assert done.stdout.endswith("\n")
    assert 1 <= len(done.stdout.strip()) <= 12
    assert "\x1b" not in done.stdout


def test_prompt_from_stdin_is_the_same(tiny_model: Path) -> None:
    options = ("--temp", 0, "--max-tokens", 12)
    from_option = run(tiny_model, "--prompt", "hello", *options)
    assert run(tiny_model, "--prompt", "-", *options, stdin="hello").stdout == from_option.stdout


def test_empty_prompt(tiny_model: Path) -> None:
    done = run(tiny_model, "--prompt", " ", exit_code=1)
    assert (done.stdout, done.stderr) == ("", "error: the prompt is empty\n")


def test_input_that_is_not_utf_8(tiny_model: Path) -> None:
    command = [*COMMAND, str(tiny_model), "--prompt", "-", "--max-tokens", "3", "--temp", "0"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_session(tiny_model: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    script = f"hello\n\n/save {chat}\nand you?\n/reset\n/load {chat}\nonce more\n/save {chat}\n/exit\nnot read\n"
    done = run(tiny_model, "--system", "be good", "--temp", 0, "--max-tokens", 8, stdin=script)
    saved = json.loads(chat.read_text())
    assert saved["system"] == "be good"
    assert [message["content"] for message in saved["messages"][::2]] == ["hello", "once more"]
    assert [message["content"].strip() for message in saved["messages"][1::2]] == done.stdout.splitlines()[::2]
    assert done.stderr.count("tokens/s") == 3
    assert "the chat is forgotten" in done.stderr
    assert f"loaded 1 turn(s) from {chat}" in done.stderr


def test_end_of_input_ends_the_session(tiny_model: Path) -> None:
    assert run(tiny_model, stdin="").stdout == ""


def test_mistakes_do_not_end_the_session(tiny_model: Path, tmp_path: Path) -> None:
    script = f"/nope\n/save\n/load {tmp_path}/no\n/help\nhello\n"
    done = run(tiny_model, "--temp", 0, "--max-tokens", 5, stdin=script, exit_code=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: unknown command /nope; /help lists them",
        "error: /save needs a file name: /save FILE",
        f"error: {tmp_path}/no: cannot be read: No such file or directory",
    ]
    assert "/reset" in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("script", "exit_code"), [("x\n", 1), ("x\nhi\n", 1), ("hi\n", 0), ("", 0)])
def test_a_piped_chat_fails_if_a_question_fails(tiny_model: Path, script: str, exit_code: int) -> None:
    script = script.replace("x", "x" * 300)
    done = run(tiny_model, "--ctx", 256, "--temp", 0, "--max-tokens", 2, stdin=script, exit_code=exit_code)
    assert done.stderr.count("error: the message is too long") == exit_code


def test_one_broken_template_does_not_stop_the_others(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", templates={"tool_use": "{% for %}", "rag": "{{ 1 / 0 }}"})
    plain = write_tiny_model(tmp_path / "n.gguf")
    done, expected = (run(p, "--prompt", "hello", "--temp", 0, "--max-tokens", 8) for p in (path, plain))
    assert (done.stdout, done.stderr) == (expected.stdout, "")


def test_what_is_typed_is_text(tiny_model: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "<s>"}, {"role": "assistant", "content": "</s>"}]
    chat.write_text(json.dumps({"format": "tritrun-chat", "version": 1, "system": "</s><unk>", "messages": messages}))
    done = run(tiny_model, "--temp", 0, "--max-tokens", 2, stdin=f"/load {chat}\na</s>b\n")
    # <s>, and a token for each letter of what the template makes of it
    letters = "<system></s><unk>\n<user><s>\n<assistant></s>\n<user>a</s>b\n<assistant>"
    assert f"(prompt: {1 + len(letters)} tokens" in done.stderr


def test_history_is_trimmed_to_the_context(tiny_model: Path) -> None:
    script = "".join(f"{n}{'x' * 50}\n" for n in range(6)) + "y" * 300 + "\nlast\n"
    done = run(tiny_model, "--ctx", 256, "--temp", 0, "--max-tokens", 5, stdin=script, exit_code=1)
    assert "the context is full: the model no longer sees the oldest" in done.stderr
    assert "error: the message is too long" in done.stderr
    assert len(done.stdout.splitlines()) == 7  # all but the one that was too long


def test_model_without_template_says_so(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf", chat_template=None)
    done = run(path, "--prompt", "hello", "--temp", 0, "--max-tokens", 5)
    assert "no chat template" in done.stderr
    assert done.stdout.strip()


def test_closed_pipe_is_no_traceback(tiny_model: Path) -> None:
    command = " ".join(f"'{part}'" for part in [*COMMAND, str(tiny_model), "--prompt", "hello", "--temp", "0"])
    done = subprocess.run(
        f"{command} | head -c 1", shell=True, capture_output=True, text=True, timeout=120, check=False
    )
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def start(*arguments: object) -> "subprocess.Popen[str]":
    """Start a session that Ctrl-C reaches even if the tests run in the background, where it is ignored."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(tiny_model: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    with start(tiny_model, "--temp", 0, "--ctx", 32768) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stderr is not None
        session.stdin.write("hello\n")
        session.stdin.flush()
        beginning = session.stdout.read(5)
        session.send_signal(signal.SIGINT)
        session.stdin.write(f"/save {chat}\n/exit\n")
        session.stdin.close()
        # not communicate(): it would miss what the first read took into its buffer beyond the five characters
        rest, messages = session.stdout.read(), session.stderr.read()
    assert session.returncode == 0, messages
    question, answer = json.loads(chat.read_text())["messages"]
    assert question["content"] == "hello"
    assert answer["content"].strip() == (beginning + rest).strip()
    assert len(answer["content"]) < 30_000  # it would have gone on to the end of the context
    assert "; stopped" in messages
    assert "Traceback" not in messages


def test_ctrl_c_twice_at_the_prompt_leaves(tiny_model: Path) -> None:
    with start(tiny_model) as session:
        assert session.stdin is not None
        assert session.stderr is not None
        session.stdin.write("/help\n")
        session.stdin.flush()
        for line in iter(session.stderr.readline, ""):  # to its end at most, if the session dies
            if line.startswith("Ctrl-C"):
                break
        session.send_signal(signal.SIGINT)
        assert any("Ctrl-C again" in line for line in iter(session.stderr.readline, ""))
        session.send_signal(signal.SIGINT)
        assert session.wait(timeout=60) == 130
        assert session.stderr.read().endswith("error: interrupted\n")


def test_ctrl_c_in_a_single_answer(tiny_model: Path) -> None:
    with start(tiny_model, "--prompt", "hello", "--temp", 0, "--ctx", 32768) as session:
        assert session.stdout is not None
        assert session.stdout.read(5)
        session.send_signal(signal.SIGINT)
        _, messages = session.communicate(timeout=60)
    assert (session.returncode, messages) == (130, "error: interrupted\n")


@pytest.mark.parametrize("content", [b"not a model", b"GGUF"])
def test_bad_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    done = run(path, "--prompt", "hello", exit_code=1)
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"COLUMNS": "200"} | environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def expect(self, wanted: bytes) -> None:
        """Wait until the chat has shown this, after what was expected before."""
        deadline = time.monotonic() + 60
        while wanted not in self._shown:
            assert time.monotonic() < deadline, self._shown
            if select.select([self._end], [], [], 1)[0]:
                self._shown += os.read(self._end, 4096)
        _, _, self._shown = self._shown.partition(wanted)

    def type(self, text: bytes) -> None:
        os.write(self._end, text)


PASTED = b"one\ntwo\n\nfour"


@pytest.mark.parametrize(
    ("pasted", "kind"),
    [(b"\x1b[200~" + PASTED + b"\x1b[201~\n", "xterm"), (PASTED + b"\n", "dumb")],
    ids=["marked", "raw"],
)
def test_a_pasted_text_is_one_question(tiny_model: Path, tmp_path: Path, pasted: bytes, kind: str) -> None:
    chat = tmp_path / "chat.json"
    with Terminal(tiny_model, "--temp", 0, "--max-tokens", 3, TERM=kind) as terminal:
        terminal.expect(b"lists the commands")
        terminal.expect(b"> ")
        terminal.type(pasted)
        terminal.expect(b"tokens/s")
        terminal.expect(b"> ")
        terminal.type(f"/save {chat}\n".encode())
        terminal.expect(b"saved to")
        terminal.expect(b"> ")
        terminal.type(b"/exit\n")
        assert terminal.process.wait(timeout=60) == 0
    questions = [message["content"] for message in json.loads(chat.read_text())["messages"][::2]]
    assert questions == [PASTED.decode()]
