"""Python code in a child process, for code that may abort its process."""

import subprocess
import sys
from collections.abc import Mapping


def run(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in an isolated child process.

    The child imports from the folders that this process imports from. The current folder and the environment add none.

    Args:
        arguments: as `sys.argv[1:]` has them.
        environment: variables of the child; None passes those of this process.
        seconds: time limit; None sets no limit.

    Raises:
        subprocess.TimeoutExpired: the child takes longer than `seconds`.
    """
    places = [place for place in sys.path if place]  # an empty one would be the current folder
    whole = f"import sys\nsys.path[:] = {places!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-c", whole, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        timeout=seconds,
        check=False,
    )
