"""Errors that a user can correct. The command lines print one line and exit with 1, or with 2 for misuse."""

import signal


class TritError(Exception):
    """The input or the machine has a fault. The message names the fault, the place and a remedy, in one line."""


class UsageError(TritError):
    """The options contradict each other or have invalid values, whatever the files contain."""


class Terminated(BaseException):
    """The process got the signal `signal`, SIGTERM or SIGHUP. It is no `Exception`, as KeyboardInterrupt is none."""

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
    """The first line of an error's message, and the second after a colon; the error's class if the message is empty."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0] if lines else type(error).__name__
