"""Text that a model writes itself, to calibrate on besides the user's.

It is of all the kinds that the model knows, where the user's is of one and there is little of it (as in LLM-QAT, Liu
et al., 2023, arXiv:2305.17888).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tritconv.calibration.model import LayeredModel
from tritconv.calibration.store import LayerStore
from tritcore.errors import TritError, first_line

_PROMPT = 16  # tokens
_BATCH = 64  # sequences at a time: the memory of all their keys and values is needed

OnTokens = Callable[[int, int], None]  # tokens written, of so many


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

    Raises:
        TritError: the model cannot do it.
    """
    length = tokens.shape[1]
    prompts = tokens[torch.arange(-(-count // _BATCH) * _BATCH) % len(tokens), : min(_PROMPT, length // 2)]
    to_write = length - prompts.shape[1]
    done = 0

    def on_token() -> None:
        nonlocal done
        done += _BATCH
        on_tokens(done, len(prompts) * to_write)

    writer = cache(model.whole_copy)  # not made where nothing is left to write
    batches = []
    for number, some in enumerate(prompts.split(_BATCH)):
        kept = store.load(number)
        if kept is None:
            kept = {"tokens": _go_on(writer(), some, length, (seed * 65537 + number) % 2**32, on_token).numpy()}
            store.save(number, kept)
        done = (number + 1) * _BATCH * to_write
        batches.append(torch.from_numpy(kept["tokens"]))
    return torch.cat(batches)[:count]


def _go_on(writer: Any, prompts: torch.Tensor, length: int, seed: int, on_token: Callable[[], None]) -> torch.Tensor:
    """Draw what follows prompts from a model's own predictions as they are.

    Args:
        writer: a model of the transformers library.
        prompts: int64 (sequences, tokens).
        length: tokens that a sequence has at the end, its prompt included.
        on_token: called when each sequence has one token more.

    Returns:
        int64 (sequences, length).
    """
    from transformers import GenerationConfig, StoppingCriteria

    class Count(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            on_token()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_length=length,  # a text that ends early is nothing to calibrate on
        max_length=length,
        pad_token_id=0,  # never used
    )
    ids = prompts.to(writer.device)
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            written = writer.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[Count()]
            )
    except Exception as error:  # the library raises whatever its many authors chose
        raise TritError(f"the model cannot write text: {first_line(error)}: leave out --calib-own") from error
    return written.cpu().clone()
