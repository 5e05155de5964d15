"""tritrun perplexity and bench: llama.cpp's programs on tiny models, and what is made of their output."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tiny_gguf import damaged, write_tiny_model
from typer.testing import CliRunner, Result

from tritcore.errors import TritError
from tritrun.base_logits import Stamp, append_stamp, check_stamp, logits_bytes
from tritrun.cli import app
from tritrun.models import read_text_model
from tritrun.perplexity import Measurement, Run, _divergence
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


@pytest.mark.build
def test_perplexity(tiny_model: Path, text: Path) -> None:
    figures = json.loads(run("perplexity", tiny_model, "--file", text, *OPTIONS, "--json", "-").stdout)
    assert figures["chunks"] == CHUNKS
    assert figures["perplexity"]["value"] > 1
    assert figures["divergence"] is None
    table = run("perplexity", tiny_model, "--file", text, *OPTIONS).stdout
    assert f"{figures['perplexity']['value']:.4f}" in table


@pytest.mark.build
def test_divergence_of_a_model_from_itself_is_nothing(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    table = run("perplexity", tiny_model, "-f", text, *OPTIONS, "--base", tiny_model, "--json", file).stdout
    divergence = json.loads(file.read_text())["divergence"]
    assert abs(divergence["mean"]["value"]) < 1e-4
    assert divergence["same_top"]["value"] == 100
    assert "KL divergence, mean" in table


@pytest.mark.build
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


@pytest.mark.build
def test_kept_logits_are_checked(tiny_model: Path, poor_copy: Path, text: Path, tmp_path: Path) -> None:
    logits = tmp_path / "base.logits"
    command = ["perplexity", poor_copy, "-f", text, *OPTIONS, "--logits", logits]
    assert "give --base to make it" in run(*command, exit_code=1).stderr
    run(*command, "--base", tiny_model)
    elsewhere = tmp_path / "elsewhere" / "tiny.gguf"
    elsewhere.parent.mkdir()
    shutil.copy(tiny_model, elsewhere)
    run(*command, "--base", elsewhere)  # the same file
    write_tiny_model(elsewhere, seed=1)  # another model of the same name and size
    assert elsewhere.stat().st_size == tiny_model.stat().st_size
    assert "was made with base_sha256" in run(*command, "--base", elsewhere, exit_code=1).stderr
    assert "was made with chunks 8, not 7" in run(*command, "--chunks", 7, exit_code=1).stderr
    text.write_text(text.read_text() + "More.")
    assert "was made with text_sha256" in run(*command, exit_code=1).stderr
    logits.write_bytes(b"_logits_")
    assert "is not a file of `tritrun perplexity --logits`" in run(*command, exit_code=1).stderr


_SAME: Stamp = {"text_sha256": "1" * 64, "ctx": 64, "chunks": 8}
STAMP: Stamp = {**_SAME, "llama.cpp": "2" * 64, "cpu": "x64", "base_sha256": "3" * 64}


@pytest.mark.parametrize("changed", STAMP)
def test_logits_are_known_by_all_that_they_depend_on(tmp_path: Path, changed: str) -> None:
    path = tmp_path / "base.logits"
    path.write_bytes(b"_logits_ and so on")
    append_stamp(path, STAMP)
    check_stamp(path, STAMP)
    check_stamp(path, {key: value for key, value in STAMP.items() if key != "base_sha256"})  # the base is left open
    with pytest.raises(TritError, match=f"was made with {re.escape(changed)} .*; delete it or name another file"):
        check_stamp(path, {**STAMP, changed: "another"})


@pytest.mark.usefixtures("fake_libraries")
def test_a_stamp_has_all_of_a_run(tiny_model: Path, text: Path) -> None:
    stamp = Run(text, 64, 8, 1)._stamp(read_text_model(tiny_model))
    assert stamp.keys() == STAMP.keys() | {"vocabulary"}


def test_logits_of_an_older_tritrun_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.logits"
    stamp = b'{"base": "tiny.gguf", "base_bytes": 9}'
    path.write_bytes(b"_logits_" + stamp + struct.pack("<I8s", len(stamp), b"tritrun1"))
    with pytest.raises(TritError, match="made by an older tritrun"):
        check_stamp(path, STAMP)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf"])
@pytest.mark.parametrize("where", ["chunk", "end"])
def test_a_perplexity_that_is_no_number_is_an_error(
    fake_tools: Path, tiny_model: Path, text: Path, value: str, where: str
) -> None:
    records = ["over 8 chunks", f"[1]{value if where == 'chunk' else 9.5},"]
    records += [f"Final estimate: PPL = {value} +/- 0.1"] if where == "end" else []
    script = "\n".join(f"echo '{json.dumps({'msg': record})}'" for record in records)
    put_tool(fake_tools, "llama-perplexity", script + ("\nexec sleep 60" if where == "chunk" else ""))
    result = run("perplexity", tiny_model, "-f", text, "--json", "-", exit_code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: tiny.gguf: its predictions of this text are not finite")
    assert result.stderr.count("\n") == 1


def test_places_that_cannot_be_written_are_found_first(fake_tools: Path, tiny_model: Path, text: Path) -> None:
    put_tool(fake_tools, "llama-perplexity", f"touch '{fake_tools}/started'; exit 1")
    message = run("perplexity", tiny_model, "-f", text, "--json", fake_tools / "no" / "f.json", exit_code=1).stderr
    assert "there is no folder" in message
    assert not (fake_tools / "started").exists()


def test_a_divergence_that_is_no_number_is_an_error(tiny_model: Path) -> None:
    log = read_log("kl_divergence.jsonl")
    log._text = log._text.replace("0.473453", "     inf")
    with pytest.raises(TritError, match=r"tiny\.gguf: its predictions of this text are not finite"):
        _divergence(read_text_model(tiny_model), log)


@pytest.mark.build
def test_damaged_weights_are_found_before_measuring(text: Path, tmp_path: Path) -> None:
    path = damaged(write_tiny_model(tmp_path / "damaged.gguf"))
    message = run("perplexity", path, "-f", text, *OPTIONS, exit_code=1).stderr
    assert "tensor 'output.weight' has invalid data" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["model[bold].gguf", "[red]x[/red].gguf", "a:smile:.gguf", "[/].gguf"])
def test_names_are_shown_as_they_are(tiny_model: Path, text: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name.replace("/", "\\")
    shutil.copy(tiny_model, path)
    other = tmp_path / f"{path.name}.txt"
    shutil.copy(text, other)
    found = Estimate(9.0)
    measurement = Measurement(path.name, other.name, 64, 8, found)
    console = Console(width=200, file=io.StringIO(), emoji=False)
    console.print(measurement.as_table())
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(path.name) == 2
    assert f"error: {path}: no such file" in run("bench", path, f"{path}x", exit_code=1).stderr.replace("x: no", ": no")


@pytest.mark.build
def test_missing_and_short_texts(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    assert "no such text file" in run("perplexity", tiny_model, "-f", text, exit_code=1).stderr
    text.write_text("Too short.")
    message = run("perplexity", tiny_model, "-f", text, *OPTIONS, exit_code=1).stderr
    assert "you need at least 128 tokens" in message
    assert message.count("\n") == 1


@pytest.mark.build
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
        (
            "echo /src/llama-x.cpp:7: 'GGML_ASSERT(n > 0) failed' >&2; echo in gdb >&2; kill -ABRT $$",
            "killed by SIGABRT: llama-x.cpp:7: GGML_ASSERT(n > 0) failed",
        ),
        ("kill -KILL $$", "killed by SIGKILL: is there too little memory?"),
        ('echo "backtrace: $GGML_NO_BACKTRACE" >&2; exit 1', "backtrace: 1"),
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


@pytest.fixture
def fake_libraries(fake_tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`fake_tools` with what tells one build of llama.cpp from another."""
    put_tool(fake_tools, "llama-bench", "")
    (fake_tools / "libggml-base.so").write_text("a library")
    monkeypatch.setattr("tritrun.variants.in_use", lambda: "x64")
    return fake_tools


def test_a_full_disk_leaves_no_logits(fake_libraries: Path, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    # Like the real program, this one writes too little and says nothing.
    records = ['{"msg": "over 8 chunks"}', '{"msg": "Final estimate: PPL = 9.0 +/- 0.1"}']
    script = 'while [ "$1" != --kl-divergence-base ]; do shift; done; echo _logits_ > "$2"'
    put_tool(fake_libraries, "llama-perplexity", "\n".join([script, *(f"echo '{record}'" for record in records)]))
    logits = tmp_path / "base.logits"
    command = ["perplexity", tiny_model, "-f", text, *OPTIONS, "--base", tiny_model, "--logits", logits]
    assert "is the disk full?" in run(*command, exit_code=1).stderr
    assert {file.name for file in tmp_path.iterdir()} == {"bin", "text.txt"}


def test_tools_are_missing(fake_tools: Path, tiny_model: Path, text: Path) -> None:
    for command in (["perplexity", tiny_model, "-f", text], ["bench", tiny_model]):
        message = run(*command, exit_code=1).stderr
        assert "is missing; `make` installs" in message
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "exit_code", "said"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, "error: ended by SIGTERM\n"),
        (signal.SIGHUP, 129, "error: ended by SIGHUP\n"),
        pytest.param(signal.SIGKILL, -9, "", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only")),
    ],
)
def test_a_signal_ends_the_tool_too(
    fake_tools: Path, tiny_model: Path, text: Path, tmp_path: Path, sent: signal.Signals, exit_code: int, said: str
) -> None:
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
        process.send_signal(sent)
        _, messages = process.communicate(timeout=60)
        assert (process.returncode, messages) == (exit_code, said)
        tool = int(pid_file.read_text())
        while is_running(tool):  # the kernel takes its time to end it after us
            assert time.monotonic() < deadline
            time.sleep(0.05)
    if sent != signal.SIGKILL:  # which leaves no time to clean up
        assert not list(tmp_path.glob(".tritrun-*"))


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has waited for does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc/self").exists()


@pytest.mark.build
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
