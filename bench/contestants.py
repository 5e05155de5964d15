"""What is measured: the models, the types, and the files of each model in each type."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from programs import ROOT
from random_model import Shape, write_random_model
from tritcore.console import err
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile, read_model_file
from tritrun.comparison import contents
from tritrun.peers import quantize
from tritrun.tools import fingerprint

_SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_LLAMA = Shape("llama", 2048, 8192, layers=8, heads=32, kv_heads=32, vocabulary=49152, tied=False)
_QWEN2 = Shape("qwen2", 896, 4864, layers=24, heads=14, kv_heads=2, vocabulary=32000, tied=True)
_QWEN2_FULL = Shape("qwen2", 896, 4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True)


@dataclass(frozen=True)
class Model:
    """A model, and how its file in float16 comes about.

    Attributes:
        title: what a reader has to know of it.
        write_base: write the file with float16 matrices, given its path.
    """

    name: str
    title: str
    write_base: Callable[[Path], object]


def _random(name: str, title: str, shape: Shape) -> Model:
    return Model(name, title, lambda path: write_random_model(path, shape))


def _smollm2_base(path: Path) -> None:
    if not _SMOLLM2.is_file():
        raise TritError(f"{_SMOLLM2} is missing: python models/fetch.py SmolLM2-135M-Instruct")
    quantize(_SMOLLM2, "F16", path, 1, ["--allow-requantize"])


_MODELS = (
    Model("smollm2-135m", "SmolLM2-135M-Instruct, 576/1536 x 30", _smollm2_base),
    _random("llama-1b", "Llama-shaped, random weights, 2048/8192 x 8", _LLAMA),
    _random("qwen2-0.5b", "shape of Qwen2.5-0.5B, random weights, 896/4864 x 24", _QWEN2),
    _random("qwen2-0.5b-full", "the same with its 151936 tokens", _QWEN2_FULL),
)
MODELS = {model.name: model for model in _MODELS}
DEFAULT_MODELS = ("smollm2-135m", "llama-1b", "qwen2-0.5b")


@dataclass(frozen=True)
class WeightType:
    """A way to store the layers.

    Attributes:
        file_type: llama-quantize's name.
        pure: all matrices in this one type, not llama-quantize's mixture.
    """

    name: str
    file_type: str
    pure: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is one of the TRIT types."""
        return self.name.startswith("TRIT")


_TYPES = (
    *(WeightType(name, name) for name in ("TRIT1", "TRIT2", "TRIT3", "TRIT4", "TQ1_0", "TQ2_0")),
    WeightType("Q3_K", "Q3_K_S"),
    WeightType("Q3_K_M", "Q3_K_M", pure=False),
    *(WeightType(name, name) for name in ("IQ3_S", "IQ4_XS", "Q4_0")),
    WeightType("Q4_K", "Q4_K_S"),
    WeightType("Q4_K_M", "Q4_K_M", pure=False),
    WeightType("Q5_K", "Q5_K_S"),
    *(WeightType(name, name) for name in ("Q6_K", "Q8_0")),
)
TYPES = {weight_type.name: weight_type for weight_type in _TYPES}


@dataclass(frozen=True)
class Contestant:
    """A model's file in one type.

    Attributes:
        bits_per_weight: of the matrices of the layers.
        contents: tensor type -> its share of the weights in those matrices, 0..1; more than one where
            llama-quantize mixes types, or where rows do not fit into a type's blocks.
    """

    type: str
    file: ModelFile
    bits_per_weight: float
    contents: dict[str, float]

    @property
    def bytes_per_token(self) -> int:
        """What is read of the file for a token: all but embeddings that are not the output matrix too."""
        n_bytes = {tensor.name: tensor.n_bytes for tensor in self.file.tensors}
        return sum(n_bytes.values()) - (n_bytes["token_embd.weight"] if "output.weight" in n_bytes else 0)


def prepare(model: Model, types: Iterable[WeightType], folder: Path, threads: int) -> list[Contestant]:
    """The files of a model, made by llama-quantize where they are not in `folder`.

    Embeddings and output matrix are Q8_0 in all of them: the layers make the difference.

    Args:
        folder: for this model's files, made where it is missing.

    Raises:
        TritError: a file cannot be made.
    """
    # Other types are as the pinned source has them; ours change while they are worked on.
    ours = fingerprint("libggml-base.*")[:12]
    base = folder / "F16.gguf"
    options = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
    contestants = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for weight_type in types:
            path = folder / (f"{weight_type.name}-{ours}.gguf" if weight_type.is_ours else f"{weight_type.name}.gguf")
            if not path.exists():
                if not base.exists():
                    with err.status(f"{model.name}: F16"):
                        model.write_base(base)
                for outdated in folder.glob(f"{weight_type.name}-*.gguf"):
                    outdated.unlink()
                pure = ["--pure"] if weight_type.pure else []
                quantize(base, weight_type.file_type, path, threads, [*pure, *options])
            file = read_model_file(path)
            inside = contents(file)
            contestants.append(Contestant(weight_type.name, file, inside.layer_bits, inside.layers))
    except OSError as error:
        raise TritError(f"cannot write to {folder}: {error.strerror}; free some space, or see --cache") from error
    return contestants
