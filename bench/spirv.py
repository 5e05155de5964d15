#!/usr/bin/env python3
"""Operations per weight of the Vulkan products with one vector, counted in the SPIR-V that glslc makes. Needs no GPU.

Compiles a shader as vulkan-shaders-gen does, for one column and the number of rows that most GPUs get, lets spirv-opt
unroll it, and counts the loop over the blocks of a row: an operation on a vector counts once for each component, and a
multiply-add once. What a driver makes of it is not known here.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from command import exit_status
from kernel_programs import GGML
from tritcore.console import out
from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE, DEPTHS

SHADERS = GGML / "src/ggml-vulkan/vulkan-shaders"

_DEFINES = ("FLOAT_TYPE=float", "FLOAT_TYPEV2=vec2", "D_TYPE=float", "USE_SUBGROUP_ADD_NO_SHMEM=1")
_FLOATS = ("B_TYPE=float", "B_TYPEV2=vec2", "B_TYPEV4=vec4")
_THREADS = 32

# Until nothing changes any more: a round unrolls the innermost loops that are left.
_ROUND = (
    "--private-to-local",
    "--ssa-rewrite",
    "--ccp",
    "--eliminate-dead-branches",
    "--merge-blocks",
    "--simplify-instructions",
    "--eliminate-dead-code-aggressive",
    "--loop-unroll",
    "--ccp",
    "--eliminate-dead-branches",
    "--merge-blocks",
    "--scalar-replacement=0",
    "--ssa-rewrite",
    "--simplify-instructions",
    "--redundancy-elimination",
    "--eliminate-dead-code-aggressive",
)
_ROUNDS = 6

_INSTRUCTION = re.compile(r"\s*(?:(?P<id>%\w+) = )?Op(?P<name>\w+)(?P<operands>.*)")
_FLOAT = re.compile(r"F(?:Add|Sub|Mul|Div|Negate)$|VectorTimesScalar$|Dot$|ExtInst$")
_INTEGER = re.compile(
    r"[ISU](?:Add|Sub|Mul|Div|Mod|Negate)$|Bitwise|Shift|Not$|Select$|.*(?:LessThan|GreaterThan|Equal)"
)
_CONVERSION = re.compile(r"Convert|[SUF]Convert$")
_LEAST = 100  # instructions of the loop over blocks; the loops of the reduction are shorter

KINDS = ("float", "integer", "conversion", "loads")


@dataclass(frozen=True)
class Shader:
    """One product of a matrix and a vector.

    Attributes:
        name: of the type.
        source: file name.
        rows: that a group of threads computes.
        weights: of a row that a thread takes in an iteration.
    """

    name: str
    source: str
    rows: int
    weights: int

    @property
    def define(self) -> str:
        """What selects the type."""
        return f"DATA_A_{self.name}=1"


TRIT = {depth: Shader(f"TRIT{depth}", "mul_mat_vec_trit.comp", 4, BLOCK_SIZE) for depth in DEPTHS}
OTHERS = (
    # 16 threads share a block of 256. GPUs get two rows; spirv-opt leaves the loop over those of Q3_K and Q6_K.
    Shader("Q3_K", "mul_mat_vec_q3_k.comp", 1, 16),
    Shader("Q4_K", "mul_mat_vec_q4_k.comp", 2, 16),
    Shader("Q6_K", "mul_mat_vec_q6_k.comp", 1, 16),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", "-v", action="store_true", help="print how often each instruction occurs")
    return parser.parse_args(arguments)


def unavailable() -> str | None:
    """Why nothing can be counted here; None if it can."""
    if not SHADERS.is_dir():
        return f"{SHADERS} is missing: make build"
    missing = [name for name in ("glslc", "spirv-opt", "spirv-dis") if shutil.which(name) is None]
    return (
        f"not on PATH: {', '.join(missing)}; install them (Debian: apt install glslc spirv-tools)" if missing else None
    )


def disassemble(shader: Shader, folder: Path) -> list[str]:
    """The lines of the unrolled shader.

    Raises:
        TritError: a program fails.
    """
    made, unrolled = folder / "made.spv", folder / "unrolled.spv"
    defines = [f"-D{define}" for define in (shader.define, *_DEFINES, *_FLOATS)]
    target = "--target-env=vulkan1.2"
    _run(["glslc", "-fshader-stage=compute", target, "-O", *defines, str(SHADERS / shader.source), "-o", str(made)])
    constants = ["--set-spec-const-default-value", f"0:{_THREADS} 1:{shader.rows} 2:1", "--freeze-spec-const"]
    _run(
        [
            "spirv-opt",
            target,
            *constants,
            "--fold-spec-const-op-composite",
            *_ROUND * _ROUNDS,
            "-O",
            str(made),
            "-o",
            str(unrolled),
        ]
    )
    return _run(["spirv-dis", "--raw-id", str(unrolled)]).splitlines()


def count(shader: Shader, folder: Path) -> dict[str, Counter[str]]:
    """How many operations each kind of instruction takes in an iteration over blocks, for each of KINDS.

    Raises:
        TritError: a program fails, or spirv-opt left no such loop.
    """
    components: dict[str, int] = {}  # of a type
    buffers: set[str] = set()  # types of pointers into storage buffers
    pointers: set[str] = set()  # pointers into them
    counts = {kind: Counter[str]() for kind in KINDS}
    ends = ""
    for result, name, operands in _instructions(disassemble(shader, folder)):
        if name == "TypeVector":
            components[result] = int(operands[1])
        elif name == "TypePointer" and operands[0] == "StorageBuffer":
            buffers.add(result)
        elif name == "AccessChain" and operands[0] in buffers:
            pointers.add(result)
        elif name == "LoopMerge":
            ends = operands[0]
            counts = {kind: Counter() for kind in KINDS}
        elif name == "Label" and result == ends:
            if sum(counter.total() for counter in counts.values()) >= _LEAST:
                return counts
            ends = ""
        if ends and (kind := _kind(name, operands, pointers)):
            # the operands of a dot product are vectors, its result is none
            counts[kind][name] += 4 if name == "Dot" else components.get(operands[0], 1)
    raise TritError(f"{shader.source}: spirv-opt left no unrolled loop over the blocks")


def per_weight(shader: Shader, counts: dict[str, Counter[str]]) -> list[float]:
    """The totals of `count` for each of KINDS, for a weight."""
    return [counts[kind].total() / (shader.rows * shader.weights) for kind in KINDS]


def _instructions(lines: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    for line in lines:
        if match := _INSTRUCTION.match(line):
            yield match["id"] or "", match["name"], match["operands"].split()


def _kind(name: str, operands: Sequence[str], pointers: set[str]) -> str | None:
    if name == "Load":
        return KINDS[3] if operands[1] in pointers else None
    for kind, pattern in zip(KINDS, (_FLOAT, _INTEGER, _CONVERSION), strict=False):
        if pattern.match(name):
            return kind
    return None


def report(options: argparse.Namespace) -> None:
    """Count and print the table.

    Raises:
        TritError: something is missing, or fails.
    """
    if reason := unavailable():
        raise TritError(reason)
    table = Table("type", *KINDS[:3], "all three", KINDS[3], title="per weight, one column")
    for column in table.columns[1:]:
        column.justify = "right"
    with tempfile.TemporaryDirectory() as folder:
        for shader in (*TRIT.values(), *OTHERS):
            counts = count(shader, Path(folder))
            each = per_weight(shader, counts)
            table.add_row(shader.name, *(f"{number:.2f}" for number in (*each[:3], sum(each[:3]), each[3])))
            if options.verbose:
                listed = (f"{number} {name}" for kind in KINDS for name, number in counts[kind].most_common())
                out.print(f"{shader.name}: {', '.join(listed)}", soft_wrap=True)
    out.print(table)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TritError(f"{command[0]} failed with status {done.returncode}: {(done.stderr or done.stdout)[:200]}")
    return done.stdout


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: report(chosen)))
