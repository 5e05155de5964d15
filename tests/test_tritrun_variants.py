"""The variants of ggml's CPU code: ggml's choice among them, and the switch that forces one."""

import os
import subprocess
import sys
from pathlib import Path

import ggml
import pytest

from llamabuild.toolchain import PROBES, find_compilers
from tritcore.errors import TritError
from tritrun import variants

pytestmark = pytest.mark.build

AMX = "sapphirerapids"
RUNNABLE = ggml.runnable()
BUILT = list(variants.modules()) if RUNNABLE else []
HAS_VARIANTS = variants.NATIVE not in BUILT

many = pytest.mark.skipif(not HAS_VARIANTS, reason="this build is for one machine")
amx = pytest.mark.skipif(AMX not in BUILT, reason="no variant with AMX is built")


def bench(model: Path, *, folder: Path, **environment: str) -> tuple[str, int]:
    """What llama-bench says on stderr, and its exit status, when it is run in a folder."""
    command = [str(ggml.tool("llama-bench")), "-m", str(model), "-p", "8", "-n", "1", "-r", "1", "-t", "1"]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    return done.stderr, done.returncode


def test_the_best_variant_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    log, status = bench(tiny_model, folder=tmp_path)
    assert status == 0, log
    assert variants.in_use() == variants.runnable()[0]
    if HAS_VARIANTS:
        assert f"libggml-cpu-{variants.in_use()}.so" in log


@many
@pytest.mark.parametrize("variant", RUNNABLE)
def test_each_variant_can_be_forced(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    log, status = bench(tiny_model, folder=tmp_path, **variants.environment(variant))
    assert status == 0, log
    assert f"libggml-cpu-{variant}.so" in log


BINDINGS = """\
import ctypes, llama_cpp, sys
from tritrun import variants
@llama_cpp.llama_log_callback
def log(level, text, data):
    print(text.decode(), end="")
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
variants.force(sys.argv[1])
llama_cpp.llama_backend_init()
"""


@many
def test_the_bindings_take_the_forced_variant() -> None:
    slowest = variants.runnable()[-1]
    log = subprocess.run([sys.executable, "-c", BINDINGS, slowest], check=True, capture_output=True, text=True).stdout
    assert f"libggml-cpu-{slowest}.so" in log


@many
def test_chat_in_a_forced_variant(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "tritrun", "chat", str(tiny_model), "--prompt", "x", "--max-tokens", "1"]
    done = subprocess.run([*command, "--cpu", variants.runnable()[-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_native_is_the_name_of_the_only_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variants, "modules", lambda: {variants.NATIVE: tmp_path})
    monkeypatch.setattr(variants, "_score", lambda module: 1)
    monkeypatch.setenv("GGML_CPU_VARIANT", "haswell")
    assert variants.in_use() == variants.NATIVE
    assert variants.environment(variants.NATIVE) == {}


def test_a_variant_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = {tmp_path / "fast": 0, tmp_path / "plain": 1, tmp_path / "good": 7}
    monkeypatch.setattr(variants, "modules", lambda: {path.name: path for path in scores})
    monkeypatch.setattr(variants, "_score", scores.__getitem__)
    assert variants.runnable() == ["good", "plain"]
    with pytest.raises(TritError, match="fast is not built or does not run here; choose one of good, plain"):
        variants.force("fast")


@many
def test_ggml_says_that_a_variant_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    log, status = bench(tiny_model, folder=tmp_path, GGML_CPU_VARIANT="none")
    assert status != 0
    assert "GGML_CPU_VARIANT=none: there is no such variant" in log


def test_no_library_of_the_current_folder_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    """Upstream asks any libggml-cpu-*.so there how well it runs."""
    source = tmp_path / "stranger.c"
    source.write_text("__attribute__((constructor)) static void run(void) { __builtin_trap(); }\n")
    module = tmp_path / "libggml-cpu-stranger.so"
    subprocess.run([*find_compilers().c, "-shared", "-fPIC", "-o", module, source], check=True)
    log, status = bench(tiny_model, folder=tmp_path)
    assert status == 0, log


# AMX: CPUID announces it, the permission and the execution decide.

SCORE = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ggml_backend_score())"

SMALL_SIGNAL_STACK = """\
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
"""


def score_of_amx(preparation: str = "") -> int:
    """The score of the variant with AMX in a process of its own."""
    command = [sys.executable, "-c", preparation + SCORE, str(variants.modules()[AMX])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@amx
def test_amx_is_taken_where_it_works(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    subprocess.run([*find_compilers().c, "-o", probe, PROBES / "amx.c"], check=True)
    works = subprocess.run([probe]).returncode == 0
    assert (score_of_amx() > 0) == works
    assert (AMX in variants.runnable()) == works


@amx
def test_amx_scores_0_where_the_kernel_refuses_it() -> None:
    """No tile registers for a process whose alternate signal stack could not hold them."""
    assert score_of_amx(SMALL_SIGNAL_STACK) == 0
