"""A model of the transformers library, a layer at a time."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

import tritconv
from tritconv.errors import TritError, first_line

_BATCH_TOKENS = 2048  # through a layer at a time: enough to keep the cores busy, few enough to keep memory small


@dataclass(frozen=True)
class _Call:
    """What a layer is given besides the hidden states: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a pass through the model that has shown enough."""


class LayeredModel:
    """A causal language model whose layers are run one by one.

    Attributes:
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
            TritError: transformers does not know the architecture, or cannot load it.
        """
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        options: dict[str, Any] = {"dtype": "auto", "low_cpu_mem_usage": True}
        if gguf_file is not None:
            from transformers import GgufConfig

            source["gguf_file"] = gguf_file
            options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(**source)
            self._model = AutoModelForCausalLM.from_pretrained(**source, **options).eval()
        except Exception as error:  # the library raises whatever its many authors chose
            raise TritError(f"{folder}: transformers cannot load it to calibrate: {first_line(error)}") from error
        self._model.requires_grad_(False)
        if hasattr(self._model.config, "_experts_implementation"):
            self._model.config._experts_implementation = "eager"  # the others hide the experts' products
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layers_name, self.layers = self._find_layers(folder)
        self._calls: list[_Call] = []
        self._in_tuples = False  # whether layers return their output in a tuple: that depends on the architecture
        self._precision = _fast_precision(self.device)

    @property
    def precision(self) -> str:
        """The type that products are computed in."""
        return str(self._precision).removeprefix("torch.")

    @property
    def computed_by(self) -> dict[str, Any]:
        """All besides a model and its inputs that results depend on, bit by bit: for the names of what is kept."""
        return {
            "precision": self.precision,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": [tritconv.__version__, torch.__version__],
        }

    def _find_layers(self, folder: Path) -> tuple[str, Sequence[torch.nn.Module]]:
        count = self._model.config.get_text_config().num_hidden_layers
        lists = [
            (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        ]
        if not lists:
            raise TritError(f"{folder}: no list of {count} layers in the model: calibration cannot take it apart")
        return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))

    def full_name(self, layer: int, parameter: str) -> str:
        """The name of a layer's parameter in the model, as checkpoints have it."""
        return f"{self._layers_name}.{layer}.{parameter}"

    @cached_property
    def _outside(self) -> dict[str, torch.Tensor]:
        """Parameters to compute logits with in place of the model's: float32, where nothing else casts half ones."""
        if self._precision is not torch.float32:
            return {}
        named = self._model.named_parameters()
        return {name: values.float() for name, values in named if not name.startswith(f"{self._layers_name}.")}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer is given.

        Args:
            tokens: int64 (sequences, length).

        Returns:
            float32 (sequences, length, width).
        """
        hidden: list[torch.Tensor] = []
        calls: dict[int, _Call] = {}

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], last: int) -> None:
            if index == 0:
                hidden.append((args[0] if args else kwargs["hidden_states"]).float())
            calls[index] = _Call(args[1:], {key: v for key, v in kwargs.items() if key != "hidden_states"})
            if index == last:
                raise _Stop

        # the first sequence goes through all layers, to see what each of them is given
        for number, sequence in enumerate(tokens):
            last = len(self.layers) - 1 if number == 0 else 0
            hooks = [
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index, last=last: before(index, args, kwargs, last), with_kwargs=True
                )
                for index, layer in enumerate(self.layers)
            ]
            try:
                with torch.no_grad(), self.autocast("cpu"):
                    self._model(input_ids=sequence[None], use_cache=False)
            except _Stop:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
            if number == 0:
                self._calls = [calls[index] for index in range(len(self.layers))]
        return torch.cat(hidden)

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
        return copy.deepcopy(self.layers[index]).float().to(self.device)

    def run(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Put hidden states (sequences, length, width) on the device through a layer that stands at `index`."""
        call = self._calls[index]
        with self.autocast():
            out = layer(hidden, *_to(call.args, self.device), **_to(call.kwargs, self.device))
        self._in_tuples = isinstance(out, tuple)
        return (out[0] if self._in_tuples else out).float()

    def run_all(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """As `run`, in batches and without gradients; hidden states are taken from and go to the CPU."""
        with torch.no_grad():
            return torch.cat([self.run(index, layer, batch.to(self.device)).cpu() for batch in batches(hidden)])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last layer's output (sequences, length, width), with gradients.

        Returns:
            float32 (sequences, length, vocabulary).
        """
        for layer in self.layers:  # the model's own path from the layers to the logits, with the layers skipped
            layer.forward = lambda *_, **__: (hidden,) if self._in_tuples else hidden
        try:
            with self.autocast("cpu"):
                out = functional_call(self._model, self._outside, kwargs={"inputs_embeds": hidden, "use_cache": False})
                return out.logits.float()
        finally:
            for layer in self.layers:
                del layer.forward


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
    announced = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    # virtual machines may announce instructions that fault
    probe = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"
    if announced and subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0:
        return torch.bfloat16
    return torch.float32
