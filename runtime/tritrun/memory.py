"""The memory that a model needs: weights and key-value cache, less what a GPU holds."""

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.filesize import decimal as human_size

from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile

_TO_COMPUTE_WITH = 1 << 30  # bytes of a GPU that stay free, as llama.cpp's --fit-target has it


def kv_cache_bytes(model: ModelFile, n_ctx: int, kv_type: GGMLQuantizationType = GGMLQuantizationType.F16) -> int:
    """Estimate of the key-value cache for `n_ctx` tokens, in bytes.

    It is an upper bound for models with sliding windows, and 0 where the metadata lack the sizes.
    """
    first_heads, heads = _heads(model, "attention.head_count")
    width = model.hyperparameter("embedding_length") // first_heads if first_heads else 0
    keys = model.hyperparameter("attention.key_length") or width
    values = model.hyperparameter("attention.value_length") or width
    _, kv_heads = _heads(model, "attention.head_count_kv")
    block, n_bytes = GGML_QUANT_SIZES[kv_type]
    return n_bytes * n_ctx * (kv_heads or heads) * (keys + values) // block


def n_layers(model: ModelFile) -> int:
    """Layers that `--gpu-layers` counts: the output is one of them."""
    return model.hyperparameter("block_count") + 1


def layers_that_fit(
    model: ModelFile, n_ctx: int, free: int, kv_type: GGMLQuantizationType = GGMLQuantizationType.F16
) -> int:
    """How many layers, with their key-value caches, a GPU with `free` bytes holds beside what it computes with."""
    layer = (model.size + kv_cache_bytes(model, n_ctx, kv_type)) / n_layers(model)
    return max(0, min(int((free - _TO_COMPUTE_WITH) / layer), n_layers(model)))


def share_of_layers(model: ModelFile, elsewhere: int, here: int | None) -> int:
    """The layers for servers and GPUs, so that the model fills their memory and this machine's to the same part.

    Args:
        elsewhere, here: free bytes; None is not known, and counts as much as elsewhere.
    """
    here = elsewhere if here is None else here
    return round(n_layers(model) * elsewhere / max(1, elsewhere + here))


def check_memory(
    model: ModelFile,
    n_ctx: int,
    available: int | None,
    *,
    on_gpu: float = 0.0,
    kv_type: GGMLQuantizationType = GGMLQuantizationType.F16,
    where: str = "memory",
) -> None:
    """Check that a model fits into memory.

    Args:
        n_ctx: context length in tokens.
        available: bytes of memory. None stands for an unknown number: every model passes.
        on_gpu: share of the layers that a GPU or another machine holds, 0..1.
        kv_type: of the key-value cache.
        where: what has these bytes, for the error.

    Raises:
        TritError: weights and key-value cache need more than `available`.
    """
    weights = int(model.size * (1 - on_gpu))
    cache = int(kv_cache_bytes(model, n_ctx, kv_type) * (1 - on_gpu))
    if available is not None and weights + cache > available:
        raise TritError(
            f"{model.path} does not fit into {where}: it needs {human_size(weights)} for weights and about "
            f"{human_size(cache)} for a context of {n_ctx} tokens, {human_size(available)} are free; "
            "take a smaller --ctx or a smaller model"
        )


def _heads(model: ModelFile, key: str) -> tuple[int, int]:
    """Attention heads: of the first layer that has any, and of all layers together.

    The metadata have one number for all layers, or a list with a number for each.
    """
    value = model.metadata.get(model.key_of_architecture(key))
    if isinstance(value, tuple):
        heads = [n for n in value if isinstance(n, int) and n > 0]
        return (heads[0] if heads else 0), sum(heads)
    heads_of_each = model.hyperparameter(key)
    return heads_of_each, heads_of_each * model.hyperparameter("block_count")
