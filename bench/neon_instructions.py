#!/usr/bin/env python3
"""Executed AArch64 instructions per 32 weights of the TRIT kernels, and of some of ggml's other ones.

Runs neon_count.c under qemu, which logs every instruction. Instructions are no cycles, but they are the same on every
machine; rows of other types and columns of activations are multiplied one by one there, strips in one go.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.table import Table

from command import exit_status
from kernel_programs import GGML, NEON, NEON_BY_CLANG, QEMU, Target, missing_programs
from programs import BUILD, commit
from tritcore.console import err, out
from tritcore.errors import TritError
from tritcore.files import write_text_atomically

_SOURCE = Path(__file__).with_name("neon_count.c")
_TARGETS = (*NEON, *NEON_BY_CLANG)
_OURS, _PEER, _AT_MOST = "TRIT2 strip, 1 column", "Q3_K row", 1.0

Counts = dict[str, float]  # kernel -> instructions


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = BUILD / "bench/neon-instructions.json"
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", default=default, help="(default: in build/bench)")
    return parser.parse_args(arguments)


def unavailable(target: Target) -> str | None:
    """Why nothing can be counted here; None if it can."""
    return target.unavailable() or missing_programs([QEMU])


def count(target: Target, program: Path, only: Collection[str] = ()) -> Counts:
    """Build `program`, and count the instructions of its kernels, or of `only` some.

    Raises:
        TritError: it cannot be built, or it fails.
    """
    # as ggml is built; what the other kernels refer to and these cases do not call is left out
    options = ("-O3", "-DNDEBUG", "-static", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")
    target.build(_SOURCE, program, options, [GGML / "src/ggml-cpu/arch/arm/quants.c"])
    kernels = _run([QEMU, "-cpu", "max", str(program)])[0].splitlines()
    counts = {}
    for number, kernel in enumerate(kernels):
        if not only or kernel in only:
            # what the program does besides is the same in both runs
            units, once = _traced(program, number, repeats=1)
            _, twice = _traced(program, number, repeats=2)
            counts[kernel] = (twice - once) / units
    return counts


def _traced(program: Path, kernel: int, repeats: int) -> tuple[int, int]:
    """What the program prints, and how many instructions it executes."""
    options = ["-cpu", "max", _one_by_one(), "-d", "nochain,exec"]
    printed, n_instructions = _run([QEMU, *options, str(program), str(kernel), str(repeats)])
    return int(printed), n_instructions


def _one_by_one() -> str:
    """The option that makes qemu translate, and so log, every instruction on its own; it has been renamed."""
    renamed = "-one-insn-per-tb"
    return renamed if renamed in _run([QEMU, "-h"])[0] else "-singlestep"


def _run(command: Sequence[str]) -> tuple[str, int]:
    """Run qemu; return what is printed, and the number of lines in its log of instructions."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        n_instructions, last = 0, b""
        for line in process.stderr:
            if line.startswith(b"Trace"):
                n_instructions += 1
            else:
                last = line
        printed = process.stdout.read().decode()
    if process.returncode:
        raise TritError(f"{' '.join(command)}: exit status {process.returncode} {last.decode().strip()}".rstrip())
    return printed, n_instructions


def table(counts: dict[str, Counts]) -> Table:
    """A row for each kernel, a column for each instruction set."""
    result = Table(
        "kernel",
        title="executed instructions per 32 weights and column",
        caption="strip: 16 rows, interleaved; row: vec_dot",
    )
    for name in counts:
        result.add_column(name, justify="right")
    for kernel in dict.fromkeys(kernel for column in counts.values() for kernel in column):
        cells = (f"{column[kernel]:.1f}" if kernel in column else "" for column in counts.values())
        result.add_row(kernel, *cells, style="bold" if kernel.startswith("TRIT") else None)
    return result


def report(options: argparse.Namespace) -> None:
    """Count, print the table, write the counts.

    Raises:
        TritError: something is missing, or fails.
    """
    counts = {}
    with tempfile.TemporaryDirectory() as folder, err.status("") as status:
        for target in _TARGETS:
            if reason := unavailable(target):
                raise TritError(reason)
            status.update(f"counting: {target.name}")
            counts[target.name] = count(target, Path(folder) / target.name)
    out.print(table(counts))
    for name, column in counts.items():
        ratio = column[_OURS] / column[_PEER]
        verdict = "met" if ratio <= _AT_MOST else "missed"
        out.print(f"{name}: {_OURS} / {_PEER} = {ratio:.2f}, target <= {_AT_MOST}: {verdict}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TritError(f"--output {options.output}: cannot be made: {error.strerror}") from error
    compilers = {target.name: _compiler(target) for target in _TARGETS}
    facts = {"commit": commit(), "compilers": compilers, "instructions": counts}
    write_text_atomically(options.output, json.dumps(facts, indent=1) + "\n")
    out.print(f"{options.output}", soft_wrap=True)


def _compiler(target: Target) -> str:
    version = subprocess.run([target.compiler[0], "--version"], capture_output=True, text=True, check=True).stdout
    return " ".join([version.splitlines()[0], *target.flags])


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: report(chosen)))
