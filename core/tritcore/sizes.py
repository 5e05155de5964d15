"""Sizes in bytes as text, such as 120MB or 1.5GiB."""

import re

_UNITS = {"": 1} | {
    unit + suffix: base**power
    for suffix, base in (("", 1000), ("I", 1024))
    for power, unit in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.ASCII)


def parse(text: str) -> int | None:
    """The number of bytes that `text` means; None if `text` is no size."""
    found = _SIZE.fullmatch(text.strip().upper())
    return int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else None


def show(n_bytes: float) -> str:
    """A size as text with about three digits, such as 12.3 MB."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if (amount := n_bytes / 1000**power) >= 1:
            return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"
