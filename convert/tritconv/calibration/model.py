"""A model of the transformers library, a layer at a time."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tritconv.calibration.inputs import Machinery
from tritconv.calibration.pretrained import INSTEAD, load
from tritcore import child
from tritcore.errors import TritError

_BATCH_TOKENS = 2048  # through a layer at a time: enough to keep the cores busy, few enough to keep memory small


@dataclass(frozen=True)
class _Call:
    """What a layer is given besides the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Visit = Callable[[int, torch.nn.Module, torch.Tensor, torch.Tensor], None]


class _Stop(Exception):
    """Ends a pass through the model that has shown enough."""


class LayeredModel:
    """A causal language model whose layers are run one by one.

    Attributes:
        name: what errors call it.
        tokenizer: the model's.
        layers: the model's own, in the type of the checkpoint. They are not changed.
        device: where layers are computed: a GPU if torch has one.
    """

    def __init__(self, folder: Path, gguf_file: str | None = None) -> None:
        """Load a checkpoint.

        Args:
            folder: a checkpoint that has been checked.
            gguf_file: a GGUF file in `folder` to load instead.

        Raises:
            TritError: transformers does not know the architecture, or cannot load it; or it has no list of layers.
        """
        loaded = load(folder, gguf_file)
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self._model = loaded.model
        self._model.requires_grad_(False)
        if hasattr(self._model.config, "_experts_implementation"):
            self._model.config._experts_implementation = "eager"  # the others hide the experts' products
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layers_name, self.layers = self._find_layers()
        self._calls: list[_Call] = []
        # hidden states in what a layer returns, a tuple or not, as the last one that was run did; None before
        self._returned: Callable[[torch.Tensor], Any] | None = None
        self._precision = _fast_precision(self.device)

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

    def head_is(self, values: torch.Tensor) -> None:
        """Take (vocabulary, width) for the output matrix, where transformers has the embeddings in its place.

        Some checkpoints have an output matrix that their configuration ties to the embeddings: llama.cpp computes
        with what is there.
        """
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if head.weight is embeddings.weight and values.shape == head.weight.shape:
            values = values.to(head.weight)
            if not torch.equal(values, head.weight):
                head.weight = torch.nn.Parameter(values, requires_grad=False)

    def _in_float(self, modules: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The parameters outside the layers in float32: half ones go with nothing that comes out of the layers.

        Args:
            modules: names of modules to leave out.
        """
        skipped = tuple(f"{name}." for name in (self._layers_name, *modules))
        named = self._model.named_parameters()
        return {name: values.float() for name, values in named if not name.startswith(skipped)}

    @cached_property
    def _behind(self) -> dict[str, torch.Tensor]:
        """Parameters to compute logits with in place of the model's."""
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        unused = [name for name, module in self._model.named_modules() if module is embeddings]
        if self._precision is not torch.float32:  # the head's product casts its weights
            unused += [name for name, module in self._model.named_modules() if module is head]
        elif head.weight is embeddings.weight:
            unused = []
        return self._in_float(unused)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer is given. What layers are given besides is that of the first sequence from now on.

        Args:
            tokens: int64 (sequences, length).

        Returns:
            float32 (sequences, length, width).
        """
        found: list[torch.Tensor] = []
        calls: list[_Call] = []

        def layer(index: int, hidden: torch.Tensor, call: _Call) -> Any:
            if index == 0:
                found.append(hidden.float())
            if len(found) == 1:
                calls.append(call)
                if index == 0 and self._returned is None:
                    self._calls = calls
                    self.run(0, self.working_copy(0), hidden.float().to(self.device))
            if index + 1 == (len(self.layers) if len(found) == 1 else 1):
                raise _Stop
            assert self._returned is not None
            return self._returned(hidden)

        parameters = self._in_float()
        for sequence in tokens:
            with suppress(_Stop):
                self._run_model(parameters, layer, input_ids=sequence[None])
        self._calls = calls
        return torch.cat(found)

    def embed_each(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """The input of the first layer, one sequence at a time.

        Args:
            tokens: int64 (sequences, length).

        Yields:
            float32 (1, length, width).
        """
        for sequence in tokens.split(1):
            yield self.embed(sequence)

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
            return self._run_model(self._in_float(), layer, input_ids=tokens).logits.float()

    def _run_model(
        self,
        parameters: Mapping[str, torch.Tensor],
        layer: Callable[[int, torch.Tensor, _Call], Any],
        grad: bool = False,
        **inputs: torch.Tensor,
    ) -> Any:
        """Run the model with other parameters, and with `layer` in place of its layers."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return layer(index, hidden, _Call(args[1:], kwargs))

        for index, one in enumerate(self.layers):
            one.forward = partial(forward, index)
        try:
            with torch.set_grad_enabled(grad):
                return functional_call(self._model, dict(parameters), kwargs={**inputs, "use_cache": False})
        finally:
            for one in self.layers:
                del one.forward

    def autocast(self, device: str | None = None) -> AbstractContextManager[object]:
        """A context in which products are computed in the fast precision."""
        if self._precision is torch.float32:
            return nullcontext()
        return torch.autocast(device or self.device.type, self._precision)

    def whole_copy(self) -> Any:
        """A copy of the model of the transformers library, in the fast precision, on the device."""
        return copy.deepcopy(self._model).to(self.device, self._precision)

    def working_copy(self, index: int) -> torch.nn.Module:
        """A copy of a layer in float32, on the device."""
        layer = self.layers[index]
        stand_in = layer.__dict__.pop("forward", None)  # while the model runs: see `_run_model`
        try:
            return copy.deepcopy(layer).float().to(self.device)
        finally:
            if stand_in is not None:
                layer.forward = stand_in

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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last layer's output (sequences, length, width), with gradients.

        Returns:
            float32 (sequences, length, vocabulary).
        """
        if self.longest is not None and hidden.shape[1] > self.longest:
            return torch.cat([self.logits(part) for part in hidden.split(self.longest, dim=1)], dim=1)
        returned = self._returned
        assert returned is not None
        with self.autocast("cpu"):  # the model's own path from the layers to the logits, with the layers skipped
            out = self._run_model(
                self._behind, lambda *_: returned(hidden), torch.is_grad_enabled(), inputs_embeds=hidden
            )
            return out.logits.float()

    def label_gradients(self, hidden: torch.Tensor, seed: int) -> torch.Tensor:
        """Gradients of the negative log-likelihood of labels that are drawn from the model's own predictions.

        Args:
            hidden: the output of the last layer, float32 (sequences, length, width), on the CPU.
            seed: of the draw.

        Returns:
            float32 (sequences, length, width).
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        for sequence in hidden.split(1):
            sequence = sequence.detach().requires_grad_()
            logits = self.logits(sequence)[0]
            cumulative = logits.detach().softmax(dim=-1).cumsum(dim=-1)
            drawn = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
            labels = torch.searchsorted(cumulative, drawn)[:, 0].clamp_(max=logits.shape[1] - 1)
            found += torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), sequence)
        return torch.cat(found)


def batches(hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Hidden states (sequences, length, width), some sequences at a time."""
    yield from hidden.split(max(1, _BATCH_TOKENS // hidden.shape[1]))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _to(one, device) for key, one in value.items()}
    return value


def _fast_precision(device: torch.device) -> torch.dtype:
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
