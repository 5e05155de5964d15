"""Short runs of the fuzz targets. `make fuzz` runs them longer."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path
from random import Random

import ggml
import pytest
from fuzz.header import check
from fuzz.run import GGML, build_blocks, commands

from kernel_programs import missing_programs

FUZZ = Path(__file__).parent / "fuzz"
SECONDS = 4
SEEDS = [path.read_bytes() for path in sorted((FUZZ / "corpus/header").iterdir())]
NUMBERS = [b"\0" * 8, b"\1" + b"\0" * 7, b"\xff" * 8, b"\xff" * 4, b"\0" * 7 + b"\x80", b"\x09\0\0\0", b"\x08\0\0\0"]


def _mutated(random: Random) -> bytes:
    data = bytearray(random.choice(SEEDS))
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(data) + 1)
        match random.randrange(5):
            case 0:
                data[at : at + 1] = random.randbytes(1)
            case 1:
                number = random.choice(NUMBERS)
                data[at : at + len(number)] = number
            case 2:
                del data[at : at + random.randrange(20)]
            case 3:
                other = random.choice(SEEDS)
                start = random.randrange(len(other))
                data[at:at] = other[start : start + random.randrange(60)]
            case 4:
                del data[at:]
    return bytes(data)


def test_headers_changed_at_random() -> None:
    random = Random(0)
    accepted = [check(_mutated(random)) for _ in range(20_000)]
    assert 1_000 < sum(accepted) < 19_000


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@pytest.mark.build
def test_llama_cpp_reads_what_is_accepted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = ggml.base()
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, _InitParams)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_free.argtypes = (ctypes.c_void_p,)
    random = Random(1)
    n_read = 0
    for _ in range(5_000):
        data = _mutated(random)
        if check(data):
            path = tmp_path / "x.gguf"
            path.write_bytes(data)
            header = library.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
            assert header, (data, capfd.readouterr().err)
            library.gguf_free(header)
            n_read += 1
    assert n_read > 200


def test_the_corpus_has_both_kinds() -> None:
    assert {check(seed) for seed in SEEDS} == {True, False}


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is missing: pip install -e .[fuzz]")
def test_headers_guided_by_coverage(tmp_path: Path) -> None:
    command = commands(tmp_path / "none", tmp_path, f"-max_total_time={SECONDS}")["header"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units" in done.stderr


def test_blocks_guided_by_coverage(tmp_path: Path) -> None:
    if reason := missing_programs(("clang++",)):
        pytest.skip(reason)
    if not GGML.is_dir():
        pytest.skip(f"{GGML} is missing: make build")
    (tmp_path / "empty.c").write_text("int LLVMFuzzerTestOneInput(const char *data, long size) { return 0; }")
    trial = ["clang", "-fsanitize=fuzzer", str(tmp_path / "empty.c"), "-o", str(tmp_path / "trial")]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("clang's runtime for fuzzing is missing: apt-get install libclang-rt-dev")
    blocks = build_blocks(tmp_path / "program")
    command = commands(blocks, tmp_path, f"-max_total_time={SECONDS}")["blocks"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units" in done.stderr
