"""Files that cannot be run: each is one line and exit code 1, in every command, whatever llama.cpp makes of it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import bare_gguf, damaged, string, tensor_entry, u32_entry, write_tiny_model
from typer.testing import CliRunner

from tritconv.cli import app as tritconv
from tritcore.errors import TritError
from tritrun.aborts import failed_check
from tritrun.cli import app
from tritrun.memory import check_memory
from tritrun.models import paths_of, read_text, read_text_model

COMMANDS = [
    ["chat", "-t", "1", "--prompt", "hello", "--max-tokens", "3"],
    ["perplexity", "-t", "1", "--ctx", "64", "--chunks", "2", "--file", __file__],
    ["bench", "-t", "1", "-p", "8", "-n", "2", "-r", "1"],
]
TEXT, BOOL = b"\x08\0\0\0", b"\x07\0\0\0"
NORM = tensor_entry("norm", 0, (8,))


def header(architecture: str | None, *entries: bytes, tensors: bool = True, tokenizer: bool = True) -> bytes:
    """A GGUF file with a tensor of eight zeros, of a model that does not exist."""
    known = [string("general.architecture") + TEXT + string(architecture)] if architecture is not None else []
    known += [string("tokenizer.ggml.model") + TEXT + string("gpt2")] if tokenizer else []
    return bare_gguf([*known, *entries], [NORM] if tensors else [], 32)


NO_MODELS = {
    "an adapter (LoRA): merge it": header("llama", string("general.type") + TEXT + string("adapter")),
    "an importance matrix": header(None, string("general.type") + TEXT + string("imatrix")),
    "the part of a model that sees or hears": header("clip", string("general.type") + TEXT + string("mmproj")),
    "sees or hears: its": header("clip"),
    "its header names no architecture": header(None),
    "a vocabulary without weights": header("llama", tensors=False),
    "with an encoder and a decoder": header("t5"),
    "an encoder alone": header("t5encoder"),
    "an embedding or ranking model": header("bert"),
    "embedding or ranking model: it": header("qwen3", u32_entry("qwen3.pooling_type", 3)),
    "does not write from left to right": header("llada", string("llada.attention.causal") + BOOL + b"\0"),
    "a model without a tokenizer": header("llama", tokenizer=False),
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("reason", NO_MODELS)
def test_what_is_no_text_model_is_named(tmp_path: Path, reason: str, command: list[str]) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(NO_MODELS[reason])
    result = CliRunner().invoke(app, [*command, str(path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path} cannot be run: it is ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_models_that_write_text_pass(tiny_model: Path, tmp_path: Path) -> None:
    assert read_text_model(tiny_model).path == tiny_model
    path = tmp_path / "file.gguf"
    causal = string("qwen3.attention.causal") + BOOL + b"\1"
    path.write_bytes(header("qwen3", u32_entry("qwen3.pooling_type", 0), causal))
    assert read_text_model(path).path == path


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 70_000])
def test_texts_of_any_length_are_read_whole(tmp_path: Path, length: int) -> None:
    text = ("x" * length)[:-1] + "é"
    model = read_text_model(write_tiny_model(tmp_path / "m.gguf", chat_template=text))
    assert read_text(model, "tokenizer.chat_template") == text
    assert read_text(model, "tokenizer.chat_template.tool_use") is None


@pytest.mark.parametrize(
    ("line", "check"),
    [
        ("/src/llama.cpp/ggml/src/ggml.c:12: GGML_ASSERT(n > 0) failed", "ggml.c:12: GGML_ASSERT(n > 0) failed"),
        ("C:\\src\\ggml.c:12: fatal error", "ggml.c:12: fatal error"),
        ("ops.cpp:4144: x\n", "ops.cpp:4144: x"),
        ("llama_model_load: error loading model", None),
        ("[New LWP 12]", None),
        ("", None),
    ],
)
def test_the_line_of_a_failed_check(line: str, check: str | None) -> None:
    assert failed_check(line) == check


CRASH = """
import ctypes, sys, threading
from pathlib import Path
from tritrun.aborts import end_in_one_line
from tritrun.tools import library_folder

end_in_one_line(Path("m[red].gguf"), library_folder())
(base,) = library_folder().glob("libggml-base.*")
ggml, libc = ctypes.CDLL(str(base)), ctypes.CDLL(None)
deeds = {
    "check": lambda: ggml.ggml_abort(b"/a/b/x.cpp", 12, b"bad %s", b"thing"),
    "null": lambda: ctypes.string_at(0),
    "abort": libc.abort,
    "division": lambda: getattr(libc, "raise")(8),
    "terminate": lambda: ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev(),
}
thread = threading.Thread(target=deeds[sys.argv[1]])
thread.start() if "thread" in sys.argv else deeds[sys.argv[1]]()
thread.join()
"""


@pytest.mark.build
@pytest.mark.skipif(sys.platform != "linux", reason="names of libraries")
@pytest.mark.parametrize("thread", [[], ["thread"]], ids=["main", "thread"])
@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("check", "x.cpp:12: bad thing"),
        ("null", "SIGSEGV"),
        ("abort", "SIGABRT"),
        ("division", "SIGFPE"),
        ("terminate", "an exception that nobody catches"),
    ],
)
def test_a_crash_in_c_is_one_line(deed: str, reason: str, thread: list[str]) -> None:
    command = [sys.executable, "-c", CRASH, deed, *thread]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: m[red].gguf: llama.cpp cannot run this model: {reason}; ")
    assert done.stderr.count("\n") == 1


def patch_u32(path: Path, key: str, value: int) -> None:
    """Put another number under a metadata key."""
    data = path.read_bytes()
    at = data.index(string(key)) + len(string(key)) + 4
    path.write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])


def without_layers(path: Path) -> None:
    patch_u32(path, "llama.block_count", 0)


def with_bad_epsilon(path: Path) -> None:
    patch_u32(path, "llama.attention.layer_norm_rms_epsilon", 0x7FC00000)  # NaN


def with_other_layers(path: Path) -> None:
    patch_u32(path, "llama.block_count", 1)


@pytest.mark.build
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_layers, "GGML_ASSERT(hparams.n_layer_all > 0"),
        (with_bad_epsilon, "GGML_ASSERT(eps >= 0.0f)"),
        (with_other_layers, "wrong number of tensors"),
    ],
)
def test_damaged_hyperparameters(
    tmp_path: Path, damage: Callable[[Path], None], reason: str, command: list[str]
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    damage(path)
    if command[0] == "chat":  # which llama.cpp is in, so that it ends too
        line = [sys.executable, "-m", "tritrun", *command, str(path)]
        chat = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        found = chat.returncode, chat.stdout, chat.stderr
    else:
        result = CliRunner().invoke(app, [*command, str(path)])
        found = result.exit_code, result.stdout, result.stderr
    assert found[:2] == (1, "")
    assert reason in found[2]
    assert found[2].count("\n") == 1


@pytest.mark.build
@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda command: command[0])
def test_damaged_weights(tmp_path: Path, command: list[str]) -> None:
    path = damaged(write_tiny_model(tmp_path / "m.gguf"))
    result = CliRunner().invoke(app, [*command, str(path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tensor 'output.weight' has invalid data" in result.stderr
    assert result.stderr.count("\n") == 1
    if command[0] == "chat":
        assert "--no-check" in result.stderr
        assert CliRunner().invoke(app, [*command, "--no-check", str(path)]).exit_code == 0


@pytest.mark.build
@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda command: command[0])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_damaged_trit_blocks(f16_trit: Callable[[int], Path], depth: int, command: list[str]) -> None:
    path = f16_trit(depth)
    assert CliRunner().invoke(app, [*command, str(path)]).exit_code == 0
    model = read_text_model(path)
    tensor = next(tensor for tensor in model.tensors if tensor.name == "blk.1.ffn_up.weight")
    assert tensor.type.name == f"TRIT{depth}"
    with path.open("r+b") as file:
        file.seek(model.data_start + tensor.offset + tensor.n_bytes // 4 * 2)
        file.write(b"\1\0" * 8)  # words that stand for no trits
    result = CliRunner().invoke(app, [*command, str(path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tensor 'blk.1.ffn_up.weight' has invalid data" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def f16_trit(tiny_model: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Converts the tiny model to TRIT of some depth."""

    def convert(depth: int) -> Path:
        path = tmp_path / f"TRIT{depth}.gguf"
        result = CliRunner().invoke(
            tritconv, ["gguf-to-gguf", str(tiny_model), "--fast", "--depth", str(depth), "-o", str(path)]
        )
        assert result.exit_code == 0, result.output
        return path

    return convert


def split_in_two(source: Path, folder: Path) -> list[Path]:
    """Write a model as two files, as llama-gguf-split does."""
    reader = gguf.GGUFReader(source)
    paths = [folder / f"{source.stem}-{n:05}-of-00002.gguf" for n in (1, 2)]
    half = len(reader.tensors) // 2
    for number, (path, tensors) in enumerate(zip(paths, (reader.tensors[:half], reader.tensors[half:]), strict=True)):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    element = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], element)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_the_parts_of_a_model_are_one(tiny_model: Path, tmp_path: Path) -> None:
    first, second = split_in_two(tiny_model, tmp_path)
    whole = read_text_model(tiny_model)
    for path in (first, second):
        model = read_text_model(path)
        assert model.path == first
        assert model.size == first.stat().st_size + second.stat().st_size
        assert {tensor.name for tensor in model.tensors} == {tensor.name for tensor in whole.tensors}
        assert model.bits_per_weight == whole.bits_per_weight
        assert paths_of(model) == [first, second]
        with pytest.raises(TritError, match="does not fit into memory"):
            check_memory(model, 1, first.stat().st_size + 1000)
    second.unlink()
    with pytest.raises(TritError, match=r"tiny-00002-of-00002\.gguf is not beside it"):
        read_text_model(first)


@pytest.mark.build
def test_a_model_in_parts_runs_from_any_of_them(tiny_model: Path, tmp_path: Path) -> None:
    _, second = split_in_two(tiny_model, tmp_path)
    whole, split = (CliRunner().invoke(app, [*COMMANDS[0], "--temp", "0", str(path)]) for path in (tiny_model, second))
    assert split.exit_code == 0, split.stderr
    assert split.stdout == whole.stdout
    for command in COMMANDS[1:]:
        result = CliRunner().invoke(app, [*command, str(second)])
        assert result.exit_code == 0, result.stderr
