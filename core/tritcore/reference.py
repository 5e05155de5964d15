"""What a user names a model by: a local file, or a reference to a model of the Hugging Face hub."""

import os
import re
from pathlib import Path

from tritcore.repository import REPO_ID

_REFERENCE = re.compile(
    rf"(?P<repo>{REPO_ID}(?<!\.gguf))(?:/(?P<file>[^\\]+\.gguf)|:(?P<type>[\w.-]+))?"
    r"(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?",
    re.ASCII | re.IGNORECASE,
)


def find_model(reference: str) -> Path:
    """The path of a model. One of the hub is downloaded, unless it is in the cache of huggingface_hub already.

    Args:
        reference: a local file, which goes before all else; or `org/name`, `org/name:TYPE` with a tensor type that the
            name of the file says, or `org/name/file.gguf`, each with `@revision` if wanted. What cannot be a reference
            to the hub is a path, whether there is such a file or not.

    Returns:
        The file, or the first part of a split model of the hub, with all others beside it.

    Raises:
        TritError: the hub has no such model, several that fit, or it cannot be had.
    """
    found, path = _REFERENCE.fullmatch(reference), Path(reference)
    if found is None or os.path.exists(path) or (found["file"] and os.path.isdir(path.parent)):
        return path
    from tritcore import hub  # loads huggingface_hub

    return hub.download_model(found["repo"], found["file"], found["type"], found["revision"])
