"""Runs code of a model whose parameters are on the meta device: each operation is lent the values that it needs.

An embedding is lent the rows that its tokens need; the output matrix is lent a range of its rows at a time. So no
matrix of the size of the vocabulary is ever in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from tritconv.calibration.parameters import Parameters

_KEPT_BYTES = 1 << 22  # values as large as this at most stay in memory: norms, biases
_CHUNK_BYTES = 1 << 27  # of a large matrix, in float32

_DEVICE = torch.Tensor.device.__get__

ReadRows = Callable[[Sequence[int]], torch.Tensor]


class Lender(TorchFunctionMode):
    """Within its context, operations get float32 values for parameters on the meta device.

    Attributes:
        rows: the rows of the output matrix that are multiplied by; None for all of them.
        head_inputs: what the output matrix was multiplied by last.
        embeddings: what reads rows of the token embeddings, float32; None reads those of the checkpoint.
        outputs: the same for the output matrix.
    """

    def __init__(
        self, parameters: Parameters, names: Mapping[torch.Tensor, str], head: torch.Tensor, embedding: torch.Tensor
    ) -> None:
        """Prepare.

        Args:
            names: of parameters on the meta device.
            head: the output matrix.
            embedding: the token embeddings.
        """
        super().__init__()
        self._parameters = parameters
        self._names = {id(parameter): name for parameter, name in names.items()}
        self._held = list(names)  # so that nothing else gets one of these numbers
        self._kept: dict[str, torch.Tensor] = {}
        self._head = id(head)
        self._token_embeddings = id(embedding)
        self.rows: range | None = None
        self.head_inputs: torch.Tensor | None = None
        self.embeddings: ReadRows | None = None
        self.outputs: ReadRows | None = None
        self._open: torch.Tensor | None = None  # those rows

    def add(self, parameter: torch.Tensor, name: str, is_head: bool) -> None:
        """Know another parameter."""
        self._names[id(parameter)] = name
        self._held.append(parameter)
        if is_head:
            self._head = id(parameter)

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """The name of a parameter on the meta device; None if it is not known."""
        return self._names.get(id(parameter))

    @contextmanager
    def only(self, rows: range) -> Iterator[None]:
        """Within this context, the output matrix has these rows only, which stay in memory."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows, self._open = None, None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("__get__", "__set__"):  # what a tensor is, not its values
            out = func(*args, **kwargs)
            return torch.device("cpu") if func == _DEVICE and out.type == "meta" else out
        if func is embedding and self._knows(weight := _argument(args, kwargs, 1, "weight")):
            if _argument(args, kwargs, 3, "max_norm") is None:
                return self._embedding(weight, _argument(args, kwargs, 0, "input"))
        elif func is linear and id(weight := _argument(args, kwargs, 1, "weight")) == self._head:
            return self._product(weight, _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 2, "bias"))
        return func(*map(self._lend, args), **{key: self._lend(value) for key, value in kwargs.items()})

    def _knows(self, value: Any) -> bool:
        return id(value) in self._names

    def _lend(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._values(self._names[id(value)]) if self._knows(value) else value
        if type(value) in (list, tuple):
            return type(value)(map(self._lend, value))
        return value

    def _values(self, name: str) -> torch.Tensor:
        """A parameter's values, float32."""
        if (kept := self._kept.get(name)) is not None:
            return kept
        ((_, values),) = self._parameters.read([name])
        values = values.float()
        if values.nbytes <= _KEPT_BYTES:
            self._kept[name] = values
        return values

    def _embedding(self, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The rows of a matrix."""
        needed, places = ids.unique(return_inverse=True)
        if self.embeddings is not None and id(weight) == self._token_embeddings:
            return embedding(places, self.embeddings(needed.tolist()))
        rows = self._parameters.rows(self._names[id(weight)], needed.tolist()).float()
        return embedding(places, rows)

    def _product(self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with the output matrix, or with some of its rows."""
        bias = self._lend(bias)
        self.head_inputs = x.detach()
        if self.rows is not None:
            if self._open is None:
                self._open = self._rows(weight, self.rows)
            return linear(x, self._open, None if bias is None else bias[self.rows.start : self.rows.stop])
        parts = []
        for start in range(0, weight.shape[0], rows_of_chunk(weight.shape[1])):
            part = range(start, min(start + rows_of_chunk(weight.shape[1]), weight.shape[0]))
            parts.append(linear(x, self._rows(weight, part), None if bias is None else bias[start : part.stop]))
        return torch.cat(parts, dim=-1)

    def _rows(self, weight: torch.Tensor, rows: range) -> torch.Tensor:
        """Rows of the output matrix, in the type to multiply in where that is the type of the files."""
        if self.outputs is not None:
            return self.outputs(rows)
        name = self._names.get(id(weight))
        values = weight[rows.start : rows.stop] if name is None else self._parameters.rows(name, rows)
        return values if torch.is_autocast_enabled("cpu") else values.float()


def rows_of_chunk(width: int) -> int:
    """How many rows of a matrix, each of so many values, are in memory at a time."""
    return max(1, _CHUNK_BYTES // (4 * width))


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)
