#!/usr/bin/env python3
"""Build, check and measure the CUDA or the Vulkan backend on a machine with a GPU.

The machine needs CMake, Ninja, a C++ compiler, Python with NumPy, and the CUDA toolkit with cuBLAS, or glslc and the
headers and the loader of Vulkan; no package of ours. `pack` makes one file of the patched source, to take along. There,
`all` does the other steps: `build`, `check` (ggml's own tests, some again under compute-sanitizer or the validation
layers) and `speed` (models with random weights, each layer as in a model of 7B). `--device` says which backend. Each
step prints its results and leaves them in gpu.json, so steps can be run one by one.
"""

import argparse
import json
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "vendor/llama.cpp-patch"))

from llamabuild import compile as compiling  # noqa: E402
from llamabuild.shell import BuildError, run  # noqa: E402

TREE = ROOT / "build/src/vendor/llama.cpp"
PROGRAMS = ("test-backend-ops", "llama-bench", "llama-perplexity", "llama-quantize")
# not needed for these programs; the rest is about 10 MB packed
PRUNED = ("models", "docs", "media", "benches", "ggml/src/ggml-opencl", "ggml/src/ggml-hexagon")

OPERATIONS = "MUL_MAT,MUL_MAT_ID,GET_ROWS,CPY"
OURS = ("TRIT1", "TRIT2", "TRIT3", "TRIT4")
# name here -> llama-quantize's, F16 being the base
TYPES = {name: name for name in (*OURS, "F16", "Q8_0", "Q4_0")} | {"Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S"}
DIFFERENCE = 0.002  # of perplexities, GPU and CPU


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("pack", "all", "build", "check", "speed"))
    default = ROOT / "build/gpu-source.tar.gz"
    parser.add_argument("--source", type=Path, metavar="FILE", default=default, help="(default: in build)")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=ROOT / "build/gpu",
        help="for programs and models (default: build/gpu)",
    )
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="for gpu.json (default: as --work)")
    parser.add_argument("--architectures", default="native", metavar="LIST", help="for CUDA (default: the GPU's)")
    parser.add_argument("--device", default="CUDA0", metavar="NAME", help="or Vulkan0 (default: CUDA0)")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="of the models (default: 8)")
    options = parser.parse_args(arguments)
    options.output = options.output or options.work
    options.cuda = options.device.startswith("CUDA")
    return options


def pack(source: Path) -> None:
    """Write the patched source without what is not needed."""
    if not TREE.is_dir():
        raise BuildError(f"{TREE} is missing: vendor/llama.cpp-patch/build.py --source-only")

    def keep(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name in PRUNED else member

    with tarfile.open(source, "w:gz") as archive:
        for path in sorted(TREE.iterdir()):
            archive.add(path, path.name, filter=keep)
    print(f"{source}: {source.stat().st_size / 1e6:.1f} MB")


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Compile the programs for one GPU."""
    tree = options.work / "src"
    if not tree.is_dir():
        with tarfile.open(options.source) as archive:
            archive.extractall(tree, filter="data")
    made = options.work / "cmake"
    values = compiling.options(
        all_variants=False,
        cuda=options.cuda,
        vulkan=not options.cuda,
        commit="gpu",
        cuda_architectures=options.architectures,
    )
    # no flash attention: half of the time to compile, and no weights in it
    run(["cmake", "-G", "Ninja", "-S", tree, "-B", made, *values, "-DGGML_CUDA_FA=OFF"])
    run(["cmake", "--build", made, "--target", *PROGRAMS])
    if not options.cuda:
        return {"glslc": run(["glslc", "--version"]).strip().splitlines()[0]}
    source = Path(__file__).with_name("gpu.cu")
    run(["nvcc", "-O3", "-std=c++17", "-arch=native", source, "-lcublas", "-o", made / "bin/gpu"])
    return {"nvcc": run(["nvcc", "--version"]).strip().splitlines()[-1]}


def _program(options: argparse.Namespace, name: str, *arguments: object) -> str:
    return run([options.work / "cmake/bin" / name, *map(str, arguments)])


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Run ggml's tests of our types: all of them, and some under what finds wrong accesses.

    Raises:
        BuildError: a test fails, or memory is accessed out of bounds.
    """
    every = ("test", "-b", options.device, "-o", OPERATIONS, "-p", "trit")
    # rows of an odd number of blocks end at the end of memory
    some = (*every[:-1], r"trit.*([kn]=576|ne_src=\[192)")
    passed = _passed(_program(options, "test-backend-ops", *every))
    program = options.work / "cmake/bin/test-backend-ops"
    if options.cuda:
        printed = run(["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", program, *some])
        return {"passed": passed, "passed under memcheck": _passed(printed)}
    printed = run([program, *some], env={**os.environ, "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation"})
    if message := re.search(r"^.*(?:VUID|Validation Error).*$", printed, re.MULTILINE):
        raise BuildError(f"the validation layers say: {message[0]}")
    return {"passed": passed, "passed under validation": _passed(printed)}


def _passed(printed: str) -> int:
    found = re.search(r"(\d+)/(\d+) tests passed", printed)
    if found is None or not int(found[1]):
        raise BuildError("test-backend-ops ran no test on this device")
    return int(found[1])


def make_models(folder: Path, tree: Path, layers: int, options: argparse.Namespace) -> dict[str, Path]:
    """The files of the model in each type, made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}-{layers}.gguf" for name in TYPES}
    if not files["F16"].exists():
        sys.path.insert(0, str(tree / "gguf-py"))
        from random_model import Shape, write_random_model

        shape = Shape("llama", 4096, 11008, layers=layers, heads=32, kv_heads=32, vocabulary=32000, tied=False)
        write_random_model(files["F16"], shape)
    others = ("--pure", "--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
    for name, path in files.items():
        if not path.exists():
            partial = path.with_suffix(".part")
            _program(options, "llama-quantize", *others, files["F16"], partial, TYPES[name], os.cpu_count() or 1)
            partial.replace(path)
    return files


def perplexity(options: argparse.Namespace, model: Path, device: str) -> float:
    """Measure a model's perplexity on a text that any model can read: only two devices are compared."""
    text = ROOT / "docs/reference/format.md"
    arguments = ("-m", model, "-f", text, "-c", 512, "--chunks", 2, "-dev", device, "-ngl", 99)
    printed = _program(options, "llama-perplexity", *arguments)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    if found is None:
        raise BuildError(f"llama-perplexity printed no result for {model}")
    return float(found[1])


def bench(options: argparse.Namespace, model: Path) -> dict[str, float]:
    """Tokens per second, and bytes of weights per second of an answer."""
    arguments = ("-m", model, "-p", 512, "-n", 128, "-r", 3, "-dev", options.device, "-ngl", 99, "-o", "json")
    printed = _program(options, "llama-bench", *arguments)
    tests = json.loads(printed[printed.index("[\n") : printed.rindex("]") + 1])
    speeds = {"tg128" if test["n_gen"] else "pp512": test["avg_ts"] for test in tests}
    return speeds | {"bytes_per_second": tests[0]["model_size"] * speeds["tg128"]}


def vector_products(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a matrix of 4096 rows of 14336 times a vector, for each type, by ggml's kernels."""
    wanted = "type_a=(f16|q8_0|q4_0|q4_K|q3_K|trit[1-4]),type_b=f32,m=4096,n=1,k=14336"
    printed = _program(options, "test-backend-ops", "perf", "-b", options.device, "-o", "MUL_MAT", "-p", wanted)
    found = re.findall(r"MUL_MAT\(type_a=(\w+),.*\): +\d+ runs - +([\d.]+) us/run", printed)
    times = {name.upper(): float(microseconds) for name, microseconds in found}
    if not times.keys() >= TYPES.keys():
        raise BuildError(f"test-backend-ops measured only {', '.join(times) or 'nothing'}")
    return times


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all types beside each other."""
    peak = dict(line.split() for line in _program(options, "gpu").splitlines()) if options.cuda else {}
    files = make_models(options.work / "models", options.work / "src", options.layers, options)
    measured: dict[str, Any] = {name: bench(options, path) for name, path in files.items()}
    for name, microseconds in vector_products(options).items():
        measured[name]["vector_product_us"] = microseconds
    for name in OURS:
        gpu, cpu = (perplexity(options, files[name], device) for device in (options.device, "none"))
        measured[name] |= {"perplexity": gpu, "perplexity_cpu": cpu}
    return {"layers": options.layers, "types": measured} | {name: float(value) for name, value in peak.items()}


def verdicts(results: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Each target: what, the figure, what is asked for, whether it is met."""
    types, cublas = results["types"], results.get("cublas_f16_microseconds")

    def ratio(phase: str) -> float:
        return types["TRIT2"][phase] / types["Q4_K"][phase]

    wide = max(abs(types[name]["perplexity"] / types[name]["perplexity_cpu"] - 1) for name in OURS)
    targets = [
        ("decode TRIT2 / Q4_K", ratio("tg128"), ">= 1", ratio("tg128") >= 1),
        ("prompt TRIT2 / Q4_K", ratio("pp512"), ">= 0.9", ratio("pp512") >= 0.9),
        ("perplexity, GPU and CPU differ by", wide, f"<= {DIFFERENCE}", wide <= DIFFERENCE),
    ]
    if cublas is not None:
        product = cublas / types["TRIT2"]["vector_product_us"]
        targets.append(("cuBLAS F16 / TRIT2, matrix times vector", product, ">= 3", product >= 3))
    return targets


def show(results: dict[str, Any]) -> None:
    """Print the figures as Markdown."""
    copy = results.get("copy_bytes_per_second", float("nan"))
    print("| | tg128 | pp512 | bytes/s | of a copy | matrix times vector, us |")
    print("|---|---|---|---|---|---|")
    for name, figures in results["types"].items():
        rate = figures["bytes_per_second"]
        product = figures.get("vector_product_us", float("nan"))
        print(
            f"| {name} | {figures['tg128']:.1f} | {figures['pp512']:.0f} | {rate:.3g} | {rate / copy:.0%} "
            f"| {product:.1f} |"
        )
    if "cublas_f16_microseconds" in results:
        print(f"\ncopy: {copy:.3g} bytes/s; cuBLAS F16: {results['cublas_f16_microseconds']:.1f} us")
    print()
    for what, figure, asked, met in verdicts(results):
        print(f"{what}: {figure:.4g}, target {asked}: {'met' if met else 'missed'}")


def measure(options: argparse.Namespace) -> None:
    """Do the steps that were asked for, and keep the result of each."""
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "gpu.json"
    facts: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    steps = {"build": build, "check": check, "speed": speed}
    for name, step in steps.items():
        if options.step in ("all", name):
            facts[name] = step(options)
            if options.cuda:
                facts["gpu"] = run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).strip()
            report.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            if name == "speed":
                show(facts[name])
            else:
                print(f"{name}: {facts[name]}", flush=True)


def main() -> int:
    """Run the command; return its exit status."""
    options = parse(None)
    try:
        if options.step == "pack":
            pack(options.source)
        else:
            measure(options)
    except (BuildError, OSError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
