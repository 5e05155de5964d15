"""GGUF models with random weights, for measuring speed: they run as trained ones do, and need no download.

A file is written straight, one matrix in memory at a time.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_TRAINED_CONTEXT = 4096


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        architecture: "llama" or "qwen2"; qwen2 adds biases to queries, keys and values.
        hidden: row length of most matrices, heads * head size.
        vocabulary: tokens, 259 or more: three special ones, the 256 bytes, the rest are fillers.
        tied: the token embeddings serve as the output matrix too.
    """

    architecture: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and (rows, row length) of each matrix, in the order of the file."""
        kv_hidden = self.hidden // self.heads * self.kv_heads
        yield "token_embd", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            yield f"blk.{layer}.attn_q", (self.hidden, self.hidden)
            yield f"blk.{layer}.attn_k", (kv_hidden, self.hidden)
            yield f"blk.{layer}.attn_v", (kv_hidden, self.hidden)
            yield f"blk.{layer}.attn_output", (self.hidden, self.hidden)
            yield f"blk.{layer}.ffn_gate", (self.feed_forward, self.hidden)
            yield f"blk.{layer}.ffn_up", (self.feed_forward, self.hidden)
            yield f"blk.{layer}.ffn_down", (self.hidden, self.feed_forward)
        if not self.tied:
            yield "output", (self.vocabulary, self.hidden)

    def vectors(self) -> Iterator[tuple[str, int]]:
        """Name and length of each norm and bias."""
        yield "output_norm.weight", self.hidden
        for layer in range(self.layers):
            yield f"blk.{layer}.attn_norm.weight", self.hidden
            yield f"blk.{layer}.ffn_norm.weight", self.hidden
            if self.architecture == "qwen2":
                kv_hidden = self.hidden // self.heads * self.kv_heads
                yield f"blk.{layer}.attn_q.bias", self.hidden
                yield f"blk.{layer}.attn_k.bias", kv_hidden
                yield f"blk.{layer}.attn_v.bias", kv_hidden


def write_random_model(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a model with float16 matrices; `path` appears when it is whole.

    The weights are Gaussian with a deviation of 1 / sqrt(row length), as initialized models have it: activations
    keep their size from layer to layer. Norms are 1, biases 0.

    Raises:
        OSError: the file cannot be written.
    """
    writer = gguf.GGUFWriter(None, shape.architecture)
    _add_metadata(writer, shape)
    _add_tokenizer(writer, shape.vocabulary)
    for name, length in shape.vectors():
        writer.add_tensor_info(name, (length,), np.dtype(np.float32), 4 * length)
    for name, (rows, columns) in shape.matrices():
        writer.add_tensor_info(f"{name}.weight", (rows, columns), np.dtype(np.float16), 2 * rows * columns)

    partial = path.with_name(f".{path.name}.part")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, length in shape.vectors():
            writer.write_tensor_data(np.full(length, 0 if name.endswith(".bias") else 1, np.float32))
        rng = np.random.default_rng(seed)
        for _, (rows, columns) in shape.matrices():
            weights = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns) ** 0.5
            writer.write_tensor_data(weights.astype(np.float16))
        writer.flush()
        writer.close()
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return path


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"random {shape.architecture}, {shape.hidden}/{shape.feed_forward} x {shape.layers}")
    writer.add_context_length(_TRAINED_CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """A tokenizer that reads any text as bytes."""
    fillers = vocabulary - len(_SPECIAL_TOKENS) - len(_BYTE_TOKENS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*_SPECIAL_TOKENS, *_BYTE_TOKENS, *(f"<filler {i}>" for i in range(fillers))])
    writer.add_token_scores([0.0] * vocabulary)
    control, byte, unused = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.UNUSED
    types = [control] * len(_SPECIAL_TOKENS) + [byte] * len(_BYTE_TOKENS) + [unused] * fillers
    writer.add_token_types(types)
    writer.add_bos_token_id(_SPECIAL_TOKENS.index("<s>"))
    writer.add_eos_token_id(_SPECIAL_TOKENS.index("</s>"))
