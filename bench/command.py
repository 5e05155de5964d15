"""What the measuring commands share: how errors and Ctrl-C end them."""

from collections.abc import Callable

from tritcore.console import error
from tritcore.errors import TritError


def exit_status(main: Callable[[], None]) -> int:
    """Run a command; return its exit status: 1 after an error, 130 after Ctrl-C, each with a line on stderr."""
    try:
        main()
    except TritError as problem:
        error(problem)
        return 1
    except KeyboardInterrupt:
        error("interrupted")
        return 130
    return 0
