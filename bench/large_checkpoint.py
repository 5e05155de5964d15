#!/usr/bin/env python3
"""Hugging Face checkpoints with the layer shapes of large models and random weights, to measure memory and time.

A checkpoint has the architecture of Qwen2, bfloat16 weights in sharded safetensors files, an index, a configuration and
a small SentencePiece tokenizer. Configuration, embeddings and lm_head have the true size of the vocabulary; the
tokenizer uses the first PIECES rows of it. Tensors are written one chunk of rows at a time, so memory does not depend
on the shape. Untied embeddings beyond the tokenizer's rows are zeros that take no room on the disk.

    bench/large_checkpoint.py --preset qwen2.5-32b --layers 3 -o build/bench/qwen2.5-32b-3
"""

import argparse
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics

import sentencepiece
import torch

from command import exit_status
from tritcore import sizes
from tritcore.console import out
from tritcore.errors import TritError

PIECES = 2000  # of the tokenizer, as many as the documentation that Python brings gives with ease
_CHUNK = 1 << 24  # weights in memory at a time
_OUTLIERS = 0.002  # share of columns, and of the weights of a norm, that are _OUTLIER times as large
_OUTLIER = 8.0
_HEAD_GAIN = 3.0  # standard deviation of the logits: predictions are neither even nor certain
_BIAS = 0.5  # standard deviation of the biases of queries, keys and values


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model. `tied`: the token embeddings serve as lm_head too."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    tied: bool = False

    def config(self) -> dict[str, object]:
        """The contents of config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator["_Tensor"]:
        """All tensors, in the order of the files."""
        head = _HEAD_GAIN / self.hidden**0.5
        rows = self.vocabulary if self.tied else min(PIECES, self.vocabulary)
        yield _Tensor("model.embed_tokens.weight", (self.vocabulary, self.hidden), head, filled=rows)
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}")
        yield _Tensor("model.norm.weight", (self.hidden,))
        if not self.tied:
            yield _Tensor("lm_head.weight", (self.vocabulary, self.hidden), head)

    def _layer(self, prefix: str) -> Iterator["_Tensor"]:
        kv_width = self.hidden // self.heads * self.kv_heads
        yield _Tensor(f"{prefix}.input_layernorm.weight", (self.hidden,))
        for name, rows in (("q", self.hidden), ("k", kv_width), ("v", kv_width)):
            yield _Tensor(f"{prefix}.self_attn.{name}_proj.bias", (rows,), _BIAS)
        matrices = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for name, shape in matrices.items():
            yield _Tensor(f"{prefix}.{name}.weight", shape, shape[1] ** -0.5)
        yield _Tensor(f"{prefix}.post_attention_layernorm.weight", (self.hidden,))


PRESETS = {
    "qwen2.5-32b": Shape(5120, 27648, 40, 8, 152064, 64),
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 151936, 24, tied=True),
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be made.

    Attributes:
        shape: (rows, columns) of a matrix, (length,) of a vector.
        std: standard deviation; 0 for the weights of a norm, which are 1 except for the outliers.
        filled: the rows that have weights; None stands for all. The others are zeros.
    """

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    filled: int | None = None

    @property
    def n_bytes(self) -> int:
        return 2 * torch.Size(self.shape).numel()

    def chunks(self, random: torch.Generator) -> Iterator[torch.Tensor]:
        """The rows that are not zeros, in order, as bfloat16 tensors of at most about _CHUNK weights."""
        columns = self.shape[-1]
        gain = torch.ones(columns)
        if len(self.shape) == 2 or not self.std:
            gain[torch.rand(columns, generator=random) < _OUTLIERS] = _OUTLIER
        if not self.std:
            yield gain.to(torch.bfloat16)
            return
        left = 1 if len(self.shape) == 1 else self.shape[0] if self.filled is None else self.filled
        while left:
            rows = min(left, max(1, _CHUNK // columns))
            chunk = torch.randn(rows, columns, generator=random)
            yield chunk.mul_(gain).mul_(self.std).to(torch.bfloat16)
            left -= rows


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0, shard_bytes: int = 4 * 10**9) -> Path:
    """Write a checkpoint; `folder` appears when it is whole.

    Args:
        folder: must not exist.
        shard_bytes: the size that a weight file may have; a larger tensor has a file of its own.

    Raises:
        TritError: the folder exists, the shape is impossible, or a file cannot be written.
    """
    if folder.exists():
        raise TritError(f"{folder} exists: delete it, or name another folder with -o")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        raise TritError(
            f"hidden size {shape.hidden}, {shape.heads} heads, {shape.kv_heads} of them for keys: no multiples"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write_tokenizer(partial, shape.vocabulary)
            _write_weights(partial, shape, seed, shard_bytes)
            (partial / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise TritError(f"{folder}: {error.strerror}: choose another folder with -o") from error
    return folder


def _write_weights(folder: Path, shape: Shape, seed: int, shard_bytes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shards: list[list[_Tensor]] = [[]]
    for tensor in shape.tensors():
        if shards[-1] and sum(other.n_bytes for other in shards[-1]) + tensor.n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, random)
        places |= {tensor.name: name for tensor in tensors}
    index = {"metadata": {"total_size": sum(tensor.n_bytes for tensor in shape.tensors())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: Sequence[_Tensor], random: torch.Generator) -> None:
    """Write a safetensors file by hand: the library's writer wants whole tensors in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + tensor.n_bytes]}
        end += tensor.n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            start = file.tell()
            for chunk in tensor.chunks(random):
                file.write(chunk.view(torch.int16).numpy().data)
            file.seek(start + tensor.n_bytes)
        file.truncate()


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a SentencePiece tokenizer that knows every byte, trained on the documentation that Python brings."""
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(topics.topics.values()).splitlines()),
            model_writer=file,
            vocab_size=min(PIECES, vocabulary),
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `shape` is the preset's with the sizes that are given besides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="qwen2.5-32b", help="shape (default: %(default)s)")
    for name in ("hidden", "intermediate", "heads", "kv-heads", "vocabulary", "layers"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="embeddings serve as lm_head too")
    parser.add_argument("--shard-size", default="4GB", metavar="SIZE", help="of a weight file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help="to be made")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in PRESETS[options.preset].__dataclass_fields__}
    options.shape = replace(PRESETS[options.preset], **{name: size for name, size in given.items() if size is not None})
    options.shard_bytes = sizes.parse(options.shard_size)
    if not options.shard_bytes:
        parser.error(f"--shard-size {options.shard_size} is no size: write 4GB")
    return options


def main() -> None:
    """Make the checkpoint that the command line names."""
    options = parse()
    folder = write_checkpoint(options.output, options.shape, options.seed, options.shard_bytes)
    files = [path.stat() for path in folder.iterdir()]
    total, on_disk = sum(file.st_size for file in files), 512 * sum(file.st_blocks for file in files)
    out.print(f"{folder}: {sizes.show(total)}, {sizes.show(on_disk)} on the disk", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
