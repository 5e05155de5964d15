"""`tritrun compare`: measure several files of one model against their base, each thing once.

All that takes long is kept in a work folder: the importance matrix, the files that llama-quantize makes, the base's
log-probabilities, the figures of each file, the rounds of the speed measurement.
"""

import datetime
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.filesize import decimal as human_size
from rich.markup import escape

from tritcore.console import err, note
from tritcore.errors import TritError
from tritcore.files import check_writable, sha256, sha256_of_digests
from tritcore.gguf_header import ModelFile, name_of_model
from tritcore.versions import version
from tritrun import machine, variants
from tritrun.bench import BenchRun
from tritrun.compare_plan import Plan
from tritrun.comparison import Comparison, Conditions, File, Row, contents
from tritrun.kept import Kept, Key
from tritrun.memory import check_memory
from tritrun.models import paths_of, read_text_model
from tritrun.naming import clean_name, clean_text, labels_of, split_label
from tritrun.peers import check_recipes, make_imatrix, quantize
from tritrun.perplexity import Measurement, Run
from tritrun.provenance import provenance
from tritrun.rounds import Speeds, Spread, run_round, summarize
from tritrun.tools import find_tool, fingerprint


@contextmanager
def work_folder(chosen: Path | None, outputs: Sequence[Path]) -> Iterator[Path]:
    """The folder for results of long work: the chosen one, one beside the first output, or a temporary one.

    Raises:
        TritError: it cannot be made.
    """
    if chosen is None and not outputs:
        with tempfile.TemporaryDirectory(prefix=".tritrun-") as folder:
            yield Path(folder)
        return
    kept = chosen or outputs[0].with_suffix(".work")
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TritError(f"--work {kept}: cannot be made: {error.strerror}") from error
    check_writable(kept / "any")
    note(f"what takes long is kept in {kept}; a run that is interrupted goes on from there")
    yield kept


def compare(plan: Plan, work: Path) -> Comparison:
    """Make the files of the recipes and measure all files. Results of long work are stored in `work`.

    Raises:
        TritError: something is missing or does not fit together, or a program fails.
    """
    return _Compare(plan, work).run()


class _Compare:
    """One run. The constructor checks all that can be checked before the long work."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self._plan = plan
        self._kept = Kept(work)
        self._run = Run(plan.text, plan.ctx, plan.chunks, plan.threads)
        self._base = read_text_model(plan.base)
        self._base_label, self._models = _named(self._base, plan)
        self._check()
        self._programs = {"libraries": fingerprint(), "cpu": variants.in_use()}
        self._digests: dict[Path, str] = {}

    def run(self) -> Comparison:
        files = {self._base_label: self._base, **self._models, **self._peers()}
        measurements = self._measure(files)
        speeds = self._speeds(files)
        rows = {
            label: Row(
                label=label,
                file=clean_name(file.path.name),
                sha256=self._digest_of(file),
                n_bytes=file.size,
                contents=contents(file),
                perplexity=measurements[label].perplexity,
                divergence=measurements[label].divergence,
                speed=speeds.get(label),
                files=tuple(
                    File(clean_text(path.name), path.stat().st_size, self._digest(path)) for path in paths_of(file)
                ),
                provenance=provenance(file),
            )
            for label, file in files.items()
        }
        base = rows.pop(self._base_label)
        real = sorted((row for row in rows.values() if not row.contents.stand_in), key=lambda row: row.n_bytes)
        stand_ins = sorted(
            (row for row in rows.values() if row.contents.stand_in), key=lambda row: row.contents.layer_bits
        )
        title = clean_name(self._plan.title or name_of_model(self._base.path))
        return Comparison(title, base, (*real, *stand_ins), self._conditions(measurements[self._base_label].chunks))

    def _check(self) -> None:
        plan = self._plan
        tools = ["llama-perplexity"]
        tools += ["llama-bench"] if plan.speed else []
        tools += ["llama-quantize"] if plan.recipes else []
        tools += ["llama-imatrix"] if plan.calibrate else []
        for tool in tools:
            find_tool(tool)
        for file in (self._base, *self._models.values()):
            self._run.check(file, self._base)
            if plan.speed:
                tokens = plan.speed.prompt_tokens + plan.speed.answer_tokens
                check_memory(file, tokens, machine.available_memory())
        for text in filter(None, (plan.calibrate, plan.imatrix)):
            if not text.is_file() or not text.stat().st_size:
                raise TritError(f"{text}: no such file, or it is empty")
        if plan.recipes:
            check_recipes(self._base, plan.recipes, has_imatrix=bool(plan.calibrate or plan.imatrix))

    def _peers(self) -> dict[str, ModelFile]:
        """The files of the recipes, by label: found in the work folder, or made there."""
        plan = self._plan
        if not plan.recipes:
            return {}
        encoders = fingerprint("libggml-base*")  # what changes in the kernels does not change a file
        imatrix = self._imatrix()
        about = {
            "base": self._digest_of(self._base),
            "imatrix": self._digest(imatrix) if imatrix else None,
            "encoders": encoders,
        }
        peers = {}
        for recipe in plan.recipes:
            path = self._kept.path(recipe, about, ".gguf")
            if not path.exists():
                options = ["--imatrix", str(imatrix)] if imatrix else []
                quantize(self._base.path, recipe, path, plan.threads, options)
                note(f"{recipe}: made by llama-quantize, {human_size(path.stat().st_size)}")
            peers[recipe] = read_text_model(path)
        return peers

    def _imatrix(self) -> Path | None:
        plan = self._plan
        if plan.calibrate is None:
            return plan.imatrix
        key = self._programs | {
            "base": self._digest_of(self._base),
            "text": self._digest(plan.calibrate),
            "chunks": plan.calibrate_chunks,
        }
        path = self._kept.path("imatrix", key, ".gguf")
        if not path.exists():
            make_imatrix(self._base, plan.calibrate, plan.calibrate_chunks, path, plan.threads)
            note(f"importance matrix: made by llama-imatrix on {plan.calibrate.name}")
        return path

    def _measure(self, files: Mapping[str, ModelFile]) -> dict[str, Measurement]:
        """Perplexity of each file, the base's first, and the divergence of the others from it."""
        about = self._programs | {
            "base": self._digest_of(self._base),
            "text": self._digest(self._plan.text),
            "ctx": self._plan.ctx,
            "chunks": self._plan.chunks,
        }
        logits = self._kept.path("logits", about)
        keys = {
            label: about | {"model": self._digest_of(file), "is_base": label == self._base_label}
            for label, file in files.items()
        }
        kept = {label: self._kept.load("quality", key) for label, key in keys.items()}
        found = {label: Measurement.from_dict(figures) for label, figures in kept.items() if figures is not None}
        missing = [label for label in files if label not in found]
        if missing and not logits.exists():
            missing = list(dict.fromkeys([self._base_label, *missing]))
        for number, label in enumerate(missing, len(files) - len(missing) + 1):
            try:
                if label == self._base_label:
                    found[label] = self._run.write_logits(self._base, logits)
                else:
                    found[label] = self._run.measure_against(logits, files[label])
            except TritError as error:
                raise TritError(f"{label}: {error}") from error
            self._kept.store("quality", keys[label], asdict(found[label]))
            note(f"{label}: {_summary(found[label])} ({number} of {len(files)})")
        return found

    def _speeds(self, files: Mapping[str, ModelFile]) -> dict[str, dict[str, Spread]]:
        """Speed of all files but stand-ins, by label. The rounds of an earlier run count if they measured all."""
        plan = self._plan
        if plan.speed is None:
            return {}
        digests = {label: self._digest_of(file) for label, file in files.items() if not contents(file).stand_in}
        by_digest = {digest: files[label] for label, digest in digests.items()}
        key: Key = self._programs | {
            "prompt_tokens": plan.speed.prompt_tokens,
            "answer_tokens": plan.speed.answer_tokens,
            "threads": plan.threads,
            "machine": machine.describe(),
        }
        earlier = self._kept.load("speed", key) or []
        rounds: list[Speeds] = [speeds for speeds in earlier if by_digest.keys() <= speeds.keys()]
        bench = BenchRun(plan.speed.prompt_tokens, plan.speed.answer_tokens, 1, plan.threads)
        tests = {digest: partial(bench.speeds, file) for digest, file in by_digest.items()}
        while len(rounds) < plan.speed.rounds:
            rounds.append(run_round(tests, len(rounds)))
            self._kept.store("speed", key, rounds)
            note(f"speed: round {len(rounds)} of {plan.speed.rounds}")
        return {label: summarize(rounds, digest) for label, digest in digests.items()}

    def _conditions(self, chunks: int) -> Conditions:
        plan = self._plan
        calibration = plan.calibrate or plan.imatrix
        return Conditions(
            command=plan.command,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            text=clean_name(plan.text.name),
            text_sha256=self._digest(plan.text),
            ctx=plan.ctx,
            chunks=chunks,
            recipes=tuple(plan.recipes),
            calibration=clean_name(calibration.name) if calibration and plan.recipes else None,
            threads=plan.threads,
            cpu=self._programs["cpu"],
            machine=machine.describe(),
            speed=asdict(plan.speed) if plan.speed else None,
            versions={
                "trit-gguf": version("trit-gguf"),
                "llama-cpp-python": version("llama-cpp-python"),
                "libraries": self._programs["libraries"],
            },
        )

    def _digest_of(self, model: ModelFile) -> str:
        return sha256_of_digests([self._digest(path) for path in paths_of(model)])

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            with err.status(f"reading {escape(clean_name(path.name))}"):
                self._digests[path] = sha256(path)
        return self._digests[path]


def _named(base: ModelFile, plan: Plan) -> tuple[str, dict[str, ModelFile]]:
    """The label of the base, and the other files by label.

    Raises:
        TritError: a file is missing or damaged, or two have the same label.
    """
    given = [split_label(model) for model in plan.models]
    files = [read_text_model(path) for _, path in given]
    unnamed = [name_of_model(path) for label, path in given if label is None]
    base_label, *found = labels_of(name_of_model(base.path), unnamed)
    short = iter(found)
    labels = [clean_name(label if label is not None else next(short)) for label, _ in given]
    base_label = clean_name(base_label)
    for label, count in Counter([base_label, *labels, *plan.recipes]).items():
        if count > 1:
            raise TritError(f"{count} files would be called {label}; give them names: LABEL=FILE")
    return base_label, dict(zip(labels, files, strict=True))


def _summary(measurement: Measurement) -> str:
    text = f"PPL {measurement.perplexity.value:.3f}"
    if measurement.divergence:
        text += f", KL divergence {measurement.divergence.mean.value:.4f}"
    return text
