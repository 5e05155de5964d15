"""One of llama.cpp's converters, given the weights that we read, and stopped where it would go wrong with them."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritconv.sources import quantized
from tritconv.sources.weights import LazyTensors
from tritcore.errors import TritError, first_line

# Tensors that old versions of transformers stored, though they follow from the architecture
_COMPUTED = ("position_ids", "causal_mask", "inv_freq")


class TensorReading:
    """For a converter class of llama.cpp, to come before it among the bases: watches what becomes of the tensors.

    Attributes:
        sources: lazy tensors before their quantization, by GGUF name; without those that come in blocks already.
        scheme: how the checkpoint says it is quantized; None if it does not.
    """

    dir_model: Path
    hparams: dict[str, Any]
    model_tensors: LazyTensors

    def begin(self) -> None:
        """Tell the converter of the scheme. To be called first. Raises TritError where its settings are damaged."""
        self.sources: dict[str, Any] = {}
        self._dtypes: dict[str, Any] = {}
        self.scheme = quantized.settings_of(self.dir_model, self.hparams)
        if self.scheme is not None:
            self.hparams["quantization_config"], renamed = quantized.for_upstream(self.scheme, self.model_tensors)
            for name, new_name in renamed.items():
                self.model_tensors[new_name] = self.model_tensors.pop(name)

    def prepare_tensors(self) -> None:
        """Map all tensors.

        Raises:
            TritError: the converter cannot dequantize them, or does not know one of them.
        """
        try:
            super().prepare_tensors()  # type: ignore[misc]
        except TritError:
            raise
        except Exception as error:  # the package raises whatever its many authors chose
            raise self._cannot_read(error) from error

    def dequant_model(self) -> None:
        """Dequantize, lazily. Raises TritError."""
        try:
            super().dequant_model()  # type: ignore[misc]
        except Exception as error:
            raise self._cannot_read(error) from error
        if self.scheme is not None:
            for name in quantized.of_activations(self.model_tensors):
                del self.model_tensors[name]

    def get_tensors(self) -> Iterator[tuple[str, Any]]:
        """The tensors, by name. Raises TritError."""
        tensors = super().get_tensors()  # type: ignore[misc]
        while True:
            try:
                name, tensor = next(tensors)
            except StopIteration:
                return
            except Exception as error:
                raise self._cannot_read(error) from error
            self._dtypes[name] = tensor.dtype
            if self.scheme is not None and name.endswith(".weight") and "float8" in str(tensor.dtype):
                raise quantized.refusal(self.dir_model, self.scheme, f"tensor {name} has no scale")
            yield name, tensor

    def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
        """What becomes of a tensor, by GGUF name. Raises TritError."""
        dtype = self._dtypes.get(name, data_torch.dtype)
        is_integer = not dtype.is_floating_point
        if is_integer and name.endswith(".weight"):
            raise self._not_dequantized(name, dtype)
        try:
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):  # type: ignore[misc]
                if is_integer and tensor.ndim >= 2:
                    raise self._not_dequantized(name, dtype)
                self.sources[new_name] = tensor
                yield new_name, tensor
        except TritError:
            raise
        except Exception as error:
            if name.endswith(_COMPUTED):
                return
            if quantized.is_of_scheme(name):
                raise self._not_dequantized(name, dtype) from error
            shape = " x ".join(str(n) for n in data_torch.shape)
            raise TritError(
                f"{self.dir_model}: llama.cpp's converter cannot map tensor {name} ({shape}), as config.json describes "
                f"the model: {reason(error)}"
            ) from error

    def _cannot_read(self, error: Exception) -> TritError:
        why = reason(error)
        if self.scheme is None:
            return TritError(f"{self.dir_model}: llama.cpp's converter cannot read the weights: {why}")
        # that a scheme is not supported is said anyway
        return quantized.refusal(self.dir_model, self.scheme, "" if "not yet supported" in why else why)

    def _not_dequantized(self, name: str, dtype: Any) -> TritError:
        what = f"tensor {name} is {str(dtype).removeprefix('torch.')}"
        if self.scheme is not None:
            return quantized.refusal(self.dir_model, self.scheme, what)
        return TritError(
            f"{self.dir_model} is quantized, as {what}, and config.json does not say how: "
            "convert the original checkpoint, which this one was made from"
        )


def reason(error: Exception) -> str:
    """What an exception of the converter says, for people: many are assertions or missing keys, without a word."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, AssertionError) and not str(error):
        asserted = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"it wants {asserted.removeprefix('assert ').partition('  #')[0]}"
    return first_line(error)


@contextmanager
def reading(weights: LazyTensors) -> Iterator[None]:
    """Within the context, converters take these tensors instead of looking for files.

    A subclass would not do: some converters make another one and delegate to it.
    """
    from conversion import ModelBase

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> LazyTensors:
        items = (self.filter_tensors(item) for item in weights.items())
        return dict(item for item in items if item is not None)

    own = ModelBase.index_tensors
    ModelBase.index_tensors = index_tensors
    try:
        yield
    finally:
        ModelBase.index_tensors = own


def at_work(model: Any) -> Any:
    """The converter that a converter delegates to, or itself."""
    from conversion import ModelBase

    held = [value for value in vars(model).values() if isinstance(value, ModelBase)]
    return at_work(held[0]) if held else model
