"""Registers TRIT1..TRIT4 with gguf-py's quantization classes; importing this module does it.

llama.cpp's conversion package asks gguf-py for the shapes of quantized tensors, and gguf-py's readers for
their values. Both then know the TRIT types. The ids and sizes come with the patched gguf-py.
"""

import numpy as np
from gguf import GGMLQuantizationType, quants

from tritcore import ggml
from tritcore.codec import unpack
from tritcore.format import DEPTHS

TRIT_TYPE = {depth: GGMLQuantizationType[f"TRIT{depth}"] for depth in DEPTHS}
DEPTH_OF_TYPE = {qtype: depth for depth, qtype in TRIT_TYPE.items()}


def _register(trit_depth: int) -> None:
    class Trit(quants.__Quant, qtype=TRIT_TYPE[trit_depth]):  # type: ignore[call-arg]
        @classmethod
        def quantize_rows(cls, rows: np.ndarray) -> np.ndarray:
            return ggml.quantize(rows.astype(np.float32, copy=False), TRIT_TYPE[trit_depth])

        @classmethod
        def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
            return unpack(trit_depth, blocks).decode()


for _depth in DEPTHS:
    _register(_depth)
