"""Run llama.cpp's own server on a model, after the checks that a chat makes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritcore.console import note, one_line
from tritcore.errors import TritError, UsageError
from tritcore.gguf_header import ModelFile
from tritrun.llama import has_gpu, refusal
from tritrun.loading import Loading
from tritrun.servers import explain_loss
from tritrun.tool_log import read_record
from tritrun.tools import run_tool

API_KEY = "LLAMA_API_KEY"
"""Variable that llama-server takes its key from. Anybody on the machine may read a command line."""

_PROGRAM = "llama-server"
_LISTENS = re.compile(r"listening on (http\S+)")
_TAKEN = "couldn't bind"
_SECONDS_TO_END = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # and how this machine reaches itself there


@dataclass(frozen=True)
class ServerOptions:
    """How to serve a model.

    Attributes:
        loading: its context is that of each user.
        host: the address to listen on.
        port: 0 for a free one.
        parallel: users at once; more wait.
        api_key: that clients must send; None lets everybody in.
        mmproj: the part of the model that sees or hears; None for a model of text.
        verbose: show the server's log.
        others: options of llama-server, which come last and so win.
    """

    loading: Loading
    host: str = "127.0.0.1"
    port: int = 0
    parallel: int = 1
    api_key: str | None = None
    mmproj: Path | None = None
    verbose: bool = False
    others: Sequence[str] = ()


def run_server(model: ModelFile, options: ServerOptions, on_ready: Callable[[str, int], None]) -> None:
    """Serve until the server ends.

    Args:
        on_ready: is given the server's address, once it answers, and the context of a user in tokens. An exception, as
            of Ctrl-C, ends the server.

    Raises:
        TritError: the model does not fit into memory, is damaged, the address is taken, an RPC server is lost, or the
            server fails.
        UsageError: an adapter has a name that the server does not take.
    """
    loading = options.loading
    n_ctx = loading.context(model)
    gpu_layers = loading.gpu_layers
    if loading.servers:
        on_gpu = loading.layers_on_gpu(model, n_ctx * options.parallel)
        loading.check_memory(model, n_ctx * options.parallel, on_gpu)
        gpu_layers = str(on_gpu)
    elif gpu_layers == "0" or not has_gpu():  # else the server makes it fit
        loading.check_memory(model, n_ctx * options.parallel, on_gpu=0)
    log = _Log(options.verbose, lambda url: on_ready(url, n_ctx))
    environment = {API_KEY: options.api_key} if options.api_key else {}
    finished = run_tool(
        _PROGRAM,
        _arguments(model, options, n_ctx, gpu_layers),
        log.feed,
        environment=environment,
        seconds_to_end=_SECONDS_TO_END,
    )
    if finished.exit_code == 0:
        return
    if loss := explain_loss(finished.reason, loading.addresses):
        raise TritError(loss)
    reason = log.first_error or finished.reason
    if _TAKEN in reason:
        raise TritError(f"{options.host}:{options.port} cannot be listened on: is it in use? Choose another --port")
    if not log.listens:
        raise refusal(model.path, reason)
    raise TritError(f"{_PROGRAM} has ended: {reason}")


def _arguments(model: ModelFile, options: ServerOptions, n_ctx: int, gpu_layers: str) -> list[str]:
    loading, kv_type = options.loading, options.loading.kv_type.name.lower()
    arguments = ["--model", model.path, "--host", options.host, "--port", options.port]
    # Each user has a context of his own, which no other one can fill.
    arguments += ["--ctx-size", n_ctx * options.parallel, "--parallel", options.parallel, "--no-kv-unified"]
    arguments += ["--threads", loading.threads, "--gpu-layers", gpu_layers]
    arguments += ["--cache-type-k", kv_type, "--cache-type-v", kv_type, "--embeddings", "--pooling", "mean"]
    arguments += ["--check-tensors"] if loading.check else []
    for adapter in loading.adapters:
        if set(",:") & set(str(adapter.path)):
            raise UsageError(f"{adapter.path}: llama-server takes no comma and no colon in the name of an adapter")
        arguments += ["--lora-scaled", f"{adapter.path}:{adapter.scale}"]
    if loading.draft is not None:
        arguments += ["--model-draft", loading.draft.path, "--spec-type", "draft-simple"]
    if loading.servers:  # which hold layers, and nothing else
        arguments += ["--rpc", ",".join(loading.addresses), "--fit", "off"]
        arguments += ["--no-mmproj-offload", "--gpu-layers-draft", "0"]
    if options.mmproj is not None:
        arguments += ["--mmproj", options.mmproj]
    # With others, any page that a browser shows could talk to the server.
    arguments += ["--cors-origins", "localhost", "--log-jsonl"]
    return [*map(str, arguments), *options.others]


class _Log:
    """Follows the server's log.

    Attributes:
        first_error: the first error in it; later ones only repeat that loading failed.
        listens: whether the server has answered.
    """

    def __init__(self, verbose: bool, on_ready: Callable[[str], None]) -> None:
        self.first_error = ""
        self.listens = False
        self._verbose = verbose
        self._on_ready = on_ready

    def feed(self, line: str) -> None:
        """Take one line of the server's stdout."""
        record = read_record(line)
        if record is None:
            return
        if self._verbose:
            note(record.message)
        if record.level == "error":
            self.first_error = self.first_error or one_line(record.message)
        elif (found := _LISTENS.search(record.message)) and not self.listens:
            self.listens = True
            self._on_ready(_reachable(found[1]))


def _reachable(url: str) -> str:
    """The address of a server as this machine reaches it."""
    for anywhere, here in _EVERYWHERE.items():
        url = url.replace(f"//{anywhere}:", f"//{here}:").replace(f"//[{anywhere}]:", f"//{here}:")
    return url
