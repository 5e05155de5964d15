"""The Hugging Face hub: its errors in one line, and GGUF models from it, in the cache of huggingface_hub."""

import io
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gguf.constants import GGMLQuantizationType, LlamaFileType
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars, logging
from rich.markup import escape
from rich.prompt import IntPrompt

from tritcore import files, sizes
from tritcore.console import byte_bar, err, one_line, status
from tritcore.errors import TritError, first_line
from tritcore.gguf_header import group_parts, name_of_model, number_of_parts

logging.set_verbosity_error()  # what matters comes back as an exception

_MAIN = constants.DEFAULT_REVISION
_NO_MODEL = re.compile(r"mmproj|imatrix|(?<![a-z])(lora|adapters?)(?![a-z])", re.IGNORECASE)  # in the names of files
_TYPES = {one.name for one in GGMLQuantizationType} | {
    one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in LlamaFileType
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of git; or SHA-256, of LFS


@contextmanager
def one_line_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Raise TritError, with what to do, for the errors of huggingface_hub within the context.

    Args:
        hub_id: such as `Qwen/Qwen2.5-0.5B`.
        revision: what was asked for; None stands for the main branch.
    """
    try:
        yield
    except GatedRepoError as error:
        raise TritError(
            f"{hub_id} is gated: accept its terms on the hub, then set HF_TOKEN to a token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise TritError(f"{hub_id} has no revision {revision!r} on {constants.ENDPOINT}") from error
    except RepositoryNotFoundError as error:
        raise TritError(
            f"{hub_id} is not on {constants.ENDPOINT}: check the id (a private model needs HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise TritError(f"{hub_id} is no hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TritError(
            f"{hub_id} is not in the cache and {constants.ENDPOINT} was not asked or does not answer: "
            "check the network and HF_HUB_OFFLINE, or give a local copy"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise TritError(f"{constants.ENDPOINT} refused {hub_id}: {first_line(error)}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise TritError(
            f"cannot download {hub_id} from {constants.ENDPOINT}: {first_line(error)}; run it again to go on"
        ) from error


@dataclass(frozen=True)
class _Wanted:
    """What a user asks for: a file or a type, or neither."""

    repo: str
    file: str | None
    type: str | None
    revision: str | None


@dataclass(frozen=True)
class _Stated:
    """A file, as the hub states it: its size in bytes, and the digest under which the cache keeps it."""

    name: str
    size: int
    digest: str


def download_model(repo: str, file: str | None, type_name: str | None, revision: str | None) -> Path:
    """The path of a GGUF model of the hub, in the cache of huggingface_hub. What is not there yet is downloaded.

    Without a network, with HF_HUB_OFFLINE or while the hub is out of service, it is looked for in the cache alone.
    On a terminal the user is asked which one of several is meant.

    Args:
        repo: such as `org/name`.
        file: name of a file in the repository, which may be any part of a split model.
        type_name: tensor type that the name of the file says, in upper or lower case. None, with no file, takes the
            only model.
        revision: branch, tag or commit; None stands for the main branch.

    Returns:
        The file; the first part of a split model.

    Raises:
        TritError: there is no such model, there are several, it cannot be had, or it is damaged.
    """
    wanted = _Wanted(repo, file, type_name, revision)
    with one_line_errors(repo, revision):
        try:
            info = HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except (HTTPError, OSError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return _find_in_cache(wanted)  # nobody was asked, or nobody answers
        siblings = {one.rfilename: one for one in info.siblings or () if _is_gguf(one.rfilename)}
        parts = _choose(wanted, {name: one.size for name, one in siblings.items()})
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise TritError(f"{constants.ENDPOINT} states no commit for {repo}: check HF_ENDPOINT")
        paths = [_fetch(repo, info.sha, _stated(repo, siblings[name])) for name in parts]
        ref = _storage(repo) / "refs" / (revision or _MAIN)
        if revision != info.sha and not (ref.is_file() and _commit(ref) == info.sha):
            ref.parent.mkdir(parents=True, exist_ok=True)
            files.write_text_atomically(ref, info.sha)
        return paths[0]


def cached_models() -> Iterator[tuple[str, Path]]:
    """The GGUF models in the cache: a reference to each, and a path, that of its first part. Each file once."""
    for storage in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = storage.name.removeprefix("models--").replace("--", "/")
        refs = {_commit(path): path.name for path in sorted((storage / "refs").glob("*")) if path.is_file()}
        folders = [folder for folder in sorted((storage / "snapshots").glob("*")) if folder.is_dir()]
        seen: set[Path] = set()
        for folder in sorted(folders, key=lambda folder: refs.get(folder.name) != _MAIN):
            revision = refs.get(folder.name, folder.name)
            models = group_parts(_names_in(folder))
            for parts in models:
                path = folder / parts[0]
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield _reference(repo, parts, models, None if revision == _MAIN else revision), path


def _storage(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _commit(ref: Path) -> str:
    """What a branch or tag stood for when it was last asked for."""
    return ref.read_text(errors="replace").strip()


def _names_in(folder: Path) -> list[str]:
    """The names of the GGUF files of a snapshot in the cache."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [name for path in paths if _is_gguf(name := path.relative_to(folder).as_posix())]


def _is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, and leads to no other folder."""
    path = PurePosixPath(name)
    return path.suffix.lower() == ".gguf" and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _find_in_cache(wanted: _Wanted) -> Path:
    storage, revision = _storage(wanted.repo), wanted.revision or _MAIN
    ref = storage / "refs" / revision
    folder = storage / "snapshots" / (_commit(ref) if ref.is_file() else revision)
    names = _names_in(folder)
    if not names:
        raise LocalEntryNotFoundError(wanted.repo)
    return folder / _choose(wanted, dict.fromkeys(names), place=" in the cache, and the hub was not reached")[0]


def _choose(wanted: _Wanted, n_bytes: Mapping[str, int | None], place: str = "") -> tuple[str, ...]:
    """The names of the parts of the model that is wanted, or of its only file.

    Args:
        n_bytes: size of each GGUF file that there is, None if it is not known, by name.
        place: where they are, as the end of an error.
    """
    models = group_parts(n_bytes)
    if wanted.file is None:
        models = [parts for parts in models if not _NO_MODEL.search(parts[0])]
        found = [parts for parts in models if wanted.type is None or _says(parts, wanted.type)]
    else:
        found = [parts for parts in models if wanted.file in parts]
    references = {_reference(wanted.repo, parts, models, wanted.revision): parts for parts in models}
    if not found:
        what = wanted.file or (f"{wanted.type} model" if wanted.type and models else "GGUF model")
        advice = f": choose {_listed(list(references))}" if references else "; tritconv hf-to-gguf converts checkpoints"
        raise TritError(f"{wanted.repo} has no {what}{place}{advice}")
    if len(found) > 1:
        fitting = {reference: parts for reference, parts in references.items() if parts in found}
        if not (err.is_terminal and sys.stdin.isatty()):
            raise TritError(f"{wanted.repo} has {len(fitting)} models that fit{place}: choose {_listed(list(fitting))}")
        found = [_ask(wanted.repo, fitting, n_bytes)]
    (parts,) = found
    count = number_of_parts(parts[0])
    if len(parts) < count:
        raise TritError(f"{wanted.repo} has {len(parts)} of the {count} parts of {parts[0]}{place}")
    return parts


def _says(parts: Sequence[str], type_name: str) -> bool:
    """Whether the name of a model says a type: as a word of it, not as a piece of a longer one."""
    return re.search(rf"(?<!\w){re.escape(type_name)}(?!\w)", _stem(parts), re.IGNORECASE) is not None


def _stem(parts: Sequence[str]) -> str:
    """The name of a model with its folder, without what follows from the file."""
    path = Path(parts[0])
    return f"{path.parent.as_posix()}/{name_of_model(path)}"


def _reference(repo: str, parts: Sequence[str], models: Iterable[Sequence[str]], revision: str | None) -> str:
    """The shortest way to name a model among all of its repository, by a type or by its file."""
    at = f"@{revision}" if revision else ""
    for word in reversed(re.split(r"\W+", _stem(parts).upper())):
        if word in _TYPES and sum(_says(other, word) for other in models) == 1:
            return f"{repo}:{word}{at}"
    return f"{repo}/{parts[0]}{at}"


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _ask(repo: str, fitting: Mapping[str, tuple[str, ...]], n_bytes: Mapping[str, int | None]) -> tuple[str, ...]:
    """Ask the user for one of several models."""
    for number, (reference, parts) in enumerate(fitting.items(), 1):
        size = sum(n_bytes[name] or 0 for name in parts)
        shown = f"{reference} ({sizes.show(size)})" if size else reference
        err.print(f"{number:3}  {escape(one_line(shown))}", soft_wrap=True)
    numbers = [str(number) for number in range(1, len(fitting) + 1)]
    try:
        answer = IntPrompt.ask(f"which one of {repo}", console=err, choices=numbers, show_choices=False)
    except EOFError as error:
        raise TritError(f"no model of {repo} was chosen") from error
    return list(fitting.values())[answer - 1]


def _stated(repo: str, sibling: RepoSibling) -> _Stated:
    size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(size, int) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise TritError(f"{constants.ENDPOINT} states no size or checksum for {sibling.rfilename} of {repo}")
    return _Stated(sibling.rfilename, size, digest)


def _fetch(repo: str, commit: str, file: _Stated) -> Path:
    """The path of a file in the cache, whole and as the hub states it."""
    storage = _storage(repo)
    place = storage / "snapshots" / commit / file.name
    if _is_whole(place, file):
        return place
    blob, lock = storage / "blobs" / file.digest, storage.parent / ".locks" / storage.name / f"{file.digest}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the one of huggingface_hub
        for path in (place, blob):
            if not _is_whole(path, file):
                path.unlink(missing_ok=True)
        # what is larger does not come by plain HTTP; huggingface_hub gets it by Xet, which checks each chunk
        if not blob.exists() and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _download(repo, commit, file, blob)
    return Path(hf_hub_download(repo, file.name, revision=commit))


def _is_whole(path: Path, file: _Stated) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _download(repo: str, commit: str, file: _Stated, blob: Path) -> None:
    """Download a file, or what is missing of it, and check it before it gets its place.

    hf_hub_download of huggingface_hub 2 begins anew each time.
    """
    partial = blob.with_name(f"{blob.name}.incomplete")  # the name that huggingface_hub 1 goes on from, too
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    disable_progress_bars()
    with byte_bar() as bar:
        task = bar.add_task(one_line(file.name), total=file.size)
        with _Watched(partial, lambda at: bar.update(task, completed=at)) as output:
            missing, free = file.size - output.tell(), shutil.disk_usage(blob.parent).free
            if missing > free:
                raise TritError(
                    f"no space left for {file.name}: {sizes.show(missing)} are to come, {sizes.show(free)} are free; "
                    "free some, or set HF_HOME to a folder elsewhere"
                )
            http_get(
                hf_hub_url(repo, file.name, revision=commit),
                output,
                resume_size=output.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
            )
    is_sha256 = len(file.digest) == 64
    with status(f"checking {one_line(file.name)}"):
        is_sound = not is_sha256 or files.sha256(partial) == file.digest
    if not is_sound:
        partial.unlink()
        raise TritError(
            f"{file.name} of {repo} came damaged: its SHA-256 is not the one that {constants.ENDPOINT} states; "
            "it is deleted: run it again"
        )
    files.publish(partial, blob)


class _Watched(io.BufferedWriter):
    """A file to append to, which reports its length in bytes after each write."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._report = report
        report(self.tell())

    def write(self, data: bytes) -> int:  # type: ignore[override]
        written = super().write(data)
        self._report(self.tell())
        return written
