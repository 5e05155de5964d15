"""Quantized checkpoints: their values come back as an independent dequantization has them, or a line says why not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_bpe_tokenizer
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from tritconv.convert import Job, hf_to_gguf
from tritconv.plan import Plan, TypeRule
from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.mapped import open_checkpoint
from tritconv.sources.source import Kind, Source
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, torch.Tensor]  # tensors by the end of their names, and the weights that they stand for

# Matrices that llama.cpp's converter takes as they are, and their GGUF names
MATRICES = {
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down.weight",
    "model.layers.1.mlp.up_proj": "blk.1.ffn_up.weight",
    "model.layers.1.self_attn.v_proj": "blk.1.attn_v.weight",
}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be quantized."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def _configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _quantize(folder: Path, pack: Callable[[torch.Tensor], Packed]) -> Tensors:
    """Replace MATRICES by what `pack` makes of them. Returns the weights to expect, by GGUF name."""
    weights = load_file(folder / "model.safetensors")
    expected = {}
    for stem, name in MATRICES.items():
        tensors, expected[name] = pack(weights.pop(f"{stem}.weight").float())
        weights |= {f"{stem}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return expected


def _opened(folder: Path, pre: str | None = None) -> Source:
    return open_checkpoint(find_checkpoint(str(folder)), pre=pre)


def _check_values(folder: Path, expected: Tensors, pre: str | None = None) -> None:
    found = {tensor.name: tensor for tensor in _opened(folder, pre).tensors}
    for name, weights in expected.items():
        assert found[name].kind is Kind.MATRIX
        assert found[name].shape == tuple(weights.shape)
        np.testing.assert_allclose(found[name].load(), weights.numpy(), rtol=1e-6, atol=1e-9)


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(TritError) as caught:
        _opened(folder)
    (line,) = str(caught.value).splitlines()
    for word in (*words, "convert the original checkpoint"):
        assert word in line


def _pack_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (n, m) to int32 (n * bits / 32, m), the first in the lowest bits."""
    per_word = 32 // bits
    words = values.reshape(-1, per_word, values.shape[1]).to(torch.int64)
    shifted = words << (bits * torch.arange(per_word)).reshape(1, -1, 1)
    packed = shifted.sum(dim=1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _gptq(bits: int) -> Callable[[torch.Tensor], Packed]:
    def pack(weights: torch.Tensor) -> Packed:
        generator = torch.Generator().manual_seed(len(weights))
        n_out, n_in = weights.shape
        codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator)
        zeros = torch.randint(1, 2**bits, (n_in // 64, n_out), generator=generator)
        scales = torch.rand(n_in // 64, n_out, generator=generator).half()
        groups = torch.randperm(n_in, generator=generator) // 64  # as with desc_act
        tensors = {
            "qweight": _pack_int32(codes, bits),
            "qzeros": _pack_int32((zeros - 1).T, bits).T,
            "scales": scales,
            "g_idx": groups.to(torch.int32),
        }
        return tensors, ((codes - zeros[groups]) * scales[groups].float()).T

    return pack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("own_file", [False, True])
def test_gptq(own_file: bool, bits: int, folder: Path) -> None:
    settings = {"bits": bits, "group_size": 64, "desc_act": True, "sym": False}
    if own_file:  # as AutoGPTQ wrote it
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        _configure(folder, quantization_config={"quant_method": "gptq", **settings})
    _check_values(folder, _quantize(folder, _gptq(bits)))


def _fp8(weights: torch.Tensor) -> torch.Tensor:
    return (weights * 100).to(torch.float8_e4m3fn)


def _by_block(weights: torch.Tensor) -> Packed:
    n_out, n_in = weights.shape
    scales = torch.rand(-(-n_out // 128), -(-n_in // 128)) + 0.5
    codes = _fp8(weights)
    whole = scales.repeat_interleave(128, 0)[:n_out].repeat_interleave(128, 1)[:, :n_in]
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * whole


def test_fp8_by_blocks(folder: Path) -> None:
    _configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _check_values(folder, _quantize(folder, _by_block))


def _by_tensor(weights: torch.Tensor) -> Packed:
    codes, scale = _fp8(weights), torch.tensor([0.3])
    of_activations = {"input_scale": torch.tensor([2.0]), "output_scale": torch.tensor([3.0])}
    return {"weight": codes, "weight_scale": scale, **of_activations}, codes.float() * 0.3


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "activation_scheme": "static"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}},
        },
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
)
def test_fp8_by_tensor(settings: dict[str, Any], folder: Path) -> None:
    _configure(folder, quantization_config=settings)
    _check_values(folder, _quantize(folder, _by_tensor))


def test_modelopt_with_a_file_of_its_own(folder: Path) -> None:
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    _check_values(folder, _quantize(folder, _by_tensor))


def _by_row(dtype: torch.dtype) -> Callable[[torch.Tensor], Packed]:
    def pack(weights: torch.Tensor) -> Packed:
        codes, scales = (weights * 100).to(dtype), torch.rand(len(weights), 1) + 0.5
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales

    return pack


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(("form", "dtype"), [("float", torch.float8_e4m3fn), ("int", torch.int8)])
def test_compressed_tensors_by_row(form: str, dtype: torch.dtype, key: str, folder: Path) -> None:
    groups = {"group_0": {"weights": {"num_bits": 8, "type": form, "strategy": "channel"}}}
    settings = {"quant_method": "compressed-tensors", "format": f"{form}-quantized", "config_groups": groups}
    _configure(folder, **{key: settings})
    _check_values(folder, _quantize(folder, _by_row(dtype)))


def _packed_by_group(weights: torch.Tensor) -> Packed:
    n_out, n_in = weights.shape
    codes = torch.randint(0, 16, (n_out, n_in))
    scales = torch.rand(n_out, n_in // 64).to(torch.bfloat16)
    tensors = {
        "weight_packed": _pack_int32(codes.T, 4).T,
        "weight_scale": scales,
        "weight_shape": torch.tensor([n_out, n_in]),
    }
    return tensors, (codes - 8) * scales.float().repeat_interleave(64, 1)


def test_compressed_tensors_by_group(folder: Path) -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    _configure(folder, quantization_config=settings)
    _check_values(folder, _quantize(folder, _packed_by_group))


def _nvfp4(weights: torch.Tensor) -> Packed:
    n_out, n_in = weights.shape
    codes = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8)
    scales = (torch.rand(n_out, n_in // 16) + 0.5).to(torch.float8_e4m3fn)
    tensors = {
        "weight": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales,
        "weight_scale_2": torch.tensor(0.25),
        "input_scale": torch.tensor(3.0),
    }
    return tensors, FP4[codes.long()] * scales.float().repeat_interleave(16, 1) * 0.25


@pytest.mark.build
def test_nvfp4_becomes_plain_matrices(folder: Path) -> None:
    _configure(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    _check_values(folder, _quantize(folder, _nvfp4))
    assert not [t.name for t in _opened(folder).tensors if t.name.endswith("scale")]


def _mxfp4(n_experts: int, n_out: int, n_in: int) -> Packed:
    codes = torch.randint(0, 16, (n_experts, n_out, n_in // 32, 32), dtype=torch.uint8)
    scales = torch.randint(118, 124, (n_experts, n_out, n_in // 32), dtype=torch.uint8)
    tensors = {"blocks": codes[..., ::2] | codes[..., 1::2] << 4, "scales": scales}
    values = FP4[codes.long()] * 2.0 ** (scales.float() - 127).unsqueeze(-1)
    return tensors, values.reshape(n_experts, n_out, n_in)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A tiny gpt-oss with experts in MXFP4, as it is published, and the experts to expect."""
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("gpt-oss") / "model"
    torch.manual_seed(0)
    hidden, inner, n_experts = 192, 128, 4
    config = GptOssConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=n_experts,
        num_experts_per_tok=2,
        vocab_size=600,
        max_position_embeddings=256,
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_bpe_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    expected = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for name, n_out, n_in in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            del weights[f"{stem}.{name}"]
            tensors, values = _mxfp4(n_experts, n_out, n_in)
            weights |= {f"{stem}.{name}_{end}": tensor for end, tensor in tensors.items()}
            if name == "down_proj":
                expected[f"blk.{layer}.ffn_down_exps.weight"] = values
            else:
                expected[f"blk.{layer}.ffn_gate_exps.weight"] = values[:, ::2]
                expected[f"blk.{layer}.ffn_up_exps.weight"] = values[:, 1::2]
    (folder / "model.safetensors").unlink()
    # each half of a pair in a file of its own, as a large checkpoint may have them
    for number, part in enumerate(("_blocks", "")):
        names = [name for name in weights if name.endswith("_blocks") == bool(part)]
        shard = {name: weights[name].contiguous() for name in names}
        save_file(shard, folder / f"model-0000{number + 1}-of-00002.safetensors", {"format": "pt"})
    _configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]})
    return folder, expected


@pytest.mark.build
def test_mxfp4_experts_become_matrices(gpt_oss: tuple[Path, Tensors]) -> None:
    _check_values(*gpt_oss, pre="gpt-2")


def test_rules_reach_mxfp4_experts(gpt_oss: tuple[Path, Tensors]) -> None:
    tensors = _opened(gpt_oss[0], pre="gpt-2").tensors
    plan = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0).with_rules([TypeRule(re.compile("exps"), Type.TRIT3)], tensors)
    assert {tensor.name for tensor in tensors if plan.type_of(tensor) is Type.TRIT3} == gpt_oss[1].keys()


@pytest.mark.build
def test_mxfp4_experts_become_trit(gpt_oss: tuple[Path, Tensors], tmp_path: Path) -> None:
    plan = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)
    written = hf_to_gguf(str(gpt_oss[0]), None, Job(plan, tmp_path / "x.gguf", threads=1), pre="gpt-2")
    assert written is not None
    types = {tensor.name: tensor.type for tensor in read_model_file(written.path).tensors}
    assert {types[name] for name in gpt_oss[1]} == {Type.TRIT2}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "AWQ (4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes (4 bits)"),
        ({"_load_in_8bit": True, "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "eetq"}, "EETQ"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8"),
        ({"quant_method": "something-new"}, "something-new"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"g": {"weights": {}}}},
            "marlin",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "channel"}}},
            },
            "compressed-tensors (pack-quantized, 4 bits by channel)",
        ),
        ({"quant_method": "compressed-tensors"}, "'format' is missing"),
    ],
)
def test_schemes_that_nobody_dequantizes_are_named(settings: dict[str, Any], name: str, folder: Path) -> None:
    _configure(folder, quantization_config=settings)
    _refused(folder, name)


@pytest.mark.parametrize(
    ("file", "name"), [("quant_config.json", "AWQ (4 bits)"), ("quantize_config.json", "GPTQ (3 bits)")]
)
def test_schemes_that_another_file_names(file: str, name: str, folder: Path) -> None:
    _quantize(folder, _gptq(4))
    (folder / file).write_text(json.dumps({"bits": 3} if "GPTQ" in name else {"w_bit": 4}))
    _refused(folder, name)


@pytest.mark.parametrize("keys", [["quantization"], ["quantization", "quantization_config"]])
def test_mlx(keys: list[str], folder: Path) -> None:
    _configure(folder, **{key: {"group_size": 64, "bits": 4} for key in keys})
    _refused(folder, "MLX (4 bits)")


def test_types_of_numbers_that_the_converter_does_not_read(folder: Path) -> None:
    """As MLX has them in full."""
    _quantize(folder, lambda weights: ({"weight": torch.zeros(len(weights), 8, dtype=torch.uint32)}, weights))
    _refused(folder, "model.safetensors: tensor model.layers.0.mlp.down_proj.weight is U32")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_integers_without_scales(name: str, dtype: torch.dtype, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = (weights[name] * 100).to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _refused(folder, f"tensor {name} is {str(dtype).removeprefix('torch.')}", "config.json does not say how")


def test_a_matrix_without_its_scale(folder: Path) -> None:
    def pack(weights: torch.Tensor) -> Packed:
        tensors, values = _by_block(weights)
        return {"weight": tensors["weight"]}, values

    _configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _quantize(folder, pack)
    _refused(folder, "FP8", "has no scale")


def test_scales_that_the_config_does_not_explain(folder: Path) -> None:
    _quantize(folder, _by_row(torch.float8_e4m3fn))
    _refused(folder, "is quantized", "config.json does not say how")


def test_group_numbers_out_of_range(folder: Path) -> None:
    """Seen only when the values are read: still one line, with the tensor's name."""

    def pack(weights: torch.Tensor) -> Packed:
        tensors, values = _gptq(4)(weights)
        return tensors | {"g_idx": tensors["g_idx"] + 1000}, values

    _configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    _quantize(folder, pack)
    tensor = next(t for t in _opened(folder).tensors if t.name == "blk.0.ffn_down.weight")
    with pytest.raises(TritError, match=r"blk\.0\.ffn_down\.weight cannot be made of what the files hold"):
        tensor.load()


def test_other_types_of_numbers(checkpoint: Path, folder: Path) -> None:
    """float64 is rounded, large values stay what they are, and buffers that old versions stored are left out."""
    weights: Tensors = {name: w.double() for name, w in load_file(folder / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    weights["model.norm.weight"][7] = 1e6
    weights["model.embeddings.position_ids"] = torch.arange(256)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(32.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = {tensor.name: tensor.load() for tensor in _opened(folder).tensors}
    assert found["blk.1.ffn_up.weight"][3, 5] == found["output_norm.weight"][7] == np.float32(1e6)
    assert found.keys() == {tensor.name for tensor in _opened(checkpoint).tensors}
