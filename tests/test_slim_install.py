"""Without the extra `convert`, with torch and transformers, all works but calibrations and checkpoints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritconv import extra

# None in sys.modules makes an import fail as that of a missing package does
WITHOUT = f"""\
import sys
sys.modules.update(dict.fromkeys({[*extra.MODULES, "google"]!r}))
from importlib import import_module
import_module(sys.argv[1] + ".cli").app(sys.argv[2:])
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process that has none of the extra's packages."""
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["tritconv --version", "tritconv --help", "tritrun --help", "tritrun --version"])
def test_start(command: str) -> None:
    done = run(*command.split())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.build
def test_chat_inspect_and_verify(tiny_model: Path) -> None:
    chat = run("tritrun", "chat", tiny_model, "--prompt", "hi", "--max-tokens", "3", "--temp", "0")
    assert chat.returncode == 0, chat.stderr
    assert len(chat.stdout.strip()) > 0
    for command in ("inspect", "verify"):
        assert run("tritconv", command, tiny_model).returncode == 0


@pytest.mark.build
def test_plain_search(tiny_model: Path, tmp_path: Path) -> None:
    written = tmp_path / "tiny-TRIT3.gguf"
    done = run("tritconv", "gguf-to-gguf", tiny_model, "--depth", "3", "--fast", "-o", written)
    assert done.returncode == 0, done.stderr
    assert run("tritconv", "verify", written).returncode == 0


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("hf-to-gguf", "no/model", "--depth", "2", "--fast"), ""),
        (("gguf-to-gguf", "no.gguf", "--depth", "2"), ", or give --fast"),
        (("gguf-to-gguf", "no.gguf", "--bpw", "4.0"), ""),
    ],
)
def test_what_needs_the_extra_says_so_before_anything_else(words: tuple[str, ...], advice: str) -> None:
    done = run("tritconv", *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "needs accelerate, safetensors, sentencepiece, torch, transformers" in line
    assert line.endswith(f"pip install 'trit-gguf[convert]'{advice}")


def test_the_extra_has_what_the_code_asks_for() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    base, listed = (
        set(re.findall(r'^ {4}"([\w-]+)', project.partition(f"{key} = [")[2].partition("\n]")[0], re.MULTILINE))
        for key in ("\ndependencies", "\nconvert")
    )
    assert {*extra.MODULES, "protobuf"} == listed
    assert "numpy" in base
    assert not base & listed
