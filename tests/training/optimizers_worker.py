"""Two processes: optimizers under each strategy, saved, gone on from, and taken over by another strategy.

    torchrun --nproc_per_node=2 optimizers_worker.py FOLDER

``FOLDER/results.json`` says of each case what came of it; ``FOLDER/<case>`` holds its checkpoints.
"""

import hashlib
import json
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_worker import accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vfun_cli.checkpoints.naming import by_parameter
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import VfunError
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.ending import end_with
from vfun_cli.training.model import prepare_state
from vfun_cli.training.optim import set_learning_rate
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.formats import counted_in
from vfun_cli.training.state.gather import collect, restore
from vfun_cli.training.state.live import (
    TrainedState,
    is_partitioned,
    master_weights,
    stepping_optimizer,
)
from vfun_cli.training.state.moments import kept

WIDTH = 128
SLOW = ("blocks.1", "head.bias")
RATE = 1e-2
IN_8_BITS = ("ddp", "fsdp") if find_spec("torchao") else ()
CASES: dict[str, dict[str, Any]] = {
    **{f"8bit-{strategy}": {"strategy": strategy, "optimizer": "adamw8bit"} for strategy in IN_8_BITS},
    **{f"slow-{strategy}": {"strategy": strategy, "trainable_modules_low_learning_rate": SLOW}
       for strategy in ("ddp", "fsdp", "zero2", "zero3")},
    **{f"class-{strategy}": {"strategy": strategy, "optimizer": "torch.optim.RAdam"}
       for strategy in ("ddp", "fsdp", "zero2", "zero3")},
}  # fmt: skip
TAKEN_OVER = {
    **{("slow-ddp", f"slow-{to}"): None for to in ("fsdp", "zero2", "zero3")},
    **{(f"slow-{of}", "slow-ddp"): None for of in ("fsdp", "zero2", "zero3")},
    ("class-ddp", "class-fsdp"): None,
    ("class-fsdp", "class-zero3"): None,
    ("class-zero3", "class-zero2"): None,
    ("class-zero2", "class-ddp"): None,
    **{(f"8bit-{of}", f"8bit-{to}"): "cannot be cut anew" for of in IN_8_BITS for to in IN_8_BITS if of != to},
    ("slow-ddp", "class-ddp"): "adamw, which means nothing to torch.optim.RAdam",
}
"""From which case to which, and why not."""


class CogVideoXBlock(nn.Module):
    """Of a class that FSDP is told to wrap; its vectors are too short for 8 bits, its matrix is not, cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(3))

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.tanh(self.inner(values)) * self.gain.mean()


class Transformer(nn.Module):
    """Two blocks and a head whose rows two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(CogVideoXBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 33)

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return self.head(values)


class Adapter:
    """The part of a family's that a run without encoders needs."""

    def __init__(self) -> None:
        self.transformer = Transformer()


def config_of(case: str) -> RunConfig:
    options = {"mixed_precision": "no", "learning_rate": RATE, "num_processes": 2, "device": "cpu", **CASES[case]}
    return RunConfig(**options)


def start(case: str, folder: Path) -> TrainedState:
    config, adapter = config_of(case), Adapter()
    made: Any = adapter
    return prepare_state(config, SPEC, made, accelerator(config.strategy, folder, bf16=False))


def saver(case: str, folder: Path) -> Checkpointer:
    root = folder / case
    root.mkdir(parents=True, exist_ok=True)
    return Checkpointer(RunDir(root), CASES[case]["strategy"], keep=None, config_files={})


def save(case: str, state: TrainedState, step: int, folder: Path) -> Path:
    run_config = {
        "optimizer": state.kind.name, "num_processes": 2, "gradient_accumulation_steps": 1,
        "pretrained_model_name_or_path": "model",
    }  # fmt: skip
    progress = {"step": step, "strategy": CASES[case]["strategy"], "world_size": 2, "family": "none", "kind": "train"}
    return saver(case, folder).save(state, {**progress, "run_config": run_config})


def train(state: TrainedState, steps: range) -> list[float]:
    losses = []
    rank = dist.get_rank()
    for step in steps:
        set_learning_rate(state.optimizer, RATE / (1 + step))
        batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2 * step + rank))
        with state.accelerator.accumulate(state.model):
            loss = (state.model(batch) - batch[:, :33].cumsum(dim=1)).square().mean()
            state.accelerator.backward(loss)  # in which DeepSpeed takes its step
            state.optimizer.step()
            state.optimizer.zero_grad()
        losses.append(loss.item())
        for group in stepping_optimizer(state).param_groups if state.kind.counts else ():
            group["seen"] = step + 1  # as some optimizers count
    return losses


def seen(state: TrainedState) -> list[int | None]:
    return [group.get("seen") for group in stepping_optimizer(state).param_groups]


def bytes_held(state: TrainedState) -> tuple[int, int]:
    """Of this rank: its masters, and what the optimizer keeps."""
    each = stepping_optimizer(state).state if is_partitioned(state) else kept(state)
    moments = [value for found in each.values() for value in found.values()]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in moments]
    return sum(master.nbytes for master in master_weights(state)), sum(value.nbytes for value in local)


def digest(state: TrainedState) -> str:
    """Of the weights that lie on this rank."""
    found = b"".join(weight.detach().cpu().numpy().tobytes() for weight in master_weights(state))
    return hashlib.sha256(found).hexdigest()


def gathered(case: str, state: TrainedState, folder: Path) -> bool:
    """Whether whole tensors, as checkpoints of adapters hold them, bring another state to the very same steps."""
    content = [deepcopy(collect(state))]
    dist.broadcast_object_list(content)
    weights, moments = content[0]
    again = start(case, folder)
    restore(again, weights, by_parameter(moments, weights), counted_in(moments))
    same = seen(again) == seen(state) and train(state, range(2, 4)) == train(again, range(2, 4))
    # Not by their digests, which ZeRO's padding is a part of.
    (expected, _), (found, _) = collect(state), collect(again)
    return same and all(torch.equal(found[name], expected[name]) for name in expected)


def run(case: str, folder: Path) -> dict[str, Any]:
    state = start(case, folder)
    losses = train(state, range(2))
    path = save(case, state, 2, folder)
    losses += train(state, range(2, 5))
    again = start(case, folder)
    saver(case, folder).load(again, path)
    counted = seen(again)
    resumed = train(again, range(2, 5))
    result = {"losses": losses, "resumed": resumed, "same": digest(state) == digest(again), "seen": counted}
    fresh = start(case, folder)
    train(fresh, range(2))
    result["bytes"] = bytes_held(fresh)
    result["gathered"] = gathered(case, fresh, folder)
    if case == "8bit-fsdp":
        local = [
            value.to_local() for kept in fresh.optimizer.state.values() for value in kept.values()
            if isinstance(value, DTensor)
        ]  # fmt: skip
        result["kinds"] = sorted({type(value).__name__ for value in local})
    return result


def take_over(source: str, target: str, folder: Path) -> dict[str, Any]:
    state = start(target, folder)
    try:
        saver(target, folder).load(state, folder / source / "checkpoint-2")
    except VfunError as error:
        return {"refused": error.message, "exit_code": error.exit_code}
    save(target, state, 1000 + list(CASES).index(source), folder)
    return {"seen": seen(state), "losses": train(state, range(2, 5))}


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    results = {case: run(case, folder) for case in CASES}
    results |= {f"{source} to {target}": take_over(source, target, folder) for source, target in TAKEN_OVER}
    leave(results, folder)
    return 0


def leave(results: dict[str, Any], folder: Path) -> None:
    """What each rank has found, in a file of all."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
