"""A large text encoder sharded over the ranks of a machine, where the strategy shards the transformer.

Each rank keeps a part of every block and gathers a block's weights while it computes; between machines nothing is sent.
So the ranks of a machine must run such an encoder together, equally often, or each would wait for the others for ever;
those of all machines do.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True, kw_only=True)
class EncoderSharding:
    """The ranks of this machine, which share an encoder."""

    mesh: DeviceMesh

    @classmethod
    def within_a_machine(cls, device: torch.device) -> "EncoderSharding":
        """Collective: every rank of the job calls it."""
        here = ranks_here()
        shape = (dist.get_world_size() // here, here)
        return cls(mesh=init_device_mesh(device.type, shape, mesh_dim_names=("machine", "rank"))["rank"])

    def shard(self, encoder: nn.Module) -> None:
        """Keep this rank's shard of each block, on its device; a block's weights are gathered while it computes."""
        model = encoder.get_submodule("model")
        for block in _blocks(model):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        kind = type(model)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        # transformers looks up what a model can give (its hidden states) by how its class is printed.
        type(model).__module__, type(model).__qualname__ = kind.__module__, kind.__qualname__


def ranks_here() -> int:
    """How many ranks of the job this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
