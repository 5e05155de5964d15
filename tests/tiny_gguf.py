"""Tiny GGUF files for tests: a Llama with random weights that llama.cpp loads, and bare headers."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, LAYERS, TRAINED_CONTEXT = 64, 4, 2, 32768
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"

_CONTROL_TOKENS = ["<unk>", "<s>", "</s>"]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTER_TOKENS = ["▁", *(chr(code) for code in range(0x21, 0x7F))]
TOKENS = _CONTROL_TOKENS + _BYTE_TOKENS + _LETTER_TOKENS


def write_tiny_model(
    path: Path,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    templates: dict[str, str] | None = None,
    seed: int = 0,
    noise: float = 0,
    hidden: int = HIDDEN,
) -> Path:
    """Write a Llama with random float16 matrices; its greedy answers are letters without end.

    Args:
        chat_template: Jinja template, None for none.
        templates: more of them, by name.
        seed: of the weights.
        noise: relative error of the weights, for a poor copy of the model with the same seed.
        hidden: row length of most matrices; the feed-forward layers are twice as wide.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(TRAINED_CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    control, byte, normal = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL
    writer.add_token_types([control] * 3 + [byte] * 256 + [normal] * len(_LETTER_TOKENS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, template in (templates or {}).items():
        writer.add_string(f"tokenizer.chat_template.{name}", template)
    for name, weights in _weights(seed, noise, hidden).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_adapter(path: Path, *, scale: float = 1.0, architecture: str = "llama", hidden: int = HIDDEN) -> Path:
    """Write a LoRA of rank 4 for the output projections of attention of a tiny model."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(7)
    for layer in range(LAYERS):
        name = f"blk.{layer}.attn_output.weight"
        writer.add_tensor(f"{name}.lora_a", rng.normal(0, scale, (4, hidden)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", rng.normal(0, scale, (hidden, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_projector(path: Path, *, hidden: int = HIDDEN) -> Path:
    """Write the eyes of a tiny LLaVA: a vision transformer with random weights, and a projector of two layers."""
    width, ff, image, patch = 32, 64, 28, 14
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    numbers = {"image_size": image, "patch_size": patch, "embedding_length": width, "feed_forward_length": ff}
    numbers |= {"projection_dim": hidden, "block_count": 2, "attention.head_count": 2}
    for key, value in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    rng = np.random.default_rng(3)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 1, shape).astype(np.float32))

    add("v.patch_embd.weight", width, 3, patch, patch)
    add("v.position_embd.weight", (image // patch) ** 2 + 1, width)
    add("v.class_embd", width)
    norms = ["v.pre_ln", *(f"v.blk.{layer}.ln{n}" for layer in range(2) for n in (1, 2))]
    matrices = {"mm.0": (hidden, width), "mm.2": (hidden, hidden)}
    for layer in range(2):
        matrices |= {f"v.blk.{layer}.attn_{role}": (width, width) for role in ("q", "k", "v", "out")}
        matrices |= {f"v.blk.{layer}.ffn_up": (ff, width), f"v.blk.{layer}.ffn_down": (width, ff)}
    for name, shape in {**dict.fromkeys(norms, (width,)), **matrices}.items():
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def damaged(path: Path) -> Path:
    """Make a weight of output.weight a NaN."""
    reader = gguf.GGUFReader(path)
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "output.weight")
    start = int(tensor.data_offset)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff\x7f")
    return path


def _weights(seed: int, noise: float, hidden: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    noise_rng = np.random.default_rng(seed + 1)

    def matrix(rows: int, columns: int, scale: float = 0.1) -> np.ndarray:
        weights = rng.normal(0, scale, (rows, columns))
        return (weights * (1 + noise * noise_rng.normal(0, 1, weights.shape))).astype(np.float16)

    def norm() -> np.ndarray:
        return np.ones(hidden, np.float32)

    output = matrix(len(TOKENS), hidden, 0.5)
    output[: len(TOKENS) - len(_LETTER_TOKENS)] = 0
    tensors = {
        "token_embd.weight": matrix(len(TOKENS), hidden, 1.0),
        "output.weight": output,
        "output_norm.weight": norm(),
    }
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            f"blk.{layer}.attn_q.weight": matrix(hidden, hidden),
            f"blk.{layer}.attn_k.weight": matrix(hidden // 2, hidden),
            f"blk.{layer}.attn_v.weight": matrix(hidden // 2, hidden),
            f"blk.{layer}.attn_output.weight": matrix(hidden, hidden),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(2 * hidden, hidden),
            f"blk.{layer}.ffn_up.weight": matrix(2 * hidden, hidden),
            f"blk.{layer}.ffn_down.weight": matrix(hidden, 2 * hidden),
        }
    return tensors


def string(text: str | bytes) -> bytes:
    """A GGUF string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


_CODES = dict(zip(gguf.GGUFValueType, "BbHhIif?__Qqd", strict=True))


def _packed(value_type: gguf.GGUFValueType, value: Any) -> bytes:
    return string(value) if value_type is gguf.GGUFValueType.STRING else struct.pack(f"<{_CODES[value_type]}", value)


def entry(key: str, value_type: gguf.GGUFValueType, value: Any) -> bytes:
    """A metadata entry with one value, of any type but a list."""
    return string(key) + struct.pack("<I", value_type) + _packed(value_type, value)


def list_entry(key: str, element_type: gguf.GGUFValueType, values: Sequence[Any]) -> bytes:
    """A metadata entry with a list."""
    head = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, element_type, len(values))
    return string(key) + head + b"".join(_packed(element_type, value) for value in values)


def u32_entry(key: str, value: int) -> bytes:
    """A metadata entry with a uint32."""
    return entry(key, gguf.GGUFValueType.UINT32, value)


def tensor_entry(name: str | bytes, type_id: int, shape: tuple[int, ...], offset: int = 0) -> bytes:
    """An entry of the tensor table; `shape` has the row length first."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def bare_gguf(entries: list[bytes], tensors: list[bytes], n_data: int = 0, version: int = 3) -> bytes:
    """A GGUF file of ready-made entries with `n_data` zero bytes of tensor data."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + bytes(n_data)
