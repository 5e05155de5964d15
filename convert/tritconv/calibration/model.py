"""A model of the transformers library, a layer at a time.

The model is on the meta device: it has the structure, and no weights. A layer's weights are read from the checkpoint
when its turn comes. What lies before and behind the layers runs as the library does it, with a `Lender` for the
weights.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tritconv.calibration import memory
from tritconv.calibration.head import label_gradients
from tritconv.calibration.inputs import Machinery
from tritconv.calibration.lender import Lender, ReadRows, rows_of_chunk
from tritconv.calibration.outside import OutsideMoments
from tritconv.calibration.pretrained import INSTEAD, load
from tritconv.calibration.stored import Spill
from tritcore import child
from tritcore.errors import TritError
from tritcore.sizes import show

BATCH_TOKENS = 2048  # through a layer at a time: enough to keep the cores busy, few enough to keep memory small


@dataclass(frozen=True)
class _Call:
    """What a layer is given besides the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Visit = Callable[[int, torch.nn.Module, torch.Tensor, torch.Tensor], None]


class _Stop(Exception):
    """Ends a pass through the model that has shown enough."""


class LayeredModel:
    """A causal language model whose layers are run one by one. Memory holds none of the weights.

    Attributes:
        name: what errors call it.
        tokenizer: the model's.
        layers: the model's own, on the meta device: structure, names, shapes and types.
        device: where layers are computed: a GPU if torch has one.
        head_in_chunks: whether `label_gradients` may multiply by some rows of the output matrix at a time.
    """

    def __init__(self, folder: Path, gguf_file: str | None = None) -> None:
        """Open a checkpoint.

        Args:
            folder: a checkpoint that has been checked.
            gguf_file: a GGUF file in `folder` to open instead.

        Raises:
            TritError: transformers does not know the architecture, or cannot load it; or it has no list of layers.
        """
        loaded = load(folder, gguf_file)
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self._model = loaded.model
        self._parameters = loaded.parameters
        self._model.requires_grad_(False)
        if hasattr(self._model.config, "_experts_implementation"):
            self._model.config._experts_implementation = "eager"  # the others hide the experts' products
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layers_name, self.layers = self._find_layers()
        self._read_buffers()
        self._lender = self._prepare_outside()
        self._spill = Spill()
        self.head_in_chunks = True
        self._calls: list[_Call] = []
        # hidden states in what a layer returns, a tuple or not, as the last one that was run did; None before
        self._returned: Callable[[torch.Tensor], Any] | None = None
        self._precision = fast_precision(self.device)

    @property
    def precision(self) -> str:
        """The type that products are computed in."""
        return str(self._precision).removeprefix("torch.")

    @property
    def product_type(self) -> torch.dtype:
        """The type that products are computed in."""
        return self._precision

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that it takes; None where nothing says so."""
        found = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def machinery(self) -> Machinery:
        """What computes with it."""
        return Machinery.here(self.precision, self.device)

    def _find_layers(self) -> tuple[str, Sequence[torch.nn.Module]]:
        count = self._model.config.get_text_config().num_hidden_layers
        lists = [
            (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        ]
        if not lists:
            raise TritError(
                f"{self.name}: no list of {count} layers in the model, so calibration cannot take it apart: {INSTEAD}"
            )
        name, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
        if len(set(layers)) < count:
            raise TritError(
                f"{self.name}: some of its layers are one and the same, and calibration does not know such "
                f"models: {INSTEAD}"
            )
        return name, layers

    def full_name(self, layer: int, parameter: str) -> str:
        """The name of a layer's parameter in the model, as checkpoints have it."""
        return f"{self._layers_name}.{layer}.{parameter}"

    def _read_buffers(self) -> None:
        """Read the buffers outside the layers: they are small."""
        for name, buffer in list(self._model.named_buffers()):
            if buffer.is_meta and not name.startswith(f"{self._layers_name}."):
                ((_, values),) = self._parameters.read([name])
                module, _, own = name.rpartition(".")
                self._model.get_submodule(module)._buffers[own] = values

    def _prepare_outside(self) -> Lender:
        """Let the parameters outside the layers say that they are float32, as what comes out of the layers is."""
        names: dict[torch.Tensor, str] = {}
        stand_ins: dict[torch.Tensor, torch.nn.Parameter] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if not parameter.is_meta or name.startswith(f"{self._layers_name}."):
                continue
            if parameter not in stand_ins:
                stand_ins[parameter] = torch.nn.Parameter(parameter.detach().float(), requires_grad=False)
            stand_in = stand_ins[parameter]
            if stand_in not in names or not self._parameters.has(names[stand_in]):  # tied ones have one name in files
                names[stand_in] = name
            module, _, own = name.rpartition(".")
            self._model.get_submodule(module)._parameters[own] = stand_in
        head, embedding = self._model.get_output_embeddings().weight, self._model.get_input_embeddings().weight
        return Lender(self._parameters, names, head, embedding)

    @property
    def has_tied_head(self) -> bool:
        """Whether the output matrix is that of the embeddings."""
        return self._model.get_output_embeddings().weight is self._model.get_input_embeddings().weight

    def head_is(self, values: torch.Tensor) -> None:
        """Take (vocabulary, width) for the output matrix, where transformers has the embeddings in its place.

        Some checkpoints have an output matrix that their configuration ties to the embeddings: llama.cpp computes
        with what is there.
        """
        head = self._model.get_output_embeddings()
        if not self.has_tied_head or values.shape != head.weight.shape:
            return
        name = self._lender.name_of(head.weight)
        assert name is not None
        dtype = self._parameters.dtypes[name]
        rows = range(len(values))
        parts = [rows[start : start + rows_of_chunk(self.width)] for start in rows[:: rows_of_chunk(self.width)]]
        if all(torch.equal(values[p.start : p.stop].to(dtype), self._parameters.rows(name, p)) for p in parts):
            return
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
        own = next(name for name, parameter in self._model.named_parameters() if parameter is head.weight)
        self._parameters.take(own, self._spill.add(values.to(dtype)))
        self._lender.add(head.weight, own, is_head=True)

    @property
    def vocabulary(self) -> int:
        """Rows of the output matrix."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def embed(self, tokens: torch.Tensor, embeddings: ReadRows | None = None) -> torch.Tensor:
        """What the first layer is given. What layers are given besides is that of the first sequence from now on.

        Args:
            tokens: int64 (sequences, length).
            embeddings: reads rows of other token embeddings, float32; None: the model has its own.

        Returns:
            float32 (sequences, length, width).
        """
        self._lender.embeddings = embeddings
        try:
            return torch.cat(list(self.embed_each(tokens)))
        finally:
            self._lender.embeddings = None

    def embed_each(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """As `embed`, one sequence at a time: float32 (1, length, width)."""
        for number, sequence in enumerate(tokens):
            found: list[torch.Tensor] = []
            calls: list[_Call] = []
            with suppress(_Stop):
                self._run_model(
                    partial(self._embedded, found, calls, 1 if number else self.n_layers), input_ids=sequence[None]
                )
            if number == 0:
                self._calls = calls
            yield found[0]

    def _embedded(
        self,
        found: list[torch.Tensor],
        calls: list[_Call],
        n_layers: int,
        index: int,
        hidden: torch.Tensor,
        call: _Call,
    ) -> Any:
        """In place of a layer: keep what the first one is given, and what all are given besides.

        Args:
            n_layers: to go through.
        """
        calls.append(call)
        if index == 0:
            found.append(hidden.float())
            if self._returned is None:
                self._calls = calls
                self.run(0, self.working_copy(0), found[0].to(self.device))
        if index + 1 == n_layers:
            raise _Stop
        assert self._returned is not None
        return self._returned(hidden)

    def walk(self, tokens: torch.Tensor, visit: Visit) -> torch.Tensor:
        """Put sequences through the model as the transformers library does it, with layers in float32.

        Args:
            tokens: int64 (sequences, length).
            visit: called after each layer with its number, a copy of it, and what it was given and put out: float32
                (sequences, length, width), on the device.

        Returns:
            float32 (sequences, length, vocabulary): the logits.
        """

        def layer(index: int, hidden: torch.Tensor, call: _Call) -> Any:
            copied, hidden = self.working_copy(index), hidden.float().to(self.device)
            with self.autocast():
                out = copied(hidden, *_to(call.args, self.device), **_to(call.kwargs, self.device))
            visit(index, copied, hidden, (out[0] if isinstance(out, tuple) else out).float())
            return _to(out, torch.device("cpu"))

        with self.autocast("cpu"):
            return self._run_model(layer, input_ids=tokens).logits.float()

    def _run_model(
        self, layer: Callable[[int, torch.Tensor, _Call], Any], grad: bool = False, **inputs: torch.Tensor
    ) -> Any:
        """Run the model with `layer` in place of its layers."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return layer(index, hidden, _Call(args[1:], kwargs))

        for index, one in enumerate(self.layers):
            one.forward = partial(forward, index)
        try:
            with torch.set_grad_enabled(grad), self._lender:
                return self._model(**inputs, use_cache=False)
        finally:
            for one in self.layers:
                del one.forward

    def autocast(self, device: str | None = None) -> AbstractContextManager[object]:
        """A context in which products are computed in the fast precision."""
        if self._precision is torch.float32:
            return nullcontext()
        return torch.autocast(device or self.device.type, self._precision)

    def whole_copy(self) -> Any:
        """A copy of the model of the transformers library with all weights, in the fast precision, on the device.

        Raises:
            TritError: memory does not hold it.
        """
        needed = sum(parameter.numel() for parameter in self._model.parameters()) * self._precision.itemsize
        room = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else memory.total()
        if needed > room:
            raise TritError(
                f"{self.name}: to write text of its own, the whole model must be in memory: that needs {show(needed)}, "
                f"and the machine has {show(room)}; leave out --calib-own"
            )
        return self._filled(self._model, "", self._precision)

    def working_copy(self, index: int) -> torch.nn.Module:
        """A copy of a layer in float32, on the device, with its weights. Raises TritError."""
        return self._layer(index, torch.float32)

    def stored_copy(self, index: int) -> torch.nn.Module:
        """A copy of a layer in the types of the checkpoint, on the CPU, with its weights. Raises TritError."""
        return self._layer(index, None)

    def _layer(self, index: int, dtype: torch.dtype | None) -> torch.nn.Module:
        layer = self.layers[index]
        stand_in = layer.__dict__.pop("forward", None)  # while the model runs: see `_run_model`
        try:
            return self._filled(layer, f"{self._layers_name}.{index}.", dtype)
        finally:
            if stand_in is not None:
                layer.forward = stand_in

    def _filled(self, module: torch.nn.Module, prefix: str, dtype: torch.dtype | None) -> torch.nn.Module:
        """A copy of a module with values for what is on the meta device.

        Args:
            prefix: of its parameters' names.
            dtype: of all floats, on the device; None leaves them as they are, on the CPU.
        """
        device = torch.device("cpu") if dtype is None else self.device
        held = {f"{prefix}{name}": values for name, values in module.named_parameters() if values.is_meta}
        buffers = {f"{prefix}{name}": values for name, values in module.named_buffers() if values.is_meta}
        names = {self._lender.name_of(values) or name: values for name, values in (held | buffers).items()}
        memo: dict[int, Any] = {id(self._model.config): self._model.config}
        with torch._C.DisableTorchFunction():  # the copy is no operation of the model
            for name, values in self._parameters.read(names):
                new = values.to(device, dtype if values.is_floating_point() else None)
                is_buffer = name in buffers
                memo[id(names[name])] = new if is_buffer else torch.nn.Parameter(new, requires_grad=False)
            copied = copy.deepcopy(module, memo)
            return copied if dtype is None else copied.to(device, dtype)

    def run(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Put hidden states (sequences, length, width) on the device through a layer that stands at `index`."""
        call = self._calls[index]
        with self.autocast():
            out = layer(hidden, *_to(call.args, self.device), **_to(call.kwargs, self.device))
        if isinstance(out, tuple):
            rest = out[1:]
            self._returned = lambda hidden: (hidden, *rest)
            return out[0].float()
        self._returned = lambda hidden: hidden
        return out.float()

    def run_all(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """As `run`, in batches and without gradients; hidden states are taken from and go to the CPU.

        Raises:
            TritError: what comes out is not finite.
        """
        with torch.no_grad():
            out = torch.cat([self.run(index, layer, batch.to(self.device)).cpu() for batch in batches(hidden)])
        self.check_finite(out, f"layer {index} puts out")
        return out

    def check_finite(self, values: torch.Tensor, what: str) -> None:
        """Raise TritError, of `what` that these values are, if one of them is NaN or infinite."""
        if not bool(values.isfinite().all()):
            raise TritError(
                f"{self.name}: {what} NaN or infinite values on this text: the weights are damaged, or not meant for "
                f"{self.precision}"
            )

    def logits(self, hidden: torch.Tensor, outputs: ReadRows | None = None) -> torch.Tensor:
        """What the model makes of the last layer's output (sequences, length, width), with gradients.

        Args:
            outputs: reads rows of another output matrix, float32; None: the model has its own.

        Returns:
            float32 (sequences, length, vocabulary).
        """
        if self.longest is not None and hidden.shape[1] > self.longest:
            return torch.cat([self.logits(part, outputs) for part in hidden.split(self.longest, dim=1)], dim=1)
        returned = self._returned
        assert returned is not None
        self._lender.outputs = outputs
        try:
            with self.autocast("cpu"):  # the model's own path from the layers to the logits, with the layers skipped
                out = self._run_model(lambda *_: returned(hidden), torch.is_grad_enabled(), inputs_embeds=hidden)
                return out.logits.float()
        finally:
            self._lender.outputs = None

    def label_gradients(
        self, hidden: torch.Tensor, draws: torch.Tensor, moments: OutsideMoments | None = None
    ) -> torch.Tensor:
        """The gradients of -log p(label) for the last layer's output, labels drawn from the model's predictions.

        The memory that it takes does not depend on the vocabulary, except where `head_in_chunks` is False.

        Args:
            hidden: the last layer's output, float32 (sequences, length, width), on the CPU.
            draws: (sequences, length), uniform in 0 .. 1: they choose the labels.
            moments: get the predictions.

        Returns:
            float32, of the same shape.
        """

        def on_predictions(rows: range, p: torch.Tensor) -> None:
            if moments is not None:
                x = self._lender.head_inputs
                assert x is not None
                moments.add_predictions(rows, x.reshape(-1, x.shape[-1]).float(), p)

        vocabulary, width = self._model.get_output_embeddings().weight.shape
        rows = rows_of_chunk(max(width, hidden.shape[1])) if self.head_in_chunks else vocabulary
        chunks = [range(start, min(start + rows, vocabulary)) for start in range(0, vocabulary, rows)]
        return label_gradients(self._chunk, hidden, chunks, draws, on_predictions)

    @contextmanager
    def _chunk(self, rows: range) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Within this context, `logits` for some of the vocabulary: float32 (sequences, length, rows)."""
        with self._lender.only(rows):
            yield self.logits

    def check_chunks(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """See whether the logits can be computed in chunks, and set `head_in_chunks`.

        Args:
            hidden: of a few tokens, as for `logits`.
            logits: what the whole output matrix makes of it.
        """
        half = self._model.get_output_embeddings().weight.shape[0] // 2
        parts = [range(half), range(half, self._model.get_output_embeddings().weight.shape[0])]
        found = []
        for rows in parts:
            with torch.no_grad(), self._chunk(rows) as logits_of:
                found.append(logits_of(hidden))
        self.head_in_chunks = [part.shape[-1] for part in found] == [len(rows) for rows in parts] and torch.allclose(
            torch.cat(found, dim=-1), logits, rtol=1e-2, atol=1e-2
        )


def batches(hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Hidden states (sequences, length, width), some sequences at a time."""
    yield from hidden.split(_at_a_time(hidden.shape[1]))


def in_batches(numbers: Sequence[int], length: int) -> list[list[int]]:
    """The numbers of sequences of `length` tokens, as many at a time as `batches` gives."""
    at_a_time = _at_a_time(length)
    return [list(numbers[first : first + at_a_time]) for first in range(0, len(numbers), at_a_time)]


def _at_a_time(length: int) -> int:
    return max(1, BATCH_TOKENS // length)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _to(one, device) for key, one in value.items()}
    return value


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


@cache
def _cpu_multiplies_bfloat16() -> bool:
    announced = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    # virtual machines may announce instructions that fault
    probe = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"
    return announced and child.run(probe).returncode == 0
