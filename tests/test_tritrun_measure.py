"""tritrun perplexity and bench: llama.cpp's programs on tiny models, and what is made of their output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_model
from typer.testing import CliRunner, Result

from tritrun.base_logits import logits_bytes
from tritrun.cli import app
from tritrun.perplexity_log import Estimate, PerplexityLog

DATA = Path(__file__).parent / "data"
CHUNKS, CONTEXT = 8, 64
OPTIONS = ["--chunks", str(CHUNKS), "--ctx", str(CONTEXT), "--threads", "1"]


def run(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.fixture
def poor_copy(tmp_path: Path) -> Path:
    """The tiny model with a tenth of noise on its weights."""
    return write_tiny_model(tmp_path / "poor.gguf", noise=0.1)


@pytest.fixture
def fake_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that tritrun takes llama.cpp's programs from."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("TRITRUN_BIN_DIR", str(folder))
    return folder


def put_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def read_log(name: str) -> PerplexityLog:
    log = PerplexityLog()
    for line in (DATA / name).read_text().splitlines():
        log.feed(line)
    return log


def test_log_of_a_perplexity_run() -> None:
    log = read_log("perplexity.jsonl")
    assert (log.chunks, log.done, log.first_error) == (3, 3, "")
    estimate = log.perplexity()
    assert estimate is not None
    assert estimate.value == pytest.approx(float(log.running), abs=1e-3)
    assert log.statistics().get("Mean KLD") is None


def test_log_of_a_divergence_run() -> None:
    log = read_log("kl_divergence.jsonl")
    statistics = log.statistics()
    assert (log.chunks, log.done, log.first_error) == (3, 3, "")
    assert statistics["Mean PPL(Q)"] == Estimate(39.744579, 9.512630)
    assert statistics["Mean PPL(base)"] == Estimate(32.698018, 8.440950)
    assert statistics["Mean KLD"] == Estimate(0.473453, 0.042183)
    assert statistics["Median KLD"] == Estimate(0.324176)
    assert statistics["99.9% KLD"] == Estimate(4.330455)
    assert statistics["Same top p"] == Estimate(65.079, 3.477)
    assert log.perplexity() is None


@pytest.mark.parametrize("line", ["", "{", "[1]", '{"msg": 3}', '"msg"', '{"msg": "[x]nan,"}'])
def test_log_passes_over_what_it_does_not_know(line: str) -> None:
    log = PerplexityLog()
    log.feed(line)
    assert (log.done, log.perplexity(), log.statistics()) == (0, None, {})


def test_perplexity(tiny_model: Path, text: Path) -> None:
    figures = json.loads(run("perplexity", tiny_model, "--file", text, *OPTIONS, "--json", "-").stdout)
    assert figures["chunks"] == CHUNKS
    assert figures["perplexity"]["value"] > 1
    assert figures["divergence"] is None
    table = run("perplexity", tiny_model, "--file", text, *OPTIONS).stdout
    assert f"{figures['perplexity']['value']:.4f}" in table


def test_divergence_of_a_model_from_itself_is_nothing(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    table = run("perplexity", tiny_model, "-f", text, *OPTIONS, "--base", tiny_model, "--json", file).stdout
    divergence = json.loads(file.read_text())["divergence"]
    assert abs(divergence["mean"]["value"]) < 1e-4
    assert divergence["same_top"]["value"] == 100
    assert "KL divergence, mean" in table


def test_divergence_of_a_poor_copy(tiny_model: Path, poor_copy: Path, text: Path, tmp_path: Path) -> None:
    logits = tmp_path / "base.logits"
    command = ["perplexity", poor_copy, "-f", text, *OPTIONS, "--logits", logits, "--json", "-"]
    first = run(*command, "--base", tiny_model)
    assert json.loads(first.stdout)["divergence"]["mean"]["value"] > 1e-3
    vocabulary = 354
    stamp_bytes = logits.stat().st_size - logits_bytes(CONTEXT, CHUNKS, vocabulary)
    assert 0 < stamp_bytes < 500
    again = run(*command)
    assert again.stdout == first.stdout
    assert "base logits: taken from" in again.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"base.logits", "poor.gguf", "text.txt"}


def test_kept_logits_are_checked(tiny_model: Path, poor_copy: Path, text: Path, tmp_path: Path) -> None:
    logits = tmp_path / "base.logits"
    command = ["perplexity", poor_copy, "-f", text, *OPTIONS, "--logits", logits]
    assert "give --base to make it" in run(*command, exit_code=1).stderr
    run(*command, "--base", tiny_model)
    assert "was made with base tiny.gguf, not poor.gguf" in run(*command, "--base", poor_copy, exit_code=1).stderr
    assert "was made with chunks 8, not 7" in run(*command, "--chunks", 7, exit_code=1).stderr
    text.write_text(text.read_text() + "More.")
    assert "was made with text_sha256" in run(*command, exit_code=1).stderr
    logits.write_bytes(b"_logits_")
    assert "is not a file of `tritrun perplexity --logits`" in run(*command, exit_code=1).stderr


def test_missing_and_short_texts(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    assert "no such text file" in run("perplexity", tiny_model, "-f", text, exit_code=1).stderr
    text.write_text("Too short.")
    message = run("perplexity", tiny_model, "-f", text, *OPTIONS, exit_code=1).stderr
    assert "you need at least 128 tokens" in message
    assert message.count("\n") == 1


def test_too_few_tokens_for_statistics(tiny_model: Path, text: Path) -> None:
    command = ["perplexity", tiny_model, "-f", text, "--ctx", 16, "--chunks", 2, "--base", tiny_model]
    assert "too few tokens, raise --chunks or --ctx" in run(*command, exit_code=1).stderr


def test_another_vocabulary(tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_gguf.TOKENS", ["<unk>", "<s>", "</s>"])
    monkeypatch.setattr("tiny_gguf._LETTER_TOKENS", [])
    monkeypatch.setattr("tiny_gguf._BYTE_TOKENS", [])
    other = write_tiny_model(tmp_path / "other.gguf")
    message = run("perplexity", other, "-f", text, "--base", tiny_model, exit_code=1).stderr
    assert "vocabulary of 354 tokens" in message
    assert "they are not the same model" in message


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo first >&2; echo the reason >&2; exit 3", "the reason"),
        ('echo \'{"level": "error", "msg": "no tensor x"}\'; echo usage >&2; exit 1', "no tensor x"),
        ("echo GGML_ASSERT >&2; kill -ABRT $$", "killed by SIGABRT: GGML_ASSERT"),
        ("exit 7", "exit code 7"),
        ("exit 0", "no result"),
    ],
)
def test_perplexity_tool_fails(fake_tools: Path, tiny_model: Path, text: Path, script: str, reason: str) -> None:
    put_tool(fake_tools, "llama-perplexity", script)
    message = run("perplexity", tiny_model, "-f", text, exit_code=1).stderr
    assert message.startswith("error: llama-perplexity: ")
    assert reason in message
    assert message.count("\n") == 1


def test_a_full_disk_leaves_no_logits(fake_tools: Path, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    # Like the real program, this one writes too little and says nothing.
    records = ['{"msg": "over 8 chunks"}', '{"msg": "Final estimate: PPL = 9.0 +/- 0.1"}']
    script = 'while [ "$1" != --kl-divergence-base ]; do shift; done; echo _logits_ > "$2"'
    put_tool(fake_tools, "llama-perplexity", "\n".join([script, *(f"echo '{record}'" for record in records)]))
    logits = tmp_path / "base.logits"
    command = ["perplexity", tiny_model, "-f", text, *OPTIONS, "--base", tiny_model, "--logits", logits]
    assert "is the disk full?" in run(*command, exit_code=1).stderr
    assert {file.name for file in tmp_path.iterdir()} == {"bin", "text.txt"}


def test_tools_are_missing(fake_tools: Path, tiny_model: Path, text: Path) -> None:
    for command in (["perplexity", tiny_model, "-f", text], ["bench", tiny_model]):
        message = run(*command, exit_code=1).stderr
        assert "is missing; `make` installs" in message
        assert message.count("\n") == 1


def test_ctrl_c_ends_the_tool(fake_tools: Path, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    put_tool(
        fake_tools,
        "llama-perplexity",
        f"echo $$ > '{pid_file}.part'; mv '{pid_file}.part' '{pid_file}'; exec sleep 60",
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tritrun",
            "perplexity",
            str(tiny_model),
            "-f",
            str(text),
            "--base",
            str(tiny_model),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITRUN_BIN_DIR": str(fake_tools), "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        deadline = time.monotonic() + 60
        while not pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    assert (process.returncode, messages) == (130, "error: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert not list(tmp_path.glob(".tritrun-*"))


def test_bench(tiny_model: Path, poor_copy: Path) -> None:
    table = run("bench", tiny_model, poor_copy, "-p", 16, "-n", 4, "-r", 2, "-t", 1).stdout
    assert all(text in table for text in ("tiny.gguf", "poor.gguf", "F16", "16.04", "±", "2 runs, 1 threads"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'llama_bench: error: failed to load' >&2; exit 1", "failed to load"),
        ("echo '[]'", "printed something unexpected"),
        ("echo no JSON", "printed something unexpected"),
        ('echo \'[{"n_gen": "4"}]\'', "printed something unexpected"),
    ],
)
def test_bench_tool_fails(fake_tools: Path, tiny_model: Path, script: str, reason: str) -> None:
    put_tool(fake_tools, "llama-bench", script)
    message = run("bench", tiny_model, exit_code=1).stderr
    assert message.startswith(f"error: {tiny_model}: llama-bench")
    assert reason in message
    assert message.count("\n") == 1


def test_all_models_are_checked_before_the_first_run(fake_tools: Path, tiny_model: Path, tmp_path: Path) -> None:
    put_tool(fake_tools, "llama-bench", f"touch '{tmp_path}/started'")
    assert "no such file" in run("bench", tiny_model, tmp_path / "none.gguf", exit_code=1).stderr
    assert not (tmp_path / "started").exists()
