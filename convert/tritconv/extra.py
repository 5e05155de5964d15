"""The extra `convert` of trit-gguf: packages of gigabytes, which neither chats nor plain searches need."""

from importlib.util import find_spec

from tritcore.errors import TritError

MODULES = ("accelerate", "safetensors", "sentencepiece", "torch", "transformers")


def need(what: str, otherwise: str = "") -> None:
    """See that the extra is installed, before anything is downloaded or read.

    Args:
        what: needs it, for people.
        otherwise: what to do without it.

    Raises:
        TritError: packages are missing.
    """
    if missing := [name for name in MODULES if find_spec(name) is None]:
        advice = f", or {otherwise}" if otherwise else ""
        raise TritError(f"{what} needs {', '.join(missing)}: pip install 'trit-gguf[convert]'{advice}")
