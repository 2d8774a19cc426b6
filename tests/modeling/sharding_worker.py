"""Two machines of two processes: every family's encoders whole and sharded over a machine, on the same inputs.

    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=2 ... sharding_worker.py FOLDER

``FOLDER/<family>-<rank>.pt`` holds what both gave, how much of the sharded ones lies on this rank, and the ranks that
share them; ``FOLDER/begun-<rank>.pt`` what the ranks agreed on before their steps. The ranks of either machine have the
same to do.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.encode import Sample
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import Input
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.modeling.encoders.sharding import EncoderSharding
from vfun_cli.modeling.inputs import Value
from vfun_cli.modeling.shards import shard_group
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch
from vfun_cli.training.ending import end_with
from vfun_cli.training.model import adapter_options
from vfun_cli.training.signals import CONTINUE, INTERRUPTED
from vfun_cli.training.turns import begin_step, most_of_all

CAPTIONS = ("a red circle moves to the left", "waves", "two people talk at a table, one of them laughs")
CPU = torch.device("cpu")


def inputs_of(dummy_input: Any, rank: int) -> list[list[Any]]:
    """Three calls: a caption each, two on one rank and one on the other, none on rank 1."""

    def whole(caption: str) -> Any:
        return caption if isinstance(dummy_input, str) else (caption, torch.full_like(dummy_input[1], 0.5))

    calls = [CAPTIONS[rank : rank + 1], CAPTIONS[: 2 - rank], CAPTIONS[:1] if rank == 0 else ()]
    return [[whole(caption) for caption in captions] for captions in calls]


def outputs(encoders: Encoders, name: str, calls: list[list[Any]]) -> list[Any]:
    alone = encoders.sharding is None
    shared_calls = [0] * len(calls) if alone else most_of_all([len(inputs) for inputs in calls])
    return [encoders.run(name, inputs, count) for inputs, count in zip(calls, shared_calls, strict=True)]


def begun_together(encoders: Encoders, rank: int) -> dict[str, Any]:
    """Two steps of two and one micro-batches that come late on one rank, then one whose clips never come to rank 1,
    and of which rank 0 is asked to stop.
    """
    first, second, third = micro_batches(encoders, rank)
    late = [None, None] if rank else []
    stop: Any = SimpleNamespace(reason=lambda: CONTINUE)
    arriving = iter([first, *late, second, third])
    steps = [begin_step(lambda: next(arriving), count, stop, encoders) for count in (2, 1)]
    asked = iter([CONTINUE] * 3)
    stop.reason = lambda: CONTINUE if rank else next(asked, INTERRUPTED)
    reason, none = begin_step(lambda: None if rank else third, 1, stop, encoders)
    return {
        "reasons": [each for each, _ in steps],
        "calls": [[dict(each.shared_calls) for each in taken] for _, taken in steps],
        "stopped": (reason, none),
    }


def micro_batches(encoders: Encoders, rank: int) -> list[LoadedBatch]:
    """Rank 0 has a caption to encode in the first one, rank 1 two in the last one, nobody any in the second."""
    text = Input(encoder=encoders.shared[0], lazy=Value("waves"))
    clips = [[1, 0, 0], [0, 0, 2]][rank]
    sample = Sample(inputs={"text": text}, values={"text": "waves"})
    return [
        LoadedBatch(batch=MicroBatch(epoch=0, step=step, index=0, requests=()), samples=[sample] * count)
        for step, count in enumerate(clips)
    ]


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, of_machine = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    os.chdir(folder)
    for spec in families.FAMILIES.values():
        config = resolve("train", spec, {"low_vram": True}, demo=demo_default.make(spec), environ={}).config
        options = replace(adapter_options(config, spec, CPU), compute_dtype=torch.bfloat16)
        whole, sharded = (adapter_of(spec).encoders_of(options) for _ in range(2))
        sharded.shard_over(EncoderSharding.within_a_machine(CPU))
        found = {}
        for name in sharded.shared:
            calls = inputs_of(sharded.sources[name].dummy_input, of_machine)
            alone, shared = outputs(whole, name, calls), outputs(sharded, name, calls)
            parameters = list(sharded[name].model.parameters())
            here = sum(parameter.to_local().numel() for parameter in parameters)
            ranks = {tuple(dist.get_process_group_ranks(shard_group(parameter))) for parameter in parameters}
            everything = sum(parameter.numel() for parameter in whole[name].model.parameters())
            found[name] = {"alone": alone, "shared": shared, "here": here, "everything": everything, "ranks": ranks}
        torch.save(found, folder / f"{spec.name}-{rank}.pt")
    torch.save(begun_together(sharded, of_machine), folder / f"begun-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1])))
