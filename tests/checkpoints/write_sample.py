"""Writes checkpoints of known weights with the real engines: ``torchrun --nproc_per_node 2 write_sample.py DIRECTORY``.

The weights and moments are ``sample_weights`` and ``sample_moments``; the engines only cut, pad and store them, so
every strategy holds the same numbers. One launch writes them all, since most of its time goes into imports.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from vfun_cli.training.ending import end_with
from vfun_cli.training.strategy import use_gloo_alone

STRATEGIES = (
    "single",
    "fsdp",
    "fsdp-original",
    "zero2",
    "zero2-round-robin",
    "zero2-original",
    "zero3",
    "zero3-original",
)
"""The samples: ``single`` is written by the tests themselves, ``-original`` as accelerate's save_state lays it out."""

SHAPES = {
    "patch.weight": (3, 1, 1, 5),  # shorter than some shards of two ranks, odd everywhere
    "patch.bias": (1,),  # dim 0 of one: the second FSDP rank holds nothing
    "blocks.0.q.weight": (7, 5),
    "blocks.0.q.bias": (7,),
    "blocks.1.q.weight": (13, 11),
    "blocks.1.q.bias": (13,),
    "head.weight": (17, 19),
    "head.bias": (17,),
}
FROZEN = {"embed.weight": (9, 5), "embed.bias": (9,)}


def sample_weights() -> dict[str, np.ndarray]:
    """The trainable fp32 weights every sample checkpoint holds."""
    rng = np.random.default_rng(20)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def sample_moments() -> dict[str, dict[str, np.ndarray]]:
    """The AdamW moments every sample checkpoint holds."""
    rng = np.random.default_rng(21)
    return {
        name: {
            "exp_avg": rng.standard_normal(shape, dtype=np.float32),
            "exp_avg_sq": rng.random(shape, dtype=np.float32),
        }
        for name, shape in SHAPES.items()
    }


class Holder(nn.Module):
    """A module with a weight and a bias of the given shapes."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight))
        self.bias = nn.Parameter(torch.zeros(bias))

    def forward(self) -> torch.Tensor:
        """Touch both parameters, so that both get a gradient."""
        return self.weight.float().sum() + self.bias.float().sum()


class Block(nn.Module):
    """A block with one holder, named as attention projections are."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.q = Holder(weight, bias)

    def forward(self) -> torch.Tensor:
        """The holder's value."""
        return self.q()


class Model(nn.Module):
    """Parameters SHAPES (trainable) and FROZEN."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = Holder(SHAPES["patch.weight"], SHAPES["patch.bias"])
        self.embed = Holder(FROZEN["embed.weight"], FROZEN["embed.bias"]).requires_grad_(False)
        self.blocks = nn.ModuleList(
            Block(SHAPES[f"blocks.{i}.q.weight"], SHAPES[f"blocks.{i}.q.bias"]) for i in range(2)
        )
        self.head = Holder(SHAPES["head.weight"], SHAPES["head.bias"])

    def forward(self) -> torch.Tensor:
        """One scalar that depends on every parameter."""
        return self.patch() + self.embed() + self.head() + sum(block() for block in self.blocks)


def split_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two parameter groups (biases without weight decay), so that more than one flat partition is written."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.01},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


def write_fsdp(directory: Path, *, split: bool) -> None:
    """FSDP2 and torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3)
    model().backward()
    optimizer.step()
    weights, moments = sample_weights(), sample_moments()

    def fill(target: DTensor, value: np.ndarray) -> None:
        full = torch.from_numpy(value)
        target.to_local().copy_(distribute_tensor(full, target.device_mesh, target.placements).to_local())

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                fill(parameter, weights[name])
                for key, value in moments[name].items():
                    fill(optimizer.state[parameter][key], value)
    state, optimizer_state = get_state_dict(
        model, optimizer, options=StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
    )
    if split:
        dcp.save({"model": state}, checkpoint_id=directory / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": optimizer_state}, checkpoint_id=directory / "optimizer_0")
    else:
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=directory / "model")


def fill_zero2(optimizer: object, parameter: nn.Parameter, weight: np.ndarray, moments: dict[str, np.ndarray]) -> None:
    """Put known numbers into this rank's fragment, where DeepSpeed's own mapping says it is."""
    mapping = parameter._hp_mapping
    if mapping is None:  # this rank holds nothing of it
        return
    inside = mapping.lp_fragment_address
    part = slice(inside.start, inside.start + inside.numel)
    mapping.hp_fragment.data.copy_(torch.from_numpy(weight.ravel()[part]))
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    held = mapping.hp_fragment_address
    for key, value in moments.items():
        state = optimizer.optimizer.state[flat][key]
        state.narrow(0, held.start, held.numel).copy_(torch.from_numpy(value.ravel()[part]))


def fill_zero3(optimizer: object, parameter: nn.Parameter, weight: np.ndarray, moments: dict[str, np.ndarray]) -> None:
    """Put known numbers into this rank's partition. The public setters overrun sizes that the ranks do not divide."""
    for key, value in {None: weight, **moments}.items():
        target, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        padded = np.pad(value.ravel(), (0, target.numel() * dist.get_world_size() - value.size))
        start = target.numel() * dist.get_rank()
        target.data.copy_(torch.from_numpy(padded[start : start + target.numel()]))


def write_zero(directory: Path, stage: int, *, tag: str, round_robin: bool = False) -> None:
    """A DeepSpeed engine of the given stage."""
    import deepspeed

    model = Model()
    # groups of 50 elements: ZeRO-3 then writes more flat groups than the optimizer has parameter groups
    zero = {"stage": stage, "sub_group_size": 50, "round_robin_gradients": round_robin}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(split_groups(model), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.backward(engine())
    engine.step()
    weights, moments = sample_weights(), sample_moments()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            (fill_zero2 if stage == 2 else fill_zero3)(engine.optimizer, parameter, weights[name], moments[name])
    engine.save_checkpoint(str(directory), tag=tag, exclude_frozen_parameters=True)


def main(directory: Path) -> int:
    """Write every sample."""
    import deepspeed

    torch.set_num_threads(1)
    use_gloo_alone()
    deepspeed.init_distributed(dist_backend="gloo")
    write_fsdp(directory / "fsdp", split=False)
    write_fsdp(directory / "fsdp-original", split=True)
    write_zero(directory / "zero2" / "model", 2, tag="state")
    write_zero(directory / "zero2-round-robin" / "model", 2, tag="state", round_robin=True)
    write_zero(directory / "zero2-original", 2, tag="pytorch_model")  # where accelerate's save_state puts it
    write_zero(directory / "zero3" / "model", 3, tag="state")
    write_zero(directory / "zero3-original", 3, tag="pytorch_model")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
