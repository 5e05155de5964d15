"""What calibration reaches of a model: found out before the long work.

A rehearsal on a few tokens shows which matrices the layers multiply by, and whether layers that are run one by one do
what the model does. Then the rows of the GGUF tensors are looked up in these matrices, a layer at a time.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from tritconv.calibration.matrices import Matrix, Recorder, matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.pretrained import INSTEAD
from tritconv.calibration.rows import Place, RowIndex, RowMap
from tritconv.plan import Plan
from tritconv.sources.source import Kind, SourceTensor
from tritcore.errors import TritError, first_line
from tritcore.format import BLOCK_SIZE
from tritcore.gguf_types import DEPTH_OF_TYPE

_TEXTS = (
    "The rehearsal is short: two texts of a few words each.",
    "Every sentence should differ from all others; this one does so.",
)
_MOST_TOKENS = 16
_SAME = 1e-3  # the most that a layer's output may differ, relative to its norm
_SAME_LOGITS = 1e-2  # some models round to the type of the output matrix before they multiply by it
_MOST_NAMES = 6
_MOST_MISSED = 0.05  # of the layers' weights: what goes by the search without being an error

_LAYER = re.compile(r"\bblk\.(\d+)\.")
_NUMBERS = re.compile(r"\.\d+(?=\.)")

Used = Sequence[Sequence[Matrix]]  # of each layer, the matrices that it multiplies by


@dataclass(frozen=True)
class Reach:
    """Which tensors calibration reaches.

    Attributes:
        maps: where the rows of those that are reached come from, by tensor name.
        missed: those of the layers that should become TRIT and are not reached.
    """

    maps: Mapping[str, RowMap]
    missed: Sequence[SourceTensor]


def find_reach(model: LayeredModel, architecture: str, tensors: Sequence[SourceTensor], plan: Plan) -> Reach:
    """Rehearse, and trace the tensors. Those of the layers are loaded.

    Args:
        architecture: llama.cpp's name of it.
        tensors: of the GGUF file to write.
        plan: their types.

    Raises:
        TritError: the model's layers cannot be run one by one, or too much of them is missed.
    """
    wanted = [tensor for tensor in tensors if tensor.kind is Kind.MATRIX and plan.type_of(tensor) in DEPTH_OF_TYPE]
    maps = _trace(model, rehearse(model), architecture, wanted)
    missed = [tensor for tensor in wanted if tensor.name not in maps]
    _check(model, wanted, missed)
    return Reach(maps, missed)


def rehearse(model: LayeredModel) -> Used:
    """Run a few tokens through the model, and through its layers one by one.

    Raises:
        TritError: the layers need more than calibration gives them, or something is not finite.
    """
    try:
        first, second = _few_tokens(model)
        return _Rehearsal(model).run(first, second)
    except TritError:
        raise
    except Exception as error:  # the library raises whatever its many authors chose
        raise TritError(
            f"{model.name}: calibration cannot run its layers one by one ({first_line(error)}): {INSTEAD}"
        ) from error


def _few_tokens(model: LayeredModel) -> list[torch.Tensor]:
    """Two different sequences, int64 (1, length) each."""
    ids = [model.tokenizer(text).input_ids[:_MOST_TOKENS] for text in _TEXTS]
    length = min(map(len, ids))
    if not length:
        raise TritError(f"{model.name}: its tokenizer makes no tokens of English text: {INSTEAD}")
    return [torch.tensor([some[:length]], dtype=torch.int64) for some in ids]


class _Rehearsal:
    """Whether layers with the side inputs of one sequence do with another what they do within the model."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model
        self._used: list[list[Matrix]] = []
        self._out = torch.empty(0)

    def run(self, first: torch.Tensor, second: torch.Tensor) -> Used:
        """Take the side inputs of the first sequence, and compare on the second."""
        if self._model.embed(first).dim() != 3:
            raise self._unknown("the first layer")
        logits = self._model.walk(second, self._visit)
        self._model.check_finite(logits, "the model predicts")
        with torch.no_grad():
            again = self._model.logits(self._out)
            if not _same(again, logits, _SAME_LOGITS):
                raise self._unknown("the output matrix")
            self._model.check_chunks(self._out, again)
        return self._used

    def _visit(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor, out: torch.Tensor) -> None:
        found: set[Matrix] = set()
        candidates = [turned for matrix in matrices_of(layer) for turned in (matrix, replace(matrix, transposed=True))]
        candidates = [matrix for matrix in candidates if matrix.of(layer).shape[1] % BLOCK_SIZE == 0]
        with Recorder(layer, candidates, lambda matrix, _: found.add(matrix)):
            again = self._model.run(index, layer, hidden)
        self._model.check_finite(out, f"layer {index} puts out")
        together = self._model.run(
            index, layer, torch.cat([hidden, hidden])
        )  # side inputs may be of one sequence alone
        if not (_same(again, out, _SAME) and _same(together, torch.cat([out, out]), _SAME)):
            raise self._unknown(f"layer {index}")
        kinds = {(matrix.kind, matrix.transposed) for matrix in found if matrix.is_expert}
        self._used.append([m for m in candidates if m in found or (m.kind, m.transposed) in kinds])
        self._out = again.cpu()

    def _unknown(self, what: str) -> TritError:
        return TritError(
            f"{self._model.name}: {what} of this model takes more than hidden states and positions, such as inputs of "
            f"its own for each token, which calibration does not know: {INSTEAD}"
        )


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


class GgufNames:
    """llama.cpp's names of parameters of a model's layers."""

    def __init__(self, model: LayeredModel, architecture: str) -> None:
        self._model = model
        known = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
        self._names = None if known is None else get_tensor_name_map(known, model.n_layers)

    def of(self, layer: int, parameter: str) -> str | None:
        """Of a layer's parameter, experts without their numbers; None where llama.cpp has none of its own."""
        if self._names is None:
            return None
        full = self._model.full_name(layer, _NUMBERS.sub("", parameter)).replace("language_model.", "")
        return self._names.get_name(full, try_suffixes=(".weight",))


def _trace(model: LayeredModel, used: Used, architecture: str, tensors: Sequence[SourceTensor]) -> dict[str, RowMap]:
    names = GgufNames(model, architecture)
    found = {}
    for number in range(model.n_layers):
        layer = model.stored_copy(number)
        index = RowIndex({(number, matrix): matrix.of(layer) for matrix in used[number]})
        likely: dict[str | None, list[Place]] = defaultdict(list)
        for matrix in used[number]:
            likely[names.of(number, matrix.name)].append((number, matrix))
        for tensor in tensors:
            if _layer_of(tensor) == number:
                rows = index.find(tensor.load(), likely[tensor.name])
                if rows is not None:
                    found[tensor.name] = rows
    return found


def _check(model: LayeredModel, wanted: Sequence[SourceTensor], missed: Sequence[SourceTensor]) -> None:
    """Raise TritError if what is missed is more than a few matrices: a whole kind, or many weights."""
    within = {tensor.name for tensor in wanted if _layer_of(tensor) < model.n_layers}  # others predict further ahead
    missed_kinds = {_kind(tensor) for tensor in missed if tensor.name in within}
    reached = {tensor.name for tensor in wanted} - {tensor.name for tensor in missed}
    whole = missed_kinds - {_kind(tensor) for tensor in wanted if tensor.name in reached}
    share = _weights(missed) / max(_weights(wanted), 1)
    if not wanted or not (whole or share > _MOST_MISSED):
        return
    kinds = sorted(whole or {_kind(tensor) for tensor in missed})
    names = ", ".join(kinds[:_MOST_NAMES]) + (", .." if len(kinds) > _MOST_NAMES else "")
    instead = f"; or keep them with --tensor-depth '({'|'.join(kinds)})=q8_0'" if share < 0.5 else ""
    raise TritError(
        f"{model.name}: calibration does not reach {names} ({share:.0%} of the layers' weights), as transformers "
        f"multiplies by other rows than llama.cpp does: {INSTEAD}{instead}"
    )


def _weights(tensors: Sequence[SourceTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _kind(tensor: SourceTensor) -> str:
    """What a tensor is for in its layer: attn_q, ffn_down."""
    return _LAYER.sub("", tensor.name).removesuffix(".weight")


def _layer_of(tensor: SourceTensor) -> int:
    """The number of a tensor's layer."""
    found = _LAYER.search(tensor.name)
    assert found is not None, "matrices outside the layers are of another kind"
    return int(found[1])
