"""A large text encoder sharded over the ranks, where the strategy shards the transformer.

Each rank keeps a part of every block and gathers a block's weights while it computes, so the ranks run such an encoder
together: all of them, equally often, or each would wait for the others for ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True, kw_only=True)
class EncoderSharding:
    """The ranks that share an encoder."""

    mesh: DeviceMesh

    @classmethod
    def over_all_ranks(cls, device: torch.device) -> "EncoderSharding":
        """Collective: every rank of the job calls it."""
        return cls(mesh=init_device_mesh(device.type, (dist.get_world_size(),)))

    def shard(self, encoder: nn.Module) -> None:
        """Keep this rank's shard of each block, on its device; a block's weights are gathered while it computes."""
        model = encoder.get_submodule("model")
        for block in _blocks(model):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        kind = type(model)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        # transformers looks up what a model can give (its hidden states) by how its class is printed.
        type(model).__module__, type(model).__qualname__ = kind.__module__, kind.__qualname__


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
