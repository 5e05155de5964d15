"""Python in a process of its own, for what may abort a process."""

import subprocess
import sys
from collections.abc import Mapping


def run(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in isolation.

    It imports from where this process does, wherever its packages are installed; neither the current folder nor the
    environment adds a place.

    Args:
        arguments: as `sys.argv[1:]` has them.
        environment: of the child; None stands for this process's.
        seconds: that it may take.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
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
