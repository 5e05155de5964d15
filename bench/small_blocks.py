#!/usr/bin/env python3
"""What blocks below the codebook's range cost: models with small and zero blocks and rows, by each method.

Takes SmolLM2-135M-Instruct, or a random model with the layers of Qwen2.5-0.5B, and plants near-dead rows, rows of
zeros, small blocks and blocks of zeros in some of its matrices. Converts it to TRIT2 by each method, and measures the
KL divergence three times over:

- with small blocks as they are stored, and exact, in float16 both: what the lower end of the codebook costs;
- of the file as it is;
- of the same with the planted matrices in Q8_0, as they would be if a small block sent its matrix to the fallback. That
  takes more bits, and what TRIT2 loses in the large blocks of these matrices is not lost.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from command import exit_status
from dither import write_checkpoint
from programs import BUILD, ROOT
from tritcore.codec import unpack
from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE, BYTES_PER_BLOCK
from tritcore.gguf_header import Tensor, read_model_file
from tritrun.tools import find_tool

_SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_TRIT2 = GGMLQuantizationType.TRIT2
_LEAST = 4 * 2 ** (3 - 80 / 6)  # the largest weight of a TRIT2 block, or it is below the range
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_METHODS = ("search", "imatrix", "gptq", "tune", "uniform")

# shares of the rows and blocks of a planted matrix
_SMALL_ROWS, _ZERO_ROWS, _SMALL_BLOCKS, _ZERO_BLOCKS = 0.02, 0.005, 0.02, 0.01
_SMALLEST = -20  # exponent of 2: of what small rows and blocks are multiplied by


def random_qwen(target: Path) -> None:
    """Write a checkpoint of random weights: the layers of Qwen2.5-0.5B, the vocabulary of SmolLM2."""
    import torch  # this and transformers take seconds to load
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(_SMOLLM2.parent, gguf_file=_SMOLLM2.name)
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.float16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def plant(folder: Path, kinds: Sequence[str], count: int | None) -> list[str]:
    """Plant small rows and blocks in some matrices of a checkpoint, spread over its layers.

    Args:
        folder: with one file of weights.
        kinds: of the matrices, of `_NAMES`.
        count: of the matrices; None for all.

    Returns:
        The names of their GGUF tensors.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    every = [f"model.layers.{layer}" for layer in range(layers)]
    matrices = [f"{layer}.{'self_attn' if kind[1] == '_' else 'mlp'}.{kind}" for layer in every for kind in kinds]
    if count is not None:
        matrices = [matrices[i * (len(matrices) - 1) // max(count - 1, 1)] for i in range(count)]
    for number, name in enumerate(matrices):
        weights = tensors[f"{name}.weight"].float().numpy()
        tensors[f"{name}.weight"] = torch.from_numpy(_planted(weights, number)).to(torch.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    return [f"blk.{name.split('.')[2]}.{_NAMES[name.rpartition('.')[2]]}.weight" for name in matrices]


def _planted(weights: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = weights.reshape(len(weights), -1, BLOCK_SIZE)
    n_rows, n_blocks = blocks.shape[:2]
    for small, zero, shape in (
        (_SMALL_ROWS, _ZERO_ROWS, (n_rows, 1, 1)),
        (_SMALL_BLOCKS, _ZERO_BLOCKS, (n_rows, n_blocks, 1)),
    ):
        chosen = rng.random(shape)
        sizes = np.exp2(rng.uniform(_SMALLEST, 0, shape))
        blocks = blocks * np.where(chosen < zero, 0, np.where(chosen < zero + small, sizes, 1))
    return blocks.reshape(weights.shape)


def main() -> None:
    """Make what is missing, convert, measure, and print the figures."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    kinds = "-".join(options.kind or ["matrices"])
    folder = options.output / f"{options.model}-{'all' if options.matrices is None else options.matrices}-{kinds}"
    checkpoint = folder / "checkpoint"
    listed = folder / "planted.json"
    if not listed.is_file():
        folder.mkdir(exist_ok=True)
        if options.model == "qwen":
            random_qwen(checkpoint)
        else:
            write_checkpoint(_SMOLLM2, checkpoint)
        listed.write_text(json.dumps(plant(checkpoint, options.kind or [*_NAMES], options.matrices)), encoding="utf-8")
    planted = json.loads(listed.read_text(encoding="utf-8"))
    base = folder / "F16.gguf"
    if not base.is_file():
        _tritconv(checkpoint, base, "--fast", "--tensor-depth", ".=f16", "--embed-type", "f16")

    print(f"planted in {', '.join(planted)}")
    print("| method | matrices in TRIT2 | small blocks cost | bits | KLD | fallback: bits | KLD | worse by |")
    print("|---|---|---|---|---|---|---|---|")
    for method in options.method or _METHODS:
        arguments = _arguments(method, base, options)
        fallback = f"^({'|'.join(map(re.escape, planted))})$=q8_0"
        target, in_fallback = folder / f"{method}.gguf", folder / f"{method}-fallback.gguf"
        if not target.is_file():
            _tritconv(checkpoint, target, *arguments)
        if not in_fallback.is_file():
            _tritconv(checkpoint, in_fallback, *arguments, "--tensor-depth", fallback)
        stored, exact = (_decoded(target, base, exact=exact) for exact in (False, True))
        files = (stored, exact, target, in_fallback)
        as_stored, if_exact, ours, others = (_divergence(path, base, options) for path in files)
        matrices, mixed = _matrices(target), _matrices(in_fallback)
        n_trit = sum(tensor.type is _TRIT2 for tensor in matrices)
        row = [method, f"{n_trit} of {len(matrices)}", f"{as_stored / if_exact - 1:+.2%}"]
        row += [f"{_bits(matrices):.2f}", f"{ours:.4f}", f"{_bits(mixed):.2f}", f"{others:.4f}"]
        print("|", " | ".join([*row, f"{ours / others - 1:+.2%}"]), "|", flush=True)


def _arguments(method: str, base: Path, options: argparse.Namespace) -> list[object]:
    """What tritconv is given to convert by a method. An imatrix is made where there is none."""
    if method in ("gptq", "tune"):
        epochs = ["--epochs", 1] if method == "tune" else []
        return ["--method", method, "--calibrate", options.calibrate, "--calib-tokens", options.calib_tokens, *epochs]
    if method != "imatrix":
        return ["--method", method]
    imatrix = base.with_name("importances.gguf")
    if not imatrix.is_file():
        chunks = max(1, options.calib_tokens // 512)
        _run(find_tool("llama-imatrix"), "-m", base, "-f", options.calibrate, "-o", imatrix, "--chunks", chunks)
    return ["--imatrix", imatrix]


def _tritconv(checkpoint: Path, target: Path, *arguments: object) -> None:
    command = [sys.executable, "-I", "-m", "tritconv", "hf-to-gguf", checkpoint, "--depth", 2, "-o", target]
    command += ["--embed-type", "q8_0"]
    # transformers gives SmolLM2's tokenizer the pre-tokenizer of its own Qwen2 class, which has no name
    command += ["--pre", "smollm"] if "qwen" in checkpoint.parent.name else []
    _run(*command, *arguments)


def _matrices(model: Path) -> list[Tensor]:
    """The matrices of a file's layers."""
    return [t for t in read_model_file(model).tensors if t.name.startswith("blk.") and len(t.shape) == 2]


def _decoded(model: Path, base: Path, *, exact: bool) -> Path:
    """Write a copy of the base with the TRIT2 matrices of a file, decoded; small blocks stay the base's, if exact."""
    target = model.with_name(f"{model.stem}-{'exact' if exact else 'stored'}.gguf")
    if target.is_file():
        return target
    partial = target.with_suffix(".part")
    shutil.copyfile(base, partial)
    source, right = read_model_file(model), read_model_file(base)
    places = {tensor.name: right.data_start + tensor.offset for tensor in right.tensors}
    with partial.open("r+b") as file:
        for tensor in _matrices(model):
            if tensor.type is not _TRIT2:
                continue
            data = np.fromfile(model, np.uint8, tensor.n_bytes, offset=source.data_start + tensor.offset)
            blocks = unpack(2, data.reshape(-1, BYTES_PER_BLOCK[2])).decode().astype(np.float16)
            place = places[tensor.name]
            if exact:
                wanted = np.fromfile(base, np.float16, blocks.size, offset=place).reshape(blocks.shape)
                small = np.abs(wanted).max(axis=1) < _LEAST
                blocks[small] = wanted[small]
            file.seek(place)
            file.write(blocks.tobytes())
    return partial.rename(target)


def _bits(matrices: list[Tensor]) -> float:
    """Bits per weight."""
    return 8 * sum(tensor.n_bytes for tensor in matrices) / sum(math.prod(tensor.shape) for tensor in matrices)


def _divergence(model: Path, base: Path, options: argparse.Namespace) -> float:
    """The mean KL divergence of a file."""
    report = model.with_suffix(".json")
    if not report.is_file():
        files = ["--file", options.text, "--chunks", options.chunks, "--logits", base.with_suffix(".logits")]
        command = [sys.executable, "-I", "-m", "tritrun", "perplexity", model, "--base", base, "--json", report]
        _run(*command, *files)
    return float(json.loads(report.read_text(encoding="utf-8"))["divergence"]["mean"]["value"])


def _run(*command: object) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], stdout=sys.stderr, check=False)
    if done.returncode:
        raise TritError(f"{' '.join(map(str, command[:5]))} .. failed with exit code {done.returncode}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "qwen"), default="smollm2", help="(default: %(default)s)")
    parser.add_argument("--matrices", type=int, metavar="N", help="plant in so many (default: in all)")
    parser.add_argument("--kind", action="append", choices=_NAMES, help="plant in these; repeatable (default: any)")
    parser.add_argument("--method", action="append", choices=_METHODS, help="repeatable (default: all)")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--calib-tokens", type=int, default=8192, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="another text, to evaluate on")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "small-blocks", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
