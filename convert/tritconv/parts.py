"""Which tensors go into which part of a model that is split over several files."""

from collections.abc import Sequence
from itertools import pairwise


def in_one_file(n_tensors: int) -> Sequence[range]:
    """All tensors in a single file."""
    return (range(n_tensors),)


def layout(sizes: Sequence[int], first_room: int, other_room: int, most: int) -> Sequence[range]:
    """The numbers of the tensors of each file, in order, with as few files as that takes.

    The first file holds no tensor where none fits beside the metadata. A tensor that is too large gets a file of its
    own, which is larger than `most`.

    Args:
        sizes: of the tensors, in bytes, with all that each adds to a file.
        first_room: bytes of the first file without tensors.
        other_room: bytes of any other file without tensors.
        most: bytes of a file.
    """
    starts, used = [0], first_room
    for number, size in enumerate(sizes):
        if used + size > most and (number > starts[-1] or len(starts) == 1):
            starts.append(number)
            used = other_room
        used += size
    return tuple(range(*ends) for ends in pairwise([*starts, len(sizes)]))
