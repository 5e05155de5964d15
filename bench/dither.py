#!/usr/bin/env python3
"""The base model of the quality comparisons: SmolLM2-135M-Instruct without the lattice of its published file.

The published GGUF file is Q4_1: each block of 32 weights has 16 levels, a step apart. Types of 4 and 5 bits reproduce
such levels almost exactly, so they would be compared with themselves. Here every weight that the source stores in Q4_1
gets uniform noise, one step of its block wide: nothing of the lattice is left, and the error is what an ideal
rounding to such steps makes. Weights in other types stay.

Writes a checkpoint folder and a GGUF file of the same float16 weights: base-hf and base-F16.gguf; with --no-noise,
the published weights as plain-hf and plain-F16.gguf.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from command import exit_status
from programs import ROOT
from tritconv.plan import Plan
from tritconv.sources.gguf import open_gguf
from tritconv.sources.source import Kind, SourceTensor, Value
from tritconv.workers import all_cores
from tritcore.console import err, out
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from write_model import write_model

_SOURCE = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_Q4_1 = GGMLQuantizationType.Q4_1
_Q4_1_BLOCK = 32  # weights; its first two bytes are the step, float16


def steps(blocks: np.ndarray) -> np.ndarray:
    """The distance of neighbouring levels at each weight of a Q4_1 matrix.

    Args:
        blocks: uint8 (rows, bytes per row).

    Returns:
        float32 (rows, weights per row).
    """
    step = np.ascontiguousarray(blocks.reshape(len(blocks), -1, 20)[..., :2]).view(np.float16)
    return np.repeat(step.astype(np.float32).reshape(len(blocks), -1), _Q4_1_BLOCK, axis=1)


def write_gguf(source: Path, target: Path, seed: int | None) -> None:
    """Write a GGUF file in float16, dithered; `target` appears when it is whole.

    Args:
        source: with matrices in Q4_1.
        seed: of the noise, which is the same for a tensor whatever the others are; None for no noise.

    Raises:
        TritError: the source is no such file, or the target cannot be written.
    """
    read_model_file(source)  # checks the header before anything trusts it
    model = open_gguf(source)
    stored = GGUFReader(source).tensors
    lattice = {tensor.name: tensor.data for tensor in stored if tensor.tensor_type is _Q4_1}
    if not lattice:
        raise TritError(f"{source} has no Q4_1 matrices, so it has no lattice to take away; give a Q4_1 file")
    made = [_in_float16(tensor) for tensor in model.tensors]
    about = {}
    if seed is not None:
        place = {tensor.name: i for i, tensor in enumerate(stored)}
        made = [_with_noise(tensor, lattice, (seed, place[tensor.name])) for tensor in made]
        about["bench.noise"] = Value(f"uniform, one step of the Q4_1 source wide, seed {seed}", GGUFValueType.STRING)
    plan = Plan(1, *[GGMLQuantizationType.F16] * 3)
    write_model(replace(model, tensors=tuple(made)), about, plan, target, all_cores())


def _in_float16(tensor: SourceTensor) -> SourceTensor:
    """The tensor with values that float16 holds: the checkpoint stores norms in it too."""

    def rounded() -> np.ndarray:
        values = tensor.load()
        return values.astype(np.float16).astype(values.dtype) if values.dtype.kind == "f" else values

    kept_type = GGMLQuantizationType.F16 if tensor.kind is Kind.MATRIX else tensor.kept_type
    return replace(tensor, load=rounded, kept_type=kept_type)


def _with_noise(tensor: SourceTensor, lattice: dict[str, np.ndarray], seed: tuple[int, int]) -> SourceTensor:
    blocks = lattice.get(tensor.name)
    if blocks is None:
        return tensor

    def noisy() -> np.ndarray:
        weights = tensor.load()
        rows = steps(blocks.reshape(-1, blocks.shape[-1]))
        uniform = np.random.default_rng(seed).random(weights.shape, dtype=np.float32) - np.float32(0.5)
        return (weights + uniform * rows.reshape(weights.shape)).astype(np.float16)

    return replace(tensor, load=noisy)


def write_checkpoint(source: Path, target: Path) -> None:
    """Write a GGUF file of float16 weights as a checkpoint folder, with tokenizer and chat template.

    Raises:
        TritError: the folder cannot be written.
    """
    import torch  # this and transformers take seconds to load
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    config = GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        whole = Path(scratch) / target.name
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=config, dtype=torch.float16)
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(**where).save_pretrained(whole)
        if target.exists():
            shutil.rmtree(target)
        os.replace(whole, target)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="FILE", default=_SOURCE, help="Q4_1 (default: of models/)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--no-noise", action="store_true", help="the published weights as they are")
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", required=True, help="made where it is missing")
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    """Write both forms of the base. Raises TritError."""
    folder, name = options.output, "plain" if options.no_noise else "base"
    if not options.source.exists():
        raise TritError(f"{options.source} is missing: python models/fetch.py SmolLM2-135M-Instruct")
    gguf, checkpoint = folder / f"{name}-F16.gguf", folder / f"{name}-hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with err.status(f"writing {gguf.name}"):
            write_gguf(options.source, gguf, None if options.no_noise else options.seed)
        with err.status(f"writing {checkpoint.name}"):
            write_checkpoint(gguf, checkpoint)
    except OSError as error:
        raise TritError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    out.print(f"{gguf}\n{checkpoint}", soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: make(chosen)))
