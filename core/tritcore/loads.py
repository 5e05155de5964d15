"""Asks llama.cpp whether it would load a model: names, shapes and number of tensors, vocabulary, metadata.

llama.cpp reads only the header and allocates no memory for the weights, so a sparse file without data will do. It runs
in a child process, since input that llama.cpp does not expect may abort the process.
"""

import ctypes
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from tritcore import child

_SECONDS = 300  # more than the largest vocabulary takes
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_CONTEXT = 64  # tokens: any size shows whether the graph can be built
_CODE = f"from {__name__} import answer; answer(sys.argv[1])"


def refusal(path: Path) -> str | None:
    """The reason why llama.cpp refuses the GGUF file at `path`; None if it loads, or if llama.cpp is not installed."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    try:
        done = child.run(_CODE, str(path), environment=environment, seconds=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} seconds"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return _last_words(done)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last message of a child that died: the failed assertion if there is one, else the last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line), lines[-1] if lines else "")
    end = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    return f"{said} ({end})" if said else end


def _first_error(path: str) -> str | None:
    try:
        import llama_cpp
    except (ImportError, OSError):  # the bindings, or the libraries under them, are missing
        return None

    errors: list[str] = []

    def on_log(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR_LEVEL:
            errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(on_log)  # in a variable, as the library calls it until the end
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.no_alloc = True
    options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
    if not model:
        return errors[0] if errors else "no reason given"
    context_options = llama_cpp.llama_context_default_params()
    context_options.n_ctx = context_options.n_batch = context_options.n_ubatch = _CONTEXT
    context = llama_cpp.llama_init_from_model(model, context_options)
    return None if context else (errors[0] if errors else "no context")


def answer(path: str) -> None:
    """Main function of the child: print the result of `refusal` for a path, as JSON, and exit."""
    print(json.dumps(_first_error(path)), flush=True)
    os._exit(0)  # the model was never there whole: nothing to free
