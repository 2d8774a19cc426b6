"""Two processes: every family's encoders whole and spread over the ranks, on the same inputs.

    torchrun --nproc_per_node=2 spread_worker.py FOLDER

``FOLDER/<family>-<rank>.pt`` holds what both gave, and how much of the spread ones lies on this rank.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.resolve import resolve
from vfun_cli.training.encoders.frozen import Encoders
from vfun_cli.training.encoders.spread import Spread
from vfun_cli.training.ending import end_with
from vfun_cli.training.session import adapter_of, adapter_options

CAPTIONS = ("a red circle moves to the left", "waves", "two people talk at a table, one of them laughs")
CPU = torch.device("cpu")


def inputs_of(filler: Any, rank: int) -> list[list[Any]]:
    """Three calls: a caption each, two on one rank and one on the other, none on rank 1."""

    def whole(caption: str) -> Any:
        return caption if isinstance(filler, str) else (caption, torch.full_like(filler[1], 0.5))

    calls = [CAPTIONS[rank : rank + 1], CAPTIONS[: 2 - rank], CAPTIONS[:1] if rank == 0 else ()]
    return [[whole(caption) for caption in captions] for captions in calls]


def outputs(encoders: Encoders, name: str, calls: list[list[Any]]) -> list[Any]:
    return [encoders.run(name, inputs) for inputs in calls]


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.chdir(folder)
    for spec in families.FAMILIES.values():
        given = {"mixed_precision": "bf16", "low_vram": True}
        options = adapter_options(resolve("train", spec, given, demo=demo_default.make(spec), environ={}).config, CPU)
        whole, spread = (adapter_of(spec).encoders_of(options) for _ in range(2))
        spread.spread_over(Spread.over_all_ranks(CPU))
        found = {}
        for name in spread.together:
            calls = inputs_of(spread.sources[name].filler, rank)
            alone, shared = outputs(whole, name, calls), outputs(spread, name, calls)
            here = sum(parameter.to_local().numel() for parameter in spread[name].model.parameters())
            everything = sum(parameter.numel() for parameter in whole[name].model.parameters())
            found[name] = {"alone": alone, "shared": shared, "here": here, "everything": everything}
        torch.save(found, folder / f"{spec.name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
