"""`tritconv publish`: a folder with GGUF files and their card becomes a repository on the hub, in one commit."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id

from tritconv.verify import faults
from tritcore import sizes
from tritcore.console import note, one_line, status, warning
from tritcore.errors import TritError, UsageError
from tritcore.files import sha256
from tritcore.gguf_header import parts_of, read_model_file
from tritcore.repository import CARD_KEYS
from tritcore.versions import version

logging.set_verbosity_error()  # what matters comes back as an exception

_CARD = "README.md"
_SUFFIXES = (".gguf", ".json", ".png", ".svg", ".txt")
_LEGAL = ("LICENSE", "NOTICE")  # how names of files begin that belong to the weights
_NO_PERMISSION = (401, 403, 404)  # the hub tells who may not see a repository that there is none
_MAX_SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class Upload:
    """A file to upload. It keeps its name."""

    path: Path
    n_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {sizes.show(self.n_bytes):>8}  {one_line(self.path.name)}"


@dataclass(frozen=True)
class Repository:
    """Where to upload to: a repository such as org/name, which is made if it is not there, private or not.

    Attributes:
        branch: None for the main one.

    Raises:
        UsageError: `name` is not of this form.
    """

    name: str
    branch: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise UsageError(f"{self.name} is no name of a repository: {error}") from error
        if "/" not in self.name:
            raise UsageError(f"{self.name} is no name of a repository: write ORG/NAME")

    @property
    def url(self) -> str:
        """Of its page."""
        return f"{constants.ENDPOINT}/{self.name}" + (f"/tree/{self.branch}" if self.branch else "")


def check_token() -> None:
    """Check, before the work, that there is a token for the hub. Raises TritError."""
    if get_token() is None:
        raise TritError("no token for the hub: set HF_TOKEN to one that may write, or log in with `hf auth login`")


def prepare(folder: Path, threads: int) -> list[Upload]:
    """Check a folder, and say what of it is to be uploaded. Notes on stderr tell what is left out.

    Raises:
        TritError: there is no model or no card, a file is damaged or not what it seems, or a part is missing.
    """
    paths = list(_files(folder))
    models = [path for path in paths if path.suffix == ".gguf"]
    if not models:
        raise TritError(f"{folder} has no GGUF file to publish")
    _check_card(folder / _CARD)
    _check_models(models, threads)
    with status("checksums"):
        uploads = [Upload(path, path.stat().st_size, sha256(path)) for path in paths]
    card = (folder / _CARD).read_text(encoding="utf-8", errors="replace")
    if missing := [one.path.name for one in uploads if one.path.suffix == ".gguf" and one.sha256 not in card]:
        warning(f"{_CARD} does not have the SHA-256 of {', '.join(missing)}: `tritrun compare --card` writes it")
    return uploads


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder that belong into a repository; not those of folders in it."""
    if not folder.is_dir():
        raise TritError(f"{folder}: no such folder")
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise TritError(f"{path} is a link to a place outside of {folder}: replace it by the file, or remove it")
        if path.is_file() and _belongs(path.name):
            yield path
        else:
            left_out.append(path.name)
    if left_out:
        note(f"left out: {', '.join(left_out)}")


def _belongs(name: str) -> bool:
    known = name == _CARD or name.startswith(_LEGAL) or name.endswith(_SUFFIXES)
    return known and not name.startswith(".") and name.isprintable()


def _check_card(path: Path) -> None:
    """Check that a card says what the hub and its users need. Raises TritError."""
    if not path.is_file():
        raise TritError(f"{path}: no card: write one with `tritrun compare --card {path}`")
    try:
        header = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise TritError(f"{path}: its header cannot be read: {one_line(error)[:_MAX_SHOWN]}") from error
    if missing := [key for key in CARD_KEYS if not header.get(key)]:
        raise TritError(f"{path} has no {' and no '.join(missing)}: add it to the header, between two lines of ---")


def _check_models(paths: Sequence[Path], threads: int) -> None:
    """Check that models are whole and sound. Raises TritError."""
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            continue
        seen.update(part.path for part in parts_of(read_model_file(path)))
        if found := faults(path, threads):
            more = f" (the first of {len(found)} findings)" if len(found) > 1 else ""
            raise TritError(f"{found[0]}{more}; nothing is published")


def upload(uploads: Sequence[Upload], repository: Repository, message: str | None) -> None:
    """Upload files in one commit. What an interrupted upload has brought there is not sent again.

    Raises:
        TritError: the hub does not take them, or cannot be reached.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    ours = version("trit-gguf")
    api = HfApi(library_name="tritconv", library_version=ours)
    with _one_line_errors(repository):
        api.create_repo(repository.name, private=repository.private or None, exist_ok=True)
        if repository.private and not api.model_info(repository.name).private:
            raise TritError(f"{repository.name} is public already: make it private on the hub, or leave out --private")
        if repository.branch:
            api.create_branch(repository.name, branch=repository.branch, exist_ok=True)
        commit = api.create_commit(
            repository.name,
            [CommitOperationAdd(one.path.name, one.path) for one in uploads],
            commit_message=message or f"Publish with tritconv {ours}",
            revision=repository.branch,
        )
    note(f"commit {commit.oid}")


@contextmanager
def _one_line_errors(repository: Repository) -> Iterator[None]:
    try:
        yield
    except TritError:
        raise
    except Exception as error:  # of huggingface_hub, or of the network library that it uses, which differs by version
        name, endpoint = repository.name, constants.ENDPOINT
        reason = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        if isinstance(reason, HfHubHTTPError) and reason.response.status_code in _NO_PERMISSION:
            raise TritError(
                f"{endpoint} does not let this token write to {name}: check the name, and that the token may write "
                "(HF_TOKEN, or `hf auth login`)"
            ) from error
        raise TritError(
            f"cannot upload to {name} on {endpoint}: {one_line(reason)[:_MAX_SHOWN].rstrip('.')}; try again: what has "
            "arrived is not sent twice"
        ) from error
