"""What the results in the cache depend on: two that could differ never have the same key."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import tritcore
from tritcore import ggml
from tritcore.files import sha256, sha256_of_all, sha256_of_bytes, sha256_of_json

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "gguf")


def digest_of_files(files: Iterable[Path]) -> str:
    """SHA-256, in hex, of the contents of files, sorted by path. Raises TritError if one cannot be read."""
    return sha256_of_all(sorted(files))


def digest_of_tokens(tokens: torch.Tensor) -> str:
    """SHA-256, in hex, of token ids on the CPU: of their type and shape too."""
    about = f"{tokens.dtype} {tuple(tokens.shape)} "
    return sha256_of_bytes(about.encode(), tokens.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Machinery:
    """The programs and the machine that compute a result.

    Attributes:
        precision: of products: float32, bfloat16.
        device: the processor, as torch calls it, and what it can do.
        threads: of torch: sums are split between them.
        libraries: versions, by name.
        encoder: a digest of the encoders in C.
        sources: a digest of the code of tritconv and tritcore: they have no version that changes with each method.
    """

    precision: str
    device: str
    threads: int
    libraries: tuple[tuple[str, str], ...]
    encoder: str
    sources: str

    @staticmethod
    def here(precision: str, device: torch.device) -> "Machinery":
        """What computes in this process."""
        is_gpu = device.type == "cuda"
        can_do = torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability()
        return Machinery(
            precision,
            f"{device.type} {can_do}",
            torch.get_num_threads(),
            tuple((name, version(name)) for name in _LIBRARIES),
            digest_of_files([ggml.library_path()]),
            digest_of_sources(),
        )


@cache
def digest_of_sources() -> str:
    """SHA-256, in hex, of the names and contents of the sources of tritconv and tritcore."""
    packages = [Path(__file__).parent.parent, Path(tritcore.__file__).parent]
    sources = {path: path.relative_to(package.parent) for package in packages for path in package.rglob("*.py")}
    return sha256_of_json([(str(sources[path]), sha256(path)) for path in sorted(sources, key=sources.__getitem__)])


@dataclass(frozen=True)
class Inputs:
    """All that a result depends on.

    Attributes:
        kind: of result.
        model: a digest of its files.
        tokens: a digest of the sequences.
        seed: of all that is drawn.
        machinery: what computes it.
        matrices: those that the result is about, by name, with their depths or what else is to know of them.
        held_out: a digest of the sequences to judge by; "" where nothing is judged.
        options: of the method, by name.
    """

    kind: str
    model: str
    tokens: str
    seed: int
    machinery: Machinery
    matrices: tuple[tuple[str, int | str], ...] = ()
    held_out: str = ""
    options: tuple[tuple[str, float], ...] = ()

    def key(self) -> str:
        """24 hexadecimal digits."""
        return sha256_of_json(asdict(self))[:24]
