"""How many bytes a checkpoint takes: one formula, for what is said before a launch and for the look before a save."""


def state_bytes(parameters: int, *, moments: int, average: bool, copy_bytes: int) -> int:
    """Float32 weights, what the optimizer keeps of them, and what goes with them.

    Args:
        parameters: that are trained.
        moments: bytes that the optimizer keeps of all of them.
        average: whether a moving average is kept.
        copy_bytes: of a parameter in the copies that DeepSpeed computes with and saves, where it does.
    """
    return parameters * (4 * (1 + average) + copy_bytes) + moments


def most_bytes(parameters: int, tensors: int, *, moments: int, average: bool, copy_bytes: int) -> int:
    """The same with the most that describing so many tensors takes."""
    state = state_bytes(parameters, moments=moments, average=average, copy_bytes=copy_bytes)
    return state + tensors * _METADATA_BYTES + _BYTES_OF_OTHER_FILES


_METADATA_BYTES = 8192
"""A parameter's entries in DCP's metadata or DeepSpeed's pickles, three tensors in the shards of a few ranks."""

_BYTES_OF_OTHER_FILES = 1 << 20
