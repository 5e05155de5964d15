"""Single tensors through a method, without a model around them."""

import numpy as np
from gguf import GGMLQuantizationType as Type

from tritconv.methods import Finished, Quantizer
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.plan import Plan
from tritconv.sources.source import Kind, SourceTensor
from tritconv.workers import Workers


def tensor_of(values: np.ndarray, name: str = "blk.0.ffn_up.weight") -> SourceTensor:
    """A matrix of the layers, float16 or float32, row length last."""
    return SourceTensor(name, values.shape, Kind.MATRIX, lambda: values)


def finish(
    values: np.ndarray, depth: int, quantizer: Quantizer | None = None, threads: int = 2
) -> tuple[Finished, list[str]]:
    """A matrix as a method leaves it, by default the search, and the remarks of the method."""
    tensor = tensor_of(values)
    plan = Plan(depth, Type.Q8_0, Type.Q8_0, Type.Q8_0).with_lattices([tensor])
    method = PerTensor(quantizer or Search())
    with Workers(threads) as workers:
        return method.finish(tensor, tensor.load(), plan, workers), method.remarks()


def blocks_of(values: np.ndarray, depth: int, quantizer: Quantizer | None = None, threads: int = 2) -> np.ndarray:
    """The blocks that a method makes of a matrix, uint8 (rows, bytes per row)."""
    found, _ = finish(values, depth, quantizer, threads)
    assert found.blocks is not None, found.reason
    return found.blocks
