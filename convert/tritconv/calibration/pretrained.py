"""Loads a model of the transformers library without its weights, which are read from its files when they are needed.

No weight is made up, and none is rounded.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open

from tritconv.calibration.gguf_weights import GgufTensor, GgufWeights, replaced
from tritconv.calibration.parameters import Parameters
from tritconv.calibration.stored import FileTensor, OpenFile, Spill, Stored, in_safetensors
from tritconv.sources.foreign_code import check_attention, guard
from tritconv.sources.weights import find_weights
from tritcore.errors import TritError, first_line

# The types of weights in safetensors files that transformers can compute in, the wider ones narrowed.
_FLOATS = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_ROUNDED = 0.1  # of the weights: BF16 may hold the rest, where a few of them are wider

INSTEAD = "use --method search, or --imatrix"  # what goes without calibration


@dataclass(frozen=True)
class Pretrained:
    """A model and its tokenizer, both of the transformers library.

    Attributes:
        name: what errors call it.
        model: has its parameters on the meta device; buffers that no file holds have their values.
        parameters: reads the parameters.
    """

    name: str
    model: Any
    tokenizer: Any
    parameters: Parameters


def load(folder: Path, gguf_file: str | None = None) -> Pretrained:
    """Load a causal language model, or the model around one that takes images too.

    A missing output matrix is the embeddings, as in llama.cpp.

    Args:
        folder: a checkpoint that has been checked.
        gguf_file: a GGUF file in `folder` to load instead.

    Raises:
        TritError: transformers does not know the architecture, cannot load it, or lacks weights of it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    guard()
    from transformers import AutoConfig, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = str(folder if gguf_file is None else folder / gguf_file)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if gguf_file is None:
        options: dict[str, Any] = {"dtype": _dtype(folder)}
    else:
        source["gguf_file"] = gguf_file
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with _Deferred([] if gguf_file else find_weights(folder)) as deferred:
            config = AutoConfig.from_pretrained(**source)
            check_attention(config, name)
            auto_class = _class(config, name)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, info = auto_class.from_pretrained(**source, **options, output_loading_info=True)
    except TritError:
        raise
    except Exception as error:  # the library raises whatever its many authors chose
        raise TritError(f"{name}: transformers cannot load it to calibrate ({first_line(error)}): {INSTEAD}") from error
    assert deferred.parameters is not None
    _complete(model, info["missing_keys"], name)
    return Pretrained(name, model.eval(), tokenizer, deferred.parameters)


class _Deferred:
    """Within its context, the library's models get no weights.

    Attributes:
        parameters: reads those of the model that was loaded.
    """

    def __init__(self, files: Collection[Path]) -> None:
        """Find the tensors of a checkpoint's files."""
        self.parameters: Parameters | None = None
        self._stored: dict[str, Stored] = {}
        for path in files:
            if path.suffix == ".safetensors":
                self._stored |= in_safetensors(path)
        self._stack = ExitStack()

    def __enter__(self) -> "_Deferred":
        from transformers import modeling_gguf_pytorch_utils, modeling_utils

        # the library asks for both again and again, each time seconds of work
        for name in ("GGUFReader", "get_tensor_name_map"):
            self._stack.enter_context(replaced(gguf, name, cache(getattr(gguf, name))))

        self._convert = modeling_utils.convert_and_load_state_dict_in_model
        self._load_gguf = modeling_gguf_pytorch_utils.load_gguf_checkpoint
        # the only places where the library reads weights
        self._stack.enter_context(replaced(modeling_utils, "convert_and_load_state_dict_in_model", self._outline))
        self._stack.enter_context(replaced(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", self._read_gguf))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _outline(
        self, model: Any, state_dict: Mapping[str, Any], load_config: Any, disk_offload_index: Any = None
    ) -> tuple[Any, Any]:
        """In place of the function that puts tensors into a model."""
        config = replace(load_config)
        spill = Spill()
        tensors = {}
        header = getattr(config.hf_quantizer, "header", None)  # where the library reads a GGUF file lazily itself
        infos = {} if header is None else {info.name: info for info in header.tensors}
        file = None if header is None else OpenFile.of(Path(header.path))
        spill.check_space(sum(values.nbytes for values in state_dict.values() if isinstance(values, torch.Tensor)))
        for key, values in state_dict.items():
            if key in self._stored:
                tensors[key] = self._stored[key]
            elif isinstance(values, GgufTensor):
                tensors[key] = values
            elif header is not None and file is not None and key in infos:
                offset = header.data_start + infos[key].offset
                tensors[key] = FileTensor(file, offset, tuple(values.shape), _gguf_dtype(infos[key].ggml_type))
            else:
                tensors[key] = spill.add(values[...])
        self.parameters = Parameters(model, tensors, config, self._convert)
        return self.parameters.outline(), disk_offload_index

    def _read_gguf(
        self, path: str, return_tensors: bool = False, model_to_load: Any = None, torch_dtype: Any = None
    ) -> dict[str, Any]:
        """In place of the function that reads GGUF files."""
        if not return_tensors:
            found: dict[str, Any] = self._load_gguf(path)
            return found
        weights = GgufWeights(path, model_to_load, self._load_gguf, torch_dtype)
        return {"tensors": weights.state_dict()}


def _gguf_dtype(ggml_type: int) -> torch.dtype:
    """How the library wants data of a GGUF file: values, or blocks as bytes."""
    values = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    return values.get(GGMLQuantizationType(ggml_type), torch.uint8)


def _class(config: Any, name: str) -> Any:
    """The class of transformers that loads a model with such a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = config.model_type
    if config.is_encoder_decoder:
        raise TritError(f"{name}: calibration does not know encoder-decoder models ({kind}): {INSTEAD}")
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        own_code = getattr(config, "auto_map", None) or {}
        if type(config) in auto_class._model_mapping or auto_class.__name__ in own_code:
            return auto_class
    raise TritError(f"{name}: transformers has no language model for {kind} to calibrate: {INSTEAD}")


def _complete(model: Any, missing: Collection[str], name: str) -> None:
    """Tie a missing output matrix to the embeddings; no other weight may be missing."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise TritError(f"{name}: the model has no output matrix, so it is no language model: {INSTEAD}")
    named = dict(model.named_parameters(remove_duplicate=False))
    heads = {key for key in missing if named.get(key) is head.weight}
    if rest := sorted(set(missing) - heads):
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise TritError(
            f"{name}: the checkpoint lacks {rest[0]}{more}: calibration would run on random weights; "
            "download it again, or mend config.json"
        )
    if heads:
        head.weight = embeddings.weight


def _dtype(folder: Path) -> torch.dtype | str:
    """The type that holds the matrices of a checkpoint; "auto" where the files do not tell."""
    weights: Counter[torch.dtype] = Counter()
    for path in find_weights(folder):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                values = file.get_slice(key)
                if (shape := values.get_shape())[1:] and (dtype := _FLOATS.get(values.get_dtype())) is not None:
                    weights[dtype] += int(torch.Size(shape).numel())
    if not weights:
        return "auto"
    if weights[torch.bfloat16] >= (1 - _MOST_ROUNDED) * weights.total():
        return torch.bfloat16
    return next(iter(weights)) if len(weights) == 1 else torch.float32
