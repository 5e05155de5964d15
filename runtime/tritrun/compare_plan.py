"""The request to `tritrun compare`: files, text and settings."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tritrun.naming import clean_text, split_label


@dataclass(frozen=True)
class SpeedSettings:
    """How speed is measured: rounds over all files, tokens of each test."""

    rounds: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Plan:
    """The files to compare, and the settings.

    Attributes:
        models: files, each as "FILE" or "LABEL=FILE".
        recipes: names of what llama-quantize is to make of the base.
        chunks: of the text, None for all.
        calibrate: text to make an importance matrix for the recipes with, None for none.
        calibrate_chunks: of that text, None for all.
        imatrix: an importance matrix that is there already.
        speed: None leaves it out.
        title: of the report; empty takes the name of the base's file.
    """

    base: Path
    text: Path
    models: Sequence[str] = ()
    recipes: Sequence[str] = ()
    chunks: int | None = None
    ctx: int = 512
    threads: int = 1
    calibrate: Path | None = None
    calibrate_chunks: int | None = None
    imatrix: Path | None = None
    speed: SpeedSettings | None = None
    title: str = ""

    @property
    def command(self) -> str:
        """The command line that asks for this comparison, without folders and outputs."""
        words = ["tritrun", "compare", "--base", self.base.name, "--text", self.text.name]
        options: dict[str, object] = {
            "--chunks": self.chunks,
            "--ctx": self.ctx,
            "--threads": self.threads,
            "--recipe": ",".join(self.recipes),
            "--calibrate": self.calibrate and self.calibrate.name,
            "--calibrate-chunks": self.calibrate_chunks,
            "--imatrix": self.imatrix and self.imatrix.name,
        }
        if self.speed:
            options |= {f"--{name.replace('_', '-')}": value for name, value in asdict(self.speed).items()}
        for option, value in options.items():
            words += [option, str(value)] if value else []
        words += [] if self.speed else ["--no-speed"]
        for model in self.models:
            label, file = split_label(model)
            words.append(f"{label}={file.name}" if label else file.name)
        return clean_text(shlex.join(words))
