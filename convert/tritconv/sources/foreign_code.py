"""Code that comes with a checkpoint does not run, unless the user trusts it.

There are two layers, as both transformers and llama.cpp's converter decide in many places. transformers asks one
function before it fetches code: that answers for all callers here, whatever they pass (the converter passes True),
and never asks on the terminal. Below it, an audit hook of Python refuses to run any file that the hub's libraries
have downloaded, for a caller that does not ask.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants

from tritcore.errors import TritError

# Packages that compute with kernels from the hub take torch's own without them.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

_ADVICE = "give --trust-remote-code if you trust whoever wrote it"
_QUESTION = "resolve_trust_remote_code"

_trusted = False
_hooked = False


class ForeignCodeError(TritError, ValueError):
    """A checkpoint would have run code. Also a ValueError: transformers then goes on without that code if it can."""


@contextmanager
def trusted(yes: bool = True) -> Iterator[None]:
    """Within this context, checkpoints may run code of theirs."""
    global _trusted
    before, _trusted = _trusted, yes
    try:
        yield
    finally:
        _trusted = before


def is_trusted() -> bool:
    """Whether checkpoints may run code of theirs now."""
    return _trusted


def refusal_in(error: BaseException | None) -> ForeignCodeError | None:
    """The refusal that led to an error, if one did."""
    while error is not None and not isinstance(error, ForeignCodeError):
        error = error.__cause__ or error.__context__
    return error


def guard() -> None:
    """From now on, transformers runs code from a checkpoint only within `trusted`. To be called before each use of it.

    Code that is refused raises ForeignCodeError.
    """
    global _hooked
    from transformers import dynamic_module_utils

    original = getattr(dynamic_module_utils, _QUESTION)
    if original is not _answer:
        # modules hold the function by name too
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.") and vars(module).get(_QUESTION) is original:
                setattr(module, _QUESTION, _answer)
    if not _hooked:
        _hooked = True
        sys.addaudithook(_Hook())


def check_attention(config: Any, name: str) -> None:
    """See that a configuration of transformers names no code of the hub to compute attention with.

    Raises:
        ForeignCodeError: it does.
    """
    kernel = getattr(config, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel and not _trusted:
        raise ForeignCodeError(f"{name} would run code from {kernel} to compute attention: {_ADVICE}")


def _answer(
    trust_remote_code: bool | None,
    model_name: str | os.PathLike[str],
    has_local_code: bool,
    has_remote_code: bool,
    error_message: str | None = None,
    upstream_repo: str | None = None,
    **_: Any,
) -> bool:
    """Whether to run a checkpoint's code, in place of the function of this signature in transformers."""
    if _trusted:
        return not has_local_code if trust_remote_code is None else trust_remote_code
    if has_remote_code and not has_local_code:
        # some callers give the repository in the place of the message
        whose = next((text for text in (upstream_repo, error_message) if text and " " not in text), None)
        raise ForeignCodeError(
            f"{model_name} would run Python code {f'from {whose}' if whose else 'of its own'}: {_ADVICE}"
        )
    return False


class _Hook:
    """Sees each file that Python is about to run or load."""

    def __init__(self) -> None:
        folders = (
            constants.HF_HOME,
            constants.HF_HUB_CACHE,
            os.environ.get("HF_MODULES_CACHE"),  # where transformers copies code to, if not to HF_HOME
            os.environ.get("KERNELS_CACHE"),
        )
        absolute = {os.path.abspath(os.path.expanduser(folder)) for folder in folders if folder}
        self._folders = tuple(
            os.path.join(folder, "") for folder in absolute | {os.path.realpath(folder) for folder in absolute}
        )

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if _trusted:
            return
        if event == "exec":
            file = arguments[0].co_filename
        elif event == "import":
            file = arguments[1]  # of a compiled module; None for others
        elif event == "ctypes.dlopen":
            file = arguments[0]
        else:
            return
        if isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(self._folders):
            raise ForeignCodeError(f"{file}, which was downloaded, would run: {_ADVICE}")
