#!/usr/bin/env python3
"""Time and memory of `tritconv --calibrate`, this tree beside another revision, or on layers of a large model.

    bench/calibration.py --text wt2.valid.txt                              this tree and --against, in turns
    bench/calibration.py --text wt2.valid.txt --quality wiki.test.raw      and the KL divergence of both results
    bench/calibration.py --text wt2.valid.txt --models qwen2.5-0.5b --layers 3
    bench/calibration.py --text wt2.valid.txt --large --layers 3 --layers 6
    bench/calibration.py --text wt2.valid.txt --quick                      does it work? the figures mean nothing

Each run is a process of its own with an empty cache. Wall time, CPU time and peak resident memory are those that the
kernel gives for this process and its children. The other revision's Python packages are taken out of git; the compiled
libraries are the same for both. A run starts only when the machine does nothing else, and the table says how much CPU
time other processes took during it. Linux only.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from command import exit_status
from large_checkpoint import PRESETS, Shape
from programs import BUILD, ROOT, commit, machine
from quality import as_markdown, run
from tritcore.console import note, out
from tritcore.errors import TritError
from tritcore.files import sha256, write_text_atomically

_PACKAGES = ("core", "convert", "runtime")  # folders of Python packages, as far as a revision has them
_SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODELS = ("smollm2", "qwen2.5-0.5b")
_LARGE = "qwen2.5-32b"
_TINY = Shape(192, 320, 3, 1, 4096, 2)
_HERE = "this tree"

_QUIET = 0.15  # cores that other processes may use
_SAMPLE, _PATIENCE = 2.0, 120.0  # seconds


@dataclass(frozen=True)
class Run:
    """What one conversion took.

    Attributes:
        wall: seconds.
        cpu: seconds of CPU time, children included.
        peak: greatest resident memory of a process, in bytes.
        others: cores that other processes used meanwhile, on average.
        digest: SHA-256 of the file that was written.
    """

    wall: float
    cpu: float
    peak: int
    others: float
    digest: str


@dataclass(frozen=True)
class Revision:
    """A set of Python packages. `path` is the PYTHONPATH that finds them, `options` go to its conversions only."""

    name: str
    path: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A model and a number of tokens to calibrate on. `command` is tritconv's for that kind of source."""

    model: str
    command: str
    source: Path
    tokens: int


def measure(command: Sequence[object], environment: Mapping[str, str], folder: Path, target: Path) -> Run:
    """Run a command in `folder`; its output goes to a log there.

    The kernel counts the greatest memory of this process too, since the command starts as its copy: keep it small.

    Raises:
        TritError: the command fails; the message has the last line of its output.
    """
    log = folder / "log"
    busy, start = busy_seconds(), time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, cwd=folder, stdout=output, stderr=output
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.kill()  # only where this process is interrupted: it has ended otherwise
            process.wait()
    wall = time.monotonic() - start
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
        raise TritError(f"{shlex.join(map(str, command))}: exit code {process.returncode}: {lines[-1]}")
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, busy_seconds() - busy - cpu) / wall
    return Run(wall, cpu, usage.ru_maxrss * 1024, others, sha256(target))


def busy_seconds(root: Path = Path("/")) -> float:
    """CPU time since the machine started, of all processes; time that a hypervisor gave to others counts too."""
    fields = (root / "proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float = _PATIENCE, sample: float = _SAMPLE) -> None:
    """Wait until other processes use next to no CPU time. Raises TritError, which names them, after `patience`."""
    end = time.monotonic() + patience
    while True:
        busy, before = busy_seconds(), _cpu_of_processes()
        time.sleep(sample)
        cores = (busy_seconds() - busy) / sample
        if cores <= _QUIET:
            return
        if time.monotonic() >= end:
            after = _cpu_of_processes()
            used = sorted(((after[key] - before.get(key, 0.0), key[1]) for key in after), reverse=True)
            names = ", ".join(name for seconds, name in used[:3] if seconds > 0)
            raise TritError(
                f"other processes use {cores:.1f} cores ({names}): end them, or measure all the same with --busy"
            )


def _cpu_of_processes() -> dict[tuple[int, str], float]:
    """Seconds of CPU time by process, (id, name)."""
    used = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        fields = rest.split()
        used[int(path.parent.name), name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def extract(revision: str, folder: Path) -> Revision:
    """Take a revision's Python packages out of git. Raises TritError."""
    git = ["git", "-C", str(ROOT)]
    try:
        names = subprocess.run(
            [*git, "ls-tree", "-d", "--name-only", revision, *_PACKAGES], capture_output=True, text=True, check=True
        ).stdout.split()
        packed = subprocess.run([*git, "archive", revision, *names], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise TritError(f"--against {revision}: git does not give this revision: fetch it, or name another") from error
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return Revision(revision, os.pathsep.join(str(folder / name) for name in names))


def convert(case: Case, revision: Revision, options: argparse.Namespace, target: Path) -> Run:
    """Convert with an empty cache, in an empty folder. Raises TritError."""
    if not options.busy:
        wait_until_quiet()
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        environment = os.environ | {
            "PYTHONPATH": revision.path,
            "TRITCONV_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        command: list[object] = [sys.executable, "-m", "tritconv", case.command, case.source, "--force", "-o", target]
        command += [
            "--depth",
            2,
            "--embed-type",
            "q8_0",
            "--calibrate",
            options.text.resolve(),
            "--calib-tokens",
            case.tokens,
        ]
        done = measure([*command, *revision.options], environment, folder, target)
    note(
        f"{case.model}, {case.tokens} tokens, {revision.name}: {done.wall:.1f} s, {done.cpu:.1f} s of CPU time, "
        f"{done.peak / 2**30:.2f} GiB"
    )
    return done


def compare(options: argparse.Namespace, work: Path, here: Revision) -> dict[str, object]:
    """Measure both revisions in turns, print the tables, return the figures. Raises TritError."""
    revisions = [here, extract(options.against, work / "against")]
    cases = [case for model in options.models for case in _cases(model, options, work)]
    runs: dict[tuple[Case, str], list[Run]] = {}
    files: dict[tuple[Case, str], Path] = {}
    for case in cases:
        for number in range(options.runs):
            for revision in revisions if number % 2 == 0 else reversed(revisions):  # a drift favours none
                key = case, revision.name
                label = revision.name.replace(" ", "-").replace("/", "-")
                files[key] = work / f"{case.model}-{case.tokens}-{label}.gguf"
                runs.setdefault(key, []).append(convert(case, revision, options, files[key]))
    out.print(_table(cases, [revision.name for revision in revisions], runs), markup=False, soft_wrap=True)
    figures: list[dict[str, object]] = [
        {"model": case.model, "tokens": case.tokens, "revision": name, "runs": [asdict(done) for done in found]}
        for (case, name), found in runs.items()
    ]
    quality = _quality(cases, files, options, work) if options.quality else {}
    return {"against": options.against, "cases": figures, "quality": quality}


def _cases(model: str, options: argparse.Namespace, work: Path) -> list[Case]:
    if model == "smollm2":
        if not _SMOLLM2.is_file():
            raise TritError(f"{_SMOLLM2} is missing: python models/fetch.py SmolLM2-135M-Instruct")
        return [Case(model, "gguf-to-gguf", _SMOLLM2, tokens) for tokens in options.tokens]
    shape = replace(_TINY, tied=True) if options.quick else PRESETS[model]
    if options.layers:
        shape = replace(shape, layers=options.layers[0])
        model = f"{model}-{options.layers[0]}-layers"
    folder = _make_checkpoint(work / model, shape)
    return [Case(model, "hf-to-gguf", folder, tokens) for tokens in options.tokens]


def _make_checkpoint(folder: Path, shape: Shape) -> Path:
    """Make a checkpoint in a process of its own: its memory would count as that of the runs. Raises TritError."""
    numbers = [f"--{name.replace('_', '-')}={size}" for name, size in asdict(shape).items() if name != "tied"]
    run([ROOT / "bench" / "large_checkpoint.py", *numbers, "--tied" if shape.tied else "--no-tied", "-o", folder])
    return folder


def _table(cases: Sequence[Case], names: Sequence[str], runs: Mapping[tuple[Case, str], Sequence[Run]]) -> str:
    """Medians with all runs in brackets, and the ratios of the medians, as a Markdown table."""
    lines = [
        "| model | tokens | revision | wall, s | CPU, s | peak, GiB | cores of others | same bytes each time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        here, other = (runs[case, name] for name in names)
        for name, found in ((names[0], here), (names[1], other)):
            figures = [
                _spread([done.wall for done in found], 1),
                _spread([done.cpu for done in found], 1),
                _spread([done.peak / 2**30 for done in found], 2),
                f"{max(done.others for done in found):.2f} at most",
                "yes" if len({done.digest for done in found}) == 1 else "no",
            ]
            lines.append(f"| {' | '.join([case.model, str(case.tokens), name, *figures])} |")
        measures: tuple[Callable[[Run], float], ...] = (lambda r: r.wall, lambda r: r.cpu, lambda r: r.peak)
        ratios = [f"{statistics.median(map(of, here)) / statistics.median(map(of, other)):.2f}" for of in measures]
        lines.append(f"| {' | '.join([case.model, str(case.tokens), 'ratio', *ratios, '', ''])} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def _quality(
    cases: Sequence[Case], files: Mapping[tuple[Case, str], Path], options: argparse.Namespace, work: Path
) -> dict[str, object]:
    """Measure the KL divergence of each result from its model in F16; print a table for each case. Raises TritError."""
    figures: dict[str, object] = {}
    bases: dict[str, Path] = {}
    for case in cases:
        if case.model not in bases:
            bases[case.model] = base = work / f"{case.model}-F16.gguf"
            f16 = ["--depth", 2, "--method", "search", "--tensor-depth", ".=f16", "--embed-type", "f16"]
            run(["-m", "tritconv", case.command, case.source, "--force", "-o", base, *f16])
        report = work / "report.json"
        results = [(name, path) for (other, name), path in files.items() if other == case]
        run(
            [
                *("-m", "tritrun", "compare", "--base", bases[case.model], "--text", options.quality, "--no-speed"),
                *("--chunks", options.chunks, "--work", work / "compare", "--json", report),
                *(f"{name}={path}" for name, path in results),
            ]
        )
        models = json.loads(report.read_text(encoding="utf-8"))["models"]
        out.print(f"\n{case.model}, {case.tokens} tokens\n\n{as_markdown(models)}", markup=False, soft_wrap=True)
        figures[f"{case.model}, {case.tokens} tokens"] = models
    return figures


def large(options: argparse.Namespace, work: Path, here: Revision) -> dict[str, object]:
    """Measure this tree on a few layers of a large model; print the table, return the figures. Raises TritError."""
    found: dict[int, Run] = {}
    (tokens,) = options.tokens
    whole = (_TINY if options.quick else PRESETS[_LARGE]).layers
    for layers in sorted(set(options.layers)):
        with tempfile.TemporaryDirectory(dir=work) as name:
            shape = replace(_TINY if options.quick else PRESETS[_LARGE], layers=layers)
            folder = _make_checkpoint(Path(name) / f"{_LARGE}-{layers}", shape)
            case = Case(folder.name, "hf-to-gguf", folder, tokens)
            found[layers] = convert(case, here, options, folder.with_name(f"{folder.name}.gguf"))
    out.print(_large_table(found, whole), markup=False, soft_wrap=True)
    return {"tokens": tokens, "layers": {str(layers): asdict(done) for layers, done in found.items()}}


def _large_table(found: Mapping[int, Run], whole: int) -> str:
    """Time and peak memory by number of layers, and what they say of a model with `whole` layers."""
    lines = ["| layers | wall, s | CPU, s | peak, GiB | cores of others |", "|---|---|---|---|---|"]
    for layers, done in found.items():
        lines.append(f"| {layers} | {done.wall:.1f} | {done.cpu:.1f} | {done.peak / 2**30:.2f} | {done.others:.2f} |")
    few, many = min(found), max(found)
    if few < many:
        per_layer = (found[many].wall - found[few].wall) / (many - few)
        total = found[many].wall + per_layer * (whole - many)
        lines += [
            "",
            f"{per_layer:.1f} s for each layer more; {whole} layers: {total / 3600:.2f} hours; "
            f"peak with {many} layers / with {few}: {found[many].peak / found[few].peak:.3f}",
        ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--against", default="6b2ed94", metavar="REV", help="the other revision (default: %(default)s)")
    parser.add_argument("--models", action="append", choices=_MODELS, help="default: all; repeatable")
    parser.add_argument(
        "--tokens", action="append", type=int, metavar="N", help="default: 16384 and 65536, --large: 16384; repeatable"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each revision (default: %(default)s)")
    parser.add_argument("--quality", type=Path, metavar="FILE", help="another text, to measure KL divergence on")
    parser.add_argument("--chunks", type=int, default=24, metavar="N", help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--large", action="store_true", help=f"this tree alone, on layers of {_LARGE}'s shape")
    parser.add_argument(
        "--layers",
        action="append",
        type=int,
        metavar="N",
        help=f"with --large: repeatable, default: 3 and 6; else: of {_MODELS[1]}'s shape, default: all of them",
    )
    parser.add_argument(
        "--options", default="", metavar="'--X Y'", help="more options of tritconv, for this tree's conversions only"
    )
    parser.add_argument("--busy", action="store_true", help="measure though the machine does other work")
    parser.add_argument("--quick", action="store_true", help="does it work? one run on a tiny model")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "calibration", metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.models = options.models or (_MODELS[1:] if options.quick else _MODELS)
    options.tokens = options.tokens or ([1024] if options.quick else [16384] if options.large else [16384, 65536])
    if options.large:
        options.layers = options.layers or ([1, 2] if options.quick else [3, 6])
    elif len(options.layers or ()) > 1:
        parser.error("--layers is repeated with --large only")
    options.runs = 1 if options.quick else options.runs
    options.chunks = 2 if options.quick else options.chunks
    if options.large and (len(options.tokens) > 1 or options.quality):
        parser.error("--large takes one number of --tokens and no --quality")
    if options.runs < 1:
        parser.error("--runs is 1 or more")
    return options


def report(options: argparse.Namespace) -> None:
    """Measure, print the tables and write the figures to a JSON file. Raises TritError."""
    if sys.platform != "linux":
        raise TritError("calibration.py reads /proc: run it on Linux")
    for text in filter(None, (options.text, options.quality)):
        if not text.is_file():
            raise TritError(f"{text}: no such file")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(str(ROOT / name) for name in _PACKAGES)
    here = Revision(_HERE, path, tuple(shlex.split(options.options)))
    with tempfile.TemporaryDirectory(prefix="work-", dir=options.output) as name:
        figures = (large if options.large else compare)(options, Path(name), here)
    figures = {"commit": commit(), "machine": machine(), "options": options.options} | figures
    target = options.output / ("large.json" if options.large else "calibration.json")
    write_text_atomically(target, json.dumps(figures, indent=1) + "\n")
    note(f"figures: {target}")


def main() -> None:
    """Measure what the command line asks for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the conversion too, as Ctrl-C does
    report(parse())


if __name__ == "__main__":
    sys.exit(exit_status(main))
