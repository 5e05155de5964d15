"""The gradients of the predictions, with the output matrix in memory in chunks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

Logits = Callable[[torch.Tensor], torch.Tensor]  # of hidden states
OpenChunk = Callable[[range], AbstractContextManager[Logits]]  # for a range of the vocabulary
OnPredictions = Callable[[range, torch.Tensor], None]  # that range, and probabilities float32 (tokens, rows)


def label_gradients(
    open_chunk: OpenChunk,
    hidden: torch.Tensor,
    chunks: Sequence[range],
    draws: torch.Tensor,
    on_predictions: OnPredictions,
) -> torch.Tensor:
    """The gradients of -log p(label), labels drawn from the predictions.

    The first pass over the chunks finds the sum of exponentials of each, so each token's chunk is known from which its
    label comes. The second one draws the label within that chunk, and goes back from the logits. With a single chunk,
    one pass does both.

    Args:
        open_chunk: gives float32 (sequences, length, rows) for a chunk of the vocabulary, with gradients.
        hidden: float32 (sequences, length, width).
        chunks: of the vocabulary, in order.
        draws: (sequences, length), uniform in 0 .. 1: the labels' places in the cumulative distributions.
        on_predictions: called for each sequence and chunk, after the logits have been computed.

    Returns:
        float32 (sequences, length, width).
    """
    out = torch.zeros_like(hidden)
    sums = torch.empty(*hidden.shape[:2], len(chunks))  # logarithms of sums of exponentials
    if len(chunks) > 1:
        for number, chunk in enumerate(chunks):
            with torch.no_grad(), open_chunk(chunk) as logits:
                for i in range(len(hidden)):
                    sums[i, :, number] = logits(hidden[i : i + 1])[0].logsumexp(dim=-1)
    for number, chunk in enumerate(chunks):
        with torch.enable_grad(), open_chunk(chunk) as logits:
            for i in range(len(hidden)):
                part = hidden[i : i + 1].detach().requires_grad_()
                found = logits(part)
                values = found.detach()[0]
                if len(chunks) == 1:
                    sums[i, :, 0] = values.logsumexp(dim=-1)
                gradient = (values - sums[i].logsumexp(dim=-1, keepdim=True)).exp_()
                on_predictions(chunk, gradient)
                _take_labels(gradient, sums[i], draws[i], number)
                out[i] += torch.autograd.grad(found, part, gradient[None])[0][0]
    return out


def _take_labels(gradient: torch.Tensor, sums: torch.Tensor, draws: torch.Tensor, number: int) -> None:
    """Make gradients for the logits of a chunk of its predictions: one less where the label is.

    Args:
        gradient: (tokens, rows), the probabilities.
        sums: (tokens, chunks), of the exponentials of each chunk, their logarithms.
        draws: (tokens,), in 0 .. 1, the labels' places in the cumulative distribution.
        number: of the chunk.
    """
    ends = sums.softmax(dim=-1).cumsum(dim=-1)
    draws = draws[:, None] * ends[:, -1:]
    mine = torch.searchsorted(ends, draws, right=False)[:, 0].clamp_(max=ends.shape[1] - 1) == number
    if bool(mine.any()):
        before = ends[mine, number - 1 : number] if number else torch.zeros(int(mine.sum()), 1)
        share = (draws[mine] - before) / (ends[mine, number : number + 1] - before)
        within = gradient[mine].cumsum(dim=-1)
        labels = torch.searchsorted(within, share.clamp_(0, 1) * within[:, -1:]).clamp_(max=gradient.shape[1] - 1)
        gradient[mine.nonzero()[:, 0], labels[:, 0]] -= 1
