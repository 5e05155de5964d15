#!/usr/bin/env python3
"""What blocks below the codebook's range cost: models with small and zero blocks and rows, by each method.

Takes SmolLM2-135M-Instruct, or a random model with the layers of Qwen2.5-0.5B, and plants near-dead rows, rows of
zeros, small blocks and blocks of zeros in some of its matrices. Converts it to TRIT2, as it is and with these matrices
in the fallback, and measures the KL divergence of both. A matrix in the fallback takes 8.5 bits, and has next to no
error: TRIT2 is worse by the share of the planted matrices in the model's error, with small blocks or without.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from command import exit_status
from dither import write_checkpoint
from programs import BUILD, ROOT
from tritconv.errors import TritError
from tritconv.format import BLOCK_SIZE
from tritconv.model_file import Tensor, read_model_file
from tritrun.tools import find_tool

_SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_TRIT2 = GGMLQuantizationType.TRIT2
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


def plant(folder: Path, count: int | None) -> list[str]:
    """Plant small rows and blocks in some matrices of a checkpoint, spread over layers and kinds.

    Args:
        folder: with one file of weights.
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
    matrices = [f"{layer}.{'self_attn' if kind[1] == '_' else 'mlp'}.{kind}" for layer in every for kind in _NAMES]
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
    folder = options.output / f"{options.model}-{'all' if options.matrices is None else options.matrices}"
    checkpoint = folder / "checkpoint"
    listed = folder / "planted.json"
    if not listed.is_file():
        folder.mkdir(exist_ok=True)
        if options.model == "qwen":
            random_qwen(checkpoint)
        else:
            write_checkpoint(_SMOLLM2, checkpoint)
        listed.write_text(json.dumps(plant(checkpoint, options.matrices)), encoding="utf-8")
    planted = json.loads(listed.read_text(encoding="utf-8"))
    base = folder / "F16.gguf"
    if not base.is_file():
        _tritconv(checkpoint, base, "--tensor-depth", ".=f16", "--embed-type", "f16")

    print(f"planted in {', '.join(planted)}")
    print("| method | matrices in TRIT2 | bits | KLD | fallback: bits | KLD | worse by |")
    print("|---|---|---|---|---|---|---|")
    for method in options.method or _METHODS:
        arguments = _arguments(method, base, options)
        fallback = f"^({'|'.join(map(re.escape, planted))})$=q8_0"
        row = [method]
        divergences = []
        for name, rule in ((method, ()), (f"{method}-fallback", ("--tensor-depth", fallback))):
            target = folder / f"{name}.gguf"
            if not target.is_file():
                _tritconv(checkpoint, target, *arguments, *rule)
            matrices = [t for t in read_model_file(target).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
            n_trit = sum(tensor.type is _TRIT2 for tensor in matrices)
            divergences.append(_divergence(target, base, options))
            row += [f"{n_trit} of {len(matrices)}"] if not rule else []
            row += [f"{_bits(matrices):.2f}", f"{divergences[-1]:.5f}"]
        print("|", " | ".join([*row, f"{divergences[0] / divergences[1] - 1:+.2%}"]), "|", flush=True)


def _arguments(method: str, base: Path, options: argparse.Namespace) -> list[object]:
    """What tritconv is given to convert by a method. An imatrix is made where there is none."""
    if method in ("gptq", "tune"):
        epochs = ["--epochs", 1] if method == "tune" else []
        return ["--method", method, "--calibrate", options.calibrate, "--calib-tokens", options.calib_tokens, *epochs]
    if method != "imatrix":
        return ["--method", method]
    imatrix = base.with_name("imatrix.gguf")
    if not imatrix.is_file():
        chunks = max(1, options.calib_tokens // 512)
        _run(find_tool("llama-imatrix"), "-m", base, "-f", options.calibrate, "-o", imatrix, "--chunks", chunks)
    return ["--imatrix", imatrix]


def _tritconv(checkpoint: Path, target: Path, *arguments: object) -> None:
    command = [sys.executable, "-I", "-m", "tritconv", "hf-to-gguf", checkpoint, "--depth", 2, "-o", target]
    _run(*command, *arguments)


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
    parser.add_argument("--method", action="append", choices=_METHODS, help="repeatable (default: all)")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--calib-tokens", type=int, default=8192, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="another text, to evaluate on")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "small-blocks", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
