"""What the results in the cache depend on: two that could differ never have the same key."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from tritcore import ggml

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "gguf")
_PIECE = 1 << 20  # bytes read at a time


def digest_of_files(files: Iterable[Path]) -> str:
    """SHA-256, in hex, of the contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        one = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(_PIECE):
                one.update(part)
        total.update(one.digest())
    return total.hexdigest()


def digest_of_tokens(tokens: torch.Tensor) -> str:
    """SHA-256, in hex, of token ids on the CPU: of their type and shape too."""
    about = f"{tokens.dtype} {tuple(tokens.shape)} "
    return hashlib.sha256(about.encode() + tokens.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Machinery:
    """The programs and the machine that compute a result.

    Attributes:
        precision: of products: float32, bfloat16.
        device: the processor, as torch calls it, and what it can do.
        threads: of torch: sums are split between them.
        libraries: versions, by name.
        encoder: a digest of the encoders in C.
        sources: a digest of tritconv's own code, all of it: it has no version that changes with each method.
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
    """SHA-256, in hex, of tritconv's own code."""
    root = Path(__file__).parent.parent
    sources = sorted(root.rglob("*.py"))
    names = "\n".join(str(path.relative_to(root)) for path in sources)
    return hashlib.sha256(f"{names} {digest_of_files(sources)}".encode()).hexdigest()


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
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]
