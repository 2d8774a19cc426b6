"""How FSDP2 cuts a weight: along its first dimension, as ``torch.chunk`` does, over the last dimension of its mesh.

Ranks along a dimension before that, as hybrid sharding has it, hold the same.
"""

from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def shards_of(weight: DTensor) -> int:
    """Into how many parts it is cut."""
    return weight.device_mesh.size(weight.device_mesh.ndim - 1)


def shard_here(weight: DTensor) -> int:
    """Which of them this rank has."""
    return weight.device_mesh.get_local_rank(weight.device_mesh.ndim - 1)


def shard_group(weight: DTensor) -> ProcessGroup:
    """The ranks that have one whole between them."""
    return weight.device_mesh.get_group(weight.device_mesh.ndim - 1)


def rows_before(weight: DTensor) -> int:
    """Rows of the whole before those of this rank: parts are equal, the last ones shorter or empty."""
    return shard_here(weight) * -(-weight.shape[0] // shards_of(weight))
