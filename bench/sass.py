#!/usr/bin/env python3
"""Integer operations per weight of the CUDA dot products, counted in the machine code that nvcc makes. Needs no GPU.

Compiles sass.cu, whose kernels multiply one block a thread, and disassembles it with cuobjdump. Every instruction of a
kernel counts once, the few that find out which block is this thread's among them; there are no loops.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

import cuda_programs
from command import exit_status
from tritcore.console import out
from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE, DEPTHS

SOURCE = Path(__file__).with_name("sass.cu")
ARCHITECTURES = ("80", "89", "90")
COLUMNS = (1, 8)
AT_MOST = 3.0  # integer operations per weight, TRIT2 and one column

_KERNEL = re.compile(r"Function : (\w+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z0-9]+)")
# Memory, special registers, floats, the unit that computes once for a warp, control; all others count as integer.
_OTHER = re.compile(r"LD|ST|S2|CS2R|F|H|I2F|U(?!LOP|ADD)|NOP|EXIT|BRA|RET|BAR|DEPBAR")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", "-v", action="store_true", help="print how often each instruction occurs")
    return parser.parse_args(arguments)


def unavailable() -> str | None:
    """Why nothing can be counted here; None if it can."""
    if reason := cuda_programs.unavailable():
        return reason
    if shutil.which("cuobjdump") is None or shutil.which("nvdisasm") is None:
        return (
            "cuobjdump and nvdisasm must be on PATH: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, "
            "which puts them into site-packages/nvidia/cu13/bin"
        )
    return None


def instructions(made: Path, architecture: str) -> dict[str, Counter[str]]:
    """How often each instruction occurs in each kernel of an object file."""
    command = ["cuobjdump", "-sass", "-arch", f"sm_{architecture}", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TritError(f"cuobjdump failed with status {done.returncode}: {done.stderr[:200]}")
    kernels: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        if match := _KERNEL.search(line):
            counter = kernels[match[1]] = Counter()
        elif match := _INSTRUCTION.match(line):
            counter[match["name"]] += 1
    return kernels


def integer_operations(counts: Counter[str]) -> int:
    """How many instructions compute with integers."""
    return sum(number for name, number in counts.items() if _OTHER.match(name) is None)


def count() -> dict[str, dict[str, Counter[str]]]:
    """The instructions of each kernel, for each architecture.

    Raises:
        TritError: something is missing, or fails.
    """
    if reason := unavailable():
        raise TritError(reason)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "sass.o"
        cuda_programs.compile_object(SOURCE, made, ARCHITECTURES)
        return {architecture: instructions(made, architecture) for architecture in ARCHITECTURES}


def report(options: argparse.Namespace) -> None:
    """Count and print the table.

    Raises:
        TritError: something is missing, or fails.
    """
    counts = count()
    table = Table("kernel", title="integer operations per weight and column")
    for architecture in ARCHITECTURES:
        table.add_column(f"sm_{architecture}", justify="right")
    for depth in DEPTHS:
        for columns in COLUMNS:
            name = f"trit{depth}_{columns}"
            cells = [integer_operations(counts[arch][name]) / (BLOCK_SIZE * columns) for arch in ARCHITECTURES]
            label = f"TRIT{depth}, {columns} column{'s' if columns > 1 else ''}"
            table.add_row(label, *(f"{cell:.2f}" for cell in cells))
            if options.verbose:
                listed = (f"{number} {mnemonic}" for mnemonic, number in counts["90"][name].most_common())
                out.print(f"{name}, sm_90: {', '.join(listed)}", soft_wrap=True)
    out.print(table)
    worst = max(integer_operations(counts[arch]["trit2_1"]) / BLOCK_SIZE for arch in ARCHITECTURES)
    out.print(f"TRIT2, 1 column: {worst:.2f}, target <= {AT_MOST:g}: {'met' if worst <= AT_MOST else 'missed'}")


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: report(chosen)))
