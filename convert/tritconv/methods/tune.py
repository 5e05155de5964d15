"""The `tune` method: training a layer, after gptq, towards the output of the full-precision one.

The codes follow latent weights, in units of the scale, through a straight-through estimator: forward the nearest code,
backward as if there were no rounding (Bengio et al., 2013, arXiv:1308.3432); a layer of the model at a time, as BRECQ
(Li et al., 2021, arXiv:2102.05426) and EfficientQAT (Chen et al., 2024, arXiv:2407.11062) do. The norms of the layer
are trained along. Some sequences are held out: of all epochs, the start included, the one that does best on them is
kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.func import functional_call

from tritconv.calibration.matrices import Matrix
from tritconv.calibration.moments import LayerStreams
from tritconv.codec import Blocks
from tritconv.format import BLOCK_SIZE, CODE_MAX, GROUP_SIZE

_HELD_OUT = 8  # one sequence in so many
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TuneOptions:
    """How a layer is trained.

    Attributes:
        epochs: passes over the calibration text.
        code_rate: the learning rate of latent weights, in codes.
        norm_rate: of norms, relative to their mean magnitude.
        seed: of the order of the sequences.
    """

    epochs: int = 6
    code_rate: float = 0.001
    norm_rate: float = 0.002
    seed: int = 0


OnEpoch = Callable[[int, float], None]  # epoch (0: before training), loss on what is held out


@dataclass(frozen=True)
class Tuned:
    """A trained layer: blocks of its matrices, and its norms (float32, as the layer has them), by parameter name."""

    blocks: Mapping[Matrix, Blocks]
    norms: Mapping[str, torch.Tensor]


class Latent:
    """A matrix in training: codes as real numbers, and the scales that they are multiplied with."""

    def __init__(self, blocks: Blocks, codes: torch.Tensor) -> None:
        """Start at `codes`, float32 (rows, n), which round to those of `blocks`."""
        self.depth = blocks.depth
        self.code_max = CODE_MAX[blocks.depth]
        self.indexes = blocks.scales
        scales = torch.from_numpy(blocks.group_scales()).repeat_interleave(GROUP_SIZE, 1)
        self.scales = scales.view(codes.shape).to(codes.device)
        self.codes = codes.requires_grad_()

    def nearest(self) -> torch.Tensor:
        """float32 (rows, n): the codes, as integers."""
        return self.codes.detach().round().clamp_(-self.code_max, self.code_max)

    def weights(self) -> torch.Tensor:
        """float32 (rows, n): with gradients that pass through the rounding."""
        return (self.codes + (self.nearest() - self.codes.detach())) * self.scales

    def blocks(self) -> Blocks:
        """The blocks of all rows."""
        codes = self.nearest().to(torch.int8).cpu().numpy().reshape(-1, BLOCK_SIZE)
        return Blocks(self.depth, codes, self.indexes)


def tune(
    streams: LayerStreams,
    latents: Mapping[Matrix, Latent],
    norm_names: Iterable[str],
    options: TuneOptions,
    on_epoch: OnEpoch,
) -> Tuned:
    """Train a layer.

    Args:
        streams: the layer, its inputs and the outputs wanted.
        latents: its matrices, as gptq leaves them.
        norm_names: the parameters of the layer to train besides.

    Returns:
        The best epoch's layer, which may be the start.
    """
    norms = {name: streams.quantized.get_parameter(name).detach().clone().requires_grad_() for name in norm_names}
    training = _Training(streams, latents, norms)
    text, held_out = training.split()
    optimizer = torch.optim.Adam(
        [{"params": [latent.codes for latent in latents.values()], "lr": options.code_rate}]
        + [{"params": [norm], "lr": options.norm_rate * float(norm.detach().abs().mean())} for norm in norms.values()],
        betas=(0.9, 0.99),
    )
    steps = options.epochs * math.ceil(len(text) / training.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(options.seed)

    best_loss = training.evaluate(held_out)
    best = training.result()
    on_epoch(0, best_loss)
    for epoch in range(1, options.epochs + 1):
        for numbers in text[torch.randperm(len(text), generator=generator)].split(training.batch):
            loss = training.loss(numbers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        held_out_loss = training.evaluate(held_out)
        on_epoch(epoch, held_out_loss)
        if held_out_loss < best_loss:
            best_loss, best = held_out_loss, training.result()
    return best


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then half a cosine down to nothing."""
    rise = max(1, steps // 20)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class _Training:
    """The layer in training, and its loss."""

    def __init__(
        self, streams: LayerStreams, latents: Mapping[Matrix, Latent], norms: Mapping[str, torch.Tensor]
    ) -> None:
        self._streams = streams
        self._latents = latents
        self._norms = norms
        self.batch = max(1, _BATCH_TOKENS // streams.quantized_in.shape[1])

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the sequences to train on, and of those held out."""
        numbers = torch.arange(len(self._streams.quantized_in))
        held_out = numbers % _HELD_OUT == _HELD_OUT - 1
        return (numbers[~held_out], numbers[held_out]) if held_out.any() else (numbers, numbers)

    def loss(self, numbers: torch.Tensor) -> torch.Tensor:
        """Squared error of the layer's output over its square, the mean over the tokens of sequences."""
        streams, device = self._streams, self._streams.model.device
        parameters = {matrix.name: latent.weights() for matrix, latent in self._latents.items()} | dict(self._norms)
        wanted = streams.full_out[numbers].to(device)
        layer = _WithParameters(streams.quantized, parameters)
        out = streams.model.run(streams.index, layer, streams.quantized_in[numbers].to(device))
        return ((out - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).mean()

    def evaluate(self, numbers: torch.Tensor) -> float:
        with torch.no_grad():
            parts = [(len(part), float(self.loss(part))) for part in numbers.split(self.batch)]
        return sum(n * loss for n, loss in parts) / len(numbers)

    def result(self) -> Tuned:
        return Tuned(
            {matrix: latent.blocks() for matrix, latent in self._latents.items()},
            {name: norm.detach().clone() for name, norm in self._norms.items()},
        )


class _WithParameters:
    """A layer that is called with other parameters than its own."""

    def __init__(self, layer: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
        self._layer = layer
        self._parameters = dict(parameters)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return functional_call(self._layer, self._parameters, args, kwargs)
