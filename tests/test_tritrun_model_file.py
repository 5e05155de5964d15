"""GGUF headers: right ones are read, all others are refused in one line; the memory that a model needs."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import (
    HEADS,
    HIDDEN,
    LAYERS,
    TOKENS,
    TRAINED_CONTEXT,
    bare_gguf,
    string,
    tensor_entry,
    u32_entry,
)

from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun.memory import check_memory, kv_cache_bytes, layers_that_fit, n_layers

TRIT3, TRIT3_BLOCK = 87, 42
NORM_OFFSET = 192  # 4 blocks, and up to the next multiple of 32
TRIT_VERSION = u32_entry("trit.format_version", 1)
VALID = bare_gguf(
    [string("general.architecture") + struct.pack("<I", 8) + string("llama"), TRIT_VERSION],
    [
        tensor_entry("blk.0.attn_q.weight", TRIT3, (128, 2)),
        tensor_entry("norm.weight", 0, (64,), NORM_OFFSET),
    ],
    n_data=NORM_OFFSET + 256,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read(path: Path, content: bytes) -> str:
    """The error that reading `content` gives."""
    path.write_bytes(content)
    with pytest.raises(TritError) as caught:
        read_model_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_tiny_model(tiny_model: Path) -> None:
    model = read_model_file(tiny_model)
    assert (model.name, model.main_type) == ("Tiny", "F16")
    assert (model.trained_context, model.vocabulary_size) == (TRAINED_CONTEXT, len(TOKENS))
    assert model.size == tiny_model.stat().st_size
    assert 16 < model.bits_per_weight < 16.2  # float16 matrices and a few float32 norms
    head_size = HIDDEN // HEADS
    assert kv_cache_bytes(model, 100) == 100 * LAYERS * (HEADS // 2) * 2 * head_size * 2


def test_trit_model(path: Path) -> None:
    path.write_bytes(VALID)
    model = read_model_file(path)
    assert model.main_type == "TRIT3"
    assert [tensor.n_bytes for tensor in model.tensors] == [4 * TRIT3_BLOCK, 256]


def test_trit_tensors_without_a_version_are_version_1(path: Path) -> None:
    path.write_bytes(bare_gguf([], [tensor_entry("w", TRIT3, (64,))], n_data=TRIT3_BLOCK))
    assert read_model_file(path).main_type == "TRIT3"


@pytest.mark.parametrize("version", [0, 2, 77])
def test_unknown_trit_version(path: Path, version: int) -> None:
    content = bare_gguf([u32_entry("trit.format_version", version)], [tensor_entry("w", TRIT3, (64,))], TRIT3_BLOCK)
    assert f"TRIT format version {version} is not known, only 1" in read(path, content)


def test_unknown_tensor_type(path: Path) -> None:
    content = bare_gguf([], [tensor_entry("blk.7.ffn_up.weight", 89, (64,))], 64)
    assert "tensor 'blk.7.ffn_up.weight' has the unknown type 89" in read(path, content)


def test_no_such_file(path: Path) -> None:
    with pytest.raises(TritError, match="no such file"):
        read_model_file(path)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(TritError, match="not a regular file"):
        read_model_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4 a zip file"])
def test_not_gguf(path: Path, content: bytes) -> None:
    assert "not a GGUF file" in read(path, content)


def test_gguf_versions(path: Path) -> None:
    assert "GGUF version 1 is not supported" in read(path, bare_gguf([], [], version=1))
    assert "big-endian GGUF is not supported" in read(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    path.write_bytes(bare_gguf([], [], version=2))
    assert read_model_file(path).tensors == ()


def test_truncated_data(path: Path) -> None:
    message = read(path, VALID[:-1])
    assert f"truncated: tensor 'norm.weight' ends at byte {len(VALID)}, the file at byte {len(VALID) - 1}" in message


@given(cut=st.integers(0, len(VALID) - 1))
def test_every_truncation_is_reported(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    read(tmp_path_factory.getbasetemp() / "cut.gguf", VALID[:cut])


@settings(max_examples=500)
@given(at=st.integers(0, len(VALID) - 1), flip=st.integers(1, 255))
def test_a_flipped_byte_gives_a_model_or_an_error(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(VALID[:at] + bytes([VALID[at] ^ flip]) + VALID[at + 1 :])
    try:
        model = read_model_file(path)
    except TritError:
        return
    check_memory(model, 4096, None)
    assert model.bits_per_weight >= 0
    assert model.main_type


def test_memory(tiny_model: Path) -> None:
    model = read_model_file(tiny_model)
    needed = model.size + kv_cache_bytes(model, 4096)
    check_memory(model, 4096, needed)
    check_memory(model, 4096, None)
    check_memory(model, 4096, 0, on_gpu=1.0)
    with pytest.raises(TritError, match=r"does not fit into memory: it needs .* for a context of 4096"):
        check_memory(model, 4096, needed - 1)


def test_layers_that_fit_a_gpu(tiny_model: Path) -> None:
    model = read_model_file(tiny_model)
    assert n_layers(model) == LAYERS + 1
    spare = 1 << 30
    layer = (model.size + kv_cache_bytes(model, 64)) / (LAYERS + 1)
    free = [0, spare, spare + int(1.5 * layer), spare + 100 * model.size]
    assert [layers_that_fit(model, 64, one) for one in free] == [0, 0, 1, LAYERS + 1]


def test_kv_heads_per_layer(path: Path) -> None:
    heads = string("x.attention.head_count_kv") + struct.pack("<IIQ3I", 9, 4, 3, 2, 0, 1)
    architecture = string("general.architecture") + struct.pack("<I", 8) + string("x")
    sizes = [u32_entry(f"x.{key}", n) for key, n in (("block_count", 3), ("attention.key_length", 8))]
    path.write_bytes(bare_gguf([architecture, heads, *sizes, u32_entry("x.attention.value_length", 4)], []))
    assert kv_cache_bytes(read_model_file(path), 10) == 10 * (2 + 0 + 1) * (8 + 4) * 2


def test_heads_per_layer(path: Path) -> None:
    heads = string("x.attention.head_count") + struct.pack("<IIQ3I", 9, 4, 3, 2, 4, 4)
    architecture = string("general.architecture") + struct.pack("<I", 8) + string("x")
    sizes = [u32_entry(f"x.{key}", n) for key, n in (("block_count", 3), ("embedding_length", 16))]
    path.write_bytes(bare_gguf([architecture, heads, *sizes], []))
    assert kv_cache_bytes(read_model_file(path), 10) == 10 * (2 + 4 + 4) * (8 + 8) * 2
