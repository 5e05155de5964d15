"""What llama.cpp says of a model before it is made: the reason of a refusal, whatever happens to the process."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tiny_gguf import TOKENS, write_tiny_model

from tritconv.convert import Job, gguf_to_gguf
from tritconv.plan import Plan
from tritconv.sources.gguf import open_gguf
from tritconv.writer import Header, write_outline
from tritcore.errors import TritError
from tritcore.loads import refusal

pytestmark = pytest.mark.build

PLAN = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)


def test_a_model_that_loads(tiny_model: Path) -> None:
    assert refusal(tiny_model) is None


def test_an_outline_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    outline = tmp_path / "outline"
    source = open_gguf(tiny_model)
    size = write_outline(Header(source.architecture, source.metadata, source.tensors, ()), PLAN, outline)
    assert outline.stat().st_size == size
    assert outline.stat().st_blocks * 512 < size
    assert refusal(outline) is None


def _changed(tmp_path: Path, **changes: object) -> Path:
    """The tiny model with metadata keys (dots as __) or tensors (None: left out) changed."""
    source = write_tiny_model(tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "llama")
    named = {key.replace("__", "."): value for key, value in changes.items()}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = named.get(field.name, field.contents())
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        data = named.get(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, np.asarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "changed.gguf"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blk__1__ffn_up__weight": None}, "blk.1.ffn_up.weight"),
        ({"blk__0__attn_q__weight": np.zeros((64, 128), np.float16)}, "blk.0.attn_q.weight"),
        ({"token_embd__weight": np.zeros((len(TOKENS) - 1, 64), np.float16)}, "token_embd.weight"),
        ({"llama__block_count": 3}, "blk.2"),
        ({"llama__attention__head_count": 5}, ""),
        ({"llama__attention__head_count": 0}, ""),
        ({"llama__rope__dimension_count": 7}, ""),
    ],
)
def test_what_llama_cpp_would_refuse_is_refused_before_the_work(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    source = _changed(tmp_path, **changes)
    reason = refusal(source)
    assert reason
    assert words in reason
    assert "\n" not in reason
    out = tmp_path / "out.gguf"
    with pytest.raises(TritError, match=r"llama\.cpp would not load") as error:
        gguf_to_gguf(source, Job(PLAN, out))
    assert words in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.gguf", "whole.gguf"]
