"""Calibrated conversion: a checkpoint and a text, to blocks for the tensors of a GGUF file."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tritconv.allocate import Budget, allocate
from tritconv.calibration import own_text, rare_words, sensitivity
from tritconv.calibration.inputs import Inputs, digest_of_files, digest_of_tokens
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.reach import GgufNames, find_reach
from tritconv.calibration.rows import Place, RowMap
from tritconv.calibration.store import LayerStore
from tritconv.calibration.text import TextOptions, check_memory, render, sequences
from tritconv.encode import n_bytes
from tritconv.methods import search
from tritconv.methods.gptq.layers import Depths, LayerQuantizer
from tritconv.methods.tune import (
    Latent,
    NormPlace,
    Tuned,
    TuneOptions,
    hold_out,
    load_tuned,
    save_tuned,
    tune,
)
from tritconv.plan import Kind, SourceTensor, TypePlan
from tritconv.sources.weights import find_weights
from tritconv.workers import Workers
from tritcore.codec import pack, unpack
from tritcore.console import err, note, one_line, share_bar
from tritcore.format import BYTES_PER_BLOCK
from tritcore.gguf_header import parts_of, read_model_file
from tritcore.gguf_types import DEPTH_OF_TYPE

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class Origin:
    """Where the model is: a folder that the transformers library reads, or a GGUF file in it."""

    folder: Path
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.gguf_file or self.folder.resolve().name

    def files(self) -> list[Path]:
        """All files that say what the model is."""
        if self.gguf_file is not None:
            return [part.path for part in parts_of(read_model_file(self.folder / self.gguf_file))]
        beside = (path for pattern in _BESIDE_WEIGHTS for path in self.folder.glob(pattern) if path.is_file())
        return [*find_weights(self.folder), *beside]


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for.

    Attributes:
        own_tokens: so many more, which the model writes itself.
        training: after gptq; None leaves it at that.
        budget: a size to reach by mixed depth; None leaves the types as planned.
        threads: to compute with; None leaves it to torch.
    """

    text: TextOptions
    own_tokens: int = 0
    training: TuneOptions | None = None
    budget: Budget | None = None
    threads: int | None = None

    @property
    def method(self) -> str:
        """The name of the method."""
        return "gptq" if self.training is None else "tune"


@dataclass(frozen=True)
class ModelRows:
    """Where the rows of GGUF tensors come from, by tensor name."""

    maps: Mapping[str, RowMap]

    def depths(self, plan: TypePlan, tensors: Sequence[SourceTensor]) -> Depths:
        """The depth of each matrix that becomes TRIT."""
        depth_of_tensor = {tensor.name: DEPTH_OF_TYPE.get(plan.type_of(tensor)) for tensor in tensors}
        return {
            place: depth
            for name, rows in self.maps.items()
            if (depth := depth_of_tensor[name]) is not None
            for place in rows.places
        }


class Calibrated:
    """Blocks that the layers' quantization has made, as tensors. What it did not reach goes by the search.

    Attributes:
        exceptions: NAME=METHOD for each tensor that did not go by the method of that name, as far as blocks are TRIT.
    """

    def __init__(
        self,
        name: str,
        rows: ModelRows,
        blocks: Mapping[Place, np.ndarray],
        methods: Mapping[Place, str],
        missed: Sequence[SourceTensor],
        remarks: Sequence[str],
    ) -> None:
        """Take what was made.

        Args:
            name: of the method.
            methods: by which the blocks were made, where not by that one.
            missed: tensors that calibration does not reach.
        """
        self.name = name
        self._rows = rows
        self._blocks = blocks
        self._remarks = list(remarks)
        by_tensor = {
            tensor: ",".join(sorted({methods.get(place, name) for place in found.places}))
            if self._has_made(tensor)
            else search.Search.name
            for tensor, found in rows.maps.items()
        } | {tensor.name: search.Search.name for tensor in missed}
        self.exceptions = [f"{tensor}={method}" for tensor, method in by_tensor.items() if method != name]

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        if self._has_made(tensor.name):
            return self._rows.maps[tensor.name].gather(self._blocks)
        return search.Search().quantize(tensor, values, depth, workers)

    def remarks(self) -> list[str]:
        return self._remarks

    def _has_made(self, tensor: str) -> bool:
        """Whether there are blocks for all rows of a tensor."""
        rows = self._rows.maps.get(tensor)
        return rows is not None and all(place in self._blocks for place in rows.places)


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        plan: the types of the tensors.
        norms: trained ones, by the names of their tensors.
        description: of the calibration, for the file's metadata.
    """

    quantizer: Calibrated
    plan: TypePlan
    norms: Mapping[str, np.ndarray]
    description: list[str]

    def with_norms(self, tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
        """The tensors, with trained norms in place of those that they were."""

        def load(name: str) -> Callable[[], np.ndarray]:
            return lambda: self.norms[name]

        return [replace(t, load=load(t.name)) if t.name in self.norms else t for t in tensors]


def calibrate(
    origin: Origin,
    architecture: str,
    tensors: Sequence[SourceTensor],
    plan: TypePlan,
    options: CalibrationOptions,
) -> Calibration:
    """Quantize the layers of a checkpoint. What it reaches of them is found out first.

    Args:
        origin: has been checked.
        architecture: llama.cpp's name of it.
        tensors: of the GGUF file to write; they are loaded.
        plan: their types.

    Raises:
        TritError: transformers cannot load the model, too little of it is reached, or the text will not do.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with err.status("loading the model") if err.is_terminal else nullcontext():
        model = LayeredModel(origin.folder, origin.gguf_file)
        _take_head(model, tensors)
        reach = find_reach(model, architecture, tensors, plan)
        rows = ModelRows(reach.maps)
    if reach.missed:
        names = ", ".join(tensor.name for tensor in reach.missed)
        note(f"calibration does not reach {names}: by plain search")
    with err.status("reading the text") if err.is_terminal else nullcontext():
        text = _fitting(options.text, model)
        texts, n_made_up = rare_words.fill(render(text.documents, model.tokenizer), model.tokenizer, text.seed)
        tokens = sequences(texts, text, model.tokenizer)
        check_memory(tokens.numel() + options.own_tokens, text.length, model.width)
    if text.length < options.text.length:
        note(f"the model takes {text.length} tokens at a time: so long are the sequences, not {options.text.length}")
    if n_made_up:
        note(f"the text has {rare_words.PLACEHOLDER} for {n_made_up} rare words: made-up ones stand in for them")
    held_out = tokens[:0]
    if options.training is not None:
        tokens, held_out = hold_out(tokens)
    inputs = Inputs(
        "own text", digest_of_files(origin.files()), digest_of_tokens(tokens), options.text.seed, model.machinery
    )
    n_read = len(tokens) + len(held_out)
    if options.own_tokens:
        tokens = torch.cat([tokens, _own_text(model, tokens, LayerStore(inputs, origin.name), options)])
        inputs = replace(inputs, tokens=digest_of_tokens(tokens))
    if options.budget is not None:
        known = replace(inputs, kind="sensitivity", matrices=sensitivity.origins(rows.maps))
        plan = _mixed(model, rows, tokens, LayerStore(known, origin.name), tensors, plan, options)
    depths = rows.depths(plan, tensors)
    inputs = replace(inputs, kind="layers", matrices=tuple((f"{i} {matrix}", d) for (i, matrix), d in depths.items()))
    store = LayerStore(inputs, origin.name)
    store.entry.check_space(_bytes_kept(rows, plan, tensors, with_offsets=options.training is not None))
    quantizer = LayerQuantizer(model, depths, store, options.text.seed, keep_offsets=options.training is not None)
    note(f"calibrating on {len(tokens)} sequences of {tokens.shape[1]} tokens, in {model.precision} on {model.device}")
    with _Bar(len(model.layers)) as bar:
        quantizer.run(tokens, bar.on_layer)
    blocks, trained = quantizer.blocks, dict[str, np.ndarray]()
    methods = {place: quantizer.method_of(place) for place in blocks}
    if options.training is not None:
        norms = _norms(model, architecture, tensors)
        inputs = replace(
            inputs,
            kind="tune",
            matrices=(*inputs.matrices, *((f"{i} {name}", tensor) for (i, name), tensor in norms.items())),
            held_out=digest_of_tokens(held_out),
            options=tuple(asdict(options.training).items()),
        )
        text_and_held_out = tokens, held_out
        tuned_store = LayerStore(inputs, origin.name)
        tuned = _tune(model, quantizer, depths, norms.keys(), text_and_held_out, options.training, tuned_store)
        blocks = blocks | {place: pack(found).reshape(len(blocks[place]), -1) for place, found in tuned.blocks.items()}
        trained = {norms[place]: values.cpu().numpy() for place, values in tuned.norms.items()}
        methods |= dict.fromkeys(tuned.blocks, options.method)
    description = [
        *options.text.names,
        *([f"{n_made_up} rare words made up"] if n_made_up else []),
        f"{n_read} sequences of {tokens.shape[1]} tokens",
        *([f"{len(tokens) + len(held_out) - n_read} that the model wrote"] if options.own_tokens else []),
        f"seed {options.text.seed}",
        model.precision,
    ]
    calibrated = Calibrated(options.method, rows, blocks, methods, reach.missed, quantizer.remarks)
    return Calibration(calibrated, plan, trained, description)


def _take_head(model: LayeredModel, tensors: Sequence[SourceTensor]) -> None:
    """Let the model predict with the output matrix that the file will have."""
    for tensor in tensors:
        if tensor.kind is Kind.OUTPUT:
            model.head_is(torch.from_numpy(np.require(tensor.load(), requirements="W")))


def _fitting(text: TextOptions, model: LayeredModel) -> TextOptions:
    """The options with sequences as long as the model takes, at most."""
    if model.longest is None or text.length <= model.longest:
        return text
    return replace(text, length=model.longest)


def _bytes_kept(rows: ModelRows, plan: TypePlan, tensors: Sequence[SourceTensor], with_offsets: bool) -> int:
    """What the cache holds of all layers in the end, about."""
    mine = [t for t in tensors if t.name in rows.maps and plan.type_of(t) in DEPTH_OF_TYPE]
    n_weights = sum(math.prod(t.shape) for t in mine)
    return sum(n_bytes(t.shape, plan.type_of(t)) for t in mine) + (2 * n_weights if with_offsets else 0)


def _own_text(
    model: LayeredModel, tokens: torch.Tensor, store: LayerStore, options: CalibrationOptions
) -> torch.Tensor:
    """What the model writes, in as long sequences, going on from `tokens`."""
    seed = options.text.seed
    count = -(-options.own_tokens // tokens.shape[1])
    with _Bar(1) as bar:
        return own_text.write(model, tokens, count, seed, store, bar.on_tokens)


def _tune(
    model: LayeredModel,
    quantizer: LayerQuantizer,
    depths: Depths,
    norms: Collection[NormPlace],
    text: tuple[torch.Tensor, torch.Tensor],
    options: TuneOptions,
    store: LayerStore,
) -> Tuned:
    """Train what gptq has made of a model, on a text, and judged by another; or take what the store has of it."""
    if (kept := load_tuned(store, depths)) is not None:
        with _Bar(1) as bar:
            for epoch, loss in enumerate(kept.losses):
                bar.on_epoch(epoch, loss)
        return kept
    layers = [model.working_copy(index) for index in range(len(model.layers))]
    for index, layer in enumerate(layers):
        quantizer.write_into(layer, index)
    latents = {
        place: Latent(
            unpack(depths[place], quantizer.blocks[place].reshape(-1, BYTES_PER_BLOCK[depths[place]])),
            torch.from_numpy(offset).float().to(model.device),
        )
        for place, offset in quantizer.offsets.items()
        if not place[1].is_expert  # few tokens come to an expert
    }
    with _Bar(1) as bar:
        tuned = tune(model, layers, latents, norms, *text, options, bar.on_step, bar.on_epoch)
    save_tuned(store, tuned)
    return tuned


def _mixed(
    model: LayeredModel,
    rows: ModelRows,
    tokens: torch.Tensor,
    store: LayerStore,
    tensors: Sequence[SourceTensor],
    plan: TypePlan,
    options: CalibrationOptions,
) -> TypePlan:
    """The plan with the types that cost the model least, at the size wanted."""
    assert options.budget is not None
    with err.status("sensitivity") if err.is_terminal else nullcontext() as status:
        progress = (lambda _: None) if status is None else status.update
        losses = sensitivity.measure(model, rows.maps, tokens, options.text.seed, store, progress)
    allocation = allocate(tensors, losses, plan, options.budget)
    err.print(allocation.table())
    return plan.with_types(allocation.types, tensors)


def _norms(model: LayeredModel, architecture: str, tensors: Sequence[SourceTensor]) -> dict[NormPlace, str]:
    """The tensors of the layers' norms, by layer and parameter, where a tensor is what the parameter is.

    llama.cpp's converter adds one to some models' norms: those are not trained.
    """
    names = GgufNames(model, architecture)
    kept = {tensor.name: tensor for tensor in tensors if tensor.kind is Kind.KEPT and len(tensor.shape) == 1}
    found = {}
    for number, layer in enumerate(model.layers):
        for parameter, values in layer.named_parameters():
            name = names.of(number, parameter)
            if "norm" in parameter and name in kept:
                stored = kept[name].load()
                if stored.dtype.kind == "f" and np.array_equal(stored, values.detach().float().numpy()):
                    found[number, parameter] = name
    return found


class _Bar:
    """Progress on the terminal; losses as lines, wherever the output goes."""

    def __init__(self, total: int) -> None:
        self._losses: list[float] = []
        self._progress = share_bar()
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def on_layer(self, layer: int, what: str) -> None:
        """As `LayerQuantizer.run` has it; the total is the number of layers."""
        total = int(self._progress.tasks[self._task].total or 0)
        text = f"layer {layer + 1}/{total} {one_line(what)}"
        self._progress.update(self._task, completed=layer, description=text)

    def on_step(self, done: int, total: int) -> None:
        """A step of the training is done."""
        self._progress.update(self._task, completed=done, total=total, description=f"training, step {done}/{total}")

    def on_tokens(self, done: int, total: int) -> None:
        """The model has written so many tokens."""
        self._progress.update(self._task, completed=done, total=total, description="the model writes text")

    def on_epoch(self, epoch: int, loss: float) -> None:
        """An epoch is over."""
        self._losses.append(loss)
        best = " (best)" if loss == min(self._losses) else ""
        note(f"epoch {epoch}: KL divergence {loss:.4f} on what is held out{best}")
