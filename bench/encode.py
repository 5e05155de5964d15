#!/usr/bin/env python3
"""How fast the search quantizes: tritconv's on all cores, and ggml's reference on one, in million weights/s.

The two are interleaved, so that a change of the machine's speed meets both; median and range are printed.
"""

import argparse
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tritconv.convert import Job
from tritconv.encode import Encoder
from tritconv.format import BLOCK_SIZE, BYTES_PER_BLOCK, DEPTHS
from tritconv.gguf_types import TRIT_TYPE


def reference(depth: int) -> Callable[[np.ndarray], None]:
    """ggml's quantize_row_tritN_ref, for float32 (rows, n)."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed: make build")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    function = getattr(library, f"quantize_row_trit{depth}_ref")

    def run(weights: np.ndarray) -> None:
        out = np.empty(weights.size // BLOCK_SIZE * BYTES_PER_BLOCK[depth], dtype=np.uint8)
        function(
            weights.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(weights.size),
        )

    return run


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of 1536 weights (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="counted runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=Job.threads, help="for tritconv (default: all cores)")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    weights = (0.05 * rng.standard_normal((options.rows, 1536))).astype(np.float32)
    table = Table("type", f"tritconv, {options.threads} threads", "C reference, 1 thread", title="million weights/s")
    with Encoder(options.threads) as encoder:
        for depth in DEPTHS:

            def ours(w: np.ndarray, depth: int = depth) -> None:
                encoder.encode(w, TRIT_TYPE[depth])

            contestants = (ours, reference(depth))
            speeds: list[list[float]] = [[], []]
            for _ in range(options.repeat + 1):  # the first run warms up
                for run, speed in zip(contestants, speeds, strict=True):
                    start = time.perf_counter()
                    run(weights)
                    speed.append(weights.size / (time.perf_counter() - start) / 1e6)
            cells = [f"{statistics.median(s[1:]):.1f} ({min(s[1:]):.1f} - {max(s[1:]):.1f})" for s in speeds]
            table.add_row(f"TRIT{depth}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
