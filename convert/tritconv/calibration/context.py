"""What every calibration starts from, made once: the model, the matrices that are reached, and the tokens."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tritconv.calibration import memory, own_text, rare_words
from tritconv.calibration.inputs import Inputs, digest_of_files, digest_of_tokens
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import BATCH_TOKENS, LayeredModel
from tritconv.calibration.outputs import n_with_gradients
from tritconv.calibration.outside import OutsideMatrix
from tritconv.calibration.ranks import ALONE, Ranks
from tritconv.calibration.reach import find_reach
from tritconv.calibration.rows import OUTSIDE, Place, RowMap
from tritconv.calibration.store import LayerStore
from tritconv.calibration.text import TextOptions, hold_out, render, sequences
from tritconv.encode import n_bytes
from tritconv.plan import Plan
from tritconv.sources.source import Kind, Source
from tritcore import cache
from tritcore.console import note, share_bar, status
from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE
from tritcore.sizes import show

_TRAINED = 20  # bytes for each weight in training: itself, its code, the gradient, and two moments of that
_PROGRAM = 3 << 28  # bytes of Python, torch and transformers
_SQUARES = 2  # float32 (n, n), n the longest row of a matrix, that are in memory at a time: the Hessian and its factor
_BATCH = 6  # activations of a batch that are in memory at a time, as long as the longest row of a matrix
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_COPIES = 6  # float32 copies of the matrices with the same input: weights, aims, and what they are made of


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for.

    Attributes:
        besides: another text, to calibrate on as well.
        own_tokens: so many more, which the model writes itself.
        holds_out: whether some sequences are left out, to judge by.
        memory: bytes for hidden states; those that take more are in a file. None: half of the memory that is free
            beside a layer and its statistics.
    """

    text: TextOptions
    besides: TextOptions | None = None
    own_tokens: int = 0
    holds_out: bool = False
    memory: int | None = None

    @property
    def texts(self) -> list[TextOptions]:
        """All that is read."""
        return [self.text] if self.besides is None else [self.text, self.besides]

    @property
    def n_tokens(self) -> int:
        """To read, at most."""
        return sum(text.n_tokens for text in self.texts)


@dataclass(frozen=True)
class Context:
    """What the calibrated methods and the sensitivities share.

    Attributes:
        maps: where the rows of the tensors that are reached come from, by tensor name.
        outside: those of them that lie outside the layers, by tensor name.
        tokens: int64 (sequences, length), to calibrate on.
        held_out: int64 (sequences, length), to judge by; none of `tokens` unless there is a single sequence.
        inputs: what every result depends on.
        memory: bytes for hidden states.
        description: of the calibration, for the file's metadata.
        ranks: the processes that share the work.
    """

    model: LayeredModel
    source: Source
    maps: Mapping[str, RowMap]
    outside: Mapping[str, OutsideMatrix]
    tokens: torch.Tensor
    held_out: torch.Tensor
    inputs: Inputs
    memory: int
    description: Sequence[str]
    ranks: Ranks = ALONE

    def depths(self, plan: Plan) -> dict[Place, int]:
        """The depth of each matrix that becomes TRIT."""
        depths = {tensor.name: plan.choice(tensor).depth for tensor in self.source.tensors}
        return {
            place: depth
            for name, rows in self.maps.items()
            if (depth := depths[name]) is not None
            for place in rows.places
        }

    def store(self, kind: str, **also: Any) -> LayerStore:
        """The place in the cache of a result of a kind. `also` is what else it depends on: see `Inputs`."""
        return LayerStore(replace(self.inputs, kind=kind, **also), self.source.origin.name)

    def check_room(self, plan: Plan, store: LayerStore, *, trains: bool) -> None:
        """See, before long work, that memory and disk hold a calibration. Says what is needed.

        Args:
            trains: whether all layers are trained together afterwards.

        Raises:
            TritError: there is not enough of it.
        """
        mine = [t for t in self.source.tensors if t.name in self.maps and plan.choice(t).depth is not None]
        n_weights = sum(math.prod(tensor.shape) for tensor in mine)
        kept = sum(n_bytes(t.shape, plan.type_of(t)) for t in mine) + (2 * n_weights if trains else 0)
        streams = 8 * self.tokens.numel() * self.model.width  # float32, of both models
        hidden = streams + 2 * self.tokens.numel() * (_longest_row(self.source) + 6 * self.model.width)
        needed = least_memory(self.source, self.tokens.shape[1]) + min(hidden, self.memory)
        of_layer = 2 * n_with_gradients(self.tokens.numel()) * self.model.width  # bfloat16
        scratch = max(0, hidden - self.memory) + of_layer * self.model.n_layers
        if trains:
            needed = max(needed, _PROGRAM + _TRAINED * n_weights + streams)
        if needed > (there := memory.total()):
            n, length = self.tokens.numel(), self.tokens.shape[1]
            advice = "take --method gptq" if trains else "lower --memory, --calib-tokens or --calib-seq"
            raise TritError(
                f"calibrating {self.source.name} on {n} tokens in sequences of {length} "
                f"needs {show(needed)} of memory, and the machine has {show(there)}: {advice}"
            )
        note(f"needs {show(needed)} of memory, and {show(kept + scratch)} on disk in {cache.folder()}")
        store.entry.check_space(kept + scratch)


def prepare(source: Source, plan: Plan, options: CalibrationOptions, ranks: Ranks = ALONE) -> Context:
    """Load the model, find out what a calibration reaches of it, and read the text, which the first process has.

    Raises:
        TritError: transformers cannot load the model, too little of it is reached, or the text will not do.
    """
    origin = source.origin
    with status("loading the model"):
        model = LayeredModel(origin.folder, origin.gguf_file)
        for tensor in source.tensors:
            if tensor.kind is Kind.OUTPUT and model.has_tied_head:
                model.head_is(torch.from_numpy(np.require(tensor.load(), requirements="W")))
        reach = find_reach(model, source.architecture, source.tensors, plan)
    if reach.missed:
        names = ", ".join(tensor.name for tensor in reach.missed)
        note(f"calibration does not reach {names}: by plain search")
    texts = [fitting(text, model) for text in options.texts]
    text = texts[0]
    with status("reading the text"):
        tokens, n_made_up = ranks.from_first(_read(texts, model) if ranks.is_first else (torch.empty(0), 0))
    if text.length < options.text.length:
        note(f"the model takes {text.length} tokens at a time: so long are the sequences, not {options.text.length}")
    if n_made_up:
        note(f"the text has {rare_words.PLACEHOLDER} for {n_made_up} rare words: made-up ones stand in for them")
    n_read = len(tokens)
    held_out = tokens[:0]
    if options.holds_out:
        tokens, held_out = hold_out(tokens)
    seed = text.seed
    inputs = Inputs("own text", digest_of_files(origin.files()), digest_of_tokens(tokens), seed, model.machinery)
    n_own = 0
    if options.own_tokens:
        n_own = -(-options.own_tokens // tokens.shape[1])
        own = _own_text(model, tokens, n_own, seed, LayerStore(inputs, origin.name)) if ranks.is_first else tokens
        tokens = torch.cat([tokens, ranks.from_first(own)])
        inputs = replace(inputs, tokens=digest_of_tokens(tokens))
    note(f"calibrating on {len(tokens)} sequences of {tokens.shape[1]} tokens, in {model.precision} on {model.device}")
    description = [
        *(name for text in texts for name in text.names),
        *([f"{n_made_up} rare words made up"] if n_made_up else []),
        f"{n_read} sequences of {tokens.shape[1]} tokens",
        *([f"{n_own} that the model wrote"] if n_own else []),
        f"seed {seed}",
        model.precision,
    ]
    free = memory.free() - least_memory(source, tokens.shape[1])
    budget = max(0, free // 2) if options.memory is None else options.memory
    outside = _outside(source)
    sizes = {tensor.name: tensor.shape[0] for tensor in source.tensors}
    maps = dict(reach.maps) | {name: RowMap.whole((OUTSIDE, Matrix(name)), sizes[name]) for name in outside}
    return Context(model, source, maps, outside, tokens, held_out, inputs, budget, description, ranks)


def _outside(source: Source) -> dict[str, OutsideMatrix]:
    """The token embeddings and the output matrix, by tensor name. Without an output matrix, embeddings are both."""
    fit = {t.name: t for t in source.tensors if len(t.shape) == 2 and t.shape[1] % BLOCK_SIZE == 0}
    is_tied = all(tensor.name != _OUTPUT for tensor in source.tensors)
    roles = {_EMBEDDING: (True, is_tied), _OUTPUT: (False, True)}
    return {name: OutsideMatrix(*roles[name], fit[name].shape[0]) for name in roles if name in fit}


def _read(texts: Iterable[TextOptions], model: LayeredModel) -> tuple[torch.Tensor, int]:
    """Token sequences int64 (sequences, length), and the number of rare words that were made up."""
    parts, n_made_up = [], 0
    for text in texts:
        filled, n_here = rare_words.fill(render(text.documents, model.tokenizer), model.tokenizer, text.seed)
        parts.append(sequences(filled, text, model.tokenizer))
        n_made_up += n_here
    return torch.cat(parts), n_made_up


def _own_text(model: LayeredModel, tokens: torch.Tensor, count: int, seed: int, store: LayerStore) -> torch.Tensor:
    """So many sequences that the model writes, going on from `tokens`."""
    with share_bar() as bar:
        task = bar.add_task("the model writes text", total=None)

        def on_tokens(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return own_text.write(model, tokens, count, seed, store, on_tokens)


def fitting(text: TextOptions, model: LayeredModel) -> TextOptions:
    """The options with sequences as long as the model takes, at most."""
    if model.longest is None or text.length <= model.longest:
        return text
    return replace(text, length=model.longest)


def least_memory(source: Source, length: int, *, squares: bool = True) -> int:
    """Bytes that a calibration needs besides hidden states: a layer twice, and statistics of its largest matrix.

    Args:
        length: tokens of a sequence.
        squares: whether there are Hessians.
    """
    layers: dict[str, int] = {}
    largest = 0
    for tensor in source.tensors:
        if tensor.kind is Kind.MATRIX:
            layer = tensor.name.rpartition("blk.")[2].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + math.prod(tensor.shape)
            largest = max(largest, math.prod(tensor.shape[-2:]))
    longest = _longest_row(source)
    weights = 2 * max(layers.values(), default=0) + _COPIES * largest
    batch = max(BATCH_TOKENS, length) * _BATCH * longest
    return _PROGRAM + 4 * (weights + squares * _SQUARES * longest**2 + length**2 + batch)


def _longest_row(source: Source) -> int:
    """The longest row of a matrix."""
    return max((tensor.shape[-1] for tensor in source.tensors if tensor.kind is Kind.MATRIX), default=0)
