#!/usr/bin/env python3
"""Lays types across rows, so that types with blocks of 256 weights can be compared on models with other row lengths.

llama-quantize stores a matrix in a bigger type where its rows are no multiple of 256 weights. This takes the weights of
each matrix of the layers as one long row, cuts it into rows that hold whole blocks, encodes these with llama.cpp's own
encoder, and decodes them. The file holds the decoded weights in float16: it is as good as the type would be, not as
small. Token embeddings and output matrix are Q8_0, as in our files.

Matrix products with float16 weights leave the activations alone, those with quantized weights round them to 8 bits. So
`--decode FILE` gives a TRIT file the same advantage: its weights as they are, in float16.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, quants

from command import exit_status
from tritconv.methods.imatrix_file import read_imatrix
from tritconv.plan import Plan
from tritconv.sources.gguf import open_gguf
from tritconv.sources.source import Kind, Source, SourceTensor, Value
from tritconv.workers import all_cores
from tritcore import ggml
from tritcore.console import err, out
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritcore.gguf_types import TRIT_TYPE
from tritrun.comparison import STAND_IN_BITS, STAND_IN_TYPE, contents
from write_model import write_model

_NAMES = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *(qtype.name for qtype in TRIT_TYPE.values()),
)
TYPES = {name: GGMLQuantizationType[name] for name in _NAMES}
_NEEDS_IMATRIX = ("IQ2_XXS", "IQ2_XS")  # ggml_quantize_requires_imatrix


def across_rows(
    weights: np.ndarray,
    qtype: GGMLQuantizationType,
    importance: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """What a matrix is after a round trip through a type that is laid across its rows.

    Args:
        weights: float (rows, columns); rows * columns is a multiple of the type's block size.
        importance: float32 (columns,), the weight of each column's squared errors; None leaves it to the type.

    Returns:
        float32 (rows, columns).
    """
    n_columns = weights.shape[1]
    length = math.lcm(n_columns, GGML_QUANT_SIZES[qtype][0])
    long_rows = weights.astype(np.float32).reshape(-1, length)
    tiled = None if importance is None else np.tile(importance, length // n_columns)

    def round_trip(rows: np.ndarray) -> np.ndarray:
        return quants.dequantize(ggml.quantize(rows, qtype, tiled), qtype)

    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(long_rows, min(threads, len(long_rows)))
        return np.concatenate(list(pool.map(round_trip, parts))).reshape(weights.shape)


def write_across_rows(
    base: Path,
    target: Path,
    qtype: GGMLQuantizationType,
    imatrix: Path | None,
    threads: int = 1,
) -> None:
    """Write the model that comes out of a type laid across the rows; `target` appears when it is whole.

    Args:
        base: GGUF file in float16.
        imatrix: of llama-imatrix; None encodes without.

    Raises:
        TritError: a matrix does not fill whole blocks or is not in the imatrix, or a file cannot be read or written.
    """
    read_model_file(base)  # checks the header before anything trusts it
    model = open_gguf(base)
    statistics = None if imatrix is None else read_imatrix(imatrix)
    made = []
    for tensor in model.tensors:
        if tensor.kind is Kind.MATRIX:
            _check(tensor, qtype, base)
            importance = None if statistics is None else _importance(tensor, statistics, imatrix)
            tensor = _round_trip(tensor, qtype, importance, threads)
        made.append(tensor)
    block, size = GGML_QUANT_SIZES[qtype]
    about = _described(qtype.name, 8 * size / block, imatrix is not None)
    _write(replace(model, tensors=tuple(made)), about, target, threads)


def write_decoded(source: Path, target: Path, threads: int = 1) -> None:
    """Write a model with its matrices as they are, in float16; `target` appears when it is whole. Raises TritError."""
    own = contents(read_model_file(source))
    model = open_gguf(source)
    made = [replace(t, kept_type=GGMLQuantizationType.F16) if t.kind is Kind.MATRIX else t for t in model.tensors]
    about = _described(own.file_type, own.layer_bits, imatrix=False)
    _write(replace(model, tensors=tuple(made)), about, target, threads)


def _write(model: Source, about: dict[str, Value], target: Path, threads: int) -> None:
    """Write tensors in the types that they have; embeddings and output matrix in Q8_0."""
    q8_0 = GGMLQuantizationType.Q8_0
    with err.status(f"{target.name}") as status:
        plan = Plan(1, q8_0, q8_0, q8_0)
        write_model(model, about, plan, target, threads, lambda name, _: status.update(f"{target.name}: {name}"))


def _check(tensor: SourceTensor, qtype: GGMLQuantizationType, base: Path) -> None:
    block, n_weights = GGML_QUANT_SIZES[qtype][0], math.prod(tensor.shape[-2:])
    if n_weights % block:
        raise TritError(
            f"{base}: {tensor.name} has {n_weights} weights a matrix, which is no multiple of {qtype.name}'s block of "
            f"{block}: the type cannot be laid across its rows; choose one with smaller blocks, such as IQ4_NL or Q4_0"
        )


def _importance(tensor: SourceTensor, statistics: dict[str, np.ndarray], imatrix: Path | None) -> np.ndarray:
    """float32 (matrices, columns) for a tensor; experts have a matrix each."""
    shape = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
    found = statistics.get(tensor.name)
    if found is None or found.shape != shape:
        what = (
            "is missing"
            if found is None
            else f"has {found.shape[0]} x {found.shape[1]} columns, not {shape[0]} x {shape[1]}"
        )
        raise TritError(f"{imatrix}: {tensor.name} {what}; make it with llama-imatrix from the base itself")
    return found


def _round_trip(
    tensor: SourceTensor, qtype: GGMLQuantizationType, importance: np.ndarray | None, threads: int
) -> SourceTensor:
    def load() -> np.ndarray:
        matrices = tensor.load().reshape(-1, *tensor.shape[-2:])
        if not np.isfinite(matrices).all():  # ggml's encoders end the process
            raise TritError(f"tensor {tensor.name} holds NaN or infinity: the model is damaged")
        columns = [None] * len(matrices) if importance is None else importance
        decoded = [across_rows(m, qtype, c, threads) for m, c in zip(matrices, columns, strict=True)]
        return np.stack(decoded).reshape(tensor.shape).astype(np.float16)

    return replace(tensor, load=load, kept_type=GGMLQuantizationType.F16)


def _described(name: str, bits_per_weight: float, imatrix: bool) -> dict[str, Value]:
    """Metadata of a file that stands for a type."""
    return {
        STAND_IN_TYPE: Value(name, GGUFValueType.STRING),
        STAND_IN_BITS: Value(bits_per_weight, GGUFValueType.FLOAT32),
        "bench.across_rows.imatrix": Value(imatrix, GGUFValueType.BOOL),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="F16.gguf", help="of the types")
    parser.add_argument(
        "--type",
        action="append",
        choices=TYPES,
        metavar="TYPE",
        default=[],
        help="may be repeated: " + ", ".join(TYPES),
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="of llama-imatrix, in GGUF (default: without)")
    parser.add_argument(
        "--decode", action="append", type=Path, metavar="FILE", default=[], help="TRIT file to decode; may be repeated"
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", required=True, help="made where it is missing")
    parser.add_argument("--threads", "-t", type=int, metavar="N", default=all_cores(), help="(default: all cores)")
    options = parser.parse_args(arguments)
    needy = [name for name in options.type if name in _NEEDS_IMATRIX]
    if needy and options.imatrix is None:
        parser.error(f"{needy[0]} does not go without --imatrix")
    if bool(options.type) != bool(options.base) or not (options.type or options.decode):
        parser.error("give --base and --type, or --decode")
    return options


def across_name(qtype: str, imatrix: bool) -> str:
    """What the file of a type across rows is called."""
    return f"{qtype}{'-imatrix' if imatrix else ''}-across.gguf"


def decoded_name(path: Path) -> str:
    """What the file is called into which a TRIT file is decoded."""
    return f"{path.stem}-decoded.gguf"


def make(options: argparse.Namespace) -> None:
    """Write a file for each type, and for each file to decode. Raises TritError."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TritError(f"--output {options.output}: cannot be made: {error.strerror}") from error
    for name in options.type:
        target = options.output / across_name(name, options.imatrix is not None)
        write_across_rows(options.base, target, TYPES[name], options.imatrix, options.threads)
        out.print(f"{target}", soft_wrap=True)
    for path in options.decode:
        target = options.output / decoded_name(path)
        write_decoded(path, target, options.threads)
        out.print(f"{target}", soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: make(chosen)))
