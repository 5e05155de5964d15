"""`tritrun perplexity`: run llama-perplexity, and twice for the KL divergence from a base model."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

from tritcore.console import note, one_line
from tritcore.errors import TritError
from tritcore.files import publish, scratch_beside, sha256, sha256_of_all
from tritcore.gguf_header import ModelFile
from tritrun import variants
from tritrun.base_logits import Stamp, append_stamp, check_stamp, logits_bytes
from tritrun.machine import available_memory
from tritrun.memory import check_memory
from tritrun.models import paths_of
from tritrun.perplexity_log import Estimate, PerplexityLog
from tritrun.text_tool import OnStart, ignore_start, not_finite, run_over_text
from tritrun.tools import fingerprint

_TOOL = "llama-perplexity"
_MAX_BATCH = 2048


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from the base model's, per token. `same_top` is in percent."""

    base_perplexity: Estimate
    mean: Estimate
    median: float
    percentile_99_9: float
    maximum: float
    same_top: Estimate


@dataclass(frozen=True)
class Measurement:
    """The result for one model; `divergence` is None if there was no base model."""

    model: str
    text: str
    ctx: int
    chunks: int
    perplexity: Estimate
    divergence: Divergence | None = None

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> "Measurement":
        """The reverse of dataclasses.asdict."""
        figures = figures | {"perplexity": Estimate(**figures["perplexity"])}
        if divergence := figures["divergence"]:
            means = {name: Estimate(**divergence[name]) for name in ("base_perplexity", "mean", "same_top")}
            figures["divergence"] = Divergence(**divergence | means)
        return cls(**figures)

    def as_json(self) -> str:
        """All figures, for machines."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def as_table(self) -> Table:
        """All figures, for people."""
        caption = f"{one_line(self.text)}, {self.chunks} chunks of {self.ctx} tokens"
        table = Table("measure", caption=escape(caption))
        table.add_column(escape(one_line(self.model)), justify="right")
        table.add_row("perplexity", _with_error(self.perplexity, 4))
        if d := self.divergence:
            table.add_row("perplexity of the base", _with_error(d.base_perplexity, 4))
            table.add_row("KL divergence, mean", _with_error(d.mean, 6))
            table.add_row("KL divergence, median", f"{d.median:.6f}")
            table.add_row("KL divergence, 99.9 %", f"{d.percentile_99_9:.6f}")
            table.add_row("KL divergence, maximum", f"{d.maximum:.6f}")
            table.add_row("same top token, %", _with_error(d.same_top, 3))
        return table


@dataclass(frozen=True)
class Run:
    """The settings that all runs of llama-perplexity share."""

    text: Path
    n_ctx: int
    chunks: int | None  # None: all that the text has
    threads: int

    def measure(self, model: ModelFile, base: ModelFile | None = None, logits: Path | None = None) -> Measurement:
        """Perplexity of `model`; with a base model or its logits also the divergence from it.

        Args:
            base: the model to compare with, usually the F16 one.
            logits: file to keep the base model's logits in, or to take them from; None uses a temporary file.

        Raises:
            TritError: a file is missing or does not match, something does not fit, or the tool fails.
        """
        self.check(model, base)
        if logits is not None and base is None and not logits.exists():
            raise TritError(f"{logits}: no such file; give --base to make it")
        if base is None and logits is None:
            log = self._run_tool(model)
            return self._result(model, log, log.perplexity())
        with self._base_logits(model, base, logits) as file:
            return self.measure_against(file, model)

    def measure_against(self, logits: Path, model: ModelFile) -> Measurement:
        """Perplexity of `model` and its divergence from the base model whose logits `write_logits` made.

        Raises:
            TritError: the tool fails.
        """
        log = self._run_tool(model, "--kl-divergence", "--kl-divergence-base", str(logits))
        return self._result(model, log, log.statistics().get("Mean PPL(Q)"), _divergence(model, log))

    def write_logits(self, base: ModelFile, file: Path, stamp: Stamp | None = None) -> Measurement:
        """Write the base model's logits, whole or not at all; its perplexity comes with them.

        Args:
            stamp: to write with them, where only that tells what they are.

        Raises:
            TritError: they do not fit on the disk, or the tool fails.
        """
        with scratch_beside(file) as folder:
            partial = folder / "base-logits"
            result = self._make_logits(base, partial)
            if stamp is not None:
                append_stamp(partial, stamp)
            publish(partial, file)
        return result

    def check(self, model: ModelFile, base: ModelFile | None = None) -> None:
        """Check, by the headers, that `model` can be measured and compared with `base`.

        Raises:
            TritError: there is no text, the vocabularies differ, or a model does not fit into memory.
        """
        if not self.text.is_file() or not self.text.stat().st_size:
            raise TritError(f"{self.text}: no such text file, or it is empty")
        if base is not None and base.vocabulary_size != model.vocabulary_size:
            raise TritError(
                f"{base.path} has a vocabulary of {base.vocabulary_size} tokens, {model.path} one of "
                f"{model.vocabulary_size}: they are not the same model"
            )
        for file in filter(None, (base, model)):
            check_memory(file, self.n_ctx, available_memory())

    def _stamp(self, base: ModelFile | None) -> dict[str, str | int | None]:
        """All inputs of the logits of `base` on the text; without a base, all but the model."""
        stamp: dict[str, str | int | None] = {
            "text_sha256": sha256(self.text),
            "ctx": self.n_ctx,
            "chunks": self.chunks,
            "llama.cpp": fingerprint(),
            "cpu": variants.in_use(),
        }
        if base is not None:
            stamp |= {"vocabulary": base.vocabulary_size, "base_sha256": sha256_of_all(paths_of(base))}
        return stamp

    def _result(
        self,
        model: ModelFile,
        log: PerplexityLog,
        found: Estimate | None,
        divergence: Divergence | None = None,
    ) -> Measurement:
        perplexity = _found(found, model, log)
        return Measurement(model.path.name, self.text.name, self.n_ctx, log.chunks, perplexity, divergence)

    @contextmanager
    def _base_logits(self, model: ModelFile, base: ModelFile | None, kept: Path | None) -> Iterator[Path]:
        """The file of the base model's logits: found at `kept`, or made there or in a temporary folder."""
        if kept is not None and kept.exists():
            check_stamp(kept, {"vocabulary": model.vocabulary_size} | self._stamp(base))
            note(f"base logits: taken from {kept} ({human_size(kept.stat().st_size)})")
            yield kept
            return
        assert base is not None  # measure has seen to it
        if kept is not None:
            self.write_logits(base, kept, self._stamp(base))
            yield kept
            return
        with tempfile.TemporaryDirectory(prefix=".tritrun-") as folder:
            file = Path(folder) / "base-logits"
            self.write_logits(base, file)
            yield file

    def _make_logits(self, base: ModelFile, file: Path) -> Measurement:
        def size(chunks: int) -> int:
            return logits_bytes(self.n_ctx, chunks, base.vocabulary_size)

        def check_room(chunks: int) -> None:
            room = shutil.disk_usage(file.parent).free
            if size(chunks) > room:
                raise TritError(
                    f"the base logits take {human_size(size(chunks))}, {file.parent.parent} has {human_size(room)} "
                    "free; lower --chunks, or put them on a larger disk: TMPDIR, --logits or --work names it"
                )
            note(f"base logits: {human_size(size(chunks))}")

        log = self._run_tool(base, "--kl-divergence-base", str(file), on_start=check_room)
        result = self._result(base, log, log.perplexity())
        if file.stat().st_size != size(log.chunks):  # the tool does not notice a full disk
            raise TritError(f"the base logits could not be written whole to {file.parent.parent}; is the disk full?")
        return result

    def _run_tool(self, model: ModelFile, *options: str, on_start: OnStart = ignore_start) -> PerplexityLog:
        batch = min(self.n_ctx, _MAX_BATCH)  # one chunk at a time: no slower beyond 512 tokens, and it moves the bar
        arguments = ["-m", model.path, "-f", self.text, "-c", self.n_ctx, "-b", batch, "-t", self.threads]
        arguments += ["--check-tensors"]
        arguments += ["--chunks", self.chunks] if self.chunks else []
        return run_over_text(_TOOL, [*map(str, arguments), *options], model.path.name, on_start)


def _divergence(model: ModelFile, log: PerplexityLog) -> Divergence:
    statistics = log.statistics()

    def statistic(name: str) -> Estimate:
        return _found(statistics.get(name), model, log)

    return Divergence(
        base_perplexity=statistic("Mean PPL(base)"),
        mean=statistic("Mean KLD"),
        median=statistic("Median KLD").value,
        percentile_99_9=statistic("99.9% KLD").value,
        maximum=statistic("Maximum KLD").value,
        same_top=statistic("Same top p"),
    )


def _found(estimate: Estimate | None, model: ModelFile, log: PerplexityLog) -> Estimate:
    """`estimate`, or the tool's reason for not giving it: it ends with exit code 0 all the same."""
    if estimate is None:
        raise TritError(f"{_TOOL}: {log.first_error or 'no result: too few tokens, raise --chunks or --ctx'}")
    if not math.isfinite(estimate.value):
        raise not_finite(model.path.name)
    return estimate


def _with_error(estimate: Estimate, digits: int) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"
