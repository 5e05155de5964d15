"""What calibration reaches of a model, and that it says so before it works. No compiled llama.cpp is needed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import VOCABULARY, make_bpe_tokenizer, write_sentencepiece
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from tritconv.calibration import model as model_module
from tritconv.calibration.context import CalibrationOptions, prepare
from tritconv.calibration.documents import Document
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.moments import Moments
from tritconv.calibration.reach import Reach, find_reach
from tritconv.calibration.rows import RowIndex, RowMap
from tritconv.calibration.text import TextOptions
from tritconv.convert import Job, hf_to_gguf
from tritconv.methods import Finished, MethodName
from tritconv.methods.gptq import Gptq
from tritconv.methods.gptq import layers as layerwise
from tritconv.methods.gptq.columns import ColumnLoop
from tritconv.methods.gptq.matrix import Solver
from tritconv.methods.tune import Tune, TuneOptions
from tritconv.plan import Plan
from tritconv.sources.mapped import open_checkpoint
from tritconv.sources.source import Kind, Source, SourceTensor
from tritconv.workers import Workers
from tritcore.codec import pack
from tritcore.errors import TritError
from tritcore.gguf_types import TRIT_TYPE

N_LAYERS = 2
PLAN = Plan(2, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Phi": {},
    "Phi3": {},
    "StableLm": {},
    "Starcoder2": {},
    "Falcon": {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "Llama4": {"num_local_experts": 4, "head_dim": 32, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
    "Llava": {
        "text_config": transformers.LlamaConfig(**_COMMON),
        "vision_config": transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            num_hidden_layers=N_LAYERS,
        ),
        "image_token_index": 5,
    },
    "Bloom": {},
    "GPT2": {"tie_word_embeddings": True, "n_ctx": 256},
    "Gemma3n": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * N_LAYERS,
        "activation_sparsity_pattern": [0.0] * N_LAYERS,
        "head_dim": 32,
        "laurel_rank": 64,
    },
}
_MODEL = {"GPT2": "GPT2LMHeadModel", "Llava": "LlavaForConditionalGeneration"}
_CONFIG = {"Llama4": "Llama4TextConfig", "Gemma3n": "Gemma3nTextConfig"}


def make(folder: Path, architecture: str = "Llama", dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """A checkpoint of random weights."""
    config = getattr(transformers, _CONFIG.get(architecture, f"{architecture}Config"))(
        **(_SPECIFIC[architecture] if architecture == "Llava" else _COMMON | _SPECIFIC[architecture]) | changes
    )
    torch.manual_seed(0)
    model = getattr(transformers, _MODEL.get(architecture, f"{architecture}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.08 + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(folder)
    if architecture == "Phi3":
        write_sentencepiece(folder)
    else:
        make_bpe_tokenizer(folder)
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Change the configuration, in place."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests copy before they change it."""
    return make(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def plain(llama: Path) -> Mapping[str, RowMap]:
    """Where its rows are, none of them like another."""
    return trace(llama).reach.maps


@dataclass
class Traced:
    """A checkpoint as calibration sees it."""

    model: LayeredModel
    architecture: str
    tensors: Sequence[SourceTensor]
    reach: Reach


def opened(folder: Path) -> Source:
    """As llama.cpp's converter maps it."""
    return open_checkpoint(folder, pre="gpt-2" if (folder / "tokenizer.json").is_file() else None)


def trace(folder: Path) -> Traced:
    source = opened(folder)
    model = LayeredModel(folder)
    return Traced(
        model, source.architecture, source.tensors, find_reach(model, source.architecture, source.tensors, PLAN)
    )


def check_rows(traced: Traced, folder: Path, rtol: float = 0) -> None:
    """All rows that were found are those of the tensors."""
    layers = [traced.model.stored_copy(index) for index in range(N_LAYERS)]
    tensors = {tensor.name: tensor for tensor in opened(folder).tensors}
    for name, rows in traced.reach.maps.items():
        assert rows.row.dtype == rows.place.dtype == np.int32
        parts = {place: place[1].of(layers[place[0]]).float().numpy() for place in rows.places}
        values = tensors[name].load().astype(np.float32)
        np.testing.assert_allclose(rows.gather(parts), values.reshape(-1, values.shape[-1]), rtol=rtol)


@pytest.mark.parametrize("architecture", ["Llama", "Phi3", "Falcon", "Llava"])
def test_all_matrices_are_reached(architecture: str, tmp_path: Path) -> None:
    traced = trace(make(tmp_path / "model", architecture))
    matrices = [tensor.name for tensor in traced.tensors if tensor.kind is Kind.MATRIX]
    assert set(traced.reach.maps) == set(matrices)
    assert len(matrices) >= 4 * N_LAYERS
    check_rows(traced, tmp_path / "model")


@pytest.mark.parametrize(
    ("stored", "said"), [(torch.float32, "bfloat16"), (torch.float16, "bfloat16"), (torch.bfloat16, "float32")]
)
def test_the_type_of_the_files_counts(stored: torch.dtype, said: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", dtype=stored)
    change(folder, dtype=said, torch_dtype=said)
    traced = trace(folder)
    assert not traced.reach.missed
    assert next(traced.model.layers[0].parameters()).dtype is stored
    check_rows(traced, folder)


@pytest.mark.parametrize("wide", ["q_proj", "mlp"])
def test_files_of_several_types(wide: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", dtype=torch.bfloat16)
    mixed = {
        name: values.float() * (1 + 2**-12) if wide in name else values for name, values in weights_of(folder).items()
    }
    save(folder, mixed)
    traced = trace(folder)
    assert not traced.reach.missed
    check_rows(traced, folder, rtol=2**-8)


def test_weights_that_are_quantized_already(tmp_path: Path) -> None:
    """In FP8, which both transformers and llama.cpp's converter dequantize."""
    folder = make(tmp_path / "model", dtype=torch.bfloat16)
    stored = {}
    for name, values in weights_of(folder).items():
        if "proj" in name:
            tiles = values.float().view(len(values) // 32, 32, -1, 32)
            scales = tiles.abs().amax(dim=(1, 3)) / 448
            stored[f"{name}_scale_inv"] = scales
            values = (tiles / scales[:, None, :, None]).view(values.shape).to(torch.float8_e4m3fn)
        stored[name] = values
    save(folder, stored)
    scheme = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}
    change(folder, quantization_config=scheme)
    traced = trace(folder)
    assert not traced.reach.missed
    check_rows(traced, folder, rtol=2**-8)


def zero_some_rows(weights: dict[str, torch.Tensor]) -> None:
    """Pruned neurons in all matrices, and an attention head; one row twice in a matrix, one in two matrices."""
    for name, values in weights.items():
        if values.dim() == 2 and "layers" in name:
            values[5] = 0
            values[40:44] = 0
            values[9] = values[11]
    attention = "model.layers.1.self_attn."
    weights[attention + "q_proj.weight"][:32] = 0
    weights[attention + "v_proj.weight"][3] = weights[attention + "k_proj.weight"][20]


def zero_a_layer(weights: dict[str, torch.Tensor]) -> None:
    """A block as LLaMA-Pro adds them: what goes back into the stream is zero."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()


def repeat_a_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        if ".1." in name:
            weights[name] = weights[name.replace(".1.", ".0.")].clone()


def repeat_a_matrix(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.v_proj.weight"] = weights["model.layers.0.self_attn.o_proj.weight"].clone()


@pytest.mark.parametrize("spoil", [zero_some_rows, zero_a_layer, repeat_a_layer, repeat_a_matrix])
def test_rows_that_are_alike(spoil: Any, llama: Path, plain: Mapping[str, RowMap], tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    weights = weights_of(folder)
    spoil(weights)
    save(folder, weights)
    traced = trace(folder)
    assert not traced.reach.missed
    for name, rows in traced.reach.maps.items():
        assert rows.places == plain[name].places, name
        assert (rows.row == plain[name].row).all(), name


def test_experts_that_are_alike(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "GptOss")
    weights = weights_of(folder)
    plain = trace(folder).reach.maps
    for name, values in weights.items():
        if "experts" in name and values.dim() == 3:
            values[2] = values[1]
            values[3] = 0
            values[0, :, 7] = 0
    save(folder, weights)
    for name, rows in trace(folder).reach.maps.items():
        assert (
            np.array([rows.places[i][1].expert or 0 for i in rows.place])
            == np.array([plain[name].places[i][1].expert or 0 for i in plain[name].place])
        ).all(), name
        if "exps" in name:
            n = len(rows.row) // 4
            assert (rows.row[: 3 * n] == plain[name].row[: 3 * n]).all(), name


def test_rows_go_on_as_the_rows_around_them() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 64)).astype(np.float32)
    other = rng.standard_normal((64, 64)).astype(np.float32)
    order = np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()  # as llama.cpp permutes heads
    weights[[0, 3, 17, 18, 40]] = 0
    other[[1, 2, 50]] = 0
    places = [(0, Matrix("a")), (0, Matrix("b"))]
    index = RowIndex({places[0]: torch.from_numpy(other), places[1]: torch.from_numpy(weights)})
    found = index.find(weights[order])
    assert found is not None
    assert found.places == [places[1]]
    assert (found.row == order).all()


def head_of(model: LayeredModel) -> torch.Tensor:
    """The output matrix that a model predicts with, float32 (vocabulary, width)."""
    model._precision = torch.float32
    weights: torch.Tensor = model.whole_copy().lm_head.weight
    return weights


def test_a_head_that_is_missing_is_the_embeddings(llama: Path, tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    weights = weights_of(folder)
    del weights["lm_head.weight"]
    save(folder, weights)
    model = LayeredModel(folder)
    assert torch.equal(head_of(model), weights["model.embed_tokens.weight"].float())


def test_a_head_beside_tied_embeddings_is_the_one_of_the_file(llama: Path, tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    change(folder, tie_word_embeddings=True)
    head = weights_of(folder)["lm_head.weight"]
    model = LayeredModel(folder)
    model.head_is(head.float())
    assert torch.equal(head_of(model), head.float())
    embeddings = weights_of(folder)["model.embed_tokens.weight"].float()
    assert torch.equal(model.embed(torch.arange(VOCABULARY)[None, :64])[0], embeddings[:64])


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_missing_weights_are_an_error(name: str, llama: Path, tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    weights = weights_of(folder)
    del weights[name]
    save(folder, weights)
    with pytest.raises(TritError, match=f"lacks {name}"):
        LayeredModel(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_values_that_are_not_finite(name: str, llama: Path, tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    weights = weights_of(folder)
    weights[name].view(-1)[7] = torch.nan
    save(folder, weights)
    with pytest.raises(TritError, match="NaN or infinite"):
        trace(folder)


@dataclass(frozen=True)
class Calibrated:
    """What a calibrated method has made of a checkpoint."""

    finished: list[Finished]
    name: str
    remarks: list[str]

    @property
    def exceptions(self) -> list[str]:
        """NAME=METHOD for each tensor whose blocks were not all made by the method."""
        return [f"{one.tensor.name}={one.method}" for one in self.finished if one.method not in ("", self.name)]


def calibrated(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, training: TuneOptions | None = None
) -> Calibrated:
    """A checkpoint, quantized on a short text."""
    monkeypatch.setenv("TRITCONV_CACHE", str(cache))
    source = opened(folder)
    text = TextOptions([Document(topics.topics["formatstrings"][:4000], "text")], ("text",), 512, 64)
    context = prepare(source, PLAN, CalibrationOptions(text, holds_out=training is not None))
    method = Gptq(context, print) if training is None else Tune(context, training, print)
    with Workers(1) as workers:
        finished = list(method.run(source, PLAN, workers))
    assert [one.tensor.name for one in finished] == [tensor.name for tensor in source.tensors]
    assert {one.method for one in finished} <= {"", *method.methods}
    return Calibrated(finished, method.name, method.remarks())


def check_near(found: Calibrated) -> None:
    """All matrices come out near what they were: no row stands in another's place."""
    for one in found.finished:
        if one.tensor.kind is Kind.MATRIX:
            assert one.blocks is not None, one.reason
            decoded = quants.dequantize(one.blocks, TRIT_TYPE[2])
            assert np.corrcoef(decoded.ravel(), one.values.astype(np.float32).ravel())[0, 1] > 0.9, one.tensor.name


@pytest.mark.build
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("GPT2", torch.float32),
        ("GPT2", torch.bfloat16),
        ("Phi", torch.bfloat16),
        ("StableLm", torch.float32),
        ("Starcoder2", torch.bfloat16),
    ],
)
def test_layer_norms_in_half_precision(
    architecture: str, precision: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "fast_precision", lambda _: precision)
    folder = make(tmp_path / "model", architecture, torch.bfloat16 if precision is torch.float32 else torch.float16)
    calibration = calibrated(folder, tmp_path / "cache", monkeypatch)
    assert calibration.exceptions == []
    check_near(calibration)


@pytest.mark.build
@pytest.mark.parametrize("architecture", ["GptOss", "Llama4"])
def test_experts_in_one_parameter(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_LEAST_TOKENS", 32)
    folder = make(tmp_path / "model", architecture)
    first = calibrated(folder, tmp_path / "cache", monkeypatch)
    check_near(first)
    assert not any("attn" in one or one[-7:] == "=search" for one in first.exceptions)


@pytest.mark.build
def test_exceptions_and_remarks_are_the_same_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "GptOss")
    first, second = (calibrated(folder, tmp_path / "cache", monkeypatch) for _ in range(2))
    experts = [
        f"blk.{i}.ffn_{kind}_exps.weight=gptq,search" for i in range(N_LAYERS) for kind in ("down", "gate", "up")
    ]
    assert sorted(first.exceptions) == experts, "few tokens come to some of the experts"
    assert first.remarks
    assert (first.exceptions, first.remarks) == (second.exceptions, second.remarks)


@pytest.mark.build
def test_experts_are_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_LEAST_TOKENS", 32)
    folder = make(tmp_path / "model", "GptOss")
    found = calibrated(folder, tmp_path / "cache", monkeypatch, training=TuneOptions(1))
    assert found.name == "tune"
    assert len(found.exceptions) == 3 * N_LAYERS
    assert all("exps" in one and one.rpartition("=")[2] != "tune" for one in found.exceptions)


@pytest.mark.build
def test_transposed_matrices_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "GPT2")
    found = calibrated(folder, tmp_path / "cache", monkeypatch, training=TuneOptions(1))
    assert found.exceptions == []
    check_near(found)


def doubled(tensor: SourceTensor) -> Callable[[], np.ndarray]:
    return lambda: tensor.load() * 2


def test_a_kind_that_is_missed_is_an_error(llama: Path) -> None:
    """Before the text is looked at."""
    folder = llama
    source = opened(folder)
    tensors = tuple(replace(one, load=doubled(one)) if "attn_k" in one.name else one for one in source.tensors)
    options = CalibrationOptions(TextOptions([], (), 256, 64))
    with pytest.raises(TritError, match="does not reach attn_k") as caught:
        prepare(replace(source, tensors=tensors), PLAN, options)
    assert "--method search" in str(caught.value)
    assert "--tensor-depth '(attn_k)=q8_0'" in str(caught.value)


def test_threads_are_those_asked_for(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    options = CalibrationOptions(TextOptions([], (), 256, 64))
    job = Job(PLAN, tmp_path / "x.gguf", threads=3, method=MethodName.GPTQ, calibration=options)
    with pytest.raises(TritError, match="too few"):
        hf_to_gguf(str(llama), None, job, pre="gpt-2")
    assert asked == [3, 3], "for the mapping and for the calibration"


@pytest.mark.build
def test_rows_are_quantized_the_same_in_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, x = (torch.randn(rows, 128, generator=generator) for rows in (400, 500))
    found = []
    for threads in (1, 3):
        solver = Solver(Moments(x.T @ x, None, len(x)), torch.float32, ColumnLoop(threads))
        found.append(pack(solver.quantize(solver.aims(weights), 2).blocks))
    assert (found[0] == found[1]).all()


def test_layers_with_inputs_of_their_own(tmp_path: Path) -> None:
    model = LayeredModel(make(tmp_path / "model", "Gemma3n"))
    with pytest.raises(TritError, match="takes more than hidden states") as caught:
        find_reach(model, "gemma3n", [], PLAN)
    assert "--method search" in str(caught.value)


def test_layers_with_inputs_for_one_sequence(tmp_path: Path) -> None:
    """ALiBi, as Bloom makes it, has the shape of the batch."""
    model = LayeredModel(make(tmp_path / "model", "Bloom"))
    with pytest.raises(TritError, match=r"cannot run its layers one by one .*: use --method search"):
        find_reach(model, "bloom", [], PLAN)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("t5", "encoder-decoder"), ("vit", "no language model"), ("made_up", "transformers cannot load it")],
)
def test_models_that_are_not_known(kind: str, reason: str, llama: Path, tmp_path: Path) -> None:
    folder = copytree(llama, tmp_path / "model")
    change(folder, model_type=kind)
    with pytest.raises(TritError, match=reason) as caught:
        LayeredModel(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
