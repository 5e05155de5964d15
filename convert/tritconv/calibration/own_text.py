"""Text that a model writes itself, to calibrate on besides the user's.

It is of all the kinds that the model knows, where the user's is of one and there is little of it (as in LLM-QAT, Liu
et al., 2023, arXiv:2305.17888).
"""

import hashlib
from collections.abc import Callable

import torch

from tritconv.calibration.model import LayeredModel
from tritconv.calibration.store import LayerStore

_VERSION = 1  # of what is written: what an older method kept is not taken for this one's
_PROMPT = 16  # tokens
_BATCH = 64  # sequences at a time: the memory of all their keys and values is needed

OnTokens = Callable[[int, int], None]  # tokens written, of so many


def open_store(model: LayeredModel, model_digest: str, tokens: torch.Tensor, seed: int) -> LayerStore:
    """Where finished batches are kept.

    Args:
        model_digest: of the model's files.
        tokens, seed: as for `write`.
    """
    return LayerStore(
        {
            "what": "own text",
            "version": _VERSION,
            "model": model_digest,
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "seed": seed,
            **model.computed_by,
        }
    )


def write(
    model: LayeredModel, tokens: torch.Tensor, count: int, seed: int, store: LayerStore, on_tokens: OnTokens
) -> torch.Tensor:
    """Let the model go on from the beginnings of sequences, from each of them again and again if there are too few.

    Args:
        tokens: int64 (sequences, length).
        count: sequences to write.
        seed: of what is drawn.
        store: keeps finished batches; those that it has are not written again.

    Returns:
        int64 (count, length).
    """
    length = tokens.shape[1]
    prompts = tokens[torch.arange(-(-count // _BATCH) * _BATCH) % len(tokens), : min(_PROMPT, length // 2)]
    to_write = length - prompts.shape[1]
    done = 0

    def on_token() -> None:
        nonlocal done
        done += _BATCH
        on_tokens(done, len(prompts) * to_write)

    batches = []
    for number, some in enumerate(prompts.split(_BATCH)):
        kept = store.load(number)
        if kept is None:
            kept = {"tokens": model.go_on(some, length, (seed * 65537 + number) % 2**32, on_token).numpy()}
            store.save(number, kept)
        done = (number + 1) * _BATCH * to_write
        batches.append(torch.from_numpy(kept["tokens"]))
    return torch.cat(batches)[:count]
