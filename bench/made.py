"""Files that a command makes once: a stamp beside them says of what they were made."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tritconv.calibration.inputs import digest_of_files, digest_of_sources
from tritcore.errors import TritError
from tritcore.files import sha256_of_json, write_text_atomically
from tritrun.tools import fingerprint


def make(
    targets: Sequence[Path], command: Sequence[object], sources: Sequence[Path], run: Callable[[Sequence[object]], None]
) -> None:
    """Make files, unless they are there and made by the same programs in the same way from the same contents.

    Args:
        targets: the files that the command makes; the stamp goes beside the first.
        command: with the paths of targets and sources in it. A script of this repository, by its path, is a source too.
        sources: files, and folders with files, that the command reads.
        run: runs the command.

    Raises:
        TritError: a source is missing, or the stamp cannot be written.
    """
    stamp = targets[0].with_name(f"{targets[0].name}.made")
    wanted = _recipe(targets, command, sources)
    with suppress(OSError, ValueError, TritError):
        if json.loads(stamp.read_text(encoding="utf-8")) == {"of": wanted, "is": digest_of_files(targets)}:
            return
    stamp.unlink(missing_ok=True)
    run(command)
    write_text_atomically(stamp, json.dumps({"of": wanted, "is": digest_of_files(targets)}) + "\n")


def _recipe(targets: Sequence[Path], command: Sequence[object], sources: Sequence[Path]) -> str:
    """A digest of all that the targets depend on. Where the files lie is not among it."""
    names = {str(target): target.name for target in targets}
    names |= {str(source): _digest(source) for source in sources}
    scripts = [_digest(part) for part in command if isinstance(part, Path) and part.suffix == ".py"]
    arguments = [names.get(str(part), str(part)) for part in command if str(part) not in map(str, _folders(targets))]
    recipe = [arguments, scripts, digest_of_sources(), fingerprint()]
    return sha256_of_json(recipe)


def _folders(targets: Sequence[Path]) -> list[Path]:
    return [target.parent for target in targets]


def _digest(source: Path) -> str:
    if not source.exists():
        raise TritError(f"{source} is missing")
    return digest_of_files([path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source])
