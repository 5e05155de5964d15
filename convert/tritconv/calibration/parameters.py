"""The parameters of a model of the transformers library, read from the checkpoint when they are needed.

The model itself is on the meta device: it has the structure, and no weights. The library's own rules say which tensors
of the checkpoint become which parameters. Most are one tensor under another name; the others, such as experts that
are merged, or weights that are dequantized, are converted by the library, a layer at a time.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritconv.calibration.stored import Stored
from tritcore.errors import TritError

_LAYER = re.compile(r".*?\.\d+\.")

Convert = Callable[..., tuple[Any, Any]]  # `convert_and_load_state_dict_in_model` of the transformers library


@dataclass(frozen=True)
class _Outline:
    """A stored tensor for the library, without its values."""

    stored: Stored

    def is_floating_point(self) -> bool:
        return self.stored.is_floating_point()

    def __getitem__(self, _: object) -> torch.Tensor:
        return torch.empty(self.stored.shape, dtype=self.stored.dtype, device="meta")


@dataclass(frozen=True)
class _Rows:
    """Some rows of a stored tensor for the library."""

    stored: Stored
    numbers: Sequence[int] | range

    def is_floating_point(self) -> bool:
        return self.stored.is_floating_point()

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.stored.rows(self.numbers)


class Parameters:
    """Reads parameters and buffers, by their names in the model."""

    def __init__(self, model: Any, stored: Mapping[str, Stored], config: Any, convert: Convert) -> None:
        """Sort the tensors of a checkpoint by the parameters that they become.

        Args:
            model: on the meta device.
            stored: the checkpoint's tensors.
            config: the library's for loading them.
            convert: puts tensors into a model.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self._model, self._stored, self._config, self._convert = model, stored, config, convert
        self._plain: dict[str, Stored] = {}
        self._converted: dict[str, list[str]] = defaultdict(list)  # tensors, by the first parameter that they become
        self.dtypes: dict[str, torch.dtype] = {}
        mapping = config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = model.state_dict()
        prefix = model.base_model_prefix
        for key in sorted(stored, key=dot_natural_key):  # as the library goes: some renamings depend on the order
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name in known and pattern is None:
                self._plain[name] = stored[key]
            elif name in known:
                self._converted[name].append(key)

    def outline(self) -> Any:
        """Give the model's parameters their types, on the meta device.

        Returns:
            The library's account of it: which parameters are missing.
        """
        keys = list(self._stored)
        info = self._run({key: _Outline(self._stored[key]) for key in keys}, "meta")
        if info.conversion_errors:  # not all conversions work without values
            info = self._run({key: self._stored[key] for key in keys if key not in self._keys_converted()}, "meta")
            for names in self._converted.values():
                part = self._run({key: self._stored[key] for key in names}, "cpu")
                self._to_meta()
                info.missing_keys &= part.missing_keys
                info.mismatched_keys |= part.mismatched_keys
                info.conversion_errors |= part.conversion_errors
        tensors = self._model.state_dict(keep_vars=True)
        self.dtypes = {name: values.dtype for name, values in tensors.items()}
        return info

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a parameter, as far as its name tells."""
        return name in self._plain or name in self._converted

    def take(self, name: str, other: Stored) -> None:
        """Take a stored tensor for a parameter, from now on."""
        self._converted.pop(name, None)
        self._plain[name] = other
        self.dtypes[name] = other.dtype

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters in the types that the model has them in, one at a time if they need no conversion.

        Each is in memory of its own. Raises TritError.
        """
        rest = []
        for name in names:
            if name in self._plain:
                yield name, self._plain[name][...].to(self.dtypes[name])
            else:
                rest.append(name)
        if rest:
            yield from self._read_converted(rest)

    def rows(self, name: str, numbers: Sequence[int] | range) -> torch.Tensor:
        """Rows of a parameter, in the type that the model has it in. Raises TritError."""
        if name in self._plain:
            return self._plain[name].rows(numbers).to(self.dtypes[name])
        keys = self._converted.get(name, [])
        shape = self._model.get_parameter(name).shape
        if len(keys) == 1 and self._stored[keys[0]].shape[0] == shape[0]:
            found = self._load({keys[0]: _Rows(self._stored[keys[0]], numbers)}, [name], (len(numbers), *shape[1:]))
            return found[name]
        ((_, values),) = self.read([name])
        return values[torch.as_tensor(list(numbers))]

    def _read_converted(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters that need conversion, a group that is converted together at a time where the names tell."""
        whole = [name for name in names if name in self._converted]
        for name in whole:
            yield from self._load({key: self._stored[key] for key in self._converted[name]}, [name]).items()
        if others := [name for name in names if name not in self._converted]:  # one tensor becomes several of them
            places = {_place(name) for name in others}
            near = [first for first in self._converted if _place(first) in places]
            keys = [key for first in near for key in self._converted[first]]
            yield from self._load({key: self._stored[key] for key in keys}, others).items()

    def _load(
        self, tensors: Mapping[str, Any], names: Sequence[str], shape: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Convert tensors, and take parameters out of the result.

        Args:
            shape: of the parameter, if it is not the model's.
        """
        with self._as_they_are(), torch.autocast("cpu", enabled=False):  # it would change types, or refuse float16
            if shape is not None:
                for name in names:
                    self._set(name, torch.empty(tuple(shape), dtype=self.dtypes[name], device="meta"))
            info = self._run(tensors, "cpu")
            found = {name: _get(self._model, name).detach() for name in names}
        if info.conversion_errors or any(values.is_meta for values in found.values()):
            raise TritError(f"the transformers library cannot convert {', '.join(names)} of this checkpoint")
        return {name: values.to(self.dtypes[name]) for name, values in found.items()}

    def _keys_converted(self) -> set[str]:
        return {key for keys in self._converted.values() for key in keys}

    def _run(self, tensors: Mapping[str, Any], device: str) -> Any:
        """Let the library convert tensors and put them into the model."""
        info, _ = self._convert(self._model, dict(tensors), replace(self._config, device_map={"": device}))
        return info

    @contextmanager
    def _as_they_are(self) -> Iterator[None]:
        """Afterwards, the model has the parameters that it has now."""
        kept = [(module, copy(module._parameters), copy(module._buffers)) for module in self._model.modules()]
        conversions = getattr(self._model, "_weight_conversions", None)
        try:
            yield
        finally:
            for module, parameters, buffers in kept:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            self._model._weight_conversions = conversions

    def _to_meta(self) -> None:
        for name, values in self._model.state_dict(keep_vars=True).items():
            if not values.is_meta:
                self._set(name, values.detach().to("meta"))

    def _set(self, name: str, values: torch.Tensor) -> None:
        parent, _, own = name.rpartition(".")
        module = self._model.get_submodule(parent)
        is_buffer = own in module._buffers
        held = values if is_buffer else torch.nn.Parameter(values, requires_grad=False)
        held._is_hf_initialized = True  # so that the library does not make values up
        (module._buffers if is_buffer else module._parameters)[own] = held


def _place(name: str) -> str:
    """The part of a parameter's name that says which layer it is in."""
    match = _LAYER.match(name)
    return match[0] if match else ""


def _get(model: Any, name: str) -> torch.Tensor:
    parent, _, own = name.rpartition(".")
    values: torch.Tensor = getattr(model.get_submodule(parent), own)
    return values
