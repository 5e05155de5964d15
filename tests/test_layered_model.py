"""A model whose layers are read when their turn comes. Most tests need no compiled llama.cpp."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import transformers
from checkpoints import VOCABULARY, exact_model, make_bpe_tokenizer, make_checkpoint
from gguf import LlamaFileType
from safetensors.torch import load_file, save_file

from tritconv.calibration import memory, parameters, stored
from tritconv.calibration import model as model_module
from tritconv.calibration.gradients import draw
from tritconv.calibration.matrices import matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.stored import FileTensor, Spill
from tritcore.errors import TritError

CHANGES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mixtral": {},  # the library merges the experts
    "Gemma2": {"tie_word_embeddings": True},  # scales the embeddings and caps the logits
    "GPT2": {"n_ctx": 256, "tie_word_embeddings": True},  # has embeddings of positions
}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))


def make(folder: Path, architecture: str) -> Path:
    if architecture != "GPT2":
        return make_checkpoint(folder, architecture, **CHANGES[architecture])
    made = make_checkpoint(folder.with_name("llama"), "Llama")  # for its tokenizer
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_ctx=256)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).to(torch.float16).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((made / "tokenizer.model").read_bytes())
    return folder


def whole(folder: Path, **source: Any) -> Any:
    """The same model, all of it in memory, in float32."""
    options = {"dtype": torch.float16} | source
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).float().eval()


def last_hidden(model: LayeredModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(tokens)
    for index in range(model.n_layers):
        hidden = model.run_all(index, model.working_copy(index), hidden)
    return hidden


def check_same(model: LayeredModel, reference: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.logits(last_hidden(model, tokens)), reference(input_ids=tokens).logits)


@pytest.mark.parametrize("architecture", CHANGES)
def test_layers_give_what_the_whole_model_gives(architecture: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", architecture)
    model = exact_model(folder)
    assert all(parameter.is_meta for parameter in model._model.parameters())
    check_same(model, whole(folder), tokens)
    written = model.whole_copy()
    with torch.no_grad():
        torch.testing.assert_close(written(input_ids=tokens).logits, whole(folder)(input_ids=tokens).logits)


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral"])
def test_weights_are_read_again(architecture: str, tmp_path: Path) -> None:
    model = exact_model(make(tmp_path / "model", architecture))
    layer = model.working_copy(1)
    for matrix in matrices_of(layer):
        kept = matrix.of(layer).clone()
        matrix.of(layer).zero_()
        assert torch.equal(matrix.of(model.working_copy(1)), kept), "copies have nothing in common"
        assert torch.equal(matrix.of(model.stored_copy(1)).float(), kept)
    assert {values.dtype for values in model.stored_copy(1).parameters()} == {torch.float16}


def test_weights_in_several_files(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "Llama")
    reference = whole(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + ('.1.' in name)}-of-00002.safetensors" for name in weights}
    for file in set(names.values()):
        mine = {name: values for name, values in weights.items() if names[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    check_same(exact_model(folder), reference, tokens)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_pickled_weights_go_through_a_temporary_file(
    tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    folder = make(tmp_path / "model", "Llama")
    reference = whole(folder)
    as_pickle(folder)
    check_same(exact_model(folder), reference, tokens)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_for_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "Llama")
    as_pickle(folder)

    def full(_: object) -> Any:
        return type("Usage", (), {"free": 1000})

    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored.shutil, "disk_usage", full)
    with pytest.raises(TritError, match=r"temporary copy of the weights .* are free: set TRITCONV_CACHE"):
        LayeredModel(folder)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "Llama")
    model = exact_model(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(TritError, match=r"model\.safetensors is truncated"):
        model.working_copy(1)


def test_gguf_files_are_read_a_tensor_at_a_time(tiny_model: Path) -> None:
    model = LayeredModel(tiny_model.parent, tiny_model.name)
    model._precision = torch.float32
    quantization = transformers.GgufConfig(dequantize=True)
    reference = whole(
        tiny_model.parent, gguf_file=tiny_model.name, dtype=torch.float32, quantization_config=quantization
    )
    assert all(parameter.is_meta for parameter in model._model.parameters())
    check_same(model, reference, torch.tensor([[3, 7, 5, 11], [2, 2, 9, 4]]))


@pytest.mark.build
def test_gguf_files_that_the_library_converts_lazily(
    tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of Q8_0, in the embeddings too."""
    from conversion import get_model_class

    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.Lfm2ForCausalLM(config).half().save_pretrained(tmp_path / "hf")
    make_bpe_tokenizer(tmp_path / "hf")
    upstream = get_model_class("Lfm2ForCausalLM")
    monkeypatch.setattr(upstream, "get_vocab_base_pre", lambda *_: "gpt-2")
    upstream(tmp_path / "hf", LlamaFileType.MOSTLY_Q8_0, tmp_path / "tiny.gguf").write()
    model = LayeredModel(tmp_path, "tiny.gguf")
    model._precision = torch.float32
    assert all(parameter.is_meta for parameter in model._model.parameters())
    quantization = transformers.GgufConfig(dequantize=True)
    check_same(
        model, whole(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, quantization_config=quantization), tokens
    )


def test_conversions_that_need_values(tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library cannot convert without values, each group is converted once to see what becomes of it."""

    folder = make(tmp_path / "model", "Mixtral")
    reference = whole(folder)
    run = parameters.Parameters._run

    def failing(self: Any, tensors: Any, device: str) -> Any:
        info = run(self, tensors, device)
        if device == "meta" and any("experts" in key for key in tensors):
            info.conversion_errors = {"model.layers.0.mlp.experts.gate_up_proj": "needs values"}
        return info

    monkeypatch.setattr(parameters.Parameters, "_run", failing)
    model = exact_model(folder)
    assert all(parameter.is_meta for parameter in model._model.parameters())
    check_same(model, reference, tokens)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_the_vocabulary_is_never_in_memory(
    architecture: str, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_model(make(tmp_path / "model", architecture))
    monkeypatch.setattr(model_module, "rows_of_chunk", lambda _: 100)
    read: list[int] = []
    plain = FileTensor._read

    def watched(self: FileTensor, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        if self.shape[:1] == (VOCABULARY,):
            read.append(shape[0])
        return plain(self, first, shape)

    monkeypatch.setattr(FileTensor, "_read", watched)
    hidden = last_hidden(model, tokens)
    assert sum(read) <= tokens.numel()
    read.clear()
    label_gradients(model, hidden, 0)
    assert max(read) <= 100
    assert sum(read) == 2 * VOCABULARY, "two passes, whatever the number of sequences"


def label_gradients(model: LayeredModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    return model.label_gradients(hidden, draw(hidden[..., 0], seed))


def drawn_at_once(model: LayeredModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """The gradients by the library's own loss, with all logits in memory."""
    hidden = hidden.clone().requires_grad_()
    logits = model.logits(hidden)
    cumulative = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    draws = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(seed)).double()
    labels = torch.searchsorted(cumulative, draws[..., None])[..., 0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
@pytest.mark.parametrize("rows", [64, 599, VOCABULARY])
def test_label_gradients(
    architecture: str, rows: int, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_model(make(tmp_path / "model", architecture))
    hidden = last_hidden(model, tokens)
    monkeypatch.setattr(model_module, "rows_of_chunk", lambda _: rows)
    for seed in range(3):
        torch.testing.assert_close(
            label_gradients(model, hidden, seed),
            drawn_at_once(model, hidden, seed),
            rtol=1e-4,
            atol=1e-5,
        )


def test_labels_follow_the_predictions(tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient for the logits is the prediction less the label: drawn fairly, it is zero in the mean."""
    model = exact_model(make(tmp_path / "model", "Llama"))
    monkeypatch.setattr(model_module, "rows_of_chunk", lambda _: 100)
    hidden = last_hidden(model, tokens)
    one, mean = label_gradients(model, hidden, 0), torch.zeros_like(hidden)
    for seed in range(32):
        mean += label_gradients(model, hidden, seed) / 32
    assert mean.norm() < 0.3 * one.norm()  # a thirty-second, in squares


def test_logits_that_need_the_whole_vocabulary(
    tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_model(make(tmp_path / "model", "Llama"))
    hidden = last_hidden(model, tokens)
    plain: Callable[..., Any] = model._model.forward

    def normalized(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits - out.logits.mean(dim=-1, keepdim=True)
        return out

    with torch.no_grad():
        model.check_chunks(hidden, model.logits(hidden))
        found = [model.head_in_chunks]
        monkeypatch.setattr(model._model, "forward", normalized)
        model.check_chunks(hidden, model.logits(hidden))
        found.append(model.head_in_chunks)
    assert found == [True, False]
    monkeypatch.setattr(model_module, "rows_of_chunk", lambda _: 100)
    torch.testing.assert_close(label_gradients(model, hidden, 0), drawn_at_once(model, hidden, 0), rtol=1e-4, atol=1e-5)


def test_sequences_come_one_at_a_time(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = exact_model(make(tmp_path / "model", "Gemma2"))
    each = list(model.embed_each(tokens))
    assert [one.shape[0] for one in each] == [1] * len(tokens)
    assert torch.equal(torch.cat(each), model.embed(tokens))


def test_a_model_that_does_not_fit_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model(make(tmp_path / "model", "Llama"))
    monkeypatch.setattr(memory, "total", lambda: 1000)
    with pytest.raises(TritError, match=r"the whole model must be in memory.*leave out --calib-own"):
        model.whole_copy()


def test_spilled_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path))
    spill = Spill()
    tensors = [torch.randn(5, 3).bfloat16(), torch.zeros(0), torch.arange(7), torch.randn(4, 2, 2)[:, :, 0]]
    kept = [spill.add(values) for values in tensors]
    for one, values in zip(kept, tensors, strict=True):
        assert torch.equal(one[...], values)
    assert torch.equal(kept[0].rows([4, 0, 1, 1]), tensors[0][[4, 0, 1, 1]])
    assert torch.equal(kept[0].rows(range(1, 4)), tensors[0][1:4])


_PEAK = """
import resource, sys
from pathlib import Path
import torch
from tritconv.calibration.model import LayeredModel
small, large = (LayeredModel(Path(folder)) for folder in sys.argv[1:])
small.working_copy(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for index in range(large.n_layers):
    large.working_copy(index)
    large.stored_copy(index)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    folders = [make_checkpoint(tmp_path / f"{n}", "Llama", num_hidden_layers=n, **sizes) for n in (1, 16)]
    command = [sys.executable, "-c", _PEAK, *map(str, folders)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    layer = sum(4 * parameter.numel() for parameter in LayeredModel(folders[0]).layers[0].parameters())
    assert grown < 2 * layer


def test_the_embeddings_of_the_file_are_not_changed(tokens: torch.Tensor, tmp_path: Path) -> None:
    """An output matrix beside tied embeddings, that only llama.cpp looks at."""
    folder = make(tmp_path / "model", "Gemma2")
    model = exact_model(copytree(folder, tmp_path / "copy"))
    head = 0.1 * torch.randn(VOCABULARY, model.width, generator=torch.Generator().manual_seed(0)).half()
    before = model.embed(tokens)
    model.head_is(head.float())
    reference = whole(folder)
    reference.lm_head.weight = torch.nn.Parameter(head.float())
    assert torch.equal(model.embed(tokens), before)
    check_same(model, reference, tokens)
