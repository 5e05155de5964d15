#!/usr/bin/env python3
"""How fast llama.cpp reads a prompt and writes an answer, for every TRIT type and the types it competes with.

Each round runs llama-bench once on every file, in an order that rotates, and measures how fast memory can be read.
Medians, ratios and verdicts are printed; samples go to a JSON file for each model and instruction set, after each
round; a chart for each model. An interrupted run goes on where it was, as long as programs and settings are the same.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

import bandwidth
import chart
import engine
import results
from command import exit_status
from contestants import DEFAULT_MODELS, MODELS, TYPES, Contestant, prepare
from programs import BUILD, commit, has_avx512, machine
from tritcore.console import note, out
from tritcore.errors import TritError
from tritcore.files import write_text_atomically
from tritrun import variants
from tritrun.bench import BenchRun
from tritrun.machine import physical_cores
from tritrun.rounds import PHASES, run_round
from tritrun.tools import fingerprint

_STYLES = {results.Verdict.MET: "green", results.Verdict.BAR_MET: "yellow", results.Verdict.MISSED: "red"}
_QUICK = {
    "models": "smollm2-135m",
    "rounds": 2,
    "prompt_tokens": 32,
    "answer_tokens": 8,
    "output": BUILD / "bench/quick",
}
_FULL = {
    "models": ",".join(DEFAULT_MODELS),
    "rounds": 5,
    "prompt_tokens": 512,
    "answer_tokens": 64,
    "output": BUILD / "bench",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"models: {', '.join(MODELS)}\n\ntypes: {', '.join(TYPES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", metavar="A,B", help=f"(default: {_FULL['models']})")
    parser.add_argument("--types", metavar="A,B", default=",".join(TYPES), help="(default: all)")
    parser.add_argument(
        "--cpu",
        action="append",
        metavar="NAME",
        help="variant of ggml-cpu, such as haswell for AVX2; may be repeated (default: the best)",
    )
    parser.add_argument(
        "--engine",
        action="append",
        metavar="LABEL=COMMAND",
        help="llama-bench of another engine: 'fork IQ3_K=/opt/fork/llama-bench -m IQ3_K.gguf'; may be repeated",
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help=f"(default: {_FULL['rounds']})")
    parser.add_argument(
        "--prompt-tokens", "-p", type=_positive, metavar="N", help=f"(default: {_FULL['prompt_tokens']})"
    )
    parser.add_argument(
        "--answer-tokens", "-n", type=_positive, metavar="N", help=f"(default: {_FULL['answer_tokens']})"
    )
    parser.add_argument("--threads", "-t", type=_positive, metavar="N", help="(default: physical cores)")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="for JSON and SVG (default: build/bench)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for models (default: build/bench/models)")
    parser.add_argument("--again", action="store_true", help="forget the rounds that were measured already")
    parser.add_argument("--files-only", action="store_true", help="make the models, and measure nothing")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, two short rounds: shows that it works, not how fast"
    )
    options = parser.parse_args(arguments)
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.models = _chosen(parser, "--models", options.models, MODELS)
    options.types = _chosen(parser, "--types", options.types, TYPES)
    try:
        options.engines = [engine.parse(text) for text in options.engine or []]
    except ValueError as error:
        parser.error(f"--engine: {error}")
    labels = [*TYPES, *(one.label for one in options.engines)]
    if len(set(labels)) < len(labels):
        parser.error("--engine: each needs a label of its own, which is no name of a type")
    options.cpu = list(dict.fromkeys(options.cpu or []))
    options.threads = options.threads or physical_cores()
    options.cache = options.cache or BUILD / "bench" / "models"
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _chosen(parser: argparse.ArgumentParser, option: str, names: str, known: dict[str, Any]) -> list[Any]:
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            parser.error(f"{option}: {name!r} is none of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(chosen)]


def measure(run: results.Run, tests: Mapping[str, Callable[[], dict[str, float]]], rounds: int, report: Path) -> None:
    """Add rounds to `run` until it has `rounds`; write `report` after each."""
    settings = run.settings
    reader = bandwidth.build()
    while len(run.rounds) < rounds:
        number = len(run.rounds)
        date = datetime.datetime.now(datetime.timezone.utc)
        start = time.monotonic()
        memory = bandwidth.measure(reader, settings.threads)
        speeds = run_round(tests, number)
        run.rounds.append({"date": date.isoformat(timespec="seconds"), "bandwidth": memory, "speeds": speeds})
        write_text_atomically(report, run.as_json())
        seconds = time.monotonic() - start
        note(f"{settings.model}, CPU {settings.cpu}: round {number + 1} of {rounds} took {seconds:.0f} s")


def speed_table(run: results.Run, title: str) -> Table:
    """Size and speed of each type."""
    settings = run.settings
    table = Table(
        title=f"{title}; CPU {settings.cpu}",
        caption=f"tokens/s: median (range) of {len(run.rounds)} rounds, {settings.threads} threads; answer of "
        f"{settings.answer_tokens} tokens, prompt of {settings.prompt_tokens}; GB/s: of weights while decoding, where "
        f"threads that only read get {run.bandwidth().median / 1e9:.1f}",
    )
    table.add_column("type", min_width=8)
    table.add_column("layers hold")
    for heading in ("bpw", "file", *PHASES, "GB/s"):
        table.add_column(heading, justify="right")
    for name, file in run.files.items():
        bits, rate = file["bits_per_weight"], run.read_rate(name)
        table.add_row(
            escape(name),
            ", ".join(f"{inside} {share:.0%}" for inside, share in file.get("contents", {}).items()),
            "" if bits is None else f"{bits:.2f}",
            human_size(file["n_bytes"]),
            *(run.speed(name, phase).format(1) for phase in PHASES),
            "" if rate is None else f"{rate.median / 1e9:.1f}",
            style="bold" if name.startswith("TRIT") else None,
        )
    return table


def ratio_table(run: results.Run) -> Table:
    """The ratios that have targets, as far as both types were measured."""
    avx512 = has_avx512(run.settings.cpu)
    table = Table("ratio", title=f"{run.settings.model}; CPU {run.settings.cpu}")
    for heading in ("target", "median (range)", "verdict"):
        table.add_column(heading, justify="right")
    if not avx512:
        table.caption = f"without AVX-512 the bar is {results.REDUCED:g} times the target"
    for target in results.TARGETS:
        if not {target.ours, target.peer} <= run.files.keys():
            continue
        ratio = run.ratio(target.ours, target.peer, target.phase)
        verdict = results.verdict(ratio.median, target, run.settings.model, avx512)
        table.add_row(
            f"{target.phase} {target.ours} / {target.peer}",
            f">= {target.at_least:.2f}" if verdict is not results.Verdict.NO_TARGET else "",
            ratio.format(2),
            verdict.value,
            style=_STYLES.get(verdict),
        )
    return table


def _run(model: str, cpu: str, contestants: Sequence[Contestant], options: argparse.Namespace) -> results.Run:
    files: dict[str, dict[str, Any]] = {
        contestant.type: {
            "n_bytes": contestant.file.size,
            "bytes_per_token": contestant.bytes_per_token,
            "bits_per_weight": contestant.bits_per_weight,
            "contents": contestant.contents,
        }
        for contestant in contestants
    }
    files |= {one.label: one.facts() for one in options.engines}
    settings = results.Settings(
        model, cpu, options.prompt_tokens, options.answer_tokens, options.threads, fingerprint(), machine()
    )
    path = options.output / f"speed-{model}-{cpu}.json"
    earlier = [] if options.again else results.read_rounds(path, settings, files)
    if earlier:
        note(f"{path} has {len(earlier)} rounds of these programs; --again forgets them")
    run = results.Run(settings, commit(), files, earlier)
    bench = BenchRun(options.prompt_tokens, options.answer_tokens, 1, options.threads, cpu_only=True)
    tests = {one.type: partial(bench.speeds, one.file) for one in contestants}
    tests |= {one.label: partial(one.measure, bench) for one in options.engines}
    measure(run, tests, options.rounds, path)
    return run


def report(options: argparse.Namespace) -> None:
    """Make the files, measure, print tables, write JSON and charts.

    Raises:
        TritError: something is missing, or a program fails.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TritError(f"--output {options.output}: cannot be made: {error.strerror}") from error
    cpus = options.cpu or [variants.in_use()]
    for cpu in cpus:
        variants.environment(cpu)  # finds a wrong name before anything takes time
    contestants = {
        model.name: prepare(model, options.types, options.cache / model.name, options.threads)
        for model in options.models
    }
    if options.files_only:
        return
    runs: dict[str, list[results.Run]] = {name: [] for name in contestants}
    for cpu in cpus:
        variants.force(cpu)
        for name in contestants:
            run = _run(name, cpu, contestants[name], options)
            out.print(speed_table(run, MODELS[name].title))
            out.print(ratio_table(run))
            runs[name].append(run)
    for name in runs:
        path = options.output / f"speed-{name}.svg"
        write_text_atomically(path, chart.draw(MODELS[name].title, runs[name]))
        out.print(f"{path}", soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: report(chosen)))
