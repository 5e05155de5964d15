"""The matrices that a layer multiplies its activations by, and a recorder of what they are multiplied with."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer: a parameter, or one expert's share of it.

    Attributes:
        name: of the parameter, within the layer.
        expert: its place in a parameter that holds the matrices of several experts, or None.
    """

    name: str
    expert: int | None = None

    def of(self, layer: torch.nn.Module) -> torch.Tensor:
        """The values, (rows, n): a view of the layer's parameter."""
        parameter = layer.get_parameter(self.name).detach()
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def kind(self) -> str:
        """The name without the numbers of experts: the same for all experts of a layer."""
        return _NUMBER.sub("*", self.name)

    @property
    def is_expert(self) -> bool:
        """Whether only some of the tokens come to it."""
        return self.expert is not None or self.kind != self.name

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


def matrices_of(layer: torch.nn.Module) -> Iterator[Matrix]:
    """All parameters of a layer with two dimensions, and the matrices of those with three."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            yield Matrix(name)
        elif parameter.dim() == 3:
            yield from (Matrix(name, expert) for expert in range(len(parameter)))


OnProduct = Callable[[Matrix, torch.Tensor], None]  # a matrix, and its inputs as (tokens, n)


class Recorder(TorchFunctionMode):
    """Within its context, tells of the products of a layer's matrices. A matrix is known by its place in memory."""

    def __init__(self, layer: torch.nn.Module, matrices: Sequence[Matrix], on_product: OnProduct) -> None:
        super().__init__()
        self._matrices = {matrix.of(layer).data_ptr(): matrix for matrix in matrices}
        self._on_product = on_product

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            inputs, weight = (*args, *kwargs.values())[:2]
            matrix = self._matrices.get(weight.data_ptr())
            if matrix is not None:
                self._on_product(matrix, inputs.detach().reshape(-1, inputs.shape[-1]))
        return func(*args, **kwargs)


def stages(layer: torch.nn.Module, matrices: Sequence[Matrix], run: Callable[[], object]) -> list[list[Matrix]]:
    """The matrices in the order of their use, those with the same input together.

    The experts of a layer form one stage for each of their parameters. Matrices that `run` does not use are left out.

    Args:
        run: puts some text through the layer.
    """
    found: dict[object, list[Matrix]] = {}
    alive = []  # keeps inputs from being freed: they are known by their place in memory

    def on_product(matrix: Matrix, x: torch.Tensor) -> None:
        alive.append(x)
        members = found.setdefault(matrix.kind if matrix.is_expert else x.data_ptr(), [])
        if matrix not in members:
            members.append(matrix)

    with Recorder(layer, matrices, on_product):
        run()
    for members in found.values():  # experts that this text did not reach go with the others
        kinds = {member.kind for member in members if member.is_expert}
        members += [matrix for matrix in matrices if matrix.kind in kinds and matrix not in members]
    return list(found.values())
