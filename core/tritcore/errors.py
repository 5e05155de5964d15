"""Errors that a user can mend. The command line prints them as one line and exits with 1, or with 2 for misuse."""

import signal


class TritError(Exception):
    """Something is wrong with the input or the machine; the message says what, where and how to mend it."""


class UsageError(TritError):
    """The command line asks for what makes no sense, whatever the files hold."""


class Terminated(BaseException):
    """The process was asked to end: `signal` is SIGTERM or SIGHUP. Like KeyboardInterrupt, no error to handle."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.signal = number


class NotFiniteError(TritError):
    """A weight is NaN or infinite. `index` is its flat position in the weights that were given."""

    def __init__(self, index: int) -> None:
        super().__init__(f"weight {index} is not finite")
        self.index = index


class RangeError(TritError):
    """A block of weights lies outside the range of the scale codebook. `block` is its number."""

    def __init__(self, block: int, largest: float, bound: str) -> None:
        super().__init__(f"block {block}: largest weight {largest:.3g} is {bound}")
        self.block = block
        self.largest = largest
        self.bound = bound


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the next after a colon, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0] if lines else type(error).__name__
