"""The matrices that a layer multiplies its activations by, and a recorder of what they are multiplied with."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        transposed: whether the parameter is stored as (n, rows).
    """

    name: str
    expert: int | None = None
    transposed: bool = False

    def of(self, layer: torch.nn.Module) -> torch.Tensor:
        """The values, (rows, n): a view of the layer's parameter."""
        parameter = layer.get_parameter(self.name).detach()
        return self.turned(parameter if self.expert is None else parameter[self.expert])

    def turned(self, values: torch.Tensor) -> torch.Tensor:
        """From the parameter's layout to (rows, n), or back: a view."""
        return values.mT if self.transposed else values

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
    """All parameters of a layer with two dimensions, and the matrices of those with three, as they are stored."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            yield Matrix(name)
        elif parameter.dim() == 3:
            yield from (Matrix(name, expert) for expert in range(len(parameter)))


class Product(NamedTuple):
    """A product of a matrix with activations.

    Attributes:
        inputs: (tokens, n).
        part: of the whole operation's output, or of its gradient, what belongs to this matrix: (tokens, rows).
    """

    matrix: Matrix
    inputs: torch.Tensor
    part: Callable[[torch.Tensor], torch.Tensor]


OnProduct = Callable[[Matrix, torch.Tensor], None]  # a matrix, and its inputs as (tokens, n)

# x times a matrix (n, rows): with the inputs as first operand, or as second after something to add
_MATMULS = {torch.matmul, torch.mm, torch.bmm} | {
    getattr(torch.Tensor, name) for name in ("matmul", "mm", "bmm", "__matmul__")
}
_ADDED = {torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm}

_Key = tuple[int, tuple[int, ...], tuple[int, ...]]


class Recorder(TorchFunctionMode):
    """Within its context, tells of the products of a layer's matrices. A matrix is known by its place in memory."""

    def __init__(self, layer: torch.nn.Module, matrices: Sequence[Matrix], on_product: OnProduct) -> None:
        super().__init__()
        self._matrices = {_key(matrix.of(layer)): matrix for matrix in matrices}
        self._stacks: dict[_Key, list[Matrix]] = defaultdict(list)  # of experts that one operation multiplies with
        for matrix in matrices:
            if matrix.expert is not None:
                self._stacks[_key(matrix.turned(layer.get_parameter(matrix.name).detach()))].append(matrix)
        self._on_product = on_product

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        products = list(self._products(func, (*args, *kwargs.values())))
        for product in products:
            self._on_product(product.matrix, product.inputs)
        out = func(*args, **kwargs)
        for product in products:
            self._after(product, out)
        return out

    def _products(self, func: Any, operands: Sequence[Any]) -> Iterator[Product]:
        if func is linear:
            inputs, weight = operands[:2]
        elif func in _MATMULS or func in _ADDED:
            inputs, weight = operands[1:3] if func in _ADDED else operands[:2]
            if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
                return
            weight = weight.detach().mT
        else:
            return
        key = _key(weight)
        if (matrix := self._matrices.get(key)) is not None:
            yield Product(matrix, _flat(inputs.detach()), _flat)
        elif (stack := self._stacks.get(key)) is not None and inputs.dim() == 3:
            for matrix in stack:
                assert matrix.expert is not None
                yield _of_expert(matrix, inputs.detach()[matrix.expert], matrix.expert)

    def _after(self, product: Product, out: torch.Tensor) -> None:
        """Called with what an operation that has a product in it puts out."""


def _of_expert(matrix: Matrix, inputs: torch.Tensor, expert: int) -> Product:
    """Of one expert in an operation over all of them: tokens that are not for it come as zeros."""
    mine = inputs.any(dim=-1)
    return Product(matrix, inputs[mine], lambda out: out[expert][mine])


def _key(values: torch.Tensor) -> _Key:
    return values.data_ptr(), tuple(values.shape), values.stride()


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])


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
