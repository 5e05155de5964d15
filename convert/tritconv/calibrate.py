"""Calibrated conversion: a checkpoint and a text, to blocks for the tensors of a GGUF file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tritconv.allocate import Budget, allocate
from tritconv.calibration import own_text, rare_words, sensitivity
from tritconv.calibration.matrices import matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import Place, RowIndex, RowMap
from tritconv.calibration.store import LayerStore, digest_of_files, digest_of_tokens
from tritconv.calibration.text import TextOptions, read, sequences
from tritconv.codec import pack, unpack
from tritconv.console import err, note, one_line
from tritconv.format import BYTES_PER_BLOCK
from tritconv.gguf_types import DEPTH_OF_TYPE
from tritconv.layerwise import Depths, LayerQuantizer
from tritconv.methods import gptq, search
from tritconv.methods.tune import Latent, NormPlace, Tuned, TuneOptions, hold_out, tune
from tritconv.plan import Kind, SourceTensor, TypePlan
from tritconv.workers import Workers

_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Origin:
    """Where the model is: a folder that the transformers library reads, or a GGUF file in it."""

    folder: Path
    gguf_file: str | None = None

    def files(self) -> list[Path]:
        """All files that say what the model is."""
        if self.gguf_file is not None:
            return [self.folder / self.gguf_file]
        return [path for pattern in _MODEL_FILES for path in self.folder.glob(pattern)]


@dataclass(frozen=True)
class CalibrationOptions:
    """What the user asked for.

    Attributes:
        own_tokens: so many more, which the model writes itself.
        training: after gptq; None leaves it at that.
        budget: a size to reach by mixed depth; None leaves the types as planned.
    """

    text: TextOptions
    own_tokens: int = 0
    training: TuneOptions | None = None
    budget: Budget | None = None

    @property
    def method(self) -> str:
        """The name of the method."""
        return "gptq" if self.training is None else "tune"


@dataclass(frozen=True)
class ModelRows:
    """Where the rows of GGUF tensors come from, by tensor name."""

    maps: Mapping[str, RowMap]

    @staticmethod
    def find(model: LayeredModel, tensors: Sequence[SourceTensor]) -> "ModelRows":
        """Look the rows of tensors up in the model's layers. Tensors that are made of something else are left out."""
        index = RowIndex()
        for number, layer in enumerate(model.layers):
            for matrix in matrices_of(layer):
                index.add((number, matrix), matrix.of(layer))
        found = ((t.name, index.find(t.load())) for t in tensors if t.kind is Kind.MATRIX)
        return ModelRows({name: rows for name, rows in found if rows is not None})

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
    """Blocks that the layers' quantization has made, as tensors. What it did not reach goes by the search."""

    def __init__(self, name: str, rows: ModelRows, blocks: Mapping[Place, np.ndarray], remarks: Sequence[str]) -> None:
        self.name = name
        self._rows = rows
        self._blocks = blocks
        self._remarks = list(remarks)

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        rows = self._rows.maps.get(tensor.name)
        if rows is not None and all(place in self._blocks for place in rows.places):
            return rows.gather(self._blocks)
        data = search.Search().quantize(tensor, values, depth, workers)
        self._remarks.append(f"{tensor.name} was not reached by the calibration, so it went by plain search")
        return data

    def remarks(self) -> list[str]:
        return self._remarks


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
    """Quantize the layers of a checkpoint.

    Args:
        origin: has been checked.
        architecture: llama.cpp's name of it.
        tensors: of the GGUF file to write; they are loaded.
        plan: their types.

    Raises:
        TritError: transformers cannot load the model, or the text will not do.
    """
    with err.status("loading the model") if err.is_terminal else nullcontext():
        model = LayeredModel(origin.folder, origin.gguf_file)
        documents = read(options.text.files, model.tokenizer)
        documents, n_made_up = rare_words.fill(documents, model.tokenizer, options.text.seed)
        tokens = sequences(documents, options.text, model.tokenizer)
        rows = ModelRows.find(model, tensors)
    if n_made_up:
        note(f"the text has {rare_words.PLACEHOLDER} for {n_made_up} rare words: made-up ones stand in for them")
    held_out = tokens[:0]
    if options.training is not None:
        tokens, held_out = hold_out(tokens)
    model_digest = digest_of_files(origin.files())
    n_read = len(tokens) + len(held_out)
    if options.own_tokens:
        tokens = torch.cat([tokens, _own_text(model, model_digest, tokens, options)])
    if options.budget is not None:
        plan = _mixed(model, rows, tokens, model_digest, tensors, plan, options)
    depths = rows.depths(plan, tensors)
    store = LayerStore(
        {
            "model": model_digest,
            "tokens": digest_of_tokens(tokens),
            "depths": {f"{number} {matrix}": depth for (number, matrix), depth in depths.items()},
            "method": gptq.VERSION,
            "seed": options.text.seed,
            **model.computed_by,
        }
    )
    quantizer = LayerQuantizer(model, depths, store, options.text.seed, keep_offsets=options.training is not None)
    note(f"calibrating on {len(tokens)} sequences of {tokens.shape[1]} tokens, in {model.precision} on {model.device}")
    with _Bar(len(model.layers)) as bar:
        quantizer.run(tokens, bar.on_layer)
    blocks, trained = quantizer.blocks, dict[str, np.ndarray]()
    if options.training is not None:
        norms = _norms(model, architecture, tensors)
        tuned = _tune(model, quantizer, depths, norms.keys(), (tokens, held_out), options.training)
        blocks = blocks | {place: pack(found).reshape(len(blocks[place]), -1) for place, found in tuned.blocks.items()}
        trained = {norms[place]: values.cpu().numpy() for place, values in tuned.norms.items()}
    description = [
        *(file.name for file in options.text.files),
        *([f"{n_made_up} rare words made up"] if n_made_up else []),
        f"{n_read} sequences of {tokens.shape[1]} tokens",
        *([f"{len(tokens) + len(held_out) - n_read} that the model wrote"] if options.own_tokens else []),
        f"seed {options.text.seed}",
        model.precision,
    ]
    calibrated = Calibrated(options.method, rows, blocks, quantizer.remarks)
    return Calibration(calibrated, plan, trained, description)


def _own_text(
    model: LayeredModel, model_digest: str, tokens: torch.Tensor, options: CalibrationOptions
) -> torch.Tensor:
    """What the model writes, in as long sequences, going on from `tokens`."""
    seed = options.text.seed
    store = own_text.open_store(model, model_digest, tokens, seed)
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
) -> Tuned:
    """Train what gptq has made of a model, on a text, and judged by another."""
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
        return tune(model, layers, latents, norms, *text, options, bar.on_step, bar.on_epoch)


def _mixed(
    model: LayeredModel,
    rows: ModelRows,
    tokens: torch.Tensor,
    model_digest: str,
    tensors: Sequence[SourceTensor],
    plan: TypePlan,
    options: CalibrationOptions,
) -> TypePlan:
    """The plan with the types that cost the model least, at the size wanted."""
    assert options.budget is not None
    store = sensitivity.open_store(model_digest, tokens, options.text.seed)
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
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, len(model.layers))
    kept = {tensor.name: tensor for tensor in tensors if tensor.kind is Kind.KEPT and len(tensor.shape) == 1}
    found = {}
    for number, layer in enumerate(model.layers):
        for parameter, values in layer.named_parameters():
            name = names.get_name(model.full_name(number, parameter), try_suffixes=(".weight",))
            if "norm" in parameter and name in kept:
                stored = kept[name].load()
                if stored.dtype.kind == "f" and np.array_equal(stored, values.detach().float().numpy()):
                    found[number, parameter] = name
    return found


class _Bar:
    """Progress on the terminal; losses as lines, wherever the output goes."""

    def __init__(self, total: int) -> None:
        self._losses: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
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
