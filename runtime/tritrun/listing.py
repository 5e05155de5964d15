"""`tritrun list`: the GGUF models on this machine, each with what the other commands take for it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

from tritcore.console import one_line
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile, group_parts
from tritrun.models import read_text_model


@dataclass(frozen=True)
class Listed:
    """A model that can be run, or why a file is none.

    Attributes:
        reference: what the other commands take for it.
        path: of the file, or of the first part of a split model.
        model: its header; None if there is a problem.
        problem: what is wrong with it, without its name.
    """

    reference: str
    path: Path
    model: ModelFile | None
    problem: str | None

    def as_dict(self) -> dict[str, object]:
        """What is known of it, with null for what is not."""
        model = self.model
        return {
            "model": self.reference,
            "path": str(self.path),
            "architecture": model and model.metadata["general.architecture"],
            "type": model and model.main_type,
            "bytes": model and model.size,
            "bits_per_weight": model and model.bits_per_weight,
            "problem": self.problem,
        }


def local_models(folders: Sequence[Path]) -> list[Listed]:
    """The models that lie in folders, not below them, then those in the cache of the hub. Each file once.

    Raises:
        TritError: a folder cannot be read.
    """
    from tritcore.hub import cached_models  # loads huggingface_hub

    found: dict[Path, str] = {}
    seen: set[Path] = set()
    for reference, path in (*_in_folders(folders), *cached_models()):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            found[path] = reference
    return [_listed(reference, path) for path, reference in found.items()]


def as_json(models: Sequence[Listed]) -> str:
    """A list of models, for machines."""
    return json.dumps([one.as_dict() for one in models], indent=2) + "\n"


def as_table(models: Sequence[Listed]) -> Table:
    """A list of models, for people."""
    table = Table()
    table.add_column("model", overflow="fold")
    table.add_column("architecture")
    for heading in ("type", "size", "bpw"):
        table.add_column(heading, justify="right")
    for one in models:
        name = escape(one_line(one.reference))
        if one.model is None:
            table.add_row(f"{name}\n[yellow]{escape(one_line(one.problem))}[/yellow]")
            continue
        table.add_row(
            name,
            escape(one_line(one.model.metadata["general.architecture"])),
            one.model.main_type,
            human_size(one.model.size),
            f"{one.model.bits_per_weight:.2f}",
        )
    return table


def _in_folders(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """A reference to each GGUF file or split model, and its path."""
    for folder in folders:
        try:
            names = [path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file()]
        except OSError as error:
            raise TritError(f"{folder}: cannot be read: {error.strerror}") from error
        for parts in group_parts(names):
            yield str(folder / parts[0]), folder / parts[0]


def _listed(reference: str, path: Path) -> Listed:
    try:
        return Listed(reference, path, read_text_model(path), None)
    except TritError as error:
        return Listed(reference, path, None, str(error).removeprefix(str(path)).removeprefix(":").strip())
