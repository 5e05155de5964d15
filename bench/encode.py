#!/usr/bin/env python3
"""How fast matrices become TRIT blocks: tritconv on all cores, and ggml's encoder on one, in million weights/s.

tritconv's figure has all that a conversion does with a matrix: it checks the weights, encodes, decodes, measures the
error. The two are interleaved, so that a change of the machine's speed meets both; median and range are printed.
"""

import argparse
import statistics
import time

import numpy as np
from rich.table import Table

from tritconv.encode import check_finite, measured
from tritconv.methods import Quantizer
from tritconv.methods.search import Search, check_reach
from tritconv.methods.uniform import Uniform
from tritconv.sources.source import Kind, SourceTensor
from tritconv.workers import Workers, all_cores
from tritcore import ggml
from tritcore.console import out
from tritcore.format import DEPTHS
from tritcore.gguf_types import TRIT_TYPE

METHODS: dict[str, type[Quantizer]] = {"search": Search, "uniform": Uniform}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="search", help="of tritconv (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8192, help="rows of 1536 weights (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="counted runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=all_cores(), help="for tritconv (default: all cores)")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    weights = (0.05 * rng.standard_normal((options.rows, 1536))).astype(np.float16)
    tensor = SourceTensor("blk.0.ffn_up.weight", weights.shape, Kind.MATRIX, lambda: weights)
    single = weights.astype(np.float32)
    table = Table("type", f"{options.method}, {options.threads} threads", "ggml, 1 thread", title="million weights/s")
    with Workers(options.threads) as workers:
        method = METHODS[options.method]()

        def convert(depth: int) -> None:
            check_finite(tensor, weights, workers)
            check_reach(weights, depth, workers)
            measured(weights, method.quantize(tensor, weights, depth, workers), TRIT_TYPE[depth], workers)

        for depth in DEPTHS:
            qtype = TRIT_TYPE[depth]
            contestants = (lambda depth=depth: convert(depth), lambda qtype=qtype: ggml.quantize(single, qtype))
            speeds: list[list[float]] = [[], []]
            for _ in range(options.repeat + 1):  # the first run warms up
                for run, speed in zip(contestants, speeds, strict=True):
                    start = time.perf_counter()
                    run()
                    speed.append(weights.size / (time.perf_counter() - start) / 1e6)
            cells = [f"{statistics.median(s[1:]):.1f} ({min(s[1:]):.1f} - {max(s[1:]):.1f})" for s in speeds]
            table.add_row(qtype.name, *cells)
    out.print(table)


if __name__ == "__main__":
    main()
