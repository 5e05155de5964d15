"""Fuzz target for Atheris: whatever bytes a file begins with, its header is read or refused in one line.

Run it as libFuzzer programs are: python header.py CORPUS -runs=1000000
"""

import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["tritcore.gguf_header"]):
        import tritcore.gguf_header  # noqa: F401

from tritcore.errors import TritError
from tritcore.gguf_header import parts_of, raw_value, read_header
from tritrun.memory import check_memory, kv_cache_bytes, layers_that_fit, n_layers

_NAME = "fuzz.gguf"
_LONGEST = 1000  # characters of an error


def check(data: bytes) -> bool:
    """Whether the header of a file with the content `data` is accepted. Any exception is a fault."""
    try:
        model = read_header(Path(_NAME), data)
    except TritError as error:
        message = str(error)
        assert message.startswith(f"{_NAME}: "), message
        assert message.isprintable(), message
        assert len(message) < _LONGEST, message
        return False

    # what the commands ask of a header that was accepted
    assert model.name
    assert model.main_type
    assert model.bits_per_weight >= 0
    assert model.trained_context >= 0
    assert model.vocabulary_size >= 0
    assert kv_cache_bytes(model, 4096) >= 0
    assert 0 <= layers_that_fit(model, 4096, 1 << 32) <= n_layers(model)
    check_memory(model, 4096, None)
    with suppress(TritError):  # a part, but there are no files beside it
        assert parts_of(model) == (model,)
    for field in model.fields.values():
        raw_value(data, field)
    end = 0
    for tensor in model.tensors:
        assert tensor.name.isprintable()
        assert end <= tensor.offset
        end = tensor.offset + tensor.n_bytes
        assert model.data_start + end <= len(data)
    return True


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
