"""How a model is loaded, for a chat and for the server alike."""

from dataclasses import dataclass

from gguf import GGMLQuantizationType

from tritcore.console import note
from tritcore.gguf_header import ModelFile
from tritrun.llama import Adapter, free_gpu_memory, has_gpu
from tritrun.machine import available_memory
from tritrun.memory import check_memory, layers_that_fit, n_layers, share_of_layers
from tritrun.servers import Server

_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Loading:
    """What the user asked for.

    Attributes:
        n_ctx: context in tokens; 0 takes all that the model was trained for, None at most 4096 of it.
        threads: CPU threads.
        gpu_layers: layers to keep on a GPU or on servers: a number, "all", or "auto", which is as many as fit on a GPU,
            and with servers their share of the memory.
        check: see that all weights are valid.
        kv_type: of the key-value cache.
        adapters: to add to the weights.
        draft: a smaller model with the same vocabulary, which guesses tokens. It stays on this machine.
        servers: of other machines, which hold layers.
    """

    n_ctx: int | None = None
    threads: int = 1
    gpu_layers: str = "auto"
    check: bool = True
    kv_type: GGMLQuantizationType = GGMLQuantizationType.F16
    adapters: tuple[Adapter, ...] = ()
    draft: ModelFile | None = None
    servers: tuple[Server, ...] = ()

    def context(self, model: ModelFile) -> int:
        """Tokens of context for `model`. Says if that is more than the model was trained for."""
        trained = model.trained_context  # 0: unknown
        if self.n_ctx:
            if trained and self.n_ctx > trained:
                note(f"the model was trained for {trained} tokens of context: expect poor answers beyond")
            return self.n_ctx
        if self.n_ctx == 0 and trained:
            return trained
        return min(trained, _DEFAULT_CONTEXT) or _DEFAULT_CONTEXT

    def layers_on_gpu(self, model: ModelFile, n_ctx: int) -> int:
        """The number of layers that `gpu_layers` stands for; 0 where there is neither a GPU nor a server."""
        if not self.servers and not has_gpu():
            if self.gpu_layers not in ("0", "auto"):
                note("this build of llama.cpp has no GPU support: --gpu-layers is ignored")
            return 0
        if self.gpu_layers == "auto":
            free = free_gpu_memory() + self._free_on_servers
            fit = layers_that_fit(model, n_ctx, free, self.kv_type)
            return min(fit, share_of_layers(model, free, available_memory())) if self.servers else fit
        return n_layers(model) if self.gpu_layers == "all" else min(int(self.gpu_layers), n_layers(model))

    def check_memory(self, model: ModelFile, n_ctx: int, on_gpu: int) -> None:
        """Check that the model, and the one that guesses, fit into memory, less `on_gpu` layers; else TritError.

        What servers hold must fit there, where there is no GPU to take it.
        """
        free = available_memory()
        if self.draft is not None:
            check_memory(self.draft, n_ctx, free, kv_type=self.kv_type)
            free = None if free is None else free - self.draft.size
        elsewhere = on_gpu / n_layers(model)
        check_memory(model, n_ctx, free, on_gpu=elsewhere, kv_type=self.kv_type)
        if self.servers and not has_gpu():
            where = ", ".join(self.addresses)
            free = self._free_on_servers
            check_memory(model, n_ctx, free, on_gpu=1 - elsewhere, kv_type=self.kv_type, where=f"the memory of {where}")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers."""
        return tuple(server.address for server in self.servers)

    @property
    def _free_on_servers(self) -> int:
        return sum(server.free for server in self.servers)
