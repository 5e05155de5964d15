"""Fuzzes the header reader with Atheris and the reference of the blocks with libFuzzer: `make fuzz`."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GGML = ROOT / "build/src/vendor/llama.cpp/ggml"

_FILES = ROOT / "vendor/llama.cpp-patch/files/ggml/src"
_SANITIZERS = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
_STDERR = 2  # where the validation names each invalid block


def build_blocks(program: Path) -> Path:
    """Compile the target for blocks with clang, to `program`."""
    compiler = ["clang", "-g", "-O1", "-w", *(f"-I{folder}" for folder in (_FILES, GGML / "src", GGML / "include"))]
    search = f"{program}.search.o"  # the target does not search; with sanitizers this file takes minutes
    subprocess.run([*compiler, "-c", str(_FILES / "ggml-trit-tile.c"), "-o", search], check=True)
    sources = [str(HERE / "blocks.c"), str(_FILES / "ggml-trit.c"), search]
    subprocess.run([*compiler, *_SANITIZERS, *sources, "-lm", "-o", str(program)], check=True)
    return program


def commands(blocks: Path, work: Path, *options: str) -> dict[str, list[str]]:
    """The command line of each target.

    Args:
        blocks: the compiled target for blocks.
        work: a folder for what is found: new inputs of the corpora, and inputs that fail.
        options: of libFuzzer, such as -runs=1000000.
    """
    targets = {
        "header": [sys.executable, str(HERE / "header.py"), f"-dict={HERE / 'header.dict'}", "-max_len=4096"],
        "blocks": [str(blocks), f"-close_fd_mask={_STDERR}", "-max_len=4096"],
    }
    made = {}
    for name, command in targets.items():
        found = work / name
        found.mkdir(parents=True, exist_ok=True)
        corpora = [str(found), str(HERE / "corpus" / name)]
        made[name] = [*command, "-print_final_stats=1", *options, f"-artifact_prefix={work}/{name}-", *corpora]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions of each target")
    arguments = parser.parse_args()
    work = ROOT / "build/fuzz"
    work.mkdir(parents=True, exist_ok=True)
    for command in commands(build_blocks(work / "blocks.program"), work, f"-runs={arguments.runs}").values():
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
