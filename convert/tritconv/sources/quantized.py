"""Checkpoints that are quantized already: by which scheme, as llama.cpp's converter wants to be told."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tritcore.errors import TritError

_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}

# Where else than under "quantization_config" a checkpoint may say how it is quantized. The method, if it is not named.
_OTHER_KEYS = {"compression_config": "compressed-tensors", "quantization": "MLX"}
_OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

# How the names of tensors end that only quantized checkpoints have
_SUFFIXES = (
    *(".qweight", ".qzeros", ".g_idx", ".scales", ".biases"),
    *(".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format"),
    *("_scale", "_scale_inv", "_scale_2", "_packed", "_zero_point", "_shape", "_global_scale"),
    *("_blocks", "_scales", ".codes", ".codebooks", ".W_q", ".meta", ".indices", ".res_indices"),
)

# of activations and caches, which are no part of the weights
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".input_zero_point")


def settings_of(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """How a checkpoint says it is quantized, as `quantization_config` of transformers has it; None if it does not.

    Raises:
        TritError: a file of such settings is damaged.
    """
    settings = config.get("quantization_config")
    method = None
    for key, its_method in _OTHER_KEYS.items():
        if not settings and isinstance(config.get(key), dict):
            settings, method = config[key], its_method
    for name, its_method in _OTHER_FILES.items():
        if not settings and (folder / name).is_file():
            settings, method = _read(folder / name), its_method
            if isinstance(settings, dict) and isinstance(settings.get("quantization"), dict):
                settings = settings["quantization"]  # as ModelOpt nests it
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise TritError(f"{folder / 'config.json'}: quantization_config is no object with the settings of a scheme")
    settings = dict(settings)
    if "quant_method" not in settings:
        settings["quant_method"] = method or _guess(settings, config)
    return settings


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TritError(f"{path} is not valid JSON: {error}") from error


def _guess(settings: dict[str, Any], config: dict[str, Any]) -> str:
    for key, method in _OTHER_KEYS.items():
        if config.get(key) == settings:  # said twice, as MLX does
            return method
    if "config_groups" in settings:
        return "compressed-tensors"
    if "quant_algo" in settings:
        return "modelopt"
    return "bitsandbytes" if any("load_in_" in key for key in settings) else "a scheme without a name"


def scheme(settings: dict[str, Any]) -> str:
    """The name of a scheme, with what tells its variants apart."""
    method = str(settings.get("quant_method"))
    groups = settings.get("config_groups")
    details: list[object] = [settings.get("format"), settings.get("quant_algo")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            details += [f"{weights.get('num_bits')} bits by {weights.get('strategy')}"]
    for key in ("bits", "w_bit"):
        if isinstance(settings.get(key), int):
            details.append(f"{settings[key]} bits")
    if settings.get("load_in_4bit"):
        details.append("4 bits")
    if settings.get("load_in_8bit"):
        details.append("8 bits")
    shown = ", ".join(str(detail) for detail in dict.fromkeys(details) if detail)
    return _NAMES.get(method, method) + (f" ({shown})" if shown else "")


def refusal(where: object, settings: dict[str, Any], why: str = "") -> TritError:
    """The error for a checkpoint that cannot be dequantized."""
    return TritError(
        f"{where} is quantized with {scheme(settings)}, which llama.cpp's converter cannot dequantize"
        f"{f' ({why})' if why else ''}: convert the original checkpoint, which this one was made from"
    )


def for_upstream(settings: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What llama.cpp's converter understands, of a scheme that it knows by another name.

    Args:
        settings: of the scheme.
        names: of all tensors.

    Returns:
        Settings, and new names for tensors.
    """
    renamed = {}
    if settings["quant_method"] == "fp8" and not any(name.endswith("_scale_inv") for name in names):
        # a scale by either name is what the weights are multiplied by
        renamed = {name: f"{name}_inv" for name in names if name.endswith(".weight_scale")}
    groups = settings.get("config_groups")
    if settings["quant_method"] == "compressed-tensors" and isinstance(groups, dict):
        # one scale for a whole tensor is broadcast as one scale for each row is
        settings = settings | {"config_groups": {name: _by_channel(group) for name, group in groups.items()}}
    return settings, renamed


def _by_channel(group: Any) -> Any:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("strategy") != "tensor":
        return group
    return group | {"weights": weights | {"strategy": "channel"}}


def of_activations(names: Iterable[str]) -> list[str]:
    """The tensors that scale activations or caches."""
    return [name for name in names if name.endswith(_OF_ACTIVATIONS)]


def is_of_scheme(name: str) -> bool:
    """Whether only a quantized checkpoint has a tensor of such a name."""
    return name.endswith(_SUFFIXES)
