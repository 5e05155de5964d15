"""What the methods take on this machine, predicted from the shapes of the tensors, and which of them to take unasked.

The time is that of the large products, at the speed at which this machine multiplies, and that of the search for codes
and scales. `bench/effort.py` sets it beside the time that conversions take.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from tritconv.calibration import memory
from tritconv.calibration.context import least_memory
from tritconv.calibration.model import fast_precision
from tritconv.calibration.outputs import MOST_ROWS, n_with_gradients
from tritconv.methods import MethodName
from tritconv.methods.gptq.sensitivity import LOSS_TOKENS
from tritconv.plan import Plan
from tritconv.sources.source import Kind, Source

_AFFORDABLE = 3600.0  # seconds that may be spent unasked
_LADDER = (
    *((MethodName.GPTQ, n_tokens) for n_tokens in (262144, 131072, 65536, 32768, 16384)),
    *((MethodName.IMATRIX, n_tokens) for n_tokens in (32768, 8192)),
)
_OVERHEAD = 1.6  # the time of all that passes and solvers do, over that of their large products
_PER_WEIGHT = {MethodName.GPTQ: 4e-7, MethodName.IMATRIX: 1.2e-7, MethodName.SEARCH: 1.2e-7}  # seconds of a thread
_SWEEPS = 6  # times n^2 operations that gptq needs for each row: three sweeps of descent
_FEEDBACK = 3  # the same: feedback, and the weights to aim at
_PROBE = 1536  # rows and columns of the product that is timed
_TIMES = 3

_LAYER = re.compile(r"blk\.\d+\.")
_SAME_INPUTS = re.compile(r"attn_[kv]\.|ffn_up(_\w+)?\.")  # matrices whose inputs another one of the layer has too


@dataclass(frozen=True)
class Effort:
    """A method and what it takes. `n_tokens`: to calibrate on. `seconds`: predicted."""

    method: MethodName
    n_tokens: int
    seconds: float

    def __str__(self) -> str:
        on_text = f" on {self.n_tokens:,} tokens" if self.n_tokens else ""
        return f"{self.method.value}{on_text}: about {_duration(self.seconds)}"


@dataclass(frozen=True)
class _Matrices:
    """A tensor of a layer.

    Attributes:
        experts: the number of matrices in it.
        used: the number of them that a token comes to.
        has_own_inputs: whether no other tensor before it has the same inputs.
    """

    rows: int
    n: int
    experts: int
    used: int
    has_own_inputs: bool


@dataclass(frozen=True)
class _Work:
    """What there is to quantize.

    Attributes:
        matrices: the tensors of layers that become TRIT.
        head: weights of the output matrix, which has rows of `width`.
        outside: weights outside the layers that may become TRIT.
        loss_tokens: that losses are measured on, for the choice of types.
    """

    matrices: Sequence[_Matrices]
    head: int
    width: int
    outside: int
    loss_tokens: int

    @staticmethod
    def of(source: Source, plan: Plan) -> "_Work":
        """All of a source."""
        used = source.metadata.get(f"{source.architecture}.expert_used_count")
        matrices = []
        for tensor in source.tensors:
            if tensor.kind is Kind.MATRIX and plan.choice(tensor).depth is not None:
                experts = math.prod(tensor.shape[:-2])
                has_own_inputs = _SAME_INPUTS.match(_LAYER.sub("", tensor.name)) is None
                per_token = min(experts, int(used.value)) if used is not None else experts
                rows, n = tensor.shape[-2:]
                matrices.append(_Matrices(rows, n, experts, per_token, has_own_inputs))
        outside = [tensor for tensor in source.tensors if tensor.kind in (Kind.OUTPUT, Kind.EMBEDDING)]
        free = [tensor for tensor in outside if plan.is_free(tensor)]
        may_be_trit = [one for one in outside if plan.is_free(one) or plan.choice(one).depth is not None]
        return _Work(
            matrices,
            max((math.prod(tensor.shape) for tensor in outside), default=0),
            max((tensor.shape[-1] for tensor in outside), default=0),
            sum(math.prod(tensor.shape) for tensor in may_be_trit),
            LOSS_TOKENS if free else 0,
        )


def affordable(
    source: Source,
    plan: Plan,
    length: int,
    n_tokens: int,
    threads: int,
    *,
    calibrates: bool,
    method: MethodName | None = None,
) -> tuple[Effort, list[Effort]]:
    """The best method that this machine can afford, and the better ones that it can not.

    Args:
        length: tokens of a calibration sequence.
        n_tokens: to calibrate on, at most.
        calibrates: whether there must be a calibration: then the least one is taken, however long it takes.
        method: None leaves the choice; with a method, only the tokens are chosen, and `calibrates` is implied.
    """
    work, speed = _Work.of(source, plan), _speed()
    better: list[Effort] = []
    for one, tokens in _LADDER:
        if method is not None:
            is_possible = one is method
        else:
            is_possible = least_memory(source, length, squares=one is MethodName.GPTQ) <= memory.total()
        if is_possible:
            tokens = min(tokens, n_tokens)
            effort = Effort(one, tokens, _seconds(one, work, tokens, speed, threads))
            if effort.seconds <= _AFFORDABLE:
                return effort, better
            better.append(effort)
    if (calibrates or method is not None) and better:
        return better.pop(), better
    return Effort(MethodName.SEARCH, 0, _seconds(MethodName.SEARCH, work, 0, speed, threads)), better


def predicted(source: Source, plan: Plan, method: MethodName, n_tokens: int, threads: int) -> Effort:
    """What a method takes."""
    seconds = _seconds(method, _Work.of(source, plan), n_tokens, _speed(), threads)
    return Effort(method, n_tokens, seconds)


def _seconds(method: MethodName, work: _Work, n_tokens: int, speed: float, threads: int) -> float:
    """Predict. `speed`: operations a second."""
    matrices = work.matrices
    n_weights = sum(one.experts * one.rows * one.n for one in matrices)
    operations = 0
    if method is not MethodName.SEARCH:
        operations += 2 * n_tokens * sum(one.used * one.rows * one.n for one in matrices)
    if method is MethodName.GPTQ:
        operations += sum(_of_gptq(one, n_tokens, min(n_tokens, work.loss_tokens)) for one in matrices)
        operations += 6 * (n_with_gradients(n_tokens) + min(n_tokens, work.loss_tokens)) * work.head
        operations += (_SWEEPS + _FEEDBACK) * work.outside * work.width
        n_weights += work.outside
    return _OVERHEAD * operations / speed + _PER_WEIGHT[method] * n_weights / threads


def _of_gptq(one: _Matrices, n_tokens: int, loss_tokens: int) -> int:
    """Operations of gptq for a tensor, besides the full-precision pass."""
    some, row_block = n_with_gradients(n_tokens), min(one.rows, MOST_ROWS)
    # quantized; gradients: there and back, twice; the losses that choose types: there and back
    passes = (2 * n_tokens + 8 * some + 8 * loss_tokens) * one.used * one.rows * one.n
    solving = one.experts * one.rows * one.n * (_SWEEPS + _FEEDBACK) * one.n
    moments = 0
    if one.experts == 1:  # rows make up for each other, and are descended again
        solving += one.rows * one.n * (_SWEEPS * one.n + 2 * row_block)
        moments = some * one.rows * row_block
    if one.has_own_inputs:
        moments += 3 * n_tokens * one.used * one.n**2  # one triangle, and the cross-covariance
        solving += one.experts * one.n**3
    return passes + moments + solving


@cache
def _speed() -> float:
    """Operations a second of large products, in the type that calibrations multiply in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.ones(_PROBE, _PROBE, dtype=fast_precision(device), device=device)
    best = math.inf
    for _ in range(_TIMES):
        start = time.perf_counter()
        float((x @ x)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * _PROBE**3 / best


def _duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{round(seconds / 3600)} h"
