"""llama.cpp's C interface, as far as a chat needs it: load, tokenize, compute, draw.

The class `Llama` of the bindings is not used: it compiles every chat template of a file, reads some of them a byte
short, and cannot ask llama.cpp to check the weights.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from gguf import GGMLQuantizationType

from tritcore.console import one_line
from tritcore.errors import TritError
from tritrun.sampling import GREEDY, Sampling, make_sampler
from tritrun.tools import library_folder

_BATCH = 512  # tokens computed at once
_GUESSES = 4  # tokens that a draft model proposes at once
_INVALID_DATA = "has invalid data"
_GPUS = (1, 2)  # ggml_backend_dev_type: GPU, integrated GPU
_RPC = b"RPC"  # the name of that backend
_FULL = 1  # llama_decode: no room left in the context


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, and the factor of what it adds to the weights."""

    path: Path
    scale: float = 1.0


class Llama:
    """A loaded model with one context. Close it."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        threads: int,
        gpu_layers: int,
        check: bool,
        kv_type: GGMLQuantizationType = GGMLQuantizationType.F16,
        adapters: Sequence[Adapter] = (),
        servers: Sequence[str] = (),
    ) -> None:
        """Load a model.

        Args:
            n_ctx: context in tokens.
            gpu_layers: layers to keep on a GPU or on servers.
            check: whether all weights are valid: blocks of TRIT types, no NaN and no infinity.
            kv_type: of the key-value cache.
            adapters: to add to the weights.
            servers: addresses of RPC servers, for this and all later models of the process.

        Raises:
            TritError: llama.cpp refuses the file.
        """
        self._cpp, log = load_bindings()
        _use_servers(servers)
        cpp = self._cpp
        options = cpp.llama_model_default_params()
        options.n_gpu_layers = gpu_layers
        options.check_tensors = check
        self._model = _load(cpp, path, options)
        if not self._model:
            raise refusal(path, log.first_error)
        self._context = None
        try:
            self._context = cpp.llama_init_from_model(self._model, _context_options(cpp, n_ctx, threads, kv_type))
            if not self._context:
                raise refusal(path, log.first_error)
            self._add(adapters, log)
        except BaseException:
            self.close()
            raise
        self._memory = cpp.llama_get_memory(self._context)  # none where no token depends on earlier ones
        self._vocab = cpp.llama_model_get_vocab(self._model)
        self._seen: list[int] = []  # tokens that the context holds
        self.n_ctx = n_ctx
        self.bos: int = cpp.llama_vocab_bos(self._vocab)  # -1 if there is none
        self.eos: int = cpp.llama_vocab_eos(self._vocab)
        self.adds_bos: bool = cpp.llama_vocab_get_add_bos(self._vocab)

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            self._cpp.llama_free(self._context)
        if self._model:
            self._cpp.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def writes_by_decoder_alone(self) -> bool:
        """False for models with an encoder, with no decoder at all, or that keep nothing of earlier tokens."""
        cpp, model = self._cpp, self._model
        return bool(self._memory) and cpp.llama_model_has_decoder(model) and not cpp.llama_model_has_encoder(model)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Tokens of `text`; where it spells a control token, that becomes one if `special`, else stays text.

        Raises:
            TritError: the text is larger than llama.cpp can count.
        """
        raw = text.encode(errors="replace")
        room = len(raw) + 16  # a token has a byte at least; a few vocabularies put spaces before
        if room >= 1 << 31:
            raise TritError(f"a text of {len(raw)} bytes is too long for llama.cpp")
        while True:
            tokens = (ctypes.c_int32 * room)()
            n = self._cpp.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, special)
            if n >= 0:
                return tokens[:n]
            room = -n

    def is_control(self, token: int) -> bool:
        """True for a token that stands for no text, such as the end of a turn, or for one that is not known."""
        cpp = self._cpp
        kinds = cpp.LLAMA_TOKEN_ATTR_CONTROL | cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(cpp.llama_vocab_get_attr(self._vocab, token) & kinds)

    def ends_answer(self, token: int) -> bool:
        """True for an end-of-text or end-of-turn token."""
        return bool(self._cpp.llama_vocab_is_eog(self._vocab, token))

    def name(self, token: int) -> str:
        """The token as the vocabulary spells it; empty for -1, the token that is not there."""
        if token < 0:
            return ""
        raw: bytes = self._cpp.llama_vocab_get_text(self._vocab, token)
        return raw.decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """The token's bytes; they may be part of a character. Control tokens have none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def generate(self, prompt: Sequence[int], sampling: Sampling, draft: "Llama | None" = None) -> Iterator[int]:
        """Draw tokens after `prompt`, without end. What the context holds of it is not computed again.

        Args:
            draft: a smaller model with the same vocabulary, which guesses the next tokens: those that would have been
                drawn anyway are computed together. The distribution of the answers stays the same.

        Raises:
            TritError: llama.cpp fails.
        """
        sampler = make_sampler(self._cpp, self._vocab, sampling, prompt)
        try:
            new = self._keep_common(prompt)
            while True:
                guesses = draft.guess([*self._seen, *new], self._room(new)) if draft is not None else []
                if guesses:
                    self.compute(new[:-1])
                    self._compute_with_guesses([new[-1], *guesses])
                else:
                    self.compute(new)
                for n_left, guess in zip(range(len(guesses), -1, -1), [*guesses, None], strict=True):
                    token: int = self._cpp.llama_sampler_sample(sampler, self._context, -1 - n_left)
                    yield token
                    if token != guess:
                        break
                known = self._seen[: len(self._seen) - n_left]
                if n_left:
                    self._forget(len(known))
                new = [*known[len(self._seen) :], token]
        finally:
            self._cpp.llama_sampler_free(sampler)

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens after `tokens`."""
        return list(islice(self.generate(tokens, GREEDY), count))

    def has_vocabulary_of(self, other: "Llama") -> bool:
        """Whether both models mean the same by a token."""
        counts = [self._cpp.llama_vocab_n_tokens(one._vocab) for one in (self, other)]
        return counts[0] == counts[1] and all(self.name(token) == other.name(token) for token in range(counts[0]))

    def compute(self, tokens: Sequence[int]) -> None:
        """Let the model read more tokens. Raises TritError if llama.cpp fails."""
        for at in range(0, len(tokens), _BATCH):
            part = list(tokens[at : at + _BATCH])
            array = (ctypes.c_int32 * len(part))(*part)  # in a variable, as the batch points to it
            self._decode(self._cpp.llama_batch_get_one(array, len(part)), part)

    def _compute_with_guesses(self, tokens: Sequence[int]) -> None:
        """Read tokens, and predict what follows each of them."""
        batch = self._cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, len(self._seen) + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True
            self._decode(batch, tokens)
        finally:
            self._cpp.llama_batch_free(batch)

    def _decode(self, batch: Any, tokens: Sequence[int]) -> None:
        if code := self._cpp.llama_decode(self._context, batch):
            self._forget(0)  # what the context holds now is not known
            reason = "the context is full" if code == _FULL else f"llama_decode returned {code}"
            raise TritError(f"llama.cpp failed while answering: {reason}")
        self._seen += tokens

    def _room(self, new: Sequence[int]) -> int:
        """How many guesses the context holds after new tokens."""
        return max(0, min(_GUESSES, self.n_ctx - len(self._seen) - len(new)))

    def _keep_common(self, prompt: Sequence[int]) -> Sequence[int]:
        """Forget what the context holds beyond the beginning of `prompt`; returns its rest, one token at least."""
        common = 0
        for seen, wanted in zip(self._seen, prompt, strict=False):
            if seen != wanted:
                break
            common += 1
        self._forget(min(common, len(prompt) - 1))
        return prompt[len(self._seen) :]

    def _forget(self, first: int) -> None:
        """Let the context hold `first` tokens only, or none where the model cannot go back."""
        if first == 0 or not self._cpp.llama_memory_seq_rm(self._memory, -1, first, -1):
            self._cpp.llama_memory_clear(self._memory, True)
            first = 0
        del self._seen[first:]

    def _add(self, adapters: Sequence[Adapter], log: "_ErrorLog") -> None:
        """Add adapters to the weights. Raises TritError if one does not fit."""
        cpp = self._cpp
        loaded = []
        for adapter in adapters:
            one = cpp.llama_adapter_lora_init(self._model, str(adapter.path).encode(errors="surrogateescape"))
            if not one:
                reason = one_line(log.first_error) or "it does not say why"
                raise TritError(f"{adapter.path}: llama.cpp cannot add it to this model: {reason}")
            loaded.append(one)
        if loaded:
            scales = (ctypes.c_float * len(loaded))(*(adapter.scale for adapter in adapters))
            array = (cpp.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)  # the model frees them
            cpp.llama_set_adapters_lora(self._context, array, len(loaded), scales)


class _ErrorLog:
    """Swallows llama.cpp's log and remembers the first error: later ones only repeat that loading failed."""

    _LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR; 3 is WARN

    def __init__(self) -> None:
        self.first_error = ""

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        if level == self._LEVEL_ERROR and not self.first_error:
            self.first_error = text.decode(errors="replace").strip()


# The C library keeps calling back until it is unloaded, so this must live as long.
_log_callback: Any = None


def load_bindings() -> tuple[ModuleType, _ErrorLog]:
    """Import the bindings (half a second, hence here) and turn llama.cpp's log into an `_ErrorLog`.

    Raises:
        TritError: llama-cpp-python is missing or its library does not load.
    """
    global _log_callback
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise TritError(f"llama-cpp-python does not load ({error}); `make` builds and installs it") from error
    log = _ErrorLog()
    _log_callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, log


def has_gpu() -> bool:
    """Whether this build and this machine can keep layers on a GPU. Raises TritError as `load_bindings`."""
    return any(True for _ in _gpus())


def free_gpu_memory() -> int:
    """Free bytes of all GPUs of this machine together."""
    registry = _registry()
    free, total, found = ctypes.c_size_t(), ctypes.c_size_t(), 0
    for device in _gpus():
        registry.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found += free.value
    return found


def _gpus() -> Iterator[ctypes.c_void_p]:
    """The GPUs of this machine; to llama.cpp, servers that a process uses are GPUs too."""
    load_bindings()[0].llama_supports_gpu_offload()  # loads the backends, where nothing has done so
    registry = _registry()
    for index in range(registry.ggml_backend_dev_count()):
        device = ctypes.c_void_p(registry.ggml_backend_dev_get(ctypes.c_size_t(index)))
        backend = ctypes.c_void_p(registry.ggml_backend_dev_backend_reg(device))
        if registry.ggml_backend_dev_type(device) in _GPUS and registry.ggml_backend_reg_name(backend) != _RPC:
            yield device


def _registry() -> ctypes.CDLL:
    """ggml's list of backends and devices."""
    (registry,) = (ctypes.CDLL(str(path)) for path in library_folder().glob("libggml.*"))
    pointers = ("dev_get", "dev_backend_reg", "reg_by_name", "reg_get_proc_address")
    for name in pointers:
        getattr(registry, f"ggml_backend_{name}").restype = ctypes.c_void_p
    registry.ggml_backend_reg_name.restype = ctypes.c_char_p
    return registry


def _use_servers(addresses: Sequence[str]) -> None:
    """Give llama.cpp RPC servers as devices; they stay until the process ends.

    A server that is not there ends the process: `servers.find_servers` asks before. Raises TritError if this build has
    no RPC.
    """
    if not addresses:
        return
    registry = _registry()
    backend = ctypes.c_void_p(registry.ggml_backend_reg_by_name(_RPC))
    if not backend:
        raise TritError("this build of llama.cpp has no RPC; `make build` makes one that has it")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(
        registry.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    )
    for address in addresses:
        registry.ggml_backend_register(ctypes.c_void_p(add_server(address.encode())))


def _load(cpp: ModuleType, path: Path, options: Any) -> Any:
    """The model, None if llama.cpp refuses it. Ctrl-C and other signals end the loading, which may take minutes."""
    stop = threading.Event()
    options.progress_callback = cpp.llama_progress_callback(lambda _progress, _data: not stop.is_set())
    # In a thread: Python handles signals in the main one, and only between its own instructions.
    with ThreadPoolExecutor(1) as pool:
        name = str(path).encode(errors="surrogateescape")
        loading = pool.submit(cpp.llama_model_load_from_file, name, options)
        try:
            return loading.result()
        except BaseException:
            stop.set()
            if model := loading.result():
                cpp.llama_model_free(model)
            raise


def _context_options(cpp: ModuleType, n_ctx: int, threads: int, kv_type: GGMLQuantizationType) -> Any:
    options = cpp.llama_context_default_params()
    options.n_ctx = n_ctx
    options.n_batch = options.n_ubatch = min(n_ctx, _BATCH)
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = kv_type.value
    # Without it only values in float16 and float32 can be read.
    flash = kv_type not in (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
    options.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return options


def refusal(path: Path, reason: str) -> TritError:
    """The error for a model that llama.cpp refuses. `reason`: the first error in its log, however it is laid out."""
    reason = one_line(reason) or "it does not say why"
    if _INVALID_DATA in reason:
        _, _, what = reason.rpartition(": ")
        return TritError(
            f"{path}: damaged: {what}: a weight that is not finite, or a block that no encoder writes; "
            "download or convert the model again, or give --no-check to run it all the same"
        )
    return TritError(f"{path}: llama.cpp cannot load it: {reason}")
