"""Small Hugging Face checkpoints for tests, and what llama.cpp makes of a model."""

import io
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import ggml
import numpy as np
import sentencepiece
import torch
from gguf import LlamaFileType

from tritconv.calibration.matrices import Matrix, matrices_of
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.rows import RowMap

ROOT = Path(__file__).parent.parent
SMOLLM2_GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# row lengths that are odd multiples of 64: no multiples of 256
HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 192, 3, 1, 320
VOCABULARY = 600

_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FEED_FORWARD,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": HIDDEN // HEADS},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = tuple(_SPECIFIC)


def make_checkpoint(folder: Path, architecture: str = "Llama", **changes: Any) -> Path:
    """A checkpoint with random weights, in safetensors, with a small tokenizer.

    Args:
        folder: to be made.
        architecture: one of ARCHITECTURES, or another that transformers has a configuration and a ForCausalLM of.
        changes: to the configuration.
    """
    import transformers

    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**_COMMON | _SPECIFIC.get(architecture, {}) | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.float16)
    model.save_pretrained(folder)
    write_sentencepiece(folder)
    return folder


def write_sentencepiece(folder: Path) -> None:
    """Write a small SentencePiece tokenizer."""
    (folder / "tokenizer.model").write_bytes(_tokenizer())


@cache
def _tokenizer() -> bytes:
    """A small SentencePiece model, trained on the documentation that Python brings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.topics.values()).splitlines()[:2000]),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def make_bpe_tokenizer(folder: Path) -> None:
    """Write a small byte-level BPE tokenizer as tokenizer.json. llama.cpp's converter does not know its hash."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<|one|>", "<|two|>", "<|three|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics.topics["formatstrings"]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def exact_model(folder: Path) -> LayeredModel:
    """A model whose products are not rounded, for comparisons."""
    model = LayeredModel(folder)
    model._precision = torch.float32
    return model


def smollm2_checkpoint(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint in float16, from the GGUF file of models/."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    assert SMOLLM2_GGUF.is_file(), f"{SMOLLM2_GGUF} is missing: python models/fetch.py SmolLM2-135M-Instruct"
    source = {"pretrained_model_name_or_path": SMOLLM2_GGUF.parent, "gguf_file": SMOLLM2_GGUF.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def to_f16_gguf(checkpoint: Path, target: Path) -> Path:
    """The checkpoint as llama.cpp's own converter writes it in F16."""
    from conversion import ModelBase, get_model_class

    architecture = ModelBase.load_hparams(checkpoint, False)["architectures"][0]
    model = get_model_class(architecture)(checkpoint, LlamaFileType.MOSTLY_F16, target)
    model.write()
    return target


def logits(model: Path, prompt: str) -> np.ndarray:
    """float32 (vocabulary,): logits of the token after the prompt."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), n_ctx=128, n_batch=128, verbose=False, n_threads=2)
    try:
        llama.eval(llama.tokenize(prompt.encode(), add_bos=True))
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).copy()
    finally:
        llama.close()


def tritconv(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run tritconv in a process of its own."""
    command = [sys.executable, "-m", "tritconv", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)


def llama_quantize(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run llama-quantize."""
    command = [str(ggml.tool("llama-quantize")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def maps_of(model: LayeredModel) -> dict[str, RowMap]:
    """A tensor for each parameter of the layers."""
    maps = {}
    for index in range(model.n_layers):
        layer = model.working_copy(index)
        by_name: dict[str, list[Matrix]] = {}
        for matrix in matrices_of(layer):
            by_name.setdefault(matrix.name, []).append(matrix)
        for name, matrices in by_name.items():
            n_rows = [len(matrix.of(layer)) for matrix in matrices]
            maps[f"blk.{index}.{name}"] = RowMap(
                [(index, matrix) for matrix in matrices],
                np.repeat(np.arange(len(matrices), dtype=np.int32), n_rows),
                np.concatenate([np.arange(n) for n in n_rows]),
            )
    return maps
