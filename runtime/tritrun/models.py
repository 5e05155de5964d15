"""The files that tritrun takes: models that write text, whole or in parts."""

from pathlib import Path

from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile, Skipped, joined, parts_of, read_model_file

_NO_MODELS = {
    "adapter": "an adapter (LoRA): merge it into its model first",
    "imatrix": "an importance matrix: it is for tritconv and llama-quantize",
    "mmproj": "the part of a model that sees or hears: its language model is in another file",
}
_ENCODERS = frozenset(
    {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "jina-bert-v2", "jina-bert-v3"}
    | {"gemma-embedding", "llama-embed"}
)
_NO_POOLING = (-1, 0)
_NO_TOKENIZER = ("no_vocab", "none", "")


def read_text_model(path: Path) -> ModelFile:
    """Read the header of a text model. Of a split model, any part may be given.

    Returns:
        The header of the file, or of the first part with the size and the tensors of all.

    Raises:
        TritError: as `read_model_file` and `parts_of`; or the file holds something else, which the message names.
    """
    model = joined(parts_of(read_model_file(path)))
    if (reason := _no_text_model(model)) is not None:
        raise TritError(f"{path} cannot be run: it is {reason}")
    return model


def read_adapter(path: Path, model: ModelFile) -> Path:
    """See that a file is a LoRA adapter for the architecture of `model`. Raises TritError if it is not."""
    adapter = read_model_file(path)
    kind, architecture = adapter.metadata.get("adapter.type"), adapter.metadata.get("general.architecture")
    if adapter.metadata.get("general.type") != "adapter" or kind != "lora":
        raise TritError(f"{path} is no LoRA adapter in GGUF; llama.cpp's convert_lora_to_gguf.py makes one")
    if architecture != model.metadata.get("general.architecture"):
        raise TritError(f"{path} is an adapter for another architecture: {architecture}")
    return adapter.path


def read_projector(path: Path) -> Path:
    """See that a file is the part of a model that sees or hears. Raises TritError if it is not."""
    projector = read_model_file(path)
    if projector.metadata.get("general.architecture") != "clip":
        raise TritError(f"{path} is no part that sees or hears: its architecture is not 'clip', as an mmproj file's is")
    return projector.path


def paths_of(model: ModelFile) -> list[Path]:
    """The file of a model, or all files of one in parts. Raises TritError if a part has gone."""
    return [part.path for part in parts_of(read_model_file(model.path))]


def read_text(model: ModelFile, key: str) -> str | None:
    """The text under a metadata key, however long; None if there is none. Raises TritError if it cannot be read."""
    value = model.metadata.get(key)
    if not isinstance(value, Skipped):
        return value if isinstance(value, str) else None
    field = model.fields[key]
    try:
        with model.path.open("rb") as file:
            file.seek(field.start)
            return file.read(field.length).decode(errors="replace")
    except OSError as error:
        raise TritError(f"{model.path}: cannot be read: {error.strerror}") from error


def _no_text_model(model: ModelFile) -> str | None:
    """The kind of a file that is no text model, as far as the header shows it; None for a text model."""
    metadata = model.metadata
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if architecture == "clip":
        kind = "mmproj"
    if isinstance(kind, str) and kind in _NO_MODELS:
        return _NO_MODELS[kind]
    if not isinstance(architecture, str) or not architecture:
        return "no model: its header names no architecture"
    if not model.tensors:
        return "a vocabulary without weights"
    if architecture == "t5":
        return "a model with an encoder and a decoder, which llama.cpp's programs run and tritrun does not"
    if architecture == "t5encoder":
        return "an encoder alone: it reads and cannot write"
    pooling = metadata.get(f"{architecture}.pooling_type", 0)
    if architecture in _ENCODERS or pooling not in _NO_POOLING:
        return "an embedding or ranking model: it reads and cannot write"
    if metadata.get(f"{architecture}.attention.causal") is False:
        return "a model that does not write from left to right (an embedding or diffusion model)"
    if metadata.get("tokenizer.ggml.model") in (None, *_NO_TOKENIZER):
        return "a model without a tokenizer: convert it again, with the checkpoint's tokenizer files"
    return None
