"""Four processes: optimizers under hybrid sharding, two by two, saved, gone on from, and cut otherwise.

    torchrun --nproc_per_node=4 hybrid_worker.py FOLDER

``FOLDER/results.json`` says of each rank what came of each optimizer; ``FOLDER/<optimizer>`` holds its checkpoint.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from optimizers_worker import RATE, Adapter, digest, leave, train
from sharded_worker import accelerator

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import VfunError
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.ending import end_with
from vfun_cli.training.model import prepare_state
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.gather import collect
from vfun_cli.training.state.live import TrainedState

RANKS, SIZE = 4, 2
OPTIMIZERS = ("adamw", *(("adamw8bit",) if find_spec("torchao") else ()))


def config_of(optimizer: str, size: int | None) -> RunConfig:
    return RunConfig(
        strategy="fsdp", device="cpu", mixed_precision="no", learning_rate=RATE, num_processes=RANKS,
        optimizer=optimizer, fsdp_shard_size=size,
    )  # fmt: skip


def start(optimizer: str, size: int | None, folder: Path, *, made_for: int | None) -> TrainedState:
    """Asked to cut over groups of ``size``, by an accelerator that was made for others, maybe."""
    made: Any = Adapter()
    prepared_for = accelerator("fsdp", folder, bf16=False, num_processes=RANKS, fsdp_shard_size=made_for)
    return prepare_state(config_of(optimizer, size), SPEC, made, prepared_for)


def saver(optimizer: str, folder: Path) -> Checkpointer:
    root = folder / optimizer
    root.mkdir(parents=True, exist_ok=True)
    return Checkpointer(RunDir(root), "fsdp", keep=None, config_files={})


def refused(work: Any) -> list[Any]:
    try:
        work()
    except VfunError as error:
        return [error.exit_code, error.message]
    return [0, ""]


def run(optimizer: str, folder: Path) -> dict[str, Any]:
    state = start(optimizer, SIZE, folder, made_for=SIZE)
    losses = train(state, range(2))
    run_config = config_of(optimizer, SIZE).to_json() | {"pretrained_model_name_or_path": "model"}
    progress = {"step": 2, "strategy": "fsdp", "world_size": RANKS, "family": "none", "kind": "train"}
    path = saver(optimizer, folder).save(state, {**progress, "run_config": run_config})
    saved, _ = collect(state)
    losses += train(state, range(2, 4))

    again = start(optimizer, SIZE, folder, made_for=SIZE)
    saver(optimizer, folder).load(again, path)
    resumed = train(again, range(2, 4))

    over_all = start(optimizer, None, folder, made_for=None)
    answer = refused(lambda: saver(optimizer, folder).load(over_all, path))
    taken, _ = collect(over_all)
    return {
        "losses": losses,
        "resumed": resumed,
        "digest": digest(state),
        "digest again": digest(again),
        "cut anew": answer,
        "as saved": all(torch.equal(taken[name], values) for name, values in saved.items()),
        "losses cut anew": [] if answer[0] else train(over_all, range(2, 4)),
    }


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    results: dict[str, Any] = {optimizer: run(optimizer, folder) for optimizer in OPTIMIZERS}
    for size, made_for in ((SIZE, None), (None, SIZE)):
        results[f"{made_for} for {size}"] = refused(
            lambda size=size, made_for=made_for: start("adamw", size, folder, made_for=made_for)
        )
    leave(results, folder)
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
