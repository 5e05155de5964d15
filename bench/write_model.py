"""GGUF files that hold a source's tensors in types other than TRIT."""

from collections.abc import Callable, Mapping
from pathlib import Path

from gguf import GGUFValueType, LlamaFileType

from tritconv.methods import Finished
from tritconv.plan import Plan
from tritconv.sources.source import Source, Value
from tritconv.workers import Workers
from tritconv.writer import Header, write
from tritcore.output import reserve


def write_model(
    source: Source,
    metadata: Mapping[str, Value],
    plan: Plan,
    target: Path,
    threads: int,
    progress: Callable[[str, int], None] = lambda name, n_bytes: None,
) -> None:
    """Write the tensors of a source as its plan has them, one in memory at a time; `target` appears when it is whole.

    Args:
        metadata: added to the source's; the file type is F16.
        plan: with a type other than TRIT for each tensor.
        progress: called after each tensor with its name and size.

    Raises:
        TritError: a tensor or the file cannot be read or written.
    """
    file_type = Value(int(LlamaFileType.MOSTLY_F16), GGUFValueType.UINT32)
    header = Header(
        source.architecture, {**source.metadata, "general.file_type": file_type, **metadata}, source.tensors, ()
    )
    finished = (Finished(tensor, tensor.load()) for tensor in source.tensors)
    with reserve(target, force=True) as output, Workers(threads) as workers:
        write(header, plan, finished, output, workers, progress)
