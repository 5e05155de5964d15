#!/usr/bin/env python3
"""How fast `tritconv verify` reads TRIT files: GB per second of wall clock, and of CPU time.

Writes a file for each type to the folder for temporary files, whose pages stay cached, and removes it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tritconv.verify import findings
from tritconv.workers import all_cores
from tritcore.codec import pack, unpack
from tritcore.format import BYTES_PER_BLOCK, DEPTHS
from tritcore.gguf_types import TRIT_TYPE

_SOME_BLOCKS = 1 << 14  # that differ; the file repeats them


def write_file(path: Path, depth: int, n_bytes: int) -> None:
    """A file of about `n_bytes` of valid blocks in one tensor."""
    random = np.random.default_rng(depth).integers(0, 256, (_SOME_BLOCKS, BYTES_PER_BLOCK[depth]), dtype=np.uint8)
    blocks = pack(unpack(depth, random))
    writer = GGUFWriter(path, "none")
    writer.add_tensor("weights", np.tile(blocks, (n_bytes // blocks.nbytes, 1)), raw_dtype=TRIT_TYPE[depth])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, metavar="MB", help="of a file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the best counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=all_cores(), metavar="N", help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for depth in DEPTHS:
            path = Path(folder) / "model.gguf"
            write_file(path, depth, options.size * 10**6)
            wall, cpu = [], []
            for _ in range(options.rounds):
                start, cpu_start = time.perf_counter(), time.process_time()
                assert not findings(path, options.threads)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - cpu_start)
            gigabytes = path.stat().st_size / 1e9
            print(
                f"TRIT{depth}: {gigabytes / min(wall):.2f} GB/s, {gigabytes / min(cpu):.2f} GB per second of CPU time"
            )
            path.unlink()


if __name__ == "__main__":
    main()
