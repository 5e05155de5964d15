"""The `tune` method: training all layers together, after gptq, towards the predictions of the full-precision model.

The codes follow latent weights, in units of the scale, through a straight-through estimator: forward the nearest code,
backward as if there were no rounding (Bengio et al., 2013, arXiv:1308.3432). The loss is the KL divergence from the
full-precision model's predictions, as in LLM-QAT (Liu et al., 2023, arXiv:2305.17888); the norms are trained along. To
train a layer at a time, towards its own output, gains next to nothing: gptq has matched that already, as
docs/concepts/quality.md has it.
Some sequences are held out, from gptq too: of all epochs, the start included, the one that does best on them is kept.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch.nn.functional import kl_div

from tritconv.calibration.context import Context
from tritconv.calibration.inputs import digest_of_tokens
from tritconv.calibration.lender import ReadRows
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.outside import OutsideMatrix
from tritconv.calibration.reach import GgufNames
from tritconv.calibration.rows import OUTSIDE, Place
from tritconv.calibration.store import LayerStore
from tritconv.methods import Finished
from tritconv.methods.gptq import Say, gathered, layer_quantizer
from tritconv.methods.gptq.layers import Depths
from tritconv.methods.gptq.outside import reader
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.plan import Plan
from tritconv.sources.source import Kind, Source
from tritconv.workers import Workers
from tritcore.codec import Blocks, pack, unpack
from tritcore.console import note
from tritcore.format import BLOCK_SIZE, BYTES_PER_BLOCK, CODE_MAX, GROUP_SIZE

_STEP_TOKENS = 2048
_LOGITS_TOKENS = 512  # whose predictions are in memory at a time
_BLOCKS, _NORM, _LOSSES = "blocks:", "norm:", "losses"  # of what is kept; a layer and a name follow the first two

NormPlace = tuple[int, str]  # the number of a layer, and the name of a norm in it


@dataclass(frozen=True)
class TuneOptions:
    """How the layers are trained.

    Attributes:
        epochs: passes over the calibration text.
        code_rate: the learning rate of latent weights, in codes.
        norm_rate: of norms, relative to their mean magnitude.
        seed: of the order of the sequences.
    """

    epochs: int
    code_rate: float = 0.003
    norm_rate: float = 0.003
    seed: int = 0


OnStep = Callable[[int, int], None]  # steps done, of so many
OnEpoch = Callable[[int, float], None]  # epoch (0: before training), KL divergence on what is held out


@dataclass(frozen=True)
class Tuned:
    """Trained layers.

    Attributes:
        blocks: of their matrices.
        norms: float32, as the layer has them.
        losses: of the start and of each epoch, on what is held out.
    """

    blocks: Mapping[Place, Blocks]
    norms: Mapping[NormPlace, torch.Tensor]
    losses: Sequence[float] = ()


class Tune:
    """The method."""

    name = "tune"
    methods: Sequence[str] = tuple(
        ",".join(some) for n in (1, 2, 3) for some in itertools.combinations(("gptq", "search", "tune"), n)
    )

    def __init__(self, context: Context, options: TuneOptions, say: Say) -> None:
        """Prepare.

        Args:
            context: of the source that will be quantized, with sequences held out.
        """
        self._context = context
        self._options = options
        self._say = say
        self._remarks: list[str] = []

    def run(self, source: Source, plan: Plan, workers: Workers) -> Iterator[Finished]:
        """As `Method.run` has it. All layers are trained together, so the first tensor comes after the training."""
        blocks, methods, norms = self._train(source, plan)
        search = PerTensor(Search())
        for tensor in source.tensors:
            rows = self._context.maps.get(tensor.name) if plan.choice(tensor).depth is not None else None
            found, method = (None, "") if rows is None else gathered(rows, blocks, methods)
            if found is not None:
                yield Finished(tensor, tensor.load(), found, method=method)
            elif (trained := norms.get(tensor.name)) is not None:
                yield Finished(tensor, trained)
            else:
                yield search.finish(tensor, tensor.load(), plan, workers)

    def remarks(self) -> list[str]:
        """As `Method.remarks` has it."""
        return self._remarks

    def _train(
        self, source: Source, plan: Plan
    ) -> tuple[dict[Place, np.ndarray], dict[Place, str], dict[str, np.ndarray]]:
        """Blocks of matrices, uint8 (rows, bytes per row), the methods that made them, and norms by tensor."""
        context, model = self._context, self._context.model
        depths = context.depths(plan)
        quantizer = layer_quantizer(context, plan, depths, keep_offsets=True)

        def on_layer(index: int, what: str) -> None:
            self._say(f"layer {index + 1}/{model.n_layers} {what}")

        blocks: dict[Place, np.ndarray] = {}
        offsets: dict[Place, np.ndarray] = {}
        methods: dict[Place, str] = {}
        for layer in quantizer.run(context.tokens, on_layer):
            self._remarks += layer.remarks
            for matrix, data in layer.blocks.items():
                blocks[layer.index, matrix] = data
                methods[layer.index, matrix] = "search" if matrix in layer.searched else "gptq"
            offsets |= {(layer.index, matrix): offset for matrix, offset in layer.offsets.items()}
        names = _norms(model, source)
        store = context.store(
            self.name,
            matrices=(
                *((f"{i} {matrix}", depth) for (i, matrix), depth in depths.items()),
                *((f"{i} {name}", tensor) for (i, name), tensor in names.items()),
            ),
            held_out=digest_of_tokens(context.held_out),
            options=tuple(asdict(self._options).items()),
        )
        tuned = load_tuned(store, depths)
        if tuned is None:
            tuned = self._tuned(depths, blocks, offsets, names)
            save_tuned(store, tuned)
        else:
            for epoch, loss in enumerate(tuned.losses):
                _tell(epoch, loss, tuned.losses[: epoch + 1])
        blocks |= {place: pack(found).reshape(len(blocks[place]), -1) for place, found in tuned.blocks.items()}
        methods |= dict.fromkeys(tuned.blocks, self.name)
        return blocks, methods, {names[place]: values.cpu().numpy() for place, values in tuned.norms.items()}

    def _tuned(
        self,
        depths: Depths,
        blocks: Mapping[Place, np.ndarray],
        offsets: Mapping[Place, np.ndarray],
        norms: Collection[NormPlace],
    ) -> Tuned:
        """Train what gptq has made of a model: blocks and offsets, by matrix."""
        context, model = self._context, self._context.model
        layers = [model.working_copy(index) for index in range(model.n_layers)]
        unpacked = {
            place: unpack(depths[place], data.reshape(-1, BYTES_PER_BLOCK[depths[place]]))
            for place, data in blocks.items()
            if place[0] != OUTSIDE
        }
        for (index, matrix), made in unpacked.items():
            weights = matrix.of(layers[index])
            weights.copy_(torch.from_numpy(made.decode()).view_as(weights))
        latents = {
            place: Latent(unpacked[place], torch.from_numpy(offset).float().to(model.device))
            for place, offset in offsets.items()
            if not place[1].is_expert  # few tokens come to an expert
        }
        losses: list[float] = []

        def on_epoch(epoch: int, loss: float) -> None:
            losses.append(loss)
            _tell(epoch, loss, losses)

        def on_step(done: int, total: int) -> None:
            self._say(f"training, step {done}/{total}")

        outside = QuantizedEnds.of(context.outside, depths, blocks)
        texts = context.tokens, context.held_out
        return tune(model, layers, latents, norms, outside, *texts, self._options, on_step, on_epoch)


def _tell(epoch: int, loss: float, losses: Sequence[float]) -> None:
    """Say how an epoch went; `losses` are those up to it."""
    best = " (best)" if loss == min(losses) else ""
    note(f"epoch {epoch}: KL divergence {loss:.4f} on what is held out{best}")


def _norms(model: LayeredModel, source: Source) -> dict[NormPlace, str]:
    """The tensors of the layers' norms, by layer and parameter, where a tensor is what the parameter is.

    llama.cpp's converter adds one to some models' norms: those are not trained.
    """
    names = GgufNames(model, source.architecture)
    kept = {tensor.name: tensor for tensor in source.tensors if tensor.kind is Kind.KEPT and len(tensor.shape) == 1}
    found = {}
    for number in range(model.n_layers):
        for parameter, values in model.working_copy(number).named_parameters():
            name = names.of(number, parameter)
            if "norm" in parameter and name in kept:
                stored = kept[name].load()
                if stored.dtype.kind == "f" and np.array_equal(stored, values.detach().float().cpu().numpy()):
                    found[number, parameter] = name
    return found


@dataclass(frozen=True)
class QuantizedEnds:
    """What reads rows of the quantized embeddings and output matrix; None where the model's own are meant."""

    embeddings: ReadRows | None = None
    outputs: ReadRows | None = None

    @staticmethod
    def of(
        matrices: Mapping[str, OutsideMatrix], depths: Depths, blocks: Mapping[Place, np.ndarray]
    ) -> "QuantizedEnds":
        """Of tensors by name, as far as there are blocks of them."""
        found: dict[str, ReadRows] = {}
        for name, about in matrices.items():
            if (place := (OUTSIDE, Matrix(name))) in blocks:
                rows = reader(blocks[place], depths[place])
                found |= {"embeddings": rows} if about.is_embedding else {}
                found |= {"outputs": rows} if about.is_output else {}
        return QuantizedEnds(**found)


class Latent:
    """A matrix in training.

    Attributes:
        codes: float32 (rows, n), as real numbers.
    """

    def __init__(self, blocks: Blocks, offset: torch.Tensor) -> None:
        """Start at the codes of `blocks` plus `offset`, float32 (rows, n), which rounds to them."""
        self.depth = blocks.depth
        self.code_max = CODE_MAX[blocks.depth]
        self.indexes = blocks.scales
        self.codes = offset + torch.from_numpy(blocks.codes).view(offset.shape).to(offset.device)
        self._scales = torch.from_numpy(blocks.group_scales()).view(-1, 1).to(offset.device)

    def weights(self) -> torch.Tensor:
        """float32 (rows, n): the nearest codes, with their scales."""
        return self.scaled(self._nearest())

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 (rows, n), times the scales. A gradient of the weights so becomes one of the codes."""
        return values.view(-1, GROUP_SIZE).mul(self._scales).view(values.shape)

    def blocks(self) -> Blocks:
        """The blocks of all rows."""
        codes = self._nearest().to(torch.int8).cpu().numpy().reshape(-1, BLOCK_SIZE)
        return Blocks(self.depth, codes, self.indexes)

    def _nearest(self) -> torch.Tensor:
        return self.codes.round().clamp_(-self.code_max, self.code_max)


def tune(
    model: LayeredModel,
    layers: Sequence[torch.nn.Module],
    latents: Mapping[Place, Latent],
    norms: Collection[NormPlace],
    outside: QuantizedEnds,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    options: TuneOptions,
    on_step: OnStep,
    on_epoch: OnEpoch,
) -> Tuned:
    """Train a model.

    Args:
        model: in full precision.
        layers: its layers, as gptq leaves them, on the model's device; they are trained in place.
        latents: their matrices.
        norms: the parameters to train besides.
        outside: the rest of the trained model; it stays as it is.
        tokens: int64 (sequences, length), to train on.
        held_out: the same, to judge by; gptq should not have seen them.

    Returns:
        The layers of the best epoch, which may be the start.
    """
    training = _Training(model, layers, latents, norms, outside)
    text, unseen = (_Text.read(model, some, outside.embeddings) for some in (tokens, held_out))
    batch = max(1, _STEP_TOKENS // tokens.shape[1])
    steps = options.epochs * math.ceil(len(tokens) / batch)
    optimizer = torch.optim.Adam(
        [{"params": [latent.codes for latent in latents.values()], "lr": options.code_rate}]
        + [{"params": [norm], "lr": options.norm_rate * float(norm.detach().abs().mean())} for norm in training.norms],
        betas=(0.9, 0.99),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(options.seed)

    losses = [training.evaluate(unseen)]
    best = training.result()
    on_epoch(0, losses[0])
    done = 0
    for epoch in range(1, options.epochs + 1):
        for numbers in torch.randperm(len(tokens), generator=generator).split(batch):
            training.find_gradients(text.some(numbers))
            optimizer.step()
            schedule.step()
            training.update()
            done += 1
            on_step(done, steps)
        losses.append(training.evaluate(unseen))
        on_epoch(epoch, losses[-1])
        if losses[-1] < min(losses[:-1]):
            best = training.result()
    return replace(best, losses=losses)


def save_tuned(store: LayerStore, tuned: Tuned) -> None:
    """Keep a result, all of it as one. Raises TritError."""
    arrays = {f"{_BLOCKS}{index} {matrix}": pack(blocks) for (index, matrix), blocks in tuned.blocks.items()}
    arrays |= {f"{_NORM}{index} {name}": values.cpu().numpy() for (index, name), values in tuned.norms.items()}
    store.save(0, arrays | {_LOSSES: np.array(tuned.losses)})


def load_tuned(store: LayerStore, depths: Mapping[Place, int]) -> Tuned | None:
    """The result that a store has; None if it has none.

    Args:
        depths: of the matrices that may have been trained.
    """
    kept = store.load(0)
    if kept is None:
        return None
    blocks = {
        place: unpack(depth, kept[name])
        for place, depth in depths.items()
        if (name := f"{_BLOCKS}{place[0]} {place[1]}") in kept
    }
    norms = {}
    for key in kept:
        if key.startswith(_NORM):
            index, _, name = key.removeprefix(_NORM).partition(" ")
            norms[int(index), name] = torch.from_numpy(kept[key])
    return Tuned(blocks, norms, kept[_LOSSES].tolist())


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then half a cosine down to nothing."""
    rise = max(1, steps // 20)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class _Text:
    """Sequences.

    Attributes:
        first: what the first layer in training is given, (sequences, length, width), on the CPU.
        last: what the last layer of the full-precision model puts out, the same.
    """

    first: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def read(model: LayeredModel, tokens: torch.Tensor, embeddings: ReadRows | None) -> "_Text":
        """Of int64 (sequences, length). `embeddings`: of the model in training."""
        first = last = model.embed(tokens)
        if embeddings is not None:
            first = model.embed(tokens, embeddings)
        for index in range(model.n_layers):
            last = model.run_all(index, model.working_copy(index), last)
        return _Text(first, last)

    def some(self, numbers: torch.Tensor) -> "_Text":
        """The sequences of these numbers."""
        return _Text(self.first[numbers], self.last[numbers])

    def logits(self, model: LayeredModel) -> Iterator[tuple[slice, torch.Tensor]]:
        """What the model makes of some tokens at a time: which, and float32 (1, tokens, vocabulary)."""
        flat = self.last.flatten(0, 1)
        for start in range(0, len(flat), _LOGITS_TOKENS):
            part = slice(start, start + _LOGITS_TOKENS)
            with torch.no_grad():  # not around the yield: the caller wants gradients
                logits = model.logits(flat[None, part])
            yield part, logits


class _Training:
    """The layers in training.

    Attributes:
        norms: the parameters of the layers that are trained as they are.
    """

    def __init__(
        self,
        model: LayeredModel,
        layers: Sequence[torch.nn.Module],
        latents: Mapping[Place, Latent],
        norms: Collection[NormPlace],
        outside: QuantizedEnds,
    ) -> None:
        self._model = model
        self._outputs = outside.outputs
        self._layers = layers
        self._latents = latents
        self._weights = {(i, matrix): layers[i].get_parameter(matrix.name) for i, matrix in latents}
        self._norms = {(i, name): layers[i].get_parameter(name) for i, name in norms}
        self.norms = list(self._norms.values())
        for parameter in (*self._weights.values(), *self.norms):
            parameter.requires_grad_()
        self.update()

    def update(self) -> None:
        """Give the layers the weights that the latent ones stand for."""
        for place, latent in self._latents.items():
            self._weights[place].data = place[1].turned(latent.weights())

    def find_gradients(self, text: _Text) -> None:
        """Of the KL divergence, the mean over the tokens of sequences, for codes and norms."""
        for parameter in (*self._weights.values(), *self.norms):
            parameter.grad = None
        out = self._run(text)
        flat = out.detach().cpu().flatten(0, 1)
        upstream = torch.empty_like(flat)
        for part, right in text.logits(self._model):
            inputs = flat[part].requires_grad_()
            logits = self._model.logits(inputs[None], self._outputs)
            gradient = logits.detach().softmax(dim=-1).sub_(right.softmax(dim=-1)).div_(len(flat))
            (upstream[part],) = torch.autograd.grad(logits, inputs, gradient)
        out.backward(upstream.view(out.shape).to(out.device))
        for place, latent in self._latents.items():
            gradient = self._weights[place].grad
            assert gradient is not None
            latent.codes.grad = latent.scaled(place[1].turned(gradient).contiguous())

    def evaluate(self, text: _Text) -> float:
        """The KL divergence, the mean over the tokens of sequences, in nats."""
        total = 0.0
        numbers = torch.arange(len(text.first))
        with torch.no_grad():
            for one in map(text.some, numbers.split(1)):
                flat = self._run(one).cpu().flatten(0, 1)
                for part, right in one.logits(self._model):
                    ours = self._model.logits(flat[None, part], self._outputs).log_softmax(dim=-1)
                    total += float(kl_div(ours, right.log_softmax(dim=-1), log_target=True, reduction="sum"))
        return total / text.first[..., 0].numel()

    def result(self) -> Tuned:
        return Tuned(
            {place: latent.blocks() for place, latent in self._latents.items()},
            {place: norm.detach().clone() for place, norm in self._norms.items()},
        )

    def _run(self, text: _Text) -> torch.Tensor:
        """What the layers in training put out."""
        hidden = text.first.to(self._model.device)
        for index, layer in enumerate(self._layers):
            hidden = self._model.run(index, layer, hidden)
        return hidden
